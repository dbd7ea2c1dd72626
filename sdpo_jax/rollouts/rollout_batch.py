"""One generation batch: sample, decode, grade. Nothing here knows the objective."""

import base64
import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, Future
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sdpo_jax.config import Config, RolloutConfig
from sdpo_jax.environments.base import Environment, Outcome, Prompt, Step
from sdpo_jax.environments.grading import OpenEpisodes, failed_share
from sdpo_jax.environments.retries import with_episodes
from sdpo_jax.errors import UserError
from sdpo_jax.model import Params
from sdpo_jax.rollouts.diagnostics import environment_metrics, rollout_diagnostics
from sdpo_jax.rollouts.episodes import Episode, Judge, Limits, Player, agreed
from sdpo_jax.rollouts.phase_timer import PhaseTimer
from sdpo_jax.rollouts.prompts import prompt_ids
from sdpo_jax.rollouts.sampler import Sampler
from sdpo_jax.tokens import Tokenizer


class RolloutBatch(NamedTuple):
    """`N = P·G` graded rollouts; row `n` belongs to prompt `n // G`. Ids are as sampled.

    Of an episode of several turns, the response is all that followed the first prompt.
    """

    prompts: list[Prompt]  # [P]
    group: int
    prompt_ids: list[list[int]]  # [N]
    response_ids: list[list[int]]  # [N]
    log_probs: list[NDArray[np.float32]]  # [N], of the sampling distribution
    lengths: NDArray[np.int32]  # [N]
    texts: list[str]  # [N], of the last turn
    outcomes: list[Outcome]  # [N]; none at all where there is nothing to grade (`sdft`)
    own: list[NDArray[np.bool_]] | None = None
    """[N], which tokens of the response the model wrote; None: all of them."""

    @property
    def graded(self) -> NDArray[np.bool_]:
        """[N], whether the environment could judge; all else of a row that it could not is void."""
        if not self.outcomes:
            return np.ones(len(self.texts), np.bool_)
        return np.asarray([outcome.graded for outcome in self.outcomes])

    @property
    def longest(self) -> int:
        """Tokens of the longest response."""
        return int(self.lengths.max())

    def first(self, prompts: int) -> "RolloutBatch":
        """The rollouts of the first prompts alone."""
        rows = slice(prompts * self.group)
        return self._replace(
            prompts=self.prompts[:prompts],
            prompt_ids=self.prompt_ids[rows],
            response_ids=self.response_ids[rows],
            log_probs=self.log_probs[rows],
            lengths=self.lengths[rows],
            texts=self.texts[rows],
            outcomes=self.outcomes[rows],
            own=None if self.own is None else self.own[rows],
        )


class PendingRollouts:
    """Sampled episodes, whose grading may still go on; `finish` waits for it."""

    def __init__(
        self,
        prompts: Sequence[Prompt],
        group: int,
        rows: list[Episode],
        max_turns: int,
        later: "_Later | None",
    ):
        """`rows` [N], row `n` belongs to prompt `n // group`; `later` still grades them."""
        self._prompts, self._group, self._rows = list(prompts), group, rows
        self._max_turns, self._later = max_turns, later

    def wait(self) -> None:
        """Returns when nothing is graded any more."""
        if self._later is not None:
            self._later.wait()

    def finish(self, clock: PhaseTimer) -> tuple[RolloutBatch, dict[str, float]]:
        """The graded rollouts, and metrics of sampling and grading.

        Raises:
          UserError: the environment raised, or returned what is no outcome.
        """
        rows = self._rows
        if self._later is not None:
            with clock.phase("wait"):
                self._later.finish(rows)
            clock.add("grade", self._later.clock)
        experience = RolloutBatch(
            prompts=self._prompts,
            group=self._group,
            prompt_ids=[row.prompt_ids for row in rows],
            response_ids=[row.ids for row in rows],
            log_probs=[row.log_probs for row in rows],
            lengths=np.asarray([len(row.ids) for row in rows], np.int32),
            texts=[row.response for row in rows],
            outcomes=[row.outcome for row in rows],
            own=None if self._max_turns == 1 else [row.own for row in rows],
        )
        return experience, rollout_metrics(rows, self._max_turns, self._group)

    def to_state(self) -> dict[str, Any]:
        """Of single turns: what was sampled, JSON-serialisable, at most 8 bytes a token."""
        rows = self._rows
        return {
            "prompts": [prompt.id for prompt in self._prompts],
            "lengths": [len(row.ids) for row in rows],
            "stopped": [row.stopped for row in rows],
            "ids": _packed(np.concatenate([np.asarray(row.ids, "<i4") for row in rows])),
            "log_probs": _packed(np.concatenate([row.log_probs for row in rows]).astype("<f4")),
        }


class RolloutSetup(NamedTuple):
    """Who answers, who asks, and within which limits."""

    config: RolloutConfig
    tokenizer: Tokenizer
    environment: Environment
    max_observation_tokens: int


def make_rollout_setup(
    config: Config, tokenizer: Tokenizer, environment: Environment
) -> RolloutSetup:
    """Who plays in a run of this recipe."""
    limit = config.teacher.max_feedback_tokens
    return RolloutSetup(config.rollout, tokenizer, environment, limit)


def draw(
    table: RolloutSetup,
    sampler: Sampler,
    params: Params,
    prompts: Sequence[Prompt],
    *,
    seed: int,
    step: int,
    clock: PhaseTimer,
    executor: Executor | None = None,
) -> PendingRollouts:
    """Plays `G` episodes of each prompt, of one response or more.

    Responses are graded as they are done, while the device decodes the rest: `seconds_grade` is
    time inside `seconds_rollout`, but for what is done last. With an executor, which takes single
    turns alone, it grades them while the caller goes on.
    """
    config, group = table.config, table.config.rollouts_per_prompt
    judge = _judge(table, prompts, clock)
    later = None if executor is None else _Later(executor, partial(_judge, table, prompts))
    play = Player(
        partial(
            sampler,
            params,
            seed=seed,
            step=step,
            max_tokens=config.max_response_tokens,
            temperature=config.temperature,
        ),
        judge if later is None else later,
        table.tokenizer,
        Limits(config.max_turns, table.max_observation_tokens, config.slots),
    )
    with clock.phase("rollout"):
        ids = [prompt_ids(table.tokenizer, p, config.max_prompt_tokens) for p in prompts]
        rows = play(prompts, ids, group=group)
    clock.count("rollout", sum(row.own_tokens for row in rows))
    return PendingRollouts(prompts, group, rows, config.max_turns, later)


def redraw(
    table: RolloutSetup, prompts: Sequence[Prompt], state: Mapping[str, Any], *, clock: PhaseTimer
) -> PendingRollouts:
    """What `PendingRollouts.to_state` kept: the same ids and log-probs, decoded and graded anew.

    Raises:
      UserError: the state belongs to other prompts.
    """
    if [prompt.id for prompt in prompts] != state["prompts"]:
        raise UserError(
            "the checkpoint holds rollouts of other prompts than those that come next: "
            f"{state['prompts'][:3]}, ... and {[p.id for p in prompts[:3]]}, ...; restore the "
            "environment's prompts and the seed, or start in a new run directory"
        )
    limit, group = table.config.max_prompt_tokens, table.config.rollouts_per_prompt
    asked = [(p, prompt_ids(table.tokenizer, p, limit)) for p in prompts]
    rows = [Episode(*pair) for pair in asked for _ in range(group)]
    ends = np.cumsum(state["lengths"])[:-1]
    ids = np.split(_unpacked(state["ids"], "<i4"), ends)
    log_probs = np.split(_unpacked(state["log_probs"], "<f4").astype(np.float32), ends)
    for row, own, log_prob, stopped in zip(rows, ids, log_probs, state["stopped"], strict=True):
        row.write(own.tolist(), log_prob)
        row.response, row.stopped = table.tokenizer.decode(own.tolist()), stopped
    cut = [not row.stopped for row in rows]
    judged = _judge(table, prompts, clock)(
        list(range(len(rows))), [row.response for row in rows], cut
    )
    _write_down(rows, judged)
    return PendingRollouts(prompts, group, rows, table.config.max_turns, None)


def _judge(table: RolloutSetup, prompts: Sequence[Prompt], clock: PhaseTimer) -> Judge:
    asked = [prompt for prompt in prompts for _ in range(table.config.rollouts_per_prompt)]
    episodes = OpenEpisodes(with_episodes(table.environment, table.config.max_turns), asked)

    def judge(rows: list[int], responses: list[str], truncated: list[bool]) -> list[Step]:
        with clock.phase("grade"):
            return episodes(rows, responses, truncated)

    return judge


def _write_down(rows: Sequence[Episode], steps: Sequence[Step]) -> None:
    outcomes = agreed([step.outcome for step in steps])
    for row, step, outcome in zip(rows, steps, outcomes, strict=True):
        row.steps[:] = [step._replace(outcome=outcome)]


_UNKNOWN = Step(None, Outcome(0.0, False, "", {}))
"""Stands in for the step of a response that a thread still judges."""


class _Later:
    """A judge that has a thread do it."""

    def __init__(self, executor: Executor, judge: Callable[[PhaseTimer], Judge]):
        # A clock of its own: the step's is read meanwhile.
        self.clock = PhaseTimer()
        self._executor, self._judge = executor, judge(self.clock)
        self._jobs: list[tuple[list[int], Future[list[Step]]]] = []

    def __call__(self, rows: list[int], responses: list[str], truncated: list[bool]) -> list[Step]:
        job = self._executor.submit(self._judge, rows, responses, truncated)
        self._jobs.append((rows, job))
        return [_UNKNOWN] * len(rows)

    def wait(self) -> None:
        """Returns when all is judged."""
        for _, job in self._jobs:
            job.result()

    def finish(self, rows: Sequence[Episode]) -> None:
        """Writes down what the thread found, in the place of what stood in for it."""
        judged = {
            i: step for on, job in self._jobs for i, step in zip(on, job.result(), strict=True)
        }
        _write_down(rows, [judged[i] for i in range(len(rows))])


def _packed(values: NDArray[Any]) -> str:
    return base64.b64encode(zlib.compress(values.tobytes())).decode("ascii")


def _unpacked(text: str, dtype: str) -> NDArray[Any]:
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), dtype)


def rollout_metrics(rows: Sequence[Episode], max_turns: int, group: int) -> dict[str, float]:
    """Reward and success of the final outcomes, the model's own tokens, and its turns."""
    outcomes = [row.outcome for row in rows]
    metrics = {
        **_means([outcome for outcome in outcomes if outcome.graded]),
        "environment/failed": failed_share(outcomes),
        "response_tokens": float(np.mean([row.own_tokens for row in rows])),
        "truncated": float(1.0 - np.mean([row.stopped for row in rows])),
        **rollout_diagnostics(
            np.asarray([row.own_tokens for row in rows]),
            [row.own_ids for row in rows],
            outcomes,
            group,
        ),
        **environment_metrics(outcomes),
    }
    if max_turns == 1:
        return metrics
    first = [row.steps[0].outcome for row in rows]
    return metrics | {
        "turns": float(np.mean([row.turns for row in rows])),
        "success_first_turn": _means([o for o in first if o.graded]).get("success", 0.0),
    }


def _means(graded: Sequence[Outcome]) -> dict[str, float]:
    """Of reward and success; nothing to report where nothing could be graded."""
    if not graded:
        return {}
    return {
        "reward": float(np.mean([outcome.reward for outcome in graded])),
        "success": float(np.mean([outcome.passed for outcome in graded])),
    }
