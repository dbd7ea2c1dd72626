"""Test-time training: a model learns on one question alone, until it has solved it.

arXiv 2601.20802, section 5. Each cell (question, seed) starts from the recipe's weights; a step is
one group of `rollout.rollouts_per_prompt` rollouts of the question, and one update. The first
success ends the cell, so the teacher never has a demonstration: it learns from feedback alone,
before any reward. Under `grpo` a binary reward then gives no update at all, and discovery is that
of independent samples.

Departures from the paper: the update that a successful batch would give is not made, since nothing
is asked of the model afterwards. The draws of a cell depend on nothing but method, question and
seed.
"""

import hashlib
import time
from collections.abc import Callable, Mapping
from typing import Any, cast

from sdpo_jax.config import Config
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
    """A seed below 2**32 for everything that a cell draws: no two cells share their draws."""
    text = f"{method}\n{question}\n{seed}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=4).digest(), "big")


class Tally:
    """Counts generations up to the first success."""

    def __init__(self, budget: int):
        self.budget, self.generations, self.failed = budget, 0, 0
        self.first: int | None = None
        self.passed: list[int] = []

    def add(self, outcomes: list[Outcome]) -> None:
        """Takes a step's outcomes in batch order; what lies beyond the budget is not looked at."""
        counted = outcomes[: max(0, self.budget - self.generations)]
        passed = [outcome.graded and outcome.passed for outcome in counted]
        if self.first is None and any(passed):
            self.first = self.generations + passed.index(True) + 1
        self.passed.append(sum(passed))
        self.failed += sum(not outcome.graded for outcome in counted)
        self.generations += len(outcomes)

    @property
    def over(self) -> bool:
        """Whether there is nothing left to do."""
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
    """A trainer's source: groups of rollouts of one question; no update once it is over."""

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
        """Samples and grades one group; its updates, unless the cell is over."""
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
        """A cell is not resumed but started anew."""
        return {}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Nothing to go to."""
        del state


class TestTimeTraining:
    """Trains on one question after the other with one trainer: its programs compile once."""

    __test__ = False  # not a test, whatever pytest makes of the name

    def __init__(
        self,
        config: Config,
        model: Any,
        tokenizer: Tokenizer,
        environment: Environment,
        params: Params,
    ):
        """`params` are the start of every cell; they stay the caller's.

        Raises:
          UserError: the objective learns from demonstrations and not from rollouts.
        """
        if config.objective.learns_from == "demonstrations":
            raise UserError(
                f"objective {config.objective.name}: expected one that learns from rollouts, "
                "sdpo or grpo; choose it with --method"
            )
        self._trainer = Trainer(config, model, tokenizer, environment)
        self._updates = cast(RolloutSource, self._trainer.source).updates
        self._start = self._trainer.host_state()
        self._config, self._environment, self._params = config, environment, params

    def __call__(
        self, question: Prompt, seed: int, budget: int, tell: Callable[[int, int], None]
    ) -> Cell:
        """One cell, from the start weights on.

        Args:
          question: to be solved.
          seed: of all that the cell draws, together with method and question.
          budget: generations.
          tell: called with the generations so far after each step that ends without a success,
            and with the budget.

        Raises:
          UserError: updates stay non-finite, or the environment fails too often.
        """
        began, trainer, config = time.perf_counter(), self._trainer, self._config
        method = config.objective.name
        own = cell_seed(method, question.id, seed)
        source = _OneQuestion(trainer, self._updates, self._environment, question, own, budget)
        trainer.source = source
        trainer.set_host_state(self._start)  # no cell knows what another one has seen
        state, step = trainer.initial_state(self._params, own), 0
        while not source.tally.over:
            step += 1
            state, row = trainer.step(state, step)
            if row["skipped"] >= config.optimizer.max_skipped_updates:
                raise UserError(
                    f"{method}, question {question.id}, seed {seed}: {row['skipped']} updates in "
                    "a row were not finite and were skipped. Lower optimizer.learning_rate = "
                    f"{config.optimizer.learning_rate}; finished cells are kept."
                )
            tell(source.tally.generations, budget)
        return source.tally.cell(method, question.id, seed, time.perf_counter() - began)
