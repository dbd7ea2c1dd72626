"""What differs between versions of jax in the losses: the mark of arrays that vary over mesh axes.

Inside `shard_map` jax tracks the mesh axes over which an array differs from device to device. From
0.10 on a type holds that set as `manual_axis_type.varying`, from 0.6 to 0.9 as `vma`; `pcast` sets
the mark from 0.8 on, `pvary` before. Versions before 0.6 have neither, and no `jax.shard_map`.
"""

from collections.abc import Callable
from typing import Any

import jax


def varying_axes(x: jax.Array) -> frozenset[str]:
    """Mesh axes over which an array varies; none outside `shard_map`.

    >>> varying_axes(jnp.zeros(3))
    frozenset()
    """
    return axes_of(jax.typeof(x)) if hasattr(jax, "typeof") else frozenset()


def axes_of(kind: Any) -> frozenset[str]:
    """Mesh axes over which arrays of a type vary, as from `jax.typeof` or `output_types`.

    >>> axes_of(output_types(jnp.sin, jnp.zeros(3)))
    frozenset()
    """
    if hasattr(kind, "manual_axis_type"):
        return frozenset(kind.manual_axis_type.varying)
    return frozenset(kind.vma) if hasattr(kind, "vma") else frozenset()


def mark_varying(x: jax.Array, axes: frozenset[str]) -> jax.Array:
    """Mark `x` as varying over `axes`, too; its gradient is then summed over them once.

    >>> mark_varying(jnp.zeros(1), frozenset()).tolist()
    [0.0]
    """
    missing = tuple(sorted(axes - varying_axes(x)))
    if not missing:
        return x
    if hasattr(jax.lax, "pcast"):
        return jax.lax.pcast(x, missing, to="varying")
    return jax.lax.pvary(x, missing)  # pyright: ignore[reportAttributeAccessIssue]


def output_types(function: Callable[..., Any], *arguments: Any) -> Any:
    """The types of a function's outputs, with the axes over which they vary.

    `jax.eval_shape` leaves those out before 0.7.

    >>> output_types(jnp.sin, jnp.zeros(3)).shape
    (3,)
    """
    jaxpr, shapes = jax.make_jaxpr(function, return_shape=True)(*arguments)
    return jax.tree.unflatten(jax.tree.structure(shapes), jaxpr.out_avals)
