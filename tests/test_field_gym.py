"""Reports from the field about puzzles: whole answers pass, constants and parts do not."""

import re
from fractions import Fraction
from importlib import util

import pytest

from sdpo_jax.environments.gym_answers import FORMS, as_number, is_close
from sdpo_jax.environments.kinds.reasoning_gym import (
    UNSTEADY,
    UNTRUSTED,
    ReasoningGym,
    ReasoningGymConfig,
    build,
)
from sdpo_jax.errors import UserError

needs_gym = pytest.mark.skipif(
    util.find_spec("reasoning_gym") is None, reason="needs pip install reasoning-gym"
)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1,754", 1754),
        ("+01,000.00", 1000),
        ("-20", -20),
        ("\u221220", -20),
        (" 20. ", 20),
        (".5", Fraction(1, 2)),
        ("8.05E-06", Fraction(805, 10**8)),
        ("1e3", 1000),
        ("1e9999", None),
        ("17,54", None),
        ("20 or 3", None),
        ("20 apples", None),
        ("1/2", None),
        ("nan", None),
        ("inf", None),
        ("", None),
        (".", None),
        ("e5", None),
        ("\u0661", None),
        ("9" * 5000, None),
        (None, None),
    ],
)
def test_a_number_is_the_whole_text(text, value):
    assert as_number(text) == value


def test_a_ratio_and_a_rounded_number():
    assert as_number("15/64", ratio=True) == Fraction(15, 64)
    assert as_number("1/0", ratio=True) is None
    assert is_close(Fraction("0.2344"), Fraction("0.234375"))
    assert not is_close(Fraction(0), Fraction("0.00003")) and not is_close(None, Fraction(1))


@pytest.fixture(scope="module")
def puzzles():
    pytest.importorskip("reasoning_gym")
    made = {}

    def of(family, count=6):
        if family not in made:
            made[family] = ReasoningGym((family,), count, 0, seed=5)
        return made[family]

    return of


@needs_gym
@pytest.mark.parametrize("answer", ["0", "nan", "0/1", "0.2", "0.5", "1e-9", "0.234375 or 0"])
def test_a_constant_is_no_probability(answer, puzzles):
    made = puzzles("coin_flip")
    for prompt in made.train:
        outcome = made.grade(prompt, f"<answer>{answer}</answer>")
        if answer != prompt.data["entry"]["answer"]:
            assert not outcome.passed and outcome.reward == 0


CHANGES = {
    "gsm_symbolic": {
        "-{}": False, "{} or 3": False, "3 or {}": False, "{} {}": False, "{}.00": True,
        "{:,}": True, "+{}": True, "{} apples": False, "{}/1": False,
    },
    "leg_counting": {"{}.0": True, "{} {}": False, "-{}": False, "about {}": False},
    "decimal_arithmetic": {"{}0": True, "{}1": False},
    "coin_flip": {"{}": True, "{}, 0": False, "-{}": False},
    "complex_arithmetic": {"{}": True, "nan": False, "nan+nanj": False, "{} x": False},
    "number_sorting": {"{}": True, "[NaN, NaN, NaN, NaN, NaN, NaN, NaN]": False},
    "polynomial_equations": {"{}": True, "{}, zzz": False, "{}, 7": False, "{} {}": False},
    "word_sorting": {"{}": True, "{}, zzz": False},
    "fraction_simplification": {"{}": True, "{} or 1/2": False, "{}0": False},
    "game_of_life": {"{}": True, "[{}]": False},
    "knights_knaves": {"{}": True, "{} Or not.": False, "x {}": False},
    "letter_jumble": {"{}": True, "{} x": False, "{} {}": False},
    "quantum_lock": {"{}": True, "{} or no": False},
    "sokoban": {"{}": True, "go {}": False, "{}?": False},
    "survo": {"{}": True, "{} x": False, "{}\n1 2 3": False},
    "kakurasu": {"{}": True, "{} x": False},
    "time_intervals": {"{}": True, "{} x": False, "{} or 0": False, "0": False},
    "tower_of_hanoi": {"{}": True, "-{}": False},
    "advanced_geometry": {"{}": True, "{}, zzz": False},
    "puzzle24": {"{}": True, "1*1*4*6": False, "24": False, "{}+0": False, "({})*1": False},
    "countdown": {"{}": True, "{}+0.0001": False, "{}*1.0": False, "({})**1": False},
}  # fmt: skip


@needs_gym
@pytest.mark.parametrize("family", CHANGES)
def test_the_whole_answer_must_be_right(family, puzzles):
    made = puzzles(family)
    for prompt in made.train:
        oracle = prompt.data["entry"]["answer"]
        for change, passed in CHANGES[family].items():
            value = int(oracle) if "{:" in change else oracle
            outcome = made.grade(prompt, f"<answer>{change.format(value, value)}</answer>")
            assert outcome.passed == passed, (oracle, change)
            assert outcome.passed or (outcome.reward < 1 and outcome.feedback)


FURTHER = {
    "gcd": {"{}.0": True, "0{}": True, "{}e0": True, "{}%": False, "={}": False, "1{}": False},
    "basic_arithmetic": {"{}.": True, "--{}": False, "{} {}": False, "'{}'": False},
    "chain_sum": {"{}0": False, "{}, {}": False, "x = {}": False},
    "base_conversion": {"{}": True, "0x{}": False, "{} {}": False, "{}.0": False},
    "bitwise_arithmetic": {"{}": True, "{} or 0": False, "-{}": False},
    "count_primes": {"{}.0": True, "-{}": False},
    "prime_factorization": {
        "{}": True,
        "{} \u00d7 1": False,
        "1 \u00d7 {}": False,
        "{} = 1": False,
    },
    "caesar_cipher": {"{}": True, "{}!": False, "x{}": False},
    "spell_backward": {"{}": True, "{}x": False, "{}{}": False},
    "syllogism": {"{}": True, "Yes or No": False, "not {}": False, "{} {}": False},
    "family_relationships": {"{}": True, "{} or uncle": False, "{} uncle": False},
    "needle_haystack": {"{}": True, "{} or Bob": False, "Bob {}": False},
    "course_schedule": {"{}": True, "True False": False},
    "rotate_matrix": {"{}": True, "{} x": False, "{}\n{}": False},
    "mini_sudoku": {"{}": True, "{} 1": False, "{}\n{}": False},
    "futoshiki": {"{}": True, "{} 1": False, "{}\n{}": False},
    "cryptarithm": {"{}": True, "{},A=1": False, "A=5,{}": False, "{},{}": False},
    "group_anagrams": {"{}": True, "{} []": False},
    "word_ladder": {"{}": True, "{},x": False},
}
"""By generator, further changes of the oracle and whether they pass."""


@needs_gym
@pytest.mark.parametrize("family", FURTHER)
def test_no_further_change_of_an_answer_passes(family, puzzles):
    made = puzzles(family, 4)
    for prompt in made.train:
        oracle = prompt.data["entry"]["answer"]
        for change, passed in FURTHER[family].items():
            answer = change.format(oracle, oracle)
            assert made.grade(prompt, f"<answer>{answer}</answer>").passed == passed, answer


@needs_gym
def test_numbers_off_by_one_and_in_other_spellings(puzzles):
    made = puzzles("number_sorting")
    for prompt in made.train:
        numbers = re.findall(r"-?[\d.]+", prompt.data["entry"]["answer"])
        plain = ", ".join(numbers)
        off = ", ".join([*numbers[:-1], str(float(numbers[-1]) + 0.5)])
        for answer, passed in ((f"[{plain}]", True), (f"[{off}]", False)):
            assert made.grade(prompt, f"<answer>{answer}</answer>").passed == passed


@needs_gym
def test_a_generator_that_passes_a_constant_is_refused_unless_the_recipe_insists():
    assert "propositional_logic" in UNTRUSTED
    recipe = {"generators": ("gcd", "propositional_logic"), "train_prompts": 2}
    with pytest.raises(UserError, match=r"'propositional_logic' passes one constant .* set env"):
        build(ReasoningGymConfig(**recipe, held_out_prompts=0))
    made = build(ReasoningGymConfig(**recipe, held_out_prompts=0, allow_untrusted=True))
    assert len(made.train) == 2


CONSTANTS = [
    *("0", "1", "-1", "2", "nan", "inf", "1e999", "1*1*4*6", "[]", "{}", "yes", "no", "true", "X"),
    *("False", "A", "a b c", "1 2 3 4 5 6 7 8 9 10", "0, 1, 2, 3", "[0]", "None", "[[0]]", '""'),
    *(".", "0/1", "[NaN, NaN, NaN]", "nan+nanj", "A, B, C", "right", "-", "E", "20 or 3"),
]


def generators():
    if util.find_spec("reasoning_gym") is None:
        return []
    from reasoning_gym.factory import DATASETS

    return sorted(DATASETS.keys() - UNSTEADY - UNTRUSTED - {"composite"})


@pytest.mark.slow
@pytest.mark.parametrize("family", generators())
def test_constants_and_more_than_the_oracle_fail_with_every_generator(family):
    made = ReasoningGym((family,), 8, 3, seed=5)
    for prompt in [*made.train, *made.held_out]:
        oracle = prompt.data["entry"]["answer"]
        answers = list(CONSTANTS)
        if oracle is not None:
            assert made.grade(prompt, f"<answer>{oracle}</answer>").passed
            assert re.fullmatch(FORMS.get(family, ".*"), oracle.strip(), re.I | re.S)
            answers += [f"{oracle} or 0", f"{oracle}, zzz", f"{oracle}\nzzz", f"? {oracle}"]
            answers += [f"{oracle} {oracle}"] if family != "sokoban" else []
        for answer in answers:
            outcome = made.grade(prompt, f"<answer>{answer}</answer>")
            same = oracle is not None and _spelling(answer) == _spelling(oracle)
            assert same or not outcome.passed, (answer, oracle)


def _spelling(answer):
    number = as_number(answer)
    return answer.strip().casefold() if number is None else number
