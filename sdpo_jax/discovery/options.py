"""The words of `sdpo discover`: the recipe as it will run, questions, methods, seeds, budgets."""

import difflib
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from sdpo_jax.config import Config, ObjectiveConfig
from sdpo_jax.config.checks import problems
from sdpo_jax.config.objectives import GrpoConfig, SdpoConfig
from sdpo_jax.environments.base import Environment, Prompt
from sdpo_jax.errors import UserError
from sdpo_jax.run.recipes import load_recipe

USAGE = """sdpo discover RECIPE --question ID [ID ...] [--seeds N | S S ...] [--budget GENERATIONS]
      [--method NAME [NAME ...]] [--samples N] [--run-dir DIR] [--SECTION.KEY VALUE ...]"""
TRAINED: dict[str, type[ObjectiveConfig]] = {"sdpo": SdpoConfig, "grpo": GrpoConfig}
ASKED = {"multi_turn_feedback": False, "multi_turn_conversation": True}
"""Whether attempts are shown."""
METHODS = (*TRAINED, "best_of_k", *ASKED)


class Options(NamedTuple):
    """What `sdpo discover` is asked besides the recipe."""

    questions: tuple[str, ...]
    seeds: tuple[int, ...]
    budget: int
    methods: tuple[str, ...]
    samples: int
    """Of best-of-k, for each seed."""

    def budget_of(self, method: str) -> int:
        """Generations of a cell."""
        return self.samples if method == "best_of_k" else self.budget


def parse(words: Sequence[str]) -> tuple[Config, Options]:
    """The recipe as it will run, and the options; words after `sdpo discover`.

    `rollout.prompts_per_step` becomes 1: the group is all rollouts of the question. Held-out
    accuracy is not measured.

    Raises:
      UserError: an option that does not fit, or a problem of the recipe.
    """
    if not words or words[0].startswith("-"):
        raise UserError(f"sdpo discover: expected a recipe first\n  {USAGE}")
    own, rest = _split(words[1:])
    config = load_recipe(words[0], rest)
    if not own.get("--question"):
        raise UserError(f"sdpo discover: expected --question with at least one id\n  {USAGE}")
    methods = tuple(own.get("--method", (config.objective.name,)))
    for name in methods:
        if name not in METHODS:
            raise UserError(f"--method {name}: expected some of {', '.join(METHODS)}")
    budget = _positive("--budget", own.get("--budget", ["512"]))
    options = Options(
        questions=tuple(dict.fromkeys(own["--question"])),
        seeds=_seeds(own.get("--seeds", ["1"])),
        budget=budget,
        methods=tuple(dict.fromkeys(methods)),
        samples=_positive("--samples", own.get("--samples", [str(budget)])),
    )
    run_dir = config.run_dir or str(Path("runs") / "discover" / Path(words[0]).stem)
    return _for_one_question(replace(config, run_dir=run_dir), budget), options


def _split(words: Sequence[str]) -> tuple[dict[str, list[str]], list[str]]:
    """Options of this command with their values, and all others."""
    names = ("--question", "--seeds", "--budget", "--method", "--samples")
    own: dict[str, list[str]] = {}
    rest: list[str] = []
    current = rest
    for word in words:
        name, equals, value = word.partition("=")
        if name in names:
            current = own[name] = [value] if equals else []
        elif word.startswith("-") and not word[1:].isdigit():
            current = rest
            rest.append(word)
        else:
            current.append(word)
    return own, rest


def _positive(name: str, values: Sequence[str]) -> int:
    if len(values) != 1 or not values[0].isdigit() or int(values[0]) < 1:
        raise UserError(f"{name} {' '.join(values)}: expected one positive integer\n  {USAGE}")
    return int(values[0])


def _seeds(values: Sequence[str]) -> tuple[int, ...]:
    """One number N: seeds 1 to N; several: those."""
    if not values or not all(v.isdigit() and int(v) < 2**32 for v in values):
        text = f"--seeds {' '.join(values)}: expected how many, or several seeds from 0 up"
        raise UserError(f"{text}\n  {USAGE}")
    if len(values) == 1:
        return tuple(range(1, _positive("--seeds", values) + 1))
    return tuple(dict.fromkeys(map(int, values)))


def _for_one_question(config: Config, budget: int) -> Config:
    steps = math.ceil(budget / config.rollout.rollouts_per_prompt)
    config = replace(
        config,
        rollout=replace(config.rollout, prompts_per_step=1),
        train=replace(config.train, steps=steps, mini_batches=1),
        evaluation=replace(config.evaluation, prompts=0),
    )
    found = problems(config)
    if found:
        text = f"with one prompt in a step and {steps} steps (--budget {budget}): "
        raise UserError(text + "; ".join(found))
    return config


def find_questions(environment: Environment, ids: Sequence[str]) -> list[Prompt]:
    """The prompts of these ids, of either side.

    Raises:
      UserError: an id that no prompt has; names near ones.
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
    """The recipe with the method's objective, at its defaults if it is not the recipe's own.

    Raises:
      UserError: the recipe cannot run with it.
    """
    if config.objective.name == method:
        return config
    config = replace(config, objective=TRAINED[method]())
    if found := problems(config):
        raise UserError(f"--method {method}: {'; '.join(found)}")
    return config
