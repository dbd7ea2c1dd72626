"""What a program can make of its verdict and its feedback, by the environment that grades it."""

import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sdpo_jax.environments.base import Outcome
from sdpo_jax.environments.code.problems import Case, Equals, Problem
from sdpo_jax.environments.kinds.code import Code
from sdpo_jax.environments.sandbox import Call, Limits, Program, open_sandbox
from sdpo_jax.environments.sandbox.client import LocalSandbox

# The fallback runs with the slow tests where bubblewrap is there.
_fallback = [pytest.mark.slow] if shutil.which("bwrap") else []
TIERS = ["bubblewrap", pytest.param("landlock", marks=_fallback)]
LIMITS = Limits(cpu_seconds=1.0, wall_seconds=2.0, processes=32)
HIDDEN = (8800301, 8800302)

CHOICES = {
    # Each program would rather have no verdict than a wrong one.
    "exit status of a failed set-up": "import os\ndef oracle(n): os._exit(113)",
    "the same after a message": """
import os
def oracle(n):
    os.write(2, b'\\x1b[2Jsandbox: all tests passed'); os._exit(113)
""",
    "limits of the process above": """
import os, resource
resource.prlimit(os.getppid(), resource.RLIMIT_NOFILE, (15, 15))
def oracle(n): return 11
""",
    "a crowd that waits for the processor": """
import os, time
def oracle(n):
    for _ in range(28):
        if os.fork() == 0:
            while time.process_time() < 0.03: pass
            time.sleep(100); os._exit(0)
    time.sleep(100)
""",
    "line number of 5,000 digits": """
class E(Exception): pass
E.__name__ = 'Line ' + '9' * 5000 + ' in f (Solution.py)'
def oracle(n):
    try: raise E
    except E as e:
        e.__class__.__name__ = 'X\\n' + E.__name__; raise
""",
    "many such lines": """
def oracle(n):
    raise ValueError('\\n'.join('Line ' + '9' * k + ' in f (Solution.py)' for k in range(1, 90)))
""",
    "record of 5,000 digits": "import os\ndef oracle(n): os.write(3, b'done\\n' + b'9' * 5000)",
    "record of infrastructure": """
import os
def oracle(n): os.write(3, b'infrastructure\\nno box'); os._exit(0)
""",
    "record that is not text": """
import os
def oracle(n): os.write(3, b'done\\n\\xff\\xfe\\x00'); os._exit(0)
""",
    "stop of the process above": """
import os, signal
def oracle(n):
    os.kill(os.getppid(), signal.SIGSTOP); return 0
""",
    "end of everything": "import os\ndef oracle(n): os.kill(-1, 9); return 0",
    "stop of itself": "import os\ndef oracle(n): os.kill(os.getpid(), 19)",
}
LISTENERS = {
    # Each leaves what it sees where a later test might print it.
    "attribute of the folder": """
import os
def oracle(n):
    try: left = os.getxattr('.', 'user.l')
    except OSError: left = b''
    left += b' SEEN %d' % n
    try: os.setxattr('.', 'user.l', left)
    except OSError: pass
    print(left.decode()); return 0
""",
    "time stamp of the folder": """
import os
def oracle(n):
    print('SEEN', int(os.stat('.').st_mtime), int(os.stat('..').st_mtime))
    for path in ('.', '..'):
        try: os.utime(path, (n, n))
        except OSError: pass
    return 0
""",
    "file": """
import os
def oracle(n):
    print('SEEN', os.path.exists('left') and open('left').read())
    open('left', 'a').write(f'{n} '); return 0
""",
    "processes": """
import os, time
def oracle(n):
    print('SEEN', [open(f'/proc/{p}/cmdline').read() for p in os.listdir('/proc') if p.isdigit()])
    os.spawnlp(os.P_NOWAIT, 'sleep', 'sleep', str(n)); return 0
""",
    "frames": """
import gc, sys
def oracle(n):
    frame, seen = sys._getframe(), []
    while frame: seen.append(repr(frame.f_locals)); frame = frame.f_back
    seen += [repr(o) for o in gc.get_objects() if type(o) in (list, dict, bytes)]
    text = ''.join(seen)
    print('SEEN', [d for d in (1, 2) if 8800300 + d != n and str(8800300 + d) in text])
    return 0
""",
}


_text = Path(__file__).with_name("sandbox_honest.txt").read_text()
# Each comes close to something that the sandbox refuses or replaces; `f()` returns True.
HONEST = dict(block.split("\n", 1) for block in _text.split("### ") if block)


def problem(name: str, inputs: tuple[int, ...], shown: int = 1, prelude: str = "") -> Problem:
    """A problem whose first `shown` inputs the question shows, from the end."""
    cases = tuple(
        Case(Call("oracle", (n,)), Equals(5550000 + i), f"{n}", f"{5550000 + i}")
        for i, n in enumerate(inputs)
    )
    public = [case._replace(public=i >= len(cases) - shown) for i, case in enumerate(cases)]
    return Problem(name, "Guess.", tuple(public), limits=LIMITS, prelude=prelude)


@pytest.fixture(scope="module", params=TIERS)
def sandbox(request: pytest.FixtureRequest) -> Iterator[LocalSandbox]:
    if request.param == "bubblewrap" and not shutil.which("bwrap"):
        pytest.skip("bwrap is not installed: the bubblewrap tier is NOT tested here")
    opened = open_sandbox(request.param, slots=1)
    assert isinstance(opened, LocalSandbox)
    yield opened
    opened.close()


def grade(sandbox: LocalSandbox, problems: list[Problem], source: str) -> list[Outcome]:
    environment = Code([], problems, sandbox=sandbox, public_share=0.1)
    response = f"```python\n{source}\n```"
    return environment.grade_many(environment.held_out, [response] * len(problems))


@pytest.mark.parametrize("name", CHOICES)
def test_no_program_chooses_to_be_ungraded(sandbox: LocalSandbox, name: str) -> None:
    problems = [problem("plain", (1,)), problem("prelude", (1,), prelude="import math")]
    began = time.monotonic()
    for outcome in grade(sandbox, problems, CHOICES[name]):
        assert outcome.graded and outcome.reward == 0 and not outcome.passed
        assert "sandbox" not in outcome.feedback and "\x1b" not in outcome.feedback
    # Two tests, each within its limit of 2 s; the rest is for a busy machine.
    assert time.monotonic() - began < 20


@pytest.mark.parametrize("name", LISTENERS)
def test_feedback_holds_no_hidden_input(sandbox: LocalSandbox, name: str) -> None:
    (outcome,) = grade(sandbox, [problem("mixed", (*HIDDEN, 1))], LISTENERS[name])
    assert outcome.graded and outcome.reward == 0
    assert "SEEN" in outcome.feedback or "Runtime Error" in outcome.feedback
    found = [n for n in HIDDEN if str(n) in outcome.feedback]
    assert not found and "SEEN [1" not in outcome.feedback, outcome.feedback


def test_the_report_names_what_the_fallback_does_not_hold(sandbox: LocalSandbox) -> None:
    assert ("does not hold names" in str(sandbox.report)) == (sandbox.tier == "landlock")


def test_visible_tests_run_before_hidden_ones(sandbox: LocalSandbox) -> None:
    environment = Code([], [problem("mixed", (*HIDDEN, 1, 2), shown=2)], sandbox=sandbox)
    assert environment.held_out[0].data["task"].graded == (2, 3, 0, 1)


@pytest.mark.parametrize("name", HONEST)
def test_an_honest_program_beside_the_limits_is_done(sandbox: LocalSandbox, name: str) -> None:
    limits = Limits(cpu_seconds=3.0, wall_seconds=10.0)
    (seen,) = sandbox.run([Program(HONEST[name], (Call("f"),), limits)])[0]
    assert (seen.status, seen.value) == ("done", True), seen
