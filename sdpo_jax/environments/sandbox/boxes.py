"""Starts the box of each tier: a process that reads frames on descriptor 0 and answers on 1."""

import base64
import fcntl
import itertools
import os
import select
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from sdpo_jax.environments.sandbox import cgroups, frames, processes, seccomp

_UIDS = range(64001, 65534)
"""User ids of the slots if the daemon is root; distributions assign none of them."""
_PIPE_BYTES = 256 << 10
"""Room for the runner's code in the pipe of a box that does not read yet."""
_START_SECONDS = 120.0
"""Time in which a box has to start."""


class Plan(NamedTuple):
    """The parts of a tier; the daemon receives them as its first frame."""

    tier: str
    python: str
    """The interpreter of the boxes."""
    mounts: tuple[str, ...]
    """Paths bound or granted read-only, besides the system's."""
    paths: tuple[str, ...]
    """Entries for `sys.path` in the box."""
    runner: str
    """The program text that starts the runner."""
    code: str
    """The first input of that text: the runner's compiled modules, in base64."""
    bwrap: str = ""
    disable_userns: bool = False
    landlock: bool = False
    deny_signals: bool = False
    cgroup: str = ""
    """A folder of cgroup v2 for a group of each box, where one is prepared."""
    work_root: str = ""
    """Parent of the tests' directories, for a tier without a file system of its own."""


class BoxError(Exception):
    """A box could not start; the message holds what it printed."""


class Box:
    """One box: started, set up by `handshake`, given tests by `begin`, ended by `close`.

    It has to be started by a thread that outlives it: the kernel ends a box of bwrap with the
    thread that made it.
    """

    def __init__(self, plan: Plan, uid: int, numpy: bool = False):
        self._plan, self._uid = plan, uid
        self._own_uid = os.getuid() == 0 and plan.tier != "unsafe-local"
        self._work = "/tmp" if plan.bwrap else self._new_directory()
        self.numpy = numpy
        """Whether the runner has imported numpy, which costs more than most tests."""
        self.expired = False
        self.group = cgroups.Group(plan.cgroup, f"sdpo-{os.getpid()}-{next(_numbers)}")
        with _starting:
            self.process = self._start()
            _running.add(self.process.pid)
        assert self.process.stdin and self.process.stdout
        self._in, self._out = self.process.stdin.fileno(), self.process.stdout.fileno()
        # A box that has already ended is noticed at the handshake.
        with suppress(OSError):
            # Large enough that the write does not wait for the interpreter to start.
            fcntl.fcntl(self._in, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
            frames.write_all(self._in, base64.b64decode(plan.code))

    def handshake(self) -> None:
        """Sends the box its set-up; if the box did not start, closes it and raises `BoxError`."""
        ready = None
        with suppress(OSError, frames.FrameError):
            if self.process.poll() is None:
                frames.write(self._in, self._setup())
                ready = self._ready()
        # The runner may outlive its bwrap for a moment and would then end in the middle of a test.
        if ready is None or self.process.poll() is not None:
            raise BoxError(self.close() or "the box ended at its start and said nothing")
        self.group.add([self.process.pid, *processes.descendants(self.process.pid)])

    def _ready(self) -> dict[str, Any] | None:
        """The runner's first frame; None if the box ended or did not start in time."""
        waiting, deadline = select.poll(), time.monotonic() + _START_SECONDS
        waiting.register(self._out, select.POLLIN)
        # A bwrap that is killed at its start may leave a child that holds the pipe for ever.
        while not waiting.poll(1000):
            if self.process.poll() is not None or time.monotonic() > deadline:
                return None
        return frames.read(self._out)

    def _start(self) -> subprocess.Popen[bytes]:
        command = [self._plan.python, "-s", "-S", "-B", "-c", self._plan.runner]
        if self._plan.bwrap:
            command = _bubblewrap(self._plan) + command
        uid = self._uid if self._own_uid else None
        return subprocess.Popen(
            command,
            env={} if self._plan.bwrap else _environment(self._work),
            cwd="/" if self._plan.bwrap else self._work,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            user=uid,
            group=uid,
            extra_groups=None if uid is None else [],
        )

    def _new_directory(self) -> str:
        # A new name each time: the next program must not see what could not be removed.
        path = f"{self._plan.work_root}/{next(_numbers)}"
        os.mkdir(path, mode=0o700)
        if self._own_uid:
            os.chown(path, self._uid, self._uid)
        return path

    def _setup(self) -> dict[str, Any]:
        plan = self._plan
        filtered = plan.tier != "unsafe-local" and seccomp.supported()
        code = (
            seccomp.program(deny_signals=plan.deny_signals, own_files=bool(plan.bwrap))
            if filtered
            else b""
        )
        return {
            "numpy": self.numpy,
            "work": self._work,
            "paths": plan.paths,
            "landlock": plan.landlock,
            "readable": ["/usr", "/lib", "/lib64", "/bin", *plan.mounts]
            + (["/proc"] if plan.bwrap else []),
            "filter": base64.b64encode(code).decode(),
            # The limit counts all processes of the uid, so it needs a uid of the slot's own.
            "count_processes": bool(plan.bwrap) or self._own_uid,
            # Namespaces of its own for each test, whose file system bounds the files by itself.
            "apart": bool(plan.bwrap),
        }

    def begin(self, test: Mapping[str, Any], seconds: float) -> None:
        """Sends a test with `seconds` to answer it; `end` reports a box that has ended."""
        self._timer = threading.Timer(seconds, self._expire)
        self._timer.start()
        with suppress(OSError):
            frames.write(self._in, test)

    def end(self) -> dict[str, Any] | None:
        """The runner's answer; None if the box ended, with `expired` set after a timeout."""
        try:
            return frames.read(self._out)
        except (OSError, frames.FrameError):
            return None
        finally:
            self._timer.cancel()

    def _expire(self) -> None:
        self.expired = True
        self.process.kill()

    def close(self) -> str:
        """Ends the box; returns what its start-up wrote to standard error, at most 2,000 bytes."""
        process = self.process
        if not self._plan.bwrap:
            # No PID namespace ends the runner's descendants with it.
            _end(lambda: _below(process.pid))
        process.kill()
        if self._own_uid and not self._plan.bwrap:
            _end(lambda: _owned_by(self._uid))
        assert process.stdin and process.stdout and process.stderr
        os.set_blocking(process.stderr.fileno(), False)
        process.wait()
        with _starting:
            _running.discard(process.pid)
            # Orphans of a runner or bwrap are the daemon's children now and must be reaped.
            _end(lambda: [p for p in processes.children(os.getpid()) if p not in _running])
        said = ""
        with suppress(OSError):
            said = os.read(process.stderr.fileno(), 2000).decode("utf-8", "replace").strip()
        for stream in (process.stdin, process.stdout, process.stderr):
            with suppress(OSError):
                stream.close()
        if not self._plan.bwrap:
            remove(self._work)
        self.group.close()
        return said


_END_SECONDS = 5.0
_claims: list[socket.socket] = []
_numbers = itertools.count()
_starting = threading.Lock()
_running: set[int] = set()
"""Processes that the daemon itself started, so that an orphan can be told from a box."""


def _environment(work: str) -> dict[str, str]:
    """The environment variables of a box."""
    return {
        "PATH": "/usr/bin:/bin",
        "LANG": "C.UTF-8",
        "TZ": "UTC",
        "PYTHONHASHSEED": "0",
        # Each BLAS thread allocates memory as soon as it starts.
        "OPENBLAS_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "HOME": work,
        "TMPDIR": work,
    }


def _bubblewrap(plan: Plan) -> list[str]:
    """The bwrap command of a box; the order matters, because later mounts cover earlier ones.

    The runner keeps one capability, to give each test namespaces; a test has none.
    """
    command = [plan.bwrap, "--unshare-user", "--unshare-all", "--uid", "65534", "--gid", "65534"]
    command += ["--disable-userns"] if plan.disable_userns else []
    command += ["--cap-drop", "ALL", "--cap-add", "CAP_SYS_ADMIN"]
    command += ["--die-with-parent", "--new-session", "--clearenv"]
    for name, value in _environment("/tmp").items():
        command += ["--setenv", name, value]
    command += ["--ro-bind", "/usr", "/usr"]
    for path in ("/lib", "/lib64", "/bin"):
        if os.path.islink(path):
            command += ["--symlink", os.readlink(path).lstrip("/"), path]
        elif os.path.isdir(path):
            command += ["--ro-bind", path, path]
    for path in plan.mounts:
        command += ["--ro-bind", path, path]
    # The root and /dev are a tmpfs of their own, and /dev/shm would carry state to the next test.
    command += ["--proc", "/proc", "--dev", "/dev", "--remount-ro", "/dev"]
    # The devices are the machine's; anyone who may write to one may change its time stamps.
    for device in ("null", "zero", "full", "random", "urandom", "tty"):
        command += ["--remount-ro", f"/dev/{device}"]
    command += ["--tmpfs", "/tmp", "--remount-ro", "/", "--chdir", "/tmp"]
    return [*command, "--hostname", "box", "--"]


def remove(path: str) -> None:
    """Removes a directory that a program filled; `rm` copes with folders deeper than a path."""
    try:
        shutil.rmtree(path)
    except (OSError, RecursionError):
        with _starting:
            subprocess.run(["/bin/rm", "-rf", "--", path], env={}, check=False, capture_output=True)


def _below(pid: int) -> list[int]:
    # Zombies wait to be reaped by their parent and cannot be killed again.
    return [pid for pid in processes.descendants(pid) if _alive(pid)]


def _owned_by(uid: int) -> list[int]:
    found: list[int] = []
    for name in os.listdir("/proc"):
        with suppress(OSError):
            if name.isdigit() and os.stat(f"/proc/{name}").st_uid == uid and _alive(int(name)):
                found.append(int(name))
    return found


def _alive(pid: int) -> bool:
    return processes.living(pid)[1][:1] not in ([], ["Z"], ["X"])


def _end(listed: Callable[[], Sequence[int]]) -> None:
    """Stops, then kills the processes of `listed()` until none is left, so that none can fork."""
    deadline = time.monotonic() + _END_SECONDS
    while (pids := listed()) and time.monotonic() < deadline:
        processes.signal_all(pids, signal.SIGSTOP)
        processes.signal_all(pids, signal.SIGKILL)
        for pid in pids:
            with suppress(OSError):
                os.waitpid(pid, os.WNOHANG)
        time.sleep(0.001)


def close_all(plan: Plan) -> None:
    """Ends every box of this process, before the executor itself ends."""
    with _starting:
        _end(lambda: _below(os.getpid()))
    if plan.work_root:
        shutil.rmtree(plan.work_root, ignore_errors=True)


def claim_uids(count: int) -> list[int]:
    """A uid for each slot that no other executor uses, since a box's end kills all of its uid.

    The claim is an abstract socket, which the kernel drops with the process. Raises `BoxError`
    where all are taken.
    """
    found: list[int] = []
    for uid in _UIDS:
        claim = socket.socket(socket.AF_UNIX)
        try:
            claim.bind(f"\0sdpo-sandbox-uid-{uid}")
        except OSError:
            claim.close()
            continue
        _claims.append(claim)
        found.append(uid)
        if len(found) == count:
            return found
    raise BoxError(f"no uid is free for {count} slots")
