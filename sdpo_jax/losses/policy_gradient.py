"""GRPO with the improvements that the SDPO paper (arXiv 2601.20802, 2.1) grants its baseline.

Reward minus group mean without division by the standard deviation, clip-higher (0.2 below, 0.28
above), a dual clip for negative advantages, no KL to a reference. The gradient reaches the current
log-probabilities alone: old ones and advantages pass `stop_gradient`.
"""

import jax
import jax.numpy as jnp

from sdpo_jax.losses.arrays import check_same_shape, loss_dtype
from sdpo_jax.losses.reductions import LossOutput, divide, token_mean

MAX_LOG_RATIO = 20.0


def group_advantages(rewards: jax.Array, group_size: int, *, scale: bool = False) -> jax.Array:
    """A_i = r_i - mean of i's group; divided by the group's standard deviation only if `scale`.

    Args:
        rewards: [N], the rollouts of one prompt side by side.
        group_size: rollouts per prompt.
        scale: divide by the (unbiased) standard deviation, as the first GRPO did.

    Returns:
        [N]; exactly 0 in a group of equal rewards.

    >>> group_advantages(jnp.array([1.0, 0.0, 1.0, 1.0]), 2).tolist()
    [0.5, -0.5, 0.0, 0.0]
    """
    if group_size < 1 or rewards.ndim != 1 or rewards.shape[0] % group_size:
        raise ValueError(
            f"rewards must be [N] with N a multiple of group_size, got rewards "
            f"{list(rewards.shape)} and group_size {group_size}"
        )
    groups = rewards.astype(loss_dtype(rewards)).reshape(-1, group_size)  # [P, G]
    centred = groups - jnp.mean(groups, axis=1, keepdims=True)
    # The rounded mean of equal rewards may differ from them, and `scale` would blow that up to ±1.
    equal = jnp.all(groups == groups[:, :1], axis=1, keepdims=True)
    centred = jnp.where(equal, 0.0, centred)
    if scale:
        variance = jnp.sum(centred**2, axis=1, keepdims=True) / max(group_size - 1, 1)
        centred = divide(centred, jnp.sqrt(variance))
    return centred.reshape(-1)


def probability_ratio(log_probs: jax.Array, old_log_probs: jax.Array) -> jax.Array:
    """Return r = exp(log π - log π_old), the exponent limited to ±20. Any equal shapes.

    >>> probability_ratio(jnp.array([-1.0, 90.0]), jnp.array([-1.0, 0.0])).tolist()
    [1.0, 485165184.0]
    """
    check_same_shape(log_probs=log_probs, old_log_probs=old_log_probs)
    dtype = loss_dtype(log_probs, old_log_probs)
    gap = log_probs.astype(dtype) - jax.lax.stop_gradient(old_log_probs).astype(dtype)
    return jnp.exp(jnp.clip(gap, -MAX_LOG_RATIO, MAX_LOG_RATIO))


def clip_ratio(
    ratio: jax.Array, advantages: jax.Array, *, clip_low: float, clip_high: float, dual_clip: float
) -> jax.Array:
    """Return the ratio as far as the surrogate follows it; it stands still where it pays no more.

    PPO's pessimistic minimum in closed form: min(r, 1 + clip_high) for a positive advantage, and r
    within [1 - clip_low, dual_clip] for a negative one, whose loss would otherwise grow without
    bound.

    >>> ratio, advantages = jnp.array([1.5, 0.5, 0.5, 9.0]), jnp.array([1.0, 1.0, -1.0, -1.0])
    >>> clipped = clip_ratio(ratio, advantages, clip_low=0.2, clip_high=0.28, dual_clip=3.0)
    >>> [round(x, 2) for x in clipped.tolist()]
    [1.28, 0.5, 0.8, 3.0]
    """
    if not (0.0 <= clip_low <= 1.0 and clip_high >= 0.0 and dual_clip > 1.0):
        raise ValueError(
            "expected 0 <= clip_low <= 1, clip_high >= 0 and dual_clip > 1, got clip_low "
            f"{clip_low}, clip_high {clip_high}, dual_clip {dual_clip}"
        )
    check_same_shape(ratio=ratio, advantages=advantages)
    above = jnp.minimum(ratio, 1.0 + clip_high)
    below = jnp.clip(ratio, 1.0 - clip_low, dual_clip)
    return jnp.where(advantages < 0.0, below, above)


def policy_gradient_loss(
    log_probs: jax.Array,
    old_log_probs: jax.Array,
    advantages: jax.Array,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float,
) -> jax.Array:
    """-A · clip_ratio(r, A) per token: PPO's surrogate with clip-higher and dual clip.

    Equal to max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)), at most -A · dual_clip for A < 0.

    Args:
        log_probs: [...], of the sampled tokens under the current policy.
        old_log_probs: [...], under the policy that the update starts from; receives no gradient.
        advantages: [...]; receive no gradient.
        clip_low: how far the ratio may fall below 1.
        clip_high: how far it may rise above 1.
        dual_clip: the largest ratio that a negative advantage is charged for, above 1.

    Returns:
        [...].

    >>> old, advantages = jnp.array([-1.0]), jnp.array([2.0])
    >>> policy_gradient_loss(old, old, advantages, clip_low=0.2, clip_high=0.28, dual_clip=3.0)
    Array([-2.], dtype=float32)
    """
    ratio = probability_ratio(log_probs, old_log_probs)
    advantages = jax.lax.stop_gradient(advantages).astype(ratio.dtype)
    return -advantages * clip_ratio(
        ratio, advantages, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip
    )


def grpo_loss(
    log_probs: jax.Array,
    old_log_probs: jax.Array,
    advantages: jax.Array,
    mask: jax.Array,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float,
) -> LossOutput:
    """Σ mask · surrogate and Σ mask: one advantage per rollout, shared by its tokens.

    Args:
        log_probs: [B, T], of the sampled tokens under the current policy.
        old_log_probs: [B, T]; receives no gradient.
        advantages: [B], from `group_advantages`.
        mask: [B, T], nonzero on response tokens, EOS included.
        clip_low: 0.2 in the paper.
        clip_high: 0.28 in the paper.
        dual_clip: 3 in the SDPO code.

    Returns:
        LossOutput.

    >>> old, clips = jnp.zeros((2, 3)), {"clip_low": 0.2, "clip_high": 0.28, "dual_clip": 3.0}
    >>> grpo_loss(old, old, jnp.array([1.0, 0.0]), jnp.ones((2, 3)), **clips).mean()
    Array(-0.5, dtype=float32)
    """
    check_same_shape(log_probs=log_probs, mask=mask)
    check_same_shape(advantages=advantages, rows=log_probs[:, 0])
    advantages = jnp.broadcast_to(advantages[:, None], log_probs.shape)
    per_token = policy_gradient_loss(
        log_probs,
        old_log_probs,
        advantages,
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=dual_clip,
    )
    return token_mean(per_token, mask)
