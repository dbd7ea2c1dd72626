"""Processes of the system, for tests of what starts and ends them."""

import threading
import time
from pathlib import Path
from typing import Any

import pytest

from sdpo_jax.environments.sandbox.client import Executor
from sdpo_jax.environments.sandbox.processes import children


def tree(pid: int) -> list[int]:
    """A process and all below it."""
    found = [pid]
    for process in found:
        found += children(process)
    return found


def alive(pids: list[int]) -> list[int]:
    """Those that run: the dead count neither before nor after their parent looks."""
    found: list[int] = []
    for pid in pids:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        found += [pid] if state not in "ZX" else []
    return found


def wait_until(condition: Any, seconds: float = 120.0) -> bool:
    """Whether the condition came true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def in_background(target: Any) -> tuple[threading.Thread, list[Any]]:
    """Runs `target` in a thread; its result, or what it raised, is the list's only item."""
    found: list[Any] = []

    def work() -> None:
        try:
            found.append(target())
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread, found


def sleep_in(executor: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces each program that is sent to this executor by one whose function `f` sleeps.

    A test that kills the executor then has all the time it needs, and the next executor gets the
    programs as they are.
    """
    submit = Executor.submit

    def submit_sleeping(self: Executor, message: dict[str, Any]) -> Any:
        if self.process.pid == executor:
            limits = message["limits"] | {"wall_seconds": 600.0}
            source = "import time\ndef f(): time.sleep(600)"
            message = message | {"source": source, "limits": limits}
        return submit(self, message)

    monkeypatch.setattr(Executor, "submit", submit_sleeping)
