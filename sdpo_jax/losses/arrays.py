"""What every loss asks of its arrays: equal shapes, and at least float32."""

import jax
import jax.numpy as jnp


def check_same_shape(**arrays: jax.Array) -> None:
    """Raise ValueError, naming all shapes, unless they are equal. Runs at trace time.

    >>> check_same_shape(mask=jnp.ones((2, 3)), rewards=jnp.ones(2))
    Traceback (most recent call last):
    ValueError: expected equal shapes, got mask [2, 3], rewards [2]
    """
    if len({x.shape for x in arrays.values()}) > 1:
        shapes = ", ".join(f"{name} {list(x.shape)}" for name, x in arrays.items())
        raise ValueError(f"expected equal shapes, got {shapes}")


def loss_dtype(*arrays: jax.Array) -> jnp.dtype:
    """Return float64 if any array has it, else float32: the precision of every loss.

    >>> loss_dtype(jnp.zeros(1, jnp.bfloat16))
    dtype('float32')
    """
    wide = any(x.dtype == jnp.float64 for x in arrays)
    return jnp.dtype(jnp.float64 if wide else jnp.float32)
