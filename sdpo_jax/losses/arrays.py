"""What every loss asks of its arrays: shapes that fit, a fitting dtype, and at least float32.

All checks run at trace time and name the arguments with both values.
"""

import jax
import jax.numpy as jnp


def check_same_shape(**arrays: jax.Array) -> None:
    """Raise ValueError, naming all shapes, unless they are equal.

    >>> check_same_shape(mask=jnp.ones((2, 3)), rewards=jnp.ones(2))
    Traceback (most recent call last):
    ValueError: expected equal shapes, got mask [2, 3], rewards [2]
    """
    if len({x.shape for x in arrays.values()}) > 1:
        raise ValueError(f"expected equal shapes, got {_shapes(arrays)}")


def check_rank(rank: int, **arrays: jax.Array) -> None:
    """Raise ValueError, naming the shapes, unless each array has `rank` axes.

    >>> check_rank(2, mask=jnp.ones(3))
    Traceback (most recent call last):
    ValueError: expected 2 axes, got mask [3]
    """
    wrong = {name: x for name, x in arrays.items() if x.ndim != rank}
    if wrong:
        raise ValueError(f"expected {rank} axes, got {_shapes(wrong)}")


def check_vocabulary(**arrays: jax.Array) -> None:
    """Raise unless the arrays are floats `[..., V]` of one shape with V >= 1.

    >>> check_vocabulary(student_logits=jnp.array(0.0))
    Traceback (most recent call last):
    ValueError: expected [..., V] with V >= 1, got student_logits []
    """
    check_floating(**arrays)
    check_same_shape(**arrays)
    empty = {name: x for name, x in arrays.items() if x.ndim < 1 or x.shape[-1] < 1}
    if empty:
        raise ValueError(f"expected [..., V] with V >= 1, got {_shapes(empty)}")


def check_floating(**arrays: jax.Array) -> None:
    """Raise TypeError, naming the dtypes, unless each array holds floats.

    >>> check_floating(student_logits=jnp.ones(2, jnp.int32))
    Traceback (most recent call last):
    TypeError: expected a floating dtype, got student_logits int32
    """
    _check_dtype(jnp.floating, "floating", arrays)


def check_integer(**arrays: jax.Array) -> None:
    """Raise TypeError, naming the dtypes, unless each array holds integers.

    >>> check_integer(targets=jnp.ones(2))
    Traceback (most recent call last):
    TypeError: expected an integer dtype, got targets float32
    """
    _check_dtype(jnp.integer, "integer", arrays)


def loss_dtype(*arrays: jax.Array) -> jnp.dtype:
    """Return float64 if any array has it, else float32: the precision of every loss.

    >>> loss_dtype(jnp.zeros(1, jnp.bfloat16))
    dtype('float32')
    """
    wide = any(x.dtype == jnp.float64 for x in arrays)
    return jnp.dtype(jnp.float64 if wide else jnp.float32)


def where_active(mask: jax.Array, x: jax.Array) -> jax.Array:
    """Return `x: [B, T, ...]` with zeros where `mask: [B, T]` is 0.

    Before the loss, not after it: the gradient of a masked NaN is 0 · NaN otherwise.

    >>> where_active(jnp.array([1, 0]), jnp.array([2.0, jnp.nan])).tolist()
    [2.0, 0.0]
    """
    active = mask.astype(bool).reshape(mask.shape + (1,) * (x.ndim - mask.ndim))
    return jnp.where(active, x, jnp.zeros((), x.dtype))


def _shapes(arrays: dict[str, jax.Array]) -> str:
    return ", ".join(f"{name} {list(x.shape)}" for name, x in arrays.items())


def _check_dtype(kind: type, word: str, arrays: dict[str, jax.Array]) -> None:
    wrong = {name: x.dtype for name, x in arrays.items() if not jnp.issubdtype(x.dtype, kind)}
    if wrong:
        article = "an" if word[0] in "aeiou" else "a"
        got = ", ".join(f"{name} {dtype}" for name, dtype in wrong.items())
        raise TypeError(f"expected {article} {word} dtype, got {got}")
