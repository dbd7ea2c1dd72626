"""SFT: cross-entropy on the responses of demonstrations.

    demonstrations -> cross-entropy at every response token, the end of turn included -> update

The baseline of SDFT (arXiv 2601.19897), and a warm-up before the other objectives.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np

from sdpo_jax.config import ObjectiveConfig
from sdpo_jax.losses.per_token import SftTokenInputs, sft_per_token
from sdpo_jax.rollouts.phase_timer import PhaseTimer
from sdpo_jax.rollouts.rollout_batch import RolloutBatch
from sdpo_jax.teacher.contexts import SiblingContexts
from sdpo_jax.training.engine import Engine, Models
from sdpo_jax.training.objective import Objective
from sdpo_jax.training.step import Update
from sdpo_jax.training.token_metrics import SAMPLED


@dataclass(frozen=True)
class SftConfig(ObjectiveConfig):
    """Cross-entropy on demonstrations; needs `[data]` and no environment."""

    learns_from = "demonstrations"
    samples = False

    name: Literal["sft"] = "sft"
    reduction: Literal["token_mean", "sequence_mean"] = "token_mean"


def sft(settings: SftConfig) -> Objective:
    """The objective of these settings.

    It has no teacher. In evaluations the model itself, shown a context, stands in for one: whether
    it still reads contexts decides how well it would teach itself later.
    """
    return Objective(
        settings=settings,
        loss=sft_per_token(),
        metrics=(*SAMPLED, "correct"),
        make_updates=partial(make_updates, settings),
        contexts=SiblingContexts,
        columns=("loss", "token_accuracy", "accuracy", "seconds_train"),
    )


def make_updates(
    settings: SftConfig,
    engine: Engine,
    rollouts: RolloutBatch,
    models: Models,
    /,
    *,
    step: int,
    timer: PhaseTimer,
) -> tuple[list[Update], dict[str, float]]:
    """The updates of a step; the demonstrations stand in the place of rollouts."""
    del models, step
    with timer.phase("data"):
        every = np.ones(len(rollouts.texts), np.bool_)
        mini_batches = engine.split(
            rollouts, active=every, worth=every, reduction=settings.reduction
        )
        updates: list[Update] = []
        for mini_batch in mini_batches:
            packed = mini_batch.micro_batches
            inputs = [SftTokenInputs(engine.targets(mini_batch, x)) for x in packed]
            updates.append(engine.update(mini_batch, inputs, None, timer=timer))
    return updates, {}
