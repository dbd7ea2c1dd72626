"""Arrays are sharded by the table of rules; sizes that do not fit are refused with both values."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import PartitionSpec as P

from sdpo_jax.config import MeshConfig
from sdpo_jax.devices import AXES, fitting_mesh, make_mesh, partition_spec
from sdpo_jax.errors import UserError


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (MeshConfig(), (8, 1, 1)),
        (MeshConfig(fsdp=4, tensor=2), (1, 4, 2)),
        (MeshConfig(fsdp=2), (4, 2, 1)),
        (MeshConfig(data=2, fsdp=2, tensor=2), (2, 2, 2)),
    ],
)
def test_data_takes_what_the_other_axes_leave(config, expected):
    mesh = make_mesh(config)
    assert mesh.axis_names == AXES and tuple(mesh.shape.values()) == expected


@pytest.mark.parametrize(
    "config",
    [
        MeshConfig(fsdp=3),
        MeshConfig(tensor=16),
        MeshConfig(data=2, fsdp=2),
        MeshConfig(data=0),
        MeshConfig(data=3, fsdp=3, tensor=1),
    ],
)
def test_a_mesh_that_does_not_fill_the_devices_is_refused_with_both_values(config):
    with pytest.raises(UserError) as error:
        make_mesh(config)
    sizes = f"data {config.data} x fsdp {config.fsdp} x tensor {config.tensor}"
    assert sizes in str(error.value) and "8 device" in str(error.value)


@pytest.mark.parametrize(
    ("config", "fits"),
    [
        (MeshConfig(), True),
        (MeshConfig(data=-1, fsdp=4, tensor=2), True),
        (MeshConfig(data=2, fsdp=2, tensor=2), True),
        (MeshConfig(data=-1, fsdp=32, tensor=2), False),
        (MeshConfig(data=1, fsdp=2, tensor=1), False),
    ],
)
def test_a_mesh_of_another_machine_becomes_one_over_what_is_here(config, fits):
    found = fitting_mesh(config)
    assert found == (config if fits else MeshConfig())
    make_mesh(found)


def test_a_dimension_that_its_axis_does_not_divide_is_refused_with_both_values():
    model, devices = tiny.make_model(), tiny.make_devices(tensor=2)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    with pytest.raises(UserError) as error:
        devices.parameter_shardings(model.logical_axes, shapes)
    for word in ("mesh.tensor = 2", "vocab = 61", "embedding"):
        assert word in str(error.value)


def test_logical_axes_become_mesh_axes():
    assert partition_spec(("layers", "embed", "heads")) == P(None, "fsdp", "tensor")
    assert partition_spec(("vocab", "embed")) == P("tensor", "fsdp")
    assert partition_spec((None,)) == P(None)


@pytest.mark.parametrize("axes", [("embed", "embed"), ("heads", "mlp"), ("vocab", None, "mlp")])
def test_a_mesh_axis_used_twice_is_refused(axes):
    with pytest.raises(ValueError, match="once"):
        partition_spec(axes)


def test_rows_split_over_data_and_fsdp_and_come_back_whole():
    devices = tiny.make_devices(2, 2, 2)
    assert devices.row_shards == 4
    rows = np.arange(24).reshape(8, 3)
    placed = devices.put_rows(rows)
    assert placed.addressable_shards[0].data.shape == (2, 3)
    fetched = devices.fetch({"rows": placed})
    np.testing.assert_array_equal(fetched["rows"], rows)


def test_every_matrix_of_the_model_is_split_over_fsdp_and_tensor():
    architecture = replace(tiny.FAMILIES["qwen2"], vocabulary=64)
    model, devices = tiny.make_model(architecture), tiny.make_devices(1, 4, 2)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    shardings = devices.parameter_shardings(model.logical_axes, shapes)
    assert jax.tree.structure(shardings) == jax.tree.structure(shapes)
    for shape, sharding in zip(jax.tree.leaves(shapes), jax.tree.leaves(shardings), strict=True):
        local = np.prod(sharding.shard_shape(shape.shape))
        matrix = min(shape.shape[-2:]) > architecture.layers and len(shape.shape) > 1
        assert local * (8 if matrix else 2) <= shape.size


def test_on_a_cpu_products_are_left_to_the_library_that_is_faster_at_them():
    square = jnp.ones((64, 64))
    program = tiny.make_devices().jit(jnp.matmul).lower(square, square).compile().as_text()
    assert program is not None and "ynn" not in program


def test_options_of_a_program_stand_beside_those_of_its_devices():
    devices = tiny.make_devices()
    double = devices.jit(lambda x: x + x, compiler_options=tiny.QUICK)
    np.testing.assert_array_equal(double(devices.put_rows(np.ones(8))), np.full(8, 2.0))
