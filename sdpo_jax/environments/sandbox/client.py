"""The trainer's side of a local sandbox: one executor process, any number of calling threads."""

import itertools
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

from sdpo_jax.environments.sandbox import boot, boxes, frames, values
from sdpo_jax.environments.sandbox.protocol import Observation, Program, Report

_ATTEMPTS = 3
"""Number of executors that are tried for a program before its tests count as not graded."""


class ExecutorEndedError(Exception):
    """The executor ended with programs in flight."""


class LocalSandbox:
    """Sends programs to an executor beside this process; `run` may be called from any thread."""

    def __init__(self, plan: boxes.Plan, slots: int):
        self._plan = plan
        self.tier = plan.tier
        """The isolation of the programs."""
        self.slots = slots
        """Programs that run at a time."""
        self._lock = threading.Lock()
        self._executor: Executor | None = None
        self._closed = False
        self.report: Report | None = None
        """The parts of the tier and the attacks that it blocked at its start."""

    @property
    def executor_pid(self) -> int | None:
        """The executor's process, once a program has run."""
        return self._executor.process.pid if self._executor else None

    def run(self, programs: Sequence[Program]) -> list[list[Observation]]:
        """The observations of every test of every program, in order.

        Raises `RuntimeError` after `close`, `TypeError` for arguments that are not JSON, and
        `frames.FrameError` for a program whose tests are longer than `frames.MAX_FRAME`.
        """
        requests = [request(program) for program in programs]
        answers: list[list[dict[str, Any]] | None] = [None] * len(programs)
        reason = ""
        for _ in range(_ATTEMPTS):
            missing = [i for i, answer in enumerate(answers) if answer is None]
            if not missing:
                break
            executor = self._running()
            futures = [(i, executor.submit(requests[i])) for i in missing]
            for i, future in futures:
                try:
                    answers[i] = future.result()
                except ExecutorEndedError as error:
                    reason = str(error)
        lost = {"status": "infrastructure", "error": reason}
        return [
            [observation(seen) for seen in answer or [lost] * len(program.tests)]
            for program, answer in zip(programs, answers, strict=True)
        ]

    def close(self) -> None:
        """Ends the executor and every box."""
        with self._lock:
            self._closed = True
            if self._executor:
                self._executor.close()
            if self._plan.work_root:
                boxes.remove(self._plan.work_root)

    def _running(self) -> "Executor":
        with self._lock:
            if self._closed:
                raise RuntimeError("the sandbox is closed; open another one")
            if self._executor is None or self._executor.ended:
                if self._executor:
                    self._executor.close()
                self._executor = Executor(self._plan, self.slots)
            return self._executor


class Executor:
    """One executor process: a future per program, a thread that reads answers."""

    def __init__(self, plan: boxes.Plan, slots: int):
        ours, theirs = socket.socketpair()
        # A fresh interpreter with nothing in its environment: a fork would carry the trainer's
        # memory along, and `PYTHON*` its settings.
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", "-c", boot.text(boot.DAEMON)],
            env={},
            cwd="/",
            stdin=theirs.fileno(),
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
        theirs.close()
        self._socket = ours
        self._pending: dict[int, Future[list[dict[str, Any]]]] = {}
        self._lock, self._sending = threading.Lock(), threading.Lock()
        self._ids = itertools.count()
        self.ended = False
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        # The reader notices an executor that ended at its start.
        with suppress(OSError):
            self._send(frames.encode({"plan": plan._asdict(), "slots": slots}))

    def submit(self, message: dict[str, Any]) -> Future[list[dict[str, Any]]]:
        """Sends a program; the future fails with `ExecutorEndedError` if the executor ends."""
        future: Future[list[dict[str, Any]]] = Future()
        number = next(self._ids)
        data = frames.encode({"id": number, **message})
        with self._lock:
            self._pending[number] = future
        try:
            self._send(data)
        except OSError:
            self.ended = True
        if self.ended:
            self._fail(number)
        return future

    def close(self) -> None:
        """Ends the process; idempotent."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        if self._reader is not threading.current_thread():
            self._reader.join(timeout=10)

    def _send(self, data: bytes) -> None:
        # A separate lock: answers must still be read while a long frame waits for room.
        with self._sending:
            frames.write_all(self._socket.fileno(), data)

    def _read(self) -> None:
        try:
            while (answer := frames.read(self._socket.fileno())) is not None:
                with self._lock:
                    future = self._pending.pop(answer["id"], None)
                if future:
                    future.set_result(answer["observations"])
        except (OSError, frames.FrameError):
            pass
        self.ended = True
        for number in list(self._pending):
            self._fail(number)
        self._socket.close()

    def _fail(self, number: int) -> None:
        with self._lock:
            future = self._pending.pop(number, None)
        if future:
            future.set_exception(ExecutorEndedError("the executor ended with the program in it"))


def request(program: Program) -> dict[str, Any]:
    """A program as a message; raises `TypeError` for arguments that are not JSON."""
    return {
        "source": program.source,
        "limits": program.limits._asdict(),
        # The kinds are call, evaluate, run and check.
        "tests": [{"kind": type(t).__name__.lower(), **t._asdict()} for t in program.tests],
    }


def observation(seen: dict[str, Any]) -> Observation:
    """An observation from the executor's message; a value that is not strict JSON is an error."""
    status, error, value = seen["status"], seen.get("error", ""), None
    if status == "done":
        try:
            value = values.loads(seen["value"])
        except values.NotJsonError as problem:
            status, error = "error", f"TypeError: {problem}"
    return Observation(
        status=status,
        stdout=seen.get("stdout", ""),
        value=value,
        error=error,
        stderr=seen.get("stderr", ""),
        cpu_seconds=seen.get("cpu_seconds", 0.0),
    )


def cores() -> int:
    """The processors that this process may use."""
    if sys.platform != "linux":
        return os.cpu_count() or 1
    return len(os.sched_getaffinity(0))
