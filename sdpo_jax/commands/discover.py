"""`sdpo discover`: test-time training on hard questions, and its baselines."""

from argparse import ArgumentParser, ArgumentTypeError, Namespace
from dataclasses import replace
from functools import partial
from pathlib import Path
from sys import stderr
from typing import TYPE_CHECKING

from sdpo_jax.commands.command import Command, positive, quiet_libraries

if TYPE_CHECKING:
    from sdpo_jax.config import Config
    from sdpo_jax.discovery.options import Options


def add_arguments(parser: ArgumentParser) -> None:
    """The recipe, questions, methods, seeds and budgets."""
    parser.add_argument("recipe", metavar="RECIPE", help="such as configs/nano_discover.toml")
    parser.add_argument("--question", metavar="ID", nargs="+", required=True, help="prompt ids")
    parser.add_argument(
        "--seeds",
        metavar="N",
        nargs="+",
        type=_seed,
        default=[1],
        help="how many, or several seeds (1)",
    )
    parser.add_argument(
        "--budget", metavar="GENERATIONS", type=positive, default=512, help="of a cell (512)"
    )
    parser.add_argument(
        "--method",
        metavar="NAME",
        nargs="+",
        default=[],
        help="some of sdpo, grpo, best_of_k, multi_turn_feedback and multi_turn_conversation; by "
        "default the recipe's objective",
    )
    parser.add_argument(
        "--samples", metavar="N", type=positive, help="generations of best-of-k (the budget)"
    )


def run(arguments: Namespace) -> None:
    """Runs what is missing of the table and prints it."""
    quiet_libraries()
    from sdpo_jax.api import load_components
    from sdpo_jax.compilation import persistent_cache
    from sdpo_jax.discovery.options import find_questions
    from sdpo_jax.discovery.runner import discover
    from sdpo_jax.environments.registry import make_environment
    from sdpo_models.gguf.convert import cache_folder

    config, options = read_options(arguments)
    environment = make_environment(config.environment)  # before there is a device
    questions = find_questions(environment, options.questions)
    with persistent_cache(cache_folder, partial(print, file=stderr)):
        components = load_components(config, environment=environment)
        discover(config, options, questions, components)


def read_options(arguments: Namespace) -> "tuple[Config, Options]":
    """The recipe as it runs, and the options.

    Raises:
      UserError: the recipe has a problem, or cannot run with these options.
    """
    from sdpo_jax.discovery.options import for_one_question, make_options
    from sdpo_jax.run.recipes import load_recipe

    config = load_recipe(arguments.recipe, arguments.settings)
    options = make_options(
        config,
        arguments.question,
        seeds=arguments.seeds,
        budget=arguments.budget,
        methods=arguments.method,
        samples=arguments.samples,
    )
    run_dir = config.run_dir or str(Path("runs") / "discover" / Path(arguments.recipe).stem)
    return for_one_question(replace(config, run_dir=run_dir), options.budget), options


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**32:
        raise ArgumentTypeError(f"{text}: expected how many, or several seeds from 0 up")
    return int(text)


COMMAND = Command(
    "discover",
    (
        (
            "sdpo discover RECIPE --question ID [ID ...] [--seeds N [S ...]] [--method NAME ...]",
            "solve hard questions by test-time training",
        ),
    ),
    add_arguments,
    run,
    takes_settings=True,
)
