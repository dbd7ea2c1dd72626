"""`sdpo env`: checks an environment, or writes one to start from."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from sdpo_jax.commands.command import Command, quiet_libraries
from sdpo_jax.errors import UserError


def add_arguments(parser: ArgumentParser) -> None:
    """What to do, and with which file."""
    parser.add_argument("action", choices=("check", "template"), help="what to do")
    parser.add_argument("file", metavar="FILE", nargs="?", type=Path, help="environment or recipe")


def run(arguments: Namespace) -> int:
    """Runs the action."""
    file, settings = arguments.file, arguments.settings
    if arguments.action == "check":
        if file is None:
            raise UserError(f"expected a file: `{_CHECK}`")
        return _check(file, settings)
    if settings:
        raise UserError(f"{settings[0]}: unexpected argument; expected `{_TEMPLATE}`")
    _write_template(file)
    return 0


def _check(path: Path, settings: list[str]) -> int:
    """Prints the table; 2 if there is a problem."""
    from sdpo_jax.environments.check import check, report
    from sdpo_jax.environments.kinds.file import FileConfig
    from sdpo_jax.environments.registry import make_environment
    from sdpo_jax.environments.settings import SandboxConfig
    from sdpo_jax.run.recipes import load_recipe

    quiet_libraries()
    if path.suffix == ".toml":
        config = load_recipe(path, settings).environment
    elif settings:
        raise UserError(
            f"{settings[0]}: settings go with a recipe; expected `sdpo env check {path}`"
        )
    else:
        config = FileConfig(path=str(path))
    runs_programs = isinstance(config, SandboxConfig)
    lines = check(make_environment(config), runs_programs=runs_programs)
    print(report(lines))
    return 2 if any(line.problem for line in lines) else 0


def _write_template(out: Path | None) -> None:
    """Prints the template, or writes it into a new file."""
    from sdpo_jax import environments

    template = Path(environments.__path__[0]) / "template.py"
    text = template.read_text(encoding="utf-8")
    if out is None:
        print(text, end="")
        return
    if out.suffix != ".py" or out.exists() or not out.parent.is_dir():
        raise UserError(
            f"{out}: expected the name of a new file, with .py, in a folder that is there"
        )
    out.write_text(text.replace("THIS_FILE", str(out)), encoding="utf-8")
    print(f"wrote {out}; next: sdpo env check {out}")


_CHECK = "sdpo env check FILE.py|RECIPE [--SECTION.KEY VALUE ...]"
_TEMPLATE = "sdpo env template [FILE.py]"
COMMAND = Command(
    "env",
    (
        (_CHECK, "check whether an environment is sound"),
        (_TEMPLATE, "write an environment to start from"),
    ),
    add_arguments,
    run,
    takes_settings=True,
)
