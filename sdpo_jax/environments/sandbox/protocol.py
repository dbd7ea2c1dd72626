"""The sandbox's interface: programs with their tests in, observations out.

An observation is output, value, error and CPU time. Expected results and the comparison never enter
the sandbox, so a program cannot forge a verdict. The one exception is `Check`, which decides inside
the sandbox, where the program could tamper with it.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol

Status = Literal[
    "done", "error", "time_limit", "memory_limit", "output_limit", "died", "infrastructure"
]
"""How a test ended: with a result; with an exception; by exceeding CPU time, memory or output; by
an exit without a result (`os._exit`, a signal); by a failure of the sandbox itself (a box that
could not start, wall-clock time far beyond the CPU limit), which implies nothing about the
program."""


class Limits(NamedTuple):
    """The limits of each test of a program."""

    cpu_seconds: float = 2.0
    """CPU time decides `time_limit`, so that a busy machine changes no verdict."""
    wall_seconds: float = 10.0
    """Waiting (a sleep, a lock) longer than this is a `time_limit`, too, if the CPU was idle."""
    memory_mb: int = 1024
    output_bytes: int = 65_536
    """Limit of standard output and of a returned value as text, each; standard error has at most
    64 KiB of it."""
    processes: int = 64
    file_mb: int = 16


class Call(NamedTuple):
    """Calls a function of the program (or `Solution().function`) with JSON values."""

    function: str
    arguments: tuple[Any, ...] = ()
    keywords: Mapping[str, Any] = {}


class Evaluate(NamedTuple):
    """Runs `setup` and evaluates `expression`, in the program's namespace."""

    expression: str
    setup: str = ""


class Run(NamedTuple):
    """Runs the program as `__main__` with this standard input, a file unless it is long."""

    stdin: str


class Check(NamedTuple):
    """Runs `source` in the program's namespace: `done` if no exception leaves it."""

    source: str


Test = Call | Evaluate | Run | Check


class Program(NamedTuple):
    """A program with its tests; each test starts from a fresh copy of the process."""

    source: str
    tests: tuple[Test, ...]
    limits: Limits = Limits()


class Observation(NamedTuple):
    """The observation of one test."""

    status: Status
    stdout: str = ""
    value: Any = None
    """What `Call` or `Evaluate` returned, of exact built-in types (`values.py`): a Counter becomes
    a dict, an array of numpy a list; an object of another type is an `error` that says so."""
    error: str = ""
    """`Type: message` and the program's own frames as `Line N in name (Solution.py)`, last 3."""
    stderr: str = ""
    cpu_seconds: float = 0.0


_UNHELD = {
    "landlock": "names, sizes and times of files outside, process and file numbers of other tests"
}
"""What a tier does not hold, in the words of docs/sandbox.md."""


class Report(NamedTuple):
    """The parts of a sandbox; `held` lists the attacks that it blocked, `open` the others."""

    tier: str
    interpreter: str
    python: str
    kernel: str
    held: tuple[str, ...]
    open: tuple[str, ...]

    def __str__(self) -> str:
        line = (
            f"sandbox: tier {self.tier}, Python {self.python} ({self.interpreter}), "
            f"kernel {self.kernel}, holds {', '.join(self.held) or 'nothing'}"
        )
        line += f"; does not hold {_UNHELD[self.tier]}" if self.tier in _UNHELD else ""
        return line + (f"; OPEN: {', '.join(self.open)}" if self.open else "")


class Sandbox(Protocol):
    """Runs programs, several at a time."""

    @property
    def tier(self) -> str:
        """The isolation: `bubblewrap`, `landlock`, `unsafe-local` or `remote`."""
        ...

    def run(self, programs: Sequence[Program]) -> list[list[Observation]]:
        """The observations of every test of every program, in order."""
        ...

    def close(self) -> None:
        """Ends every process of the sandbox."""
        ...
