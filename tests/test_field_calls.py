"""Calls in Python's syntax and in JSON: literal values are read, and nothing else is."""

import pytest

from sdpo_jax.environments.bfcl_calls import Call, parse_call


@pytest.mark.parametrize(
    ("answer", "value"),
    [
        ("f(a=-1)", -1),
        ("f(a=+1,)", 1),
        ("[f(a=1_000)]", 1000),
        ("(f(a=0x10))", 16),
        ("f(a='x' 'y')", "xy"),
        ("f(a='''x\ny''') # done", "x\ny"),
        ("f(a=r'\\n')", "\\n"),
        ("f(a=(1, (2, 3)))", [1, [2, 3]]),
        ("f(a={'k': [None, True]})", {"k": [None, True]}),
        ('{"name": "f", "arguments": {"a": [1, {"k": null}]}}', [1, {"k": None}]),
        ('[{"arguments": {"a": 1}, "name": "f"}]', 1),
        ("```tool_code\nf(a=1)\n```", 1),
    ],
)
def test_values_of_a_call_are_those_of_python_and_json(answer, value):
    assert parse_call(answer) == Call("f", {"a": value})


@pytest.mark.parametrize(
    "answer",
    [
        *("f", "f(1)", "f(a=x)", "f(a=1+1)", "f(a=1, a=2)", "f(a=1); f(a=1)", "f(a=1)\nf(a=2)"),
        *("f(a={1: 2})", "f(a={1, 2})", "f(a=b'x')", "f(a=1j)", "f(a=...)", "f(a=f'x')", "f(a:=1)"),
        *("f(a=true)", "f(a=null)", "f(a=1).g()", "print(f(a=1))", "`f(a=1)`", "Call: f(a=1)"),
        *("x = f(a=1)", "await f(a=1)", "f(**{'a': 1})", "[f(a=1), f(a=2)]", "[[f(a=1)]]", "[]"),
        *('{"name": "f", "arguments": "a"}', '{"name": "f", "arguments": {"a": NaN}}', "```\n```"),
        '{"name": "f", "arguments": {"a": 1, "a": 2}}',
        "f(a=1 if 1 else 2)",
    ],
)
def test_whatever_is_not_one_call_with_literal_values_is_malformed(answer):
    assert isinstance(parse_call(answer), str)
