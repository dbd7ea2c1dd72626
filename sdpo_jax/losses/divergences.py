"""Divergences between two next-token distributions, from log-probabilities.

`S` is the student's log-probability, `T` the teacher's, `[..., V]`; the result is `[...]`, in nats.

* The teacher passes `stop_gradient` here, so that no caller can forget it.
* float64 stays float64; anything else is computed in float32.
* Log-probabilities are floored at -1e4. An impossible token (`-inf`, or a mask of -1e9) then
  contributes a finite amount with a finite gradient; no probability that float64 can tell from zero
  is touched.
* Inside a `shard_map` that cuts V, pass `vocabulary=Vocabulary("name of the mesh axis")`.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from sdpo_jax.losses.arrays import check_vocabulary, loss_dtype
from sdpo_jax.losses.vocabulary import WHOLE, Vocabulary

FLOOR = -1e4


def forward_kl(
    student_log_probs: jax.Array, teacher_log_probs: jax.Array, *, vocabulary: Vocabulary = WHOLE
) -> jax.Array:
    """KL(teacher ‖ student) = Σ_v e^T (T - S).

    Args:
        student_log_probs: [..., V].
        teacher_log_probs: [..., V]; receives no gradient.
        vocabulary: how V lies on the devices.

    Returns:
        [...].

    Source: the `alpha = 0` of the SDPO code (arXiv 2601.20802).

    >>> student, teacher = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.9, 0.1]))
    >>> print(f"{forward_kl(student, teacher):.4f}")
    0.3681
    """
    terms = divergence_terms(student_log_probs, teacher_log_probs, alpha=0.0)
    return vocabulary.sum(terms)


def reverse_kl(
    student_log_probs: jax.Array, teacher_log_probs: jax.Array, *, vocabulary: Vocabulary = WHOLE
) -> jax.Array:
    """KL(student ‖ teacher) = Σ_v e^S (S - T).

    Args:
        student_log_probs: [..., V].
        teacher_log_probs: [..., V]; receives no gradient.
        vocabulary: how V lies on the devices.

    Returns:
        [...].

    Source: equation 1 of arXiv 2601.20802; the `alpha = 1` of its code.

    >>> student, teacher = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.9, 0.1]))
    >>> print(f"{reverse_kl(student, teacher):.4f}")
    0.5108
    """
    terms = divergence_terms(student_log_probs, teacher_log_probs, alpha=1.0)
    return vocabulary.sum(terms)


def generalized_jsd(
    student_log_probs: jax.Array,
    teacher_log_probs: jax.Array,
    *,
    alpha: float,
    transform_terms: Callable[[jax.Array], jax.Array] | None = None,
    vocabulary: Vocabulary = WHOLE,
) -> jax.Array:
    """(1 - α) KL(S ‖ M) + α KL(T ‖ M) with the mixture M = log[(1 - α) e^S + α e^T].

    The student's gradient also flows through M. The two ends are the KLs by definition and not the
    limits of the middle, which vanishes there: exactly 0 is KL(teacher ‖ student), exactly 1 is
    KL(student ‖ teacher). At 0.5 the value is symmetric and at most ln 2.

    Args:
        student_log_probs: [..., V].
        teacher_log_probs: [..., V]; receives no gradient.
        alpha: a Python float in [0, 1].
        transform_terms: changes the summands [..., V] before the sum, as `clip_entries` does.
        vocabulary: how V lies on the devices.

    Returns:
        [...].

    Source: section 3 of arXiv 2601.20802 and the convention of its code.

    >>> student, teacher = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.9, 0.1]))
    >>> print(f"{generalized_jsd(student, teacher, alpha=0.5):.4f}")
    0.1017
    """
    if transform_terms is None and 0.0 < alpha < 1.0:
        pair = as_log_probs(student_log_probs, teacher_log_probs)
        return mixture_divergence(alpha, vocabulary, *pair)
    terms = divergence_terms(student_log_probs, teacher_log_probs, alpha=alpha)
    return vocabulary.sum(terms if transform_terms is None else transform_terms(terms))


def divergence_terms(
    student_log_probs: jax.Array, teacher_log_probs: jax.Array, *, alpha: float
) -> jax.Array:
    """The summands of `generalized_jsd` per vocabulary entry, `[..., V] -> [..., V]`.

    α = 0: e^T (T - S). α = 1: e^S (S - T). Between: (1 - α) e^S (S - M) + α e^T (T - M).

    Source: as `generalized_jsd`; single terms are what OPSD (arXiv 2601.18734) clips.

    >>> student, teacher = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.9, 0.1]))
    >>> [f"{x:.4f}" for x in divergence_terms(student, teacher, alpha=1.0)]
    ['-0.2939', '0.8047']
    """
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha must lie in [0, 1], got {alpha}")
    student, teacher = as_log_probs(student_log_probs, teacher_log_probs)
    if alpha == 0.0:
        return jnp.exp(teacher) * (teacher - student)
    if alpha == 1.0:
        return jnp.exp(student) * (student - teacher)
    return _mixture_terms(alpha, student, teacher)


def clip_entries(terms: jax.Array, bound: float) -> jax.Array:
    """min(term, bound) per vocabulary entry: no single token can dominate a divergence.

    The clipped sum is no divergence any more and can be negative. For the `transform_terms` of
    `generalized_jsd`.

    Args:
        terms: [..., V], from `divergence_terms`.
        bound: positive; 0.05 in OPSD.

    Returns:
        [..., V].

    Source: OPSD, arXiv 2601.18734.

    >>> print(clip_entries(jnp.array([-0.2, 0.01, 0.8]), 0.05))
    [-0.2   0.01  0.05]
    """
    if not bound > 0.0:
        raise ValueError(f"bound must be positive, got {bound}")
    return jnp.minimum(terms, bound)


def entropy(log_probs: jax.Array, *, vocabulary: Vocabulary = WHOLE) -> jax.Array:
    """-Σ_v p log p, with 0 log 0 = 0. `[..., V] -> [...]`.

    Source: Shannon; in nats.

    >>> print(f"{entropy(jnp.log(jnp.array([0.5, 0.5, 0.0]))):.4f}")
    0.6931
    """
    check_vocabulary(log_probs=log_probs)
    log_probs = floored(log_probs.astype(loss_dtype(log_probs)))
    return -vocabulary.sum(jnp.exp(log_probs) * log_probs)


def floored(log_probs: jax.Array) -> jax.Array:
    """Log-probabilities of at least -1e4, where a probability is 0 in every precision.

    >>> floored(jnp.array([-jnp.inf, -3.0])).tolist()
    [-10000.0, -3.0]
    """
    return jnp.maximum(log_probs, FLOOR)


def as_log_probs(student: jax.Array, teacher: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Check both `[..., V]`, make them float32 or wider, floor them, and detach the teacher.

    >>> [x.tolist() for x in as_log_probs(jnp.array([0.0, -jnp.inf]), jnp.array([-1e9, 0.0]))]
    [[0.0, -10000.0], [-10000.0, 0.0]]
    """
    check_vocabulary(student_log_probs=student, teacher_log_probs=teacher)
    dtype = loss_dtype(student, teacher)
    teacher = jax.lax.stop_gradient(teacher)
    return floored(student.astype(dtype)), floored(teacher.astype(dtype))


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _mixture_terms(alpha: float, student: jax.Array, teacher: jax.Array) -> jax.Array:
    """(1 - α) e^S (S - M) + α e^T (T - M) per entry; the derivative by S is the first summand.

    The other parts of the derivative cancel, since e^M = (1 - α) e^S + α e^T.
    """
    of_student, of_teacher = _mixture_summands(alpha, student, teacher)
    return (1.0 - alpha) * of_student + alpha * of_teacher


@_mixture_terms.defjvp
def _mixture_terms_jvp(
    alpha: float, primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    of_student, of_teacher = _mixture_summands(alpha, *primals)
    of_student = (1.0 - alpha) * of_student
    return of_student + alpha * of_teacher, of_student * tangents[0]  # the teacher is detached


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def mixture_divergence(
    alpha: float, vocabulary: Vocabulary, student: jax.Array, teacher: jax.Array
) -> jax.Array:
    """The sum over v of `_mixture_terms`, for 0 < α < 1 and floored S and T; [..., V] to [...].

    >>> print(mixture_divergence(0.5, WHOLE, jnp.zeros(1), jnp.zeros(1)))
    0.0
    """
    of_student, of_teacher = _mixture_summands(alpha, student, teacher)
    return (1.0 - alpha) * vocabulary.sum(of_student) + alpha * vocabulary.sum(of_teacher)


@mixture_divergence.defjvp
def _mixture_divergence_jvp(
    alpha: float,
    vocabulary: Vocabulary,
    primals: tuple[jax.Array, jax.Array],
    tangents: tuple[jax.Array, jax.Array],
) -> tuple[jax.Array, jax.Array]:
    of_student, of_teacher = _mixture_summands(alpha, *primals)
    # Factors of whole sums, so that no pass over the vocabulary multiplies by them.
    value = (1.0 - alpha) * vocabulary.sum(of_student) + alpha * vocabulary.sum(of_teacher)
    return value, (1.0 - alpha) * vocabulary.sum(of_student * tangents[0])


def _mixture_summands(
    alpha: float, student: jax.Array, teacher: jax.Array
) -> tuple[jax.Array, jax.Array]:
    student_ratio, teacher_ratio = _log_ratios_to_mixture(student, teacher, alpha)
    return jnp.exp(student) * student_ratio, jnp.exp(teacher) * teacher_ratio


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
