"""A lower layer never imports a higher one, and the loss library imports jax alone."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYER = {
    "losses": 0,
    "model": 0,
    "errors": 0,
    "compilation": 0,
    "config": 0,
    "config_environments": 0,
    "config_objectives": 0,
    "devices": 0,
    "tokens": 0,
    "recipe": 1,
    "recipe_checks": 1,
    "teacher": 1,
    "data": 1,
    "sampling": 1,
    "environments": 1,
    "training": 2,
    "evaluation": 2,
    "reports": 2,
    "cli": 3,
}
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "sdpo_jax").rglob("*.py"))
}
FACADE = "sdpo_jax"
JAX_ALONE = [m for m in MODULES if m == FACADE or m.startswith("sdpo_jax.losses")] + [
    "sdpo_jax.teacher",
    "sdpo_jax.teacher.weights",
]


def imports(path):
    """Absolute names of everything that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            source = node.module or ""
            names = [f"{source}.{alias.name}" for alias in node.names]
            yield from names if source == FACADE else [source]


def part(module):
    return module.split(".")[1]


@pytest.mark.parametrize("module", [m for m in MODULES if m != FACADE])
def test_no_module_imports_a_higher_layer(module):
    assert part(module) in LAYER, f"give {module} a layer"
    for name in imports(MODULES[module]):
        if name.startswith("sdpo_jax."):
            assert LAYER[part(name)] <= LAYER[part(module)], f"{module} imports {name}"
        if name.split(".")[0] == "sdpo_models":
            assert part(module) == "cli", f"{module} imports {name}; it should receive a Model"


@pytest.mark.parametrize("module", JAX_ALONE)
def test_the_loss_library_imports_jax_alone(module):
    for name in imports(MODULES[module]):
        top = name.split(".")[0]
        ours = name.startswith(("sdpo_jax.losses", "sdpo_jax.teacher.weights"))
        assert ours or top == "jax" or top in sys.stdlib_module_names, f"{module} imports {name}"
