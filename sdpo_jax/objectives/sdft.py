"""SDFT: the student answers the questions of demonstrations; the teacher was shown them.

    demonstrations -> question -> student's own response          sampled, not graded
                   -> question + demonstration -> teacher          scores that response
                   divergence of both, mean over responses of token means -> update

The same loss, teacher and passes as SDPO; what the teacher sees comes from data instead of from an
environment (arXiv 2601.19897, section 3). Departures from the authors' code, each tested: the
importance weight compares the student before each update with the sampler (theirs compares two
engines on the same weights, which are one here); a demonstration that is too long loses its end.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax
import numpy as np

from sdpo_jax.config import Config, ObjectiveConfig, Problem, above, at_least, between, setting
from sdpo_jax.losses.per_token import SdpoTokenInputs, sdpo_per_token
from sdpo_jax.losses.sequence_importance import SdftTokenInputs, sequence_weighted_head
from sdpo_jax.objectives.sdpo import check_support, divergence_of
from sdpo_jax.rollouts.phase_timer import PhaseTimer
from sdpo_jax.rollouts.rollout_batch import RolloutBatch
from sdpo_jax.teacher.context import ATTEMPTS, EXAMPLE
from sdpo_jax.teacher.contexts import demonstration_contexts
from sdpo_jax.training.batch import MiniBatch, PackedBatch, rollout_numbers
from sdpo_jax.training.engine import Engine, Models
from sdpo_jax.training.objective import Objective
from sdpo_jax.training.step import Update
from sdpo_jax.training.teacher_pass import shared_inputs, token_inputs
from sdpo_jax.training.token_metrics import PAIRS, SAMPLED, SPREAD


@dataclass(frozen=True)
class SdftConfig(ObjectiveConfig):
    """Self-distillation from a teacher that sees a demonstration (SDFT, arXiv 2601.19897).

    Questions come from `[data]`, `data.rows_per_step` a step; the student answers each
    `rollout.rollouts_per_prompt` times. Nothing is graded, and a response that was cut off is kept,
    as in the authors' code.
    """

    learns_from = "demonstrations"
    has_teacher = True

    name: Literal["sdft"] = "sdft"
    alpha: float = setting(0.0, between(0, 1))
    """0: KL(teacher || student), the default of the paper's code and, according to its authors
    (April 2026), the one behind its results; 1: KL(student || teacher), as in the paper's text;
    between: generalized Jensen-Shannon."""
    top_k: int = setting(0, at_least(0))
    """Compare on the student's likeliest tokens, the rest in one bucket; 0 compares the whole
    vocabulary, as the paper does."""
    importance_cap: float = setting(2.0, above(0))
    """Upper bound of the ratio of new to rollout probability, per token. A response's weight is the
    mean of the capped ratios of its tokens, detached."""
    skip_first_tokens: int = setting(3, at_least(0))
    """Tokens at a response's start that the loss leaves out: there the teacher copies the
    demonstration's opening."""
    closing: Literal["own", "correct"] = "own"
    """Last sentence of the teacher's prompt. `own`: a request for an answer of the model's own, as
    in the paper; `correct`: a request for a correct one, as with `sdpo`, which is the only sentence
    that the embedded model has learned."""
    reduction: Literal["token_mean", "sequence_mean"] = "sequence_mean"
    """Mean over active tokens or over rows of token means (the authors' code)."""

    def check(self, config: Config) -> Iterator[Problem]:
        """Yields a skipped start that is as long as a response."""
        limit = config.rollout.max_response_tokens
        if self.skip_first_tokens >= limit:
            key = "rollout.max_response_tokens"
            expected = f"below {key} ({limit}): no token would be left to learn from"
            yield Problem("objective.skip_first_tokens", expected, (key,))

    def check_vocabulary(self, size: int) -> Iterator[Problem]:
        """Yields a support that is larger than the vocabulary."""
        yield from check_support(self.top_k, size)


def sdft(settings: SdftConfig) -> Objective:
    """The objective of these settings."""
    divergence = divergence_of(settings.alpha, settings.top_k)
    return Objective(
        settings=settings,
        loss=sdpo_per_token(divergence),
        metrics=("divergence", *SAMPLED, *PAIRS, *SPREAD, "importance"),
        make_updates=partial(make_updates, settings),
        head_loss=partial(sequence_weighted_head, settings.importance_cap),
        contexts=demonstration_contexts,
        wording=EXAMPLE if settings.closing == "own" else ATTEMPTS,
        divergence=divergence,
        columns=(
            *("accuracy", "teacher_accuracy", "response_tokens", "divergence"),
            *("seconds_rollout", "seconds_teacher", "seconds_train"),
        ),
    )


def make_updates(
    settings: SdftConfig,
    engine: Engine,
    rollouts: RolloutBatch,
    models: Models,
    /,
    *,
    step: int,
    timer: PhaseTimer,
) -> tuple[list[Update], dict[str, float]]:
    """The updates of a step, and the share of rollouts that have a teacher."""
    with timer.phase("teacher"):
        contexts = engine.teacher_contexts(rollouts, step)
        given = engine.teacher_prompts.of_rollouts(rollouts.prompts, rollouts.group, contexts)
        active = np.asarray([ids is not None for ids in given])
        skip, prompts = settings.skip_first_tokens, [ids or [] for ids in given]
        mini_batches = engine.split(
            rollouts,
            active=active,
            worth=active & (rollouts.lengths > skip),
            reduction=settings.reduction,
            skip=skip,
        )
        shared = shared_inputs(engine, models) if mini_batches else None
        # All passes of the teacher run before the first update: it may be the student.
        inputs = [token_inputs(engine, rollouts, x, prompts, models, timer) for x in mini_batches]
        updates = [
            engine.update(x, _numbered(engine, x, known), shared, timer=timer)
            for x, known in zip(mini_batches, inputs, strict=True)
        ]
        jax.block_until_ready(updates)
    return updates, {"teacher_signal": float(np.mean(active))}


def _numbered(
    engine: Engine, mini_batch: MiniBatch, inputs: list[SdpoTokenInputs]
) -> list[SdftTokenInputs]:
    """The inputs with the number of each token's rollout, for weights of whole responses."""

    def numbered(known: SdpoTokenInputs, packed: PackedBatch) -> SdftTokenInputs:
        numbers = rollout_numbers(mini_batch.pairs, packed)
        return SdftTokenInputs(known, engine.place(numbers, packed, np.int32))

    return [numbered(*x) for x in zip(inputs, mini_batch.micro_batches, strict=True)]
