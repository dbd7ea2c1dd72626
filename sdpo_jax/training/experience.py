"""One generation batch: sample, decode, grade. Nothing here knows the objective."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sdpo_jax.config import RolloutConfig
from sdpo_jax.environments.base import Environment, Outcome, Prompt, Step
from sdpo_jax.environments.grading import OpenEpisodes, failed_share
from sdpo_jax.environments.retries import with_episodes
from sdpo_jax.evaluation.accuracy import environment_metrics
from sdpo_jax.model import Params
from sdpo_jax.sampling.episodes import Episode, Limits, Player
from sdpo_jax.sampling.prompts import prompt_ids
from sdpo_jax.sampling.sampler import Sampler
from sdpo_jax.tokens import Tokenizer
from sdpo_jax.training.clock import Clock


class Experience(NamedTuple):
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
    outcomes: list[Outcome]  # [N]
    own: list[NDArray[np.bool_]] | None = None
    """[N], which tokens of the response the model wrote; None: all of them."""

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
    max_observation_tokens: int,
    clock: Clock,
) -> tuple[Experience, dict[str, float]]:
    """Plays `G` episodes of each prompt, of one response or more; returns metrics, too.

    Responses are graded as they are done, while the device decodes the rest: `seconds_grade` is
    time inside `seconds_rollout`, but for what is done last.
    """
    group = config.rollouts_per_prompt
    draw = {"max_tokens": config.max_response_tokens, "temperature": config.temperature}
    asked = [prompt for prompt in prompts for _ in range(group)]
    episodes = OpenEpisodes(with_episodes(environment, config.max_turns), asked)

    def judge(rows: list[int], responses: list[str], truncated: list[bool]) -> list[Step]:
        with clock.phase("grade"):
            return episodes(rows, responses, truncated)

    play = Player(
        partial(sampler, params, seed=seed, step=step, **draw),
        judge,
        tokenizer,
        Limits(config.max_turns, max_observation_tokens, config.slots),
    )
    with clock.phase("rollout"):
        ids = [prompt_ids(tokenizer, p, config.max_prompt_tokens) for p in prompts]
        rows = play(prompts, ids, group=group)
    clock.count("rollout", sum(row.own_tokens for row in rows))
    experience = Experience(
        prompts=list(prompts),
        group=group,
        prompt_ids=[row.prompt_ids for row in rows],
        response_ids=[row.ids for row in rows],
        log_probs=[row.log_probs for row in rows],
        lengths=np.asarray([len(row.ids) for row in rows], np.int32),
        texts=[row.response for row in rows],
        outcomes=[row.outcome for row in rows],
        own=None if config.max_turns == 1 else [row.own for row in rows],
    )
    return experience, rollout_metrics(rows, config.max_turns)


def rollout_metrics(rows: Sequence[Episode], max_turns: int) -> dict[str, float]:
    """Reward and success of the final outcomes, the model's own tokens, and its turns."""
    outcomes = [row.outcome for row in rows]
    metrics = {
        **_means([outcome for outcome in outcomes if outcome.graded]),
        "environment/failed": failed_share(outcomes),
        "response_tokens": float(np.mean([row.own_tokens for row in rows])),
        "truncated": float(1.0 - np.mean([row.stopped for row in rows])),
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
