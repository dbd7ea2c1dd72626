"""GRPO with the improvements that the SDPO paper (arXiv 2601.20802, 2.1) grants its baseline.

Reward minus group mean without division by the standard deviation, clip-higher (0.2 below, 0.28
above), a dual clip for negative advantages, no KL to a reference. The gradient reaches the current
log-probabilities alone: old ones and advantages pass `stop_gradient`.

Common variants are other compositions of the same parts:

    first GRPO  group_advantages(scale=True), sequence_mean, kl_coefficient=0.04
    Dr. GRPO    fixed_length_mean(output.per_token, mask, length=max_response_tokens)
    DAPO        clip_high=0.28, token_mean: the defaults of the SDPO paper
    GSPO        policy_gradient_loss(sequence_log_probs(log_probs, mask),
                                     sequence_log_probs(old_log_probs, mask), advantages[B], ...)
    CISPO       score_function_loss(log_probs, advantages * truncated_importance_weights(
                                        log_probs, old_log_probs, cap=1 + clip_high))

Without a dual clip, pass `dual_clip=math.inf`.
"""

import jax
import jax.numpy as jnp

from sdpo_jax.losses.arrays import (
    check_floating,
    check_rank,
    check_same_shape,
    loss_dtype,
    where_active,
)
from sdpo_jax.losses.credit import spread
from sdpo_jax.losses.reductions import LossOutput, divide, token_mean, weighted
from sdpo_jax.losses.weights import grouped, log_ratio, probability_ratio


def group_advantages(rewards: jax.Array, group_size: int, *, scale: bool = False) -> jax.Array:
    """A_i = r_i - mean of i's group; divided by the group's standard deviation only if `scale`.

    Args:
        rewards: [N], the rollouts of one prompt side by side.
        group_size: rollouts per prompt.
        scale: divide by the (unbiased) standard deviation, as the first GRPO did.

    Returns:
        [N]; exactly 0 in a group of equal rewards.

    Source: section 2.1 of arXiv 2601.20802.

    >>> group_advantages(jnp.array([1.0, 0.0, 1.0, 1.0]), 2).tolist()
    [0.5, -0.5, 0.0, 0.0]
    """
    groups = grouped(group_size, rewards=rewards)  # [P, G]
    centred = groups - jnp.mean(groups, axis=1, keepdims=True)
    # The rounded mean of equal rewards may differ from them, and `scale` would blow that up to ±1.
    equal = jnp.all(groups == groups[:, :1], axis=1, keepdims=True)
    centred = jnp.where(equal, 0.0, centred)
    if scale:
        variance = jnp.sum(centred**2, axis=1, keepdims=True) / max(group_size - 1, 1)
        centred = divide(centred, jnp.sqrt(variance))
    return centred.reshape(-1)


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
    """-A · clip_ratio(r, A), r = π / π_old: PPO's surrogate with clip-higher and dual clip.

    Equal to max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)), at most -A · dual_clip for A < 0.

    Args:
        log_probs: [...], of the sampled tokens (or rollouts) under the current policy.
        old_log_probs: [...], under the policy that the update starts from; receives no gradient.
        advantages: [...]; receive no gradient.
        clip_low: how far the ratio may fall below 1.
        clip_high: how far it may rise above 1.
        dual_clip: the largest ratio that a negative advantage is charged for, above 1.

    Returns:
        [...].

    Source: PPO (arXiv 1707.06347, equation 7), with the bounds of arXiv 2601.20802's GRPO.

    >>> old, advantages = jnp.array([-1.0]), jnp.array([2.0])
    >>> policy_gradient_loss(old, old, advantages, clip_low=0.2, clip_high=0.28, dual_clip=3.0)
    Array([-2.], dtype=float32)
    """
    ratio = probability_ratio(log_probs, old_log_probs)
    check_floating(advantages=advantages)
    advantages = jax.lax.stop_gradient(advantages).astype(ratio.dtype)
    return -advantages * clip_ratio(
        ratio, advantages, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip
    )


def sequence_log_probs(log_probs: jax.Array, mask: jax.Array) -> jax.Array:
    """(1/|y_i|) Σ_t m log π(y_t), [B, T] to [B]: GSPO's ratio is that of these.

    Source: GSPO, arXiv 2507.18071.

    >>> sequence_log_probs(jnp.array([[-1.0, -3.0, -9.0]]), jnp.array([[1, 1, 0]])).tolist()
    [-2.0]
    """
    check_same_shape(log_probs=log_probs, mask=mask)
    check_rank(2, mask=mask)
    check_floating(log_probs=log_probs)
    dtype = loss_dtype(log_probs)
    weights = mask.astype(dtype)
    total = jnp.sum(where_active(mask, log_probs).astype(dtype) * weights, axis=1)
    return divide(total, jnp.sum(weights, axis=1))


def reference_kl(log_probs: jax.Array, reference_log_probs: jax.Array) -> jax.Array:
    """e^d - d - 1, d = log π_ref - log π within ±20: an estimate of KL(π ‖ π_ref), never negative.

    Args:
        log_probs: [...], of the sampled tokens.
        reference_log_probs: [...], under the reference without any context; no gradient.

    Returns:
        [...].

    Source: GRPO, arXiv 2402.03300, equation 4. Where logits are at hand, `reverse_kl` is exact.

    >>> reference_kl(jnp.array([-1.0]), jnp.array([-1.0])).tolist()
    [0.0]
    """
    check_same_shape(log_probs=log_probs, reference_log_probs=reference_log_probs)
    gap = -log_ratio(log_probs, reference_log_probs)
    return jnp.expm1(gap) - gap


def grpo_loss(
    log_probs: jax.Array,
    old_log_probs: jax.Array,
    advantages: jax.Array,
    mask: jax.Array,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float,
    weights: jax.Array | None = None,
) -> LossOutput:
    """Σ mask · weight · `policy_gradient_loss` and Σ mask.

    Args:
        log_probs: [B, T], of the sampled tokens under the current policy.
        old_log_probs: [B, T]; receives no gradient.
        advantages: [B], from `group_advantages`, or [B, T].
        mask: [B, T], nonzero on response tokens, EOS included.
        clip_low: 0.2 in the paper.
        clip_high: 0.28 in the paper.
        dual_clip: 3 in the SDPO code.
        weights: [B, T], such as the correction for another sampler; detached.

    Returns:
        LossOutput.

    Source: section 2.1 of arXiv 2601.20802.

    >>> old, clips = jnp.zeros((2, 3)), {"clip_low": 0.2, "clip_high": 0.28, "dual_clip": 3.0}
    >>> grpo_loss(old, old, jnp.array([1.0, 0.0]), jnp.ones((2, 3)), **clips).mean()
    Array(-0.5, dtype=float32)
    """
    check_same_shape(log_probs=log_probs, old_log_probs=old_log_probs, mask=mask)
    check_rank(2, log_probs=log_probs)
    new, old = (where_active(mask, x) for x in (log_probs, old_log_probs))
    advantages = where_active(mask, spread(advantages, log_probs))
    clips = {"clip_low": clip_low, "clip_high": clip_high, "dual_clip": dual_clip}
    loss = policy_gradient_loss(new, old, advantages, **clips)
    return token_mean(weighted(loss, weights, mask), mask)
