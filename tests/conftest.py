"""Every test runs on eight faked CPU devices, dtypes promote strictly and ranks not at all.

Compiled programs are kept in one folder for the length of a run, which all workers share: a program
that several tests build, in one process or in several, is compiled once.
"""

import atexit
import os
import shutil
import tempfile
from pathlib import Path

FOLDER = "SDPO_JAX_TESTS_FOLDER"
if FOLDER not in os.environ:  # set by the process that starts the workers
    os.environ[FOLDER] = tempfile.mkdtemp(prefix="sdpo-jax-tests-")
    atexit.register(shutil.rmtree, os.environ[FOLDER], ignore_errors=True)
RUN = Path(os.environ[FOLDER])

os.environ["JAX_PLATFORMS"] = "cpu"
# Commands that tests run keep compiled programs; not in the cache of whoever runs the tests. A
# folder for each worker: a command would warn of an entry that another one is just writing.
os.environ["XDG_CACHE_HOME"] = str(RUN / os.environ.get("PYTEST_XDIST_WORKER", "main"))

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
if jax.config.jax_compilation_cache_dir is None:
    jax.config.update("jax_compilation_cache_dir", str(RUN / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def pytest_configure(config):
    """A warning that our own code causes is an error; other packages' are their own affair."""
    config.addinivalue_line("filterwarnings", "error:::sdpo_jax")
    config.addinivalue_line("filterwarnings", "error:::sdpo_models")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers():
    """For `-n auto`: each of the workers holds compiled programs, about a gigabyte of them."""
    return min(8, os.cpu_count() or 1)


@pytest.fixture
def x64():
    """float64 for the length of one test."""
    with jax.enable_x64(True):
        yield
