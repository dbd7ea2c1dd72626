"""Samples, decodes and grades one batch of rollouts. Nothing here knows the objective."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, Future
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sdpo_jax.config import Config, RolloutConfig
from sdpo_jax.environments.base import Environment, Outcome, Prompt, Step
from sdpo_jax.environments.grading import OpenEpisodes
from sdpo_jax.environments.retries import with_episodes
from sdpo_jax.model import Params
from sdpo_jax.rollouts.diagnostics import rollout_metrics
from sdpo_jax.rollouts.episodes import (
    Episode,
    Grader,
    Limits,
    agreed,
    episodes_from_state,
    episodes_to_state,
    run_episodes,
)
from sdpo_jax.rollouts.phase_timer import PhaseTimer
from sdpo_jax.rollouts.prompts import prompt_ids
from sdpo_jax.rollouts.sampler import Sampler
from sdpo_jax.tokens import Tokenizer


class RolloutBatch(NamedTuple):
    """`N = P·G` rollouts; row `n` belongs to prompt `n // G`. Ids are as sampled.

    The response of an episode of several turns is all that followed the first prompt.
    """

    prompts: list[Prompt]  # [P]
    group: int  # G
    prompt_ids: list[list[int]]  # [N]
    response_ids: list[list[int]]  # [N]
    log_probs: list[NDArray[np.float32]]  # [N], under the sampling distribution
    lengths: NDArray[np.int32]  # [N], tokens of each response
    texts: list[str]  # [N], of the last turn
    outcomes: list[Outcome]  # [N]; empty where nothing is graded
    response_mask: list[NDArray[np.bool_]] | None = None
    """[N], which tokens of the response the model wrote; None: all of them."""

    @property
    def graded(self) -> NDArray[np.bool_]:
        """[N], whether the environment could grade a row; if not, the row is not learned from."""
        if not self.outcomes:
            return np.ones(len(self.texts), np.bool_)
        return np.asarray([outcome.graded for outcome in self.outcomes])

    @property
    def longest(self) -> int:
        """Tokens of the longest response."""
        return int(self.lengths.max())

    def of_first(self, prompts: int) -> "RolloutBatch":
        """The rollouts of the first so many prompts."""
        rows, fields = prompts * self.group, self._asdict()
        del fields["prompts"], fields["group"]
        cut = {name: value if value is None else value[:rows] for name, value in fields.items()}
        return self._replace(prompts=self.prompts[:prompts], **cut)


class RolloutSetup(NamedTuple):
    """Everything that sampling and grading need except the weights."""

    config: RolloutConfig
    tokenizer: Tokenizer
    environment: Environment | None  # None: nothing is graded
    max_observation_tokens: int
    sampler: Sampler
    seed: int


def make_rollout_setup(
    config: Config, tokenizer: Tokenizer, environment: Environment | None, sampler: Sampler
) -> RolloutSetup:
    """The setup of a run of this recipe."""
    limit = config.teacher.max_feedback_tokens
    return RolloutSetup(config.rollout, tokenizer, environment, limit, sampler, config.seed)


def sample_rollouts(
    setup: RolloutSetup, params: Params, prompts: Sequence[Prompt], *, step: int, timer: PhaseTimer
) -> tuple[RolloutBatch, dict[str, float]]:
    """Samples and grades `G` episodes of each prompt, of one turn or more.

    Responses are graded as they finish, while the device decodes the rest: `seconds_grade` is
    inside `seconds_rollout`, except for what finishes last.

    Returns:
      The graded rollouts, and metrics of sampling and grading.

    Raises:
      UserError: the environment raised, or returned something else than an outcome.
    """
    grade = _grader(setup, prompts, timer)
    rows = _sample(setup, params, prompts, grade, step=step, timer=timer)
    return finish(setup, prompts, rows)


def finish(
    setup: RolloutSetup, prompts: Sequence[Prompt], rows: list[Episode]
) -> tuple[RolloutBatch, dict[str, float]]:
    """Graded episodes as a batch, with their metrics."""
    turns, group = setup.config.max_turns, setup.config.rollouts_per_prompt
    is_graded = setup.environment is not None
    batch = RolloutBatch(
        prompts=list(prompts),
        group=group,
        prompt_ids=[row.prompt_ids for row in rows],
        response_ids=[row.ids for row in rows],
        log_probs=[row.log_probs for row in rows],
        lengths=np.asarray([len(row.ids) for row in rows], np.int32),
        texts=[row.response for row in rows],
        outcomes=[row.outcome for row in rows] if is_graded else [],
        response_mask=None if turns == 1 else [row.response_mask for row in rows],
    )
    return batch, rollout_metrics(rows, turns, group, is_graded=is_graded)


def _sample(
    setup: RolloutSetup,
    params: Params,
    prompts: Sequence[Prompt],
    grade: Grader,
    *,
    step: int,
    timer: PhaseTimer,
) -> list[Episode]:
    config = setup.config
    sample = partial(
        setup.sampler,
        params,
        seed=setup.seed,
        step=step,
        max_tokens=config.max_response_tokens,
        temperature=config.temperature,
    )
    limits = Limits(config.max_turns, setup.max_observation_tokens, config.slots)
    with timer.phase("rollout"):
        ids = [prompt_ids(setup.tokenizer, p, config.max_prompt_tokens) for p in prompts]
        group = config.rollouts_per_prompt
        rows = run_episodes(sample, grade, setup.tokenizer, limits, prompts, ids, group=group)
    timer.count("rollout", sum(row.sampled_tokens for row in rows))
    return rows


_NOT_YET = Step(None, Outcome(0.0, False, "", {}))
"""Stands for the step of a response that nothing has graded."""


def _grader(setup: RolloutSetup, prompts: Sequence[Prompt], timer: PhaseTimer) -> Grader:
    if setup.environment is None:
        return lambda rows, responses, truncated: [_NOT_YET] * len(rows)
    repeated = [prompt for prompt in prompts for _ in range(setup.config.rollouts_per_prompt)]
    environment = with_episodes(setup.environment, setup.config.max_turns)
    episodes = OpenEpisodes(environment, repeated)

    def grade(rows: list[int], responses: list[str], truncated: list[bool]) -> list[Step]:
        with timer.phase("grade"):
            return episodes(rows, responses, truncated)

    return grade


def _write_down(rows: Sequence[Episode], steps: Sequence[Step]) -> None:
    outcomes = agreed([step.outcome for step in steps])
    for row, step, outcome in zip(rows, steps, outcomes, strict=True):
        row.steps[:] = [step._replace(outcome=outcome)]


class PendingRollouts:
    """Rollouts of single turns that a thread still grades; `finish` waits for it.

    The thread calls the environment alone: programs of the device are launched from one thread, in
    the same order in all processes.
    """

    def __init__(
        self,
        setup: RolloutSetup,
        prompts: Sequence[Prompt],
        rows: list[Episode],
        grading: "_BackgroundGrader | None",
    ):
        """`rows` [N]; `grading` still grades them, None: they are graded."""
        self._setup, self._prompts, self._rows = setup, list(prompts), rows
        self._grading = grading

    def wait(self) -> None:
        """Returns when the grading is over."""
        if self._grading is not None:
            self._grading.wait()

    def finish(self, timer: PhaseTimer) -> tuple[RolloutBatch, dict[str, float]]:
        """The graded rollouts, and metrics of sampling and grading.

        Raises:
          UserError: the environment raised, or returned something else than an outcome.
        """
        if self._grading is not None:
            with timer.phase("wait"):
                _write_down(self._rows, self._grading.steps(len(self._rows)))
            timer.add("grade", self._grading.timer)
        return finish(self._setup, self._prompts, self._rows)

    def to_state(self) -> dict[str, object]:
        """What was sampled, JSON-serialisable, at most 8 bytes a token; see `restore_rollouts`."""
        return episodes_to_state(self._prompts, self._rows)


def start_rollouts(
    setup: RolloutSetup,
    params: Params,
    prompts: Sequence[Prompt],
    executor: Executor,
    *,
    step: int,
    timer: PhaseTimer,
) -> PendingRollouts:
    """Samples as `sample_rollouts` does; the executor grades while the caller goes on."""
    grading = _BackgroundGrader(executor, partial(_grader, setup, prompts))
    rows = _sample(setup, params, prompts, grading, step=step, timer=timer)
    return PendingRollouts(setup, prompts, rows, grading)


def restore_rollouts(
    setup: RolloutSetup, prompts: Sequence[Prompt], state: Mapping[str, object], timer: PhaseTimer
) -> PendingRollouts:
    """What `PendingRollouts.to_state` kept: the same ids and log-probs, decoded and graded anew.

    Raises:
      UserError: the state belongs to other prompts.
    """
    limit, group = setup.config.max_prompt_tokens, setup.config.rollouts_per_prompt
    ids = [prompt_ids(setup.tokenizer, p, limit) for p in prompts]
    rows = episodes_from_state(prompts, ids, group, state, setup.tokenizer)
    grade, places = _grader(setup, prompts, timer), list(range(len(rows)))
    cut = [not row.stopped for row in rows]
    _write_down(rows, grade(places, [row.response for row in rows], cut))
    return PendingRollouts(setup, prompts, rows, None)


class _BackgroundGrader:
    """A grader whose work an executor does."""

    def __init__(self, executor: Executor, grader: Callable[[PhaseTimer], Grader]):
        # A timer of its own: the step's is read meanwhile.
        self.timer = PhaseTimer()
        self._executor, self._grade = executor, grader(self.timer)
        self._jobs: list[tuple[list[int], Future[list[Step]]]] = []

    def __call__(self, rows: list[int], responses: list[str], truncated: list[bool]) -> list[Step]:
        job = self._executor.submit(self._grade, rows, responses, truncated)
        self._jobs.append((rows, job))
        return [_NOT_YET] * len(rows)

    def wait(self) -> None:
        """Returns when all is graded."""
        for _, job in self._jobs:
            job.result()

    def steps(self, count: int) -> list[Step]:
        """Waits; the step of each of `count` rows."""
        graded = {
            i: step for rows, job in self._jobs for i, step in zip(rows, job.result(), strict=True)
        }
        return [graded[i] for i in range(count)]
