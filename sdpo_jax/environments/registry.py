"""From a recipe's `[environment]` to an environment."""

from collections.abc import Callable

from sdpo_jax.config import EnvironmentConfig
from sdpo_jax.environments.base import Environment
from sdpo_jax.environments.tool_calls import ToolCalls


def _tool_calls(config: EnvironmentConfig) -> Environment:
    return ToolCalls(
        train_prompts=config.train_prompts,
        held_out_prompts=config.held_out_prompts,
        families=config.families,
        seed=config.seed,
    )


ENVIRONMENTS: dict[str, Callable[[EnvironmentConfig], Environment]] = {"tool_calls": _tool_calls}
"""Every kind that `environment.kind` may name."""


def make_environment(config: EnvironmentConfig) -> Environment:
    """Builds the environment of a recipe."""
    return ENVIRONMENTS[config.kind](config)
