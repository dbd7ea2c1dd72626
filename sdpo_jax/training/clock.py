"""Seconds per phase of a step."""

import contextlib
import time
from collections.abc import Iterator


class Clock:
    """Adds up wall-clock seconds by phase until they are read."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Counts the time inside the block to `name`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - start
            self._seconds[name] = self._seconds.get(name, 0.0) + spent

    def read(self) -> dict[str, float]:
        """`seconds_PHASE` since the last reading."""
        out = {f"seconds_{name}": value for name, value in self._seconds.items()}
        self._seconds = {}
        return out
