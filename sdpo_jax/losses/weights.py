"""Weights and masks per token or per rollout: detached arrays that multiply each other and a loss.

    importance      truncated_importance_weights, against the policy that drew the tokens
    tokens          teacher_entropy_weights, disagreement_weights, skip_first_tokens, span_mask
    rollouts        pass_rate_weights, outcome_routing, positive_only

Weights scale the loss of a token; masks also leave it out of the denominator. Give weights to
`sdpo_loss(weights=...)`, or a product of mask and weights to a reduction to divide by their sum.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from sdpo_jax.losses.arrays import (
    check_floating,
    check_integer,
    check_rank,
    check_same_shape,
    loss_dtype,
)
from sdpo_jax.losses.divergences import floored
from sdpo_jax.losses.reductions import divide

MAX_LOG_RATIO = 20.0


def log_ratio(log_probs: jax.Array, old_log_probs: jax.Array) -> jax.Array:
    """clamp(log π - log π_old, ±20). Any equal shapes; π_old receives no gradient.

    >>> log_ratio(jnp.array([-1.0, 90.0]), jnp.array([-1.5, 0.0])).tolist()
    [0.5, 20.0]
    """
    check_same_shape(log_probs=log_probs, old_log_probs=old_log_probs)
    check_floating(log_probs=log_probs, old_log_probs=old_log_probs)
    dtype = loss_dtype(log_probs, old_log_probs)
    # Floored: a token that neither can draw has the ratio 1, not inf - inf.
    new, old = (floored(x.astype(dtype)) for x in (log_probs, old_log_probs))
    gap = new - jax.lax.stop_gradient(old)
    return jnp.clip(gap, -MAX_LOG_RATIO, MAX_LOG_RATIO)


def probability_ratio(log_probs: jax.Array, old_log_probs: jax.Array) -> jax.Array:
    """Return exp(clamp(log π - log π_old, ±20)). Any equal shapes; π_old receives no gradient.

    >>> probability_ratio(jnp.array([-1.0, 90.0]), jnp.array([-1.0, 0.0])).tolist()
    [1.0, 485165184.0]
    """
    return jnp.exp(log_ratio(log_probs, old_log_probs))


def truncated_importance_weights(
    log_probs: jax.Array, old_log_probs: jax.Array, *, cap: float
) -> jax.Array:
    """min(exp(log π - log π_old), cap), detached; the log-ratio is limited to ±20.

    Capped from above only, and exactly 1 on-policy. Two uses, which multiply:

        truncated_importance_weights(log_probs, old_log_probs, cap=2.0)          several updates
        truncated_importance_weights(old_log_probs, rollout_log_probs, cap=2.0)  another sampler

    Args:
        log_probs: [...], of the sampled tokens under the newer policy.
        old_log_probs: [...], under the older one.
        cap: positive; 2 in the paper.

    Returns:
        [...], without gradient.

    Source: `is_clip` and `rollout_is_threshold` of the SDPO code; table 12 of arXiv 2601.20802.

    >>> log_probs, old_log_probs = jnp.log(jnp.array([0.5, 0.9])), jnp.log(jnp.array([0.5, 0.1]))
    >>> truncated_importance_weights(log_probs, old_log_probs, cap=2.0).tolist()
    [1.0, 2.0]
    """
    if not cap > 0.0:
        raise ValueError(f"cap must be positive, got {cap}")
    return jax.lax.stop_gradient(jnp.minimum(probability_ratio(log_probs, old_log_probs), cap))


def teacher_entropy_weights(
    teacher_entropy: jax.Array, mask: jax.Array, *, beta: float
) -> jax.Array:
    """exp(-β H(q_t)), divided by its mean over the mask: an undecided teacher counts less.

    Args:
        teacher_entropy: [B, T], from `token_stats`.
        mask: [B, T], the distilled tokens.
        beta: at least 0; 1 in SRPO, 0 switches the weight off.

    Returns:
        [B, T], 0 where masked, of mean 1 over the mask.

    Source: SRPO, arXiv 2604.02288.

    >>> teacher_entropy_weights(jnp.array([[0.7, 0.7]]), jnp.ones((1, 2)), beta=1.0).tolist()
    [[1.0, 1.0]]
    """
    _check_at_least_zero(beta=beta)
    check_same_shape(teacher_entropy=teacher_entropy, mask=mask)
    entropies = jax.lax.stop_gradient(teacher_entropy)
    entropies = entropies.astype(loss_dtype(entropies))
    mask = mask.astype(entropies.dtype)
    # A common factor divides out; without it all weights underflow where every entropy is high.
    lowest = jnp.min(jnp.where(mask != 0.0, entropies, jnp.inf))
    weights = jnp.where(mask != 0.0, mask * jnp.exp(-beta * (entropies - lowest)), 0.0)
    return divide(weights * jnp.sum(mask), jnp.sum(weights))


def disagreement_weights(jsd: jax.Array, *, beta: float, max_reduction: float) -> jax.Array:
    """1 - 2 a (σ(β · JSD_t) - 1/2), in [1 - a, 1]: a teacher far away counts less.

    Under the reverse KL this is the target q^(1-α_t) π^α_t with α_t = 2 a (σ(β · JSD_t) - 1/2).

    Args:
        jsd: [...], from `token_stats`; at most ln 2, so that β below 5 changes little.
        beta: at least 0.
        max_reduction: a, in [0, 1].

    Returns:
        [...], without gradient.

    Source: DemoPSD, arXiv 2607.02502.

    >>> disagreement_weights(jnp.array([0.0]), beta=8.0, max_reduction=0.5).tolist()
    [1.0]
    """
    _check_at_least_zero(beta=beta)
    if not 0.0 <= max_reduction <= 1.0:
        raise ValueError(f"max_reduction must lie in [0, 1], got {max_reduction}")
    check_floating(jsd=jsd)
    gate = jax.nn.sigmoid(beta * jax.lax.stop_gradient(jsd).astype(loss_dtype(jsd))) - 0.5
    return 1.0 - 2.0 * max_reduction * gate


def pass_rate_weights(passed: jax.Array, group_size: int, *, floor: float = 0.0) -> jax.Array:
    """max(√(p (1 - p)), floor) of each question's pass rate p, divided by the batch mean.

    Without a floor, groups that all passed or all failed have weight 0; plain SDPO learns from
    both.

    Args:
        passed: [N] bool or 0/1, the rollouts of one prompt side by side.
        group_size: rollouts per prompt.
        floor: at least 0, before the division.

    Returns:
        [N] of mean 1; 0 everywhere if every group has weight 0.

    Source: SC-SDPO, arXiv 2605.27765.

    >>> pass_rate_weights(jnp.array([True, False, True, True]), 2).tolist()
    [2.0, 2.0, 0.0, 0.0]
    """
    _check_at_least_zero(floor=floor)
    rates = grouped(group_size, passed=passed).mean(axis=1, keepdims=True)
    weights = jnp.maximum(jnp.sqrt(rates * (1.0 - rates)), floor)
    weights = jnp.broadcast_to(weights, (weights.shape[0], group_size)).reshape(-1)
    return divide(weights, jnp.broadcast_to(jnp.mean(weights), weights.shape))


class Routes(NamedTuple):
    """Which loss trains which rollout: each is in exactly one of the two."""

    distill: jax.Array  # [N] float, 1 or 0
    policy_gradient: jax.Array  # [N] float, 1 or 0


def outcome_routing(passed: jax.Array, has_teacher: jax.Array) -> Routes:
    """Failures with a teacher are distilled; successes, and rows without one, go to GRPO.

    distill = (1 - passed) · has_teacher, policy_gradient = 1 - distill. Add the two losses as sums
    over the tokens of both: Σ (distill · sdpo + policy_gradient · grpo) / Σ tokens.

    Args:
        passed: [N] bool or 0/1, by reward and not by advantage: a group that all passed has
            advantage 0 and still belongs to GRPO.
        has_teacher: [N] bool or 0/1, whether the rollout has a teacher signal.

    Returns:
        Routes.

    Source: SRPO, arXiv 2604.02288.

    >>> routes = outcome_routing(jnp.array([True, False, False]), jnp.array([True, True, False]))
    >>> routes.distill.tolist(), routes.policy_gradient.tolist()
    ([0.0, 1.0, 0.0], [1.0, 0.0, 1.0])
    """
    check_same_shape(passed=passed, has_teacher=has_teacher)
    distill = ~passed.astype(bool) & has_teacher.astype(bool)
    return Routes(distill.astype(jnp.float32), (~distill).astype(jnp.float32))


def positive_only(advantages: jax.Array) -> jax.Array:
    """1 where the advantage is positive, else 0: distill only rollouts that the verifier prefers.

    Source: the gate of SDPG, arXiv 2606.04036. Any shape.

    >>> positive_only(jnp.array([0.5, 0.0, -0.5])).tolist()
    [1.0, 0.0, 0.0]
    """
    check_floating(advantages=advantages)
    return (advantages > 0.0).astype(loss_dtype(advantages))


def skip_first_tokens(mask: ArrayLike, count: int) -> jax.Array:
    """The mask without the first `count` active tokens of each row, `[B, T] -> [B, T]`.

    The first tokens of a response are where a student copies its demonstration's style.

    Source: SDFT, arXiv 2601.19897.

    >>> skip_first_tokens(jnp.array([[0, 1, 1, 1]]), 2).tolist()
    [[0, 0, 0, 1]]
    """
    if count < 0:
        raise ValueError(f"count must be at least 0, got {count}")
    mask = jnp.asarray(mask)  # host arrays are welcome
    check_rank(2, mask=mask)
    nth = jnp.cumsum(mask.astype(bool).astype(jnp.int32), axis=1)
    return jnp.where(nth > count, mask, jnp.zeros_like(mask))


def span_mask(starts: jax.Array, ends: jax.Array, length: int) -> jax.Array:
    """1 within any of a row's spans [start, end), else 0: `[B, N]` twice to `[B, length]`.

    For feedback that names the tokens that it is about. An empty span (start >= end) marks nothing,
    so rows with fewer spans are padded with zeros.

    Source: ROSD, arXiv 2605.28014.

    >>> span_mask(jnp.array([[1, 0]]), jnp.array([[3, 0]]), 4).tolist()
    [[0.0, 1.0, 1.0, 0.0]]
    """
    if length < 0:
        raise ValueError(f"length must be at least 0, got {length}")
    check_same_shape(starts=starts, ends=ends)
    check_rank(2, starts=starts)
    check_integer(starts=starts, ends=ends)
    position = jnp.arange(length, dtype=starts.dtype)[None, None]
    inside = (position >= starts[..., None]) & (position < ends[..., None])
    return jnp.any(inside, axis=1).astype(jnp.float32)


def grouped(group_size: int, **values: jax.Array) -> jax.Array:
    """Cut one named array [N] into groups, [N / group_size, group_size], float32 or wider.

    >>> grouped(2, rewards=jnp.array([1, 0, 1, 1])).tolist()
    [[1.0, 0.0], [1.0, 1.0]]
    """
    ((name, x),) = values.items()
    if group_size < 1 or x.ndim != 1 or x.shape[0] % group_size:
        raise ValueError(
            f"{name} must be [N] with N a multiple of group_size, got {name} {list(x.shape)} and "
            f"group_size {group_size}"
        )
    return jax.lax.stop_gradient(x).astype(loss_dtype(x)).reshape(-1, group_size)


def _check_at_least_zero(**values: float) -> None:
    for name, value in values.items():
        if not value >= 0.0:
            raise ValueError(f"{name} must be at least 0, got {value}")
