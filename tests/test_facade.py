"""`import sdpo_jax` is light, complete, and its examples run."""

import ast
import doctest
import importlib
import inspect
import pkgutil
import re
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


@pytest.mark.parametrize(
    "name", [n for n in sdpo_jax.__all__ if inspect.isfunction(vars(sdpo_jax)[n])]
)
def test_every_public_function_gives_an_example_and_its_source(name):
    text = inspect.getdoc(vars(sdpo_jax)[name]) or ""
    assert ">>>" in text, "an example"
    assert re.search(r"Source: |arXiv \d{4}\.\d{5}", text), "where it comes from"


@pytest.mark.parametrize("name", DOCUMENTED)
def test_no_function_is_longer_than_forty_lines(name):
    tree = ast.parse(Path(importlib.import_module(name).__file__ or "").read_text())
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
    lengths = {f.name: (f.end_lineno or 0) - f.lineno + 1 for f in functions}
    assert {n: length for n, length in lengths.items() if length > 40} == {}


@pytest.mark.parametrize("name", DOCUMENTED)
def test_examples_in_docstrings_run(name):
    result = doctest.testmod(importlib.import_module(name), extraglobs={"jnp": jnp})
    assert result.failed == 0
    assert result.attempted > 0
