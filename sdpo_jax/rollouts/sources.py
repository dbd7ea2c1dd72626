"""Where the rollouts of a step come from.

    GradedRollouts          prompts of the environment, answered by the student and graded
    SampledDemonstrations   questions of demonstrations, answered by the student, not graded
    Demonstrations          demonstrations themselves, in the place of the student's responses

Each has a position in its data that a checkpoint holds.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from sdpo_jax.config import Config
from sdpo_jax.data.jsonl import Demonstration
from sdpo_jax.data.pipeline import PromptBatches, prompt_batches
from sdpo_jax.environments.base import Environment, Prompt
from sdpo_jax.environments.grading import refuse_failures
from sdpo_jax.errors import UserError
from sdpo_jax.model import Params
from sdpo_jax.rollouts.phase_timer import PhaseTimer
from sdpo_jax.rollouts.rollout_batch import (
    PendingRollouts,
    RolloutBatch,
    make_rollout_setup,
    restore_rollouts,
    sample_rollouts,
    start_rollouts,
)
from sdpo_jax.rollouts.sampler import Sampler
from sdpo_jax.tokens import Tokenizer


class Source(Protocol):
    """One step's rollouts with metrics, and a position that a checkpoint can hold."""

    def __call__(
        self, params: Params, step: int, timer: PhaseTimer, *, first: int | None = None
    ) -> tuple[RolloutBatch, dict[str, float]]:
        """The rollouts of a step, with metrics; `first`: only those of so many prompts."""
        ...

    def wait(self) -> None:
        """Returns when no thread uses the environment any more."""
        ...

    def get_state(self) -> dict[str, Any]:
        """The position, JSON-serialisable."""
        ...

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Restores a position."""
        ...


class GradedRollouts:
    """Prompts from the environment, answered by the student and graded by the environment.

    With `rollout.one_step_off_policy` the next step's responses are sampled before this step's
    update, and graded in a thread while it runs.
    """

    def __init__(
        self, config: Config, environment: Environment, tokenizer: Tokenizer, sampler: Sampler
    ):
        size = config.rollout.prompts_per_step
        self._prompts = prompt_batches(environment.train, batch_size=size, seed=config.seed)
        self._config = config
        self._setup = make_rollout_setup(config, tokenizer, environment, sampler)
        prefetches = config.rollout.one_step_off_policy
        self._prefetch = _Prefetch(ThreadPoolExecutor(1)) if prefetches else None

    def __call__(
        self, params: Params, step: int, timer: PhaseTimer, *, first: int | None = None
    ) -> tuple[RolloutBatch, dict[str, float]]:
        """Samples and grades one generation batch.

        Raises:
          UserError: the environment fails too often.
        """
        rollouts, metrics = self._next(params, step, timer, first)
        limit = self._config.environment.max_failed_share
        refuse_failures(rollouts.prompts, rollouts.outcomes, limit, f"step {step}")
        if self._prefetch is not None and first is None and step < self._config.train.steps:
            self._prefetch.position = self._prompts.get_state()
            prompts, executor = next(self._prompts), self._prefetch.executor
            self._prefetch.pending = start_rollouts(
                self._setup, params, prompts, executor, step=step + 1, timer=timer
            )
        return rollouts, metrics | {"generations": step * len(rollouts.texts)}

    def _next(
        self, params: Params, step: int, timer: PhaseTimer, first: int | None
    ) -> tuple[RolloutBatch, dict[str, float]]:
        if self._prefetch is not None and self._prefetch.pending is not None:
            pending, self._prefetch.pending = self._prefetch.pending, None
            rollouts, metrics = pending.finish(timer)
            return rollouts if first is None else rollouts.of_first(first), metrics
        prompts = next(self._prompts)[:first]
        return sample_rollouts(self._setup, params, prompts, step=step, timer=timer)

    def wait(self) -> None:
        """Returns when what was prefetched is graded."""
        if self._prefetch is not None and self._prefetch.pending is not None:
            self._prefetch.pending.wait()

    def get_state(self) -> dict[str, Any]:
        """Position in the prompts; with prefetched responses, these and the position before."""
        if self._prefetch is None or self._prefetch.pending is None:
            return self._prompts.get_state()
        return {**self._prefetch.position, "ahead": self._prefetch.pending.to_state()}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Restores a position, and what was prefetched there."""
        position = {name: value for name, value in state.items() if name != "ahead"}
        self._prompts.set_state(position)
        if self._prefetch is None:
            return
        self.wait()  # what was prefetched belongs to another position
        self._prefetch.pending = None
        if "ahead" in state:
            prompts = next(self._prompts)
            self._prefetch.position = position
            self._prefetch.pending = restore_rollouts(
                self._setup, prompts, state["ahead"], PhaseTimer()
            )


@dataclass
class _Prefetch:
    """The rollouts of the next step, and where the prompts stood before them."""

    executor: Executor
    pending: PendingRollouts | None = None
    position: dict[str, Any] = field(default_factory=dict[str, Any])


class _FromDemonstrations:
    """A position in demonstrations."""

    def __init__(self, config: Config, demonstrations: Sequence[Demonstration]):
        self._config = config
        self._demonstrations: PromptBatches[Demonstration] = prompt_batches(
            demonstrations, batch_size=config.data.rows_per_step, seed=config.seed
        )

    def wait(self) -> None:
        """No thread runs here."""

    def get_state(self) -> dict[str, Any]:
        """Position in the demonstrations."""
        return self._demonstrations.get_state()

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Restores a position."""
        self._demonstrations.set_state(state)


def _questions(demonstrations: Sequence[Demonstration]) -> list[Prompt]:
    return [Prompt(d.id, d.messages, {"demonstration": d.response}) for d in demonstrations]


class SampledDemonstrations(_FromDemonstrations):
    """The student's own responses to the questions of demonstrations; nothing is graded.

    Each prompt carries its demonstration, `prompt.data["demonstration"]`, for the teacher.
    """

    def __init__(
        self,
        config: Config,
        demonstrations: Sequence[Demonstration],
        tokenizer: Tokenizer,
        sampler: Sampler,
    ):
        super().__init__(config, demonstrations)
        self._setup = make_rollout_setup(config, tokenizer, None, sampler)

    def __call__(
        self, params: Params, step: int, timer: PhaseTimer, *, first: int | None = None
    ) -> tuple[RolloutBatch, dict[str, float]]:
        """Samples responses to one batch of questions."""
        prompts = _questions(next(self._demonstrations)[:first])
        rollouts, metrics = sample_rollouts(self._setup, params, prompts, step=step, timer=timer)
        return rollouts, metrics | {"generations": step * len(rollouts.texts)}


class Demonstrations(_FromDemonstrations):
    """Demonstrations in the place of the student's responses; nothing is sampled."""

    def __init__(
        self, config: Config, demonstrations: Sequence[Demonstration], tokenizer: Tokenizer
    ):
        super().__init__(config, demonstrations)
        self._tokenizer = tokenizer

    def __call__(
        self, params: Params, step: int, timer: PhaseTimer, *, first: int | None = None
    ) -> tuple[RolloutBatch, dict[str, float]]:
        """One batch of demonstrations.

        Raises:
          UserError: a demonstration is longer than `data.max_tokens`.
        """
        del params, step
        with timer.phase("data"):
            rows, end = next(self._demonstrations)[:first], self._tokenizer.end_id
            prompts = [self._tokenizer.render(d.messages) for d in rows]
            responses = [[*self._tokenizer.encode_response(d.response), end] for d in rows]
            self._check_lengths(rows, prompts, responses)
            batch = RolloutBatch(
                prompts=_questions(rows),
                group=1,
                prompt_ids=prompts,
                response_ids=responses,
                log_probs=[],
                lengths=np.asarray([len(ids) for ids in responses], np.int32),
                texts=[d.response for d in rows],
                outcomes=[],
            )
        return batch, {}

    def _check_lengths(
        self, rows: list[Demonstration], prompts: list[list[int]], responses: list[list[int]]
    ) -> None:
        limit = self._config.data.max_tokens
        for row, prompt, response in zip(rows, prompts, responses, strict=True):
            size = len(prompt) + len(response)
            if size > limit:
                raise UserError(
                    f"demonstration {row.id!r} has {size} tokens; expected at most "
                    f"data.max_tokens = {limit}. Raise it to at least {size} or remove the row."
                )
