"""Which responses a number is about, and what it is split by."""

import numpy as np
import pytest

from sdpo_jax.environments.base import Outcome, Prompt, not_graded
from sdpo_jax.environments.grading import answers_of
from sdpo_jax.environments.kinds.mcq import Mcq, Question
from sdpo_jax.environments.kinds.tool_calls import ToolCalls
from sdpo_jax.errors import UserError
from sdpo_jax.evaluation.measures import (
    Graded,
    groups,
    plain_numbers,
    student_measures,
    teacher_measures,
    values,
)
from sdpo_jax.rollouts.diagnostics import repeated_share

RIGHT, WRONG = Outcome(1.0, True, "", {}), Outcome(0.0, False, "no", {})
FAILED = not_graded("the sandbox is gone")


def prompts(*data):
    return [Prompt(f"p{i}", ({"role": "user", "content": f"{i}?"},), d) for i, d in enumerate(data)]


def graded(outcomes, texts=None, lengths=None, log_probs=None):
    n = len(outcomes)
    return Graded(
        texts or [f"text {i}" for i in range(n)],
        list(outcomes),
        lengths or [4 + i for i in range(n)],
        [i % 3 > 0 for i in range(n)],
        log_probs or [-0.5 * (4 + i) for i in range(n)],
        [0.1 * i for i in range(n)],
    )


def test_what_a_failed_grading_was_about_has_no_part_in_any_number():
    outcomes = [RIGHT, FAILED, WRONG, WRONG, RIGHT, RIGHT]
    one = graded(outcomes)
    other = Graded(
        ["text 0", "text 2", *one.responses[2:]],
        [RIGHT, FAILED._replace(reward=0.7, passed=True), *outcomes[2:]],
        [4, 999, *one.lengths[2:]],
        [one.stopped[0], not one.stopped[1], *one.stopped[2:]],
        [one.log_probs[0], -999.0, *one.log_probs[2:]],
        [0.0, 1.0, *one.repetition[2:]],
    )
    answers, others = list("aabbab"), list("abbbab")
    asked = prompts({"family": "x"}, {"family": "y"})
    found = values(student_measures(one, asked, answers, ks=(1, 2, 3)))
    assert found == values(student_measures(other, asked, others, ks=(1, 2, 3)))
    assert plain_numbers(one) == plain_numbers(other)
    assert found["accuracy"] == 3 / 5 and found["accuracy/x"] == 1 / 2
    assert found["response_tokens"] == (4 + 6 + 7 + 8 + 9) / 5
    assert found["entropy"] == pytest.approx(0.5)
    # Three graded samples has the second prompt alone.
    assert found["pass_at_3"] == 1.0 and found["maj_at_3"] == 0.5
    assert found["pass_at_2"] == pytest.approx((1.0 + 1.0) / 2)


def test_where_nothing_could_be_graded_there_is_no_number_but_their_share():
    assert student_measures(graded([FAILED] * 2), prompts({}), ["a", "b"], ks=(1, 2)) == {}
    assert plain_numbers(graded([FAILED] * 2)) == {"environment/failed": 1.0}


def test_entropy_is_per_token_over_all_responses_together():
    made = graded([RIGHT, WRONG], lengths=[1, 9], log_probs=[-1.0, -2.0])
    assert student_measures(made, prompts({}))["entropy"].value == pytest.approx(0.3)


def test_the_most_common_output_is_counted_prompt_by_prompt():
    texts = ["a", "a", "b", "b", "a", "c"]
    made = graded([WRONG] * 6, texts=texts)
    assert student_measures(made, prompts({}, {}))["most_common_output"].value == 3 / 6
    assert "most_common_output" not in student_measures(made, prompts(*[{}] * 6))


def test_accuracy_is_split_by_family_and_by_difficulty():
    asked = prompts({"difficulty": "easy"}, {"difficulty": "hard"}, {"difficulty": "hard"})
    found = values(student_measures(graded([RIGHT, RIGHT, WRONG]), asked))
    assert found["accuracy/difficulty/easy"] == 1.0 and found["accuracy/difficulty/hard"] == 0.5
    assert not [name for name in groups(prompts({"difficulty": 3}, {"difficulty": 3}))]
    mixed = groups(prompts({"family": "easy", "difficulty": "easy"}, {"family": "x"}))
    assert set(mixed) == {"easy", "x", "difficulty/easy"}


def test_best_of_k_is_reported_where_rewards_lie_between():
    fraction = Outcome(0.5, False, "half", {})
    found = values(student_measures(graded([fraction, WRONG]), prompts({}), ks=(1, 2)))
    assert found["best_at_1"] == 0.25 and found["best_at_2"] == 0.5 and found["pass_at_2"] == 0.0
    assert "best_at_2" not in student_measures(graded([RIGHT, WRONG]), prompts({}), ks=(2,))


def test_repetition_is_the_share_of_4_grams_that_were_there_before():
    assert repeated_share([7] * 10) == pytest.approx(6 / 7)
    assert repeated_share(list(range(10))) == 0.0
    assert repeated_share([1, 1, 1]) == 0.0
    assert repeated_share([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 / 5)


def test_a_teacher_answer_that_could_not_be_graded_is_in_no_rate():
    attempts = graded([WRONG] * 4, texts=["a", "b", "c", "d"])
    answered = graded([RIGHT, FAILED, WRONG], texts=["a", "b", "x"])
    found = teacher_measures(
        attempts, answered, [0, 1, 3], ["demonstration", "feedback", "feedback"], 2
    )
    assert values(found) == {
        "teacher_accuracy": 0.5,
        "teacher_accuracy/demonstration": 1.0,
        "teacher_accuracy/feedback": 0.0,
        "same_output": 0.5,
        "same_output/demonstration": 1.0,
        "same_output/feedback": 0.0,
    }
    np.testing.assert_array_equal(found["same_output"].weights, [1, 1])


# Answers


def test_a_letter_is_the_answer_however_it_is_wrapped():
    question = Question("q", "What is copper?", {"A": "gas", "B": "metal"}, "B")
    environment = Mcq([question], [])
    texts = ["<answer>B</answer>", "so the answer is (B).", "<answer>A</answer>", "none"]
    assert answers_of(environment, environment.train, texts) == ["B", "B", "A", None]


def test_calls_are_one_answer_whatever_the_order_of_their_arguments():
    environment = ToolCalls(train_prompts=1, held_out_prompts=1)
    texts = ['f(a=1, b="x")', 'f( b="x",a=1 )', 'f(a="1", b="x")', 'f(a=1.0, b="x")', "f(", "f(1)"]
    one, other, *different, broken, positional = answers_of(environment, environment.train, texts)
    assert one == other and broken is None and positional is None
    assert len({one, *different}) == 3  # as grading has it: 1, "1" and 1.0 differ


class Odd:
    def __init__(self, given):
        self.train = self.held_out = prompts({})
        self.given = given

    def grade(self, prompt, response):
        return RIGHT

    def answer(self, prompt, response):
        return self.given(response)


def test_an_answer_that_raises_or_is_no_text_is_a_bug_of_the_environment():
    with pytest.raises(UserError, match=r"answer of the environment failed for prompt 'p0' at .*"):
        answers_of(Odd(lambda text: text[5]), prompts({}), ["abc"])
    with pytest.raises(UserError, match=r"returned 3 for prompt 'p0'; expected text, or None"):
        answers_of(Odd(len), prompts({}), ["abc"])


def test_an_environment_without_answers_has_none():
    class Plain:
        train = held_out = prompts({})

        def grade(self, prompt, response):
            return RIGHT

    assert answers_of(Plain(), prompts({}), ["a"]) is None
