"""The teacher's weights: the initial ones, a moving average of the student's, or the student's own.

Without regularisation the teacher runs after its own mistakes, and the paper reports divergence; an
exponential moving average is the default (arXiv 2601.20802, section 2.3 and table 4). It moves once
per generation batch, not per optimiser update. Averages are float32 whatever the student's dtype:
at a rate of 0.05 or less the steps of a bfloat16 average round to nothing.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sdpo_jax.losses.arrays import loss_dtype

Params = Any
"""A pytree of arrays."""


class Teacher(NamedTuple):
    """How the teacher's weights follow the student, as pure functions."""

    init: Callable[[Params], Params]
    """`init(student) -> teacher`, the state to carry along."""
    update: Callable[[Params, Params], Params]
    """`update(teacher, student) -> teacher`, once per generation batch."""
    params: Callable[[Params, Params], Params]
    """`params(teacher, student) -> params`, the weights to run the teacher with."""
    coefficient: float | None = None  # of `trust_region_logits`, which mixes in the student's


def ema_update(teacher: Params, student: Params, rate: float | jax.Array) -> Params:
    """θ' ← (1 - τ) θ' + τ θ, in float32; 0 leaves the teacher, 1 copies the student, both exactly.

    Args:
        teacher: pytree of arrays.
        student: pytree of the same structure and shapes, any float dtype.
        rate: τ, may be traced.

    Returns:
        A pytree of float32, float64 where either has it.

    Source: section 2.3 of arXiv 2601.20802; τ is 0.05 in section 3, 0.01 in sections 4 and 5.

    >>> ema_update({"w": jnp.array(0.0)}, {"w": jnp.array(2.0, jnp.bfloat16)}, 0.25)
    {'w': Array(0.5, dtype=float32)}
    """

    def blend(teacher: jax.Array, student: jax.Array) -> jax.Array:
        if teacher.shape != student.shape:
            raise ValueError(
                f"teacher and student differ in shape: {list(teacher.shape)} and "
                f"{list(student.shape)}"
            )
        dtype = loss_dtype(teacher, student)
        tau = jnp.asarray(rate).astype(dtype)
        return (1.0 - tau) * teacher.astype(dtype) + tau * student.astype(dtype)

    return jax.tree.map(blend, teacher, student)


def frozen() -> Teacher:
    """Return the teacher that stays as the student was at the start: θ' = θ_0.

    Source: table 4 of arXiv 2601.20802.

    >>> teacher = frozen()
    >>> state = teacher.init({"w": jnp.array(1.0)})
    >>> print(teacher.params(teacher.update(state, {"w": jnp.array(9.0)}), None)["w"])
    1.0
    """
    return Teacher(
        init=float32_copy,
        update=lambda teacher, student: teacher,
        params=lambda teacher, student: teacher,
    )


def ema(rate: float) -> Teacher:
    """Return the teacher that moves by `rate` towards the student: `ema_update`.

    Source: section 2.3 of arXiv 2601.20802; 0.05 in its section 3, 0.01 in sections 4 and 5.

    >>> teacher = ema(0.5)
    >>> print(teacher.update(teacher.init(jnp.array(1.0)), jnp.array(9.0)))
    5.0
    """
    if not 0.0 <= rate <= 1.0:
        raise ValueError(f"rate must lie in [0, 1], got {rate}")
    return frozen()._replace(update=lambda teacher, student: ema_update(teacher, student, rate))


def live() -> Teacher:
    """Return the teacher that is the student, θ' = θ; its state is empty and costs no memory.

    Source: table 4 of arXiv 2601.20802, where it diverges.

    >>> teacher = live()
    >>> print(teacher.params(teacher.init(jnp.array(1.0)), jnp.array(9.0)))
    9.0
    """
    return Teacher(
        init=lambda student: None,
        update=lambda teacher, student: None,
        params=lambda teacher, student: student,
    )


def trust_region(coefficient: float) -> Teacher:
    """Return the teacher that mixes the initial model's logits with the student's.

    Both models read the teacher's prompt in two forward passes; the loss mixes their logits, see
    `trust_region_logits`.

    Source: equation 10 of arXiv 2601.20802, with a coefficient of 0.01.

    >>> trust_region(0.25).coefficient
    0.25
    """
    if not 0.0 <= coefficient <= 1.0:
        raise ValueError(f"coefficient must lie in [0, 1], got {coefficient}")
    return frozen()._replace(coefficient=coefficient)


def float32_copy(params: Params) -> Params:
    """Copy for real: the train step donates the student's buffers, an alias would die with them."""
    return jax.tree.map(lambda x: jnp.array(x, jnp.float32, copy=True), params)
