"""Every module, function, field and file that a docstring names in full exists."""

import pkgutil
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted([*(ROOT / "sdpo_jax").rglob("*.py"), *(ROOT / "models").rglob("*.py")])
NAME = re.compile(r"`((?:sdpo_jax|sdpo_models)(?:\.\w+)+)`")
NAMES = {(path, name) for path in FILES for name in NAME.findall(path.read_text())}


@pytest.mark.parametrize("name", sorted({name for _, name in NAMES}))
def test_a_name_in_backticks_exists(name):
    where = sorted(str(path.relative_to(ROOT)) for path, n in NAMES if n == name)
    try:
        pkgutil.resolve_name(name)
    except (AttributeError, ImportError) as error:
        pytest.fail(f"{', '.join(where)}: {name} does not exist ({error})")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_that_a_module_names_exists(path):
    for name in re.findall(r"\b(?:tests|docs|configs)/\w+\.(?:py|md|toml)\b", path.read_text()):
        assert (ROOT / name).is_file(), f"{name} does not exist"
