"""From a recipe's `[environment]` to an environment.

What a kind needs is imported only when a recipe asks for it.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from sdpo_jax.config.environments import (
    BfclEnvironment,
    CodeEnvironment,
    EnvironmentConfig,
    FileEnvironment,
    MathEnvironment,
    McqEnvironment,
    NanoCodeEnvironment,
    ReasoningGymEnvironment,
    ToolCallsEnvironment,
    ToolUseEnvironment,
)
from sdpo_jax.environments.base import Environment, NeedsWorker
from sdpo_jax.environments.workers import InWorkers
from sdpo_jax.errors import UserError


def make_environment(config: EnvironmentConfig) -> Environment:
    """Builds the environment of a recipe; one that needs workers comes with them.

    Raises:
      UserError: data or a package is missing, or a file's environment is not one.
    """
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
    kind: type[Any] = next(c for c in get_args(EnvironmentConfig) if c().kind == values["kind"])
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def _tool_calls(config: ToolCallsEnvironment) -> Environment:
    from sdpo_jax.environments.kinds.tool_calls import ToolCalls

    return ToolCalls(
        train_prompts=config.train_prompts,
        held_out_prompts=config.held_out_prompts,
        families=config.families,
        held_out_families=config.held_out_families,
        allow_preamble=config.allow_preamble,
        seed=config.seed,
    )


def _bfcl(config: BfclEnvironment) -> Environment:
    from sdpo_jax.environments.kinds.bfcl import Bfcl, load_rows

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
    from sdpo_jax.environments.code.livecodebench import read_problems
    from sdpo_jax.environments.kinds.code import Code

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
    from sdpo_jax.environments.kinds.nano_code import NanoCode

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
    from sdpo_jax.environments.kinds.mcq import Mcq, load_quartz, load_sciknoweval

    if config.source == "quartz":
        sides = load_quartz(config.seed)
    else:
        sides = load_sciknoweval(
            config.source, config.on_error, dataset_prompt=config.dataset_prompt
        )
        _tell(sides.problems)
    return Mcq(sides.train, sides.held_out, report_incorrect=config.report_incorrect)


def _math(config: MathEnvironment) -> Environment:
    _require(config.kind, train=config.train, held_out=config.held_out)
    from sdpo_jax.environments.kinds.math import Math, load_math

    sides = load_math(config.train, config.held_out, config.on_error)
    _tell(sides.problems)
    return Math(
        sides.train,
        sides.held_out,
        report_incorrect=config.report_incorrect,
        reveal_expected=config.reveal_expected,
    )


def _tool_use(config: ToolUseEnvironment) -> Environment:
    _require(config.kind, train=config.train, held_out=config.held_out)
    from sdpo_jax.environments.kinds.tool_use import ToolUse, load_tool_use

    sides = load_tool_use(config.train, config.held_out, config.on_error)
    _tell(sides.problems)
    return ToolUse(sides.train, sides.held_out, reveal_expected=config.reveal_expected)


def _reasoning_gym(config: ReasoningGymEnvironment) -> Environment:
    from sdpo_jax.environments.kinds.reasoning_gym import ReasoningGym

    return ReasoningGym(
        config.generators, config.train_prompts, config.held_out_prompts, config.seed
    )


def _file(config: FileEnvironment) -> Environment:
    from sdpo_jax.environments.kinds.file import load_file

    return load_file(Path(config.path), config.seed)


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
