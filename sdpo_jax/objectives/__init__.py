"""The objectives: `sdpo`, `grpo`, `sdft` and `sft`, one file each.

Each file holds the objective's settings, its rule for contexts or advantages, its loss and what it
reports, as one `sdpo_jax.training.objective.Objective`.
"""

from collections.abc import Callable
from typing import Any

from sdpo_jax.config import ObjectiveConfig
from sdpo_jax.objectives.grpo import GrpoConfig as GrpoConfig
from sdpo_jax.objectives.grpo import grpo
from sdpo_jax.objectives.sdft import SdftConfig as SdftConfig
from sdpo_jax.objectives.sdft import sdft
from sdpo_jax.objectives.sdpo import SdpoConfig as SdpoConfig
from sdpo_jax.objectives.sdpo import sdpo
from sdpo_jax.objectives.sft import SftConfig as SftConfig
from sdpo_jax.objectives.sft import sft
from sdpo_jax.training.objective import Objective

OBJECTIVES: dict[str, tuple[type[ObjectiveConfig], Callable[[Any], Objective]]] = {
    "sdpo": (SdpoConfig, sdpo),
    "grpo": (GrpoConfig, grpo),
    "sft": (SftConfig, sft),
    "sdft": (SdftConfig, sdft),
}
"""Settings and maker of each objective that `objective.name` of a recipe may name."""


def make_objective(settings: ObjectiveConfig) -> Objective:
    """The built-in objective of these settings.

    Raises:
      ValueError: the settings are those of no built-in objective.
    """
    if settings.name not in OBJECTIVES:
        raise ValueError(
            f"objective {settings.name!r}: expected one of {', '.join(OBJECTIVES)}; give another "
            "one as `objective=`"
        )
    return OBJECTIVES[settings.name][1](settings)
