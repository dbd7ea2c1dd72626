"""Every test runs on eight faked CPU devices, dtypes promote strictly and ranks not at all.

Compiled programs are kept in pytest's cache folder, which the workers of a run share: a program
that several tests build is compiled once, and in the next run not at all. `--cache-clear` deletes
them.
"""

import atexit
import gc
import os
import shutil
import tempfile
import time
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
# Tests run many small programs once: less optimization compiles them in two thirds of the time.
os.environ.setdefault(
    "XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)
# Commands that tests run keep compiled programs; not in the cache of whoever runs the tests.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="sdpo-jax-tests-")

import hypothesis
import jax
import pytest
from jax_versions import enable_x64

atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# On a busy machine an example takes as long as it takes.
hypothesis.settings.register_profile(
    "busy", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("busy")

FOLDER = "jax_compilation_cache_dir"
KEEP_SECONDS = 7 * 24 * 3600


def pytest_configure(config):
    """A warning that our own code causes is an error; other packages' are their own affair."""
    config.addinivalue_line("filterwarnings", "error:::sdpo_jax")
    config.addinivalue_line("filterwarnings", "error:::sdpo_models")
    # JAX_COMPILATION_CACHE_DIR names another folder; `-p no:cacheprovider` keeps nothing.
    if getattr(jax.config, FOLDER) is None and hasattr(config, "cache"):
        keep_programs(config.cache.mkdir("compiled"))


def pytest_addoption(parser):
    text = "only tests that the run before skipped: once what they need is installed"
    parser.addoption("--skipped-before", action="store_true", help=text)


def pytest_collection_modifyitems(config, items):
    """A module that was skipped as a whole is known by its path alone."""
    if config.getoption("--skipped-before"):
        skipped = set(config.cache.get("sdpo-jax/skipped", []))
        chosen = [x for x in items if skipped & {x.nodeid, x.nodeid.split("::")[0]}]
        config.hook.pytest_deselected(items=[x for x in items if x not in chosen])
        items[:] = chosen


def pytest_terminal_summary(terminalreporter, config):
    if "PYTEST_XDIST_WORKER" not in os.environ and hasattr(config, "cache"):
        skipped = {report.nodeid for report in terminalreporter.stats.get("skipped", [])}
        config.cache.set("sdpo-jax/skipped", sorted(skipped))


def keep_programs(folder):
    """Compiled programs are written there and read from there, and deleted after a week."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        for path in folder.iterdir():
            if time.time() - path.stat().st_mtime > KEEP_SECONDS:
                path.unlink()
    jax.config.update(FOLDER, str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers():
    """For `-n auto`: each of the workers holds compiled programs, about a gigabyte of them."""
    return min(8, os.cpu_count() or 1)


@pytest.fixture(scope="module", autouse=True)
def few_mappings():
    """Frees compiled programs once they are many: Linux allows 65,530 memory mappings."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 30_000:
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def x64():
    """float64 for the length of one test."""
    with enable_x64(True):
        yield
