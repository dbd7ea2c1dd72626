"""KL penalty to a reference policy, for any per-token loss.

    with_reference_kl    loss + β · KL(π ‖ π_ref), the KL estimated at the sampled token
    score_per_token       log p(y_t) and entropy of one model alone, for `fused_linear_loss`

The reference reads the student's own prompt, without any context: SDPG (arXiv 2606.04036) finds
that lengths shrink without it. The estimate is GRPO's (arXiv 2402.03300, equation 4). Validated
against plain autodiff of the formula (tests/test_kl_penalty.py).
"""

from functools import partial
from typing import Any, NamedTuple

import jax

from sdpo_jax.losses.divergences import entropy
from sdpo_jax.losses.fused_linear import Metrics, PerTokenLoss, with_live_model
from sdpo_jax.losses.policy_gradient import reference_kl
from sdpo_jax.losses.tiles import by_rows
from sdpo_jax.losses.vocabulary import WHOLE, Vocabulary, log_softmax, scale_logits, select_targets


class ReferenceKlTokenInputs(NamedTuple):
    """Inputs of a loss with a reference KL, one entry per token."""

    objective: Any  # tokens of the objective
    targets: jax.Array  # [M] integer, the sampled tokens
    reference_log_probs: jax.Array  # [M]


class ReferenceKlSharedInputs(NamedTuple):
    """Inputs of a loss with a reference KL that all tokens share."""

    objective: Any
    temperature: jax.Array  # [] float32


class ScoreTokenInputs(NamedTuple):
    """Inputs of `score_per_token` with one entry per token."""

    targets: jax.Array  # [M] integer
    live_hidden: jax.Array | None = None  # [M, D], of a trust region's other model


class ScoreSharedInputs(NamedTuple):
    """Inputs of `score_per_token` that all tokens share."""

    temperature: jax.Array  # [] float32
    live_head: jax.Array | None = None  # [D, V]
    coefficient: jax.Array | None = None  # [] float32


def with_reference_kl(
    objective: PerTokenLoss, *, coefficient: float, vocabulary: Vocabulary = WHOLE
) -> PerTokenLoss:
    """`objective`, any per-token loss, + β · `reference_kl` of the sampled token.

    Args:
        objective: as the last two arguments, see `sdpo_per_token`.
        coefficient: β, at least 0.
        vocabulary: as there.

    Returns:
        PerTokenLoss of ReferenceKlTokenInputs and ReferenceKlSharedInputs; one more metric,
        reference_kl, in nats.

    Source: equation 4 of arXiv 2402.03300; beside a distillation, SDPG, arXiv 2606.04036.

    >>> from sdpo_jax.losses.per_token import SftTokenInputs, sft_per_token
    >>> loss = with_reference_kl(sft_per_token(), coefficient=1.0)
    >>> y, reference = jnp.array([0]), jnp.array([-1.0])
    >>> tokens = ReferenceKlTokenInputs(SftTokenInputs(y), y, reference)
    >>> value, more = loss(jnp.zeros((1, 2)), tokens, ReferenceKlSharedInputs(None, jnp.array(1.0)))
    >>> print(f"{value[0]:.4f} {more['reference_kl'][0]:.4f}")
    0.7358 0.0426
    """
    if not coefficient >= 0.0:
        raise ValueError(f"coefficient must be at least 0, got {coefficient}")
    kl = partial(_reference_kl, vocabulary=vocabulary)

    def loss(
        logits: jax.Array, tokens: ReferenceKlTokenInputs, constants: ReferenceKlSharedInputs
    ) -> tuple[jax.Array, Metrics]:
        value, metrics = objective(logits, tokens.objective, constants.objective)
        rows = tokens._replace(objective=None)
        apart, _ = by_rows(kl, logits, rows, constants.temperature, vocabulary=vocabulary)
        return value + coefficient * apart, {**metrics, "reference_kl": apart}

    return loss


def _reference_kl(
    logits: jax.Array, rows: ReferenceKlTokenInputs, temperature: jax.Array, vocabulary: Vocabulary
) -> tuple[jax.Array, Metrics]:
    logits = scale_logits(logits, temperature=temperature)
    log_probs = log_softmax(logits, vocabulary=vocabulary)
    chosen = select_targets(log_probs, rows.targets, vocabulary=vocabulary)
    return reference_kl(chosen, rows.reference_log_probs), {}


def score_per_token(*, vocabulary: Vocabulary = WHOLE) -> PerTokenLoss:
    """The value is log p(y_t) of a model, or of the trust region between two; no gradient meant.

    Returns:
        PerTokenLoss of ScoreTokenInputs and ScoreSharedInputs. Metrics: log_prob, entropy, in nats.

    Source: log q(y_t) of equation 2 and the mixture of equation 10, arXiv 2601.20802.

    >>> loss, constants = score_per_token(), ScoreSharedInputs(jnp.array(1.0))
    >>> print(f"{loss(jnp.zeros((1, 4)), ScoreTokenInputs(jnp.array([2])), constants)[0][0]:.4f}")
    -1.3863
    """

    def of_rows(
        logits: jax.Array, targets: jax.Array, temperature: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        logits = scale_logits(logits, temperature=temperature)
        log_probs = log_softmax(logits, vocabulary=vocabulary)
        chosen = select_targets(log_probs, targets, vocabulary=vocabulary)
        return chosen, {"log_prob": chosen, "entropy": entropy(log_probs, vocabulary=vocabulary)}

    def loss(
        logits: jax.Array, tokens: ScoreTokenInputs, constants: ScoreSharedInputs
    ) -> tuple[jax.Array, Metrics]:
        live = tokens.live_hidden, constants.live_head, constants.coefficient
        logits, temperature = with_live_model(logits, *live), constants.temperature
        return by_rows(of_rows, logits, tokens.targets, temperature, vocabulary=vocabulary)

    return loss
