"""Grading has one home; what could not be graded is absent; files and recipes name environments."""

import os
import re
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny

from sdpo_jax.config import EvaluationConfig, RolloutConfig, TeacherConfig
from sdpo_jax.config.checks import problems
from sdpo_jax.config.resolved import to_toml
from sdpo_jax.environments.base import Outcome, Prompt, not_graded
from sdpo_jax.environments.grading import Grader, refuse_failures
from sdpo_jax.environments.kinds.bfcl import BfclConfig
from sdpo_jax.environments.kinds.file import FileConfig
from sdpo_jax.environments.kinds.math import MathConfig
from sdpo_jax.environments.kinds.mcq import McqConfig
from sdpo_jax.environments.kinds.tool_calls import ToolCallsConfig
from sdpo_jax.environments.kinds.tool_use import ToolUseConfig
from sdpo_jax.environments.registry import KINDS, make_environment, settings_of
from sdpo_jax.errors import UserError
from sdpo_jax.evaluation.evaluator import Graded, accuracy_metrics
from sdpo_jax.losses.policy_gradient import group_advantages
from sdpo_jax.objectives.loss_weights import graded_advantages
from sdpo_jax.rollouts.diagnostics import environment_metrics
from sdpo_jax.rollouts.phase_timer import PhaseTimer
from sdpo_jax.rollouts.rollout_batch import RolloutBatch
from sdpo_jax.rollouts.sampler import HostRollouts
from sdpo_jax.rollouts.sources import GradedRollouts
from sdpo_jax.run.recipes import default_config, load_recipe
from sdpo_jax.teacher.context import choose_context
from sdpo_jax.training.batch import BatchLayout, split_mini_batches

TOKENIZER = tiny.ByteTokenizer()
GROUP = 4
RIGHT, WRONG = Outcome(1.0, True, "", {"m": 1.0}), Outcome(0.0, False, "wrong", {"m": 0.0})
FAILED = not_graded("the box did not start")


def prompt(name, role="user"):
    return Prompt(name, ({"role": role, "content": f"{name}?"},), {})


class Quiz:
    """`y` passes; `fail` cannot be judged; `raise` is a bug."""

    train = (prompt("p"), prompt("q"))
    held_out = (prompt("h"),)

    def grade(self, prompt, response):
        if response == "raise":
            raise ZeroDivisionError(response)
        return {"y": RIGHT, "fail": FAILED}.get(response, WRONG)


class Batches(Quiz):
    """Counts its calls; says of cut responses that they were cut."""

    def __init__(self):
        self.calls = []

    def grade_many(self, prompts, responses):
        self.calls.append(len(prompts))
        return [self.grade(p, r) for p, r in zip(prompts, responses, strict=True)]

    def grade_truncated(self, prompt, response):
        return Outcome(0.0, False, f"cut: {prompt.id} {response}", {})


# One home for grading


def test_a_batch_is_graded_at_once_and_the_cut_responses_by_themselves():
    environment, prompts = Batches(), [*Quiz.train, *Quiz.held_out]
    outcomes = Grader(environment)(prompts, ["y", "a", "n"], [False, True, False])
    assert outcomes == [RIGHT, Outcome(0.0, False, "cut: q a", {}), WRONG]
    assert environment.calls == [2]
    assert Grader(environment)(prompts[:1], ["a"], [True])[0].feedback == "cut: p a"
    assert environment.calls == [2]  # nothing is left to ask for


class TruncatedBatches(Batches):
    """Takes the cut responses of a batch together."""

    def grade_truncated_many(self, prompts, responses):
        self.calls.append(list(responses))
        return [self.grade_truncated(p, r) for p, r in zip(prompts, responses, strict=True)]


def test_the_cut_responses_of_a_batch_are_graded_together_with_the_outcomes_of_one_by_one():
    environment, prompts = TruncatedBatches(), [*Quiz.train, *Quiz.held_out] * 2
    texts, cut = ["y", "a", "n", "fail", "b", "c"], [False, True, False, False, True, True]
    assert Grader(environment)(prompts, texts, cut) == Grader(Batches())(prompts, texts, cut)
    assert environment.calls == [3, ["a", "b", "c"]]
    Grader(environment)(prompts, texts)
    assert environment.calls[2:] == [6]  # nothing was cut


def test_a_batch_of_cut_responses_is_checked_as_any_other():
    class Short(TruncatedBatches):
        def grade_truncated_many(self, prompts, responses):
            return []

    class Fails(TruncatedBatches):
        def grade_truncated_many(self, prompts, responses):
            raise ZeroDivisionError("cut")

    with pytest.raises(UserError, match=r"grade_truncated_many .* 0 outcomes for 1 responses"):
        Grader(Short())([Quiz.train[0]], ["y"], [True])
    with pytest.raises(UserError, match=r"grade_truncated_many .*'p'(.|\n)*ZeroDivisionError: cut"):
        Grader(Fails())([Quiz.train[0]], ["y"], [True])


def test_an_environment_without_more_than_grade_is_asked_one_by_one():
    texts = ["y", "n", "fail"]
    assert Grader(Quiz())([*Quiz.train, *Quiz.held_out], texts, [True] * 3) == [
        RIGHT,
        WRONG,
        FAILED,
    ]
    twice = [prompt for prompt in Quiz.train for _ in range(2)]
    assert Grader(Quiz())(twice, ["y", "n", "n", "y"]) == [RIGHT, WRONG, WRONG, RIGHT]


@pytest.mark.parametrize("environment", [Quiz(), Batches()], ids=["grade", "grade_many"])
def test_an_exception_of_grade_is_one_error_with_prompt_place_and_traceback(environment):
    with pytest.raises(UserError) as caught:
        Grader(environment)([Quiz.train[1]], ["raise"])
    message = str(caught.value)
    assert "prompt 'q'" in message and "ZeroDivisionError: raise" in message
    assert re.search(rf"at \S*{Path(__file__).name}:\d+: a bug of the environment", message)
    assert "sdpo_jax/environments/grading.py" not in message


@pytest.mark.parametrize(
    ("returned", "expected"),
    [
        (None, "returned None for prompt 'p'"),
        ((1.0, True, "", {}), "returned (1.0, True, '', {})"),
        (Outcome(float("nan"), False, "", {}), "returned the reward nan"),
        (Outcome("1", True, "", {}), "returned Outcome(reward='1'"),
        (Outcome(0.0, False, None, {}), "returned the feedback None"),
        (Outcome(0.0, False, "", {"m": float("inf")}), "returned a metric 'm' that is not finite"),
        (Outcome(0.0, False, "", None), "returned Outcome("),
    ],
)
def test_what_is_no_outcome_is_refused_before_it_is_a_number_of_the_run(returned, expected):
    class Odd(Quiz):
        def grade(self, prompt, response):
            return returned

    with pytest.raises(UserError) as caught:
        Grader(Odd())([Quiz.train[0]], ["x"])
    assert expected in str(caught.value)


def test_a_batch_with_too_few_outcomes_is_refused():
    class Short(Batches):
        def grade_many(self, prompts, responses):
            return super().grade_many(prompts, responses)[1:]

    with pytest.raises(UserError, match="1 outcomes for 2 responses"):
        Grader(Short())(Quiz.train, ["y", "n"])


# What could not be graded is absent


def experience(outcomes, lengths=None):
    rng, n = np.random.default_rng(0), len(outcomes)
    lengths = rng.integers(2, 9, n).astype(np.int32) if lengths is None else lengths
    return RolloutBatch(
        prompts=[prompt(str(i)) for i in range(n // GROUP)],
        group=GROUP,
        prompt_ids=[[7, 8]] * n,
        response_ids=[[9] * int(k) for k in lengths],
        log_probs=[np.zeros(k, np.float32) for k in lengths],
        lengths=lengths,
        texts=["t"] * n,
        outcomes=outcomes,
    )


def random_rewards(n):
    return [Outcome(float(x), False, "", {}) for x in np.random.default_rng(1).normal(size=n)]


def test_with_every_outcome_graded_advantages_are_those_of_the_whole_batch_bit_for_bit():
    outcomes = random_rewards(6 * GROUP)
    rewards = np.asarray([o.reward for o in outcomes], np.float32)
    expected = np.asarray(group_advantages(rewards, GROUP))
    np.testing.assert_array_equal(graded_advantages(experience(outcomes)), expected)


def test_the_mean_of_a_group_is_over_its_graded_siblings():
    outcomes = random_rewards(3 * GROUP)
    for row in (1, 4, 6, 8, 9, 10, 11):
        outcomes[row] = FAILED._replace(reward=99.0)
    found = graded_advantages(experience(outcomes))
    for rows in ([0, 2, 3], [5, 7]):
        rewards = np.asarray([outcomes[i].reward for i in rows], np.float32)
        np.testing.assert_array_equal(found[rows], np.asarray(group_advantages(rewards, len(rows))))
    assert not found[[1, 4, 6, 8, 9, 10, 11]].any()


def split(batch, active, reduction):
    worth, layout = np.ones_like(active), BatchLayout(False, 64, 8, 1)
    return split_mini_batches(batch, 1, layout, active=active, worth=worth, reduction=reduction)


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean"])
def test_an_update_is_that_of_the_batch_without_the_rows_that_could_not_be_graded(reduction):
    failed = [2, 5, 6]
    outcomes = [FAILED if i in failed else RIGHT for i in range(2 * GROUP)]
    whole = experience(outcomes)
    kept = [i for i in range(2 * GROUP) if i not in failed]
    lengths = whole.lengths.copy()
    lengths[2] = 50  # the longest of all: it may not widen anything either
    whole = experience(outcomes, lengths)
    active = np.arange(2 * GROUP) != 3

    def parts(batch, rows):
        return split(batch, active[rows], reduction)

    alone = whole._replace(
        prompt_ids=[whole.prompt_ids[i] for i in kept],
        response_ids=[whole.response_ids[i] for i in kept],
        lengths=lengths[kept],
        texts=["t"] * len(kept),
        outcomes=[RIGHT] * len(kept),
    )
    (found,), (expected,) = parts(whole, np.arange(2 * GROUP)), parts(alone, kept)
    assert found.rows == [kept[i] for i in expected.rows]
    assert found.pairs == expected.pairs
    jax.tree.map(np.testing.assert_array_equal, found.micro_batches, expected.micro_batches)
    assert found.denominator == expected.denominator
    for one, other in zip(found.weights, expected.weights, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_batch_of_which_nothing_could_be_graded_makes_no_update():
    batch, rows = experience([FAILED] * GROUP), np.ones(GROUP, np.bool_)
    assert split(batch, rows, "sequence_mean") == []
    assert not graded_advantages(batch).any()


def test_what_could_not_be_graded_is_no_demonstration_and_is_shown_nothing():
    config = TeacherConfig(feedback_only_without_demonstration=False)
    outcomes = [FAILED._replace(reward=1.0), WRONG, FAILED, RIGHT]
    contexts = choose_context(outcomes, ["a", "b", "c", "d"], GROUP, config)
    assert contexts[0] is None and contexts[2] is None
    assert contexts[1] is not None and contexts[1].demonstration == "d"
    assert contexts[3] is None  # its graded sibling failed, and it is told nothing of itself


def test_accuracy_and_metrics_are_means_over_what_could_be_graded():
    outcomes = [RIGHT, FAILED, WRONG, FAILED]
    graded = Graded(["x"] * 4, outcomes, [1] * 4, [True] * 4)
    metrics = accuracy_metrics(graded, [prompt("p")])
    assert metrics["accuracy"] == 0.5 and metrics["environment/failed"] == 0.5
    sound = Graded(["x"] * 2, [RIGHT, WRONG], [1] * 2, [True] * 2)
    assert "environment/failed" not in accuracy_metrics(sound, [prompt("p")])
    assert environment_metrics(outcomes) == {"environment/m": 0.5}


def test_a_run_stops_above_the_share_that_it_allows_and_not_at_it():
    outcomes = [RIGHT, RIGHT, RIGHT, FAILED]
    refuse_failures([prompt("p")], outcomes, 0.25, "step 3")
    with pytest.raises(UserError) as caught:
        refuse_failures([prompt("p"), prompt("q")], outcomes, 0.2, "step 3")
    message = str(caught.value)
    assert message.startswith("step 3: the environment could not grade 1 of 4 responses (25%)")
    assert "environment.max_failed_share" in message and "'q': the box did not start" in message


class Script:
    """A sampler: the same answers to every prompt, all cut at the limit but the last."""

    def __init__(self, *answers):
        self._answers = answers

    def __call__(self, params, prompts, *, group, on_done, **settings):
        rows = [TOKENIZER.encode(text) for _ in prompts for text in self._answers]
        width = max(map(len, rows))
        rollouts = HostRollouts(
            tokens=np.array([row + [0] * (width - len(row)) for row in rows], np.int32),
            log_probs=np.zeros((len(rows), width), np.float32),
            lengths=np.array([len(row) for row in rows], np.int32),
            stopped=np.arange(len(rows)) % group == group - 1,
        )
        on_done(list(range(len(rows))), rollouts)
        return rollouts


def step_of(environment, *answers, share=0.2):
    """The rollouts of one step, and its metrics."""
    config = default_config(
        rollout=RolloutConfig(prompts_per_step=2, rollouts_per_prompt=len(answers)),
        environment=ToolCallsConfig(max_failed_share=share),
    )
    source = GradedRollouts(config, environment, TOKENIZER, Script(*answers))
    return source(None, 1, PhaseTimer())


def test_a_step_counts_failures_and_means_over_the_rest():
    rollouts, metrics = step_of(Quiz(), "y", "n", "n", "fail", share=0.25)
    assert metrics["environment/failed"] == 0.25
    assert metrics["reward"] == metrics["success"] == pytest.approx(1 / 3)
    assert rollouts.graded.tolist() == [True, True, True, False] * 2
    assert step_of(Quiz(), "y", "n")[1]["environment/failed"] == 0.0
    assert "reward" not in step_of(Quiz(), "fail", share=1.0)[1]


def test_a_step_above_the_share_makes_no_update():
    with pytest.raises(UserError, match=r"step 1: the environment could not grade 2 of 8 "):
        step_of(Quiz(), "y", "n", "n", "fail")


def test_the_environment_is_told_which_responses_were_cut():
    rollouts, _ = step_of(Batches(), "a", "y")
    first, second = (prompt.id for prompt in rollouts.prompts)
    feedback = [outcome.feedback for outcome in rollouts.outcomes]
    assert feedback == [f"cut: {first} a", "", f"cut: {second} a", ""]


# Settings


def test_the_defaults_of_every_kind_round_trip(tmp_path):
    kinds = [kind.settings() for kind in KINDS.values()]
    assert [kind.kind for kind in kinds] == [*KINDS]
    path = tmp_path / "x.toml"
    for kind in kinds:
        config = default_config(environment=kind, evaluation=EvaluationConfig(prompts=1))
        assert problems(config) == []
        path.write_text(to_toml(config))
        assert load_recipe(path) == config
        assert settings_of(vars(kind)) == kind


def test_a_setting_of_another_kind_is_said_to_be_one(tmp_path):
    path = tmp_path / "x.toml"
    for text, expected in (
        ('kind = "bfcl"\nfamilies = ["a"]', "families: a setting of tool_calls and nano_code, but"),
        ("reveal_expected = true", "the environment is tool_calls (the default; set environment.k"),
        ('kind = "tool_cals"', 'environment.kind: "tool_cals" (a string), expected one of "tool_c'),
        (
            'kind = "file"\npth = "x"',
            "environment.pth: unknown key; did you mean environment.path?",
        ),
        ('kind = "math"\ndeadline_seconds = 0', "environment.deadline_seconds: 0.0, expected abov"),
        ("max_failed_share = 1.5", "environment.max_failed_share: 1.5, expected from 0 to 1"),
    ):
        path.write_text(f"[environment]\n{text}\n")
        with pytest.raises(UserError) as caught:
            load_recipe(path)
        assert expected in str(caught.value)


def test_an_option_may_choose_the_environment(tmp_path):
    path = tmp_path / "x.toml"
    path.write_text("")
    words = ["--environment.kind=file", "--environment.path", "a.py", "--environment.workers=3"]
    assert load_recipe(path, words).environment == FileConfig(path="a.py", workers=3)


def test_help_shows_the_settings_of_the_recipes_kind(tmp_path, capsys):
    path = tmp_path / "x.toml"
    path.write_text('[environment]\nkind = "file"\npath = "somewhere.py"')
    with pytest.raises(SystemExit):
        load_recipe(path, ["--help"])
    text = capsys.readouterr().out
    assert "somewhere.py" in text and "--environment.deadline-seconds" in text
    assert "--environment.families" not in text


@pytest.mark.parametrize("kind", [MathConfig(), ToolUseConfig()])
def test_a_kind_that_needs_files_says_which_setting_names_them(kind):
    with pytest.raises(UserError, match=r'environment\.train = "": expected a path'):
        make_environment(kind)
    with pytest.raises(UserError, match=r'environment\.held_out = "": expected a path'):
        make_environment(replace(kind, train="x.jsonl"))


def test_a_folder_that_is_not_there_is_told_by_the_kind_that_reads_it(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        make_environment(McqConfig(source=str(tmp_path / "none")))


def test_bfcl_takes_all_its_rows_by_default():
    assert (BfclConfig().train_prompts, BfclConfig().held_out_prompts) == (311, 89)


# Files


def made(folder, text, seed=0):
    path = folder / "mine.py"
    path.write_text(text)
    return make_environment(FileConfig(path=str(path), seed=seed))


HEAD = """
from dataclasses import dataclass
from sdpo_jax.environments.base import Outcome, Prompt

@dataclass
class Mine:
    train: list
    held_out: list
    def grade(self, prompt, response):
        return Outcome(0.0, False, "no", {})

P = Prompt("p", ({"role": "user", "content": "?"},), {})
"""


def test_a_file_holds_an_environment_or_makes_one_with_the_seed(tmp_path):
    assert [p.id for p in made(tmp_path, f"{HEAD}\nenvironment = Mine([P], [])").train] == ["p"]
    function = "def make_environment(seed): return Mine([P._replace(id=str(seed))], [])"
    assert made(tmp_path, f"{HEAD}\n{function}", seed=5).train[0].id == "5"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x = 1", r"mine\.py: expected `environment = \.\.\.` or a function"),
        ("environment = None", "found neither"),
        ("\n\n1 / 0", r"(?s)mine\.py failed at \S*mine\.py:3 .*ZeroDivisionError"),
        ("import no_such_module", r"(?s)failed at \S*mine\.py:1 .*No module named"),
        ("x = 1\ndef f(:\n", r"(?s)mine\.py failed at \S*mine\.py:2 .*SyntaxError"),
        ("environment = object()", "has no train and no held_out and no grade"),
        (
            f"{HEAD}\nenvironment = Mine((P for _ in 'a'), [])",
            "train is a generator, expected a li",
        ),
        (f"{HEAD}\nenvironment = Mine([P], ['q'])", r"held_out\[0\]: 'q', expected Prompt"),
        (f"{HEAD}\nenvironment = Mine([P._replace(id=3)], [])", "the id is 3, expected text"),
        (f"{HEAD}\nenvironment = Mine([P._replace(messages=())], [])", "messages is "),
        (
            HEAD + "\nenvironment = Mine([P._replace(messages=({'role': 'system', "
            "'content': 'x'},))], [])",
            "from 'system', expected the user",
        ),
        (HEAD + "\nenvironment = Mine([P._replace(messages=('x',))], [])", "the message 'x'"),
        (f"{HEAD}\nenvironment = Mine([P._replace(data=None)], [])", "data is None, expected a di"),
    ],
)
def test_a_file_that_holds_no_environment_says_what_is_missing(text, expected, tmp_path):
    with pytest.raises(UserError, match=expected):
        made(tmp_path, text)


def test_a_file_that_is_not_there_tells_how_to_make_one(tmp_path):
    with pytest.raises(UserError, match=r"no such file.*`sdpo env template mine\.py`"):
        make_environment(FileConfig(path=str(tmp_path / "mine.py")))
    assert os.listdir(tmp_path) == []
