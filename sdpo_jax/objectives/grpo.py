"""GRPO: group-relative advantages on every token of a response, through PPO's clipped surrogate.

    rollouts -> reward of each response -> advantage: reward - mean of its siblings
             -> clipped surrogate at every response token -> update

The baseline of SDPO with all of the paper's improvements (arXiv 2601.20802, section 2.1): no
division by the standard deviation, asymmetric clips, dual clip, token mean.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from sdpo_jax.config import PROPER_SHARE, Config, ObjectiveConfig, Problem, above, at_least, setting
from sdpo_jax.losses.fused_linear import PerTokenLoss
from sdpo_jax.losses.kl_penalty import with_reference_kl
from sdpo_jax.losses.per_token import GrpoSharedInputs, GrpoTokenInputs, grpo_per_token
from sdpo_jax.model import Params
from sdpo_jax.objectives.loss_weights import graded_advantages
from sdpo_jax.rollouts.phase_timer import PhaseTimer
from sdpo_jax.rollouts.rollout_batch import RolloutBatch
from sdpo_jax.training.batch import MiniBatch
from sdpo_jax.training.engine import Engine, Models
from sdpo_jax.training.objective import Objective
from sdpo_jax.training.step import Update
from sdpo_jax.training.token_metrics import SAMPLED


@dataclass(frozen=True)
class GrpoConfig(ObjectiveConfig):
    """Group-relative policy optimization, with the paper's improvements to its baseline."""

    name: Literal["grpo"] = "grpo"
    clip_low: float = setting(0.2, PROPER_SHARE)
    """The ratio of new to rollout probability is clipped below 1 - clip_low ..."""
    clip_high: float = setting(0.28, above(0))
    """... and above 1 + clip_high."""
    dual_clip: float = setting(3.0, above(1))
    """Bound of the ratio where the advantage is negative (arXiv 1912.09729)."""
    reduction: Literal["token_mean", "sequence_mean"] = "token_mean"
    reference_kl: float = setting(0.0, at_least(0))
    """Coefficient of the KL to the initial model, on every active token (arXiv 2402.03300)."""

    def check(self, config: Config) -> Iterator[Problem]:
        """Yields a group of one, which has no advantage."""
        if config.rollout.rollouts_per_prompt < 2:
            expected = "at least 2 with grpo: an advantage compares siblings"
            yield Problem("rollout.rollouts_per_prompt", expected)


COLUMNS = ("reward", "accuracy", "response_tokens", "loss")
TIMES = ("seconds_rollout", "seconds_grade", "seconds_train")


def grpo(settings: GrpoConfig) -> Objective:
    """The objective of these settings."""
    loss, metrics = surrogate(settings), (*SAMPLED, "ratio", "clipped")
    if settings.reference_kl:
        loss = with_reference_kl(loss, coefficient=settings.reference_kl)
        metrics = (*metrics, "reference_kl")
    return Objective(
        settings=settings,
        loss=loss,
        metrics=metrics,
        make_updates=partial(make_updates, settings),
        reference_kl=settings.reference_kl,
        columns=(*COLUMNS, *TIMES),
    )


def make_updates(
    settings: GrpoConfig,
    engine: Engine,
    rollouts: RolloutBatch,
    models: Models,
    /,
    *,
    step: int,
    timer: PhaseTimer,
) -> tuple[list[Update], dict[str, float]]:
    """The updates of a step, and the share of rollouts that have an advantage."""
    del step
    with timer.phase("advantages"):
        advantages = graded_advantages(rollouts)
        active, signal = np.ones(len(advantages), np.bool_), advantages != 0.0
        # A KL to the reference moves rollouts without an advantage, too.
        worth = active if settings.reference_kl > 0 else signal
        mini_batches = engine.split(
            rollouts, active=active, worth=worth, reduction=settings.reduction
        )
    reference = models.reference if settings.reference_kl > 0 else None
    updates = [
        advantage_update(
            engine, rollouts, x, on_every_token(rollouts, x, advantages), reference, timer
        )
        for x in mini_batches
    ]
    signal = signal[rollouts.graded]
    return updates, {"advantage_signal": float(np.mean(signal)) if len(signal) else 0.0}


def on_every_token(
    rollouts: RolloutBatch, mini_batch: MiniBatch, numbers: NDArray[np.float32]
) -> list[NDArray[np.float32]]:
    """`[|y|]` for each row of the mini-batch, with the rollout's number of the `[N]`."""
    return [np.full(len(rollouts.response_ids[i]), numbers[i]) for i in mini_batch.rows]


def surrogate(settings: GrpoConfig) -> PerTokenLoss:
    """The clipped surrogate of a token."""
    return grpo_per_token(
        clip_low=settings.clip_low, clip_high=settings.clip_high, dual_clip=settings.dual_clip
    )


def advantage_update(
    engine: Engine,
    rollouts: RolloutBatch,
    mini_batch: MiniBatch,
    advantages: Sequence[NDArray[np.float32]],
    reference: Params,
    timer: PhaseTimer,
) -> Update:
    """An update by advantages, `[|y|]` for each row of the mini-batch."""
    old = [rollouts.log_probs[i] for i in mini_batch.rows]
    inputs = [
        GrpoTokenInputs(
            targets=engine.targets(mini_batch, packed),
            old_log_probs=engine.place(old, packed),
            advantages=engine.place(advantages, packed),
        )
        for packed in mini_batch.micro_batches
    ]
    shared = GrpoSharedInputs(engine.temperature)
    return engine.update(mini_batch, inputs, shared, reference=reference, timer=timer)
