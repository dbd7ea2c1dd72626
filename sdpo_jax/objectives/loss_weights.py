"""Who learns from what: the weight of distillation and of GRPO in each rollout of a batch.

Every switch of a recipe that weighs whole rollouts is here: the mix, the route, the schedule of the
distillation's coefficient, the weight of a question. Validated rule by rule and at the ends, where
a mix is SDPO or GRPO (tests/test_loss_weights.py, tests/test_recipe_switches.py).

Equation 3 of arXiv 2601.20802 does not say how its two terms are divided; each has its own
reduction here, so that λ = 0 and λ = 1 are SDPO and GRPO themselves.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from sdpo_jax.config import Config
from sdpo_jax.config.objectives import SdpoConfig
from sdpo_jax.losses.policy_gradient import group_advantages
from sdpo_jax.losses.weights import outcome_routing, pass_rate_weights, positive_only
from sdpo_jax.rollouts.rollout_batch import RolloutBatch
from sdpo_jax.teacher.context import is_success

Rows = NDArray[np.float32]
"""[N], one number for each rollout."""


class LossWeights(NamedTuple):
    """How much each rollout counts in either term."""

    counted: NDArray[np.bool_]  # [N], in the denominator
    distill: Rows
    reinforce: Rows
    advantages: Rows
    coefficient: float = 1.0  # of the schedule


def make_loss_weights(
    config: Config,
    objective: SdpoConfig,
    experience: RolloutBatch,
    has_teacher: NDArray[np.bool_],
    step: int,
) -> LossWeights:
    """Weights of a generation batch; a rollout that could not be graded has none."""
    graded, distill = experience.graded, has_teacher.astype(np.float32)
    advantages = np.zeros_like(distill)
    if reinforces(objective):
        advantages = graded_advantages(experience)
    reinforce = np.zeros_like(distill)
    if objective.route == "outcome":
        passed = np.asarray([is_success(o, config.teacher) for o in experience.outcomes])
        routes = outcome_routing(jnp.asarray(passed), jnp.asarray(has_teacher))
        distill, reinforce = np.asarray(routes.distill), np.asarray(routes.policy_gradient)
    elif reinforces(objective):
        if objective.route == "positive":
            distill = distill * np.asarray(positive_only(jnp.asarray(advantages)))
        distill = distill * np.float32(1.0 - objective.grpo_weight)
        reinforce = np.full_like(distill, objective.grpo_weight)
    scale = distillation_coefficient(objective, step, config.train.steps)
    distill = distill * np.float32(scale) * question_weights(config, objective, experience)
    counted = graded if reinforces(objective) else has_teacher
    return LossWeights(counted, distill * graded, reinforce * graded, advantages, scale)


def reinforces(objective: SdpoConfig) -> bool:
    """Whether a term with the reward's advantages stands beside the distillation."""
    return objective.grpo_weight > 0 or objective.route != "none" or objective.credit == "modulated"


def weighs(objective: SdpoConfig) -> bool:
    """Whether rollouts or tokens differ in the weight of their distillation."""
    return (
        objective.question_weights != "none"
        or objective.token_weights == "teacher_entropy"
        or objective.distillation_warmup_steps > 0
        or objective.distillation_decay_steps > 0
    )


def distillation_coefficient(objective: SdpoConfig, step: int, steps: int) -> float:
    """min(1, k / T_w) · min(1, (T - k) / T_d) at step k of T, counted from 1.

    Source: β(k) of SDPG, arXiv 2606.04036.
    """
    up = step / objective.distillation_warmup_steps if objective.distillation_warmup_steps else 1.0
    decay = objective.distillation_decay_steps
    down = (steps - step) / decay if decay else 1.0
    return min(1.0, up) * min(1.0, down)


def question_weights(config: Config, objective: SdpoConfig, experience: RolloutBatch) -> Rows:
    """√(p (1 - p)) of each rollout's group over its mean; p among the graded siblings."""
    count = len(experience.outcomes)
    if objective.question_weights == "none":
        return np.ones(count, np.float32)
    graded = experience.graded.reshape(-1, experience.group)
    passed = np.asarray([is_success(o, config.teacher) for o in experience.outcomes])
    rates = passed.reshape(graded.shape).sum(axis=1) / np.maximum(graded.sum(axis=1), 1)
    rates = np.repeat(rates.astype(np.float32), experience.group)
    floor = objective.question_weight_floor
    return np.asarray(pass_rate_weights(jnp.asarray(rates), experience.group, floor=floor))


def graded_advantages(experience: RolloutBatch) -> Rows:
    """Advantages [N] among the graded siblings; 0 for a rollout that could not be graded."""
    rewards = np.asarray([o.reward for o in experience.outcomes], np.float32)
    graded = experience.graded.reshape(-1, experience.group)
    siblings = np.repeat(graded.sum(axis=1), experience.group)  # [N]
    advantages = np.zeros(len(rewards), np.float32)
    for count in np.unique(siblings[experience.graded]).tolist():
        rows = np.flatnonzero(experience.graded & (siblings == count))
        advantages[rows] = np.asarray(group_advantages(jnp.asarray(rewards[rows]), count))
    return advantages
