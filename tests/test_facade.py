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
ALIASES = {"Divergence", "PerTokenLoss"}  # types of functions: a comment says what they are
TEACHERS = {"Teacher", "ema", "ema_update", "frozen", "live", "trust_region"}
PUBLIC = {n: vars(room)[n] for room in (sdpo_jax, sdpo_jax.losses) for n in room.__all__}


def test_importing_the_facade_loads_jax_alone():
    code = f"import sys, sdpo_jax; print([m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("room", [sdpo_jax, sdpo_jax.losses])
def test_every_public_name_exists_is_documented_and_listed_once(room):
    assert len(set(room.__all__)) == len(room.__all__)
    for name in room.__all__:
        assert vars(room)[name].__doc__ or name in ALIASES, name


def test_the_facade_is_a_choice_from_the_losses_and_the_teachers():
    assert set(sdpo_jax.__all__) - TEACHERS < set(sdpo_jax.losses.__all__)


def test_version_is_that_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert sdpo_jax.__version__ == project["version"]


@pytest.mark.parametrize("name", sorted(n for n, x in PUBLIC.items() if inspect.isfunction(x)))
def test_every_public_function_gives_an_example_and_its_source(name):
    text = inspect.getdoc(PUBLIC[name]) or ""
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
