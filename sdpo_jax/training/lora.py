"""The trained parameters: all of the model's, or low-rank adapters beside frozen ones.

LoRA (arXiv 2106.09685) adds s · A B to a matrix W: `down` A [I, R], `up` B [R, O], s = alpha / R.
Model code stays as it is: it is handed a `LowRank` leaf where it expects a matrix, and `x @ leaf`
computes x W + s (x A) B, so that no gradient of the size of W exists.

A teacher follows the *product*: its weights are averages of W + s A B. An average of the factors is
another matrix, and starts with the square of the rate.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sdpo_jax.errors import UserError
from sdpo_jax.model import Params


class Parameters(NamedTuple):
    """How a run's trainable weights make the model's, as pure functions."""

    trainable: Callable[[Params, jax.Array], Params]  # (initial params, key) -> trainable, float32
    base: Callable[[Params], Params]  # initial params -> what stays as it is, or None
    forward: Callable[[Params, Params], Params]  # (base, trainable) -> params to differentiate
    merged: Callable[[Params, Params], Params]  # (base, trainable) -> plain params
    logical_axes: Callable[[Params], Params]  # the model's axes -> those of trainable


def full() -> Parameters:
    """Every parameter is trained.

    >>> full().merged(None, {"w": jnp.array(1.0)})["w"].item()
    1.0
    """
    return Parameters(
        trainable=lambda params, key: jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params),
        base=lambda params: None,
        forward=lambda base, trainable: trainable,
        merged=lambda base, trainable: trainable,
        logical_axes=lambda axes: axes,
    )


def lora(rank: int, alpha: float, targets: tuple[str, ...]) -> Parameters:
    """Adapters of `rank` on the layers' matrices that `targets` names; `up` starts at 0.

    Raises:
        UserError: when a target is not a matrix of the model's layers.

    >>> parts = lora(rank=1, alpha=2.0, targets=("query",))
    >>> base = {"layers": {"query": jnp.ones((1, 3, 4))}}
    >>> adapters = parts.trainable(base, jax.random.key(0))
    >>> bool((parts.merged(base, adapters)["layers"]["query"] == 1.0).all())
    True
    """
    scale = alpha / rank

    def trainable(params: Params, key: jax.Array) -> Params:
        layers = params["layers"]
        _check_targets(targets, layers)
        keys = jax.random.split(key, len(targets))
        return {
            name: _adapter(layers[name].shape, rank, k)
            for name, k in zip(targets, keys, strict=True)
        }

    def forward(base: Params, adapters: Params) -> Params:
        base = jax.lax.stop_gradient(base)
        return _replace(base, adapters, lambda w, a: LowRank(w, a["down"], a["up"], scale))

    def merged(base: Params, adapters: Params) -> Params:
        def add(w: jax.Array, a: Params) -> jax.Array:
            product = jnp.einsum("lir,lro->lio", a["down"], a["up"])
            return (w.astype(jnp.float32) + scale * product).astype(w.dtype)

        return _replace(base, adapters, add)

    def logical_axes(axes: Params) -> Params:
        return {
            name: {"down": (layer, inner, None), "up": (layer, None, outer)}
            for name in targets
            for layer, inner, outer in [axes["layers"][name]]
        }

    def base(params: Params) -> Params:
        # Copied for real: the train step donates its state, and the caller keeps the weights.
        return jax.tree.map(lambda x: jnp.array(x, copy=True), params)

    return Parameters(trainable, base, forward, merged, logical_axes)


def checksum(params: Params) -> int:
    """Sum of the bits of all values, modulo 2^32: the same on every mesh, in any order.

    >>> checksum({"a": jnp.array([1.0, 2.0])}) == checksum({"a": jnp.array([2.0, 1.0])})
    True
    >>> checksum({"a": jnp.array([1.0, 2.0])}) == checksum({"a": jnp.array([1.0, 2.5])})
    False
    """

    def total(params: Params) -> jax.Array:
        bits = [
            jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
            for x in jax.tree.leaves(params)
        ]
        return jnp.sum(jnp.stack([jnp.sum(x, dtype=jnp.uint32) for x in bits]), dtype=jnp.uint32)

    return int(jax.jit(total)(params))


def refuse_another_base(base: Params, saved: int | None, path: str) -> None:
    """Compares the weights beside adapters with those they were trained beside (`checksum`).

    Raises:
        UserError: they are others: the sum would be no model that was ever trained.
    """
    if base is not None and checksum(base) != saved:
        raise UserError(
            f"model.path = {path!r} holds other weights than those that this run's adapters were "
            "trained beside; put the old ones back, or train anew in another run_dir"
        )


@jax.tree_util.register_pytree_node_class
class LowRank:
    """A matrix W + s A B that is never formed: stands where model code expects a matrix.

    Beside the product it has what model code uses of a matrix: `astype`, and slices under `scan`
    (it is a pytree whose leaves carry the layer axis).
    """

    def __init__(self, base: Any, down: Any, up: Any, scale: float):
        """Takes W [..., I, O], A [..., I, R], B [..., R, O] and s."""
        self.base, self.down, self.up, self.scale = base, down, up, scale

    def astype(self, dtype: Any) -> "LowRank":
        """All three in `dtype`."""
        base, down, up = (x.astype(dtype) for x in (self.base, self.down, self.up))
        return LowRank(base, down, up, self.scale)

    def __rmatmul__(self, x: jax.Array) -> jax.Array:
        return x @ self.base + ((x @ self.down) @ self.up) * jnp.asarray(self.scale, x.dtype)

    def tree_flatten(self) -> tuple[tuple[Any, ...], float]:
        """Leaves, and the static scale."""
        return (self.base, self.down, self.up), self.scale

    @classmethod
    def tree_unflatten(cls, scale: float, leaves: tuple[Any, ...]) -> "LowRank":
        """Undoes `tree_flatten`."""
        base, down, up = leaves
        return cls(base, down, up, scale)


def _adapter(shape: tuple[int, ...], rank: int, key: jax.Array) -> dict[str, jax.Array]:
    layers, inner, outer = shape
    down = jax.random.normal(key, (layers, inner, rank)) * inner**-0.5
    return {"down": down, "up": jnp.zeros((layers, rank, outer))}


def _replace(base: Params, adapters: Params, make: Callable[[Any, Any], Any]) -> Params:
    layers = {n: make(w, adapters[n]) if n in adapters else w for n, w in base["layers"].items()}
    return {**base, "layers": layers}


def _check_targets(targets: tuple[str, ...], layers: Params) -> None:
    matrices = [name for name, x in layers.items() if len(x.shape) == 3]
    unknown = [name for name in targets if name not in matrices]
    if unknown or not targets:
        raise UserError(
            f"lora.targets = {list(targets)}: expected names of {', '.join(sorted(matrices))}"
        )
