"""`rollout.one_step_off_policy`: the next batch is sampled before an update, graded during it."""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import test_loop
from test_loop import BASE, TOKENIZER, Toy, components_of, rows_of, start_params

from sdpo_jax.errors import UserError
from sdpo_jax.objectives import GrpoConfig, SdpoConfig
from sdpo_jax.rollouts.phase_timer import PhaseTimer
from sdpo_jax.rollouts.rollout_batch import make_rollout_setup, restore_rollouts, start_rollouts
from sdpo_jax.run.components import make_trainer
from sdpo_jax.run.console import Console
from sdpo_jax.run.loop import Run
from sdpo_jax.run.recipes import load_recipe

OBJECTIVES = {"sdpo": SdpoConfig(), "grpo": GrpoConfig()}


quick_programs = test_loop.quick_programs


def config_of(folder, name="sdpo", rate=3e-3, ahead=True):
    return replace(
        BASE,
        run_dir=str(folder),
        objective=OBJECTIVES[name],
        rollout=replace(BASE.rollout, one_step_off_policy=ahead),
        optimizer=replace(BASE.optimizer, learning_rate=rate),
    )


class Watched(Toy):
    """Knows which threads asked it, and whether two did at a time."""

    def __init__(self, fails_in=None):
        self.threads, self.fails_in = set(), fails_in
        self._asked = threading.Lock()

    def grade(self, prompt, response):
        assert self._asked.acquire(blocking=False), "asked by two threads at a time"
        try:
            name = threading.current_thread().name.split("-")[0]
            self.threads.add(name)
            if name == self.fails_in:
                raise ValueError("out of order")
            return super().grade(prompt, response)
        finally:
            self._asked.release()


def train(config, environment=None, console=None):
    environment = Watched() if environment is None else environment
    return Run(config, components_of(start_params(), environment), console=console).train()


def batches(config):
    """What each step says of the responses that it learns from."""
    names = ("reward", "success", "response_tokens", "log_prob", "generations")
    return [{name: row[name] for name in names} for row in rows_of(config, "train")]


@pytest.mark.slow
def test_without_updates_the_batches_are_those_of_a_run_that_draws_in_time(tmp_path):
    """At a rate of 0 old weights are the new ones: any other batch would be a wrong one."""
    early, late = (config_of(tmp_path / str(a), rate=0.0, ahead=a) for a in (True, False))
    train(early)
    train(late)
    assert batches(early) == batches(late)
    assert len({row["log_prob"] for row in batches(late)}) == late.train.steps


@pytest.mark.parametrize("name", OBJECTIVES)
def test_all_batches_but_the_first_are_one_update_old(name, tmp_path):
    """The ratio of new to old probability is 1 where a batch was drawn with the same weights."""
    config = config_of(tmp_path, name)
    train(config)
    first, *others = [row["ratio"] for row in rows_of(config, "train")]
    np.testing.assert_allclose(first, 1.0, rtol=1e-6)
    assert all(abs(ratio - 1.0) > 1e-5 for ratio in others)


@pytest.mark.slow
def test_stopped_after_any_step_a_run_repeats_the_whole_one(tmp_path):
    whole, broken = config_of(tmp_path / "whole"), config_of(tmp_path / "broken")
    expected = train(whole)
    for step in range(1, whole.train.steps):
        with pytest.raises(KeyboardInterrupt):
            train(broken, console=_Stops(broken, step + 1))
    summary = train(broken)
    assert rows_of(broken) == rows_of(whole)
    assert summary.after == expected.after


class _Stops(Console):
    """Ends the run once the row of a step is written; its checkpoint is not."""

    def __init__(self, config, step):
        super().__init__(config.objective.name, steps=config.train.steps, live=False)
        self._last = step

    def step(self, row):
        super().step(row)
        if row["step"] == self._last:
            raise KeyboardInterrupt


def test_a_thread_grades_the_batches_to_come_and_never_beside_the_evaluation(tmp_path):
    environment = Watched()
    train(config_of(tmp_path), environment)  # the environment asserts that it is asked by one
    assert environment.threads == {"MainThread", "ThreadPoolExecutor"}


def test_a_failure_in_the_thread_stops_the_run_with_the_environments_own_words(tmp_path):
    with pytest.raises(UserError, match="out of order"):
        train(config_of(tmp_path), Watched(fails_in="ThreadPoolExecutor"))


def test_a_recipe_refuses_to_draw_ahead_of_what_a_later_turn_waits_for():
    words = ["--rollout.one-step-off-policy", "--rollout.max-turns", "2"]
    with pytest.raises(UserError, match=r"max-turns: 2, expected 1 with rollout.one_step_off_pol"):
        load_recipe("configs/nano.toml", words)


@pytest.mark.slow
def test_rollouts_that_were_saved_are_restored_to_the_bit():
    config = config_of("unused")
    trainer = make_trainer(config, components_of(start_params()))
    prompts, timer = list(Toy.train[:2]), PhaseTimer()
    setup = make_rollout_setup(config, TOKENIZER, Toy(), trainer.sampler)
    executor = ThreadPoolExecutor(1)
    pending = start_rollouts(setup, start_params(), prompts, executor, step=3, timer=timer)
    restored = restore_rollouts(setup, prompts, pending.to_state(), timer)
    (old, metrics), (new, same) = pending.finish(timer), restored.finish(timer)
    assert metrics == same
    assert old.response_ids == new.response_ids
    assert (old.texts, old.outcomes) == (new.texts, new.outcomes)
    for a, b in zip(old.log_probs, new.log_probs, strict=True):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(UserError, match="rollouts of other prompts"):
        restore_rollouts(setup, prompts[:1], pending.to_state(), timer)


def test_a_position_without_saved_rollouts_drops_those_of_another_position():
    trainer = make_trainer(config_of("unused"), components_of(start_params()))
    source = trainer.source
    start = source.get_state()
    source(start_params(), 1, PhaseTimer())
    assert "ahead" in source.get_state()
    source.set_state(start)
    assert source.get_state() == start
