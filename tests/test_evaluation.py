"""Held-out accuracy: the arithmetic of its averages, and draws that nothing else uses.

The sampler is a script here: it writes down what it is asked and answers from a table.
"""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from sdpo_jax.commands import evaluate as evaluate_command
from sdpo_jax.config import EvaluationConfig, RolloutConfig, TeacherConfig
from sdpo_jax.environments.base import Outcome, Prompt
from sdpo_jax.environments.grading import Grader, OpenEpisodes
from sdpo_jax.environments.retries import with_episodes
from sdpo_jax.errors import UserError
from sdpo_jax.evaluation.evaluator import (
    EVALUATION_STREAM,
    TEACHER_STREAM,
    Evaluator,
    Graded,
    accuracy_metrics,
)
from sdpo_jax.rollouts.diagnostics import environment_metrics
from sdpo_jax.rollouts.generate import rollout_keys
from sdpo_jax.rollouts.sampler import HostRollouts, Sampler
from sdpo_jax.run.evaluate import evaluate, evaluate_fully
from sdpo_jax.run.recipes import default_config
from sdpo_jax.teacher.context import TeacherContext
from sdpo_jax.teacher.contexts import ContextBuilder, SiblingContexts
from sdpo_jax.teacher.prompts import TeacherPrompts
from sdpo_jax.training.engine import Models

TOKENIZER = tiny.ByteTokenizer()
STUDENT, TEACHER = "student", "teacher"
PROMPTS = tuple(
    Prompt(f"p{i}", ({"role": "user", "content": f"{i}?"},), {"family": family})
    for i, family in enumerate(("alarm", "alarm", "money", "money", "money"))
)


class Quiz:
    """`y` passes, `n` hears why not, `-` hears nothing."""

    train = held_out = PROMPTS

    def grade(self, prompt, response):
        del prompt
        passed = response == "y"
        return Outcome(float(passed), passed, "wanted y" if response == "n" else "", {})


class Script:
    """A sampler: answers of the student by prompt index, one fixed answer of the teacher."""

    def __init__(self, answers, teacher="y"):
        self.answers, self.teacher = answers, teacher
        self.calls = []

    def __call__(self, params, prompts, *, group, first_prompt, **settings):
        self.calls.append({"params": params, "prompts": prompts, "group": group, **settings})
        if params == STUDENT:
            first = first_prompt
            texts = [text for i in range(first, first + len(prompts)) for text in self.answers[i]]
        else:
            # Shown a success of a sibling the teacher answers from the script, else with "n".
            shown = [TOKENIZER.decode(ids) for ids in prompts]
            texts = [self.teacher if "Correct solution" in text else "n" for text in shown]
        rows = [[*TOKENIZER.encode(text), TOKENIZER.END] for text in texts]
        width = max(map(len, rows))
        return HostRollouts(
            tokens=np.array([row + [0] * (width - len(row)) for row in rows], np.int32),
            log_probs=np.zeros((len(rows), width), np.float32),
            lengths=np.array([len(row) for row in rows], np.int32),
            stopped=np.array([text != "-" for text in texts]),
        )


def make_config(**evaluation):
    settings = {"prompts": 5, "samples_per_prompt": 2, "batch_prompts": 2}
    return default_config(
        seed=3,
        rollout=RolloutConfig(max_response_tokens=6),
        teacher=TeacherConfig(max_prompt_tokens=512),
        evaluation=EvaluationConfig(**settings | evaluation),
    )


def evaluator_of(config, sampler, environment, contexts=None):
    """An evaluator with the contexts of SDPO unless others are given."""
    contexts = contexts or SiblingContexts(config.teacher)
    prompts = TeacherPrompts(config.teacher, TOKENIZER)
    return Evaluator(config, sampler, TOKENIZER, environment, prompts, contexts)


def make_evaluator(script, **evaluation):
    return evaluator_of(make_config(**evaluation), script, Quiz())


ANSWERS = [["y", "y"], ["y", "n"], ["n", "-"], ["-", "-"], ["n", "y"]]


def test_accuracy_is_the_mean_over_all_samples_of_all_prompts():
    metrics = make_evaluator(Script(ANSWERS))(STUDENT, None, 0)
    assert metrics == pytest.approx(
        {
            "accuracy": 4 / 10,
            "accuracy/alarm": 3 / 4,
            "accuracy/money": 1 / 6,
            "pass_at_2": 3 / 5,
            "response_tokens": 2.0,  # a letter and the stop token
            "response_tokens/p50": 2.0,
            "response_tokens/p95": 2.0,
            "truncated": 3 / 10,
            "entropy": 0.0,  # the script is sure of every token
            "repetition": 0.0,
            "most_common_output": (1 + 0.5 + 0.5 + 1 + 0.5) / 5,
        }
    )


def test_teacher_accuracy_counts_only_attempts_that_have_a_context():
    script = Script(ANSWERS)
    metrics = make_evaluator(script)(STUDENT, TEACHER, 0)
    # A sibling's success: both of prompt 0, the "n" of 1, the "n" of 4. Feedback: the "n" of 2.
    # Nothing: "-" of 2 and 3, and the successes of 1 and 4, whose siblings failed.
    assert metrics["teacher_accuracy/demonstration"] == 1.0
    assert metrics["teacher_accuracy/feedback"] == 0.0
    assert metrics["teacher_accuracy"] == 4 / 5
    asked = [call for call in script.calls if call["params"] == TEACHER]
    assert sum(len(call["prompts"]) for call in asked) == 5
    assert all(call["group"] == 1 for call in asked)


def test_same_output_is_the_share_of_teacher_answers_that_repeat_the_attempt():
    metrics = make_evaluator(Script(ANSWERS))(STUDENT, TEACHER, 0)
    # The teacher says "y" to both "y" of prompt 0, to the "n" of 1 and of 4, and "n" to that of 2.
    assert metrics["same_output/demonstration"] == 2 / 4
    assert metrics["same_output/feedback"] == 1.0
    assert metrics["same_output"] == 3 / 5


class Votes(Quiz):
    """A quiz whose answers are letters."""

    def answer(self, prompt, response):
        del prompt
        return None if response == "-" else response


def test_majorities_are_reported_where_the_environment_knows_answers():
    answers = ["yyn", "ynn", "---", "-y-", "-ny"]
    script = Script([list(row) for row in answers])
    config = make_config(samples_per_prompt=3)
    metrics = evaluator_of(config, script, Votes())(STUDENT, None, 0)
    assert metrics["maj_at_3"] == (1 + 0 + 0 + 1 + 0.5) / 5
    alone = evaluator_of(config, script, Quiz())(STUDENT, None, 0)
    assert "maj_at_3" not in alone
    assert alone == {name: v for name, v in metrics.items() if name != "maj_at_3"}


class OwnTeacher(NamedTuple):
    """As much of a trainer as an evaluation reads, under an objective without a teacher."""

    contexts: ContextBuilder | None
    teacher: None = None
    student_teacher_kl: None = None
    source: Any = SimpleNamespace(wait=lambda: None)

    def models(self, state):
        return Models(state, None, None)

    def student(self, state):
        return state

    def teacher_params(self, state, student):
        return None


def test_without_a_teacher_the_student_is_its_own_where_the_objective_or_the_command_wants_it():
    """GRPO has no contexts: training evaluates the student alone, `sdpo eval` also in context."""
    config = make_config()
    prompts = TeacherPrompts(config.teacher, TOKENIZER)
    evaluator = Evaluator(config, Script(ANSWERS), TOKENIZER, Quiz(), prompts, None)
    grpo, sft = OwnTeacher(None), OwnTeacher(SiblingContexts(config.teacher))
    assert "teacher_accuracy" not in evaluate(grpo, evaluator, STUDENT, 0)
    assert "teacher_accuracy" in evaluate(sft, evaluator, STUDENT, 0)
    assert "teacher_accuracy" in evaluate_fully(grpo, evaluator, STUDENT, 2).measures


def test_without_a_context_there_is_no_teacher_accuracy():
    metrics = make_evaluator(Script([["-", "-"]] * 5))(STUDENT, TEACHER, 0)
    assert not [name for name in metrics if name.startswith("teacher")]
    assert metrics["accuracy"] == 0.0


def test_evaluation_draws_with_its_own_temperature_and_top_p():
    script = Script(ANSWERS)
    make_evaluator(script, temperature=0.6, top_p=0.95)(STUDENT, TEACHER, 0)
    drawn = {(call["temperature"], call["top_p"]) for call in script.calls}
    assert drawn == {(0.6, 0.95)}


def test_a_run_without_held_out_prompts_cannot_be_evaluated():
    config = replace(default_config(), evaluation=EvaluationConfig(prompts=0))
    with pytest.raises(UserError, match=r"evaluation\.prompts = 0, there is nothing to evaluate"):
        evaluate_command.evaluate("a run", config, {}, samples=1)


# The teacher sees what it sees in training


class Names(Quiz):
    """Feedback names the question that it is about."""

    def grade(self, prompt, response):
        outcome = super().grade(prompt, response)
        return outcome._replace(feedback=f"about {prompt.id}" if outcome.feedback else "")


def asked_of_teacher(script):
    """The teacher's prompts as text, without control tokens."""
    calls = [call for call in script.calls if call["params"] == TEACHER]
    return [TOKENIZER.decode(ids) for call in calls for ids in call["prompts"]]


def with_teacher(**settings):
    config = make_config()
    return replace(config, teacher=replace(config.teacher, **settings))


@pytest.mark.parametrize("size", [0, 2])
def test_the_teacher_is_shown_the_successes_that_training_remembers(size):
    config, script = with_teacher(success_buffer=size), Script([["-", "-"]] * 5)
    contexts = SiblingContexts(config.teacher)
    passed = [Outcome(1.0, True, "", {})]
    contexts.remember(PROMPTS[1:2], 1, passed, ["the way of old"])
    before = contexts.get_state()
    metrics = evaluator_of(config, script, Quiz(), contexts)(STUDENT, TEACHER, 0)
    shown = asked_of_teacher(script)
    assert len(shown) == size  # both attempts at the prompt whose success is remembered
    assert all(text.startswith("1?") and "the way of old" in text for text in shown)
    assert metrics.get("teacher_accuracy/demonstration") == (1.0 if size else None)
    assert contexts.get_state() == before  # held-out answers are not remembered


@pytest.mark.parametrize("control", ["none", "shuffled"])
def test_the_teacher_of_a_control_is_shown_what_is_about_another_question(control):
    script = Script([["n", "n"]] * 5)
    evaluator_of(with_teacher(control=control), script, Names())(STUDENT, TEACHER, 0)
    shown = asked_of_teacher(script)
    assert len(shown) == 10
    about_own = [f"about p{text[0]}" in text for text in shown]
    assert all("about p" in text for text in shown)
    assert set(about_own) == {control == "none"}


def test_any_context_builder_decides_what_the_teacher_sees():
    def build(prompts, group, outcomes, responses, /, *, seed):
        assert seed == 3 and len(outcomes) == len(responses) == group * len(prompts)
        hint = TeacherContext(None, "look closely")
        return [hint if p.id == "p4" else None for p in prompts for _ in range(group)]

    script = Script(ANSWERS)
    evaluator_of(make_config(), script, Quiz(), build)(STUDENT, TEACHER, 0)
    shown = asked_of_teacher(script)
    assert len(shown) == 2 and all("4?" in text and "look closely" in text for text in shown)


def test_without_a_context_builder_a_teacher_sees_the_contexts_of_sdpo():
    config, prompts = make_config(), TeacherPrompts(make_config().teacher, TOKENIZER)
    scripts = [Script(ANSWERS) for _ in range(2)]
    Evaluator(config, scripts[0], TOKENIZER, Quiz(), prompts, None)(STUDENT, TEACHER, 0)
    evaluator_of(config, scripts[1], Quiz())(STUDENT, TEACHER, 0)
    assert asked_of_teacher(scripts[0]) == asked_of_teacher(scripts[1]) != []


def test_the_teacher_is_not_asked_where_the_recipe_leaves_it_out():
    script = Script(ANSWERS)
    metrics = make_evaluator(script, teacher=False)(STUDENT, TEACHER, 0)
    assert not [name for name in metrics if name.startswith("teacher")]
    assert all(call["params"] == STUDENT for call in script.calls)


def test_one_family_alone_is_not_listed_beside_the_whole():
    graded = Graded(["y"], Grader(Quiz())(PROMPTS[:1], ["y"]), [2], [True])
    metrics = accuracy_metrics(graded, PROMPTS[:1])
    assert [name for name in metrics if name.startswith("accuracy")] == ["accuracy"]


def test_without_prompts_nothing_is_sampled():
    script = Script(ANSWERS)
    assert make_evaluator(script, prompts=0)(STUDENT, TEACHER, 0) == {}
    assert not script.calls


def test_only_so_many_prompts_are_evaluated_and_the_last_batch_may_be_short():
    script = Script(ANSWERS)
    evaluator = make_evaluator(script, prompts=3)
    evaluator(STUDENT, None, 0)
    assert evaluator.prompts == list(PROMPTS[:3])
    assert [len(call["prompts"]) for call in script.calls] == [2, 1]
    assert {call["prompt_rows"] for call in script.calls} == {2}  # one program serves both


def test_answers_are_graded_with_the_prompt_that_they_answer():
    class Echo(Quiz):
        def grade(self, prompt, response):
            return Outcome(1.0, True, f"{prompt.id} {response}", {})

    asked = [prompt for prompt in PROMPTS[:2] for _ in range(2)]
    episodes = OpenEpisodes(with_episodes(Echo(), 1), asked)
    steps = episodes(range(4), ["a", "b", "c", "d"], [False] * 4)
    assert [step.outcome.feedback for step in steps] == ["p0 a", "p0 b", "p1 c", "p1 d"]


def test_a_metric_that_only_some_outcomes_have_is_a_mean_over_those():
    outcomes = [Outcome(0.0, False, "", m) for m in ({"a": 1.0}, {"a": 0.0, "b": 3.0}, {})]
    assert environment_metrics(outcomes) == {"environment/a": 0.5, "environment/b": 3.0}


# Draws


def keys_of(step, prompts=8, group=4):
    seed, step, first = (jnp.asarray(x, jnp.uint32) for x in (3, step, 0))
    keys = rollout_keys(seed, step, first, prompts, group)
    return {tuple(row) for row in np.asarray(jax.random.key_data(keys)).tolist()}


def test_evaluation_never_draws_with_the_keys_of_training_nor_the_teacher_with_the_students():
    script = Script(ANSWERS)
    evaluator = make_evaluator(script)
    steps = [0, 1, 10]
    for step in steps:
        evaluator(STUDENT, TEACHER, step)
    streams = {
        name: sorted({call["step"] for call in script.calls if call["params"] == name})
        for name in (STUDENT, TEACHER)
    }
    assert streams[STUDENT] == [EVALUATION_STREAM + step for step in steps]
    assert streams[TEACHER] == [TEACHER_STREAM + step for step in steps]
    training = list(range(20))
    every = [keys_of(step) for step in (*training, *streams[STUDENT], *streams[TEACHER])]
    assert len(set().union(*every)) == len(every) * 8 * 4
    assert {call["seed"] for call in script.calls} == {3}


def real_sampler():
    architecture = replace(tiny.ARCHITECTURE, vocabulary=TOKENIZER.vocabulary)
    sampler = Sampler(tiny.make_model(architecture), tiny.make_devices(), TOKENIZER.stop_ids)
    return sampler, tiny.make_params(architecture, scale=0.5)


@pytest.fixture(scope="module")
def real():
    """A sampler that compiles each program once for the whole file, and parameters."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "jit", tiny.quick_jit)
        return real_sampler()


@pytest.mark.slow
def test_evaluation_does_not_depend_on_how_many_prompts_are_decoded_at_a_time(real):
    sampler, params = real
    answers = {}
    for size in (2, 5):
        evaluator = make_evaluator(sampler, batch_prompts=size, temperature=0.8)
        graded = evaluator.attempts(params, 7)
        assert len(graded.responses) == 10
        answers[size] = graded
    # Draws are the same; sums of log-probs round as the size of the batch has it.
    two, five = (graded._replace(log_probs=()) for graded in (answers[2], answers[5]))
    assert two == five
    np.testing.assert_allclose(answers[2].log_probs, answers[5].log_probs, rtol=1e-5)
    assert len(set(answers[2].responses)) > 5  # it was really drawn


# The model itself


class Strict(Quiz):
    """Nothing passes, and everything is told so: every attempt has a context."""

    def grade(self, prompt, response):
        return Outcome(0.0, False, "no", {})


@pytest.mark.slow
@pytest.mark.parametrize("blind", [True, False])
def test_a_greedy_teacher_that_cannot_see_its_context_repeats_every_attempt(blind, real):
    sampler, params = real
    if blind:  # Without attention a token sees itself alone, and all prompts end alike.
        silent = jnp.zeros_like(params["layers"]["output"])
        params = {**params, "layers": {**params["layers"], "output": silent}}
    config = make_config(temperature=0.0, prompts=2, samples_per_prompt=1)
    evaluator = evaluator_of(config, sampler, Strict())
    metrics = evaluator(params, params, 0)
    assert (metrics["same_output"] == 1.0) == blind
    assert metrics["same_output"] == metrics["same_output/feedback"]
    assert "entropy" not in metrics  # a greedy choice has none


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_entropy_is_that_of_the_sampling_distribution_within_its_error(temperature, real):
    sampler, params = real
    config = replace(
        make_config(prompts=1, temperature=temperature),
        rollout=RolloutConfig(max_response_tokens=2),
    )
    evaluator = evaluator_of(config, sampler, Strict())
    graded = evaluator.attempts(params, 0, samples=600)
    information, tokens = -np.asarray(graded.log_probs), np.asarray(graded.lengths)
    expected = exact_entropy(params, TOKENIZER.render(PROMPTS[0].messages), temperature)
    for found, exact in zip((information, tokens), expected, strict=True):
        assert abs(found.mean() - exact) <= 4 * found.std() / np.sqrt(len(found))
    value = accuracy_metrics(graded, PROMPTS[:1])["entropy"]
    assert value == pytest.approx(information.sum() / tokens.sum())
    assert abs(value - expected[0] / expected[1]) < 0.05 * value


def exact_entropy(params, prompt, temperature):
    """Entropy and mean length of responses of at most two tokens, by enumeration in float64."""
    architecture = replace(tiny.ARCHITECTURE, vocabulary=TOKENIZER.vocabulary)

    def chances(tokens):
        logits = tiny.reference_logits(architecture, params, tokens)[-1] / temperature
        shares = np.exp(logits - logits.max())
        return shares / shares.sum()

    def entropy(p):
        return -np.sum(p * np.log(p))

    first = chances(prompt)
    goes_on = [i for i in range(len(first)) if i != TOKENIZER.END]
    then = sum(first[i] * entropy(chances([*prompt, i])) for i in goes_on)
    return entropy(first) + then, 1.0 + sum(first[i] for i in goes_on)
