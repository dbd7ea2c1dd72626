"""A step of training: what moves the parameters, and what must leave everything as it is.

Steps of a `Trainer` on a tiny model, whose environment is a function that a test chooses. How runs
stop, resume and report is in `test_loop.py`.
"""

import io
from dataclasses import replace
from functools import cache
from typing import Any, Literal

import jax
import numpy as np
import pytest
import quick
import tiny

from sdpo_jax.config import OptimizerConfig, RolloutConfig, TeacherConfig, TrainConfig
from sdpo_jax.environments.base import Outcome, Prompt
from sdpo_jax.objectives import GrpoConfig, SdpoConfig, make_objective
from sdpo_jax.run.console import Console
from sdpo_jax.run.recipes import default_config
from sdpo_jax.training.trainer import Trainer

TOKENIZER = tiny.ByteTokenizer()
ARCHITECTURE = replace(tiny.ARCHITECTURE, vocabulary=TOKENIZER.vocabulary)
MODEL = tiny.make_model(ARCHITECTURE)
PROMPTS, GROUP = 2, 4
OBJECTIVES = {"sdpo": SdpoConfig(), "grpo": GrpoConfig()}


class Judge:
    """Two questions; `verdict(prompt id, number of the answer) -> (reward, feedback)`."""

    train = tuple(
        Prompt(name, ({"role": "user", "content": f"{name}?"},), {}) for name in ("p", "q")
    )
    held_out = ()

    def __init__(self, verdict):
        self.verdict, self.graded = verdict, 0

    def grade(self, prompt, response):
        del response
        reward, feedback = self.verdict(prompt.id, self.graded % GROUP)
        self.graded += 1
        return Outcome(reward, reward == 1.0, feedback, {})


def mixed(name, number):
    """One success in each group of answers, told apart from the others in words."""
    del name
    return (1.0, "") if number == 0 else (0.0, f"answer {number} is wrong")


def silent(reward):
    return lambda name, number: (reward, "")


def only_first_question(name, number):
    return mixed(name, number) if name == "p" else (0.0, "")


@pytest.fixture(scope="module", autouse=True)
def quick_programs():
    """One device and cheap compilation."""
    with quick.programs():
        yield


@cache
def trainer_of(
    name,
    weights: Literal["ema", "frozen", "live", "trust_region"] = "ema",
    mini_batches=1,
    trust_region=0.01,
):
    """A trainer with its environment."""
    config = default_config(
        objective=OBJECTIVES[name],
        rollout=RolloutConfig(
            prompts_per_step=PROMPTS,
            rollouts_per_prompt=GROUP,
            max_prompt_tokens=32,
            max_response_tokens=6,
        ),
        teacher=TeacherConfig(
            weights=weights,
            trust_region=trust_region,
            max_prompt_tokens=160,
            max_feedback_tokens=32,
        ),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=1),
        train=TrainConfig(mini_batches=mini_batches, micro_batch_tokens=1024, head_chunk_tokens=48),
    )
    judge = Judge(mixed)
    objective = make_objective(config.objective)
    return Trainer(config, MODEL, TOKENIZER, judge, objective=objective), judge


def start(trainer):
    return trainer.initial_state(tiny.make_params(ARCHITECTURE, scale=0.5))


def step(name, state, number, verdict, **settings):
    trainer, judge = trainer_of(name, **settings)
    judge.verdict = verdict
    return trainer.step(state, number)


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def differ(a, b):
    return any(np.any(x != y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


@pytest.mark.parametrize(
    ("name", "verdict", "signal"),
    [
        ("sdpo", silent(0.0), "teacher_signal"),
        ("grpo", silent(0.0), "advantage_signal"),
        ("grpo", silent(0.7), "advantage_signal"),
        ("grpo", silent(1.0), "advantage_signal"),
    ],
    ids=["sdpo-all-fail", "grpo-all-fail", "grpo-all-partial", "grpo-all-pass"],
)
def test_a_batch_without_any_signal_changes_no_bit_of_the_state(name, verdict, signal):
    # After an update that moved: moments and teacher are not those of the start any more.
    state, row = step(name, start(trainer_of(name)[0]), 1, mixed)
    assert row["updates"] == 1 and row[signal] > 0 and row["grad_norm"] > 0
    before = jax.device_get(state)
    state, row = step(name, state, 2, verdict)
    assert row["updates"] == 0 and row[signal] == 0
    assert_equal(jax.device_get(state), before)
    # Such a row has no loss; it is shown all the same.
    shown = io.StringIO()
    columns = trainer_of(name)[0].objective.columns
    Console(columns, steps=3, stream=shown).step({"step": 2, **row})
    assert "step 2/3" in shown.getvalue()
    state, row = step(name, state, 3, mixed)
    assert row["updates"] == 1 and differ(state.params, before.params)


def test_one_success_without_siblings_of_its_kind_teaches_all_but_itself():
    _, row = step("sdpo", start(trainer_of("sdpo")[0]), 1, mixed)
    assert row["shown/demonstration"] == row["teacher_signal"] == (GROUP - 1) / GROUP
    assert row["shown/feedback"] == 0 and row["success"] == 1 / GROUP


@pytest.mark.parametrize(
    ("verdict", "updates"), [(mixed, 2), (only_first_question, 1), (silent(0.0), 0)]
)
def test_an_empty_mini_batch_makes_no_update_and_the_teacher_follows_at_most_once(
    verdict, updates, monkeypatch
):
    trainer, _ = trainer_of("sdpo", mini_batches=2)
    update, calls = trainer._update_teacher, []
    assert update is not None

    def counted(*args):
        calls.append(1)
        return update(*args)

    monkeypatch.setattr(trainer, "_update_teacher", counted)
    state, row = step("sdpo", start(trainer), 1, verdict, mini_batches=2)
    assert row["updates"] == updates and len(calls) == min(updates, 1)
    counts = {int(x) for x in jax.tree.leaves(state.optimizer) if x.dtype == np.int32}
    assert counts == {updates}


@pytest.mark.slow
def test_the_divergence_to_a_frozen_teacher_that_was_told_falls():
    trainer, _ = trainer_of("sdpo", weights="frozen")
    state, divergences = start(trainer), []

    def told(name, number):
        del number
        return 0.0, f"the answer to {name} is {name * 12}"

    for number in range(1, 31):
        state, row = step("sdpo", state, number, told, weights="frozen")
        assert row["teacher_signal"] == 1.0
        divergences.append(row["divergence"])
    # Each step samples anew: means over ten steps.
    thirds = np.mean(np.reshape(divergences, (3, 10)), axis=1)
    assert thirds[2] < thirds[1] < thirds[0] and thirds[2] < 0.7 * thirds[0]


@pytest.mark.slow
@pytest.mark.parametrize(("share", "same"), [(0.0, "frozen"), (1.0, "live")])
def test_a_trust_region_runs_from_the_initial_model_to_the_student(share, same):
    between = {"weights": "trust_region", "trust_region": share}
    ends = {"weights": same, "trust_region": 0.5}  # unused: a trainer of its own, at its first step
    rows, states = [], []
    for settings in (between, ends):
        state = start(trainer_of("sdpo", **settings)[0])
        for number in (1, 2):  # after the first, student and initial model differ
            state, row = step("sdpo", state, number, mixed, **settings)
        rows.append(row)
        states.append(jax.device_get(state.params))
    assert rows[0]["divergence"] == pytest.approx(rows[1]["divergence"], rel=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), *states)


class Ragged(Judge):
    """Questions of 1 to 240 bytes; every second answer of a group passes."""

    train = tuple(
        Prompt(f"{n}", ({"role": "user", "content": "q" * n},), {})
        for n in (1, 5, 30, 61, 90, 120, 170, 240)
    )

    def __init__(self):
        super().__init__(lambda name, number: (float(number % 2), f"wrong: {name}"))


@pytest.mark.slow
def test_varied_lengths_compile_at_most_one_program_for_each_phase_and_bucket():
    config = default_config(
        rollout=RolloutConfig(
            prompts_per_step=PROMPTS,
            rollouts_per_prompt=GROUP,
            max_prompt_tokens=256,
            max_response_tokens=150,
        ),
        train=TrainConfig(micro_batch_tokens=1024, steps=8),
    )
    objective = make_objective(config.objective)
    trainer = Trainer(config, MODEL, TOKENIZER, Ragged(), objective=objective)
    state, lengths, tokens = start(trainer), set(), set()
    for number in range(1, 9):
        state, row = trainer.step(state, number)
        lengths.add(row["response_tokens"])
        tokens.add(row["tokens"])
    assert len(lengths) == len(tokens) == 8  # no two steps are alike
    sampler: Any = trainer.sampler
    update: Any = trainer._programs
    teacher: Any = trainer.engine.forward
    widths = 4  # of prompts: 64, 128, 192, 256
    sizes = 2  # of a student's micro-batch: 512 and 1,024 tokens
    limits: dict[Any, int] = {
        sampler._begin: widths,
        sampler._advance: widths * 2 * 3,  # caches of 75 and 150; all, a quarter of the slots
        sampler._resize: 2 * 3,
        teacher: 8,  # with re-prompts, up to 8 times 512 tokens
        update.start: 1,
        update.accumulate: sizes * 2,  # twice: the table of blocks may be longer
        update.finish: 1,
        trainer._update_teacher: 1,
    }
    compiled = {program: program.compiled._cache_size() for program in limits}
    assert all(0 < compiled[program] <= most for program, most in limits.items())
    # Where one micro-batch is all of an update; there may be none.
    assert update.gradient.compiled._cache_size() <= sizes * 2
