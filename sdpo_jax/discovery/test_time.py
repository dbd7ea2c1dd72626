"""Test-time training: trains a model on a single question until it solves it.

arXiv 2601.20802, section 5. Each cell (question, seed) starts from the recipe's weights; a step is
one group of `rollout.rollouts_per_prompt` rollouts of the question, and one update. The first
success ends the cell, so the teacher never has a demonstration: it learns from feedback alone,
before any reward. With `grpo` a binary reward then gives no update at all, and its discovery curve
is the curve of independent samples.

Departures from the paper: the update from a successful batch is skipped, since the cell is over.
The samples of a cell depend on method, question and seed alone.
"""

import hashlib
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from sdpo_jax.config import Config
from sdpo_jax.discovery.estimator import Cell
from sdpo_jax.environments.base import Environment, Outcome, Prompt
from sdpo_jax.environments.grading import refuse_failures
from sdpo_jax.errors import UserError
from sdpo_jax.model import Params
from sdpo_jax.objectives import make_objective
from sdpo_jax.rollouts.phase_timer import PhaseTimer
from sdpo_jax.rollouts.rollout_batch import make_rollout_setup, sample_rollouts
from sdpo_jax.tokens import Tokenizer
from sdpo_jax.training.trainer import Trainer


def cell_seed(method: str, question: str, seed: int) -> int:
    """A seed below 2**32 for all random numbers of a cell; no two cells share it."""
    text = f"{method}\n{question}\n{seed}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=4).digest(), "big")


class Tally:
    """Counts generations up to the first success."""

    def __init__(self, budget: int):
        self.budget, self.generations, self.failed = budget, 0, 0
        self.first: int | None = None
        self.passed: list[int] = []

    def add(self, outcomes: list[Outcome]) -> None:
        """Counts the outcomes of a step, in batch order, up to the budget."""
        counted = outcomes[: max(0, self.budget - self.generations)]
        passed = [outcome.graded and outcome.passed for outcome in counted]
        if self.first is None and any(passed):
            self.first = self.generations + passed.index(True) + 1
        self.passed.append(sum(passed))
        self.failed += sum(not outcome.graded for outcome in counted)
        self.generations += len(outcomes)

    @property
    def over(self) -> bool:
        """Whether the cell has a success or has used its budget."""
        return self.first is not None or self.generations >= self.budget

    def cell(self, method: str, question: str, seed: int, seconds: float) -> Cell:
        """The result."""
        return Cell(
            method=method,
            question=question,
            seed=seed,
            budget=self.budget,
            first=self.first,
            generations=self.generations,
            passed=tuple(self.passed),
            failed=self.failed,
            seconds=seconds,
        )


class QuestionTrainer:
    """Trains on one question after the other with one trainer: its programs compile once."""

    def __init__(
        self,
        config: Config,
        model: Any,
        tokenizer: Tokenizer,
        environment: Environment,
        params: Params,
    ):
        """Every cell starts from `params`; they are not donated.

        The objective is that of one of `options.TRAINED`: it learns from rollouts.
        """
        objective = make_objective(config.objective)
        self._trainer = Trainer(config, model, tokenizer, environment, objective=objective)
        sampler = self._trainer.sampler
        self._setup = make_rollout_setup(config, tokenizer, environment, sampler)
        self._start = self._trainer.host_state()
        self._config, self._params = config, params

    def __call__(
        self, question: Prompt, seed: int, budget: int, report: Callable[[int, int], None]
    ) -> Cell:
        """Runs one cell, from the start weights.

        Args:
          question: the prompt to solve.
          seed: with method and question, the seed of the cell.
          budget: generations.
          report: called after each step with the generations so far and the budget.

        Raises:
          UserError: updates stay non-finite, or the environment fails too often.
        """
        began, trainer = time.perf_counter(), self._trainer
        method, tally = self._config.objective.name, Tally(budget)
        draws = cell_seed(method, question.id, seed)
        sample = partial(sample_rollouts, self._setup._replace(seed=draws))
        trainer.set_host_state(self._start)  # forgets the successes of other cells
        state, step = trainer.initial_state(self._params, draws), 0
        while not tally.over:
            step, timer = step + 1, PhaseTimer()
            rollouts, observed = sample(trainer.student(state), [question], step=step, timer=timer)
            limit = self._config.environment.max_failed_share
            refuse_failures(rollouts.prompts, rollouts.outcomes, limit, f"step {step}")
            tally.add(rollouts.outcomes)
            if not tally.over:
                state, row = trainer.learn(state, rollouts, step, timer, observed=observed)
                self._stop_if_not_finite(f"{method}, question {question.id}, seed {seed}", row)
            report(tally.generations, budget)
        return tally.cell(method, question.id, seed, time.perf_counter() - began)

    def _stop_if_not_finite(self, cell: str, row: Mapping[str, Any]) -> None:
        optimizer = self._config.optimizer
        if row["skipped"] >= optimizer.max_skipped_updates:
            raise UserError(
                f"{cell}: {row['skipped']} updates in a row were not finite and were skipped. "
                f"Lower optimizer.learning_rate = {optimizer.learning_rate}; finished cells are "
                "kept."
            )
