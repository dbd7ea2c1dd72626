"""The teacher's context: who sees which demonstration and feedback, and the exact prompt."""

import dataclasses
from types import SimpleNamespace

import pytest

from sdpo_jax.config import TeacherConfig
from sdpo_jax.environments.base import Outcome
from sdpo_jax.errors import UserError
from sdpo_jax.teacher.context import (
    CLOSING,
    TeacherContext,
    choose_context,
    fit_reprompt,
    remove_thinking,
    reprompt,
)

CONFIG = TeacherConfig()
SYSTEM = {"role": "system", "content": "Answer with one number."}
USER = {"role": "user", "content": "What is 2 + 2?"}


def outcome(reward, feedback=""):
    return Outcome(reward, reward >= 1.0, feedback, {})


def choose(rewards, responses=None, feedback=None, group=None, seed=0, **changes):
    responses = responses or [f"r{i}" for i in range(len(rewards))]
    feedback = feedback or [""] * len(rewards)
    outcomes = [outcome(r, f) for r, f in zip(rewards, feedback, strict=True)]
    config = dataclasses.replace(CONFIG, **changes)
    return choose_context(outcomes, responses, group or len(rewards), config, seed=seed)


def demonstrations(contexts):
    return [c and c.demonstration for c in contexts]


# Golden prompts.


@pytest.mark.parametrize(
    ("context", "content"),
    [
        (
            TeacherContext("4", None),
            "What is 2 + 2?\nCorrect solution:\n\n4\n\nSolve the question above correctly.",
        ),
        (
            TeacherContext(None, "5 is too large."),
            "What is 2 + 2?\nFeedback on an earlier attempt:\n\n5 is too large.\n\n"
            "Solve the question above correctly.",
        ),
        (
            TeacherContext("4", "5 is too large."),
            "What is 2 + 2?\nCorrect solution:\n\n4\nFeedback on an earlier attempt:\n\n"
            "5 is too large.\n\nSolve the question above correctly.",
        ),
        (None, "What is 2 + 2?"),
    ],
    ids=["solution", "feedback", "both", "neither"],
)
def test_reprompt_is_this_exact_text_and_keeps_the_system_message(context, content):
    assert reprompt((SYSTEM, USER), context) == (SYSTEM, {"role": "user", "content": content})


def test_braces_and_percent_signs_are_plain_text():
    odd = '{"a": {0}} %s {prompt} \\n'
    text = reprompt(({"role": "user", "content": odd},), TeacherContext(odd, odd))[-1]["content"]
    assert text.count(odd) == 3


def test_reprompt_leaves_its_input_alone_and_wants_a_user_message_last():
    message = dict(USER)
    reprompt((message,), TeacherContext("4", None))
    assert message == USER
    with pytest.raises(ValueError, match="end with one from the user"):
        reprompt((USER, {"role": "assistant", "content": "4"}), TeacherContext("4", None))


# Who sees what.


def test_failing_siblings_share_the_first_success_and_the_first_success_sees_the_second():
    assert demonstrations(choose([0.0, 1.0, 0.0, 1.0])) == ["r1", "r3", "r1", "r1"]


def test_a_lone_success_has_no_signal_and_its_siblings_see_it():
    assert demonstrations(choose([0.0, 1.0])) == ["r1", None]
    assert choose([0.0, 1.0])[1] is None


def test_own_success_may_be_shown_on_request():
    assert demonstrations(choose([0.0, 1.0], exclude_own_success=False)) == ["r1", "r1"]


def test_no_success_and_no_feedback_is_no_signal():
    assert choose([0.0, 0.5]) == [None, None]


def test_prompts_never_see_each_others_successes():
    assert demonstrations(choose([1.0, 0.0, 0.0, 0.0], group=2)) == [None, "r0", None, None]


def test_success_is_a_reward_at_the_threshold():
    assert demonstrations(choose([0.5, 0.0])) == [None, None]
    assert demonstrations(choose([0.5, 0.0], success_threshold=0.5)) == [None, "r0"]
    assert demonstrations(choose([float("nan"), 0.0], success_threshold=0.5)) == [None, None]


def test_shortest_counts_shown_characters_and_breaks_ties_by_order():
    responses = ["<think>x</think>bb", "ccc", "aa", "failed"]
    shown = demonstrations(choose([1.0, 1.0, 1.0, 0.0], responses, demonstration="shortest"))
    assert shown == ["aa", "bb", "bb", "bb"]


def test_random_is_a_pure_function_of_seed_and_row():
    rewards = [1.0] * 8
    first = demonstrations(choose(rewards, demonstration="random", seed=3))
    assert first == demonstrations(choose(rewards, demonstration="random", seed=3))
    assert first != demonstrations(choose(rewards, demonstration="random", seed=4))
    assert all(shown != f"r{row}" for row, shown in enumerate(first))
    assert len(set(first)) > 2


def test_demonstrations_can_be_switched_off():
    contexts = choose([1.0, 0.0], feedback=["", "wrong"], demonstration="none")
    assert contexts == [None, TeacherContext(None, "wrong")]


def test_feedback_only_without_demonstration_on_and_off():
    arguments = ([1.0, 0.0], None, ["fine", "wrong"])
    only = choose(*arguments, feedback_only_without_demonstration=True)
    assert only == [TeacherContext(None, "fine"), TeacherContext("r0", None)]
    both = choose(*arguments, feedback_only_without_demonstration=False)
    assert both == [TeacherContext(None, "fine"), TeacherContext("r0", "wrong")]


def test_feedback_can_be_switched_off():
    config = dataclasses.replace(CONFIG, feedback=False)
    assert choose_context([outcome(0.0, "wrong")], ["a"], 1, config) == [None]


@pytest.mark.parametrize("feedback", ["", "  \n\t", None, 7, float("nan")])
def test_blank_or_non_string_feedback_is_no_feedback(feedback):
    assert choose_context([outcome(0.0, feedback)], ["a"], 1, CONFIG) == [None]


def test_lengths_must_agree():
    with pytest.raises(ValueError, match="multiple of group_size"):
        choose_context([outcome(0.0)] * 3, ["a"] * 3, 2, CONFIG)


# Thinking.


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("<think>a\nb</think>\n\n 4", "4"),
        ("<think>a</think>4 <think>b</think> 5", "4 5"),
        ("4\n<think>never closed", "4"),
        ("<think>never closed 4", ""),
        ("opened by the template</think>\n4", "4"),
        ("<think>a<think>b</think>c</think>4", "4"),
        ("no tags", "no tags"),
    ],
)
def test_thinking_is_removed(text, left):
    assert remove_thinking(text) == left


def test_a_demonstration_that_is_all_thinking_does_not_count():
    responses = ["<think>4", "<think>x</think>  ", "five", "4"]
    assert demonstrations(choose([1.0, 1.0, 0.0, 1.0], responses)) == ["4", "4", "4", None]
    kept = demonstrations(choose([1.0, 0.0], ["<think>x</think>4", "5"], remove_thinking=False))
    assert kept == [None, "<think>x</think>4"]


# Budgets. One token per character; the template adds a marker before and an assistant header after.

HEADER = "<assistant>"


def _render(messages):
    return [ord(c) for m in messages for c in "#" + m["content"]] + [ord(c) for c in HEADER]


CHARACTERS = SimpleNamespace(
    encode=lambda text: [ord(c) for c in text],
    decode=lambda ids: "".join(map(chr, ids)),
    render=_render,
)


def fit(context, budget, feedback_budget=1000, question="0123456789", codec=CHARACTERS):
    return fit_reprompt(
        (SYSTEM, {"role": "user", "content": question}),
        context,
        codec,
        max_prompt_tokens=budget,
        max_feedback_tokens=feedback_budget,
    )


def full_length(context):
    return len(_render(reprompt((SYSTEM, {"role": "user", "content": "0123456789"}), context)))


def test_a_prompt_that_fits_is_untouched():
    context = TeacherContext("d" * 20, "f" * 20)
    fitted = fit(context, full_length(context))
    assert fitted.context == context
    assert fitted.messages == reprompt((SYSTEM, {"role": "user", "content": "0123456789"}), context)


def test_feedback_is_first_cut_to_its_own_cap():
    assert fit(TeacherContext("demo", "f" * 20), 1000, 7).context == TeacherContext("demo", "f" * 7)


def test_without_context_the_question_is_untouched():
    assert fit(None, 1).messages == (SYSTEM, {"role": "user", "content": "0123456789"})


@pytest.mark.parametrize("too_long_by", range(1, 105))
def test_a_cut_prompt_is_as_long_as_allowed_and_keeps_closing_line_and_header(too_long_by):
    demonstration, feedback = "abcdefghijklmnopqrst", "ABCDEFGHIJKLMNOPQRST"
    budget = full_length(TeacherContext(demonstration, feedback)) - too_long_by
    fitted = fit(TeacherContext(demonstration, feedback), budget)
    rendered = "".join(map(chr, _render(fitted.messages)))
    assert len(rendered) <= budget
    assert rendered.endswith(CLOSING + HEADER)
    assert fitted.messages[0] == SYSTEM
    content = fitted.messages[-1]["content"]
    if too_long_by < 20:
        assert fitted.context == TeacherContext(demonstration[:-too_long_by], feedback)
        assert len(rendered) == budget
    elif fitted.context is not None:
        kept = fitted.context.feedback
        assert fitted.context.demonstration is None
        assert kept is not None and feedback.startswith(kept)
        assert len(rendered) == budget or kept == feedback
        assert content.startswith("0123456789\nFeedback")
    else:
        assert "0123456789".endswith(content.removesuffix(CLOSING))


def test_a_budget_that_not_even_an_empty_question_meets_is_a_user_error():
    smallest = len(_render((SYSTEM, {"role": "user", "content": CLOSING})))
    assert fit(TeacherContext("d", None), smallest).messages[-1]["content"] == CLOSING
    with pytest.raises(UserError, match=f"take {smallest} tokens"):
        fit(TeacherContext("d", None), smallest - 1)


def test_cuts_keep_whole_characters_when_tokens_are_bytes():
    codec = SimpleNamespace(
        encode=lambda text: list(text.encode()),
        decode=lambda ids: bytes(ids).decode(errors="replace"),
        render=lambda messages: [b for m in messages for b in m["content"].encode()],
    )
    assert fit(TeacherContext(None, "€€€"), 1000, 7, codec=codec).context == TeacherContext(
        None, "€€"
    )
    budget = len((SYSTEM["content"] + "€€" + CLOSING).encode()) + 1
    fitted = fit(TeacherContext("d", None), budget, question="€€€", codec=codec)
    assert fitted == ((SYSTEM, {"role": "user", "content": "€€" + CLOSING}), None)
