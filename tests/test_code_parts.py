"""Extraction, comparison, the evaluator and the conversion of asserts: all that is pure."""

import ast
import time

import pytest

from sdpo_jax.environments.code.asserts import convert_asserts
from sdpo_jax.environments.code.compare import passes, same_lines, same_words
from sdpo_jax.environments.code.expressions import EvaluationError, evaluate_text
from sdpo_jax.environments.code.extract import extract
from sdpo_jax.environments.code.problems import (
    Case,
    Equals,
    Holds,
    InBox,
    Problem,
    public_cases,
    split,
)
from sdpo_jax.environments.code.values import same_value
from sdpo_jax.environments.sandbox.protocol import Call, Check, Evaluate, Observation

# Extraction


@pytest.mark.parametrize(
    ("response", "program", "cut_off"),
    [
        ("```python\nprint(1)\n```", "print(1)", False),
        ("text\n```\na\n```\nmore\n```py\nlonger = 1\n```\n", "longer = 1", False),
        ("```\nab\n```\n```\ncd\n```", "ab", False),
        ("```python\nprint(1)", None, True),
        ("```python\na = 1\n```\n```python\nb = 2222222", "a = 1", True),
        ("no block", None, False),
        ("```python\n\n  \n```", None, False),
        ("inline ```code``` only", None, False),
        ("1. so:\n   ```python\n   if x:\n       y\n   ```", "if x:\n    y", False),
        ("````\n```\ninner\n```\n````", "```\ninner\n```", False),
        ("~~~python\na\n~~~", "a", False),
        ("```python\r\na\r\nb\r\n```\r\n", "a\nb", False),
        ("<think>```\nwrong and long\n```</think>\n```\nok\n```", "ok", False),
        ("<think>let me try\n```\ndraft\n```\nno", None, True),
        ("```python title=x\na\n```", "a", False),
    ],
)
def test_a_closed_block_is_the_program(response, program, cut_off):
    assert extract(response) == (program, cut_off)


@pytest.mark.parametrize("piece", ["```", "```\n", "```python\n", "`", "~~~\n", " ", "</think>"])
def test_extraction_is_linear_in_the_response(piece):
    start = time.process_time()
    extract(piece * (400_000 // len(piece)))
    assert time.process_time() - start < 5


# Comparison


@pytest.mark.parametrize(
    ("given", "expected", "same"),
    [
        (1, 1, True),
        (True, 1, True),
        (1, True, True),
        (True, True, True),
        (0, False, True),
        (None, None, True),
        (None, 0, False),
        (2.0, 2, True),
        (2, 2.0, True),
        (2.5, 2, False),
        (10**9 + 0.5, 10**9, False),
        (0.1 + 0.2, 0.3, True),
        (0.3001, 0.3, False),
        (1e-10, 0.0, True),
        (True, 1.0, True),
        (10**400, 1.0, False),
        ("1", 1, False),
        ("a", "a", True),
        ([1, 2], (1, 2), False),
        ([1, 2], [2, 1], False),
        ([1], [1, 1], False),
        ([[1, [True]]], [[1, [1]]], True),
        ({"a": [1.0]}, {"a": [1]}, True),
        ({"a": 1}, {"a": 1, "b": 2}, False),
        ({"a": 1}, [["a", 1]], False),
    ],
)
def test_values_are_compared_as_python_does_with_a_tolerance_for_floats(given, expected, same):
    assert same_value(given, expected) is same


def test_a_deep_value_of_a_program_exhausts_no_stack():
    deep = []
    for _ in range(100_000):
        deep = [deep]
    assert not same_value(deep, [[1]])


@pytest.mark.parametrize(
    ("given", "expected", "same"),
    [
        ("1 2\n3\n", "1 2\n3", True),
        ("1  2 \n3", "1 2\n3\n\n", True),
        ("1\n2", "1 2", True),
        ("12", "1 2", False),
        ("1.0", "1", True),
        ("0.3333333333333333", "0.333333333333", True),
        ("0.334", "0.333", False),
        ("123456789012345678", "123456789012345679", False),
        ("1e999", "1e9999", False),
        ("nan", "sNaN", False),
        ("yes", "YES", False),
        ("5", "5 -", False),
        ("", "  \n", True),
    ],
)
def test_text_is_compared_word_by_word(given, expected, same):
    assert same_words(given, expected) is same


@pytest.mark.parametrize(
    ("given", "expected", "same"),
    [
        ("1\n2\n3\n", "1 2 3", False),
        (" 1 2 \r\n3\n\n", "1 2\n3", True),
        ("1  2", "1 2", True),
        ("a  b", "a b", False),
        ("2.500000 1", "2.5 1.0", True),
        ("0.3333333333333333", "0.333333333333", False),
        ("yes 1.0", "yes 1", False),
        ("sNaN", "nan", False),
        ("", "\n", True),
    ],
)
def test_text_is_compared_line_by_line_as_livecodebench_does(given, expected, same):
    assert same_lines(given, expected) is same


def test_only_a_test_that_is_done_can_pass():
    for status in ("error", "time_limit", "memory_limit", "output_limit", "died", "infrastructure"):
        for verdict in (Equals(1), Holds("True"), InBox()):
            case = Case(Call("f"), verdict, "", "")
            assert passes(case, Observation("done", value=1))
            assert not passes(case, Observation(status, value=1))


# The evaluator


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("1 + 2 * 3 - 2 ** 3", -1),
        ("7 // 2, -7 % 3, 1 / 4", (3, 2, 0.25)),
        ("abs(_0 - 2.5) < 1e-6", True),
        ("not _1", False),
        ("_1 is True and _1 == 1", True),
        ("1 is True or (1, 2) == [1, 2]", False),
        ("{1, 2} == set(_2) or {3} < set(_2)", True),
        ("len({1, 2} | {2}) + sum(x for x in _2)", 9),
        ("Counter('aab') == {'a': 2, 'b': 1}", True),
        ("Fraction(1, 2) == 0.5 and Decimal('0.5') == 0.5", True),
        ("3 ** 10000 % 7", 4),
        ("tuple(_2) == (3, 4) and sorted([2, 1]) == [1, 2]", True),
        ("3 in _2 and 5 not in _2", True),
        ("1 < 2 < 2", False),
        ("True < 2", True),
        ("{'a': [1]}['a'][0]", 1),
        ("[i ** 2 for i in range(5) if i % 2]", [1, 9]),
        ("sum(range(101))", 5050),
        ("str(12) == '12'", True),
    ],
)
def test_literals_arithmetic_and_comparisons_are_evaluated(expression, value):
    assert evaluate_text(expression, {"_0": 2.5, "_1": True, "_2": [3, 4]}) == value


@pytest.mark.parametrize(
    "expression",
    [
        "__import__('os')",
        "().__class__",
        "open('x')",
        "(lambda: 1)()",
        "unknown",
        "9 ** 9 ** 9",
        "'a' * 10 ** 9",
        "[0] * 10 ** 9",
        "range(10 ** 9)",
        "Decimal('1e999999999')",
        "Fraction('1e999999999')",
        "b'a' * 10 ** 9",
        "'%1000000000d' % 1",
        "f'{1}'",
        "1 / 0",
        "[1][5]",
        "1 < 'a' + 1",
        "[i for i in range(3) for j in range(3)]",
        "str(10 ** 999999)",
        "-" * 500 + "1",
    ],
)
def test_all_else_is_refused(expression):
    with pytest.raises(EvaluationError):
        evaluate_text(expression, {})


# Asserts


def cases(body, **names):
    lines = "\n".join(f"    {line}" for line in body.split("\n"))
    return convert_asserts(f"def check(candidate):\n{lines}", ["f"], **names)


def test_a_call_and_a_literal_are_taken_apart():
    (case,) = cases("assert candidate([1, 2], key='a') == (3, None), 'message'")
    assert case.test == Evaluate("f([1, 2], key='a')")
    assert case.verdict == Equals((3, None))
    assert (case.input, case.expected) == ("f([1, 2], key='a')", "(3, None)")


@pytest.mark.parametrize(
    ("body", "value", "passed"),
    [
        ("assert candidate(1)", [True], True),
        ("assert candidate(1)", [0], False),
        ("assert not candidate(1)", [False], True),
        ("assert abs(candidate(2) - 0.5) < 1e-6", [0.5], True),
        ("assert abs(candidate(2) - 0.5) < 1e-6", [0.6], False),
        ("assert candidate(1) != candidate(2)", [1, 2], True),
        ("assert candidate(1) != candidate(2)", [1, 1], False),
        ("assert 1 < candidate(3) <= 5", [5], True),
        ("assert candidate(1) is True", [1], False),
        ("assert len(candidate(1)) == 2", [{1, 2}], True),
        ("assert 3 in candidate(1)", [{1, 2}], False),
        ("assert candidate(1) == {1: {2}}", {1: {2}}, True),
        ("assert candidate(1) == (1, 2)", [1, 2], False),
        ("assert candidate(1) == float('inf')", float("inf"), True),
        ("assert candidate(1) == float('nan')", float("nan"), False),
        ("x = float('inf')\nassert candidate(x) == {x}", {float("inf")}, True),
        ("assert candidate(1) < 2", ["text"], False),
        ("assert candidate(1) < 2", None, False),
    ],
)
def test_comparisons_are_made_of_observed_values(body, value, passed):
    (case,) = cases(body)
    assert isinstance(case.test, Evaluate) and isinstance(case.verdict, Holds | Equals)
    assert passes(case, Observation("done", value=value)) is passed


def test_loops_and_names_are_unrolled():
    found = cases(
        "top = 3\nassert True\nfor x in range(2, top + 1):\n    assert candidate(x) == str(x)"
    )
    assert [case.test for case in found] == [Evaluate("f(2)"), Evaluate("f(3)")]
    assert [case.verdict for case in found] == [Equals("2"), Equals("3")]


@pytest.mark.parametrize(
    "statement",
    [
        "for i in range(9):\n    x = random.random()\n    assert candidate(x) == x",
        "assert candidate(helper(1)) == 1",
        "assert candidate({1}) == frozen({1})",
        "assert False",
        "assert all(candidate(i) for i in [1, 2])",
        "with open('x') as x:\n    assert candidate(x) == 1",
    ],
)
def test_what_cannot_be_converted_runs_in_the_box_and_is_marked(statement):
    first, last = cases(f"import random\nassert candidate(0) == 0\n{statement}", helpers="h = 1")
    assert first.verdict == Equals(0)
    assert last.verdict == InBox() and isinstance(last.test, Check)
    ast.parse(last.test.source)
    assert last.test.source.startswith("h = 1\ncandidate = f\nimport random")
    assert "candidate(0)" not in last.test.source
    assert ast.unparse(ast.parse(statement)) in last.test.source


def test_a_name_that_changed_in_unknown_ways_is_no_constant():
    body = "x = 1\nx = unknown()\nassert candidate(x) == 1"
    (case,) = cases(body)
    assert case.verdict == InBox()
    (case,) = cases("i = 3\nassert [i for i in candidate(1)] == [1]")
    assert not isinstance(case.verdict, Equals)


def test_a_test_that_is_no_assert_is_not_lost():
    source = """
def same(given, wanted):
    assert given == wanted

def check(candidate):
    for given, wanted in zip([1, 2], [3, 4]):
        same(candidate(given), wanted)
"""
    (case,) = convert_asserts(source, ["f"])
    assert case.verdict == InBox() and isinstance(case.test, Check)
    for right, raised in ((True, False), (False, True)):
        scope = {"f": lambda n, right=right: n + 2 if right else 0}
        try:
            exec(case.test.source, scope)
        except AssertionError:
            assert raised
        else:
            assert not raised
    (case,) = cases("result = candidate(1)\nassert result == 2")
    assert case.verdict == InBox() and isinstance(case.test, Check)
    assert "result = candidate(1)" in case.test.source
    assert convert_asserts("def test_never_called():\n    assert f(1) == 2", ["f"]) == []


def test_asserts_at_the_top_of_a_file_count():
    assert [c.verdict for c in convert_asserts("assert f(1) == 2\nassert f(2) == 3", ["f"])] == [
        Equals(2),
        Equals(3),
    ]


def test_a_test_without_end_is_refused():
    with pytest.raises(ValueError, match="more than 1000"):
        cases("for i in range(5000):\n    assert candidate(i) == i")


# Public tests, the split


def problem(name, count, public=()):
    made = tuple(Case(Call("f", (i,)), Equals(i), "", "", i in public) for i in range(count))
    return Problem(name, "?", made)


def test_half_of_the_tests_are_public_at_least_one_and_the_same_for_the_same_seed():
    for count in range(1, 12):
        chosen = public_cases(problem("p", count), 0.5, 0)
        assert len(chosen) == max(1, count // 2)
        assert list(chosen) == sorted(set(chosen)) and set(chosen) <= set(range(count))
        assert chosen == public_cases(problem("p", count), 0.5, 0)
    many = problem("p", 40)
    assert public_cases(many, 0.5, 0) != public_cases(many, 0.5, 1)
    assert public_cases(many, 0.5, 0) != public_cases(problem("q", 40), 0.5, 0)
    assert public_cases(many, 1.0, 0) == tuple(range(40))


def test_what_the_question_shows_is_public():
    for seed in range(5):
        assert {7, 8} <= set(public_cases(problem("p", 10, {7, 8}), 0.5, seed))
    assert public_cases(problem("p", 4, {0, 1, 2}), 0.5, 0) == (0, 1, 2)


def test_a_split_shares_no_problem():
    problems = [problem(str(i), 1) for i in range(20)]
    train, held_out = split(problems, 0.25, 0)
    assert (len(train), len(held_out)) == (15, 5)
    assert {p.id for p in train} | {p.id for p in held_out} == {str(i) for i in range(20)}
    assert split(problems, 0.25, 0) == [train, held_out] != split(problems, 0.25, 1)
