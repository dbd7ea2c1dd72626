"""The losses from hidden states: the same values as from logits, which never exist in memory.

    sdpo_from_hidden   sdpo_loss
    grpo_from_hidden   grpo_loss
    sft_from_hidden    sft_loss

All take `[B, T, D]` hidden states at the positions that predict the response tokens, and the head
`[D, V]`. The gradient reaches hidden states and head through `LossOutput.total`; `per_token` and
the metrics, `[B, T]` each, are detached. The other losses of `per_token` go through
`fused_linear_loss` in the same way.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from sdpo_jax.losses.arrays import check_rank, check_same_shape, loss_dtype, where_active
from sdpo_jax.losses.credit import spread
from sdpo_jax.losses.divergences import generalized_jsd
from sdpo_jax.losses.fused_linear import Metrics, PerTokenLoss, fused_linear_loss
from sdpo_jax.losses.per_token import (
    GrpoSharedInputs,
    GrpoTokenInputs,
    SdpoSharedInputs,
    SdpoTokenInputs,
    SftTokenInputs,
    grpo_per_token,
    sdpo_per_token,
    sft_per_token,
)
from sdpo_jax.losses.reductions import LossOutput, ReductionWeights, token_mean_weights, weighted


def sdpo_from_hidden(
    hidden: jax.Array,
    head: jax.Array,
    teacher_hidden: jax.Array,
    teacher_head: jax.Array,
    targets: jax.Array,
    mask: jax.Array,
    *,
    alpha: float,
    chunk: int,
    weights: jax.Array | None = None,
    temperature: float | jax.Array = 1.0,
    reduction: ReductionWeights = token_mean_weights,
) -> tuple[LossOutput, Metrics]:
    """Σ mask · weight · D_α over the whole vocabulary: `sdpo_loss` a chunk of tokens at a time.

    Args:
        hidden: [B, T, D], of the student; with `head`, [D, V], what receives gradient.
        head: [D, V].
        teacher_hidden: [B, T, D], of the same tokens after the teacher's prompt.
        teacher_head: [D, V].
        targets: [B, T] integer, the sampled tokens; for the metrics alone.
        mask: [B, T], nonzero on response tokens of rows that have a teacher.
        alpha: which divergence, see `generalized_jsd`.
        chunk: how many tokens may have logits at a time.
        weights: [B, T] or [B], detached.
        temperature: of the sampler, for both logits.
        reduction: `token_mean_weights` or another of its kind.

    Source: equation 1 of arXiv 2601.20802.

    >>> h, head, y = jnp.ones((1, 2, 3)), jnp.eye(3, 4), jnp.zeros((1, 2), jnp.int32)
    >>> loss, _ = sdpo_from_hidden(h, head, h, head, y, jnp.ones((1, 2)), alpha=0.5, chunk=1)
    """
    check_same_shape(head=head, teacher_head=teacher_head)
    loss = sdpo_per_token(partial(generalized_jsd, alpha=alpha))
    tokens = SdpoTokenInputs(teacher_hidden, targets)
    constants = SdpoSharedInputs(teacher_head, jnp.asarray(temperature))
    return _reduced(loss, hidden, head, tokens, constants, mask, weights, reduction, chunk)


def grpo_from_hidden(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    old_log_probs: jax.Array,
    advantages: jax.Array,
    mask: jax.Array,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float,
    chunk: int,
    weights: jax.Array | None = None,
    temperature: float | jax.Array = 1.0,
    reduction: ReductionWeights = token_mean_weights,
) -> tuple[LossOutput, Metrics]:
    """Σ mask · weight · surrogate: `grpo_loss` chunk by chunk (arXiv 2601.20802, section 2.1).

    Args:
        hidden: [B, T, D]; with `head` what receives gradient.
        head: [D, V].
        targets: [B, T] integer, the sampled tokens.
        old_log_probs: [B, T].
        advantages: [B] or [B, T].
        mask: [B, T], nonzero on response tokens.
        clip_low: as the next two, see `policy_gradient_loss`.
        clip_high: above.
        dual_clip: above.
        chunk: as the rest, see `sdpo_from_hidden`.
        weights: [B, T] or [B], detached.
        temperature: of the sampler.
        reduction: of the mask.

    >>> x, rest = jnp.ones((1, 2)), {"clip_low": 0.2, "clip_high": 0.28, "dual_clip": 3, "chunk": 1}
    >>> loss, _ = grpo_from_hidden(x[..., None], x[:, :1], x.astype(int), -x, x[0, :1], x, **rest)
    """
    loss = grpo_per_token(clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip)
    tokens = GrpoTokenInputs(targets, old_log_probs, spread(advantages, mask))
    constants = GrpoSharedInputs(jnp.asarray(temperature))
    return _reduced(loss, hidden, head, tokens, constants, mask, weights, reduction, chunk)


def sft_from_hidden(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    mask: jax.Array,
    *,
    chunk: int,
    label_smoothing: float = 0.0,
    weights: jax.Array | None = None,
    reduction: ReductionWeights = token_mean_weights,
) -> tuple[LossOutput, Metrics]:
    """Σ mask · weight · cross-entropy: `sft_loss` a chunk of tokens at a time.

    Args:
        hidden: [B, T, D]; with `head`, [D, V], what receives gradient.
        head: [D, V].
        targets: [B, T] integer; anything where masked.
        mask: [B, T], nonzero where a token counts.
        chunk: how many tokens may have logits at a time.
        label_smoothing: in [0, 1), off by default.
        weights: [B] per sequence or [B, T] per token; detached.
        reduction: `token_mean_weights` or another of its kind.

    Source: the SFT baseline of SDFT, arXiv 2601.19897.

    >>> h, head, y = jnp.zeros((1, 2, 3)), jnp.eye(3, 4), jnp.zeros((1, 2), jnp.int32)
    >>> print(f"{sft_from_hidden(h, head, y, jnp.ones((1, 2)), chunk=1)[0].mean():.4f}")
    1.3863
    """
    loss = sft_per_token(label_smoothing=label_smoothing)
    tokens = SftTokenInputs(targets)
    return _reduced(loss, hidden, head, tokens, None, mask, weights, reduction, chunk)


def _reduced(
    per_token_loss: PerTokenLoss,
    hidden: jax.Array,
    head: jax.Array,
    tokens: Any,
    constants: Any,
    mask: jax.Array,
    weights: jax.Array | None,
    reduction: ReductionWeights,
    chunk: int,
) -> tuple[LossOutput, Metrics]:
    check_rank(3, hidden=hidden)
    _check_tokens(tokens, mask, hidden)
    scale, denominator = reduction(mask.astype(loss_dtype(hidden)))
    scale = weighted(scale, weights, mask)
    flat = partial(jax.tree.map, lambda x: x.reshape(-1, *x.shape[2:]))
    aux, scale = flat((tokens, scale))
    total, metrics = fused_linear_loss(
        per_token_loss, flat(hidden), head, aux, scale, chunk=chunk, constants=constants
    )
    metrics = {name: x.reshape(mask.shape) for name, x in metrics.items()}
    per_token = weighted(where_active(mask, metrics["loss"]), weights, mask)
    return LossOutput(total, denominator.astype(total.dtype), per_token), metrics


def _check_tokens(tokens: Any, mask: jax.Array, hidden: jax.Array) -> None:
    check_same_shape(mask=mask, tokens=hidden[..., 0])
    for name, x in tokens._asdict().items():
        if x is not None:
            like = {"hidden": hidden} if x.ndim == 3 else {"mask": mask}
            check_same_shape(**{name: x}, **like)
