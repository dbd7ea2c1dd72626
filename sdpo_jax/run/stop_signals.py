"""SIGINT and SIGTERM as a request to stop after the current step. For programs, not libraries."""

import contextlib
import signal
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Whether a stop was requested: the first SIGINT or SIGTERM does, the second ends at once."""
    received: list[int] = []

    def handle(number: int, frame: object) -> None:
        del frame
        if received:
            raise KeyboardInterrupt
        received.append(number)

    try:
        old = {s: signal.signal(s, handle) for s in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # Python allows signal handlers on the main thread alone
        yield lambda: False
        return
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
