"""Tables of the documentation name what exists."""

import inspect
import re
from dataclasses import fields
from pathlib import Path

import pytest
import test_architecture

import sdpo_jax
import sdpo_jax.losses
from sdpo_jax.objectives import GrpoConfig, SdftConfig, SdpoConfig
from sdpo_jax.run.recipes import default_config

ROOT = Path(__file__).parent.parent
SECTIONS = {
    "rollout": default_config().rollout,
    "teacher": default_config().teacher,
    "train": default_config().train,
    "model": default_config().model,
}
KEYS = {f"{name}.{f.name}" for name, part in SECTIONS.items() for f in fields(part)} | {
    f"objective.{f.name}" for kind in (SdpoConfig, GrpoConfig, SdftConfig) for f in fields(kind)
}
PUBLIC = {n: getattr(room, n) for room in (sdpo_jax, sdpo_jax.losses) for n in room.__all__}
FUNCTIONS = {name: x for name, x in PUBLIC.items() if inspect.isfunction(x)}
PARAMETERS = {
    parameter
    for function in FUNCTIONS.values()
    for parameter in inspect.signature(function).parameters
}


def rows(name):
    """The cells of every row of every table in a page."""
    for line in (ROOT / "docs" / name).read_text().splitlines():
        cells = [c.strip() for c in line.strip("|").split(" | ")]
        if line.startswith("|") and not set(line) <= set("|- "):
            yield cells


def names(cell):
    """Leading identifiers of whatever stands in backticks."""
    return [m.group(0) for t in re.findall(r"`([^`]+)`", cell) if (m := re.match(r"[\w.]+", t))]


@pytest.mark.parametrize(
    "cells", [r for r in rows("migration.md") if len(r) == 3 and r[2] != "here"]
)
def test_the_migration_table_names_settings_and_functions_that_exist(cells):
    for name in names(cells[2]):
        known = name in KEYS or name.split(".")[0] in PUBLIC or name in PARAMETERS
        values = {"shortest", "random", "math.inf"}
        assert known or name in values or name.startswith("losses"), name


def test_every_public_loss_is_in_the_table_of_equations():
    text = (ROOT / "docs" / "equations.md").read_text()
    assert [n for n in FUNCTIONS if f"`{n}`" not in text and f".{n}`" not in text] == []


def test_the_table_of_equations_names_functions_and_tests_that_exist():
    defined = set()
    for path in (ROOT / "tests").glob("test_*.py"):
        defined |= {path.stem, *re.findall(r"^def (test_\w+)", path.read_text(), re.M)}
    for cells in rows("equations.md"):
        for name in names(cells[-1]):
            assert name in defined or not name.startswith("test_"), name


def architecture(heading):
    """Text under a heading of docs/architecture.md."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    return text.split(f"\n## {heading}\n")[1].split("\n## ")[0]


def test_the_architecture_page_lists_the_rooms_from_top_to_bottom():
    listed = re.findall(r"^\* `(\w+)`", architecture("Rooms"), re.M)
    assert listed == list(test_architecture.ROOMS)


def test_a_step_passes_at_most_twelve_files():
    steps = re.findall(r"^(\d+)\. `([^`]+)`", architecture("One SDPO step"), re.M)
    assert [int(number) for number, _ in steps] == list(range(1, len(steps) + 1))
    assert steps[0][1].endswith("trainer.py") and 1 < len(steps) <= 12


def test_the_architecture_page_is_short_and_names_files_that_exist():
    text = (ROOT / "docs" / "architecture.md").read_text()
    paths = [t for t in re.findall(r"`([^`]+)`", text) if "/" in t]
    assert [t for t in paths if not (ROOT / t).exists()] == []
    assert len(paths) > 25 and len(text.split()) < 900
