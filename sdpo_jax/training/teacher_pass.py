"""The teacher's forward pass over the student's own responses.

shared_inputs    the teacher's head, and with a trust region the student's
token_inputs     the teacher's hidden states at each response token, after the teacher's prompt
teacher_scores   log-probabilities and entropies of the teacher, for weights known before the loss
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from sdpo_jax.losses.kl_penalty import ScoreSharedInputs, ScoreTokenInputs
from sdpo_jax.losses.per_token import SdpoSharedInputs, SdpoTokenInputs
from sdpo_jax.rollouts.phase_timer import PhaseTimer
from sdpo_jax.rollouts.rollout_batch import RolloutBatch
from sdpo_jax.training.batch import (
    MiniBatch,
    PackedBatch,
    Pair,
    make_sequences,
    repack,
    token_count,
)
from sdpo_jax.training.engine import Engine, Models, Scores


def _in_trust_region(engine: Engine) -> bool:
    return engine.config.teacher.weights == "trust_region"


def shared_inputs(engine: Engine, models: Models) -> SdpoSharedInputs:
    """The loss's inputs that all tokens share."""
    head, teacher = engine.head(models.teacher), engine.config.teacher
    if not _in_trust_region(engine):
        return SdpoSharedInputs(head, engine.temperature)
    coefficient = jnp.float32(teacher.trust_region)
    return SdpoSharedInputs(head, engine.temperature, engine.head(models.student), coefficient)


def token_inputs(
    engine: Engine,
    rollouts: RolloutBatch,
    mini_batch: MiniBatch,
    prompts: Sequence[Sequence[int]],
    models: Models,
    timer: PhaseTimer,
) -> list[SdpoTokenInputs]:
    """The teacher's hidden states and the response tokens of each micro-batch.

    All passes of a step run before its first update: the teacher may be the student.

    Args:
      engine: the compiled forward.
      rollouts: the responses.
      mini_batch: its rows.
      prompts: ids of each rollout's teacher prompt, `[N]`.
      models: the student's weights are read with a trust region, whose teacher mixes both.
      timer: counts the teacher's tokens.
    """
    pairs = [Pair(prompts[i], rollouts.response_ids[i]) for i in mini_batch.rows]
    timer.count("teacher", token_count(pairs))
    old = [rollouts.log_probs[i] for i in mini_batch.rows]

    def inputs(packed: PackedBatch) -> SdpoTokenInputs:
        sequences = make_sequences(repack(pairs, packed, engine.layout), engine.devices)
        live = engine.forward(models.student, sequences) if _in_trust_region(engine) else None
        return SdpoTokenInputs(
            teacher_hidden=engine.forward(models.teacher, sequences),
            targets=engine.targets(mini_batch, packed),
            old_log_probs=engine.place(old, packed, np.float32),
            live_hidden=live,
        )

    return [inputs(packed) for packed in mini_batch.micro_batches]


def teacher_scores(
    engine: Engine,
    mini_batch: MiniBatch,
    inputs: Sequence[SdpoTokenInputs],
    shared: SdpoSharedInputs,
) -> Scores:
    """The probabilities that the teacher, or the trust region around it, gives a mini-batch."""
    rest = ScoreSharedInputs(shared.temperature, shared.live_head, shared.coefficient)
    tokens = [ScoreTokenInputs(x.targets, x.live_hidden) for x in inputs]
    hidden: list[jax.Array] = [x.teacher_hidden for x in inputs]
    return engine.scores(mini_batch, tokens, hidden, shared.teacher_head, rest)
