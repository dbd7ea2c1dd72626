"""`sdpo discover`: what counts as a generation, restarts, programs that serve all questions.

A tiny model on a toy question; one run of the command itself with the embedded model.
"""

import json
import os
import subprocess
import sys
import zlib
from dataclasses import replace
from functools import cache

import jax
import pytest
import quick
import tiny
from command import ROOT

from sdpo_jax.cli import COMMANDS
from sdpo_jax.commands.command import parse
from sdpo_jax.commands.discover import read_options
from sdpo_jax.compilation import CompileCounter
from sdpo_jax.config import (
    EvaluationConfig,
    OptimizerConfig,
    RolloutConfig,
    TeacherConfig,
    TrainConfig,
)
from sdpo_jax.discovery import baselines
from sdpo_jax.discovery import runner as discover_command
from sdpo_jax.discovery.options import Options, find_questions, make_options
from sdpo_jax.discovery.runner import discover, read_cells
from sdpo_jax.discovery.test_time import QuestionTrainer, Tally, cell_seed
from sdpo_jax.environments.base import Outcome, Prompt, not_graded
from sdpo_jax.environments.grading import Grader
from sdpo_jax.errors import UserError
from sdpo_jax.objectives import GrpoConfig, SdpoConfig, SftConfig
from sdpo_jax.run.components import RunComponents
from sdpo_jax.run.recipes import default_config
from sdpo_jax.training import trainer as trainer_module

TOKENIZER = tiny.ByteTokenizer()
ARCHITECTURE = replace(tiny.ARCHITECTURE, vocabulary=TOKENIZER.vocabulary)
MODEL = tiny.make_model(ARCHITECTURE)
RECIPE = str(ROOT / "configs" / "nano_discover.toml")
OBJECTIVES = {"sdpo": SdpoConfig(), "grpo": GrpoConfig()}
GROUP = 4


class Toy:
    """An answer passes by its checksum, one in `odds`; the others hear what was wrong."""

    train = tuple(Prompt(f"t{i}", ({"role": "user", "content": f"a{i}"},), {}) for i in range(4))
    held_out = (Prompt("h0", ({"role": "user", "content": "b0"},), {}),)

    def __init__(self, odds=2):
        self.odds = odds

    def grade(self, prompt, response):
        del prompt
        passed = zlib.crc32(response.encode()) % self.odds == 0
        return Outcome(float(passed), passed, "" if passed else "not that one", {})


NEVER = 10**9


@pytest.fixture(scope="module", autouse=True)
def quick_programs():
    """One device, cheap compilation, one sampler."""
    with quick.programs(trainer_module, discover_command, sampler_of=(MODEL, TOKENIZER.stop_ids)):
        yield


@cache
def start_params():
    return jax.device_get(tiny.make_params(ARCHITECTURE, scale=0.5))


def make_config(run_dir="", **sections):
    config = default_config(
        run_dir=str(run_dir),
        rollout=RolloutConfig(
            prompts_per_step=1,
            rollouts_per_prompt=GROUP,
            max_prompt_tokens=32,
            max_response_tokens=6,
        ),
        teacher=TeacherConfig(max_prompt_tokens=160, max_feedback_tokens=32),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=1),
        train=TrainConfig(steps=8, micro_batch_tokens=1024, head_chunk_tokens=48),
        evaluation=EvaluationConfig(prompts=0),
    )
    return replace(config, **sections)


@cache
def training(name):
    """One for each objective, with the environment that it asks: tests set its odds."""
    toy = Toy()
    config = make_config(objective=OBJECTIVES[name])
    return QuestionTrainer(config, MODEL, TOKENIZER, toy, start_params()), toy


def quiet(generations, budget):
    del generations, budget


PASSED, WRONG = Outcome(1.0, True, "", {}), Outcome(0.0, False, "no", {})


def test_the_first_success_counts_in_batch_order_after_all_generations_before():
    tally = Tally(10)
    tally.add([WRONG] * 4)
    assert not tally.over
    tally.add([WRONG, not_graded("down"), PASSED, PASSED])
    assert tally.over and tally.first == 7
    assert (tally.generations, tally.passed, tally.failed) == (8, [0, 2], 1)


def test_a_success_beyond_the_budget_is_none():
    tally = Tally(6)
    tally.add([WRONG] * 4)
    tally.add([WRONG, WRONG, PASSED, PASSED])
    assert tally.over and tally.first is None and tally.passed == [0, 0]
    assert tally.generations == 8  # they were sampled, and cost what they cost
    exact = Tally(6)
    exact.add([WRONG] * 5 + [PASSED])
    assert exact.first == 6


@pytest.mark.slow
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_success_in_the_first_step_is_that_of_samples_of_the_start_model(objective):
    train, toy = training(objective)
    toy.odds, found = 3, []
    settings = {"group": GROUP, "max_tokens": 6, "temperature": 1.0, "step": 1}
    for seed in range(3):
        rollouts = train._trainer.sampler(
            start_params(),
            [TOKENIZER.render(toy.train[0].messages)],
            seed=cell_seed(objective, "t0", seed),
            **settings,
        )
        texts = [TOKENIZER.decode(ids) for ids in rollouts.responses()]
        passed = [o.passed for o in Grader(toy)([toy.train[0]] * len(texts), texts)]
        cell = train(toy.train[0], seed, 64, quiet)
        if any(passed):
            assert cell.first == passed.index(True) + 1
            assert (cell.generations, cell.passed) == (GROUP, (sum(passed),))
        else:
            assert cell.first is None or cell.first > GROUP
        found.append(any(passed))
    assert any(found)


@pytest.mark.slow
@pytest.mark.parametrize(("objective", "moves"), [("sdpo", 1), ("grpo", 0)])
def test_sdpo_learns_before_any_reward_and_grpo_does_not(objective, moves, monkeypatch):
    train, toy = training(objective)
    toy.odds, rows, learn = NEVER, [], train._trainer.learn

    def record(*arguments, **settings):
        state, row = learn(*arguments, **settings)
        rows.append(row)
        return state, row

    monkeypatch.setattr(train._trainer, "learn", record)
    cell = train(toy.train[0], 1, 12, quiet)
    assert (cell.first, cell.generations, cell.passed) == (None, 12, (0, 0, 0))
    # The update of the last step would be of no use.
    assert [row["updates"] for row in rows] == [moves, moves]
    assert all(row["grad_norm"] > 0 for row in rows if row["updates"])
    if objective == "sdpo":  # without a success nothing but feedback is shown
        assert all(row["shown/feedback"] == 1.0 for row in rows)


def test_a_cell_starts_from_the_same_weights_whatever_ran_before():
    train, toy = training("sdpo")
    toy.odds = 97
    cells = [train(toy.train[i], 1, 16, quiet) for i in (0, 1, 0)]
    first, _, again = (cell._replace(seconds=0.0) for cell in cells)
    assert first == again


def test_a_second_question_and_a_second_seed_compile_nothing():
    toy = Toy(NEVER)
    train = QuestionTrainer(make_config(), MODEL, TOKENIZER, toy, start_params())
    with CompileCounter() as counter:
        train(toy.train[0], 1, 12, quiet)
        assert counter.since_mark()[:2] != (0, 0)
        train(toy.train[1], 1, 12, quiet)
        train(toy.train[0], 2, 12, quiet)
        assert counter.since_mark()[:2] == (0, 0)


def test_supervised_training_is_no_method_for_a_question():
    with pytest.raises(UserError, match="--method sft: expected some of sdpo, grpo, best_of_k"):
        make_options(make_config(objective=SftConfig()), ["t0"])


METHODS = ("sdpo", "best_of_k", "multi_turn_feedback")


def run(run_dir, *, environment=None, methods=METHODS, seeds=(1,), say=lambda line: None):
    toy = environment or Toy(odds=23)
    options = Options(("t0", "h0"), seeds, 16, methods, samples=20)
    components = RunComponents(MODEL, start_params, TOKENIZER, toy)
    questions = find_questions(toy, options.questions)
    return discover(make_config(run_dir), options, questions, components, say)


class Crash(Exception):
    """Ends a run where it stands."""


@pytest.mark.slow
def test_a_restart_reads_finished_cells_and_gives_the_same_table(tmp_path, monkeypatch):
    monkeypatch.setattr(baselines, "BATCH", 8)
    whole = run(tmp_path / "whole")
    table = json.loads((tmp_path / "whole" / "discovery.json").read_text())
    assert len(whole) == len(METHODS) * 2
    broken = tmp_path / "broken"

    def crash(line):
        if line.startswith("sdpo") and "t0  seed 1" in line:
            raise Crash

    with pytest.raises(Crash):
        run(broken, say=crash)
    assert len(read_cells(broken / "cells.jsonl")) == 1
    with (broken / "cells.jsonl").open("a") as file:
        file.write('{"method": "sdpo", "question": "h0", "se')  # killed while it wrote
    begun = []
    resumed = run(broken, say=begun.append)
    assert "1 of them done" in begun[0]
    assert not any(line.startswith("sdpo  ") and "t0" in line for line in begun)

    def plain(cells):
        return [cell._replace(seconds=0.0) for cell in cells]

    assert plain(resumed) == plain(whole)
    again = run(broken, environment=Toy(NEVER))  # it would fail, were it asked again
    assert again == resumed
    for numbers in (table, json.loads((broken / "discovery.json").read_text())):
        for own in numbers["methods"].values():
            del own["seconds"]
        assert numbers == table
    assert (broken / "discovery.svg").read_text() == (tmp_path / "whole/discovery.svg").read_text()


def test_best_of_k_draws_all_its_samples_whatever_passes(tmp_path, monkeypatch):
    monkeypatch.setattr(baselines, "BATCH", 8)
    cells = run(tmp_path, methods=("best_of_k",), seeds=(1, 2), environment=Toy(odds=2))
    for cell in cells:
        assert (cell.generations, cell.budget, cell.independent) == (20, 20, True)
        assert len(cell.passed) == 3 and cell.passed[2] <= 4  # 8, 8, and 4 of the last 8
        assert 0 < sum(cell.passed) < 20
    assert len({cell.passed for cell in cells}) > 1


def test_a_folder_of_another_recipe_is_refused(tmp_path):
    run(tmp_path, methods=("best_of_k",), seeds=(1,))
    options = Options(("t0",), (1,), 16, ("best_of_k",), 16)
    other = replace(make_config(tmp_path), optimizer=OptimizerConfig(learning_rate=1.0))
    with pytest.raises(UserError, match=r"optimizer\.learning_rate"):
        discover(
            other, options, Toy().train[:1], RunComponents(MODEL, start_params, TOKENIZER, Toy())
        )


def test_a_line_that_is_no_cell_is_named(tmp_path):
    path = tmp_path / "cells.jsonl"
    path.write_text('{"method": "sdpo"}\n')
    with pytest.raises(UserError, match=r"cells\.jsonl:1: not a finished cell"):
        read_cells(path)


def test_an_unknown_question_is_refused_with_near_ones():
    with pytest.raises(UserError, match=r"--question t7: .* near ones are t") as error:
        find_questions(Toy(), ["t1", "t7"])
    assert "4 to train on, 1 held out" in str(error.value)


def parsed(words):
    """The recipe as it runs and the options of a command line."""
    return read_options(parse(COMMANDS, ["discover", *words]))


def test_a_recipe_becomes_one_with_a_single_question_in_a_step(tmp_path):
    words = [RECIPE, "--question", "a", "b", "a", "--seeds", "3", "--budget=100"]
    config, options = parsed([*words, "--rollout.prompts-per-step", "8", "--seed", "5"])
    assert config.rollout.prompts_per_step == 1 and config.seed == 5
    assert config.train.steps * config.rollout.rollouts_per_prompt >= 100
    assert options == Options(("a", "b"), (1, 2, 3), 100, ("sdpo",), 100)
    words = [RECIPE, "--method", "grpo", "best_of_k", "--question", "a", "--seeds", "7", "9"]
    _, options = parsed([*words, "--samples", "40", "--run-dir", str(tmp_path)])
    assert options == Options(("a",), (7, 9), 512, ("grpo", "best_of_k"), 40)
    assert options.budget_of("best_of_k") == 40 and options.budget_of("grpo") == 512


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "required: RECIPE, --question"),
        (["--question", "a"], "--question: expected the recipe first"),
        ([RECIPE], "required: --question"),
        ([RECIPE, "--question"], "--question: expected at least one argument"),
        ([RECIPE, "--question", "a", "--method", "sdpi"], "--method sdpi: expected some of sdpo"),
        ([RECIPE, "--question", "a", "--budget", "many"], "--budget: many: expected a positive"),
        ([RECIPE, "--question", "a", "--samples", "0"], "--samples: 0: expected a positive"),
        ([RECIPE, "--question", "a", "--seeds", "-1"], "--seeds: -1: expected how many"),
        ([RECIPE, "--question", "a", "--seeds", "0"], "--seeds 0: expected how many"),
        ([RECIPE, "--question", "a", "--seeds"], "--seeds: expected at least one argument"),
        ([RECIPE, "--question", "a", "--bugdet", "4"], "bugdet"),
    ],
)
def test_an_option_that_does_not_fit_gets_one_message(words, expected):
    with pytest.raises(UserError) as error:
        parsed(words)
    assert expected in str(error.value)


@pytest.mark.slow
def test_the_command_solves_a_question_of_the_embedded_model(tmp_path):
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "models")]),
    }
    short = """--question light-train-0 --seeds 1 --budget 48 --rollout.rollouts-per-prompt 8
        --method sdpo best_of_k --environment.families light --environment.train-prompts 8
        --teacher.max-prompt-tokens 128"""
    done = subprocess.run(
        [sys.executable, "-m", "sdpo_jax.cli", "discover", RECIPE, *short.split(),
         "--run-dir", str(tmp_path / "run")],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    cells = read_cells(tmp_path / "run" / "cells.jsonl")
    assert [cell.method for cell in cells] == ["sdpo", "best_of_k"]
    assert cells[0].first is not None  # its chance is about one in seven with each generation
    assert "discovery@k" in done.stdout and "a ratio of" in done.stdout
    assert (tmp_path / "run" / "discovery.svg").read_text().startswith("<svg")
