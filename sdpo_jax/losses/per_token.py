"""SDPO, GRPO, SFT and their sums as per-token losses for `fused_linear_loss`.

Each factory takes hyper-parameters and returns `loss(logits[C, V], tokens, constants)`, where
`tokens` and `constants` are NamedTuples of arrays; fields that are None by default may stay so.
The student's logits, and the teacher's, are divided by the temperature of the sampler, so that
log-probabilities are those of the sampler.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from sdpo_jax.losses.arrays import check_same_shape, where_active
from sdpo_jax.losses.distillation import sampled_token_loss
from sdpo_jax.losses.divergences import entropy
from sdpo_jax.losses.fused_linear import Metrics, PerTokenLoss, head_logits, with_live_model
from sdpo_jax.losses.likelihood import cross_entropy_of
from sdpo_jax.losses.policy_gradient import clip_ratio, policy_gradient_loss, reference_kl
from sdpo_jax.losses.tiles import by_rows
from sdpo_jax.losses.token_stats import TokenStats, same_likeliest, token_stats
from sdpo_jax.losses.vocabulary import WHOLE, Vocabulary, log_softmax, scale_logits, select_targets
from sdpo_jax.losses.weights import probability_ratio, truncated_importance_weights

Divergence: TypeAlias = Callable[[jax.Array, jax.Array], jax.Array]
"""`(student_log_probs[C, V], teacher_log_probs[C, V]) -> [C]`: `generalized_jsd` or `top_k_loss`
with their hyper-parameters bound by `functools.partial`."""

Weigh: TypeAlias = Callable[[TokenStats], jax.Array]
"""`(TokenStats of [C] each) -> weights[C]`, detached. Weights that need a mean over the batch are
divided by it afterwards: the metric `weight` has their sum, and the loss is linear in them."""


class SdpoTokenInputs(NamedTuple):
    """Inputs of the SDPO loss with one entry per token."""

    teacher_hidden: jax.Array  # [M, D], the teacher's final hidden states at the same tokens
    targets: jax.Array  # [M] integer, the sampled tokens
    old_log_probs: jax.Array | None = None  # [M], when they were drawn; for importance_cap
    live_hidden: jax.Array | None = None  # [M, D], the student's own after the teacher's prompt


class SdpoSharedInputs(NamedTuple):
    """Inputs of the SDPO loss that all tokens share."""

    teacher_head: jax.Array  # [D, V]
    temperature: jax.Array  # [] float32
    live_head: jax.Array | None = None  # [D, V], with `live_hidden`: a trust-region teacher
    coefficient: jax.Array | None = None  # [] float32, of the trust region


class GrpoTokenInputs(NamedTuple):
    """Inputs of the GRPO loss with one entry per token."""

    targets: jax.Array  # [M] integer
    old_log_probs: jax.Array  # [M]
    advantages: jax.Array  # [M], the rollout's advantage at each of its tokens
    reference_log_probs: jax.Array | None = None  # [M], for a KL to a reference


class GrpoSharedInputs(NamedTuple):
    """Inputs of the GRPO loss that all tokens share."""

    temperature: jax.Array  # [] float32


class SftTokenInputs(NamedTuple):
    """Inputs of the SFT loss with one entry per token."""

    targets: jax.Array  # [M] integer


class MixedTokenInputs(NamedTuple):
    """Inputs of a weighted sum of two losses with one entry per token."""

    first: Any  # token inputs of the first loss
    second: Any
    first_weights: jax.Array  # [M]: 1 - λ, a route, a gate, a schedule
    second_weights: jax.Array  # [M]


class MixedSharedInputs(NamedTuple):
    """Inputs of a weighted sum of two losses that all tokens share."""

    first: Any
    second: Any


def sdpo_per_token(
    divergence: Divergence,
    *,
    importance_cap: float | None = None,
    weigh: Weigh | None = None,
    vocabulary: Vocabulary = WHOLE,
) -> PerTokenLoss:
    """min(π/π_old, cap) · weigh(token statistics) · divergence(student, teacher).

    Args:
        divergence: see `Divergence`; bind the same `vocabulary` in it.
        importance_cap: 2 in the paper; needs `old_log_probs`. None: no importance weight.
        weigh: weights from the token statistics, such as `disagreement_weights` of `jsd`.
        vocabulary: how V lies on the devices.

    Returns:
        PerTokenLoss of SdpoTokenInputs and SdpoSharedInputs. Metrics: divergence, those of
        `TokenStats`, same_token (see `same_likeliest`), and where they apply ratio (new to rollout
        probability, before the cap) and weight.

    Source: equation 1 of arXiv 2601.20802, with the importance weight of its code.

    >>> from functools import partial
    >>> from sdpo_jax.losses import generalized_jsd
    >>> loss = sdpo_per_token(partial(generalized_jsd, alpha=0.5))
    >>> tokens = SdpoTokenInputs(jnp.eye(2), jnp.array([0, 1]))
    >>> shared = SdpoSharedInputs(jnp.eye(2), jnp.array(1.0))
    >>> value, metrics = loss(jnp.zeros((2, 2)), tokens, shared)
    >>> print(f"{value[0]:.4f} {metrics['teacher_entropy'][0]:.4f}")
    0.0285 0.5822
    """

    def estimate(student: jax.Array, teacher: jax.Array, targets: jax.Array) -> jax.Array:
        del targets
        return divergence(student, teacher)

    return _distillation(estimate, importance_cap, weigh, vocabulary)


def sampled_token_sdpo(
    *,
    importance_cap: float | None = None,
    weigh: Weigh | None = None,
    vocabulary: Vocabulary = WHOLE,
) -> PerTokenLoss:
    """`sdpo_per_token` with `sampled_token_loss` in place of a divergence; `divergence` is it.

    Source: the SDPO code with `full_logit_distillation: False` (arXiv 2601.20802, equation 2).

    >>> tokens, loss = SdpoTokenInputs(jnp.eye(2), jnp.array([0, 1])), sampled_token_sdpo()
    >>> value, _ = loss(jnp.zeros((2, 2)), tokens, SdpoSharedInputs(jnp.eye(2), jnp.array(1.0)))
    >>> print(f"{value[0]:.4f}")
    0.2633
    """

    def estimate(student: jax.Array, teacher: jax.Array, targets: jax.Array) -> jax.Array:
        pair = (select_targets(x, targets, vocabulary=vocabulary) for x in (student, teacher))
        return sampled_token_loss(*pair)

    return _distillation(estimate, importance_cap, weigh, vocabulary)


def grpo_per_token(
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float,
    kl_coefficient: float = 0.0,
    vocabulary: Vocabulary = WHOLE,
) -> PerTokenLoss:
    """`policy_gradient_loss` of the sampled token, + β · `reference_kl` where β > 0.

    Returns:
        PerTokenLoss of GrpoTokenInputs and GrpoSharedInputs. Metrics: log_prob, student_entropy,
        ratio, clipped (1 where clipping acts), reference_kl if there is one. Source: 2.1 of
        arXiv 2601.20802.

    >>> loss = grpo_per_token(clip_low=0.2, clip_high=0.28, dual_clip=3.0)
    >>> tokens = GrpoTokenInputs(jnp.array([0]), jnp.log(jnp.array([0.25])), jnp.array([1.0]))
    >>> print(f"{loss(jnp.zeros((1, 2)), tokens, GrpoSharedInputs(jnp.array(1.0)))[0][0]:.2f}")
    -1.28
    """
    clips = {"clip_low": clip_low, "clip_high": clip_high, "dual_clip": dual_clip}

    def of_rows(
        logits: jax.Array, tokens: GrpoTokenInputs, constants: GrpoSharedInputs
    ) -> tuple[jax.Array, Metrics]:
        logits = scale_logits(logits, temperature=constants.temperature)
        log_probs = log_softmax(logits, vocabulary=vocabulary)
        metrics = _sampled(log_probs, tokens.targets, vocabulary)
        log_prob, old, advantages = metrics["log_prob"], tokens.old_log_probs, tokens.advantages
        value = policy_gradient_loss(log_prob, old, advantages, **clips)
        metrics["ratio"] = probability_ratio(log_prob, old)
        metrics["clipped"] = clip_ratio(metrics["ratio"], advantages, **clips) != metrics["ratio"]
        if tokens.reference_log_probs is not None:
            metrics["reference_kl"] = reference_kl(log_prob, tokens.reference_log_probs)
            value = value + kl_coefficient * metrics["reference_kl"]
        elif kl_coefficient != 0.0:
            raise ValueError(f"kl_coefficient {kl_coefficient} needs reference_log_probs, got None")
        return value, metrics

    return partial(by_rows, of_rows, vocabulary=vocabulary)


def sft_per_token(*, label_smoothing: float = 0.0, vocabulary: Vocabulary = WHOLE) -> PerTokenLoss:
    """`cross_entropy` of the target, at temperature 1.

    Returns:
        PerTokenLoss of SftTokenInputs. Metrics: log_prob, student_entropy, correct (1 where no
        token is likelier than the target).

    Source: the SFT baseline of SDFT, arXiv 2601.19897.

    >>> value, metrics = sft_per_token()(jnp.zeros((1, 4)), SftTokenInputs(jnp.array([0])), None)
    >>> print(f"{value[0]:.4f}", metrics["correct"].tolist())
    1.3863 [True]
    """

    def of_rows(
        logits: jax.Array, tokens: SftTokenInputs, constants: None
    ) -> tuple[jax.Array, Metrics]:
        del constants
        log_probs = log_softmax(logits, vocabulary=vocabulary)
        value = cross_entropy_of(
            log_probs, tokens.targets, label_smoothing=label_smoothing, vocabulary=vocabulary
        )
        metrics = _sampled(log_probs, tokens.targets, vocabulary)
        metrics["correct"] = metrics["log_prob"] >= vocabulary.max(log_probs)
        return value, metrics

    return partial(by_rows, of_rows, vocabulary=vocabulary)


def mixed_per_token(first: PerTokenLoss, second: PerTokenLoss) -> PerTokenLoss:
    """w_1 · first + w_2 · second, with weights per token: a mix, a route, a gate or a schedule.

    SDPO with 1 - λ and GRPO with λ is the paper's mix of advantages; 0/1 weights from
    `outcome_routing` train failures with SDPO and successes with GRPO. Where a loss has weight 0,
    its inputs are not read and may hold anything.

    Returns:
        PerTokenLoss of MixedTokenInputs and MixedSharedInputs. Metrics: those of both, 0 where
        their loss has no weight (of a shared name the first's, else the second's), first_loss and
        second_loss, first_active and second_active.

    Source: equation 3 of arXiv 2601.20802; SRPO, arXiv 2604.02288; SDPG, arXiv 2606.04036.

    >>> tokens = SftTokenInputs(jnp.array([0]))
    >>> both = MixedTokenInputs(tokens, tokens, jnp.array([0.5]), jnp.array([2.0]))
    >>> loss = mixed_per_token(sft_per_token(), sft_per_token())
    >>> print(f"{loss(jnp.zeros((1, 2)), both, MixedSharedInputs(None, None))[0][0]:.4f}")
    1.7329
    """

    def loss(
        logits: jax.Array, tokens: MixedTokenInputs, constants: MixedSharedInputs
    ) -> tuple[jax.Array, Metrics]:
        first_weights, second_weights = tokens.first_weights, tokens.second_weights
        actives = first_weights != 0.0, second_weights != 0.0
        one, metrics = first(logits, _known(tokens.first, actives[0]), constants.first)
        two, more = second(logits, _known(tokens.second, actives[1]), constants.second)
        check_same_shape(first_weights=first_weights, second_weights=second_weights, tokens=one)
        total = first_weights.astype(one.dtype) * one + second_weights.astype(one.dtype) * two
        more = {name: where_active(actives[1], x) for name, x in more.items()}
        return total, {
            **more,
            **{k: jnp.where(actives[0], x, more.get(k, 0)) for k, x in metrics.items()},
            **{"first_loss": one, "second_loss": two},
            **dict(zip(("first_active", "second_active"), actives, strict=True)),
        }

    return loss


def _known(tokens: Any, active: jax.Array) -> Any:
    return jax.tree.map(partial(where_active, active), tokens)


def _sampled(log_probs: jax.Array, targets: jax.Array, vocabulary: Vocabulary) -> Metrics:
    return {
        "log_prob": select_targets(log_probs, targets, vocabulary=vocabulary),
        "student_entropy": entropy(log_probs, vocabulary=vocabulary),
    }


class _Rows(NamedTuple):
    """What a distillation loss reads of each row besides the student's logits."""

    teacher_logits: jax.Array  # [C, V]
    targets: jax.Array  # [C]
    old_log_probs: jax.Array | None  # [C]


def _distillation(
    estimate: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
    importance_cap: float | None,
    weigh: Weigh | None,
    vocabulary: Vocabulary,
) -> PerTokenLoss:
    """`estimate` takes both log-probabilities, [C, V], and the targets, [C]."""

    def of_rows(
        logits: jax.Array, rows: _Rows, constants: SdpoSharedInputs
    ) -> tuple[jax.Array, Metrics]:
        scaled = partial(scale_logits, temperature=constants.temperature)
        pair = scaled(logits), jax.lax.stop_gradient(scaled(rows.teacher_logits))
        student, teacher = (log_softmax(x, vocabulary=vocabulary) for x in pair)
        value = estimate(student, teacher, rows.targets)
        stats = token_stats(student, teacher, rows.targets, vocabulary=vocabulary)
        # Of the logits, not the log-probabilities: the softmaxes have two of the maxima already.
        same = same_likeliest(*pair, vocabulary=vocabulary)
        metrics = {"divergence": value, **stats._asdict(), "same_token": same}
        if importance_cap is not None:
            new, old = stats.log_prob, rows.old_log_probs
            if old is None:
                raise ValueError(f"importance_cap {importance_cap} needs old_log_probs, got None")
            value = value * truncated_importance_weights(new, old, cap=importance_cap)
            metrics["ratio"] = probability_ratio(new, old)
        if weigh is not None:
            metrics["weight"] = jax.lax.stop_gradient(weigh(stats))
            value = value * metrics["weight"]
        return value, metrics

    def loss(
        logits: jax.Array, tokens: SdpoTokenInputs, constants: SdpoSharedInputs
    ) -> tuple[jax.Array, Metrics]:
        teacher = head_logits(tokens.teacher_hidden, constants.teacher_head)
        live = tokens.live_hidden, constants.live_head, constants.coefficient
        rows = _Rows(with_live_model(teacher, *live), tokens.targets, tokens.old_log_probs)
        return by_rows(of_rows, logits, rows, constants, vocabulary=vocabulary)

    return loss
