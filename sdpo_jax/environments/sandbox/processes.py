"""Finds and signals the processes below the runner of a box or below the executor."""

import os
from collections.abc import Iterable
from contextlib import suppress


def children(pid: int) -> list[int]:
    """The children of a process."""
    found: list[int] = []
    with suppress(OSError):
        for task in os.listdir(f"/proc/{pid}/task"):
            with suppress(OSError), open(f"/proc/{pid}/task/{task}/children", "rb") as listing:
                found += [int(word) for word in listing.read().split()]
    return found


def descendants(pid: int) -> list[int]:
    """Every process below a process, zombies included; a subreaper has its orphans as children."""
    found = children(pid)
    for child in found:
        found += children(child)
    return found


def living(pid: int) -> tuple[str, list[str]]:
    """The folder of a process below /proc and its fields as `stat` gives them.

    Both are another thread's if the first thread has ended alone, which looks like a zombie and
    shows neither memory nor descriptors.
    """
    fields = stat(pid)
    if fields[:1] == ["Z"]:
        with suppress(OSError):
            for task in os.listdir(f"/proc/{pid}/task"):
                if (found := stat(f"{pid}/task/{task}")) and found[0] not in "ZX":
                    return f"{pid}/task/{task}", found
    return str(pid), fields


def stat(pid: int | str) -> list[str]:
    """The fields of /proc/PID/stat after the name, which may hold anything; empty if it is gone."""
    with suppress(OSError), open(f"/proc/{pid}/stat", "rb") as fields:
        return fields.read().rpartition(b")")[2].decode().split()
    return []


def signal_all(pids: Iterable[int], number: int) -> None:
    """Sends a signal to the processes that are still there."""
    for pid in pids:
        with suppress(OSError):
            os.kill(pid, number)
