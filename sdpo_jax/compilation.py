"""A persistent cache of compiled programs, and a counter of compilations.

Importing this module has no effect. The command line enters `persistent_cache`, and the training
loop enters `CompileCounter`.
"""

import contextlib
import operator
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple, Self

import jax
from jax.experimental.compilation_cache import compilation_cache

# One event per program, compiled or loaded; JAX sends it if the program is not in memory yet.
_PROGRAM_SECONDS = "/jax/core/compile/backend_compile_duration"
# One event per program found in the persistent cache; it comes before the program's seconds.
_LOADED = "/jax/compilation_cache/cache_hits"

_ENABLED, _FOLDER = "jax_enable_compilation_cache", "jax_compilation_cache_dir"
_THRESHOLDS: dict[str, Any] = {
    # By default JAX keeps programs that took a second to compile. Of the 32 programs of a short run
    # of the embedded model 16 take less: 2.0 s to compile on a CPU core, 0.05 s to read, and 60 kB.
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
}


class Compilation(NamedTuple):
    """The programs that were compiled or loaded, and the seconds that this took."""

    programs_compiled: int  # by XLA
    programs_loaded: int  # from the persistent cache
    seconds: float  # for both, without tracing and lowering


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

    def __exit__(self, *_: object) -> None:
        # If other code has cleared all listeners, JAX raises because these are not registered.
        with contextlib.suppress(AssertionError, ValueError):
            jax.monitoring.unregister_event_listener(self._on_event)
        with contextlib.suppress(AssertionError, ValueError):
            jax.monitoring.unregister_event_duration_listener(self._on_seconds)

    def total(self) -> Compilation:
        """All compilations since the counter was opened."""
        with self._lock:
            return Compilation(self._programs - self._loaded, self._loaded, self._seconds)

    def since_mark(self) -> Compilation:
        """The compilations since the last call, or since the counter was opened."""
        before, self._mark = self._mark, self.total()
        return Compilation._make(map(operator.sub, self._mark, before))

    def _on_event(self, event: str, **_: Any) -> None:
        if event == _LOADED:
            with self._lock:
                self._loaded += 1

    def _on_seconds(self, event: str, duration_secs: float, **_: Any) -> None:
        if event == _PROGRAM_SECONDS:
            with self._lock:
                self._programs += 1
                self._seconds += duration_secs


@contextlib.contextmanager
def persistent_cache(home: Callable[[], Path], note: Callable[[str], None]) -> Iterator[None]:
    """Keeps compiled programs in `home() / "compilation"` and reads them from there.

    JAX's own settings take precedence: JAX_COMPILATION_CACHE_DIR names another folder (empty:
    none), JAX_ENABLE_COMPILATION_CACHE=false disables the cache, and the thresholds' variables work
    as well. Processes may share a folder; only the first process of a run writes. On CPUs cache
    keys differ by process, so that only the first process reads, too. If a killed process left an
    incomplete entry, that program is compiled again each time, with a warning, until the entry is
    deleted.

    Args:
      home: returns the user's cache folder, which may be deleted at any time.
      note: called once with a message if the folder is not writable; there is then no cache.
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
    """Makes the folder; returns None after a note if no file can be written there."""
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
    compilation_cache.reset_cache()  # JAX reads the settings once, at its first program
