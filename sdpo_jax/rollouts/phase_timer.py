"""Seconds and tokens per phase of a step."""

import contextlib
import time
from collections.abc import Iterator


class PhaseTimer:
    """Adds up wall-clock seconds and tokens by phase until they are read."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._tokens: dict[str, int] = {}

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Counts the time inside the block to `name`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - start
            self._seconds[name] = self._seconds.get(name, 0.0) + spent

    def add(self, name: str, other: "PhaseTimer") -> None:
        """Counts what another clock has of a phase, too."""
        spent = other._seconds.pop(name, 0.0)
        self._seconds[name] = self._seconds.get(name, 0.0) + spent

    def count(self, name: str, tokens: int) -> None:
        """Adds real tokens, without padding, to what phase `name` got through."""
        self._tokens[name] = self._tokens.get(name, 0) + tokens

    def read(self) -> dict[str, float]:
        """`seconds_PHASE` since the last reading, `tokens_per_second_PHASE` where counted."""
        out = {f"seconds_{name}": value for name, value in self._seconds.items()}
        for name, tokens in self._tokens.items():
            if name in self._seconds:  # else they were counted outside of their phase
                out[f"tokens_per_second_{name}"] = tokens / max(self._seconds[name], 1e-9)
        self._seconds, self._tokens = {}, {}
        return out


def is_time(name: str) -> bool:
    """Whether a metric measures the machine: such are not the same when a run is repeated."""
    return name.startswith(("seconds", "tokens_per_second"))
