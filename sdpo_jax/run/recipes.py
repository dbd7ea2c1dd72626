"""Recipes with the built-in objectives and environments."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from sdpo_jax.config import Config, ObjectiveConfig
from sdpo_jax.config.recipe import Kinds, override, read_recipe
from sdpo_jax.environments import registry
from sdpo_jax.environments.kinds.tool_calls import ToolCallsConfig
from sdpo_jax.objectives import OBJECTIVES, SdpoConfig

KINDS = Kinds(
    objectives={name: settings for name, (settings, _) in OBJECTIVES.items()},
    environments={name: kind.settings for name, kind in registry.KINDS.items()},
)


def load_recipe(
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    objectives: Iterable[type[ObjectiveConfig]] = (),
    values: Mapping[str, Any] = MappingProxyType({}),
) -> Config:
    """Reads a recipe and applies command-line options, as `config.recipe.read_recipe` describes.

    Args:
      path: a TOML file.
      overrides: options such as `--train.steps 40`.
      objectives: settings classes beside the built-in ones, each with a default for every field;
        `objective.name` picks one by the default of its `name`.
      values: overrides from Python, `{"train.steps": 40}`.

    Raises:
      UserError: lists everything that is wrong in file and options.
    """
    return read_recipe(path, overrides, _kinds(objectives), values)


def override_config(
    config: Config, values: Mapping[str, Any], *, objectives: Iterable[type[ObjectiveConfig]] = ()
) -> Config:
    """The config with other values, `{"train.steps": 40}`; checked as a recipe is.

    Raises:
      UserError: lists everything that is wrong.
    """
    return override(config, values, _kinds(objectives))


def _kinds(objectives: Iterable[type[ObjectiveConfig]]) -> Kinds:
    more = {objective().name: objective for objective in objectives}
    return KINDS._replace(objectives={**KINDS.objectives, **more})


def default_config(**sections: Any) -> Config:
    """A `Config` with these sections; by default the objective is `sdpo` on `tool_calls`."""
    default = Config(objective=SdpoConfig(), environment=ToolCallsConfig())
    return replace(default, **sections)
