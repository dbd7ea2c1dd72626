"""SDPO seen as a policy gradient: who gets credit, per candidate, per token or per rollout.

The gradient of the reverse KL is -Σ_v π(v) A(v) ∇log π(v) with the advantage A = log q - log π of
each candidate token (arXiv 2601.20802, equation 2 and appendix). Advantages are detached, so they
can be shown as a heat-map, clipped, averaged, or mixed with those of a reward:

    candidates of each position   candidate_loss(student_log_probs, A[..., V])
    the sampled token             score_function_loss(log_probs, A[B, T])
    the whole rollout             score_function_loss(log_probs, sequence_advantages(A, mask))

Section 4.2 of the paper compares these three levels; its token level takes the likeliest token
where we take the sampled one, for which the gradient is unbiased. The paper clips advantages at
test time (5.0) and mixes them with GRPO's (λ = 0.9); its released code does neither.
"""

import jax
import jax.numpy as jnp

from sdpo_jax.losses.arrays import check_floating, check_rank, check_same_shape, loss_dtype
from sdpo_jax.losses.divergences import floored
from sdpo_jax.losses.reductions import divide
from sdpo_jax.losses.vocabulary import WHOLE, Vocabulary


def distillation_advantages(
    student_log_probs: jax.Array, teacher_log_probs: jax.Array, *, clip: float | None = None
) -> jax.Array:
    """A = log q - log π, detached: above 0 where the teacher likes a token more.

    Args:
        student_log_probs: [..., V] or [..., K] of candidates, or [B, T] of sampled tokens.
        teacher_log_probs: the same shape.
        clip: limit A to [-clip, clip]; 5 in the paper's test-time runs. None: no limit.

    Returns:
        The same shape, in float32 or wider, without gradient.

    Source: equation 2 of arXiv 2601.20802.

    >>> student, teacher = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.9, 0.1]))
    >>> [round(x, 4) for x in distillation_advantages(student, teacher, clip=1.0).tolist()]
    [0.5878, -1.0]
    """
    if clip is not None and not clip > 0.0:
        raise ValueError(f"clip must be positive, got {clip}")
    pair = {"student_log_probs": student_log_probs, "teacher_log_probs": teacher_log_probs}
    check_same_shape(**pair)
    check_floating(**pair)
    dtype = loss_dtype(student_log_probs, teacher_log_probs)
    student, teacher = (floored(jax.lax.stop_gradient(x).astype(dtype)) for x in pair.values())
    gap = teacher - student
    return gap if clip is None else jnp.clip(gap, -clip, clip)


def candidate_loss(
    student_log_probs: jax.Array, advantages: jax.Array, *, vocabulary: Vocabulary = WHOLE
) -> jax.Array:
    """-Σ_v π(v) A(v): credit for every candidate at every position (the logit level).

    With the unclipped `distillation_advantages` value and gradient are those of `reverse_kl`.

    Args:
        student_log_probs: [..., V] or [..., K].
        advantages: the same shape; receive no gradient.
        vocabulary: how V lies on the devices.

    Returns:
        [...].

    Source: equation 2 of arXiv 2601.20802.

    >>> log_probs = jnp.log(jnp.array([0.25, 0.75]))
    >>> print(candidate_loss(log_probs, jnp.array([1.0, -1.0])))
    0.5
    """
    check_same_shape(student_log_probs=student_log_probs, advantages=advantages)
    check_floating(student_log_probs=student_log_probs, advantages=advantages)
    dtype = loss_dtype(student_log_probs, advantages)
    probs = jnp.exp(student_log_probs.astype(dtype))
    return -vocabulary.sum(probs * jax.lax.stop_gradient(advantages).astype(dtype))


def score_function_loss(log_probs: jax.Array, advantages: jax.Array) -> jax.Array:
    """-A · log π(y_t): credit for the sampled token. Any equal shapes.

    Its gradient, not its value, is meant: over y_t ~ π it averages to that of `candidate_loss`.

    Args:
        log_probs: [...], of the sampled tokens.
        advantages: [...]; receive no gradient.

    Returns:
        [...].

    Source: equation 2 of arXiv 2601.20802, one sample of its inner expectation.

    >>> score_function_loss(jnp.array([-2.0]), jnp.array([0.5])).tolist()
    [1.0]
    """
    check_same_shape(log_probs=log_probs, advantages=advantages)
    check_floating(log_probs=log_probs, advantages=advantages)
    dtype = loss_dtype(log_probs, advantages)
    return -jax.lax.stop_gradient(advantages).astype(dtype) * floored(log_probs.astype(dtype))


def sequence_advantages(advantages: jax.Array, mask: jax.Array) -> jax.Array:
    """Give every token its rollout's mean advantage, Σ_t m A / Σ_t m (the sequence level).

    Args:
        advantages: [B, T], per token.
        mask: [B, T], nonzero on response tokens.

    Returns:
        [B, T]; 0 for a row without an active token.

    Source: the sequence-level row of section 4.2 of arXiv 2601.20802.

    >>> sequence_advantages(jnp.array([[1.0, 3.0, 9.0]]), jnp.array([[1, 1, 0]])).tolist()
    [[2.0, 2.0, 2.0]]
    """
    check_same_shape(advantages=advantages, mask=mask)
    check_rank(2, mask=mask)
    dtype = loss_dtype(advantages)
    weights = mask.astype(dtype)
    total = jnp.where(weights != 0.0, weights * advantages.astype(dtype), 0.0)
    mean = divide(jnp.sum(total, axis=1), jnp.sum(weights, axis=1))
    return jnp.broadcast_to(jax.lax.stop_gradient(mean)[:, None], mask.shape)


def mix_advantages(
    reward_advantages: jax.Array, distillation_advantages: jax.Array, *, coefficient: float
) -> jax.Array:
    """λ A_reward + (1 - λ) A_distillation, detached: GRPO at λ = 1, SDPO at λ = 0.

    Args:
        reward_advantages: [B], from `group_advantages`, or [B, T].
        distillation_advantages: [B, T], of the sampled tokens.
        coefficient: λ in [0, 1]; 0.9 in the paper.

    Returns:
        [B, T], for `policy_gradient_loss` or `score_function_loss`.

    Source: equation 3 of arXiv 2601.20802; absent from its released code.

    >>> mix_advantages(jnp.array([1.0]), jnp.array([[0.0, -1.0]]), coefficient=0.5).tolist()
    [[0.5, 0.0]]
    """
    if not 0.0 <= coefficient <= 1.0:
        raise ValueError(f"coefficient must lie in [0, 1], got {coefficient}")
    check_rank(2, distillation_advantages=distillation_advantages)
    rewards = spread(reward_advantages, distillation_advantages)
    dtype = loss_dtype(rewards, distillation_advantages)
    rewards, distillation = (x.astype(dtype) for x in (rewards, distillation_advantages))
    return jax.lax.stop_gradient(coefficient * rewards + (1.0 - coefficient) * distillation)


def modulate_advantages(
    advantages: jax.Array,
    log_probs: jax.Array,
    teacher_log_probs: jax.Array,
    *,
    strength: float,
    bound: float,
) -> jax.Array:
    """A · [(1 - λ) + λ · clip(exp(sign(A) Δ_t), 1 - ε, 1 + ε)] with Δ_t = log q(y_t) - log π(y_t).

    The reward decides the direction, the teacher how much each token moves.

    Args:
        advantages: [B] or [B, T], of the rewards.
        log_probs: [B, T], of the sampled tokens.
        teacher_log_probs: [B, T].
        strength: λ in [0, 1]; 0 is plain GRPO.
        bound: ε in [0, 1]; 0.2 in RLSD.

    Returns:
        [B, T], without gradient; signs as in `advantages`.

    Source: RLSD, arXiv 2604.03128.

    >>> log_probs, teacher = jnp.array([[-1.0, -1.0]]), jnp.array([[-1.0, 0.0]])
    >>> modulate_advantages(jnp.array([1.0]), log_probs, teacher, strength=0.5, bound=0.5).tolist()
    [[1.0, 1.25]]
    """
    if not (0.0 <= strength <= 1.0 and 0.0 <= bound <= 1.0):
        raise ValueError(f"strength and bound must lie in [0, 1], got {strength} and {bound}")
    check_rank(2, log_probs=log_probs)
    check_same_shape(log_probs=log_probs, teacher_log_probs=teacher_log_probs)
    gap = distillation_advantages(log_probs, teacher_log_probs, clip=20.0)
    rewards = jax.lax.stop_gradient(spread(advantages, gap)).astype(gap.dtype)
    weight = jnp.clip(jnp.exp(jnp.sign(rewards) * gap), 1.0 - bound, 1.0 + bound)
    return rewards * ((1.0 - strength) + strength * weight)


def spread(advantages: jax.Array, like: jax.Array) -> jax.Array:
    """One advantage per rollout, [B], at each of its tokens, [B, T]; [B, T] stays.

    >>> spread(jnp.array([1.0, 2.0]), jnp.zeros((2, 2))).tolist()
    [[1.0, 1.0], [2.0, 2.0]]
    """
    check_rank(2, mask=like)
    if advantages.shape not in {like.shape, like.shape[:1]}:
        raise ValueError(
            f"advantages must be [B] or [B, T] with [B, T] = {list(like.shape)}, got "
            f"{list(advantages.shape)}"
        )
    rows = advantages[:, None] if advantages.ndim == 1 else advantages
    return jnp.broadcast_to(rows, like.shape)
