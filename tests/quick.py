"""Cheap compilation, each program once, on one device: for tests that build programs anew."""

import contextlib

import jax
import pytest
import tiny
from jax.experimental.compilation_cache import compilation_cache

from sdpo_jax.training import trainer


@contextlib.contextmanager
def programs(folder):
    """Inside, trainers have one device and compiled programs are kept in the folder."""
    settings = {
        "jax_compilation_cache_dir": str(folder),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "make_mesh", lambda config: tiny.make_devices().mesh)
        patch.setattr(jax, "jit", tiny.quick_jit)
        for name, value in settings.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
