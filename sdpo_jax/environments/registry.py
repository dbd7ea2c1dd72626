"""From a recipe's `[environment]` to an environment."""

from collections.abc import Callable

from sdpo_jax.config import EnvironmentConfig
from sdpo_jax.environments.base import Environment
from sdpo_jax.environments.bfcl import Bfcl, load_rows
from sdpo_jax.environments.tool_calls import ToolCalls
from sdpo_jax.errors import UserError


def _tool_calls(config: EnvironmentConfig) -> Environment:
    for key in ("max_prompt_characters", "reveal_expected"):
        if getattr(config, key):
            raise UserError(
                f'environment.{key}: expected none with environment.kind = "tool_calls"'
            )
    return ToolCalls(
        train_prompts=config.train_prompts,
        held_out_prompts=config.held_out_prompts,
        families=config.families,
        seed=config.seed,
    )


def _bfcl(config: EnvironmentConfig) -> Environment:
    if config.families:
        raise UserError('environment.families: expected none with environment.kind = "bfcl"')
    return Bfcl(
        load_rows(),
        train_prompts=config.train_prompts,
        held_out_prompts=config.held_out_prompts,
        max_prompt_characters=config.max_prompt_characters,
        reveal_expected=config.reveal_expected,
        seed=config.seed,
    )


ENVIRONMENTS: dict[str, Callable[[EnvironmentConfig], Environment]] = {
    "tool_calls": _tool_calls,
    "bfcl": _bfcl,
}
"""Every kind that `environment.kind` may name."""


def make_environment(config: EnvironmentConfig) -> Environment:
    """Builds the environment of a recipe."""
    return ENVIRONMENTS[config.kind](config)
