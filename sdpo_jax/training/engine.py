"""The compiled passes of a run, and the steps from rollouts to updates that objectives share.

An objective's `make_updates` receives an `Engine`. It may choose what the teacher sees (`contexts`,
`teacher_prompts`), split the rollouts into mini-batches (`split`), run forward passes without a
gradient (`forward`, `head`, `scores`) and assemble updates (`update`).
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from sdpo_jax.config import Config
from sdpo_jax.devices import Devices
from sdpo_jax.losses.kl_penalty import (
    ReferenceKlSharedInputs,
    ReferenceKlTokenInputs,
    ScoreSharedInputs,
    ScoreTokenInputs,
    score_per_token,
)
from sdpo_jax.model import Model, Params
from sdpo_jax.rollouts.phase_timer import PhaseTimer
from sdpo_jax.rollouts.rollout_batch import RolloutBatch
from sdpo_jax.teacher.context import TeacherContext
from sdpo_jax.teacher.contexts import ContextBuilder, Remembers, context_seed
from sdpo_jax.teacher.prompts import TeacherPrompts
from sdpo_jax.tokens import Tokenizer
from sdpo_jax.training.batch import (
    BatchLayout,
    MiniBatch,
    PackedBatch,
    Reduction,
    make_sequences,
    place_tokens,
    rollout_numbers,
    rows_of_tokens,
    split_mini_batches,
)
from sdpo_jax.training.step import MicroBatch, Sequences, Update, forward, token_values


class Models(NamedTuple):
    """The weights that a step works with."""

    student: Params
    teacher: Params  # None without a teacher
    reference: Params  # the initial model; None where nothing keeps it


class Scores(NamedTuple):
    """Log-probabilities and entropies of the rows of a mini-batch, on the host, `[|y|]` each."""

    log_probs: list[NDArray[np.float32]]  # log q(y_t)
    entropies: list[NDArray[np.float32]]  # H(q_t)


class Engine:
    """What an objective builds its updates with."""

    def __init__(
        self,
        config: Config,
        model: Model,
        devices: Devices,
        layout: BatchLayout,
        tokenizer: Tokenizer,
        teacher_prompts: TeacherPrompts,
        contexts: ContextBuilder | None,
    ):
        """`contexts` is None where the objective has no teacher."""
        self.config, self.devices, self.layout, self.tokenizer = config, devices, layout, tokenizer
        self.teacher_prompts, self.contexts = teacher_prompts, contexts
        self.temperature = jnp.float32(config.rollout.temperature)
        self.forward: Callable[[Params, Sequences], jax.Array] = devices.jit(
            partial(forward, model), out_shardings=devices.rows
        )
        """`(params, sequences) -> [D, n, c, width]`."""
        self.head: Callable[[Params], jax.Array] = devices.jit(
            model.head, out_shardings=devices.head
        )
        """`params -> [width, V]`, placed as the loss wants the head."""
        self._score = devices.jit(
            partial(token_values, score_per_token()), out_shardings=devices.rows
        )

    def teacher_contexts(self, rollouts: RolloutBatch, step: int) -> list[TeacherContext | None]:
        """What the teacher of each rollout of a step sees, `[N]`; None for nothing."""
        build = self.contexts
        if build is None:
            raise ValueError("the objective has no context builder, expected Objective.contexts")
        given = rollouts.prompts, rollouts.group, rollouts.outcomes, rollouts.texts
        contexts = build(*given, seed=context_seed(self.config.seed, step))
        if isinstance(build, Remembers):
            build.remember(*given)
        return contexts

    def split(
        self,
        rollouts: RolloutBatch,
        *,
        active: NDArray[np.bool_],
        worth: NDArray[np.bool_],
        reduction: Reduction,
        skip: int = 0,
    ) -> list[MiniBatch]:
        """The mini-batches of a rollout batch, one for each update; see `split_mini_batches`."""
        return split_mini_batches(
            rollouts,
            self.config.train.mini_batches,
            self.layout,
            active=active,
            worth=worth,
            reduction=reduction,
            skip=skip,
        )

    def place(self, values: Sequence[Any], packed: PackedBatch, dtype: Any = np.float32) -> Any:
        """Values `[|y|]` of each row of a mini-batch as a device array `[D, n, c]`."""
        return place_tokens(values, packed, dtype, self.devices)

    def targets(self, mini_batch: MiniBatch, packed: PackedBatch) -> jax.Array:
        """The response tokens of a micro-batch, `[D, n, c]`."""
        return self.place([pair.response for pair in mini_batch.pairs], packed, np.int32)

    def scores(
        self,
        mini_batch: MiniBatch,
        inputs: Sequence[ScoreTokenInputs],
        hidden: Sequence[jax.Array],
        head: jax.Array,
        shared: ScoreSharedInputs,
    ) -> Scores:
        """What a model without a gradient gives the response tokens of a mini-batch.

        Args:
          mini_batch: its rows.
          inputs: of each micro-batch.
          hidden: of each micro-batch, `[D, n, c, width]`.
          head: `[width, V]`.
          shared: the temperature, and what a trust region needs.
        """
        found = [
            self._score(states, head, tokens, shared, jnp.int32(packed.filled))
            for states, tokens, packed in zip(hidden, inputs, mini_batch.micro_batches, strict=True)
        ]
        fetched = self.devices.fetch(found)
        names = ("log_prob", "entropy")
        return Scores(*(rows_of_tokens(mini_batch, [x[name] for x in fetched]) for name in names))

    def update(
        self,
        mini_batch: MiniBatch,
        inputs: Sequence[Any],
        shared: Any,
        *,
        reference: Params = None,
        outcomes: NDArray[np.int32] | None = None,
        timer: PhaseTimer,
    ) -> Update:
        """The update of a mini-batch; its micro-batches are built here, once.

        Args:
          mini_batch: rows and weights.
          inputs: the loss's inputs for each token, one pytree of `[D, n, c]` for each micro-batch.
          shared: the loss's inputs that all tokens share.
          reference: weights of the model that a loss `with_reference_kl` stays near; None: no KL.
          outcomes: [N], 1 for a success, -1 for a failure, 0 for neither; for `gap_agreement`.
          timer: adds the reference's pass to the phase `reference`.
        """
        micro_batches: list[MicroBatch] = []
        head = None if reference is None else self.head(reference)
        for tokens, packed in zip(inputs, mini_batch.micro_batches, strict=True):
            sequences = make_sequences(packed, self.devices)
            targets = self.targets(mini_batch, packed)
            if reference is not None:
                with timer.phase("reference"):
                    log_probs = self._log_probs(reference, head, sequences, targets, packed)
                    tokens = ReferenceKlTokenInputs(tokens, targets, log_probs)
            numbers = None if outcomes is None else self._outcomes(mini_batch, packed, outcomes)
            weights = self.place(mini_batch.weights, packed)
            filled: Any = np.int32(packed.filled)
            micro_batches.append(MicroBatch(sequences, targets, weights, tokens, filled, numbers))
        if reference is not None:
            shared = ReferenceKlSharedInputs(shared, self.temperature)
        denominator = jnp.float32(mini_batch.denominator)
        return Update(micro_batches, denominator, shared, mini_batch.token_count)

    def _outcomes(
        self, mini_batch: MiniBatch, packed: PackedBatch, outcomes: NDArray[np.int32]
    ) -> jax.Array:
        numbers = rollout_numbers(mini_batch.pairs, packed)
        signed = [outcomes[i] * x for i, x in zip(mini_batch.rows, numbers, strict=True)]
        return self.place(signed, packed, np.int32)

    def _log_probs(
        self,
        params: Params,
        head: Any,
        sequences: Sequences,
        targets: jax.Array,
        packed: PackedBatch,
    ) -> jax.Array:
        """`[D, n, c]`, of the response tokens after the student's own prompts."""
        hidden, shared = self.forward(params, sequences), ScoreSharedInputs(self.temperature)
        tokens, filled = ScoreTokenInputs(targets), jnp.int32(packed.filled)
        return jax.block_until_ready(self._score(hidden, head, tokens, shared, filled)["log_prob"])
