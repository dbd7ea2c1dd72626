"""SDPO: the model, shown feedback or a successful sibling, teaches itself (arXiv 2601.20802).

    graded rollouts -> contexts           a successful sibling's response, else the feedback
                    -> teacher prompts    question and context, within a token budget
                    -> hidden states      of the teacher, at the student's own response tokens
                    -> inputs, weights    of each token; rows without a signal were dropped before
                    -> update             divergence of student and teacher (equation 1)

`make_updates` reads in that order. The switches of follow-up papers plug in from files of their
own: `loss_weights` weighs whole rollouts, `credit` weighs tokens, `variants` makes the updates that
are no plain distillation. With default settings none of them does anything.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import numpy as np

from sdpo_jax.config import Config, Problem, above, at_least, between, setting
from sdpo_jax.losses.distillation import top_k_loss
from sdpo_jax.losses.divergences import generalized_jsd
from sdpo_jax.losses.fused_linear import PerTokenLoss
from sdpo_jax.losses.kl_penalty import with_reference_kl
from sdpo_jax.losses.per_token import (
    Divergence,
    mixed_per_token,
    sampled_token_sdpo,
    sdpo_per_token,
)
from sdpo_jax.losses.token_stats import TokenStats
from sdpo_jax.losses.weights import disagreement_weights
from sdpo_jax.objectives.credit import (
    BY_ADVANTAGE,
    CreditConfig,
    WeighedStep,
    is_mixed,
    worth_computing,
)
from sdpo_jax.objectives.grpo import GrpoConfig, surrogate
from sdpo_jax.objectives.loss_weights import make_loss_weights
from sdpo_jax.objectives.variants import advantage_updates, weighted_update
from sdpo_jax.rollouts.diagnostics import demonstration_overlap
from sdpo_jax.rollouts.phase_timer import PhaseTimer
from sdpo_jax.rollouts.rollout_batch import RolloutBatch
from sdpo_jax.teacher.context import TeacherContext
from sdpo_jax.teacher.contexts import SiblingContexts
from sdpo_jax.training.engine import Engine, Models
from sdpo_jax.training.objective import Objective
from sdpo_jax.training.step import Update
from sdpo_jax.training.teacher_pass import shared_inputs, token_inputs
from sdpo_jax.training.token_metrics import AGREEMENT, PAIRS, SAMPLED, SPREAD


@dataclass(frozen=True)
class SdpoConfig(CreditConfig):
    """Self-distillation from feedback and successful siblings (arXiv 2601.20802)."""

    has_teacher = True

    name: Literal["sdpo"] = "sdpo"
    alpha: float = setting(0.5, between(0, 1))
    """0: KL(teacher || student); 1: KL(student || teacher); between: generalized Jensen-Shannon."""
    top_k: int = setting(0, at_least(0))
    """Compare on the student's likeliest tokens, the rest in one bucket (the paper: 100 or 20); 0
    compares the whole vocabulary, which the fused head affords."""
    importance_cap: float = setting(2.0, above(0))
    """Upper bound of the detached ratio of new to rollout probability, per token."""

    @property
    def depends_on_steps(self) -> bool:
        """Whether the distillation's coefficient falls over the last steps."""
        return self.distillation_decay_steps > 0

    def check(self, config: Config) -> Iterator[Problem]:
        """Yields what leaves the teacher without a context, and switches that do not combine."""
        yield from self._check_context(config)
        yield from self.check_credit(config)
        if self.credit == "token" and self.alpha != 1:
            expected = '1 with credit "token": only it has that form'
            yield Problem("objective.alpha", expected, ("objective.credit",))
        if self.credit == "token" and self.top_k:
            expected = '0 with credit "token": it has no support'
            yield Problem("objective.top_k", expected, ("objective.credit",))

    def _check_context(self, config: Config) -> Iterator[Problem]:
        teacher = config.teacher
        if teacher.demonstration == "none" and not teacher.feedback:
            expected = '"first", "shortest" or "random", or teacher.feedback = true: '
            expected += "the teacher would see what the student sees"
            yield Problem("teacher.demonstration", expected, ("teacher.feedback",))
        shows_siblings = teacher.demonstration != "none" and teacher.exclude_own_success
        if shows_siblings and config.rollout.rollouts_per_prompt < 2:
            expected = "at least 2 (a demonstration is a sibling's), "
            expected += 'or teacher.demonstration = "none"'
            others = ("teacher.demonstration", "teacher.exclude_own_success")
            yield Problem("rollout.rollouts_per_prompt", expected, others)

    def check_vocabulary(self, size: int) -> Iterator[Problem]:
        """Yields a support that is larger than the vocabulary."""
        yield from check_support(self.top_k, size)


def sdpo(settings: SdpoConfig) -> Objective:
    """The objective of these settings."""
    loss, metrics = _loss(settings)
    if settings.reference_kl:
        loss = with_reference_kl(loss, coefficient=settings.reference_kl)
        metrics = (*metrics, "reference_kl")
    return Objective(
        settings=settings,
        loss=loss,
        metrics=metrics,
        make_updates=partial(make_updates, settings),
        contexts=SiblingContexts,
        divergence=divergence_of(settings.alpha, settings.top_k),
        reference_kl=settings.reference_kl,
        columns=(
            *("reward", "accuracy", "teacher_accuracy", "response_tokens", "divergence"),
            *("teacher_signal", "seconds_rollout", "seconds_grade"),
            *("seconds_teacher", "seconds_train"),
        ),
    )


def make_updates(
    settings: SdpoConfig,
    engine: Engine,
    rollouts: RolloutBatch,
    models: Models,
    /,
    *,
    step: int,
    timer: PhaseTimer,
) -> tuple[list[Update], dict[str, float]]:
    """The updates of a step, and how much of it has a teacher signal."""
    with timer.phase("teacher"):
        contexts = engine.teacher_contexts(rollouts, step)
        given = engine.teacher_prompts.of_rollouts(rollouts.prompts, rollouts.group, contexts)
        has_teacher = np.asarray([ids is not None for ids in given])
        weights = make_loss_weights(engine.config, settings, rollouts, has_teacher, step)
        mini_batches = engine.split(
            rollouts,
            active=weights.active,
            worth=worth_computing(settings, weights),
            reduction=settings.reduction,
            skip=settings.skip_first_tokens,
        )
        # Where a rollout without a context is computed, its teacher reads the plain question.
        prompts = [ids or rollouts.prompt_ids[i] for i, ids in enumerate(given)]
        needs_teacher = settings.credit != "fixed_negative" and bool(mini_batches)
        shared: Any = shared_inputs(engine, models) if needs_teacher else None
        # All passes of the teacher run before the first update: it may be the student.
        inputs = [
            token_inputs(engine, rollouts, x, prompts, models, timer) if needs_teacher else None
            for x in mini_batches
        ]
        jax.block_until_ready(inputs)
    metrics = _context_metrics(engine, rollouts, contexts, int(has_teacher.sum()))
    reference = models.reference if settings.reference_kl else None
    known = WeighedStep(settings, engine, rollouts, has_teacher, weights, reference, timer)
    if settings.credit in BY_ADVANTAGE:
        updates, more = advantage_updates(known, mini_batches, inputs, shared)
        return updates, metrics | more
    pairs = zip(mini_batches, inputs, strict=True)
    return [weighted_update(known, x, tokens or [], shared) for x, tokens in pairs], metrics


def _context_metrics(
    engine: Engine, rollouts: RolloutBatch, contexts: list[TeacherContext | None], with_teacher: int
) -> dict[str, float]:
    shown = [context for context in contexts if context is not None]
    count = max(1, int(rollouts.graded.sum()))
    return {
        "teacher_signal": with_teacher / count,
        "shown/demonstration": sum(c.demonstration is not None for c in shown) / count,
        "shown/feedback": sum(c.feedback is not None for c in shown) / count,
        **demonstration_overlap(rollouts.response_ids, contexts, engine.tokenizer),
    }


def _loss(settings: SdpoConfig) -> tuple[PerTokenLoss, tuple[str, ...]]:
    """The loss of a token with every switch, and the token metrics that are reported."""
    clipped = surrogate(GrpoConfig())
    if settings.credit in BY_ADVANTAGE:
        return clipped, (*SAMPLED, "ratio", "clipped")
    options: dict[str, Any] = {"importance_cap": settings.importance_cap}
    metrics = ("divergence", *SAMPLED, *PAIRS, "ratio", AGREEMENT)
    if settings.token_weights == "disagreement":
        options["weigh"], metrics = partial(_disagreement, settings), (*metrics, "weight")
    if settings.credit == "token":
        loss = sampled_token_sdpo(**options)
    else:
        divergence = divergence_of(settings.alpha, settings.top_k)
        loss, metrics = sdpo_per_token(divergence, **options), (*metrics, *SPREAD)
    if is_mixed(settings):
        loss = mixed_per_token(loss, clipped)
        metrics = (*metrics, "clipped", "first_active", "second_active")
    return loss, metrics


def check_support(top_k: int, vocabulary: int) -> Iterator[Problem]:
    """Yields a support that is larger than the vocabulary."""
    if top_k > vocabulary:
        expected = f"at most {vocabulary}, the model's vocabulary; 0 compares all of it"
        yield Problem("objective.top_k", expected)


def divergence_of(alpha: float, top_k: int) -> Divergence:
    """The divergence over the vocabulary, or over the student's `top_k` likeliest tokens."""
    if top_k:
        return partial(top_k_loss, alpha=alpha, k=top_k, add_tail=True)
    return partial(generalized_jsd, alpha=alpha)


def _disagreement(settings: SdpoConfig, stats: TokenStats) -> jax.Array:
    return disagreement_weights(
        stats.jsd, beta=settings.token_weight_beta, max_reduction=settings.disagreement_reduction
    )
