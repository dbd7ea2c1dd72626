"""The updates of SDPO that are more than plain distillation.

weighted_update      rollouts or tokens with unequal weights; a mix with GRPO's surrogate
advantage_updates    credits that are known before the loss, through GRPO's surrogate
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from sdpo_jax.losses.per_token import (
    GrpoSharedInputs,
    GrpoTokenInputs,
    MixedSharedInputs,
    MixedTokenInputs,
    SdpoSharedInputs,
    SdpoTokenInputs,
)
from sdpo_jax.objectives.credit import (
    Ragged,
    WeighedStep,
    distillation_weights,
    entropy_weighted,
    has_unequal_weights,
    is_mixed,
    log_ratios,
    token_advantages,
)
from sdpo_jax.objectives.grpo import advantage_update, on_every_token
from sdpo_jax.rollouts.diagnostics import gap_agreement, outcome_signs
from sdpo_jax.training.batch import MiniBatch, PackedBatch
from sdpo_jax.training.step import Update
from sdpo_jax.training.teacher_pass import teacher_scores
from sdpo_jax.training.token_metrics import agreement_shares


def weighted_update(
    step: WeighedStep,
    mini_batch: MiniBatch,
    inputs: Sequence[SdpoTokenInputs],
    shared: SdpoSharedInputs,
) -> Update:
    """The update whose loss gives credit to candidates or to sampled tokens.

    Args:
      step: what the updates share; its timer adds the teacher's scores to the phase `teacher`.
      mini_batch: the rows.
      inputs: the teacher's side of each micro-batch.
      shared: what all tokens share.
    """
    settings, engine, timer = step.settings, step.engine, step.timer
    tokens: Sequence[Any] = inputs
    together: Any = shared
    mixes = is_mixed(settings)
    if mixes or has_unequal_weights(settings):
        by_token = on_every_token(step.rollouts, mini_batch, distillation_weights(step, mini_batch))
        if settings.token_weights == "teacher_entropy":
            with timer.phase("teacher"):
                scores = teacher_scores(engine, mini_batch, inputs, shared)
            counted = [w * (x > 0) for w, x in zip(by_token, mini_batch.weights, strict=True)]
            beta = settings.token_weight_beta
            by_token = entropy_weighted(counted, scores.entropies, beta=beta)
        if mixes:
            tokens = _mixed(step, mini_batch, inputs, by_token)
            together = MixedSharedInputs(shared, GrpoSharedInputs(shared.temperature))
        else:
            both = zip(mini_batch.weights, by_token, strict=True)
            mini_batch = mini_batch._replace(weights=[a * b for a, b in both])
    outcomes = outcome_signs(step.rollouts.outcomes, step.weights.distill != 0)
    return engine.update(
        mini_batch, tokens, together, reference=step.reference, outcomes=outcomes, timer=timer
    )


def _mixed(
    step: WeighedStep, mini_batch: MiniBatch, inputs: Sequence[SdpoTokenInputs], distill: Ragged
) -> list[MixedTokenInputs]:
    """Inputs of both terms, with the weight of each token in either."""
    rollouts, weights, place = step.rollouts, step.weights, step.engine.place
    policy_gradient = on_every_token(rollouts, mini_batch, weights.policy_gradient)
    advantages = on_every_token(rollouts, mini_batch, weights.advantages)

    def mixed(known: SdpoTokenInputs, packed: PackedBatch) -> MixedTokenInputs:
        assert known.old_log_probs is not None  # the teacher's pass always gives them
        grpo = GrpoTokenInputs(known.targets, known.old_log_probs, place(advantages, packed))
        return MixedTokenInputs(known, grpo, place(distill, packed), place(policy_gradient, packed))

    return [mixed(*x) for x in zip(inputs, mini_batch.micro_batches, strict=True)]


def advantage_updates(
    step: WeighedStep,
    mini_batches: Sequence[MiniBatch],
    inputs: Sequence[Sequence[SdpoTokenInputs] | None],
    shared: SdpoSharedInputs,
) -> tuple[list[Update], dict[str, float]]:
    """Updates by advantages that the teacher's scores give before the loss; with metrics.

    Arguments as in `weighted_update`; `inputs` of a mini-batch are None where no teacher scores it.
    """
    updates: list[Update] = []
    every_gap: Ragged = []
    agreeing = np.zeros(4)
    engine, rollouts, timer = step.engine, step.rollouts, step.timer
    outcomes = outcome_signs(rollouts.outcomes, step.weights.distill != 0)
    for mini_batch, known in zip(mini_batches, inputs, strict=True):
        gaps = None
        if known is not None:
            with timer.phase("teacher"):
                scores = teacher_scores(engine, mini_batch, known, shared)
            gaps = log_ratios(scores, [rollouts.log_probs[i] for i in mini_batch.rows])
            every_gap += gaps
            counted = [x * (w > 0) for x, w in zip(gaps, mini_batch.weights, strict=True)]
            agreeing += gap_agreement(counted, outcomes[mini_batch.rows])
        advantages = token_advantages(step, mini_batch, gaps)
        updates.append(
            advantage_update(engine, rollouts, mini_batch, advantages, step.reference, timer)
        )
    if not every_gap:
        return updates, {}
    mean = float(np.mean(np.concatenate(every_gap)))
    return updates, {"teacher_gap": mean, **agreement_shares(agreeing)}
