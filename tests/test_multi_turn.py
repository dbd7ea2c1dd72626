"""Asking in many turns: what the model is shown, word for word, and chains that know no other."""

from dataclasses import replace

import jax
import pytest
import tiny

from sdpo_jax.config import RolloutConfig, TeacherConfig
from sdpo_jax.discovery.baselines import StartModel, multi_turn
from sdpo_jax.discovery.multi_turn import Chain
from sdpo_jax.environments.base import Outcome, Prompt, not_graded
from sdpo_jax.errors import UserError
from sdpo_jax.rollouts.sampler import Sampler
from sdpo_jax.run.recipes import default_config

TOKENIZER = tiny.ByteTokenizer()
SYSTEM = {"role": "system", "content": "be brief"}
QUESTION = Prompt("q", (SYSTEM, {"role": "user", "content": "2 + 2?"}), {})


def wrong(feedback):
    return Outcome(0.0, False, feedback, {})


def chain(*turns, shows_attempts=False, **teacher):
    made = Chain(QUESTION, TeacherConfig(**teacher), TOKENIZER, shows_attempts=shows_attempts)
    for attempt, feedback in turns:
        made.add(attempt, wrong(feedback))
    return made


def shown(made):
    """The prompt as it is tokenised, read back: roles by their first letter."""
    text = ""
    for i in made.ids():
        role = {1: "[S]", 2: "[U]", 3: "[A]", 0: "."}.get(i)
        text += role if role is not None else TOKENIZER.decode([i])
    return text


@pytest.mark.parametrize("shows_attempts", [False, True])
def test_the_first_turn_is_the_plain_question(shows_attempts):
    assert shown(chain(shows_attempts=shows_attempts)) == "[S]be brief.[U]2 + 2?.[A]"


def test_feedback_is_joined_behind_the_question_without_the_attempts():
    made = chain(("5", "too high"), ("3", " too low\n"), ("x", ""))
    assert shown(made) == (
        "[S]be brief.[U]2 + 2?\nFeedback on an earlier attempt:\n\ntoo high\n\ntoo low"
        "\n\nSolve the question above correctly..[A]"
    )


def test_a_conversation_alternates_attempts_and_feedback():
    made = chain(("<think>hm</think> 5", "too high"), ("x", " "), shows_attempts=True)
    assert shown(made) == (
        "[S]be brief.[U]2 + 2?."
        "[A]5.[U]too high\n\nSolve the question above correctly.."
        "[A]x.[U]Solve the question above correctly..[A]"
    )
    kept = chain(("<think>hm</think> 5", "no"), shows_attempts=True, remove_thinking=False)
    assert kept.messages()[2]["content"] == "<think>hm</think> 5"


def test_what_could_not_be_graded_is_never_shown():
    for shows_attempts in (False, True):
        made = chain(shows_attempts=shows_attempts)
        made.add("5", not_graded("the sandbox did not start"))
        assert made.messages() == QUESTION.messages


def test_the_oldest_feedback_is_dropped_where_the_prompt_would_be_too_long():
    turns = [(str(i), f"feedback {i}") for i in range(4)]
    whole = len(chain(*turns).ids())
    exact = chain(*turns, max_prompt_tokens=whole)
    assert len(exact.ids()) == whole and "feedback 0" in shown(exact)
    short = chain(*turns, max_prompt_tokens=whole - 1)
    text = shown(short)
    assert "feedback 0" not in text and "feedback 1\n\nfeedback 2\n\nfeedback 3" in text
    short.add("4", wrong("x"))  # what was dropped does not come back where there is room again
    assert "feedback 1\n\nfeedback 2\n\nfeedback 3\n\nx" in shown(short)


def test_a_conversation_drops_its_oldest_turn_with_its_attempt():
    turns = [(f"attempt {i}", f"feedback {i}") for i in range(3)]
    whole = len(chain(*turns, shows_attempts=True).ids())
    made = chain(*turns, shows_attempts=True, max_prompt_tokens=whole - 1)
    text = shown(made)
    assert text.startswith("[S]be brief.[U]2 + 2?.[A]attempt 1.[U]feedback 1")
    assert text.endswith("feedback 2\n\nSolve the question above correctly..[A]")
    tight = chain(*turns, shows_attempts=True, max_prompt_tokens=len(chain().ids()))
    assert shown(tight) == "[S]be brief.[U]2 + 2?.[A]"


def test_a_single_feedback_that_is_too_long_loses_its_end():
    limit = 130
    made = chain(("5", "0123456789" * 20), max_prompt_tokens=limit)
    text = shown(made)
    assert len(made.ids()) == limit
    assert "attempt:\n\n0123456789" in text and text.endswith("correctly..[A]")


class Lottery:
    """One first letter in sixteen passes; the others hear how long their answer was."""

    train = tuple(
        Prompt(f"q{i}", ({"role": "user", "content": "abcd"[i] * (1 + 5 * i)},), {})
        for i in range(4)
    )
    held_out = ()

    def grade(self, prompt, response):
        del prompt
        passed = ord(response[:1] or "x") % 16 == 0
        return Outcome(float(passed), passed, "" if passed else f"{len(response)} letters", {})


def cells(pairs, budget=12, **rollout):
    architecture = replace(tiny.ARCHITECTURE, vocabulary=TOKENIZER.vocabulary)
    model, devices = tiny.make_model(architecture), tiny.make_devices()
    settings = {"max_prompt_tokens": 64, "max_response_tokens": 4}
    config = default_config(
        rollout=RolloutConfig(**settings | rollout), teacher=TeacherConfig(max_prompt_tokens=64)
    )
    sampler = Sampler(model, devices, TOKENIZER.stop_ids)
    params = tiny.make_params(architecture, scale=0.5)
    start = StartModel(config, sampler, TOKENIZER, Lottery(), params)
    found, turns = {}, []
    multi_turn(
        *(start, "multi_turn_feedback", pairs, budget),
        lambda cell: found.update({(cell.question, cell.seed): cell._replace(seconds=0.0)}),
        lambda turn, budget: turns.append((turn, budget)),
    )
    assert turns[-1][0] == max(cell.generations for cell in found.values())
    return found


@pytest.mark.slow
def test_a_chain_depends_on_its_question_and_seed_and_on_no_other_chain(monkeypatch):
    monkeypatch.setattr(jax, "jit", tiny.quick_jit)
    pairs = [(question, seed) for question in Lottery.train for seed in (1, 2)]
    together = cells(pairs)
    assert cells(pairs[5:3:-1]) == {k: together[k] for k in (("q2", 1), ("q2", 2))}
    for cell in together.values():
        assert cell.generations == len(cell.passed) == (cell.first or cell.budget)
        assert sum(cell.passed) == (cell.first is not None)
    firsts = {cell.first for cell in together.values()}
    assert len(firsts) > 2  # some soon, some late, and each by its own draws


def test_a_question_that_is_too_long_is_refused_and_not_cut(monkeypatch):
    monkeypatch.setattr(jax, "jit", tiny.quick_jit)
    with pytest.raises(UserError, match="prompt 'q3' has"):
        cells([(Lottery.train[3], 1)], max_prompt_tokens=18)
