"""Programs that attack the sandbox: `solve()` returns 42 only if the attack worked.

Most stand in `sandbox_attacks.txt`, each under a line `### name | statuses | open | n tests`: the
statuses that its test may end with (any if none is named); `open` if the attack succeeds where
nothing holds it; `unheld on landlock` if only namespaces hold it; how often `solve()` is called,
each time in a fresh process. The text is the body of `solve`, or with `module` the whole program.
`@NAME@` is replaced by what the world of the test offers: a file outside, a listener, a process.
"""

import textwrap
from pathlib import Path
from typing import NamedTuple

WORKED = 42
_SYSTEM_CALLS = {
    # name: (x86_64, aarch64, arguments)
    "ptrace": (101, 117, "16, @VICTIM@, 0, 0"),
    "user namespace": (272, 97, "0x10000000"),
    "clone into a user namespace": (56, 220, "0x10000000 | 17, 0, 0, 0, 0"),
    "mount": (165, 40, "b'none', b'/tmp', b'tmpfs', 0, None"),
    "pivot_root": (155, 41, "b'/tmp', b'/tmp'"),
    "chroot": (161, 51, "b'/'"),
    "io_uring": (425, 425, "8, bytes(120)"),
    "bpf": (321, 280, "0, bytes(128), 128"),
    "keyctl": (250, 219, "0, -3, 1"),
    "userfaultfd": (323, 282, "1"),
    "memfd": (319, 279, "b'x', 0"),
    "personality": (135, 92, "0x0040000"),
    "perf_event_open": (298, 241, "bytes(128), 0, -1, -1, 0"),
    "System V shared memory": (29, 194, "1234, 4096, 0o1600"),
}
_CALL = """
import ctypes, platform
number = {{"x86_64": {0}, "aarch64": {1}}}[platform.machine()]
libc = ctypes.CDLL(None, use_errno=True)
return 42 if libc.syscall(number, {2}) >= 0 else ctypes.get_errno()
"""


class Attack(NamedTuple):
    name: str
    source: str
    statuses: tuple[str, ...] = ()
    open_without: bool = False
    tests: int = 1
    unheld: bool = False
    """Whether Landlock alone cannot hold it; docs/sandbox.md then has to list it."""


def _solve(body: str) -> str:
    return "def solve():\n" + textwrap.indent(body.strip("\n"), "    ") + "\n"


def _read(block: str) -> Attack:
    head, _, body = block.partition("\n")
    name, *flags = head.split(" | ")
    known = {"open", "module", "unheld on landlock"}
    numbers = [flag for flag in flags if flag.endswith(" tests")]
    statuses = [flag for flag in flags if flag not in known and flag not in numbers]
    return Attack(
        name,
        body if "module" in flags else _solve(body),
        tuple(statuses[0].split(" or ")) if statuses else (),
        "open" in flags,
        int(numbers[0].split()[0]) if numbers else 1,
        "unheld on landlock" in flags,
    )


def _all() -> list[Attack]:
    text = Path(__file__).with_suffix(".txt").read_text()
    written = [_read(block) for block in text.split("### ") if block.strip()]
    return written + [Attack(n, _solve(_CALL.format(*c))) for n, c in _SYSTEM_CALLS.items()]


ALL = _all()
