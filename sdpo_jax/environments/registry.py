"""From a recipe's `[environment]` to an environment.

What a kind needs is imported only when a recipe asks for it.
"""

import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from sdpo_jax.config import EnvironmentConfig
from sdpo_jax.config.environments import ENVIRONMENTS as SETTINGS
from sdpo_jax.config.environments import (
    BfclEnvironment,
    CodeEnvironment,
    FileEnvironment,
    MathEnvironment,
    McqEnvironment,
    NanoCodeEnvironment,
    ReasoningGymEnvironment,
    ToolCallsEnvironment,
    ToolUseEnvironment,
)
from sdpo_jax.environments.base import Environment, NeedsWorker, Prompt
from sdpo_jax.environments.grading import own_traceback, place_of
from sdpo_jax.errors import UserError


def make_environment(config: EnvironmentConfig) -> Environment:
    """Builds the environment of a recipe; one that needs workers comes with them.

    Raises:
      UserError: data or a package is missing, or a file's environment is not one.
    """
    from sdpo_jax.environments.workers import InWorkers

    environment = build(config)
    workers, seconds = 0, 10.0
    if isinstance(config, MathEnvironment | ReasoningGymEnvironment | FileEnvironment):
        workers, seconds = config.workers, config.deadline_seconds
    if isinstance(environment, NeedsWorker) and environment.needs_worker:
        workers = max(1, workers)
    if workers == 0:
        return environment
    return InWorkers(environment, config, workers=workers, deadline_seconds=seconds)


def build(config: EnvironmentConfig) -> Environment:
    """Builds the environment of a recipe, without workers: also what a worker does."""
    return ENVIRONMENTS[config.kind](config)


def settings_of(values: Mapping[str, Any]) -> EnvironmentConfig:
    """The settings of `dataclasses.asdict`, after JSON."""
    kind: type[Any] = SETTINGS[values["kind"]]
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def _tool_calls(config: ToolCallsEnvironment) -> Environment:
    from sdpo_jax.environments.tool_calls import ToolCalls

    return ToolCalls(
        train_prompts=config.train_prompts,
        held_out_prompts=config.held_out_prompts,
        families=config.families,
        held_out_families=config.held_out_families,
        asides=config.asides,
        seed=config.seed,
    )


def _bfcl(config: BfclEnvironment) -> Environment:
    from sdpo_jax.environments.bfcl import Bfcl, load_rows

    return Bfcl(
        load_rows(),
        train_prompts=config.train_prompts,
        held_out_prompts=config.held_out_prompts,
        max_prompt_characters=config.max_prompt_characters,
        reveal_expected=config.reveal_expected,
        seed=config.seed,
    )


def _code(config: CodeEnvironment) -> Environment:
    from sdpo_jax.environments.code import human_eval, problems
    from sdpo_jax.environments.code.environment import Code
    from sdpo_jax.environments.code.livecodebench import read_problems

    def read(path: str) -> list[problems.Problem]:
        found = read_problems(path, config.on_error)
        _tell(found.problems)
        return found.rows

    every = human_eval.load_problems() if config.source == "human_eval" else read(config.source)
    if config.held_out_source:
        train, held_out = every, read(config.held_out_source)
    else:
        train, held_out = problems.split(every, config.held_out_share, config.seed)
    return Code(
        train,
        held_out,
        sandbox=_sandbox(config),
        reward=config.reward,
        public_share=config.public_share,
        show_expected=config.show_expected,
        seed=config.seed,
    )


def _nano_code(config: NanoCodeEnvironment) -> Environment:
    from sdpo_jax.environments.code.nano_programs import NanoCode

    return NanoCode(
        train_prompts=config.train_prompts,
        held_out_prompts=config.held_out_prompts,
        sandbox=_sandbox(config),
        families=config.families,
        seed=config.seed,
    )


def _sandbox(config: CodeEnvironment | NanoCodeEnvironment) -> Any:
    from sdpo_jax.environments.sandbox import open_sandbox

    return open_sandbox(
        config.sandbox, slots=config.slots, mounts=config.mounts, url=config.sandbox_url
    )


def _mcq(config: McqEnvironment) -> Environment:
    from sdpo_jax.environments.mcq import Mcq, load_quartz, load_sciknoweval

    if config.source == "quartz":
        sides = load_quartz(config.seed)
    else:
        sides = load_sciknoweval(config.source, config.on_error, own_wording=config.own_wording)
        _tell(sides.problems)
    return Mcq(sides.train, sides.held_out, say_wrong=config.say_wrong)


def _math(config: MathEnvironment) -> Environment:
    _require(config.kind, train=config.train, held_out=config.held_out)
    from sdpo_jax.environments.math_answers import Math, load_math

    sides = load_math(config.train, config.held_out, config.on_error)
    _tell(sides.problems)
    return Math(
        sides.train,
        sides.held_out,
        say_wrong=config.say_wrong,
        reveal_expected=config.reveal_expected,
    )


def _tool_use(config: ToolUseEnvironment) -> Environment:
    _require(config.kind, train=config.train, held_out=config.held_out)
    from sdpo_jax.environments.tool_use import ToolUse, load_tool_use

    sides = load_tool_use(config.train, config.held_out, config.on_error)
    _tell(sides.problems)
    return ToolUse(sides.train, sides.held_out, reveal_expected=config.reveal_expected)


def _reasoning_gym(config: ReasoningGymEnvironment) -> Environment:
    from sdpo_jax.environments.gym import ReasoningGym

    return ReasoningGym(
        config.generators, config.train_prompts, config.held_out_prompts, config.seed
    )


def _file(config: FileEnvironment) -> Environment:
    return load_file(Path(config.path), config.seed)


def load_file(path: Path, seed: int) -> Environment:
    """The environment in a Python file: its `make_environment(seed)`, or its `environment`.

    Raises:
      UserError: the file is missing, fails, defines neither, or what it defines is no environment.
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
        if "make_environment" in names:
            environment: Any = names["make_environment"](seed)
        else:
            environment = names.get("environment")
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"{path} failed at {place_of(error)} while it was loaded:\n{own_traceback(error)}"
        ) from error
    if environment is None:
        raise UserError(
            f"{path}: expected `environment = ...` or a function `make_environment(seed)` that "
            "returns one; found neither"
        )
    return _checked(environment, path)


def _checked(environment: Any, path: Path) -> Environment:
    """Refuses what the trainer would stumble over later, with a worse message."""
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
    given: Any = prompt  # What the types promise is what is checked here.
    if not isinstance(given.id, str) or not given.id:
        return f"the id is {given.id!r:.200}, expected text"
    if not isinstance(given.messages, list | tuple) or not given.messages:
        return f"messages is {given.messages!r:.200}, expected a tuple of messages"
    for message in cast(Sequence[Any], given.messages):
        content = message.get("content") if isinstance(message, Mapping) else None
        if not isinstance(content, str) or not isinstance(message.get("role"), str):
            return f'the message {message!r:.200}, expected {{"role": ..., "content": ...}}'
    last = given.messages[-1]["role"]
    if last != "user":
        return f"the last message is from {last!r}, expected the user: the model answers it"
    return (
        "" if isinstance(given.data, Mapping) else f"data is {given.data!r:.200}, expected a dict"
    )


def _require(kind: str, **settings: str) -> None:
    for key, value in settings.items():
        if not value:
            raise UserError(
                f'environment.{key} = "": expected a path with environment.kind = "{kind}"'
            )


def _tell(skipped: Sequence[str]) -> None:
    for problem in skipped:
        print(f"skipped {problem}", file=sys.stderr)


ENVIRONMENTS: dict[str, Callable[[Any], Environment]] = {
    "tool_calls": _tool_calls,
    "bfcl": _bfcl,
    "code": _code,
    "nano_code": _nano_code,
    "mcq": _mcq,
    "math": _math,
    "tool_use": _tool_use,
    "reasoning_gym": _reasoning_gym,
    "file": _file,
}
"""Every kind that `environment.kind` may name."""
