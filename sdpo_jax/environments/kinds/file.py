"""Kind `file`: the environment that a user's own Python file defines."""

import importlib.util
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from sdpo_jax.config import SEED, at_least, setting
from sdpo_jax.environments.base import Environment, Prompt
from sdpo_jax.environments.grading import own_traceback, place_of
from sdpo_jax.environments.settings import WorkerConfig
from sdpo_jax.errors import UserError


@dataclass(frozen=True)
class FileConfig(WorkerConfig):
    """Your own environment in a Python file; `sdpo env template FILE` writes a template."""

    kind: Literal["file"] = "file"
    path: str = ""
    """File that defines `environment = ...` or a function `make_environment(seed)`."""
    seed: int = setting(0, SEED)
    """Argument of `make_environment`."""
    workers: int = setting(0, at_least(0), may_change=True)
    """Worker processes that grade; 0 grades in the trainer, where a response that hangs the grader
    stops the run."""


def build(config: FileConfig) -> Environment:
    """Loads the environment from the file that the settings name."""
    return load_file(Path(config.path), config.seed)


def load_file(path: Path, seed: int) -> Environment:
    """Loads the environment in a Python file: its `make_environment(seed)` or its `environment`.

    Raises:
      UserError: the file is missing, fails, defines neither, or defines something else than an
        environment.
    """
    if not path.is_file():
        raise UserError(
            f"environment.path = {str(path)!r}: no such file, expected a Python file; "
            f"`sdpo env template {path.name or 'my_env.py'}` writes one to start from"
        )
    name = f"sdpo_environment_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UserError(f"{path}: expected a Python file, with a name that ends in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and typing look a class's module up there
    try:
        spec.loader.exec_module(module)
        names = vars(module)
        environment: Any = names.get("environment")
        if "make_environment" in names:
            environment = names["make_environment"](seed)
    except UserError:
        raise
    except Exception as error:
        place, trace = place_of(error, __file__), own_traceback(error, __file__)
        raise UserError(f"{path} failed at {place} while it was loaded:\n{trace}") from error
    if environment is None:
        raise UserError(
            f"{path}: expected `environment = ...` or a function `make_environment(seed)` that "
            "returns one; found neither"
        )
    return checked(environment, path)


def checked(environment: Any, path: Path | str) -> Environment:
    """Checks what a file defines, so that errors name the file and not a later failure."""
    lacking = [n for n in ("train", "held_out", "grade") if not hasattr(environment, n)]
    if lacking:
        raise UserError(
            f"{path}: the environment ({type(environment).__name__}) has no "
            f"{' and no '.join(lacking)}; expected train, held_out and grade(prompt, response)"
        )
    for side in ("train", "held_out"):
        prompts = getattr(environment, side)
        if not isinstance(prompts, Sequence):
            raise UserError(
                f"{path}: {side} is a {type(prompts).__name__}, expected a list of Prompt"
            )
        for number, prompt in enumerate(cast(Sequence[Any], prompts)):
            if problem := _prompt_problem(prompt):
                raise UserError(f"{path}: {side}[{number}]: {problem}")
    return cast(Environment, environment)


def _prompt_problem(prompt: Any) -> str:
    if not isinstance(prompt, Prompt):
        return f"{prompt!r:.200}, expected Prompt(id, messages, data)"
    given: Any = prompt  # A file may break the annotations.
    if not isinstance(given.id, str) or not given.id:
        return f"the id is {given.id!r:.200}, expected text"
    if not isinstance(given.messages, list | tuple) or not given.messages:
        return f"messages is {given.messages!r:.200}, expected a tuple of messages"
    for message in cast(Sequence[Any], given.messages):
        content = message.get("content") if isinstance(message, Mapping) else None
        if not isinstance(content, str) or not isinstance(message.get("role"), str):
            return f'the message {message!r:.200}, expected {{"role": ..., "content": ...}}'
    if (last := given.messages[-1]["role"]) != "user":
        return f"the last message is from {last!r}, expected the user: the model answers it"
    return (
        "" if isinstance(given.data, Mapping) else f"data is {given.data!r:.200}, expected a dict"
    )
