"""From graded rollouts to what an update learns from: one class per objective.

Each drops the rows that cannot move the parameters before any compute, and divides by a denominator
that still knows them. A generation batch is cut into `mini_batches` by prompts; each makes one
update.
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from sdpo_jax.config import Config
from sdpo_jax.config.objectives import GrpoConfig, SdpoConfig
from sdpo_jax.devices import Devices
from sdpo_jax.losses.per_token import (
    GrpoSharedInputs,
    GrpoTokenInputs,
    MixedSharedInputs,
    MixedTokenInputs,
    SdpoTokenInputs,
)
from sdpo_jax.model import Params
from sdpo_jax.objectives.contexts import Contexts
from sdpo_jax.objectives.credit import (
    entropy_weighted,
    log_ratios,
    own_reduction,
    token_advantages,
    worth_computing,
)
from sdpo_jax.objectives.loss_weights import (
    LossWeights,
    graded_advantages,
    make_loss_weights,
    weighs,
)
from sdpo_jax.objectives.per_token import BY_ADVANTAGE, is_mixed
from sdpo_jax.rollouts.diagnostics import gap_agreement, verdicts
from sdpo_jax.rollouts.phase_timer import PhaseTimer
from sdpo_jax.rollouts.rollout_batch import RolloutBatch
from sdpo_jax.training.batch import BatchLayout, MicroBatchPlan, make_tokens
from sdpo_jax.training.scoring import Scorer
from sdpo_jax.training.teacher_pass import TeacherOutputs, TeacherPass
from sdpo_jax.training.token_metrics import agreement_shares
from sdpo_jax.training.updates import (
    MiniBatch,
    Update,
    in_order,
    make_update,
    split_mini_batches,
    with_outcomes,
)


class SdpoUpdates:
    """Contexts, the teacher's forward pass, and the tokens to distill, to reinforce, or both."""

    def __init__(
        self,
        config: Config,
        objective: SdpoConfig,
        contexts: Contexts,
        teacher_pass: TeacherPass,
        scorer: Scorer,
        devices: Devices,
    ):
        self.contexts = contexts
        self._config, self._objective = config, objective
        self._teacher_pass, self._scorer, self._devices = teacher_pass, scorer, devices
        self._form = teacher_pass.form

    def __call__(
        self,
        experience: RolloutBatch,
        params: Params,
        teacher_params: Params,
        *,
        step: int,
        clock: PhaseTimer,
    ) -> tuple[list[Update], dict[str, float]]:
        """Updates of one generation batch, and how much of it had a teacher signal."""
        objective = self._objective
        with clock.phase("teacher"):
            prompts, metrics = self.contexts(experience, step)
            has_teacher = np.asarray([ids is not None for ids in prompts])
            shares = make_loss_weights(self._config, objective, experience, has_teacher, step)
            parts = split_mini_batches(
                self._config,
                experience,
                shares.counted,
                worth_computing(objective, shares),
                objective.reduction,
                self._form,
                skip=objective.skip_first_tokens,
            )
            # Where a rollout without a context is computed, its teacher reads the plain question.
            asked = [ids or experience.prompt_ids[i] for i, ids in enumerate(prompts)]
            sides: list[TeacherOutputs] = []
            if objective.credit != "fixed_negative":
                sides = self._teacher_pass.sides(
                    experience, parts, asked, teacher_params, params, clock
                )
            if objective.credit in BY_ADVANTAGE:
                updates, more = self._by_advantage(experience, parts, sides, has_teacher, shares)
                metrics |= more
            else:
                updates = [
                    self._by_divergence(experience, part, side, has_teacher, shares)
                    for part, side in zip(parts, sides, strict=True)
                ]
            jax.block_until_ready(updates)
        return updates, metrics

    def _by_divergence(
        self,
        experience: RolloutBatch,
        part: MiniBatch,
        side: TeacherOutputs,
        has_teacher: NDArray[np.bool_],
        shares: LossWeights,
    ) -> Update:
        """Credit for candidates or sampled tokens, which the loss itself makes."""
        objective, devices = self._objective, self._devices
        judged = verdicts(experience.outcomes, shares.distill != 0)
        distill = own_reduction(objective, experience, part, has_teacher, shares)
        weights = [
            np.full(len(x), distill[i]) for x, i in zip(part.weights, part.rows, strict=True)
        ]
        if objective.token_weights == "teacher_entropy":
            scores = self._scorer.of_teacher(part, *side)
            counts = [w * (x > 0) for w, x in zip(weights, part.weights, strict=True)]
            weights = entropy_weighted(counts, scores, beta=objective.token_weight_beta)
        if not is_mixed(objective):
            if weighs(objective):
                pairs = zip(part.weights, weights, strict=True)
                part = part._replace(weights=[a * b for a, b in pairs])
            placed = in_order(part, side.tokens)
            update = make_update(part, placed, side.constants, self._form, devices)
            return with_outcomes(update, part, judged, devices)
        rows = [(len(experience.response_ids[i]), i) for i in part.rows]
        repeated = [np.full(n, shares.reinforce[i]) for n, i in rows]
        advantages = [np.full(n, shares.advantages[i]) for n, i in rows]

        def mixed(known: SdpoTokenInputs, micro_batch: MicroBatchPlan) -> MixedTokenInputs:
            place = partial(make_tokens, micro_batch=micro_batch, devices=devices, dtype=np.float32)
            assert known.old_log_probs is not None  # the teacher's pass always has them
            grpo = GrpoTokenInputs(known.targets, known.old_log_probs, place(advantages))
            return MixedTokenInputs(known, grpo, place(weights), place(repeated))

        tokens = [mixed(*x) for x in zip(side.tokens, part.micro_batches, strict=True)]
        constants = MixedSharedInputs(side.constants, GrpoSharedInputs(side.constants.temperature))
        update = make_update(part, in_order(part, tokens), constants, self._form, devices)
        return with_outcomes(update, part, judged, devices)

    def _by_advantage(
        self,
        experience: RolloutBatch,
        parts: list[MiniBatch],
        sides: list[TeacherOutputs],
        has_teacher: NDArray[np.bool_],
        shares: LossWeights,
    ) -> tuple[list[Update], dict[str, float]]:
        """Credit that is known before the loss."""
        updates: list[Update] = []
        gaps: list[NDArray[np.float32]] = []
        agreeing = np.zeros(4)
        judged = verdicts(experience.outcomes, shares.distill != 0)
        for number, part in enumerate(parts):
            gap = None
            if sides:
                scores = self._scorer.of_teacher(part, *sides[number])
                gap = log_ratios(scores.log_probs, [experience.log_probs[i] for i in part.rows])
                gaps += gap
                active = [x * (w > 0) for x, w in zip(gap, part.weights, strict=True)]
                agreeing += gap_agreement(active, judged[part.rows])
            distill = own_reduction(self._objective, experience, part, has_teacher, shares)
            advantages = token_advantages(
                self._config, self._objective, experience, part, gap, distill, shares
            )
            temperature = self._config.rollout.temperature
            updates.append(
                grpo_update(experience, part, advantages, temperature, self._form, self._devices)
            )
        if not gaps:
            return updates, {}
        mean = float(np.mean(np.concatenate(gaps)))
        return updates, {"teacher_gap": mean, **agreement_shares(agreeing)}


class GrpoUpdates:
    """Group-relative advantages on every token of a response."""

    def __init__(self, config: Config, objective: GrpoConfig, devices: Devices, form: BatchLayout):
        self._config, self._objective = config, objective
        self._devices, self._form = devices, form

    def __call__(
        self,
        experience: RolloutBatch,
        params: Params,
        teacher_params: Params,
        *,
        step: int,
        clock: PhaseTimer,
    ) -> tuple[list[Update], dict[str, float]]:
        """Updates of one generation batch, and how much of it had an advantage."""
        del params, teacher_params, step
        with clock.phase("advantages"):
            advantages = graded_advantages(experience)
            active, signal = np.ones(len(advantages), np.bool_), advantages != 0.0
            # A KL moves rollouts without an advantage, too.
            worth = active if self._objective.reference_kl > 0 else signal
            parts = split_mini_batches(
                self._config, experience, active, worth, self._objective.reduction, self._form
            )
            updates = [self._update(experience, part, advantages) for part in parts]
        signal = signal[experience.graded]
        return updates, {"advantage_signal": float(np.mean(signal)) if len(signal) else 0.0}

    def _update(
        self, experience: RolloutBatch, part: MiniBatch, advantages: NDArray[np.float32]
    ) -> Update:
        repeated = [np.full(len(experience.response_ids[i]), advantages[i]) for i in part.rows]
        temperature = self._config.rollout.temperature
        return grpo_update(experience, part, repeated, temperature, self._form, self._devices)


def grpo_update(
    experience: RolloutBatch,
    part: MiniBatch,
    advantages: Sequence[NDArray[np.float32]],
    temperature: float,
    form: BatchLayout,
    devices: Devices,
) -> Update:
    """An update by advantages, `[|y|]` for each of the part's rows."""
    responses = [experience.response_ids[i] for i in part.rows]
    old = [experience.log_probs[i] for i in part.rows]

    def tokens(micro_batch: MicroBatchPlan) -> GrpoTokenInputs:
        place = partial(make_tokens, micro_batch=micro_batch, devices=devices)
        return GrpoTokenInputs(
            targets=place(responses, dtype=np.int32),
            old_log_probs=place(old, dtype=np.float32),
            advantages=place(advantages, dtype=np.float32),
        )

    constants = GrpoSharedInputs(jnp.float32(temperature))
    return make_update(part, tokens, constants, form, devices)
