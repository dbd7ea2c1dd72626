"""Compiled programs: kept on disk from one process to the next, and counted.

Nothing acts on import. The command line enters `persistent_cache`, the loop `CompileCounter`.
"""

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Any, NamedTuple, Self

import jax
from jax.experimental.compilation_cache import compilation_cache

# One a program, built or loaded; JAX sends it where a program is not in this process' memory yet.
_PROGRAM_SECONDS = "/jax/core/compile/backend_compile_duration"
# One a program that the persistent cache held; comes before the program's seconds.
_LOADED = "/jax/compilation_cache/cache_hits"

_ENABLED, _FOLDER = "jax_enable_compilation_cache", "jax_compilation_cache_dir"
_THRESHOLDS: dict[str, Any] = {
    # By default JAX keeps what took a second. Of the 32 programs of a short run of the embedded
    # model 16 take less: on a CPU core 2.0 s to build, 0.05 s to read, and 60 kB.
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
}


class Compilation(NamedTuple):
    """Programs that a process did not have in memory, and what it took to get them."""

    programs_compiled: int  # built anew
    programs_loaded: int  # read from the persistent cache
    seconds: float  # both; without the tracing and lowering that precede


class CompileCounter:
    """Counts the programs of this process while it is open; several may be open at once.

    with CompileCounter() as counter:
        ...
        counter.since_mark()
    """

    def __init__(self) -> None:
        self._lock = Lock()  # JAX compiles in any thread
        self._programs, self._loaded, self._seconds = 0, 0, 0.0
        self._mark = self.total()

    def __enter__(self) -> Self:
        jax.monitoring.register_event_listener(self._on_event)
        jax.monitoring.register_event_duration_secs_listener(self._on_seconds)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # Somebody may have cleared all listeners; JAX then asserts that ours is there.
        with contextlib.suppress(AssertionError, ValueError):
            jax.monitoring.unregister_event_listener(self._on_event)
        with contextlib.suppress(AssertionError, ValueError):
            jax.monitoring.unregister_event_duration_listener(self._on_seconds)

    def total(self) -> Compilation:
        """Everything since the counter was opened."""
        with self._lock:
            return Compilation(self._programs - self._loaded, self._loaded, self._seconds)

    def since_mark(self) -> Compilation:
        """What came since the last call, or since the counter was opened."""
        before, self._mark = self._mark, self.total()
        return Compilation(
            self._mark.programs_compiled - before.programs_compiled,
            self._mark.programs_loaded - before.programs_loaded,
            self._mark.seconds - before.seconds,
        )

    def _on_event(self, event: str, **details: Any) -> None:
        del details
        if event == _LOADED:
            with self._lock:
                self._loaded += 1

    def _on_seconds(self, event: str, duration_secs: float, **details: Any) -> None:
        del details
        if event == _PROGRAM_SECONDS:
            with self._lock:
                self._programs += 1
                self._seconds += duration_secs


@contextlib.contextmanager
def persistent_cache(home: Callable[[], Path], note: Callable[[str], None]) -> Iterator[None]:
    """Keeps compiled programs in `home() / "compilation"` and reads them from there.

    JAX's own settings win: JAX_COMPILATION_CACHE_DIR names another folder (empty: none),
    JAX_ENABLE_COMPILATION_CACHE=false switches off, and so on with the thresholds. Processes may
    share a folder; of one run only the first writes. On CPUs keys differ by process, so that only
    the first reads, too. An entry that a killed process left half written is compiled anew each
    time, with a warning, until it is deleted.

    Args:
      home: the user's cache folder; may be deleted at any time.
      note: told once if the folder cannot be written; the block then runs without a cache.
    """
    settings: dict[str, Any] = {
        name: value for name, value in _THRESHOLDS.items() if name.upper() not in os.environ
    }
    if _setting(_ENABLED) and _setting(_FOLDER) is None:
        settings[_FOLDER] = _writable(home, note)
    before = {name: _setting(name) for name in settings}
    _set(settings)
    try:
        yield
    finally:
        _set(before)


def _writable(home: Callable[[], Path], note: Callable[[str], None]) -> str | None:
    """The folder, made; None, and a note, if no file can be written there."""
    try:
        folder = home() / "compilation"
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, RuntimeError) as error:  # RuntimeError: this user has no home
        note(
            f"cache     compiled programs are not kept: {error}. "
            "Set JAX_COMPILATION_CACHE_DIR to a folder that can be written."
        )
        return None
    return str(folder)


def _setting(name: str) -> Any:
    return getattr(jax.config, name)


def _set(settings: dict[str, Any]) -> None:
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()  # JAX looks at the settings once, at its first program
