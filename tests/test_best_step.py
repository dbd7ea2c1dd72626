"""The step with the highest held-out accuracy: saved, kept, and named by `RUN@best`."""

import pytest
import test_loop
from test_loop import STEPS, Crash, make_config, run, saved_steps

from sdpo_jax.run import loop
from sdpo_jax.run.run_ref import Best, find_run

quick_programs = test_loop.quick_programs
ACCURACIES = (0.1, 0.5, 0.9, 0.3, 0.4)


@pytest.fixture
def rising_and_falling(monkeypatch):
    """Evaluations of a run that learns and then forgets."""
    evaluate = lambda trainer, evaluator, state, step: {"accuracy": ACCURACIES[step]}  # noqa: E731
    monkeypatch.setattr(loop, "evaluate", evaluate)


def test_the_best_step_is_saved_kept_and_named(rising_and_falling, tmp_path):
    config = make_config(tmp_path / "run", checkpoint={"every_steps": 99, "keep": 1})
    summary, text = run(config)
    assert saved_steps(config) == [2, 3]
    assert summary.best == Best(2, 0.9)
    assert f"sdpo eval {config.run_dir}@best   # 90.0 % after step 2" in text
    assert find_run(f"{config.run_dir}@best").step == 2


def test_a_resumed_run_knows_its_best_step(rising_and_falling, tmp_path):
    config = make_config(tmp_path / "run", checkpoint={"every_steps": 99, "keep": 1})
    with pytest.raises(Crash):
        run(config, crash_after=3)
    assert saved_steps(config) == [2]
    summary, text = run(config)
    assert "resumed   from step 2" in text and f"step 1/{STEPS}" not in text
    assert saved_steps(config) == [2, 3] and summary.best == Best(2, 0.9)


def test_the_best_step_goes_where_it_is_not_wanted(rising_and_falling, tmp_path):
    settings = {"every_steps": 1, "keep": 1, "keep_best": False}
    config = make_config(tmp_path / "run", checkpoint=settings)
    summary, text = run(config)
    assert saved_steps(config) == [3] and summary.best is None and "@best" not in text


def test_what_is_worse_than_the_start_is_not_the_best(monkeypatch, tmp_path):
    evaluate = lambda trainer, evaluator, state, step: {"accuracy": 0.5 - step / 9}  # noqa: E731
    monkeypatch.setattr(loop, "evaluate", evaluate)
    config = make_config(tmp_path / "run", checkpoint={"every_steps": 99, "keep": 1})
    summary, text = run(config)
    assert saved_steps(config) == [3] and summary.best is None and "@best" not in text


@pytest.mark.slow
def test_a_run_that_is_given_more_steps_keeps_its_best_one(rising_and_falling, tmp_path):
    settings = {"every_steps": 1, "keep": 1}
    run(make_config(tmp_path / "run", checkpoint=settings, train={"steps": 2}))
    more = make_config(tmp_path / "run", checkpoint=settings, train={"steps": 4})
    run(more)
    assert saved_steps(more) == [2, 4]
