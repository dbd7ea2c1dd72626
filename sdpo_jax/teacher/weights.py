"""The teacher's weights: the initial ones, a moving average of the student's, or the student's own.

Without regularisation the teacher runs after its own mistakes, and the paper reports divergence; an
exponential moving average is the default (arXiv 2601.20802, section 2.3 and table 4). It moves once
per generation batch, not per optimiser update. Averages are float32 whatever the student's dtype:
at a rate of 0.05 or less the steps of a bfloat16 average round to nothing.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

Params = Any
"""A pytree of arrays."""


TeacherInit: TypeAlias = Callable[[Params], Params]
"""`init(student) -> teacher`, the state to carry along."""

TeacherUpdate: TypeAlias = Callable[[Params, Params], Params]
"""`update(teacher, student) -> teacher`, once per generation batch."""

TeacherParams: TypeAlias = Callable[[Params, Params], Params]
"""`params(teacher, student) -> params`, the weights to run the teacher with."""


class Teacher(NamedTuple):
    """How the teacher's weights follow the student, as pure functions."""

    init: TeacherInit
    update: TeacherUpdate
    params: TeacherParams


def ema_update(teacher: Params, student: Params, rate: float | jax.Array) -> Params:
    """θ' ← (1 - τ) θ' + τ θ, in float32; 0 leaves the teacher, 1 copies the student, both exactly.

    Args:
        teacher: pytree of arrays.
        student: pytree of the same structure and shapes, any float dtype.
        rate: τ, may be traced.

    Returns:
        A float32 pytree.

    >>> ema_update({"w": jnp.array(0.0)}, {"w": jnp.array(2.0, jnp.bfloat16)}, 0.25)
    {'w': Array(0.5, dtype=float32)}
    """
    tau = jnp.asarray(rate, jnp.float32)

    def blend(teacher: jax.Array, student: jax.Array) -> jax.Array:
        if teacher.shape != student.shape:
            raise ValueError(
                f"teacher and student differ in shape: {list(teacher.shape)} and "
                f"{list(student.shape)}"
            )
        return (1.0 - tau) * teacher.astype(jnp.float32) + tau * student.astype(jnp.float32)

    return jax.tree.map(blend, teacher, student)


def frozen() -> Teacher:
    """Return the teacher that stays as the student was at the start."""
    return Teacher(
        init=_float32_copy,
        update=lambda teacher, student: teacher,
        params=lambda teacher, student: teacher,
    )


def ema(rate: float) -> Teacher:
    """Return the teacher that moves by `rate` towards the student; 0.05 and 0.01 in the paper."""
    if not 0.0 <= rate <= 1.0:
        raise ValueError(f"rate must lie in [0, 1], got {rate}")
    return Teacher(
        init=_float32_copy,
        update=lambda teacher, student: ema_update(teacher, student, rate),
        params=lambda teacher, student: teacher,
    )


def live() -> Teacher:
    """Return the teacher that is the student; its state is empty and costs no memory."""
    return Teacher(
        init=lambda student: None,
        update=lambda teacher, student: None,
        params=lambda teacher, student: student,
    )


def trust_region_logits(
    reference_logits: jax.Array, live_logits: jax.Array, coefficient: float | jax.Array
) -> jax.Array:
    """(1 - c) · reference + c · live, in float32: the logits of q ∝ q_ref^(1-c) · q_live^c.

    Both models read the teacher's prompt (arXiv 2601.20802, equation 10).

    Args:
        reference_logits: [..., V], unnormalised, of the frozen initial model.
        live_logits: [..., V], unnormalised, of the current student.
        coefficient: c, may be traced; 0 is the reference, 1 the student.

    Returns:
        [..., V], unnormalised.

    >>> trust_region_logits(jnp.array([0.0, 4.0]), jnp.array([4.0, 0.0]), 0.25).tolist()
    [1.0, 3.0]
    """
    return ema_update(reference_logits, live_logits, coefficient)


def _float32_copy(params: Params) -> Params:
    """Copy for real: the train step donates the student's buffers, an alias would die with them."""
    return jax.tree.map(lambda x: jnp.array(x, jnp.float32, copy=True), params)
