"""A lower layer never imports a higher one, and the loss library imports jax alone."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# From top to bottom, as in docs/architecture.md: a room imports only rooms below it.
ROOMS = (
    *("cli", "commands", "api", "discovery", "reports", "run", "evaluation"),
    *("objectives", "training", "rollouts", "data", "teacher", "environments", "distributed"),
    *("devices", "config", "tokens", "compilation", "model", "errors", "losses"),
)
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
    """Absolute names of everything that a file imports, anywhere in it; of modules by their own."""
    tree = ast.parse(path.read_text())
    if path == MODULES[FACADE]:  # `load` and `train` are imported when they are used
        tree.body = [node for node in tree.body if not isinstance(node, ast.If)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            source = node.module or ""
            names = [f"{source}.{alias.name}" for alias in node.names]
            yield from {name if name in MODULES else source for name in names}


def room(module):
    return module.split(".")[1]


@pytest.mark.parametrize("module", [m for m in MODULES if m != FACADE])
def test_a_room_imports_only_rooms_below_it(module):
    assert room(module) in ROOMS, f"give {module} a room"
    for name in imports(MODULES[module]):
        if name.startswith("sdpo_jax.") and room(name) != room(module):
            below = ROOMS.index(room(name)) > ROOMS.index(room(module))
            assert below, f"{module} imports {name}, which stands above it"
        if name.split(".")[0] == "sdpo_models":
            assert room(module) in ("api", "commands"), f"{module} imports {name}; pass it a Model"


def test_no_circle_of_files():
    arrows = {m: {n for n in imports(p) if n in MODULES and n != m} for m, p in MODULES.items()}
    while leaves := [m for m, to in arrows.items() if not to]:
        arrows = {m: to - set(leaves) for m, to in arrows.items() if m not in leaves}
    assert not arrows, f"these import each other: {sorted(arrows)}"


@pytest.mark.parametrize("module", JAX_ALONE)
def test_the_loss_library_imports_jax_alone(module):
    for name in imports(MODULES[module]):
        top = name.split(".")[0]
        ours = name.startswith(("sdpo_jax.losses", "sdpo_jax.teacher.weights"))
        assert ours or top == "jax" or top in sys.stdlib_module_names, f"{module} imports {name}"
