"""Everything that a run needs besides its settings, and the trainer that is made of it."""

from collections.abc import Sequence
from typing import NamedTuple

import optax

from sdpo_jax.config import Config
from sdpo_jax.data.jsonl import Demonstration
from sdpo_jax.environments.base import Environment
from sdpo_jax.model import Model
from sdpo_jax.objectives import make_objective
from sdpo_jax.teacher.contexts import ContextBuilder
from sdpo_jax.tokens import Tokenizer
from sdpo_jax.training.objective import Objective
from sdpo_jax.training.trainer import LoadParams, Trainer


class RunComponents(NamedTuple):
    """The objects that a recipe names, or that a caller gives in their place."""

    model: Model
    params: LoadParams
    """Loads the initial weights. A function, so that the run holds the only copy of them."""
    tokenizer: Tokenizer
    environment: Environment
    demonstrations: Sequence[Demonstration] = ()
    """For `sft` and `sdft`."""
    objective: Objective | None = None
    """In place of the recipe's objective."""
    optimizer: optax.GradientTransformation | None = None
    """In place of the recipe's optimizer."""
    context: ContextBuilder | None = None
    """In place of the objective's own rule for what the teacher sees."""


def objective_of(config: Config, components: RunComponents) -> Objective:
    """The given objective, else the one that the recipe names."""
    return components.objective or make_objective(config.objective)


def make_trainer(config: Config, components: RunComponents) -> Trainer:
    """The trainer of a run.

    Raises:
      UserError: components and settings do not fit together.
    """
    return Trainer(
        config,
        components.model,
        components.tokenizer,
        components.environment,
        components.demonstrations,
        objective=objective_of(config, components),
        optimizer=components.optimizer,
        context=components.context,
    )
