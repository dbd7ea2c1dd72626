"""Every test runs on eight faked CPU devices, dtypes promote strictly and ranks not at all."""

import atexit
import os
import shutil
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"
# Commands that tests run keep compiled programs; not in the cache of whoever runs the tests.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="sdpo-jax-tests-")

import jax
import pytest
from jax_versions import enable_x64

atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


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
    with enable_x64(True):
        yield
