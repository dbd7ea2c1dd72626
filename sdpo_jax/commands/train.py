"""`sdpo train`: trains a recipe, or resumes its run."""

from argparse import ArgumentParser, Namespace
from dataclasses import replace
from pathlib import Path

from sdpo_jax.commands.command import Command, quiet_libraries


def add_arguments(parser: ArgumentParser) -> None:
    """The recipe; its settings follow."""
    parser.add_argument("recipe", metavar="RECIPE", help="a TOML file, such as configs/nano.toml")


def run(arguments: Namespace) -> None:
    """Trains; a finished run only shows its result, and nothing is loaded."""
    from sdpo_jax.run.recipes import load_recipe

    recipe = Path(arguments.recipe)
    config = load_recipe(recipe, arguments.settings)
    if not config.run_dir:
        config = replace(config, run_dir=str(Path("runs") / recipe.stem))
    quiet_libraries()
    from sdpo_jax.compilation import persistent_cache
    from sdpo_jax.distributed import initialize_from_environment, is_leader
    from sdpo_jax.environments.registry import make_environment
    from sdpo_jax.objectives import make_objective
    from sdpo_jax.run import run_directory, summary
    from sdpo_jax.run.console import Console
    from sdpo_jax.run.reporter import Nowhere, show_summary
    from sdpo_jax.run.stop_signals import stop_signals
    from sdpo_models.gguf.convert import cache_folder

    run_dir = Path(config.run_dir)
    result = summary.read(run_dir)
    if result is not None and result.steps < config.train.steps:
        result = None
    # Before there is a device: an environment may start processes of its own.
    environment = None if result is not None else make_environment(config.environment)
    initialize_from_environment()
    stream = None if is_leader() else Nowhere()
    columns = make_objective(config.objective).columns
    console = Console(columns, steps=config.train.steps, stream=stream)
    if result is not None:
        run_directory.claim(run_dir, config)
        console.note(
            f"complete  {run_dir} holds this run, finished. To train anew: rm -r {run_dir}"
        )
        show_summary(config, result, console)
        return
    from sdpo_jax.api import load

    with persistent_cache(cache_folder, console.note):
        run = load(config, environment=environment, verbose=console)
        with stop_signals() as stop:
            run.train(stop)


COMMAND = Command(
    "train",
    (
        (
            "sdpo train RECIPE [--run-dir DIR] [--SECTION.KEY VALUE ...]",
            "train a recipe, or resume its run",
        ),
    ),
    add_arguments,
    run,
    takes_settings=True,
)
