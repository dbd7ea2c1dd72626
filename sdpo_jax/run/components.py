"""Everything that a run needs besides its settings, and the trainer that is made of it."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from sdpo_jax.config import Config
from sdpo_jax.data.jsonl import Demonstration
from sdpo_jax.environments.base import Environment
from sdpo_jax.model import Model
from sdpo_jax.tokens import Tokenizer
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
    objective: Any = None
    """A bundle of functions in place of the recipe's objective."""
    optimizer: Any = None
    """An `optax.GradientTransformation` in place of the recipe's optimizer."""
    context: Any = None
    """A context builder in place of the recipe's."""


def make_trainer(config: Config, components: RunComponents) -> Trainer:
    """The trainer of a run.

    Raises:
      UserError: components and settings do not fit together.
    """
    replaced = {name: getattr(components, name) for name in ("objective", "optimizer", "context")}
    return Trainer(
        config,
        components.model,
        components.tokenizer,
        components.environment,
        components.demonstrations,
        **{name: value for name, value in replaced.items() if value is not None},
    )
