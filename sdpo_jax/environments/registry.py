"""The registry of environments: for each kind, its settings class and its builder.

Every kind imports the third-party packages that it needs only when it is built.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from sdpo_jax.config import EnvironmentConfig
from sdpo_jax.environments.base import Environment, NeedsWorker
from sdpo_jax.environments.kinds import (
    bfcl,
    code,
    file,
    math,
    mcq,
    nano_code,
    reasoning_gym,
    tool_calls,
    tool_use,
)
from sdpo_jax.environments.settings import WorkerConfig
from sdpo_jax.environments.workers import InWorkers


class Kind(NamedTuple):
    """A kind of environment: `build` makes the environment from an instance of `settings`."""

    settings: type[EnvironmentConfig]
    build: Callable[[Any], Environment]


KINDS: Mapping[str, Kind] = {
    "tool_calls": Kind(tool_calls.ToolCallsConfig, tool_calls.build),
    "bfcl": Kind(bfcl.BfclConfig, bfcl.build),
    "code": Kind(code.CodeConfig, code.build),
    "nano_code": Kind(nano_code.NanoCodeConfig, nano_code.build),
    "mcq": Kind(mcq.McqConfig, mcq.build),
    "math": Kind(math.MathConfig, math.build),
    "tool_use": Kind(tool_use.ToolUseConfig, tool_use.build),
    "reasoning_gym": Kind(reasoning_gym.ReasoningGymConfig, reasoning_gym.build),
    "file": Kind(file.FileConfig, file.build),
}
"""Every value of `environment.kind`; the first one is the default."""


def make_environment(config: EnvironmentConfig) -> Environment:
    """Builds the environment of a recipe, with its worker processes if it needs them.

    Raises:
      UserError: data or a package is missing, or the file of kind `file` is not usable.
    """
    environment = build(config)
    if not isinstance(config, WorkerConfig):
        return environment
    workers = config.workers
    if isinstance(environment, NeedsWorker) and environment.needs_worker:
        workers = max(1, workers)
    if workers == 0:
        return environment
    return InWorkers(environment, config, workers=workers)


def build(config: EnvironmentConfig) -> Environment:
    """Builds the environment of a recipe without worker processes, as the workers do."""
    return KINDS[config.kind].build(config)


def settings_of(values: Mapping[str, Any]) -> EnvironmentConfig:
    """Restores settings from `dataclasses.asdict` after a round trip through JSON."""
    settings: type[Any] = KINDS[values["kind"]].settings
    return settings(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
