"""The device mesh, and the sharding of every array on it.

The mesh axes are `data` (hosts and prompts), `fsdp` (parameters and rows) and `tensor` (heads, MLP,
vocabulary). One table maps logical axes of parameters to mesh axes. Rows of a batch are sharded
over `data` and `fsdp` together.

In a run of several processes, every process holds the same host-side data, and each device takes
its part.
"""

from collections.abc import Mapping
from functools import cache
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sdpo_jax.config import MeshConfig
from sdpo_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")
ROWS = P(("data", "fsdp"))
RULES: Mapping[str, str | None] = {
    "layers": None,
    "embed": "fsdp",
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
}
"""Logical axis to mesh axis."""


def make_mesh(config: MeshConfig) -> Mesh:
    """Makes a mesh over all devices.

    Raises:
      UserError: the sizes do not multiply to the number of devices.
    """
    devices = jax.device_count()
    fixed = config.fsdp * config.tensor
    data = devices // max(1, fixed) if config.data == -1 else config.data
    if fixed < 1 or data < 1 or data * fixed != devices:
        raise UserError(
            f"mesh: data {config.data} x fsdp {config.fsdp} x tensor {config.tensor} does not fill "
            f"{devices} device(s); expected sizes whose product is {devices} "
            "(data = -1 takes what is left)"
        )
    shape = (data, config.fsdp, config.tensor)
    # Auto axes: XLA chooses shardings inside a program, this module those of inputs and outputs.
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 3)


def fitting_mesh(config: MeshConfig) -> MeshConfig:
    """Returns `config` if it fits the devices here, else the default: for reading a pod's run."""
    fixed = config.fsdp * config.tensor * max(1, config.data)
    devices = jax.device_count()
    fits = devices % fixed == 0 if config.data == -1 else devices == fixed
    return config if fits else MeshConfig()


@cache
def _eigen_products() -> dict[str, str]:
    """Compiler options with which XLA:CPU uses YNNPACK for reductions only, Eigen for products.

    The matrix products of a layer then take 0.85 of the time. Empty if this XLA lacks the option.
    """
    options = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE"}
    try:
        jax.jit(lambda: 0, compiler_options=options).lower().compile()
    except jax.errors.JaxRuntimeError:
        return {}
    return options


def partition_spec(axes: tuple[str | None, ...]) -> P:
    """Maps a parameter's logical axes to mesh axes.

    Raises:
      ValueError: two logical axes map to the same mesh axis.
    """
    mesh_axes = [None if axis is None else RULES[axis] for axis in axes]
    used = [axis for axis in mesh_axes if axis is not None]
    if len(used) != len(set(used)):
        raise ValueError(f"logical axes {axes} map to {mesh_axes}: a mesh axis may be used once")
    return P(*mesh_axes)


def _is_axes(x: object) -> bool:
    return isinstance(x, tuple) and all(isinstance(a, str | None) for a in x)


class Devices:
    """A mesh, the shardings that are used on it, and transfers to and from its devices."""

    def __init__(self, mesh: Mesh):
        self.mesh = mesh
        self.rows = NamedSharding(mesh, ROWS)
        self.replicated = NamedSharding(mesh, P())
        self.head = NamedSharding(mesh, P(None, "tensor"))  # [D, V], only the vocabulary is sharded
        self.row_shards = mesh.shape["data"] * mesh.shape["fsdp"]
        on_cpu = mesh.devices.flat[0].platform == "cpu"
        self._compiler_options = _eigen_products() if on_cpu else {}

    def parameter_shardings(self, logical_axes: Any, shapes: Any) -> Any:
        """Makes a `NamedSharding` per parameter.

        Raises:
          UserError: a dimension is not divisible by the size of its mesh axis.
        """

        def one(path: Any, axes: tuple[str | None, ...], leaf: Any) -> NamedSharding:
            spec = partition_spec(axes)
            for size, name, axis in zip(leaf.shape, axes, spec, strict=True):
                parts = 1 if axis is None else self.mesh.shape[axis]
                if size % parts:
                    raise UserError(
                        f"mesh.{axis} = {parts} does not divide {name} = {size} of parameter "
                        f"{jax.tree_util.keystr(path)}; expected a divisor of {size}"
                    )
            return NamedSharding(self.mesh, spec)

        return jax.tree_util.tree_map_with_path(one, logical_axes, shapes, is_leaf=_is_axes)

    def put_rows(self, array: Any) -> jax.Array:
        """Puts a host array `[B, ...]` on the devices, sharded by rows."""
        return jax.device_put(array, self.rows)

    def jit(self, function: Any, **options: Any) -> Any:
        """`jax.jit`, traced and called with this mesh set, because attention reads the mesh.

        The result's `lower` sets the mesh, too; its `compiled` is the jitted function.
        """
        compiler = {**self._compiler_options, **(options.pop("compiler_options", None) or {})}
        compiled = jax.jit(function, compiler_options=compiler or None, **options)

        def call(*args: Any, **kwargs: Any) -> Any:
            with jax.set_mesh(self.mesh):
                return compiled(*args, **kwargs)

        def lower(*args: Any, **kwargs: Any) -> jax.stages.Lowered:
            with jax.set_mesh(self.mesh):
                return compiled.lower(*args, **kwargs)

        call.compiled = compiled  # pyright: ignore[reportFunctionMemberAccess]
        call.lower = lower  # pyright: ignore[reportFunctionMemberAccess]
        return call

    def fetch(self, tree: Any) -> Any:
        """Copies whole arrays to the host, on every process, in one transfer for the tree."""
        if jax.process_count() == 1:
            return jax.device_get(tree)
        return jax.tree.map(
            lambda x: np.asarray(multihost_utils.process_allgather(x, tiled=True)), tree
        )
