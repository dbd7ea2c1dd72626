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
from typing import Any, cast

from sdpo_jax.config import Config, Demonstrated
from sdpo_jax.discovery.estimator import Cell
from sdpo_jax.environments.base import Environment, Outcome, Prompt
from sdpo_jax.environments.grading import refuse_failures
from sdpo_jax.errors import UserError
from sdpo_jax.model import Params
from sdpo_jax.objectives.sources import RolloutSource, UpdateMaker
from sdpo_jax.rollouts.phase_timer import PhaseTimer
from sdpo_jax.rollouts.rollout_batch import draw, make_rollout_setup
from sdpo_jax.tokens import Tokenizer
from sdpo_jax.training.trainer import Trainer
from sdpo_jax.training.updates import Update


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


class _OneQuestion:
    """Source of a trainer: groups of rollouts of one question; no updates once the cell is over."""

    def __init__(
        self,
        trainer: Trainer,
        updates: UpdateMaker,
        environment: Environment,
        question: Prompt,
        seed: int,
        budget: int,
    ):
        self._trainer, self._updates, self._environment = trainer, updates, environment
        self._question, self._seed, self.tally = question, seed, Tally(budget)

    def __call__(
        self, params: Params, teacher_params: Params, step: int, clock: PhaseTimer
    ) -> tuple[list[Update], dict[str, float]]:
        """Samples and grades one group; returns its updates, unless the cell is over."""
        config, trainer = self._trainer.config, self._trainer
        table = make_rollout_setup(config, trainer.tokenizer, self._environment)
        drawn = draw(
            table,
            trainer.sampler,
            params,
            [self._question],
            seed=self._seed,
            step=step,
            clock=clock,
        )
        experience, metrics = drawn.finish(clock)
        limit = config.environment.max_failed_share
        refuse_failures(experience.prompts, experience.outcomes, limit, f"step {step}")
        self.tally.add(experience.outcomes)
        if self.tally.over:
            return [], metrics
        updates, more = self._updates(experience, params, teacher_params, step=step, clock=clock)
        return updates, metrics | more

    def wait(self) -> None:
        """Nothing runs here."""

    def get_state(self) -> dict[str, Any]:
        """Nothing: a cell is not resumed but repeated."""
        return {}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Restores nothing."""
        del state


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

        Raises:
          UserError: the objective learns from demonstrations and not from rollouts.
        """
        if isinstance(config.objective, Demonstrated):
            raise UserError(
                f"objective {config.objective.name}: expected one that learns from rollouts, "
                "sdpo or grpo; choose it with --method"
            )
        self._trainer = Trainer(config, model, tokenizer, environment)
        self._updates = cast(RolloutSource, self._trainer.source).updates
        self._start = self._trainer.host_state()
        self._config, self._environment, self._params = config, environment, params

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
        began, trainer, config = time.perf_counter(), self._trainer, self._config
        method = config.objective.name
        draws = cell_seed(method, question.id, seed)
        source = _OneQuestion(trainer, self._updates, self._environment, question, draws, budget)
        trainer.source = source
        trainer.set_host_state(self._start)  # forgets the successes of other cells
        state, step = trainer.initial_state(self._params, draws), 0
        while not source.tally.over:
            step += 1
            state, row = trainer.step(state, step)
            if row["skipped"] >= config.optimizer.max_skipped_updates:
                raise UserError(
                    f"{method}, question {question.id}, seed {seed}: {row['skipped']} updates in "
                    "a row were not finite and were skipped. Lower optimizer.learning_rate = "
                    f"{config.optimizer.learning_rate}; finished cells are kept."
                )
            report(source.tally.generations, budget)
        return source.tally.cell(method, question.id, seed, time.perf_counter() - began)
