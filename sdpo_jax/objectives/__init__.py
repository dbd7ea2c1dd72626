"""The objectives: `sdpo`, `grpo`, `sdft` and `sft`, one file each.

Each file holds the objective's settings, its rule for contexts or advantages, its loss and what it
reports, as one `sdpo_jax.training.objective.Objective`.
"""

from collections.abc import Callable
from typing import Any

from sdpo_jax.config import ObjectiveConfig
from sdpo_jax.objectives.grpo import GrpoConfig, grpo
from sdpo_jax.objectives.sdft import SdftConfig, sdft
from sdpo_jax.objectives.sdpo import SdpoConfig, sdpo
from sdpo_jax.objectives.sft import SftConfig, sft
from sdpo_jax.training.objective import Objective

OBJECTIVES: dict[str, tuple[type[ObjectiveConfig], Callable[[Any], Objective]]] = {
    "sdpo": (SdpoConfig, sdpo),
    "grpo": (GrpoConfig, grpo),
    "sdft": (SdftConfig, sdft),
    "sft": (SftConfig, sft),
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
