"""The trusted process inside a box: forks a child per test, watches it and reports observations.

It reads frames from descriptor 0 and answers on descriptor 1. The program runs only in the forked
children, so nothing it does to its interpreter reaches the runner or the next test. The runner
holds one test at a time: a child that searches its memory finds no other test's input.
"""

import base64
import fcntl
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from typing import Any, TextIO, cast

from sdpo_jax.environments.sandbox import confine, frames, inside, watch

_ROOM_FOR_RECORD = 16_384
_RESULT = 3
"""The record's descriptor, after the three standard streams."""
_RULESET = 9
"""The ruleset's descriptor, above the four that a test gets."""
_STDERR_BYTES = 65_536
"""Standard error is never compared: its limit does not grow with the expected text."""
_IMPORTED = (
    *("string", "re", "datetime", "collections", "heapq", "bisect", "copy", "math", "random"),
    *("statistics", "itertools", "functools", "operator", "json", "typing", "numpy"),
)
"""Modules that are imported before the forks if the program names them: an import in each test
would cost more than most tests."""


class Runner:
    """One box: its set-up, and a fresh directory and a fork for each test."""

    def __init__(self, setup: Mapping[str, Any]):
        self._source: str = setup["source"]
        self._limits: Mapping[str, Any] = setup["limits"]
        self.work: str = setup["work"]
        self._count: bool = setup["count_processes"]
        self._filter = base64.b64decode(setup["filter"])
        self._ruleset = -1
        # A tmpfs of the box's own bounds the files by itself.
        self._watched: str = self.work if setup["watch_files"] else ""
        if setup["landlock"]:
            ruleset = confine.landlock_ruleset(setup["readable"], self.work)
            self._ruleset = ruleset if ruleset < 0 else os.dup2(ruleset, _RULESET)

    def run(self, test: Mapping[str, Any]) -> dict[str, Any]:
        """Forks the child, watches it to its end, and kills its remaining processes."""
        text = test["stdin"].encode("utf-8", "replace") if test["kind"] == "run" else b""
        stdin, stdout, stderr, result = (os.pipe() for _ in range(4))
        if text and self._take_file(text, stdin[0]):
            text = b""
        theirs = [stdin[0], stdout[1], stderr[1], result[1]]
        child = os.fork()
        if child == 0:
            self._become_child(theirs, test)
        for end in theirs:
            os.close(end)
        output = self._limits["output_bytes"]
        readers = {
            stdout[0]: watch.Reader("stdout", output),
            stderr[0]: watch.Reader("stderr", min(output, _STDERR_BYTES)),
            result[0]: watch.Reader("result", output + _ROOM_FOR_RECORD),
        }
        seen = watch.watch(child, readers, (stdin[1], text), self._limits, self._watched)
        answer = seen.observation()
        # A script that leaves by `os._exit(0)`, or becomes another program, is over without a
        # record, and what it printed counts.
        if test["kind"] == "run" and answer["status"] == "died" and seen.exit_status == 0:
            answer |= {"status": "done", "value": "null", "error": ""}
        return answer

    def _take_file(self, text: bytes, fd: int) -> bool:
        """Puts a nameless file with the text on a descriptor, as judges redirect one.

        Fast readers ask for its size, which a pipe does not have. A text that would take more than
        half of the room for files stays in the pipe (False).
        """
        path = f"{self.work}/.stdin"
        if len(text) > self._limits["file_mb"] << 19:
            return False
        try:
            with open(path, "xb") as file, open(path, "rb", buffering=0) as reading:
                os.unlink(path)
                file.write(text)
                file.flush()
                os.dup2(reading.fileno(), fd)
        except OSError:
            return False
        return True

    def _become_child(self, ends: Sequence[int], test: Mapping[str, Any]) -> None:
        try:
            _take_descriptors(ends)
            os.chdir(self.work)
            confine.set_limits(self._limits, self._count)
            if self._ruleset >= 0:
                confine.restrict(self._ruleset)
            # The program could not gain rights by the ruleset's descriptor, but does not need it.
            os.closerange(_RESULT + 1, 256)
            if self._filter:
                confine.filter_system_calls(self._filter)
        except BaseException as error:
            os.write(2, f"the box could not be closed: {error}".encode())
            os._exit(watch.SETUP_FAILED)
        inside.run_test(self._source, test, self._limits["output_bytes"], _RESULT)


def _take_descriptors(ends: Sequence[int]) -> None:
    """Puts the pipes on 0 to 3 and renews the standard streams; the runner's own are gone."""
    # Above 9, so that no target of dup2 is a source still to come.
    raised = [fcntl.fcntl(end, fcntl.F_DUPFD, 20) for end in ends]
    for target, end in enumerate(raised):
        os.dup2(end, target)
    os.closerange(_RULESET + 1, 256)
    os.setsid()
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.stdin = sys.__stdin__ = _stream(0, "r", "replace")
    sys.stdout = sys.__stdout__ = _stream(1, "w", "backslashreplace")
    sys.stderr = sys.__stderr__ = _stream(2, "w", "backslashreplace")
    sys.argv = [inside.SOLUTION]


def _stream(fd: int, mode: str, errors: str) -> TextIO:
    """A standard stream on a new descriptor: the old object holds what its predecessor buffered."""
    return cast(TextIO, open(fd, mode, encoding="utf-8", errors=errors, closefd=False))


def main() -> None:
    """Answers frames until the stream ends: first the set-up, then one test after the other."""
    # At once, because a box may wait for its program while another one runs.
    confine.harden_runner()
    setup = frames.read(0)
    if setup is None:
        return
    sys.path[:0] = setup["paths"]
    for name in _IMPORTED:
        if f"import {name}" in setup["source"] or f"from {name} " in setup["source"]:
            with suppress(Exception):
                import_module(name)
    runner = Runner(setup)
    frames.write(1, {"ready": True, "python": sys.version.split()[0], "prefix": sys.base_prefix})
    while (test := frames.read(0)) is not None:
        answer = runner.run(test)
        answer["clean"] = watch.empty(runner.work)
        try:
            frames.write(1, answer)
        except frames.FrameError:
            # Escaped, the output of control characters is six times as long.
            answer |= {"status": "output_limit", "stdout": "", "stderr": "", "value": ""}
            frames.write(1, answer)
        if not answer["clean"]:
            return
