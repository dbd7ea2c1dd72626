"""The parser of all `sdpo` commands, and what they share: argument types, errors, start-up."""

import argparse
import logging
import os
from collections.abc import Callable, Sequence
from typing import NamedTuple, NoReturn

from sdpo_jax.errors import UserError

_HELP = ("-h", "--help")


class Command(NamedTuple):
    """A command; its module imports what is slow only when it runs."""

    name: str
    forms: Sequence[tuple[str, str]]
    """Usage and purpose of each form."""
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int | None]
    """Returns the exit code; None is 0."""
    takes_settings: bool = False
    """Whether `--SECTION.KEY VALUE` may follow: `settings` of the arguments, for `load_recipe`."""


class Parser(argparse.ArgumentParser):
    """Raises a `UserError` where `ArgumentParser` prints and exits."""

    def error(self, message: str) -> NoReturn:
        """Raises `UserError` with the message and the usage."""
        raise UserError(f"{message}\n{self.format_usage().rstrip()}")


def parse(commands: Sequence[Command], argv: Sequence[str]) -> argparse.Namespace:
    """Parses a command line; `command` of the result is the command to run.

    `--help` prints and exits; after a recipe it is left to `load_recipe`.

    Raises:
      UserError: there is no such command, or an argument does not fit it.
    """
    by_name = {command.name: command for command in commands}
    if not argv or argv[0] not in by_name:
        listed = _overview(commands)
        if not argv or argv[0] in (*_HELP, "help"):
            print(listed)
            raise SystemExit(0 if argv else 2)
        names = ", ".join(by_name)
        raise UserError(f"unknown command {argv[0]!r}; expected one of {names}\n\n{listed}")
    command, options = by_name[argv[0]], list(argv[1:])
    parser, first = _parser(command), (options or [""])[0]
    recipe_help: list[str] = []
    if command.takes_settings and first.endswith(".toml"):
        recipe_help = [option for option in options if option in _HELP]
        options = [option for option in options if option not in _HELP]
    if command.takes_settings and first.startswith("-") and first not in _HELP:
        parser.error(f"{first}: expected the recipe first")
    arguments, rest = parser.parse_known_args(options)
    if rest and not command.takes_settings:
        parser.error(f"{rest[0]}: unexpected argument")
    arguments.command, arguments.settings = command, [*rest, *recipe_help]
    return arguments


def _parser(command: Command) -> Parser:
    usages, purposes = zip(*command.forms, strict=True)
    parser = Parser(
        prog=f"sdpo {command.name}",
        usage="\n       ".join(usages),
        description="\n".join(f"{p[0].upper()}{p[1:]}." for p in purposes),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.add_arguments(parser)
    return parser


def _overview(commands: Sequence[Command]) -> str:
    forms = [form for command in commands for form in command.forms]
    lines = [f"  {usage}\n      {purpose}" for usage, purpose in forms]
    return "\n".join(["usage: sdpo COMMAND ...", "", *lines, "", _NOTES])


_NOTES = """`sdpo COMMAND --help` lists the options of a command.
`sdpo train RECIPE --help` lists every setting of a recipe.

Recipes lie in configs/. A run lies in runs/RECIPE unless --run-dir names another folder. eval,
heatmap and convert use the last checkpoint of a run; RUN_DIR@best is the one with the highest
held-out accuracy, RUN_DIR@STEP another one that is saved."""


def positive(text: str) -> int:
    """An argument that must be a positive integer."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected a positive integer")
    return int(text)


def quiet_libraries() -> None:
    """Keeps notices of third parties out of the output; must run before they are imported."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    logging.getLogger("absl").setLevel(logging.WARNING)
