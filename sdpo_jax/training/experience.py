"""One generation batch: sample, decode, grade. Nothing here knows the objective."""

import base64
import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor, Future
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sdpo_jax.config import RolloutConfig
from sdpo_jax.environments.base import Environment, Outcome, Prompt
from sdpo_jax.environments.grading import Grader, agreed, failed_share
from sdpo_jax.errors import UserError
from sdpo_jax.evaluation.accuracy import environment_metrics
from sdpo_jax.model import Params
from sdpo_jax.sampling.prompts import prompt_ids
from sdpo_jax.sampling.sampler import HostRollouts, Sampler
from sdpo_jax.tokens import Tokenizer
from sdpo_jax.training.clock import Clock


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


class Drawn:
    """Sampled rollouts whose grading may still go on; `finish` waits for it.

    A draw that has to survive its process is kept as the ids it consists of (`to_state`), and
    decoded and graded anew (`redraw`).
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        group: int,
        prompt_ids: list[list[int]],
        rollouts: HostRollouts,
        grading: "_Grading",
    ):
        self._prompts, self._group, self._prompt_ids = list(prompts), group, prompt_ids
        self._rollouts, self._grading = rollouts, grading

    def finish(self, clock: Clock) -> tuple[Experience, dict[str, float]]:
        """The graded rollouts, and metrics of sampling and grading.

        Raises:
          UserError: the environment raised, or returned what is no outcome.
        """
        rollouts = self._rollouts
        texts, outcomes = self._grading.finish(clock)
        outcomes = agreed(outcomes)
        experience = Experience(
            prompts=self._prompts,
            group=self._group,
            prompt_ids=[row for row in self._prompt_ids for _ in range(self._group)],
            response_ids=rollouts.responses(),
            log_probs=_ragged(rollouts),
            lengths=rollouts.lengths,
            texts=texts,
            outcomes=outcomes,
        )
        metrics = {
            **_means([outcome for outcome in outcomes if outcome.graded]),
            "environment/failed": failed_share(outcomes),
            "response_tokens": float(np.mean(rollouts.lengths)),
            "truncated": float(1.0 - np.mean(rollouts.stopped)),
            **environment_metrics(outcomes),
        }
        return experience, metrics

    def wait(self) -> None:
        """Returns when nothing is graded any more."""
        self._grading.wait()

    def to_state(self) -> dict[str, Any]:
        """What was sampled, JSON-serialisable: 8 bytes a token, packed."""
        rollouts = self._rollouts
        return {
            "prompts": [prompt.id for prompt in self._prompts],
            "lengths": rollouts.lengths.tolist(),
            "stopped": rollouts.stopped.tolist(),
            "ids": _packed(np.concatenate(rollouts.responses() or [[]]).astype("<i4")),
            "log_probs": _packed(np.concatenate(_ragged(rollouts)).astype("<f4")),
        }


def draw(
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
    executor: Executor | None = None,
) -> Drawn:
    """Samples `G` responses for each prompt and has them graded as they are done.

    Without an executor they are graded here while the device decodes the rest: `seconds_grade` is
    time inside `seconds_rollout`, but for what is done last. With one, grading is its business.
    """
    group = config.rollouts_per_prompt
    grading = _Grading(environment, tokenizer, prompts, group, clock, executor)
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
            on_done=grading,
        )
    clock.count("rollout", int(rollouts.lengths.sum()))
    return Drawn(prompts, group, ids, rollouts, grading)


def redraw(
    config: RolloutConfig,
    tokenizer: Tokenizer,
    environment: Environment,
    prompts: Sequence[Prompt],
    state: Mapping[str, Any],
    *,
    clock: Clock,
) -> Drawn:
    """What `Drawn.to_state` kept: the same ids and log-probs, graded anew.

    Raises:
      UserError: the state belongs to other prompts.
    """
    if [prompt.id for prompt in prompts] != state["prompts"]:
        raise UserError(
            "the checkpoint holds rollouts of other prompts than those that come next: "
            f"{state['prompts'][:3]}, ... and {[p.id for p in prompts[:3]]}, ...; restore the "
            "environment's prompts and the seed, or start in a new run directory"
        )
    lengths = np.asarray(state["lengths"], np.int32)
    shape = (len(lengths), int(lengths.max(initial=0)))
    real = np.arange(shape[1])[None] < lengths[:, None]
    tokens, log_probs = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
    tokens[real], log_probs[real] = (
        _unpacked(state["ids"], "<i4"),
        _unpacked(state["log_probs"], "<f4"),
    )
    rollouts = HostRollouts(tokens, log_probs, lengths, np.asarray(state["stopped"], np.bool_))
    grading = _Grading(environment, tokenizer, prompts, config.rollouts_per_prompt, clock, None)
    grading(list(range(len(lengths))), rollouts)
    ids = [prompt_ids(tokenizer, p, config.max_prompt_tokens) for p in prompts]
    return Drawn(prompts, config.rollouts_per_prompt, ids, rollouts, grading)


def _ragged(rollouts: HostRollouts) -> list[NDArray[np.float32]]:
    return [row[:n] for row, n in zip(rollouts.log_probs, rollouts.lengths, strict=True)]


def _packed(values: NDArray[Any]) -> str:
    return base64.b64encode(zlib.compress(values.tobytes())).decode("ascii")


def _unpacked(text: str, dtype: str) -> NDArray[Any]:
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), dtype)


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
        executor: Executor | None,
    ):
        self._grader, self._tokenizer = Grader(environment), tokenizer
        self._prompts, self._group = prompts, group
        # A thread has a clock of its own: the step's is read meanwhile.
        self._executor, self._clock = executor, clock if executor is None else Clock()
        self._jobs: list[Future[None]] = []
        self._done: dict[int, tuple[str, Outcome]] = {}

    def __call__(self, rows: list[int], rollouts: HostRollouts) -> None:
        if self._executor is None:
            self._grade(rows, rollouts)
        else:
            self._jobs.append(self._executor.submit(self._grade, rows, rollouts))

    def _grade(self, rows: list[int], rollouts: HostRollouts) -> None:
        with self._clock.phase("grade"):
            responses = rollouts.responses()
            texts = [self._tokenizer.decode(responses[i]) for i in rows]
            asked = [self._prompts[i // self._group] for i in rows]
            truncated = [not rollouts.stopped[i] for i in rows]
            outcomes = self._grader(asked, texts, truncated)
            self._done |= dict(zip(rows, zip(texts, outcomes, strict=True), strict=True))

    def wait(self) -> None:
        """Returns when all that it was told of is graded."""
        for job in self._jobs:
            job.result()

    def finish(self, clock: Clock) -> tuple[list[str], list[Outcome]]:
        """Texts and outcomes of all rollouts, in order; what was graded elsewhere is waited for."""
        if self._executor is not None:
            with clock.phase("wait"):
                self.wait()
            clock.add("grade", self._clock)
        rows = [self._done[i] for i in sorted(self._done)]
        return [text for text, _ in rows], [outcome for _, outcome in rows]
