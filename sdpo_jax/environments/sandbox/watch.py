"""Watches one test from the runner: bounded reads, CPU time, wall-clock time, and the cleanup.

The CPU time of the child and its descendants decides `time_limit`. Wall-clock time counts only
while the program sleeps: the time in which it waits for a processor is not its own.
"""

import itertools
import os
import resource
import select
import signal
import stat
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from sdpo_jax.environments.sandbox import processes

_TICK = 1 / os.sysconf("SC_CLK_TCK")
_CPUCLOCK_SCHED = 2
_PAGE = os.sysconf("SC_PAGE_SIZE")
_POLL_SECONDS = 0.05
_WALL_FACTOR = 5
_PROCESS_FACTOR = 2
"""Only where the kernel does not count (a uid shared with others): its own limit comes first."""
_FREE_DESCRIPTORS, _DESCRIPTOR_BYTES = 16, 256 << 10
"""A process's further descriptors count as memory each: what a full socket holds in the kernel."""
_RECORD_STATUSES = ("done", "error", "memory_limit", "died")
_CLEANABLE_ENTRIES, _CLEANABLE_PATH = 2000, 500
"""A test that leaves more or deeper files costs its box: removing them would take longer."""


class Reader:
    """Collects a stream up to a limit and drops the rest."""

    def __init__(self, name: str, limit: int):
        self.name = name
        self.data = bytearray()
        self._limit = limit
        self.overflow = False

    def read(self, fd: int) -> bool:
        """Reads once; False at the end of the stream."""
        part = os.read(fd, 65_536)
        room = self._limit - len(self.data)
        self.data += part[:room]
        self.overflow |= len(part) > room
        return bool(part)

    @property
    def text(self) -> str:
        """The collected bytes, decoded as UTF-8 with replacement."""
        return self.data.decode("utf-8", "replace")


class Usage(NamedTuple):
    """The resources that the test's living processes use at one moment."""

    pids: list[int]
    cpu_seconds: float
    memory_bytes: int


class Seen(NamedTuple):
    """How a test ended, before it is converted to an observation."""

    verdict: str
    exit_status: int
    cpu_seconds: float
    readers: Mapping[str, Reader]
    limits: Mapping[str, Any]

    def observation(self) -> dict[str, Any]:
        """The fields of an `Observation`: JSON text as `value` if the test is done, or `error`."""
        status, text = self._ending()
        return {
            "status": status,
            "value" if status == "done" else "error": text,
            "stdout": self.readers["stdout"].text,
            "stderr": self.readers["stderr"].text,
            "cpu_seconds": round(self.cpu_seconds, 3),
        }

    def _ending(self) -> tuple[str, str]:
        limits = self.limits
        over = [r.name for r in self.readers.values() if r.overflow]
        if self.verdict == "time_limit" or self.cpu_seconds > limits["cpu_seconds"]:
            return "time_limit", ""
        if over or self.verdict == "output_limit":
            what = "the returned value" if over == ["result"] else (over or ["a file"])[0]
            return "output_limit", f"more output than allowed on {what}"
        if self.verdict == "memory_limit":
            return "memory_limit", f"more than {limits['memory_mb']} MB"
        if self.verdict == "process_limit":
            return "memory_limit", f"more than {limits['processes']} processes"
        if self.verdict == "infrastructure":
            return "infrastructure", "the machine gave the test no processor time, or its box ended"
        status, _, rest = self.readers["result"].text.partition("\n")
        if status not in _RECORD_STATUSES:
            return "died", _exit_words(self.exit_status)
        return status, rest


def _exit_words(status: int) -> str:
    if os.WIFSIGNALED(status):
        return f"the process was ended by signal {os.WTERMSIG(status)}"
    return f"the process exited with code {os.WEXITSTATUS(status)} and gave no result"


def watch(
    child: int,
    readers: Mapping[int, Reader],
    stdin: tuple[int, bytes],
    limits: Mapping[str, Any],
    files: str = "",
) -> Seen:
    """Waits for the child or the first limit, kills every descendant, drains the pipes."""
    streams = _Streams(readers, stdin, child)
    started, before = time.monotonic(), _reaped_seconds()
    # Most tests end before the first look at what they use.
    verdict, status, wait = "", 0, min(_POLL_SECONDS, limits["cpu_seconds"])
    while not verdict:
        streams.turn(wait)
        pid, exit_status = os.waitpid(child, os.WNOHANG)
        if pid:
            status = exit_status
            break
        used = usage()
        cpu = used.cpu_seconds + _reaped_seconds() - before
        wall = time.monotonic() - started
        verdict = _over(streams, used, cpu, wall, limits)
        if files and not verdict and not _small(files, limits["file_mb"] << 20, used.pids):
            verdict = "output_limit"
        left = (limits["cpu_seconds"] - cpu) / max(len(used.pids), 1)
        wait = min(_POLL_SECONDS, max(left, 0.005))
    kill_all()
    streams.drain()
    by_name = {reader.name: reader for reader in readers.values()}
    return Seen(verdict, status, _reaped_seconds() - before, by_name, limits)


def _over(
    streams: "_Streams", used: Usage, cpu: float, wall: float, limits: Mapping[str, Any]
) -> str:
    """The limit that the test has exceeded, if any."""
    if streams.closed_by_daemon:
        return "infrastructure"
    if any(reader.overflow for reader in streams.readers.values()):
        return "output_limit"
    if cpu > limits["cpu_seconds"]:
        return "time_limit"
    if used.memory_bytes > limits["memory_mb"] << 20:
        return "memory_limit"
    if len(used.pids) > _PROCESS_FACTOR * limits["processes"]:
        return "process_limit"
    if wall > limits["wall_seconds"]:
        # The longest wait, not the sum: a crowd that waits for each other would excuse itself.
        idle = wall - cpu - max(map(_waited_for_processor, used.pids), default=0.0)
        if idle > limits["wall_seconds"] / 2:
            return "time_limit"
        if wall > _WALL_FACTOR * limits["wall_seconds"]:
            return "infrastructure"
    return ""


class _Streams:
    """The pipes of a test: reads output and writes input without blocking."""

    def __init__(self, readers: Mapping[int, Reader], stdin: tuple[int, bytes], child: int):
        self.readers = dict(readers)
        # Wakes the poll at the child's end; its pipes may close earlier, or never.
        self._child = os.pidfd_open(child)
        self.closed_by_daemon = False
        self._input, self._left = stdin[0], memoryview(stdin[1])
        self._poll = select.poll()
        for fd in self.readers:
            os.set_blocking(fd, False)
            self._poll.register(fd, select.POLLIN)
        os.set_blocking(self._input, False)
        self._poll.register(self._input, select.POLLOUT)
        # The daemon's end of the stream: once it closes, no one needs this test.
        self._poll.register(0, 0)
        self._poll.register(self._child, select.POLLIN)
        if not self._left:
            self._close_input()

    def turn(self, seconds: float) -> None:
        """Waits for traffic, at most for the given time, and transfers what it can."""
        for fd, _ in self._poll.poll(int(seconds * 1000)):
            if fd == 0:
                self.closed_by_daemon = True
            elif fd == self._input:
                self._write()
            elif fd != self._child and not self._read(fd):
                self._close(fd)

    def drain(self) -> None:
        """Reads the rest of the pipes after all processes ended, then closes them."""
        self._close(self._child)
        for fd, reader in list(self.readers.items()):
            while not reader.overflow and self._read(fd):
                pass
            self._close(fd)
        if self._input >= 0:
            self._close_input()

    def _read(self, fd: int) -> bool:
        try:
            return self.readers[fd].read(fd)
        except BlockingIOError:
            # A descendant that is just being killed still holds the pipe; no more data comes.
            return False

    def _write(self) -> None:
        try:
            self._left = self._left[os.write(self._input, self._left[:65_536]) :]
        except BlockingIOError:
            return
        except OSError:
            # The program closed its standard input and does not read the rest.
            self._left = memoryview(b"")
        if not self._left:
            self._close_input()

    def _close_input(self) -> None:
        self._close(self._input)
        self._input = -1

    def _close(self, fd: int) -> None:
        self._poll.unregister(fd)
        os.close(fd)
        self.readers.pop(fd, None)


def usage() -> Usage:
    """CPU time and memory of all living descendants of the supervisor."""
    pids = processes.descendants(os.getpid())
    cpu, memory = 0.0, 0
    for pid in pids:
        folder, fields = processes.living(pid)
        if fields:
            cpu += _spent(pid, fields)
            memory += int(fields[21]) * _PAGE
            memory += max(_descriptors(folder) - _FREE_DESCRIPTORS, 0) * _DESCRIPTOR_BYTES
    return Usage(pids, cpu, memory)


def _descriptors(folder: str) -> int:
    with suppress(OSError):
        # Kernels before 6.2 give no number here.
        path = f"/proc/{folder}/fd"
        return os.stat(path).st_size or len(os.listdir(path))
    return 0


def _spent(pid: int, fields: Sequence[str]) -> float:
    """CPU seconds of a process and of the children it has waited for."""
    own, reaped = (sum(map(int, fields[i : i + 2])) * _TICK for i in (11, 13))
    # The process's clock, as clock_getcpuclockid names it: /proc counts whole ticks of 10 ms.
    with suppress(OSError):
        own = time.clock_gettime(~pid << 3 | _CPUCLOCK_SCHED)
    return own + reaped


def _waited_for_processor(pid: int) -> float:
    """Seconds that a thread of the process was ready to run and had no processor, the most."""
    most = 0.0
    with suppress(OSError, IndexError, ValueError):
        for task in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{task}/schedstat", "rb") as times:
                most = max(most, int(times.read().split()[1]) / 1e9)
    return most


def _reaped_seconds() -> float:
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    return spent.ru_utime + spent.ru_stime


def kill_all() -> None:
    """Ends every descendant: stops them first, so that none forks a successor meanwhile."""
    supervisor = os.getpid()
    if supervisor == 1:
        # All but this process of an own namespace, at once.
        with suppress(OSError):
            os.kill(-1, signal.SIGKILL)
    while pids := processes.descendants(supervisor):
        processes.signal_all(pids, signal.SIGSTOP)
        processes.signal_all({*pids, *processes.descendants(supervisor)}, signal.SIGKILL)
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
    with suppress(ChildProcessError):
        while True:
            os.waitpid(-1, 0)


def _small(path: str, limit: int, pids: Sequence[int]) -> bool:
    """Whether a test's files take less than `limit` bytes in a bounded number of entries."""
    limit -= _nameless(path, limit, pids)
    entries, directories = _CLEANABLE_ENTRIES, [path]
    for directory in directories:
        # The program may rename and remove files meanwhile; missing ones are not counted.
        with suppress(OSError):
            for entry in os.scandir(directory):
                entries -= 1
                limit -= entry.stat(follow_symlinks=False).st_blocks * 512
                if limit < 0 or entries < 0 or len(entry.path) > _CLEANABLE_PATH:
                    return False
                if entry.is_dir(follow_symlinks=False):
                    directories.append(entry.path)
    return limit >= 0


def _nameless(path: str, limit: int, pids: Sequence[int]) -> int:
    """Bytes of removed files that processes hold open; a mapped one counts as `limit`."""
    blocks: dict[int, int] = {}
    mapped: set[int] = set()
    for pid in pids:
        folder = processes.living(pid)[0]
        with suppress(OSError), open(f"/proc/{folder}/maps", "rb") as maps:
            gone = [m for m in maps if m.endswith(b"(deleted)\n") and path.encode() in m]
            mapped |= {int(line.split()[4]) for line in gone}
        with suppress(OSError):
            for entry in os.scandir(f"/proc/{folder}/fd"):
                with suppress(OSError):
                    seen = entry.stat()
                    if stat.S_ISREG(seen.st_mode) and not seen.st_nlink:
                        blocks[seen.st_ino] = seen.st_blocks * 512
    return sum(blocks.values()) + limit * len(mapped - set(blocks))


def remove(path: str) -> bool:
    """Removes a folder; False if too much is left in it, so that a new box is needed."""
    left, directories = _CLEANABLE_ENTRIES, [path]
    try:
        for directory in directories:
            os.chmod(directory, 0o700)
            if len(directory) > _CLEANABLE_PATH:
                return False
            entries = list(itertools.islice(os.scandir(directory), left + 1))
            left -= len(entries)
            if left < 0:
                return False
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    directories.append(entry.path)
                else:
                    os.unlink(entry.path)
        for directory in reversed(directories):
            os.rmdir(directory)
    except OSError:
        return False
    return True
