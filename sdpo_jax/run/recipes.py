"""Recipes with the built-in objectives and environments."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from sdpo_jax.config import Config, ObjectiveConfig
from sdpo_jax.config.environments import ENVIRONMENTS, ToolCallsEnvironment
from sdpo_jax.config.objectives import GrpoConfig, SdftConfig, SdpoConfig, SftConfig
from sdpo_jax.config.recipe import Kinds, read_recipe

KINDS = Kinds(
    objectives={"sdpo": SdpoConfig, "grpo": GrpoConfig, "sft": SftConfig, "sdft": SdftConfig},
    environments=ENVIRONMENTS,
)


def load_recipe(
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    objectives: Iterable[type[ObjectiveConfig]] = (),
) -> Config:
    """Reads a recipe and applies command-line options, as `config.recipe.read_recipe` describes.

    Args:
      path: a TOML file.
      overrides: options such as `--train.steps 40`.
      objectives: settings classes beside the built-in ones, each with a default for every field;
        `objective.name` picks one by the default of its `name`.

    Raises:
      UserError: lists everything that is wrong in file and options.
    """
    more = {objective().name: objective for objective in objectives}
    kinds = KINDS._replace(objectives={**KINDS.objectives, **more})
    return read_recipe(path, overrides, kinds)


def default_config(**sections: Any) -> Config:
    """A `Config` with these sections; by default the objective is `sdpo` on `tool_calls`."""
    return Config(**{"objective": SdpoConfig(), "environment": ToolCallsEnvironment(), **sections})
