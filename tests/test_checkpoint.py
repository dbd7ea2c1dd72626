"""Checkpoints: exact, complete or absent, verified, with a fallback."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from sdpo_jax.errors import UserError
from sdpo_jax.run.checkpoint import Checkpoints
from sdpo_jax.run.manifest import MANIFEST

ROOT = Path(__file__).resolve().parents[1]


def make_state(seed=0) -> Any:
    key = jax.random.key(seed)
    params: dict[str, Any] = {
        "w": jax.random.normal(key, (64, 32), jnp.bfloat16),
        "layers": [jax.random.normal(key, (3, 5)), jnp.arange(7, dtype=jnp.int32) + seed],
        "scalar": jnp.asarray(seed, jnp.uint32),
    }
    floats = {"w": params["w"].astype(jnp.float32), "b": params["layers"][0]}
    return {"params": params, "optimizer": optax.adamw(1e-3).init(floats)}


def assert_same_bits(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert a.dtype == b.dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def save_steps(directory, steps, keep=5):
    with Checkpoints(directory, keep=keep) as checkpoints:
        for step in steps:
            checkpoints.save(step, make_state(step), {"seed": 7, "data": {"position": step}})


def restore(directory, template=None, warnings=None):
    warn = None if warnings is None else warnings.append
    with Checkpoints(directory, warn=warn) as checkpoints:
        return checkpoints.restore(make_state() if template is None else template)


def data_file(directory, step):
    """The largest file of the state: array data."""
    files = [p for p in (directory / str(step) / "state").rglob("*") if p.is_file()]
    return max(files, key=lambda p: p.stat().st_size)


def test_round_trip_is_bit_exact_and_carries_extra(tmp_path):
    save_steps(tmp_path, [3])
    restored = restore(tmp_path)
    assert restored is not None
    assert restored.step == 3
    assert restored.extra == {"seed": 7, "data": {"position": 3}}
    assert_same_bits(restored.state, make_state(3))


def test_nothing_saved_restores_nothing_and_makes_nothing(tmp_path):
    assert restore(tmp_path / "none") is None
    assert not (tmp_path / "none").exists()


def test_a_state_may_be_donated_as_soon_as_save_returns(tmp_path):
    step = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    state = {"w": jnp.zeros((1024, 256))}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(0, state, {})
        for _ in range(20):
            state = step(state)
        jax.block_until_ready(state)
        restored = checkpoints.restore(state)
    assert restored is not None
    assert not np.asarray(restored.state["w"]).any()


def test_keep_drops_the_oldest_complete_steps(tmp_path):
    save_steps(tmp_path, [1, 2, 3, 4], keep=2)
    assert Checkpoints(tmp_path).steps() == [3, 4]
    assert {p.name for p in tmp_path.iterdir()} == {"3", "4"}


def test_one_more_step_is_kept_as_long_as_it_is_named(tmp_path):
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        for step, also in ((1, 1), (2, 1), (3, 1), (4, 4), (5, None)):
            checkpoints.save(step, make_state(step), {}, also=also)
            checkpoints.finish()
            assert checkpoints.steps() == sorted({step, also or step})


def test_a_step_that_is_asked_for_is_restored_or_refused(tmp_path):
    save_steps(tmp_path, [1, 2, 3])
    warnings: list[str] = []
    with Checkpoints(tmp_path, warn=warnings.append) as checkpoints:
        restored = checkpoints.restore(make_state(), step=2)
        assert restored is not None and restored.step == 2
        assert_same_bits(restored.state, make_state(2))
        part = checkpoints.restore(make_state()["params"], step=1, part="params")
        assert part is not None
        assert_same_bits(part.state, make_state(1)["params"])
        path = data_file(tmp_path, 2)
        path.write_bytes(path.read_bytes()[:-1])
        with pytest.raises(UserError, match=r"step 2 is damaged or not there\. .*\[1, 3\]"):
            checkpoints.restore(make_state(), step=2)
        with pytest.raises(UserError, match="step 7 is damaged or not there"):
            checkpoints.restore(make_state()["params"], step=7, part="params")
    # Nothing was put aside: the run itself may not need this step.
    assert Checkpoints(tmp_path).steps() == [1, 2, 3]
    assert path.name in warnings[0]


def test_saving_a_complete_step_again_leaves_it(tmp_path):
    save_steps(tmp_path, [2])
    before = (tmp_path / "2" / MANIFEST).read_bytes()
    save_steps(tmp_path, [2])
    assert (tmp_path / "2" / MANIFEST).read_bytes() == before


@pytest.mark.parametrize("seed", range(3))
def test_one_flipped_bit_names_the_file_and_falls_back(tmp_path, seed):
    save_steps(tmp_path, [1, 2])
    draw = random.Random(seed)
    files = sorted(p for p in (tmp_path / "2").rglob("*") if p.is_file() and p.stat().st_size)
    file = data_file(tmp_path, 2) if seed == 0 else draw.choice(files)
    content = bytearray(file.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    file.write_bytes(content)
    warnings = []
    restored = restore(tmp_path, warnings=warnings)
    assert restored is not None and restored.step == 1
    assert_same_bits(restored.state, make_state(1))
    assert len(warnings) == 1
    assert str(file.relative_to(tmp_path / "2")) in warnings[0]
    assert {p.name for p in tmp_path.iterdir()} == {"1", "2.corrupt"}


@pytest.mark.parametrize("damage", ["truncate", "delete", "manifest"])
def test_other_damage_falls_back_too_and_the_step_can_be_saved_again(tmp_path, damage):
    save_steps(tmp_path, [1, 2])
    file = data_file(tmp_path, 2)
    if damage == "truncate":
        os.truncate(file, file.stat().st_size // 2)
    elif damage == "delete":
        file.unlink()
    else:
        os.truncate(tmp_path / "2" / MANIFEST, 100)
    warnings = []
    with Checkpoints(tmp_path, warn=warnings.append) as checkpoints:
        restored = checkpoints.restore(make_state())
        assert restored is not None and restored.step == 1
        checkpoints.save(2, make_state(2), {})
        restored = checkpoints.restore(make_state())
        assert restored is not None and restored.step == 2
    name = MANIFEST if damage == "manifest" else file.name
    assert len(warnings) == 1 and name in warnings[0]


def test_no_intact_step_left_is_a_user_error_until_someone_acts(tmp_path):
    save_steps(tmp_path, [1])
    data_file(tmp_path, 1).unlink()
    for _ in range(2):
        with pytest.raises(UserError, match="no intact checkpoint"):
            restore(tmp_path, warnings=[])


def test_stray_directories_do_not_matter(tmp_path):
    save_steps(tmp_path, [1])
    (tmp_path / "99").mkdir()
    (tmp_path / "2").mkdir()
    (tmp_path / "7.orbax-checkpoint-tmp").mkdir()
    (tmp_path / "notes").mkdir()
    warnings = []
    with Checkpoints(tmp_path, warn=warnings.append) as checkpoints:
        assert checkpoints.steps() == [1]
        restored = checkpoints.restore(make_state())
        assert restored is not None and restored.step == 1
        assert len(warnings) == 2 and "99" in warnings[0]
        checkpoints.save(2, make_state(2), {})
        checkpoints.finish()
        assert checkpoints.steps() == [1, 2]
    assert {p.name for p in tmp_path.iterdir()} == {"1", "2", "2.incomplete", "99", "notes"}


def test_one_part_is_restored_alone(tmp_path):
    save_steps(tmp_path, [1, 2])
    template = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
        make_state()["params"],
    )
    with Checkpoints(tmp_path) as checkpoints:
        restored = checkpoints.restore(template, part="params")
        assert restored is not None and restored.step == 2 and restored.extra["seed"] == 7
        assert_same_bits(restored.state, make_state(2)["params"])
        with pytest.raises(UserError, match=r"params\.w: saved as bfloat16\[64, 32\]"):
            other = make_state()["params"] | {"w": jnp.zeros((64, 31))}
            checkpoints.restore(other, part="params")
    with Checkpoints(tmp_path / "empty") as checkpoints:
        assert checkpoints.restore(make_state()["params"], part="params") is None


def test_other_arrays_are_refused_by_name(tmp_path):
    save_steps(tmp_path, [1])
    template = make_state()
    template["params"]["w"] = template["params"]["w"].astype(jnp.float32)
    template["params"]["layers"][0] = jnp.zeros((3, 6))
    template["params"]["new"] = template["params"].pop("scalar")
    with pytest.raises(UserError) as caught:
        restore(tmp_path, template)
    message = str(caught.value)
    assert "params.w: saved as bfloat16[64, 32], this run has float32[64, 32]" in message
    assert "params.layers.0: saved as float32[3, 5], this run has float32[3, 6]" in message
    assert "params.new: not in the checkpoint" in message
    assert "params.scalar: saved, but not part of this run" in message


@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")
def test_a_sharded_state_returns_to_the_templates_sharding(tmp_path):
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
    saved = NamedSharding(mesh, PartitionSpec("fsdp", "tensor"))
    other = NamedSharding(mesh, PartitionSpec("tensor", None))
    values = jnp.arange(64, dtype=jnp.float32).reshape(8, 8)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"w": jax.device_put(values, saved)}, {})
    for sharding in (saved, other):
        abstract = jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=sharding)
        restored = restore(tmp_path, {"w": abstract})
        assert restored is not None
        assert restored.state["w"].sharding == sharding
        np.testing.assert_array_equal(restored.state["w"], values)


def test_bad_arguments_are_user_errors(tmp_path):
    with pytest.raises(UserError, match="mounted file system"):
        Checkpoints("gs://bucket/run")
    with pytest.raises(UserError, match="at least 1"):
        Checkpoints(tmp_path, keep=0)


# Faults from outside, in a process of their own.

SAVER = """
import sys
import jax, jax.numpy as jnp
from sdpo_jax.run.checkpoint import Checkpoints
state = {"w": jnp.zeros((512, 512))}
with Checkpoints(sys.argv[1], keep=2) as checkpoints:
    restored = checkpoints.restore(state)
    start, state = (0, state) if restored is None else (restored.step, restored.state)
    assert (state["w"] == float(start)).all()
    print("ready", flush=True)
    for step in range(start + 1, 100000):
        state = {"w": state["w"] + 1.0}
        checkpoints.save(step, state, {"step": step})
"""


def run_python(code, *arguments, **options):
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_kill_at_any_moment_leaves_a_restorable_directory(tmp_path, seed):
    wait = random.Random(seed)
    last = 0
    for _ in range(2):
        process = run_python(SAVER, tmp_path)
        assert process.stdout is not None and process.stderr is not None
        ready = process.stdout.readline()
        assert ready == "ready\n", process.stderr.read()
        deadline = time.monotonic() + 120
        while Checkpoints(tmp_path).steps()[-1:] <= [last] and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(wait.random() * 0.3)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        with Checkpoints(tmp_path, warn=lambda line: None) as checkpoints:
            restored = checkpoints.restore({"w": jnp.zeros((512, 512))})
        assert restored is not None and restored.step > last
        assert (np.asarray(restored.state["w"]) == restored.step).all()
        assert restored.extra == {"step": restored.step}
        assert not list(tmp_path.glob("*.corrupt*"))
        last = restored.step


FULL_DISK = """
import resource, signal, sys
import jax
from sdpo_jax.errors import UserError
from sdpo_jax.run.checkpoint import Checkpoints
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
state = {"w": jax.random.normal(jax.random.key(0), (256, 256))}
limits = resource.getrlimit(resource.RLIMIT_FSIZE)
with Checkpoints(sys.argv[1]) as checkpoints:
    checkpoints.save(1, state, {})
    checkpoints.finish()
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, limits[1]))
    checkpoints.save(2, state, {})
    try:
        checkpoints.save(3, state, {})
    except UserError as error:
        print(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    checkpoints.save(4, state, {})
    checkpoints.finish()
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, limits[1]))
    checkpoints.save(5, state, {})
    try:
        checkpoints.close()
    except UserError as error:
        print(error)
"""


def test_an_error_of_the_background_save_surfaces_and_earlier_steps_stay(tmp_path):
    process = run_python(FULL_DISK, tmp_path)
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert "step 2 was not saved" in out and "Earlier complete steps: [1]" in out
    assert "step 5 was not saved" in out and "Earlier complete steps: [1, 4]" in out
    restored = restore(tmp_path, {"w": jnp.zeros((256, 256))})
    assert restored is not None and restored.step == 4
    assert sorted(p.name for p in tmp_path.glob("[0-9]")) == ["1", "4"]
