"""Where updates come from: graded rollouts of the current student, or demonstrations."""

from collections.abc import Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from sdpo_jax.config import Config
from sdpo_jax.config.objectives import SftConfig
from sdpo_jax.data.jsonl import Demonstration
from sdpo_jax.data.pipeline import PromptBatches
from sdpo_jax.devices import Devices
from sdpo_jax.environments.base import Environment, Prompt
from sdpo_jax.environments.grading import refuse_failures
from sdpo_jax.errors import UserError
from sdpo_jax.losses.per_token import SftTokenInputs
from sdpo_jax.model import Params
from sdpo_jax.rollouts.phase_timer import PhaseTimer
from sdpo_jax.rollouts.rollout_batch import (
    PendingRollouts,
    RolloutBatch,
    draw,
    make_rollout_setup,
    redraw,
)
from sdpo_jax.rollouts.sampler import Sampler
from sdpo_jax.tokens import Tokenizer
from sdpo_jax.training.batch import (
    BatchLayout,
    MicroBatchPlan,
    Pair,
    make_tokens,
    plan,
    reduction_weights,
)
from sdpo_jax.training.updates import MiniBatch, Update, make_update


class UpdateMaker(Protocol):
    """`SdpoUpdates` or `GrpoUpdates`."""

    def __call__(
        self,
        experience: RolloutBatch,
        params: Params,
        teacher_params: Params,
        *,
        step: int,
        clock: PhaseTimer,
    ) -> tuple[list[Update], dict[str, float]]:
        """The updates of a generation batch, with metrics."""
        ...


class Source(Protocol):
    """One step's updates with metrics, and a position that a checkpoint can hold."""

    def __call__(
        self, params: Params, teacher_params: Params, step: int, clock: PhaseTimer
    ) -> tuple[list[Update], dict[str, float]]:
        """The updates of a step, with metrics."""
        ...

    def wait(self) -> None:
        """Returns when no thread uses the environment any more."""
        ...

    def get_state(self) -> dict[str, Any]:
        """The position, JSON-serialisable."""
        ...

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Goes to a saved position."""
        ...


class RolloutSource:
    """Prompts from the environment, answered by the student, judged by the environment.

    With `rollout.one_step_off_policy` the next step's responses are drawn before this step's
    update, and graded in a thread while it runs. The thread calls the environment alone: programs
    of the device are launched from one thread, in the same order in all processes.
    """

    def __init__(
        self,
        config: Config,
        prompts: PromptBatches[Prompt],
        environment: Environment,
        tokenizer: Tokenizer,
        sampler: Sampler,
        updates: UpdateMaker,
    ):
        self.updates = updates
        self._config, self._prompts, self._sampler = config, prompts, sampler
        self._table = make_rollout_setup(config, tokenizer, environment)
        self._ahead = _Ahead(ThreadPoolExecutor(1)) if config.rollout.one_step_off_policy else None

    def __call__(
        self, params: Params, teacher_params: Params, step: int, clock: PhaseTimer
    ) -> tuple[list[Update], dict[str, float]]:
        """Samples, grades, and makes the updates of one generation batch."""
        experience, metrics = self._next(params, step, clock).finish(clock)
        limit = self._config.environment.max_failed_share
        refuse_failures(experience.prompts, experience.outcomes, limit, f"step {step}")
        if self._ahead is not None and step < self._config.train.steps:
            self._ahead.position = self._prompts.get_state()
            self._ahead.drawn = self._draw(params, step + 1, clock, self._ahead.executor)
        updates, more = self.updates(experience, params, teacher_params, step=step, clock=clock)
        return updates, metrics | more | {"generations": step * len(experience.texts)}

    def _next(self, params: Params, step: int, clock: PhaseTimer) -> PendingRollouts:
        if self._ahead is None or self._ahead.drawn is None:
            return self._draw(params, step, clock, None)
        drawn, self._ahead.drawn = self._ahead.drawn, None
        return drawn

    def _draw(
        self, params: Params, step: int, clock: PhaseTimer, executor: Executor | None
    ) -> PendingRollouts:
        return draw(
            self._table,
            self._sampler,
            params,
            next(self._prompts),
            seed=self._config.seed,
            step=step,
            clock=clock,
            executor=executor,
        )

    def wait(self) -> None:
        """Returns when what was drawn ahead is graded."""
        if self._ahead is not None and self._ahead.drawn is not None:
            self._ahead.drawn.wait()

    def get_state(self) -> dict[str, Any]:
        """Position in the prompts; with responses drawn ahead, the one before them, and they."""
        if self._ahead is None or self._ahead.drawn is None:
            return self._prompts.get_state()
        return {**self._ahead.position, "ahead": self._ahead.drawn.to_state()}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Goes to a saved position, and takes up what was drawn ahead."""
        position = {name: value for name, value in state.items() if name != "ahead"}
        self._prompts.set_state(position)
        if self._ahead is not None and "ahead" in state:
            self._ahead.position = position
            self._ahead.drawn = redraw(
                self._table, next(self._prompts), state["ahead"], clock=PhaseTimer()
            )


@dataclass
class _Ahead:
    """What has been drawn for the next step, and where the prompts stood before."""

    executor: Executor
    drawn: PendingRollouts | None = None
    position: dict[str, Any] = field(default_factory=dict[str, Any])


class DemonstrationSource:
    """Demonstrations; the loss is on the responses."""

    def __init__(
        self,
        config: Config,
        objective: SftConfig,
        demonstrations: PromptBatches[Demonstration],
        tokenizer: Tokenizer,
        devices: Devices,
        form: BatchLayout,
    ):
        self._config, self._objective = config, objective
        self._demonstrations, self._tokenizer = demonstrations, tokenizer
        self._devices, self._form = devices, form

    def __call__(
        self, params: Params, teacher_params: Params, step: int, clock: PhaseTimer
    ) -> tuple[list[Update], dict[str, float]]:
        """One update per mini-batch of `data.rows_per_step` demonstrations."""
        del params, teacher_params, step
        with clock.phase("data"):
            rows = next(self._demonstrations)
            size = len(rows) // self._config.train.mini_batches
            updates = [self._update(rows[i : i + size]) for i in range(0, len(rows), size)]
        return updates, {}

    def _update(self, demonstrations: list[Demonstration]) -> Update:
        end = self._tokenizer.end_id
        pairs = [
            Pair(
                self._tokenizer.render(d.messages),
                [*self._tokenizer.encode_response(d.response), end],
            )
            for d in demonstrations
        ]
        self._check_lengths(demonstrations, pairs)
        lengths = np.asarray([len(pair.response) for pair in pairs], np.int32)
        weights, denominator = reduction_weights(
            lengths, np.ones(len(pairs), np.bool_), int(lengths.max()), self._objective.reduction
        )
        spread = [row[:length] for row, length in zip(weights, lengths, strict=True)]
        rows = list(range(len(pairs)))
        part = MiniBatch(rows, pairs, plan(pairs, self._form), spread, denominator)

        def tokens(micro_batch: MicroBatchPlan) -> SftTokenInputs:
            responses = [pair.response for pair in pairs]
            return SftTokenInputs(make_tokens(responses, micro_batch, np.int32, self._devices))

        return make_update(part, tokens, None, self._form, self._devices)

    def _check_lengths(self, demonstrations: list[Demonstration], pairs: Any) -> None:
        limit = self._config.data.max_tokens
        for demonstration, (prompt, response) in zip(demonstrations, pairs, strict=True):
            size = len(prompt) + len(response)
            if size > limit:
                raise UserError(
                    f"demonstration {demonstration.id!r} has {size} tokens; expected at most "
                    f"data.max_tokens = {limit}. Raise it to at least {size} or remove the row."
                )

    def wait(self) -> None:
        """Nothing runs here."""

    def get_state(self) -> dict[str, Any]:
        """Position in the demonstrations."""
        return self._demonstrations.get_state()

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Goes to a saved position."""
        self._demonstrations.set_state(state)
