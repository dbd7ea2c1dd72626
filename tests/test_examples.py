"""The examples run and print what they promise; the one in plain JAX takes the engine's step."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from command import need

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "docs" / "examples"
PROMPTS = 4
LOSS_LOOPS = ("loss_in_optax_loop.py", "loss_in_flax_nnx_loop.py")
LINE_LIMITS = {"sdpo_minimal.py": 200, **dict.fromkeys(LOSS_LOOPS, 60)}


def run(name, *words, folder=None):
    """What an example prints, on one device and with the rules of an ordinary program."""
    paths = [str(ROOT), str(ROOT / "models"), os.environ.get("PYTHONPATH", "")]
    environment = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *words],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        cwd=folder,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def printed(output, label):
    """The numbers after a label, in order."""
    return [float(x) for x in re.findall(rf"\b{label} +([0-9.]+)", output)]


@pytest.mark.parametrize(("name", "limit"), LINE_LIMITS.items())
def test_an_example_is_short(name, limit):
    assert len((EXAMPLES / name).read_text().splitlines()) <= limit


@pytest.mark.slow
@pytest.mark.parametrize("name", LOSS_LOOPS)
def test_the_loss_falls_in_a_loop_of_ones_own(name):
    need("optax", "flax")
    output = run(name)
    loss, correct = printed(output, "loss"), printed(output, "correct")
    assert loss[-1] < 0.5 * loss[0] and correct[-1] > correct[0] + 50


@pytest.mark.slow
def test_an_objective_of_ones_own_learns():
    output = run("own_objective.py", "12")
    reward, loss = printed(output, "reward"), printed(output, "loss")
    assert np.mean(reward[-3:]) > np.mean(reward[:3]) + 0.1
    assert np.mean(loss[-3:]) < np.mean(loss[:3])


@pytest.mark.slow
def test_training_from_python_learns_an_environment_of_ones_own():
    output = run("train_from_python.py", "10")
    reward, (accuracy,) = printed(output, "reward"), printed(output, "accuracy")
    assert len(reward) == 10 and "saved" in output
    assert np.mean(reward[-3:]) > np.mean(reward[:3]) + 0.2
    assert accuracy > reward[0] + 0.2


@pytest.mark.slow
def test_the_algorithm_in_plain_jax_learns():
    output = run("sdpo_minimal.py", "12")
    loss, correct = printed(output, "loss"), printed(output, "correct")
    assert len(loss) == 12
    assert np.mean(correct[-3:]) > np.mean(correct[:3]) + 15
    assert np.mean(loss[-3:]) < 0.7 * np.mean(loss[:3])


def module_of(name):
    """An example, imported."""
    specification = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def engine_step(minimal, params, monkeypatch):
    """State and metrics after a step of `configs/nano.toml` on 4 prompts; its graded rollouts."""
    from sdpo_jax.objectives import make_objective
    from sdpo_jax.run.recipes import load_recipe
    from sdpo_jax.training import trainer as trainer_module

    monkeypatch.setattr(trainer_module, "make_mesh", lambda config: tiny.make_devices().mesh)
    environment = minimal.ToolCalls(train_prompts=2048, held_out_prompts=1)
    config = load_recipe(
        ROOT / "configs" / "nano.toml", ["--rollout.prompts-per-step", str(PROMPTS)]
    )
    objective = make_objective(config.objective)
    trainer = trainer_module.Trainer(
        config, minimal.model, minimal.tokenizer, environment, objective=objective
    )
    sampled = {}
    # A copy: the step uses its state up.
    state = trainer.initial_state(jax.tree.map(jnp.array, params))
    state, row = trainer.step(state, 1, sampled.__setitem__)
    return state, row, sampled[1]


@pytest.mark.slow
def test_the_first_update_in_plain_jax_is_the_engines(monkeypatch):
    """The same sampled tokens and outcomes: loss, student and teacher differ by rounding alone."""
    need("flax", "grain", "optax", "orbax", "transformers")
    import optax as optax  # before `jax.jit` is another: its own functions run inside ours

    monkeypatch.setattr(jax, "jit", tiny.quick_jit)
    minimal = module_of("sdpo_minimal")
    params = minimal.load_params(minimal.FOLDER, minimal.load_architecture(minimal.FOLDER))
    params = jax.tree.map(jnp.asarray, params)
    engine, row, rollouts = engine_step(minimal, params, monkeypatch)
    batch = minimal.make_batch(rollouts.prompts, rollouts.response_ids, rollouts.outcomes)
    with jax.numpy_dtype_promotion("standard"):  # optax raises a float to an int32 count
        before = minimal.State(params, params, minimal.optimizer.init(params))
        after, loss = minimal.update(before, batch)
    assert batch.mask.sum() == row["tokens"] > 300
    np.testing.assert_allclose(loss, row["loss"], rtol=1e-5)
    # The largest weight moves by 6e-5, a fifth of the learning rate: 1e-5 alone would prove little.
    for name in ("params", "teacher"):
        jax.tree.map(
            lambda ours, theirs: np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-6),
            getattr(after, name),
            getattr(engine, name),
        )
    moved = jax.tree.map(lambda new, old: jnp.max(jnp.abs(new - old)), after.params, params)
    assert max(jax.tree.leaves(moved)) > 5e-5


@pytest.mark.slow
def test_an_objective_of_ones_own_trains_and_resumes_exactly(tmp_path):
    """Two steps in one go are a step, a stop and a step in another run of the same folder."""
    need("flax", "grain", "optax", "orbax", "transformers")
    import quick

    from sdpo_jax import api
    from sdpo_jax.training import trainer

    own = module_of("own_objective")
    settings = {"train.steps": 2, "rollout.prompts_per_step": PROMPTS}
    with quick.programs(api, trainer):
        whole = own.make_run(tmp_path / "whole", **settings)
        one, two = whole.steps()
        own.make_run(tmp_path / "parts", **settings).train(stop=lambda: True)
        resumed = own.make_run(tmp_path / "parts", **settings)
        (again,) = resumed.steps()
    assert one.metrics["loss"] != two.metrics["loss"] == again.metrics["loss"] > 0
    assert 0 < two.metrics["teacher_signal"] == again.metrics["teacher_signal"]
    jax.tree.map(np.testing.assert_array_equal, whole.params, resumed.params)


def test_every_example_is_executed_here():
    executed = re.findall(r'run\("(\w+\.py)"', Path(__file__).read_text())
    assert sorted(x.name for x in EXAMPLES.glob("*.py")) == sorted({*executed, *LOSS_LOOPS})
