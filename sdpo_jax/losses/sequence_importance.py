"""The vocabulary head under weights that need whole rollouts: SDFT's importance weight.

SDFT multiplies a response's loss by one scalar, the mean over its tokens of the truncated ratio
(arXiv 2601.19897, code). `chunked_head` sees a chunk of tokens at a time, so the log-probabilities
of all tokens are made first, forward alone: one head matmul more than the four of the loss.

The authors' ratio is of two engines on the same weights. Here sampler and trainer run one model, so
the ratio is 1 up to rounding for the first update of a generation batch, and corrects later ones.
Validated against the formula in float64 (tests/test_sdft.py).
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sdpo_jax.losses.chunked_head import Metrics, PerTokenLoss, chunked_head
from sdpo_jax.losses.objectives import SdpoTokens
from sdpo_jax.losses.vocabulary import log_softmax, select_targets, shape_logits
from sdpo_jax.losses.weights import truncated_importance_weights


class SdftTokens(NamedTuple):
    """What SDFT knows of each token."""

    distilled: SdpoTokens
    rollout: jax.Array  # [M] int32, from 1 on in each shard of the tokens; 0 where there is none


def sequence_weighted_head(
    cap: float,
    per_token_loss: PerTokenLoss,
    hidden: jax.Array,
    head: jax.Array,
    aux: SdftTokens,
    weights: jax.Array,
    *,
    chunk: int,
    constants: Any,
    filled: jax.Array | None = None,
    block: int,
) -> tuple[jax.Array, Metrics]:
    """`chunked_head` of `aux.distilled`, each rollout's loss times its importance weight.

    w_i = (1/|y_i|) Σ_t min(π(y_t) / π_old(y_t), cap), over all tokens of the response, those that
    the loss skips too; detached. All tokens of a rollout must be among the M.

    Args:
        cap: 2 in the authors' code.
        per_token_loss: of SdpoTokens and SdpoConstants.
        hidden: [M, D].
        head: [D, V].
        aux: SdftTokens of [M]; `old_log_probs` must be there.
        weights: [M], 0 where there is no token or the loss skips it.
        chunk: see `chunked_head`, as the rest.
        constants: SdpoConstants.
        filled: [] int32.
        block: tokens of a chunk that lie together.

    Returns:
        The weighted sum, and the metrics of each token with `importance`, the rollout's w.

    Source: the code of SDFT, arXiv 2601.19897.
    """
    log_probs = partial(_log_probs, chunk=chunk, filled=filled, block=block)
    new, old = log_probs(hidden, head, aux.distilled, constants), aux.distilled.old_log_probs
    if old is None:
        raise ValueError(f"importance_cap {cap} needs old_log_probs, got None")
    importance = _mean_of_rollout(truncated_importance_weights(new, old, cap=cap), aux.rollout)
    total, metrics = chunked_head(
        per_token_loss,
        hidden,
        head,
        aux.distilled,
        weights * importance,
        chunk=chunk,
        constants=constants,
        filled=filled,
        block=block,
    )
    return total, {**metrics, "importance": importance}


def _log_probs(
    hidden: jax.Array,
    head: jax.Array,
    tokens: SdpoTokens,
    constants: Any,
    *,
    chunk: int,
    filled: jax.Array | None,
    block: int,
) -> jax.Array:
    """[M], of the targets, detached; 0 beyond the chunks that are filled."""

    def sampled(
        logits: jax.Array, targets: jax.Array, temperature: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        log_probs = log_softmax(shape_logits(logits, temperature=temperature))
        return select_targets(log_probs, targets), {}

    _, metrics = chunked_head(
        sampled,
        *jax.lax.stop_gradient((hidden, head)),
        tokens.targets,
        jnp.zeros(hidden.shape[:1], jnp.float32),
        chunk=chunk,
        constants=constants.temperature,
        filled=filled,
        block=block,
    )
    return metrics["loss"]


def _mean_of_rollout(values: jax.Array, rollout: jax.Array) -> jax.Array:
    """[M], the mean over all tokens of a token's rollout; 0 where there is none."""
    there = (rollout > 0).astype(values.dtype)
    sums = partial(jax.ops.segment_sum, segment_ids=rollout, num_segments=len(rollout) + 1)
    means = sums(values * there) / jnp.maximum(sums(there), 1.0)
    return means[rollout] * there
