"""Baselines of test-time training: best-of-k and multi-turn prompting of the start model.

Both sample at the recipe's temperature from the weights that test-time training starts from. Each
answer counts as one generation.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

from sdpo_jax.config import Config
from sdpo_jax.discovery.estimator import Cell
from sdpo_jax.discovery.multi_turn import Chain
from sdpo_jax.discovery.options import MULTI_TURN
from sdpo_jax.discovery.test_time import Tally, cell_seed
from sdpo_jax.environments.base import Environment, Outcome, Prompt
from sdpo_jax.environments.grading import Grader, refuse_failures
from sdpo_jax.model import Params
from sdpo_jax.rollouts.episodes import agreed
from sdpo_jax.rollouts.phase_timer import PhaseTimer
from sdpo_jax.rollouts.prompts import prompt_ids
from sdpo_jax.rollouts.rollout_batch import make_rollout_setup, sample_rollouts
from sdpo_jax.rollouts.sampler import Sampler
from sdpo_jax.tokens import Tokenizer

BATCH = 256
"""Samples of best-of-k per call of the sampler; another size gives other samples."""

MIN_ANSWERS = 20
"""The share of answers that could not be graded is taken over this many of the latest answers, at
least: for a single chain and turn it would be 0 or 1."""


class StartModel(NamedTuple):
    """The start model with what it takes to sample from it and to grade."""

    config: Config
    sampler: Sampler
    tokenizer: Tokenizer
    environment: Environment
    params: Params


def best_of_k(
    start: StartModel, question: Prompt, seed: int, samples: int, report: Callable[[int, int], None]
) -> Cell:
    """Samples `samples` independent answers; a success does not end the cell."""
    began, config, tally, step = time.perf_counter(), start.config, Tally(samples), 0
    rollout = replace(config.rollout, rollouts_per_prompt=min(BATCH, samples))
    drawn = replace(config, rollout=rollout, seed=cell_seed("best_of_k", question.id, seed))
    setup = make_rollout_setup(drawn, start.tokenizer, start.environment, start.sampler)
    sample = partial(sample_rollouts, setup, start.params, [question])
    while tally.generations < samples:
        step += 1
        rollouts, _ = sample(step=step, timer=PhaseTimer())
        limit, where = config.environment.max_failed_share, f"best_of_k, step {step}"
        refuse_failures([question], rollouts.outcomes, limit, where)
        tally.add(rollouts.outcomes)
        report(tally.generations, samples)
    cell = tally.cell("best_of_k", question.id, seed, time.perf_counter() - began)
    return cell._replace(generations=samples, independent=True)  # the last call may have drawn more


class _Running(NamedTuple):
    seed: int
    chain: Chain
    tally: Tally


def multi_turn(
    start: StartModel,
    method: str,
    pairs: Sequence[tuple[Prompt, int]],
    budget: int,
    done: Callable[[Cell], None],
    report: Callable[[int, int], None],
) -> None:
    """Runs chains of turns, decoded as one batch; each depends on its question and seed alone.

    Args:
      start: the start model.
      method: one of `MULTI_TURN`.
      pairs: questions with seeds; one chain each.
      budget: turns of each chain.
      done: called with the cell of each finished chain; its seconds are its share of each turn's.
      report: called with the turns so far and the budget after each turn.
    """
    running = _begun(start, pairs, budget, MULTI_TURN[method])
    turn, seconds = 0, 0.0
    recent: deque[tuple[Prompt, Outcome]] = deque(maxlen=max(len(running), MIN_ANSWERS))
    while running:
        turn += 1
        began = time.perf_counter()
        outcomes = _turn(start, running, method, turn)
        seconds += (time.perf_counter() - began) / len(running)
        recent.extend(zip((row.chain.prompt for row in running), outcomes, strict=True))
        if len(recent) == recent.maxlen:
            questions, latest = [q for q, _ in recent], [o for _, o in recent]
            limit = start.config.environment.max_failed_share
            refuse_failures(questions, latest, limit, f"{method}, turn {turn}")
        for row, outcome in zip(running, outcomes, strict=True):
            row.tally.add([outcome])
            if row.tally.over:
                done(row.tally.cell(method, row.chain.prompt.id, row.seed, seconds))
        running = [row for row in running if not row.tally.over]
        report(turn, budget)


def _begun(
    start: StartModel, pairs: Sequence[tuple[Prompt, int]], budget: int, shows_attempts: bool
) -> list[_Running]:
    teacher, limit = start.config.teacher, start.config.rollout.max_prompt_tokens
    running: list[_Running] = []
    for question, seed in pairs:
        prompt_ids(start.tokenizer, question, limit)  # raises if it is too long
        chain = Chain(question, teacher, start.tokenizer, shows_attempts=shows_attempts)
        running.append(_Running(seed, chain, Tally(budget)))
    return running


def _turn(start: StartModel, running: list[_Running], method: str, turn: int) -> list[Outcome]:
    """Samples and grades one answer of every chain and adds it to the chain."""
    rollouts = start.sampler(
        start.params,
        [row.chain.ids() for row in running],
        group=1,
        max_tokens=start.config.rollout.max_response_tokens,
        temperature=start.config.rollout.temperature,
        seed=0,
        step=turn,
        first_prompt=[cell_seed(method, row.chain.prompt.id, row.seed) for row in running],
        prompt_rows=1 << (len(running) - 1).bit_length(),  # few shapes; padding costs a prefill
    )
    texts = [start.tokenizer.decode(ids) for ids in rollouts.responses()]
    truncated = [not stopped for stopped in rollouts.stopped.tolist()]
    questions = [row.chain.prompt for row in running]
    outcomes = agreed(Grader(start.environment)(questions, texts, truncated))
    for row, text, outcome in zip(running, texts, outcomes, strict=True):
        row.chain.add(text, outcome)
    return outcomes
