"""One generation batch: sample, decode, grade. Nothing here knows the objective."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sdpo_jax.config import RolloutConfig
from sdpo_jax.environments.base import Environment, Outcome, Prompt
from sdpo_jax.environments.grading import Grader, agreed, failed_share
from sdpo_jax.evaluation.accuracy import environment_metrics
from sdpo_jax.model import Params
from sdpo_jax.sampling.prompts import prompt_ids
from sdpo_jax.sampling.sampler import HostRollouts, Sampler
from sdpo_jax.tokens import Tokenizer
from sdpo_jax.training.clock import Clock
from sdpo_jax.training.diagnostics import rollout_diagnostics


class Experience(NamedTuple):
    """`N = P·G` graded rollouts; row `n` belongs to prompt `n // G`. Ids are as sampled."""

    prompts: list[Prompt]  # [P]
    group: int
    prompt_ids: list[list[int]]  # [N]
    response_ids: list[list[int]]  # [N]
    log_probs: list[NDArray[np.float32]]  # [N], of the sampling distribution
    lengths: NDArray[np.int32]  # [N]
    texts: list[str]  # [N]
    outcomes: list[Outcome]  # [N]

    @property
    def graded(self) -> NDArray[np.bool_]:
        """[N], whether the environment could judge; all else of a row that it could not is void."""
        return np.asarray([outcome.graded for outcome in self.outcomes])

    @property
    def longest(self) -> int:
        """Tokens of the longest response."""
        return int(self.lengths.max())


def collect(
    config: RolloutConfig,
    sampler: Sampler,
    tokenizer: Tokenizer,
    environment: Environment,
    params: Params,
    prompts: Sequence[Prompt],
    *,
    seed: int,
    step: int,
    clock: Clock,
) -> tuple[Experience, dict[str, float]]:
    """Samples `G` responses for each prompt and grades them; returns metrics of both, too.

    Responses are graded as they are done, while the device decodes the rest: `seconds_grade` is
    time inside `seconds_rollout`, but for what is done last.
    """
    group = config.rollouts_per_prompt
    graded = _Grading(environment, tokenizer, prompts, group, clock)
    with clock.phase("rollout"):
        ids = [prompt_ids(tokenizer, p, config.max_prompt_tokens) for p in prompts]
        rollouts = sampler(
            params,
            ids,
            group=group,
            max_tokens=config.max_response_tokens,
            temperature=config.temperature,
            seed=seed,
            step=step,
            on_done=graded,
        )
    clock.count("rollout", int(rollouts.lengths.sum()))
    outcomes = agreed(graded.outcomes)
    experience = Experience(
        prompts=list(prompts),
        group=group,
        prompt_ids=[row for row in ids for _ in range(group)],
        response_ids=rollouts.responses(),
        log_probs=[row[:n] for row, n in zip(rollouts.log_probs, rollouts.lengths, strict=True)],
        lengths=rollouts.lengths,
        texts=graded.texts,
        outcomes=outcomes,
    )
    metrics = {
        **_means([outcome for outcome in outcomes if outcome.graded]),
        "environment/failed": failed_share(outcomes),
        "response_tokens": float(np.mean(rollouts.lengths)),
        "truncated": float(1.0 - np.mean(rollouts.stopped)),
        **rollout_diagnostics(rollouts.lengths, experience.response_ids, outcomes, group),
        **environment_metrics(outcomes),
    }
    return experience, metrics


def _means(graded: Sequence[Outcome]) -> dict[str, float]:
    """Of reward and success; nothing to report where nothing could be graded."""
    if not graded:
        return {}
    return {
        "reward": float(np.mean([outcome.reward for outcome in graded])),
        "success": float(np.mean([outcome.passed for outcome in graded])),
    }


class _Grading:
    """Decodes and grades responses as the sampler tells of them."""

    def __init__(
        self,
        environment: Environment,
        tokenizer: Tokenizer,
        prompts: Sequence[Prompt],
        group: int,
        clock: Clock,
    ):
        self._grader, self._tokenizer = Grader(environment), tokenizer
        self._prompts, self._group, self._clock = prompts, group, clock
        self._done: dict[int, tuple[str, Outcome]] = {}

    def __call__(self, rows: list[int], rollouts: HostRollouts) -> None:
        with self._clock.phase("grade"):
            responses = rollouts.responses()
            texts = [self._tokenizer.decode(responses[i]) for i in rows]
            asked = [self._prompts[i // self._group] for i in rows]
            truncated = [not rollouts.stopped[i] for i in rows]
            outcomes = self._grader(asked, texts, truncated)
            self._done |= dict(zip(rows, zip(texts, outcomes, strict=True), strict=True))

    @property
    def texts(self) -> list[str]:
        """Of all rollouts, in order."""
        return [self._done[i][0] for i in sorted(self._done)]

    @property
    def outcomes(self) -> list[Outcome]:
        """Of all rollouts, in order."""
        return [self._done[i][1] for i in sorted(self._done)]
