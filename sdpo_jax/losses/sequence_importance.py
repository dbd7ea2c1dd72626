"""The vocabulary head under weights that need whole rollouts: SDFT's importance weight.

SDFT multiplies a response's loss by one scalar, the mean over its tokens of the truncated ratio
(arXiv 2601.19897, code). `fused_linear_loss` sees a chunk of tokens at a time, so the
log-probabilities of all tokens are computed first, forward alone: one head matmul more than the
four of the loss.

The authors' ratio is of two engines on the same weights. Here sampler and trainer run one model, so
the ratio is 1 up to rounding for the first update of a generation batch, and corrects later ones.
Validated against the formula in float64 (tests/test_sdft.py).
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sdpo_jax.losses.fused_linear import Metrics, PerTokenLoss, fused_linear_loss
from sdpo_jax.losses.kl_penalty import ScoreSharedInputs, ScoreTokenInputs, score_per_token
from sdpo_jax.losses.per_token import SdpoSharedInputs, SdpoTokenInputs
from sdpo_jax.losses.weights import truncated_importance_weights


class SdftTokenInputs(NamedTuple):
    """Inputs of the SDFT loss with one entry per token."""

    distilled: SdpoTokenInputs
    rollout: jax.Array  # [M] int32, from 1 on in each shard of the tokens; 0 where there is none


def sequence_weighted_head(
    cap: float,
    per_token_loss: PerTokenLoss,
    hidden: jax.Array,
    head: jax.Array,
    aux: SdftTokenInputs,
    weights: jax.Array,
    *,
    constants: SdpoSharedInputs,
    **cut: Any,
) -> tuple[jax.Array, Metrics]:
    """`fused_linear_loss` of `aux.distilled`, each rollout's loss times its importance weight.

    w_i = (1/|y_i|) Σ_t min(π(y_t) / π_old(y_t), cap) over all of its tokens, skipped or not, which
    must be among the M; detached.

    Args:
        cap: 2 in the authors' code.
        per_token_loss: of SdpoTokenInputs and SdpoSharedInputs.
        hidden: [M, D].
        head: [D, V].
        aux: SdftTokenInputs of [M]; `old_log_probs` must be there.
        weights: [M], 0 where there is no token or the loss skips it.
        constants: SdpoSharedInputs.
        **cut: `chunk`, `filled` and `block` of `fused_linear_loss`.

    Returns:
        The weighted sum, and the metrics of each token with `importance`, the rollout's w.

    Source: the code of SDFT, arXiv 2601.19897.
    """
    tokens, old = aux.distilled, aux.distilled.old_log_probs
    if old is None:
        raise ValueError(f"importance_cap {cap} needs old_log_probs, got None")
    new = _log_probs(hidden, head, tokens.targets, constants.temperature, **cut)
    importance = _mean_of_rollout(truncated_importance_weights(new, old, cap=cap), aux.rollout)
    weights, cut = weights * importance, {**cut, "constants": constants}
    total, metrics = fused_linear_loss(per_token_loss, hidden, head, tokens, weights, **cut)
    return total, {**metrics, "importance": importance}


def _log_probs(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, temperature: jax.Array, **cut: Any
) -> jax.Array:
    """[M], of the targets, detached; 0 beyond the chunks that are filled."""
    hidden, head = jax.lax.stop_gradient((hidden, head))
    nothing = jnp.zeros(hidden.shape[:1], jnp.float32)  # the sum is not asked for
    inputs, cut["constants"] = ScoreTokenInputs(targets), ScoreSharedInputs(temperature)
    _, metrics = fused_linear_loss(score_per_token(), hidden, head, inputs, nothing, **cut)
    return metrics["log_prob"]


def _mean_of_rollout(values: jax.Array, rollout: jax.Array) -> jax.Array:
    """[M], the mean over all tokens of a token's rollout; 0 where there is none.

    >>> _mean_of_rollout(jnp.array([1.0, 3.0, 5.0, 9.0]), jnp.array([1, 1, 2, 0])).tolist()
    [2.0, 2.0, 5.0, 0.0]
    """
    there = (rollout > 0).astype(values.dtype)
    sums = partial(jax.ops.segment_sum, segment_ids=rollout, num_segments=len(rollout) + 1)
    means = sums(values * there) / jnp.maximum(sums(there), 1.0)
    return means[rollout] * there
