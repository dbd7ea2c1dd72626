"""Field reports on the grading of programs, by their right values, and idiomatic programs.

A line of `honest_programs.txt` is a program and what it is tested by: input and output; arguments
and value of `f`, as JSON; or an assert. `\\n` stands for a line break, `\\|` for a bar.
"""

import json
import re
import shutil
from pathlib import Path

import pytest

from sdpo_jax.environments.code.livecodebench import read_problems
from sdpo_jax.environments.kinds.code import Code, CodeConfig, build
from sdpo_jax.environments.sandbox import open_sandbox
from sdpo_jax.errors import UserError

# The fallback runs with the slow tests where bubblewrap is there.
_fallback = [pytest.mark.slow] if shutil.which("bwrap") else []
TIERS = ["bubblewrap", pytest.param("landlock", marks=_fallback)]


@pytest.fixture(scope="module", params=TIERS)
def sandbox(request):
    if request.param == "bubblewrap" and not shutil.which("bwrap"):
        pytest.skip("bwrap is not installed: the bubblewrap tier is NOT tested here")
    try:
        opened = open_sandbox(request.param, slots=2)
    except UserError as error:
        pytest.skip(f"{request.param} is NOT tested here: {error}")
    yield opened
    opened.close()


def stdin(given, expected):
    return {"inputs": [given], "outputs": [expected], "testtype": "stdin"}


def call(arguments, expected, name="f"):
    tests = {"inputs": [arguments], "outputs": [json.dumps(expected)]}
    return {**tests, "testtype": "functional", "fn_name": name}


def asserted(*lines):
    return {"inputs": ["\n".join(lines)], "outputs": [""], "testtype": "code", "fn_name": "f"}


def live(tests):
    """The same test as a row of LiveCodeBench."""
    pairs = zip(tests["inputs"], tests["outputs"], strict=True)
    cases = [
        {"input": i if isinstance(i, str) else "\n".join(map(json.dumps, i)), "output": o}
        | {"testtype": tests["testtype"]}
        for i, o in pairs
    ]
    return {
        "question_content": "?",
        "public_test_cases": json.dumps(cases),
        "private_test_cases": "[]",
        "metadata": json.dumps({"func_name": tests["fn_name"]} if "fn_name" in tests else {}),
    }


def outcomes(sandbox, folder, rows):
    """Grades each program on its tests, all in one batch; `live` rows are LiveCodeBench's."""
    lines = [
        tests | {"question_id": str(i)}
        if "question_content" in tests
        else {"idx": str(i), "prompt": "?", "tests": tests}
        for i, (tests, _) in enumerate(rows)
    ]
    path = folder / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    environment = Code([], read_problems(path).rows, sandbox=sandbox)
    answers = [f"```python\n{program}\n```" for _, program in rows]
    return environment.grade_many(environment.held_out, answers)


SEVEN = ("3 4\n", "7\n")
ADD = "a, b = map(int, input().split())\nprint(a + b)\n"
METHOD = "class Solution:\n    def f(self, {0}:\n        {1}"
NUMBERS = "\n".join(map(str, range(100_000))) + "\n"
CASES = {
    "code-exit": (stdin(*SEVEN), ADD + "exit()", True),
    "code-starter-List": (
        live(call([[1, 2]], 3)),
        METHOD.format("nums: List[int]) -> int", "return sum(nums)"),
        True,
    ),
    "code-recursion": (
        live(call([5000], 5000)),
        METHOD.format("n)", "return 0 if n == 0 else 1 + self.f(n - 1)"),
        True,
    ),
    "code-output-64k": (
        stdin("100000\n", NUMBERS),
        "n = int(input())\nprint('\\n'.join(map(str, range(n))))",
        True,
    ),
    "code-dict-int-keys": (
        asserted("assert f([1, 1, 2]) == {1: 2, 2: 1}"),
        "def f(s):\n    return {x: s.count(x) for x in s}",
        True,
    ),
    "code-inf": (asserted("assert f(1) == float('inf')"), "def f(a): return float('inf')", True),
    "code-counter": (
        call(["aab"], {"a": 2, "b": 1}),
        "from collections import Counter\ndef f(s): return Counter(s)",
        True,
    ),
    "code-atexit": (
        stdin(*SEVEN),
        "import sys, io, atexit\nbuf = io.StringIO()\nsys.stdout = buf\n"
        "atexit.register(lambda: sys.__stdout__.write(buf.getvalue()))\n" + ADD,
        True,
    ),
    "code-redirect": (
        stdin("", "7\n"),
        "import sys, io\nold = sys.stdout\nsys.stdout = io.StringIO()\nprint(7)\n"
        "old.write(sys.stdout.getvalue())",
        True,
    ),
    "code-float-trailing": (
        live(stdin("5 2\n", "2.5\n")),
        "a, b = map(int, input().split())\nprint(f'{a / b:.6f}')",
        True,
    ),
    "code-float-trailing, plain": (stdin("", "2.5\n"), "print('2.500000')", True),
    "code-float-tol": (
        stdin("1 3\n", "0.333333333333\n"),
        "a, b = map(int, input().split())\nprint(a / b)",
        True,
    ),
    "code-float-tol, LiveCodeBench has none": (
        live(stdin("", "0.333333333333\n")),
        "print(1 / 3)",
        False,
    ),
    "code-lines": (
        live(stdin("3\n", "1 2 3\n")),
        "for i in range(1, int(input()) + 1): print(i)",
        False,
    ),
    "code-bigint": (stdin("50000\n", "1" + "0" * 50_000 + "\n"), "print(10 ** int(input()))", True),
    "code-fstat": (
        stdin(*SEVEN),
        "import io, os\ninput = io.BytesIO(os.read(0, os.fstat(0).st_size)).readline\n" + ADD,
        True,
    ),
    "code-global-before-Solution": (
        call([[1, 2]], 3),
        "def f(nums): return -1\n" + METHOD.format("nums)", "return sum(nums)"),
        True,
    ),
    "code-ok-stdin-newline": (stdin("3 4", "7"), ADD, True),
    "code-ok-crlf": (stdin("3 4\r\n", "7\r\n"), ADD, True),
    "code-ok-buffer": (
        stdin(*SEVEN),
        "import sys\na, b = map(int, sys.stdin.buffer.read().split())\n"
        "sys.stdout.buffer.write(b'%d\\n' % (a + b))",
        True,
    ),
    "code-ok-main": (
        stdin(*SEVEN),
        f"def main():\n    {ADD.strip().replace(chr(10), '; ')}\n"
        'if __name__ == "__main__":\n    main()',
        True,
    ),
    "code-ok-eof": (
        stdin("1\n2\n", "3\n"),
        "s = 0\nwhile True:\n    try:\n        s += int(input())\n"
        "    except EOFError:\n        break\nprint(s)",
        True,
    ),
    "code-ok-thread": (
        stdin("", "100000\n"),
        "import sys, threading\nsys.setrecursionlimit(10 ** 6)\n"
        "threading.stack_size(256 << 20)\ndef d(n): return 0 if n == 0 else 1 + d(n - 1)\n"
        "t = threading.Thread(target=lambda: print(d(100000)))\nt.start()\nt.join()",
        True,
    ),
    "code-ok-empty-expected": (stdin("", ""), "raise ValueError", False),
    "code-ok-eq": (
        call([2], 4),
        "class A:\n    def __eq__(self, o): return True\ndef f(n): return A()",
        False,
    ),
    "code-ok-exit0": (asserted("assert f(1) == 2"), "import sys\nsys.exit(0)", False),
    "code-ok-float-list": (call([3], [0.333333333, 1.0]), "def f(n): return [1 / n, n / n]", True),
    "h30": (stdin("x\n", "x\n"), "print(input()); quit()", True),
    "h32": (
        stdin("x\n", "x\n"),
        "import os,sys\nprint(input()); sys.stdout.flush(); os._exit(0)",
        True,
    ),
    "h47": (
        live(call([{"a": 1}, "a"], 1)),
        METHOD.format("a: Dict[str, int], k: Optional[str]) -> Optional[int]", "return a.get(k)"),
        True,
    ),
    "h63": (
        call(["aab"], {"a": 2, "b": 1}),
        "from collections import Counter\ndef f(s): return Counter(s)",
        True,
    ),
    "h64": (
        call(["aab"], {"a": 2, "b": 1}),
        "from collections import defaultdict\ndef f(s):\n    d = defaultdict(int)\n"
        "    for x in s: d[x] += 1\n    return d",
        True,
    ),
    "h67": (
        asserted("assert f([1,1,2]) == {1: 2, 2: 1}"),
        "def f(l):\n    d = {}\n    for x in l: d[x] = d.get(x, 0) + 1\n    return d",
        True,
    ),
    "h68": (
        asserted("assert f([]) == float('inf')"),
        "def f(a): return min(a, default=float('inf'))",
        True,
    ),
    "5 MB are passable": (stdin("", "x" * 5_000_000), "print('x' * 5_000_000)", True),
    "a flood is not": (stdin("", "x"), "print('x' * 300_000)", False),
    "a long value": (call([300_000], [7] * 300_000), "def f(n): return [7] * n", True),
    "exit status 1": (stdin(*SEVEN), ADD + "exit(1)", False),
    "unflushed before os._exit": (stdin(*SEVEN), ADD + "import os\nos._exit(0)", False),
    "exit before the call": (call([2], 4), "import os\nos._exit(0)", False),
}
LIES = {
    "int": "class L(int):",
    "str": "class L(str):",
    "float": "class L(float):",
    "list": "class L(list):",
    "tuple": "class L(tuple):",
    "dict": "class L(dict):",
    "set": "class L(set):",
    "frozenset": "class L(frozenset):",
    "fraction": "from fractions import Fraction\nclass L(Fraction):",
    "decimal": "from decimal import Decimal\nclass L(Decimal):",
    "deque": "from collections import deque\nclass L(deque):",
    "object": "class L:",
}
LIE = """
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __hash__(self): return 0
    def __len__(self): return 2
    def __contains__(self, other): return True
    __lt__ = __le__ = __gt__ = __ge__ = __contains__
def f(x): return L()
"""
TRUTHS = (
    *("f(1) == 3", "f(1) == 'ab'", "f(1) == 2.5", "f(1) == [1, 2]", "f(1) == (1, 2)", "2 in f(1)"),
    *("f(1) == {1: 2}", "f(1) == {1, 2}", "f(1) == float('inf')", "len(f(1)) == 2", "f(1) > 5"),
    *("sorted(f(1)) == [1, 2]", "set(f(1)) == {1, 2}", "f(1) != f(2)"),
)


def test_the_reported_cases_have_their_right_value(sandbox, tmp_path):
    seen = outcomes(sandbox, tmp_path, [(tests, program) for tests, program, _ in CASES.values()])
    for (name, (_, _, right)), outcome in zip(CASES.items(), seen, strict=True):
        assert outcome.graded and outcome.passed is right, (name, outcome)


def test_a_lying_subclass_passes_nothing(sandbox, tmp_path):
    tests = asserted(*(f"assert {truth}" for truth in TRUTHS))
    for name, outcome in zip(
        LIES, outcomes(sandbox, tmp_path, [(tests, h + LIE) for h in LIES.values()]), strict=True
    ):
        assert outcome.graded and outcome.metrics["tests_passed"] == 0.0, (name, outcome)
        assert outcome.metrics["trust_in_box"] == 0.0


def test_idiomatic_scripts_pass(sandbox, tmp_path):
    rows = [
        (stdin(*(part.replace("\\n", "\n") for part in (given, expected))), unescaped(program))
        for program, given, expected in written("STDIN")
    ]
    _all_pass(sandbox, tmp_path, rows)


def test_idiomatic_functions_pass(sandbox, tmp_path):
    rows = [
        (call(json.loads(arguments), json.loads(value)), unescaped(program))
        for program, arguments, value in written("CALLS")
    ]
    _all_pass(sandbox, tmp_path, rows)


def test_idiomatic_programs_hold_their_asserts(sandbox, tmp_path):
    rows = [
        (asserted("import math", "from fractions import Fraction", f"assert {test}"), unescaped(p))
        for p, test in written("ASSERTS")
    ]
    _all_pass(sandbox, tmp_path, rows)


def written(kind):
    """The parts of each line of a section of the file."""
    text = Path(__file__).with_name("honest_programs.txt").read_text()
    for line in text.split(f"### {kind}\n")[1].split("### ")[0].strip("\n").split("\n"):
        parts = line.replace("\\|", "\0").split(" | ")
        yield [part.strip(" ").replace("\0", "|") for part in parts]


def unescaped(program):
    """Line breaks between statements; inside quotes, `\\n` is the program's own escape."""
    pieces = re.split(r"('(?:\\.|[^'\\])*')", program)
    return "".join(p if i % 2 else p.replace("\\n", "\n") for i, p in enumerate(pieces))


def _all_pass(sandbox, folder, rows):
    assert len(rows) > 40
    seen = outcomes(sandbox, folder, rows)
    failed = [(p, o.feedback) for (_, p), o in zip(rows, seen, strict=True) if not o.passed]
    assert not failed, "\n\n".join(f"{p}\n-> {f}" for p, f in failed)


def test_the_recipe_chooses_the_prelude(tmp_path):
    path = tmp_path / "rows.jsonl"
    plain = {"idx": "plain", "prompt": "?", "tests": call([[1]], 1)}
    path.write_text(f"{json.dumps(live(call([[1]], 1)) | {'question_id': 'live'})}\n")
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps(plain))
    # The line of an error is the program's own, whatever runs before it.
    program = (
        "```python\nfrom __future__ import annotations\n{}\ndef f(a):\n    raise KeyError(1)\n```"
    )
    wanted = {"source": (True, False), "livecodebench": (True, True), "none": (False, False)}
    for prelude, known in wanted.items():
        config = CodeConfig(
            source=str(path),
            held_out_source=str(other),
            prelude=prelude,
            sandbox="unsafe-local",
            slots=1,
        )
        environment = build(config)
        for prompt, is_known in zip(
            (environment.train[0], environment.held_out[0]), known, strict=True
        ):
            outcome = environment.grade(prompt, program.format("x = Counter(List[int].__args__)"))
            assert ("KeyError" in outcome.feedback) == is_known, (prelude, outcome)
            assert ("Line 4 in f" if is_known else "Line 2 in <module>") in outcome.feedback
        environment._sandbox.close()
