"""`import sdpo_jax` is light, complete, and its examples run."""

import doctest
import importlib
import pkgutil
import subprocess
import sys
import tomllib
from pathlib import Path

import jax.numpy as jnp
import pytest

import sdpo_jax
import sdpo_jax.losses

ROOT = Path(__file__).parent.parent
HEAVY = ["flax", "grain", "optax", "orbax", "rich", "tensorboardX", "transformers", "tyro"]
DOCUMENTED = [
    *(f"sdpo_jax.losses.{m.name}" for m in pkgutil.iter_modules(sdpo_jax.losses.__path__)),
    "sdpo_jax.teacher.weights",
]


def test_importing_the_facade_loads_jax_alone():
    code = f"import sys, sdpo_jax; print([m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_every_public_name_exists_is_documented_and_listed_once():
    assert len(set(sdpo_jax.__all__)) == len(sdpo_jax.__all__)
    for name in sdpo_jax.__all__:
        assert vars(sdpo_jax)[name].__doc__, name


def test_version_is_that_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert sdpo_jax.__version__ == project["version"]


@pytest.mark.parametrize("name", DOCUMENTED)
def test_examples_in_docstrings_run(name):
    result = doctest.testmod(importlib.import_module(name), extraglobs={"jnp": jnp})
    assert result.failed == 0
    assert result.attempted > 0
