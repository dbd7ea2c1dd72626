"""Per-rollout weights of the distillation and policy-gradient terms.

Every switch of a recipe that weighs whole rollouts is here: the mix, the route, the schedule of the
distillation's coefficient, the weight of a question. Validated rule by rule and at the ends, where
a mix is SDPO or GRPO (tests/test_loss_weights.py, tests/test_switches.py).

Equation 3 of arXiv 2601.20802 does not say how its two terms are divided; each has its own
reduction here, so that λ = 0 and λ = 1 are SDPO and GRPO themselves.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from sdpo_jax.config import Config, ObjectiveConfig, TeacherConfig, at_least, between, setting
from sdpo_jax.losses.policy_gradient import group_advantages
from sdpo_jax.losses.weights import outcome_routing, pass_rate_weights, positive_only
from sdpo_jax.rollouts.rollout_batch import RolloutBatch
from sdpo_jax.teacher.context import is_success

Rows = NDArray[np.float32]
"""[N], one number for each rollout."""


@dataclass(frozen=True)
class MixConfig(ObjectiveConfig):
    """The settings of `sdpo` that weigh whole rollouts."""

    credit: Literal["logit", "token", "sequence", "modulated", "fixed_negative"] = "logit"
    """Granularity of the credit (the paper's section 4.2). `logit`: every candidate token of each
    position, by the divergence; `token`: the sampled token; `sequence`: the whole rollout, by its
    tokens' mean advantage. `modulated`: the reward's advantage, scaled per token by the teacher
    (RLSD, arXiv 2604.03128). `fixed_negative`: a control that does not use the teacher's
    probabilities (OPSA, arXiv 2608.31046): the advantage is -1 at those tokens of a failure that
    were less likely than `control_probability`, else 0."""
    grpo_weight: float = setting(0.0, between(0, 1))
    """lambda in lambda * GRPO + (1 - lambda) * SDPO (equation 3 of the paper, with 0.9). Each term
    has its own reduction, and GRPO its default clips. 0 is SDPO, 1 is GRPO."""
    route: Literal["none", "outcome", "positive"] = "none"
    """`outcome`: failures with a teacher are distilled and all other rollouts go to GRPO, under one
    denominator (SRPO, arXiv 2604.02288). `positive`: only rollouts with an advantage above 0 are
    distilled (SDPG, arXiv 2606.04036), beside GRPO with `grpo_weight`."""
    distillation_warmup_steps: int = setting(0, at_least(0))
    """Steps over which the distillation's coefficient rises to 1 (SDPG)."""
    distillation_decay_steps: int = setting(0, at_least(0))
    """Steps at the end of the run over which the coefficient falls; it is 0 in the last step."""
    question_weights: Literal["none", "pass_rate"] = "none"
    """`pass_rate`: sqrt(p (1 - p)) over its batch mean, where p is the group's pass rate (SC-SDPO,
    arXiv 2605.27765)."""
    question_weight_floor: float = setting(0.1, at_least(0))
    """Lower bound of sqrt(p (1 - p)). With 0 a group that all passed or all failed has no
    weight."""


class LossWeights(NamedTuple):
    """How much each rollout counts in either term."""

    active: NDArray[np.bool_]  # [N], in the denominator
    distill: Rows
    policy_gradient: Rows
    advantages: Rows
    coefficient: float = 1.0  # of the distillation's schedule


def make_loss_weights(
    config: Config,
    settings: MixConfig,
    rollouts: RolloutBatch,
    has_teacher: NDArray[np.bool_],
    step: int,
) -> LossWeights:
    """Weights of a rollout batch; a rollout that could not be graded has none."""
    graded, distill = rollouts.graded, has_teacher.astype(np.float32)
    advantages = np.zeros_like(distill)
    if has_policy_gradient(settings):
        advantages = graded_advantages(rollouts)
    policy_gradient = np.zeros_like(distill)
    if settings.route == "outcome":
        passed = _passed(rollouts, config.teacher)
        routes = outcome_routing(jnp.asarray(passed), jnp.asarray(has_teacher))
        distill, policy_gradient = np.asarray(routes.distill), np.asarray(routes.policy_gradient)
    elif has_policy_gradient(settings):
        if settings.route == "positive":
            distill = distill * np.asarray(positive_only(jnp.asarray(advantages)))
        distill = distill * np.float32(1.0 - settings.grpo_weight)
        policy_gradient = np.full_like(distill, settings.grpo_weight)
    scale = distillation_coefficient(settings, step, config.train.steps)
    distill = distill * np.float32(scale) * question_weights(config, settings, rollouts)
    active = graded if has_policy_gradient(settings) else has_teacher
    return LossWeights(active, distill * graded, policy_gradient * graded, advantages, scale)


def has_policy_gradient(settings: MixConfig) -> bool:
    """Whether a term with the reward's advantages stands beside the distillation."""
    return settings.grpo_weight > 0 or settings.route != "none" or settings.credit == "modulated"


def distillation_coefficient(settings: MixConfig, step: int, steps: int) -> float:
    """min(1, k / T_w) · min(1, (T - k) / T_d) at step k of T, counted from 1.

    Source: β(k) of SDPG, arXiv 2606.04036.
    """
    up = step / settings.distillation_warmup_steps if settings.distillation_warmup_steps else 1.0
    decay = settings.distillation_decay_steps
    down = (steps - step) / decay if decay else 1.0
    return min(1.0, up) * min(1.0, down)


def question_weights(config: Config, settings: MixConfig, rollouts: RolloutBatch) -> Rows:
    """√(p (1 - p)) of each rollout's group over its mean; p among the graded siblings."""
    count = len(rollouts.outcomes)
    if settings.question_weights == "none":
        return np.ones(count, np.float32)
    graded = rollouts.graded.reshape(-1, rollouts.group)
    passed = _passed(rollouts, config.teacher)
    rates = passed.reshape(graded.shape).sum(axis=1) / np.maximum(graded.sum(axis=1), 1)
    rates = np.repeat(rates.astype(np.float32), rollouts.group)
    floor = settings.question_weight_floor
    return np.asarray(pass_rate_weights(jnp.asarray(rates), rollouts.group, floor=floor))


def _passed(rollouts: RolloutBatch, teacher: TeacherConfig) -> NDArray[np.bool_]:
    return np.asarray([is_success(outcome, teacher) for outcome in rollouts.outcomes])


def graded_advantages(rollouts: RolloutBatch) -> Rows:
    """Advantages [N] among the graded siblings; 0 for a rollout that could not be graded."""
    rewards = np.asarray([o.reward for o in rollouts.outcomes], np.float32)
    graded = rollouts.graded.reshape(-1, rollouts.group)
    siblings = np.repeat(graded.sum(axis=1), rollouts.group)  # [N]
    advantages = np.zeros(len(rewards), np.float32)
    for count in np.unique(siblings[rollouts.graded]).tolist():
        rows = np.flatnonzero(rollouts.graded & (siblings == count))
        advantages[rows] = np.asarray(group_advantages(jnp.asarray(rewards[rows]), count))
    return advantages
