"""The trusted process inside a box: forks a child per test, watches it and reports observations.

It reads frames from descriptor 0 and answers on descriptor 1. For each test it forks a supervisor
before it reads the program and the test: the supervisor reads them, forks the child that runs the
program, and watches that child. So neither process has ever held another test, a program that
searches its memory finds no other input, and one box serves many programs. Where the box allows it,
each supervisor has its own processes and files.
"""

import base64
import fcntl
import gc
import itertools
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
_STARTED = 4
"""Tells the supervisor that the child is confined; closed before the program's first line."""
_RULESET = 9
"""The ruleset's descriptor, above the five that a test gets."""
_CONFINED = b"confined"
_STDERR_BYTES = 65_536
"""Standard error is never compared: its limit does not grow with the expected text."""
_IMPORTED = (
    *("string", "re", "datetime", "collections", "heapq", "bisect", "copy", "math", "random"),
    *("statistics", "itertools", "functools", "operator", "json", "typing"),
)
"""Modules that are imported before the forks: an import in each test costs more than most tests."""


class Runner:
    """One box: its set-up, and a supervisor, a child and a new folder for each test."""

    def __init__(self, setup: Mapping[str, Any]):
        self._work: str = setup["work"]
        self._apart: bool = setup["apart"]
        self._count: bool = setup["count_processes"]
        self._filter = base64.b64decode(setup["filter"])
        self._readable: Sequence[str] | None = setup["readable"] if setup["landlock"] else None
        self._ruleset = -1

    def serve(self) -> None:
        """A supervisor for each test, until one of them ends otherwise than after its answer."""
        # A collection would copy the pages that the forks share.
        gc.disable()
        gc.freeze()
        before = 0
        for number in itertools.count():
            reading, taken = os.pipe()
            supervisor = confine.fork_apart() if self._apart else os.fork()
            if supervisor == 0:
                status = 1
                try:
                    status = self._supervise(number, taken)
                finally:
                    os._exit(status)
            os.close(taken)
            # The next supervisor is ready before the one before has ended, which takes as long.
            if before and os.waitpid(before, 0)[1]:
                os.kill(supervisor, signal.SIGKILL)
                return
            if not os.read(reading, 1):
                return
            os.close(reading)
            before = supervisor

    def _supervise(self, number: int, taken: int) -> int:
        """Answers one test; 0 if the box can take another one."""
        if (message := frames.read(0)) is None:
            return 1
        os.write(taken, b"1")
        os.close(taken)
        self._source: str = message["program"]["source"]
        self._limits: Mapping[str, Any] = message["program"]["limits"]
        trouble = ""
        try:
            self._prepare(number)
        except OSError as error:
            trouble = f"no place for a test: {error}"
        answer = self.run(message["test"], trouble)
        # An own file system ends with this process; another has to be emptied.
        answer["clean"] = self._apart or watch.remove(self._work)
        try:
            frames.write(1, answer)
        except frames.FrameError:
            # Escaped, the output of control characters is six times as long.
            answer |= {"status": "output_limit", "stdout": "", "stderr": "", "value": ""}
            frames.write(1, answer)
        return int(not answer["clean"])

    def _prepare(self, number: int) -> None:
        """Makes the test's folder and the ruleset that confines it; raises `OSError`."""
        if self._apart:
            confine.mount_own(self._work, self._limits["file_mb"])
        else:
            confine.become_subreaper()
            self._work = f"{self._work}/{number}"
            os.mkdir(self._work, 0o700)
        if self._readable is not None:
            ruleset = confine.landlock_ruleset(self._readable, self._work)
            self._ruleset = ruleset if ruleset < 0 else os.dup2(ruleset, _RULESET)

    def run(self, test: Mapping[str, Any], trouble: str = "") -> dict[str, Any]:
        """Forks the child, watches it to its end, and kills its remaining processes."""
        text = test["stdin"].encode("utf-8", "replace") if test["kind"] == "run" else b""
        stdin, stdout, stderr, result, started = (os.pipe() for _ in range(5))
        if text and self._take_file(text, stdin[0]):
            text = b""
        theirs = [stdin[0], stdout[1], stderr[1], result[1], started[1]]
        child = 0 if trouble else os.fork()
        if child == 0 and not trouble:
            self._become_child(theirs, test)
        for end in theirs:
            os.close(end)
        # Only code of ours has held this pipe, so no program can claim that we have failed.
        said = trouble.encode() or os.read(started[0], _ROOM_FOR_RECORD)
        if said != _CONFINED:
            error = said.decode("utf-8", "replace") or "a test ended before its program began"
            return {"status": "infrastructure", "error": error}
        output = self._limits["output_bytes"]
        readers = {
            stdout[0]: watch.Reader("stdout", output),
            stderr[0]: watch.Reader("stderr", min(output, _STDERR_BYTES)),
            result[0]: watch.Reader("result", output + _ROOM_FOR_RECORD),
        }
        folder = "" if self._apart else self._work
        seen = watch.watch(child, readers, (stdin[1], text), self._limits, folder)
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
        path = f"{self._work}/.stdin"
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
            os.chdir(self._work)
            os.environ.update(HOME=self._work, TMPDIR=self._work)
            gc.enable()
            confine.set_limits(self._limits, self._count)
            if self._ruleset >= 0:
                confine.restrict(self._ruleset)
            # The program could not gain rights by the ruleset's descriptor, but does not need it.
            os.closerange(_STARTED + 1, 256)
            confine.show_to_supervisor()
            if self._filter:
                confine.filter_system_calls(self._filter)
            os.write(_STARTED, _CONFINED)
            os.close(_STARTED)
        except BaseException as error:
            os.write(_STARTED, f"the box could not be closed: {error}".encode())
            os._exit(1)
        inside.run_test(self._source, test, self._limits["output_bytes"], _RESULT)


def _take_descriptors(ends: Sequence[int]) -> None:
    """Puts the pipes on 0 to 4 and renews the standard streams; the runner's own are gone."""
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
    confine.harden_runner()
    setup = frames.read(0)
    if setup is None:
        return
    sys.path[:0] = setup["paths"]
    for name in (*_IMPORTED, *(["numpy"] if setup["numpy"] else [])):
        with suppress(Exception):
            import_module(name)
    if setup["apart"]:
        confine.check_apart(setup["work"])
    runner = Runner(setup)
    frames.write(1, {"ready": True, "python": sys.version.split()[0], "prefix": sys.base_prefix})
    runner.serve()
