"""Token weights and per-token advantages from teacher log-probs and per-rollout weights.

Advantages from a teacher are log q(y_t) - log π(y_t) of the rollout's own log-probabilities, known
before the first update; from the second mini-batch on the surrogate's ratio corrects for the rest.
Log-ratios are clipped to ±20. Validated against numpy (tests/test_loss_weights.py).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from sdpo_jax.config import POSITIVE_SHARE, Config, Problem, at_least, between, setting
from sdpo_jax.losses.credit import modulate_advantages, sequence_advantages
from sdpo_jax.losses.weights import MAX_LOG_RATIO, teacher_entropy_weights
from sdpo_jax.model import Params
from sdpo_jax.objectives.loss_weights import LossWeights, MixConfig, Rows, has_policy_gradient
from sdpo_jax.rollouts.phase_timer import PhaseTimer
from sdpo_jax.rollouts.rollout_batch import RolloutBatch
from sdpo_jax.teacher.context import is_success
from sdpo_jax.training.batch import MiniBatch, reduction_weights, response_mask
from sdpo_jax.training.engine import Engine, Scores

BY_ADVANTAGE = ("sequence", "modulated", "fixed_negative")
"""Credits that are known before the loss: they run through GRPO's surrogate."""

Ragged = list[NDArray[np.float32]]
"""`[|y|]` for each row of a mini-batch."""


@dataclass(frozen=True)
class CreditConfig(MixConfig):
    """The settings of `sdpo` that weigh tokens, and those that every credit shares."""

    control_probability: float = setting(0.1, POSITIVE_SHARE)
    """Probability of a token below which `fixed_negative` penalizes it."""
    modulation: float = setting(0.5, between(0, 1))
    """Share of `modulated` advantages that the teacher scales; 0 is GRPO."""
    modulation_bound: float = setting(0.2, between(0, 1))
    """How far from 1 the teacher's factor may be."""
    token_weights: Literal["none", "teacher_entropy", "disagreement"] = "none"
    """`teacher_entropy`: exp(-beta H(q)) over its mean, where H(q) is the teacher's entropy (SRPO);
    `disagreement`: less where the two distributions are far apart (DemoPSD, arXiv 2607.02502)."""
    token_weight_beta: float = setting(1.0, at_least(0))
    """beta of the token weights: 1 in SRPO. A divergence is at most 0.69, so `disagreement` needs
    5 or more to have much effect."""
    disagreement_reduction: float = setting(0.5, between(0, 1))
    """The most that `disagreement` subtracts from a token's weight of 1."""
    reduction: Literal["token_mean", "sequence_mean"] = "token_mean"
    """Mean over active tokens (the paper) or over rows of token means (its released code)."""
    skip_first_tokens: int = setting(0, at_least(0))
    """Tokens at a response's start that the loss leaves out (SDFT, arXiv 2601.19897: 3)."""
    reference_kl: float = setting(0.0, at_least(0))
    """Coefficient of the KL to the initial model without context, on every active token."""

    def check_credit(self, config: Config) -> Iterator[Problem]:
        """Yields switches that do not combine."""
        others = ("objective.credit",)
        if self.credit not in ("logit", "token") and self.token_weights != "none":
            yield Problem("objective.token_weights", f'"none" with credit "{self.credit}"', others)
        if self.credit == "modulated":
            for key, value in (("route", self.route), ("question_weights", self.question_weights)):
                if value != "none":
                    yield Problem(f"objective.{key}", '"none" with credit "modulated"', others)
            if self.grpo_weight:
                expected = '0 with credit "modulated": every rollout has GRPO\'s advantage already'
                yield Problem("objective.grpo_weight", expected, others)
        if self.route == "outcome" and self.grpo_weight:
            expected = '0 with route "outcome": each rollout is in one term'
            yield Problem("objective.grpo_weight", expected, ("objective.route",))
        limit = config.rollout.max_response_tokens
        if self.skip_first_tokens >= limit:
            key = "rollout.max_response_tokens"
            yield Problem("objective.skip_first_tokens", f"below {key} ({limit})", (key,))
        if has_policy_gradient(self) and config.rollout.rollouts_per_prompt < 2:
            expected = "at least 2: an advantage compares siblings"
            others = ("objective.grpo_weight", "objective.route")
            yield Problem("rollout.rollouts_per_prompt", expected, others)


class WeighedStep(NamedTuple):
    """What the updates of a step have in common."""

    settings: CreditConfig
    engine: Engine
    rollouts: RolloutBatch
    has_teacher: NDArray[np.bool_]  # [N]
    weights: LossWeights  # of the rollouts in either term
    reference: Params  # weights for a KL to the initial model; None: no KL
    timer: PhaseTimer


def has_unequal_weights(settings: CreditConfig) -> bool:
    """Whether rollouts or tokens differ in the weight of their distillation."""
    return (
        settings.question_weights != "none"
        or settings.token_weights == "teacher_entropy"
        or settings.distillation_warmup_steps > 0
        or settings.distillation_decay_steps > 0
    )


def is_mixed(settings: CreditConfig) -> bool:
    """Whether tokens carry weights of their own for a distillation and a policy-gradient term.

    They also do beside a KL to the reference, which counts in full where the distillation does not.
    """
    if settings.credit in BY_ADVANTAGE:
        return False
    if has_policy_gradient(settings):
        return True
    return settings.reference_kl > 0 and has_unequal_weights(settings)


def worth_computing(settings: CreditConfig, weights: LossWeights) -> NDArray[np.bool_]:
    """[N], rollouts whose tokens can move the parameters."""
    if settings.reference_kl > 0:
        return weights.active
    if settings.credit == "modulated":
        return weights.advantages != 0
    return (weights.distill != 0) | (weights.policy_gradient * weights.advantages != 0)


def distillation_weights(step: WeighedStep, mini_batch: MiniBatch) -> Rows:
    """[N], weights of the distillation that divide it by its own rows alone in a mix.

    Under `route = "outcome"` both terms have one denominator (SRPO), and without GRPO there is one.
    """
    settings, rollouts, distill = step.settings, step.rollouts, step.weights.distill
    if not has_policy_gradient(settings) or settings.route == "outcome":
        return distill
    block = mini_batch.graded_rows
    lengths, reduction = rollouts.lengths[block], settings.reduction
    written, skip = response_mask(rollouts, block), settings.skip_first_tokens
    most = int(lengths.max())
    _, alone = reduction_weights(lengths, step.has_teacher[block], most, reduction, written, skip)
    return distill * np.float32(mini_batch.denominator / max(alone, 1.0))


def entropy_weighted(weights: Ragged, entropies: Ragged, *, beta: float) -> Ragged:
    """`weights · teacher_entropy_weights`, of mean 1 over an update's tokens with a weight."""
    flat = np.concatenate(weights)
    found = teacher_entropy_weights(
        jnp.asarray(np.concatenate(entropies))[None], jnp.asarray(flat != 0)[None], beta=beta
    )
    cuts = np.cumsum([len(x) for x in weights])[:-1]
    return np.split((np.asarray(found)[0] * flat).astype(np.float32), cuts)


def token_advantages(step: WeighedStep, mini_batch: MiniBatch, gaps: Ragged | None) -> Ragged:
    """The advantage of each token of a mini-batch, under a credit that is known before the loss.

    Args:
      step: its settings have one of `BY_ADVANTAGE` for `credit`.
      mini_batch: its rows.
      gaps: log q(y_t) - log π(y_t); None under `fixed_negative`.
    """
    lengths, weights = [len(x) for x in mini_batch.weights], step.weights
    if step.settings.credit == "modulated":
        return _rows(_modulated(step, mini_batch, gaps or []), lengths)
    if step.settings.credit == "fixed_negative":
        credit = [_negative(step, i) for i in mini_batch.rows]
    else:
        mask = _padded([(x > 0).astype(np.float32) for x in mini_batch.weights])
        means = sequence_advantages(jnp.asarray(_padded(gaps or [])), jnp.asarray(mask))
        credit = _rows(means, lengths)
    distill = distillation_weights(step, mini_batch)
    return [
        distill[i] * own + np.float32(weights.policy_gradient[i] * weights.advantages[i])
        for own, i in zip(credit, mini_batch.rows, strict=True)
    ]


def _modulated(step: WeighedStep, mini_batch: MiniBatch, gaps: Ragged) -> object:
    settings, weights = step.settings, step.weights
    # A rollout without a context has no teacher, only the plain question's: its gap is noise.
    known = [g * (weights.distill[i] != 0) for g, i in zip(gaps, mini_batch.rows, strict=True)]
    old = _padded([step.rollouts.log_probs[i] for i in mini_batch.rows])
    return modulate_advantages(
        jnp.asarray(weights.advantages[mini_batch.rows]),
        jnp.asarray(old),
        jnp.asarray(old + _padded(known)),
        strength=settings.modulation * weights.coefficient,
        bound=settings.modulation_bound,
    )


def _negative(step: WeighedStep, row: int) -> NDArray[np.float32]:
    """-1 where a failure's token was unlikely when it was sampled (OPSA, arXiv 2608.31046)."""
    unlikely = step.rollouts.log_probs[row] < np.log(step.settings.control_probability)
    failed = not is_success(step.rollouts.outcomes[row], step.engine.config.teacher)
    return -(unlikely & failed).astype(np.float32)


def log_ratios(scores: Scores, old: Ragged) -> Ragged:
    """Log q(y_t) - log π(y_t), clipped to ±20."""
    return [
        np.clip(q - p, -MAX_LOG_RATIO, MAX_LOG_RATIO)
        for q, p in zip(scores.log_probs, old, strict=True)
    ]


def _padded(rows: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
    """[B, T], zero beyond the data."""
    out = np.zeros((len(rows), max(len(x) for x in rows)), np.float32)
    for line, values in zip(out, rows, strict=True):
        line[: len(values)] = values
    return out


def _rows(values: object, lengths: Sequence[int]) -> Ragged:
    array = np.asarray(values, np.float32)
    return [line[:n] for line, n in zip(array, lengths, strict=True)]
