"""Groups of processes of cgroup v2: limits in sum, of memory that the kernel holds, too.

Only where an administrator has prepared a folder: one whose `cgroup.subtree_control` names memory
and pids and that this process may write. Nothing is enabled or moved but the boxes.
"""

import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

_NEEDED = {"memory", "pids"}
_ROOM_MB, _ROOM_PROCESSES = 256, 16
"""For the runner, its supervisor and files that the kernel keeps in memory."""


def prepared(process: str = "/proc/self") -> str:
    """A folder in which this process may make groups; empty if there is none."""
    with suppress(OSError, ValueError, StopIteration):
        mounts = Path(process, "mountinfo").read_text().splitlines()
        root = next(line.split()[4] for line in mounts if " - cgroup2 " in line)
        groups = Path(process, "cgroup").read_text().splitlines()
        own = Path(root, next(g[4:] for g in groups if g.startswith("0::/")))
        for folder in (own, own.parent):
            inside = folder.is_relative_to(root)
            if inside and set((folder / "cgroup.subtree_control").read_text().split()) >= _NEEDED:
                return str(folder) if os.access(folder / "cgroup.procs", os.W_OK) else ""
    return ""


class Group:
    """The group of one box; without `parent`, or where the kernel refuses, it does nothing."""

    def __init__(self, parent: str, name: str):
        self._path: Path | None = None
        with suppress(OSError):
            if parent:
                Path(parent, name).mkdir()
                self._path = Path(parent, name)

    def limit(self, limits: Mapping[str, Any]) -> None:
        """Sets the limits of the program that comes next."""
        self._write("memory.max", (limits["memory_mb"] + _ROOM_MB) << 20)
        self._write("memory.swap.max", 0)
        self._write("pids.max", limits["processes"] + _ROOM_PROCESSES)

    def add(self, pids: Iterable[int]) -> None:
        """Moves processes into the group; what they start is born in it."""
        for pid in pids:
            self._write("cgroup.procs", pid)

    def close(self) -> None:
        """Ends what is left in the group and removes it."""
        self._write("cgroup.kill", 1)
        with suppress(OSError):
            if self._path:
                self._path.rmdir()

    def _write(self, name: str, value: int) -> None:
        # A file may be missing: swap, or `cgroup.kill` before Linux 5.14.
        with suppress(OSError):
            if self._path:
                (self._path / name).write_text(str(value))
