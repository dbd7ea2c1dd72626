"""Divergences between two next-token distributions, from log-probabilities.

`S` is the student's log-probability, `T` the teacher's, `[..., V]`; the result is `[...]`, in nats.

* The teacher passes `stop_gradient` here, so that no caller can forget it.
* float64 stays float64; anything else is computed in float32.
* Log-probabilities are floored at -1e4. An impossible token (`-inf`, or a mask of -1e9) then
  contributes a finite amount with a finite gradient; no probability that float64 can tell from zero
  is touched.
"""

import jax
import jax.numpy as jnp

from sdpo_jax.losses.arrays import check_same_shape, loss_dtype

FLOOR = -1e4


def forward_kl(student_log_probs: jax.Array, teacher_log_probs: jax.Array) -> jax.Array:
    """KL(teacher ‖ student) = Σ_v e^T (T - S).

    Args:
        student_log_probs: [..., V].
        teacher_log_probs: [..., V]; receives no gradient.

    Returns:
        [...]. The `alpha = 0` of the SDPO code (arXiv 2601.20802).

    >>> student, teacher = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.9, 0.1]))
    >>> print(f"{forward_kl(student, teacher):.4f}")
    0.3681
    """
    student, teacher = _prepare(student_log_probs, teacher_log_probs)
    return jnp.sum(jnp.exp(teacher) * (teacher - student), axis=-1)


def reverse_kl(student_log_probs: jax.Array, teacher_log_probs: jax.Array) -> jax.Array:
    """KL(student ‖ teacher) = Σ_v e^S (S - T), the divergence of equation 1 of arXiv 2601.20802.

    Args:
        student_log_probs: [..., V].
        teacher_log_probs: [..., V]; receives no gradient.

    Returns:
        [...]. The `alpha = 1` of the SDPO code.

    >>> student, teacher = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.9, 0.1]))
    >>> print(f"{reverse_kl(student, teacher):.4f}")
    0.5108
    """
    student, teacher = _prepare(student_log_probs, teacher_log_probs)
    return jnp.sum(jnp.exp(student) * (student - teacher), axis=-1)


def generalized_jsd(
    student_log_probs: jax.Array, teacher_log_probs: jax.Array, *, alpha: float
) -> jax.Array:
    """(1 - α) KL(S ‖ M) + α KL(T ‖ M) with the mixture M = log[(1 - α) e^S + α e^T].

    The student's gradient also flows through M. The two ends are the KLs by definition and not the
    limits of the middle, which vanishes there: exactly 0 is KL(teacher ‖ student), exactly 1 is
    KL(student ‖ teacher). At 0.5 the value is symmetric and at most ln 2.

    Args:
        student_log_probs: [..., V].
        teacher_log_probs: [..., V]; receives no gradient.
        alpha: a Python float in [0, 1], the convention of the SDPO code.

    Returns:
        [...].

    >>> student, teacher = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.9, 0.1]))
    >>> print(f"{generalized_jsd(student, teacher, alpha=0.5):.4f}")
    0.1017
    """
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha must lie in [0, 1], got {alpha}")
    if alpha == 0.0:
        return forward_kl(student_log_probs, teacher_log_probs)
    if alpha == 1.0:
        return reverse_kl(student_log_probs, teacher_log_probs)
    student, teacher = _prepare(student_log_probs, teacher_log_probs)
    student_ratio, teacher_ratio = _log_ratios_to_mixture(student, teacher, alpha)
    return jnp.sum(
        (1.0 - alpha) * jnp.exp(student) * student_ratio + alpha * jnp.exp(teacher) * teacher_ratio,
        axis=-1,
    )


def entropy(log_probs: jax.Array) -> jax.Array:
    """-Σ_v p log p, with 0 log 0 = 0. `[..., V] -> [...]`.

    >>> print(f"{entropy(jnp.log(jnp.array([0.5, 0.5, 0.0]))):.4f}")
    0.6931
    """
    log_probs = jnp.maximum(log_probs.astype(loss_dtype(log_probs)), FLOOR)
    return -jnp.sum(jnp.exp(log_probs) * log_probs, axis=-1)


def _prepare(student: jax.Array, teacher: jax.Array) -> tuple[jax.Array, jax.Array]:
    check_same_shape(student_log_probs=student, teacher_log_probs=teacher)
    dtype = loss_dtype(student, teacher)
    teacher = jax.lax.stop_gradient(teacher)
    return jnp.maximum(student.astype(dtype), FLOOR), jnp.maximum(teacher.astype(dtype), FLOOR)


def _log_ratios_to_mixture(
    student: jax.Array, teacher: jax.Array, alpha: float
) -> tuple[jax.Array, jax.Array]:
    """Return S - M and T - M, exactly 0 where S = T.

    With d = T - S: S - M = -log1p(α expm1(d)) and T - M = -log1p((1 - α) expm1(-d)). Only the one
    whose exponent is not positive is evaluated, so nothing overflows; the other differs by d.
    """
    gap = teacher - student
    below = gap <= 0.0  # the teacher gives this token no more than the student does
    # `where`, not `-abs`: the derivative of abs is 0 at 0, where student and teacher agree.
    decay = jnp.expm1(jnp.where(below, gap, -gap))
    smaller = -jnp.log1p(jnp.where(below, alpha, 1.0 - alpha) * decay)
    return jnp.where(below, smaller, smaller - gap), jnp.where(below, smaller + gap, smaller)
