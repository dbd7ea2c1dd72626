"""Honest programs in the sandbox: what they may use, and what is observed of them."""

import shutil
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from sdpo_jax.environments.sandbox import (
    Call,
    Check,
    Evaluate,
    Limits,
    Observation,
    Program,
    Run,
    open_sandbox,
)
from sdpo_jax.environments.sandbox.client import LocalSandbox
from sdpo_jax.errors import UserError

# The fallback runs with the slow tests where bubblewrap is there.
_fallback = [pytest.mark.slow] if shutil.which("bwrap") else []
TIERS = ["bubblewrap", pytest.param("landlock", marks=_fallback), "unsafe-local"]
QUICK = Limits(cpu_seconds=1.0, wall_seconds=5.0)

HONEST = {
    "exceptions": """
class Empty(ValueError):
    pass
def solve():
    seen = []
    for bad in ("x", None, 3):
        try:
            if bad == 3: raise Empty("three")
            int(bad)
        except Empty as error: seen.append(str(error))
        except (ValueError, TypeError) as error: seen.append(type(error).__name__)
        finally: seen.append("finally")
    return seen == ["ValueError", "finally", "TypeError", "finally", "three", "finally"]
""",
    "classes": """
import abc
class Shape(abc.ABC):
    count = 0
    def __init__(self, side): self._side = side; type(self).count += 1
    @property
    def side(self): return self._side
    @staticmethod
    def name(): return "shape"
    @classmethod
    def unit(cls): return cls(1)
    @abc.abstractmethod
    def area(self): ...
class Square(Shape):
    def __init__(self, side): super().__init__(side)
    def area(self): return self.side ** 2
def solve():
    seen = [Square(3).area(), Square.unit().side, Square.name(), hasattr(Square, "unit")]
    return seen == [9, 1, "shape", True]
""",
    "dataclasses": """
from __future__ import annotations
from dataclasses import dataclass, field, asdict
from enum import Enum
from typing import NamedTuple, Optional
class Colour(Enum):
    RED = 1
@dataclass(order=True)
class Node:
    value: int
    rest: list[int] = field(default_factory=list)
    colour: Optional[Colour] = None
class Pair(NamedTuple):
    a: int
    b: int = 2
def solve():
    best = asdict(max(Node(1), Node(2, [3])))
    return best == {"value": 2, "rest": [3], "colour": None} and sum(Pair(1)) == 3
""",
    "generators": """
def naturals():
    n = 0
    while True:
        got = yield n
        n = got if got is not None else n + 1
def flat(x):
    for item in x:
        if isinstance(item, list): yield from flat(item)
        else: yield item
def solve():
    g = naturals(); next(g)
    return [next(g), g.send(7), list(flat([1, [2, [3]]]))] == [1, 7, [1, 2, 3]]
""",
    "standard library": """
import array, bisect, calendar, cmath, collections, copy, csv, datetime, decimal, difflib, fractions
import functools, hashlib, heapq, io, itertools, json, math, operator, random, re, statistics
import string, struct, textwrap, time, timeit, typing, unicodedata, uuid, zlib, base64
import contextlib, pprint
import queue, secrets, sqlite3, tempfile, traceback, types, weakref, xml.etree.ElementTree
def solve():
    db = sqlite3.connect(":memory:")
    db.execute("create table t (x)"); db.execute("insert into t values (42)")
    found = db.execute("select x from t").fetchone()
    return found == (42,) and hashlib.sha256(b"").hexdigest()[:4] == "e3b0"
""",
    "builtins": """
def solve():
    seen = [bin(5), divmod(7, 2), oct(8), complex(1, 2).imag, bytearray(b"a")[0], id(1) > 0]
    return seen == ["0b101", (3, 1), "0o10", 2.0, 97, True] and getattr("a", "upper")() == "A"
""",
    "threads": """
import concurrent.futures
def solve():
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        return sum(pool.map(lambda x: x * x, range(5))) == 30
""",
    "asyncio": """
import asyncio
async def later(x):
    await asyncio.sleep(0.001)
    return x
async def main(): return await asyncio.gather(later(1), later(2))
def solve(): return asyncio.run(main()) == [1, 2]
""",
    "subprocess": """
import subprocess, sys
def solve():
    ran = subprocess.run([sys.executable, "-c", "print(6 * 7)"], capture_output=True, text=True)
    return ran.stdout == "42\\n"
""",
    "files": """
import os, pathlib, tempfile
def solve():
    pathlib.Path("a").mkdir()
    pathlib.Path("a/b.txt").write_text("hello")
    os.rename("a/b.txt", "c.txt")
    with tempfile.TemporaryDirectory() as d, open(d + "/x", "w") as f: f.write("x")
    with tempfile.NamedTemporaryFile() as f: pass
    return open("c.txt").read() == "hello"
""",
    "deep recursion": """
import sys
sys.setrecursionlimit(20000)
def down(n): return 0 if n == 0 else 1 + down(n - 1)
def solve(): return down(15000) == 15000
""",
    "pickle and copy": """
import copy, pickle
class P:
    def __init__(self, x): self.x = x
    def __eq__(self, other): return self.x == other.x
def solve(): return pickle.loads(pickle.dumps(P([1]))) == copy.deepcopy(P([1]))
""",
    "pattern matching": """
def kind(x):
    match x:
        case {"a": [first, *_]}: return first
        case int() | float(): return "number"
        case _: return None
def solve(): return [kind({"a": [1, 2]}), kind(2), kind("x")] == [1, "number", None]
""",
}


@pytest.fixture(scope="module", params=TIERS)
def sandbox(request: pytest.FixtureRequest) -> Iterator[LocalSandbox]:
    if request.param == "bubblewrap" and not shutil.which("bwrap"):
        pytest.skip("bwrap is not installed: the bubblewrap tier is NOT tested here")
    try:
        opened = open_sandbox(request.param, slots=2)
    except UserError as error:
        if request.param == "landlock" and "Landlock" in str(error):
            pytest.skip(f"no Landlock here: the landlock tier is NOT tested ({error})")
        raise
    assert isinstance(opened, LocalSandbox)
    yield opened
    opened.close()


def one(sandbox: LocalSandbox, source: str, test: object, limits: Limits = QUICK) -> Observation:
    return sandbox.run([Program(source, (test,), limits)])[0][0]


@pytest.mark.parametrize("name", HONEST)
def test_an_honest_program_is_done(sandbox: LocalSandbox, name: str) -> None:
    seen = one(sandbox, HONEST[name], Call("solve"))
    assert (seen.status, seen.value) == ("done", True), seen


def test_arguments_and_values_keep_their_types(sandbox: LocalSandbox) -> None:
    value = {"a": [1, 1.0, True, None, "é\n"], "b": {"c": [[]]}, "big": 10**100, "zero": -0.0}
    seen = one(sandbox, "def f(x, *, y): return x if y else None", Call("f", (value,), {"y": True}))
    assert repr(seen.value) == repr(value)
    assert one(sandbox, "def f(): return (1, (2,))", Call("f")).value == (1, (2,))


def test_a_method_of_solution_is_found(sandbox: LocalSandbox) -> None:
    source = "class Solution:\n    def add(self, a, b): return a + b"
    assert one(sandbox, source, Call("add", (1, 2))).value == 3
    missing = one(sandbox, source, Call("subtract", (1, 2)))
    assert missing.status == "error" and missing.error.startswith("NameError")


def test_evaluate_runs_the_setup_first(sandbox: LocalSandbox) -> None:
    seen = one(sandbox, "def f(x): return x + 1", Evaluate("f(y)", setup="y = 4"))
    assert seen.value == 5


def test_run_gives_standard_input_and_takes_output(sandbox: LocalSandbox) -> None:
    source = (
        "import sys\nif __name__ == '__main__':\n    print(sum(map(int, sys.stdin)))\n"
        "    print('é', file=sys.stderr)"
    )
    seen = one(sandbox, source, Run("\n".join(map(str, range(50_000)))))
    assert (seen.status, seen.stdout, seen.stderr) == ("done", "1249975000\n", "é\n")


def test_a_program_need_not_read_its_input(sandbox: LocalSandbox) -> None:
    assert one(sandbox, "print(1)", Run("x" * 1_000_000)).stdout == "1\n"


@pytest.mark.parametrize("code, status", [("0", "done"), ("None", "done"), ("3", "error")])
def test_an_exit_code_tells_how_a_script_ended(
    sandbox: LocalSandbox, code: str, status: str
) -> None:
    seen = one(sandbox, f"print('x')\nimport sys\nsys.exit({code})", Run(""))
    assert (seen.status, seen.stdout) == (status, "x\n")


def test_a_script_ends_as_an_interpreter_does(sandbox: LocalSandbox) -> None:
    source = (
        "import atexit, threading, time\natexit.register(print, 'exit')\n"
        "threading.Thread(target=lambda: (time.sleep(0.05), print('thread'))).start()"
    )
    assert one(sandbox, source, Run("")).stdout == "thread\nexit\n"


def test_a_check_is_done_unless_an_exception_leaves_it(sandbox: LocalSandbox) -> None:
    source = "def f(): return 1"
    assert one(sandbox, source, Check("assert f() == 1")).status == "done"
    failed = one(sandbox, source, Check("assert f() == 2"))
    assert (failed.status, failed.error) == ("error", "AssertionError")
    assert one(sandbox, source, Check("raise SystemExit(0)")).status == "died"


def test_an_error_names_the_programs_own_lines(sandbox: LocalSandbox) -> None:
    source = "def f(x):\n    return g(x)\ndef g(x):\n    return 1 // x\n"
    assert one(sandbox, source, Call("f", (0,))).error == (
        "ZeroDivisionError: integer division or modulo by zero\n"
        "Line 2 in f (Solution.py)\nLine 4 in g (Solution.py)"
    )
    recursion = one(sandbox, "def f(): f()", Call("f")).error.splitlines()
    assert recursion[0].startswith("RecursionError") and len(recursion) == 4


def test_a_syntax_error_names_its_line(sandbox: LocalSandbox) -> None:
    seen = one(sandbox, "x = 1\ndef f(:\n", Call("f"))
    assert seen.status == "error"
    assert seen.error == "SyntaxError: invalid syntax\nLine 2 in <module> (Solution.py)"
    null = one(sandbox, "x = '\0'", Call("f"))
    assert null.status == "error"


def test_an_error_whose_text_fails_is_still_an_error(sandbox: LocalSandbox) -> None:
    source = "class E(Exception):\n    def __str__(self): raise E()\ndef f(): raise E()"
    seen = one(sandbox, source, Call("f"))
    assert (seen.status, seen.error.splitlines()[0]) == ("error", "E")


def test_output_that_is_not_utf8_is_replaced(sandbox: LocalSandbox) -> None:
    source = "import os\nos.write(1, b'a\\xff\\x00b')"
    assert one(sandbox, source, Run("")).stdout == "a\ufffd\0b"


def test_output_is_cut_at_its_limit(sandbox: LocalSandbox) -> None:
    limits = QUICK._replace(output_bytes=100)
    within = one(sandbox, "print('x' * 99)", Run(""), limits)
    beyond = one(sandbox, "print('x' * 100)", Run(""), limits)
    assert (within.status, len(within.stdout)) == ("done", 100)
    assert (beyond.status, len(beyond.stdout)) == ("output_limit", 100)


def test_every_test_starts_from_a_fresh_process(sandbox: LocalSandbox) -> None:
    source = "state = []\ndef f():\n    state.append(1)\n    return len(state)"
    seen = sandbox.run([Program(source, (Call("f"),) * 3, QUICK)])[0]
    assert [o.value for o in seen] == [1, 1, 1]


def test_a_test_does_not_find_the_input_of_another(sandbox: LocalSandbox) -> None:
    source = """
import gc, sys
def f(word=None):
    seen, frame = [], sys._getframe()
    while frame:
        seen.append(repr(frame.f_locals)); frame = frame.f_back
    seen += [repr(o) for o in gc.get_objects() if type(o) in (dict, list, tuple) and len(o) < 50]
    return '-'.join(('token', 'of', 'a', 'test')) in ''.join(seen)
"""
    # The first test finds its own word, so the search is one that finds what is there.
    tests = (Call("f", ("token-of-a-test",)), Call("f"))
    seen = sandbox.run([Program(source, tests, QUICK._replace(cpu_seconds=5.0))])[0]
    assert [o.value for o in seen] == [True, False]


def test_the_same_program_is_observed_the_same_way(sandbox: LocalSandbox) -> None:
    source = "import time\nprint({'a', 'b', 'c', 'd'}, hash('x'), time.tzname)"
    first, second = (one(sandbox, source, Run("")).stdout for _ in range(2))
    assert first == second and "UTC" in first


def test_programs_keep_their_order_from_many_threads(sandbox: LocalSandbox) -> None:
    found: dict[int, list[int]] = {}

    def ask(worker: int) -> None:
        programs = [Program(f"def f(): return {worker * 10 + i}", (Call("f"),)) for i in range(3)]
        found[worker] = [seen[0].value for seen in sandbox.run(programs)]

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {n: [10 * n, 10 * n + 1, 10 * n + 2] for n in range(4)}


def test_a_program_without_tests_has_no_observations(sandbox: LocalSandbox) -> None:
    assert sandbox.run([Program("x = 1", ())]) == [[]]
    assert sandbox.run([]) == []


def test_cpu_time_is_observed(sandbox: LocalSandbox) -> None:
    source = "import time\ndef f(s):\n    while time.process_time() < s: pass"
    seen = one(sandbox, source, Call("f", (0.3,)))
    assert seen.status == "done" and 0.25 < seen.cpu_seconds < 0.6


def test_the_report_names_tier_and_interpreter(sandbox: LocalSandbox) -> None:
    assert sandbox.report is not None and sandbox.report.tier == sandbox.tier
    seen = one(sandbox, "import sys", Evaluate("sys.version.split()[0]"))
    assert sandbox.report.python == seen.value
    assert sandbox.report.python in str(sandbox.report)
    assert (sandbox.tier == "unsafe-local") == bool(sandbox.report.open)


@pytest.mark.parametrize("tier", ["bubblewrap", "landlock"])
def test_numpy_can_be_imported_from_a_mount(tier: str) -> None:
    import numpy

    site = str(Path(numpy.__file__).parents[1])
    try:
        sandbox = open_sandbox(tier, slots=1, mounts=(site,))
    except UserError as error:
        pytest.skip(f"numpy cannot be mounted here: {error}")
    assert isinstance(sandbox, LocalSandbox) and sandbox.report is not None
    try:
        if sandbox.report.python.rpartition(".")[0] != "{}.{}".format(*sys.version_info):
            pytest.skip(f"the boxes run Python {sandbox.report.python}, numpy is for another one")
        source = "import numpy as np\ndef f(n): return float(np.linalg.det(np.eye(n) * 2))"
        seen = one(sandbox, source, Call("f", (3,)), Limits(cpu_seconds=5.0, wall_seconds=30.0))
        assert (seen.status, round(seen.value, 6)) == ("done", 8.0), seen
        source = "import numpy as np\ndef f(a): return np.array(a).sum(), np.array(a), np.eye(1)"
        seen = one(sandbox, source, Call("f", ([1, 2],)), Limits(5.0, 30.0))
        assert seen.value == (3, [1, 2], [[1.0]]), seen
        hog = one(
            sandbox,
            "import numpy as np\ndef f(): return np.ones(1 << 30).sum()",
            Call("f"),
            Limits(cpu_seconds=5.0, wall_seconds=30.0),
        )
        assert hog.status in ("memory_limit", "error")
    finally:
        sandbox.close()
