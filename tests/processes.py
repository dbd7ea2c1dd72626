"""Processes of the system, for tests of what starts and ends them."""

import threading
import time
from pathlib import Path
from typing import Any

from sdpo_jax.environments.sandbox.boxes import children


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
