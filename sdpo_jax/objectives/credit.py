"""Credit token by token: what a teacher's scores and a rollout's shares make of each token.

Advantages from a teacher are log q(y_t) - log π(y_t) of the rollout's own log-probabilities, known
before the first update; from the second mini-batch on the surrogate's ratio corrects for the rest.
Log-ratios are held within ±20. Validated against numpy (tests/test_token_credit.py).
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from sdpo_jax.config import Config
from sdpo_jax.config.objectives import SdpoConfig
from sdpo_jax.losses.credit import modulate_advantages, sequence_advantages
from sdpo_jax.losses.weights import MAX_LOG_RATIO, teacher_entropy_weights
from sdpo_jax.objectives.loss_weights import LossWeights, Rows, reinforces
from sdpo_jax.rollouts.rollout_batch import RolloutBatch
from sdpo_jax.teacher.context import is_success
from sdpo_jax.training.batch import reduction_weights
from sdpo_jax.training.scoring import Scores
from sdpo_jax.training.updates import MiniBatch, own_of

Ragged = list[NDArray[np.float32]]
"""`[|y|]` for each row of a part."""


def worth_computing(objective: SdpoConfig, shares: LossWeights) -> NDArray[np.bool_]:
    """[N], rollouts whose tokens can move the parameters."""
    if objective.reference_kl > 0:
        return shares.counted
    if objective.credit == "modulated":
        return shares.advantages != 0
    return (shares.distill != 0) | (shares.reinforce * shares.advantages != 0)


def own_reduction(
    objective: SdpoConfig,
    experience: RolloutBatch,
    part: MiniBatch,
    has_teacher: NDArray[np.bool_],
    shares: LossWeights,
) -> Rows:
    """Weights of the distillation, so that in a mix it is divided by its own rows alone.

    Under `route = "outcome"` both terms have one denominator (SRPO), and without GRPO there is one.
    """
    if not reinforces(objective) or objective.route == "outcome" or part.block is None:
        return shares.distill
    lengths, active = experience.lengths[part.block], has_teacher[part.block]
    _, own = reduction_weights(
        lengths,
        active,
        int(lengths.max()),
        objective.reduction,
        own_of(experience, part.block),
        objective.skip_first_tokens,
    )
    return shares.distill * np.float32(part.denominator / max(own, 1.0))


def entropy_weighted(shares: Ragged, scores: Scores, *, beta: float) -> Ragged:
    """`shares · teacher_entropy_weights`, of mean 1 over an update's tokens with a share."""
    flat, entropies = np.concatenate(shares), np.concatenate(scores.entropies)
    weights = teacher_entropy_weights(
        jnp.asarray(entropies)[None], jnp.asarray(flat != 0)[None], beta=beta
    )
    cuts = np.cumsum([len(x) for x in shares])[:-1]
    return np.split((np.asarray(weights)[0] * flat).astype(np.float32), cuts)


def token_advantages(
    config: Config,
    objective: SdpoConfig,
    experience: RolloutBatch,
    part: MiniBatch,
    gaps: Ragged | None,
    distill: Rows,
    shares: LossWeights,
) -> Ragged:
    """The advantage of each token of a part's rows, under a credit that is known before the loss.

    Args:
        config: for what counts as a success.
        objective: with `credit` one of `sequence`, `modulated`, `fixed_negative`.
        experience: the rollouts.
        part: its rows.
        gaps: log q(y_t) - log π(y_t); None under `fixed_negative`.
        distill: [N], from `own_reduction`.
        shares: of the rollouts.
    """
    lengths = [len(x) for x in part.weights]
    if objective.credit == "fixed_negative":
        credit = [_negative(config, objective, experience, i) for i in part.rows]
    elif objective.credit == "modulated":
        assert gaps is not None  # a teacher was asked
        # A rollout without a context has no teacher, only the plain question's.
        told = [g * (shares.distill[i] != 0) for g, i in zip(gaps, part.rows, strict=True)]
        old = _padded([experience.log_probs[i] for i in part.rows])
        modulated = modulate_advantages(
            jnp.asarray(shares.advantages[part.rows]),
            jnp.asarray(old),
            jnp.asarray(old + _padded(told)),
            strength=objective.modulation * shares.coefficient,
            bound=objective.modulation_bound,
        )
        return _rows(modulated, lengths)
    else:
        assert gaps is not None  # a teacher was asked
        mask = _padded([(x > 0).astype(np.float32) for x in part.weights])
        means = sequence_advantages(jnp.asarray(_padded(gaps)), jnp.asarray(mask))
        credit = _rows(means, lengths)
    return [
        distill[i] * own + np.float32(shares.reinforce[i] * shares.advantages[i])
        for own, i in zip(credit, part.rows, strict=True)
    ]


def _negative(
    config: Config, objective: SdpoConfig, experience: RolloutBatch, row: int
) -> NDArray[np.float32]:
    """-1 where a failure's token was unlikely when it was drawn (OPSA, arXiv 2608.31046)."""
    unlikely = experience.log_probs[row] < np.log(objective.control_probability)
    failed = not is_success(experience.outcomes[row], config.teacher)
    return -(unlikely & failed).astype(np.float32)


def _padded(rows: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
    """[B, T], zero beyond the data."""
    out = np.zeros((len(rows), max(len(x) for x in rows)), np.float32)
    for line, values in zip(out, rows, strict=True):
        line[: len(values)] = values
    return out


def _rows(values: object, lengths: Sequence[int]) -> Ragged:
    array = np.asarray(values, np.float32)
    return [line[:n] for line, n in zip(array, lengths, strict=True)]


def log_ratios(log_probs: Ragged, old: Ragged) -> Ragged:
    """Log q(y_t) - log π(y_t) within ±20."""
    return [
        np.clip(q - p, -MAX_LOG_RATIO, MAX_LOG_RATIO) for q, p in zip(log_probs, old, strict=True)
    ]
