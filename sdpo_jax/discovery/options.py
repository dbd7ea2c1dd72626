"""Options of discovery: the recipe as it runs, questions, methods, seeds, budgets."""

import difflib
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from sdpo_jax.config import Config, ObjectiveConfig
from sdpo_jax.config.checks import problems
from sdpo_jax.environments.base import Environment, Prompt
from sdpo_jax.errors import UserError
from sdpo_jax.objectives import GrpoConfig, SdpoConfig

TRAINED: dict[str, type[ObjectiveConfig]] = {"sdpo": SdpoConfig, "grpo": GrpoConfig}
"""Methods that train, with the settings of their objectives."""
MULTI_TURN = {"multi_turn_feedback": False, "multi_turn_conversation": True}
"""Methods that prompt several times; whether the prompt shows the earlier attempts."""
METHODS = (*TRAINED, "best_of_k", *MULTI_TURN)


class Options(NamedTuple):
    """What is compared: every method on every question with every seed."""

    questions: tuple[str, ...]
    """Ids of prompts."""
    seeds: tuple[int, ...]
    budget: int
    """Generations of a cell (method, question, seed)."""
    methods: tuple[str, ...]
    samples: int
    """Generations of a cell of best-of-k."""

    def budget_of(self, method: str) -> int:
        """Generations of a cell of this method."""
        return self.samples if method == "best_of_k" else self.budget


def make_options(
    config: Config,
    questions: Sequence[str],
    *,
    seeds: Sequence[int] = (1,),
    budget: int = 512,
    methods: Sequence[str] = (),
    samples: int | None = None,
) -> Options:
    """Options without repetitions.

    Args:
      config: the recipe.
      questions: ids of prompts.
      seeds: one number n stands for the seeds 1 to n, several for themselves.
      budget: generations of a cell.
      methods: some of `METHODS`; by default the objective of the recipe.
      samples: generations of a cell of best-of-k; by default the budget.

    Raises:
      UserError: one seed that is 0, or an unknown method.
    """
    methods = tuple(methods) or (config.objective.name,)
    for name in methods:
        if name not in METHODS:
            raise UserError(f"--method {name}: expected some of {', '.join(METHODS)}")
    if len(seeds) == 1:
        if seeds[0] < 1:
            raise UserError("--seeds 0: expected how many, at least 1, or several seeds")
        seeds = range(1, seeds[0] + 1)
    return Options(
        questions=tuple(dict.fromkeys(questions)),
        seeds=tuple(dict.fromkeys(seeds)),
        budget=budget,
        methods=tuple(dict.fromkeys(methods)),
        samples=budget if samples is None else samples,
    )


def for_one_question(config: Config, budget: int) -> Config:
    """The recipe as it runs on one question: all rollouts of a step are of that question.

    `rollout.prompts_per_step` becomes 1, and held-out accuracy is not measured.

    Raises:
      UserError: the recipe cannot run so.
    """
    steps = math.ceil(budget / config.rollout.rollouts_per_prompt)
    config = replace(
        config,
        rollout=replace(config.rollout, prompts_per_step=1),
        train=replace(config.train, steps=steps, mini_batches=1),
        evaluation=replace(config.evaluation, prompts=0),
    )
    if wrong := problems(config):
        text = f"with one prompt in a step and {steps} steps (--budget {budget}): "
        raise UserError(text + "; ".join(wrong))
    return config


def find_questions(environment: Environment, ids: Sequence[str]) -> list[Prompt]:
    """The training or held-out prompts with these ids.

    Raises:
      UserError: no prompt has the id; the error names similar ones.
    """
    known = {prompt.id: prompt for prompt in (*environment.train, *environment.held_out)}
    for name in ids:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.0)
            raise UserError(
                f"--question {name}: no prompt of the environment has this id; near ones are "
                f"{', '.join(near)} ({len(environment.train)} to train on, "
                f"{len(environment.held_out)} held out)"
            )
    return [known[name] for name in ids]


def with_objective(config: Config, method: str) -> Config:
    """The recipe with the objective of a method, at its defaults unless it is the recipe's.

    Raises:
      UserError: the recipe cannot run with it.
    """
    if config.objective.name == method:
        return config
    config = replace(config, objective=TRAINED[method]())
    if wrong := problems(config):
        raise UserError(f"--method {method}: {'; '.join(wrong)}")
    return config
