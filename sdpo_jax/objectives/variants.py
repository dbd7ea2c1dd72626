"""The updates of SDPO that are more than plain distillation.

weighted_update      rollouts or tokens with unequal weights; a mix with GRPO's surrogate
advantage_updates    credits that are known before the loss, through GRPO's surrogate
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdpo_jax.losses.per_token import (
    GrpoSharedInputs,
    GrpoTokenInputs,
    MixedSharedInputs,
    MixedTokenInputs,
    SdpoSharedInputs,
    SdpoTokenInputs,
)
from sdpo_jax.model import Params
from sdpo_jax.objectives.credit import (
    CreditConfig,
    Ragged,
    distillation_weights,
    entropy_weighted,
    has_unequal_weights,
    is_mixed,
    log_ratios,
    token_advantages,
)
from sdpo_jax.objectives.grpo import advantage_update
from sdpo_jax.objectives.loss_weights import LossWeights
from sdpo_jax.rollouts.diagnostics import gap_agreement, outcome_signs
from sdpo_jax.rollouts.phase_timer import PhaseTimer
from sdpo_jax.rollouts.rollout_batch import RolloutBatch
from sdpo_jax.training.batch import MiniBatch, PackedBatch
from sdpo_jax.training.engine import Engine
from sdpo_jax.training.step import Update
from sdpo_jax.training.teacher_pass import teacher_scores
from sdpo_jax.training.token_metrics import agreement_shares


def weighted_update(
    settings: CreditConfig,
    engine: Engine,
    rollouts: RolloutBatch,
    has_teacher: NDArray[np.bool_],
    weights: LossWeights,
    reference: Params,
    timer: PhaseTimer,
    mini_batch: MiniBatch,
    inputs: Sequence[SdpoTokenInputs],
    shared: SdpoSharedInputs,
) -> Update:
    """The update whose loss gives credit to candidates or to sampled tokens.

    Args:
      settings: of the objective.
      engine: assembles the update.
      rollouts: the rollout batch.
      has_teacher: [N].
      weights: of the rollouts in either term.
      reference: weights for a KL to the initial model; None: no KL.
      timer: adds the teacher's scores to the phase `teacher`.
      mini_batch: the rows.
      inputs: the teacher's side of each micro-batch.
      shared: what all tokens share.
    """
    tokens: Sequence[Any] = inputs
    together: Any = shared
    outcomes = outcome_signs(rollouts.outcomes, weights.distill != 0)
    mixes = is_mixed(settings)
    if mixes or has_unequal_weights(settings):
        distill = distillation_weights(settings, rollouts, mini_batch, has_teacher, weights)
        pairs = list(zip(mini_batch.weights, mini_batch.rows, strict=True))
        by_token: Ragged = [np.full(len(x), distill[i]) for x, i in pairs]
        if settings.token_weights == "teacher_entropy":
            with timer.phase("teacher"):
                scores = teacher_scores(engine, mini_batch, inputs, shared)
            counted = [w * (x > 0) for w, x in zip(by_token, mini_batch.weights, strict=True)]
            beta = settings.token_weight_beta
            by_token = entropy_weighted(counted, scores.entropies, beta=beta)
        if mixes:
            tokens = _mixed(engine, rollouts, mini_batch, inputs, by_token, weights)
            together = MixedSharedInputs(shared, GrpoSharedInputs(shared.temperature))
        else:
            both = zip(mini_batch.weights, by_token, strict=True)
            mini_batch = mini_batch._replace(weights=[a * b for a, b in both])
    return engine.update(
        mini_batch, tokens, together, reference=reference, outcomes=outcomes, timer=timer
    )


def _mixed(
    engine: Engine,
    rollouts: RolloutBatch,
    mini_batch: MiniBatch,
    inputs: Sequence[SdpoTokenInputs],
    distill: Ragged,
    weights: LossWeights,
) -> list[MixedTokenInputs]:
    """Inputs of both terms, with the weight of each token in either."""
    rows = [(len(rollouts.response_ids[i]), i) for i in mini_batch.rows]
    policy_gradient = [np.full(n, weights.policy_gradient[i]) for n, i in rows]
    advantages = [np.full(n, weights.advantages[i]) for n, i in rows]

    def mixed(known: SdpoTokenInputs, packed: PackedBatch) -> MixedTokenInputs:
        assert known.old_log_probs is not None  # the teacher's pass always gives them
        place = engine.place
        grpo = GrpoTokenInputs(known.targets, known.old_log_probs, place(advantages, packed))
        return MixedTokenInputs(known, grpo, place(distill, packed), place(policy_gradient, packed))

    return [mixed(*x) for x in zip(inputs, mini_batch.micro_batches, strict=True)]


def advantage_updates(
    settings: CreditConfig,
    engine: Engine,
    rollouts: RolloutBatch,
    has_teacher: NDArray[np.bool_],
    weights: LossWeights,
    reference: Params,
    timer: PhaseTimer,
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
    outcomes = outcome_signs(rollouts.outcomes, weights.distill != 0)
    for mini_batch, known in zip(mini_batches, inputs, strict=True):
        gaps = None
        if known is not None:
            with timer.phase("teacher"):
                scores = teacher_scores(engine, mini_batch, known, shared)
            gaps = log_ratios(scores, [rollouts.log_probs[i] for i in mini_batch.rows])
            every_gap += gaps
            counted = [x * (w > 0) for x, w in zip(gaps, mini_batch.weights, strict=True)]
            agreeing += gap_agreement(counted, outcomes[mini_batch.rows])
        distill = distillation_weights(settings, rollouts, mini_batch, has_teacher, weights)
        advantages = token_advantages(
            engine.config.teacher, settings, rollouts, mini_batch, gaps, distill, weights
        )
        updates.append(advantage_update(engine, rollouts, mini_batch, advantages, reference, timer))
    if not every_gap:
        return updates, {}
    mean = float(np.mean(np.concatenate(every_gap)))
    return updates, {"teacher_gap": mean, **agreement_shares(agreeing)}
