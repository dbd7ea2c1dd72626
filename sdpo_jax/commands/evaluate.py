"""`sdpo eval`: held-out accuracy of a run and of its start model."""

import json
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from sys import stderr
from typing import TYPE_CHECKING

from sdpo_jax.commands.command import Command, positive, quiet_libraries
from sdpo_jax.errors import UserError

if TYPE_CHECKING:
    from sdpo_jax.config import Config
    from sdpo_jax.evaluation.report import Evaluation
    from sdpo_jax.run.components import RunComponents
    from sdpo_jax.run.run_ref import RunRef


def add_arguments(parser: ArgumentParser) -> None:
    """A run or a recipe, samples, and a file."""
    parser.add_argument("target", metavar="RUN_DIR|RECIPE", help="a run, or a recipe")
    parser.add_argument(
        "--samples", metavar="K", type=positive, default=4, help="answers to each prompt (4)"
    )
    parser.add_argument("--json", metavar="FILE", type=Path, help="writes the result there, too")


def run(arguments: Namespace) -> None:
    """Prints the table."""
    target, file, settings = arguments.target, arguments.json, arguments.settings
    is_recipe = target.endswith(".toml")
    if file is not None and (file.is_dir() or not file.parent.is_dir()):
        raise UserError(f"--json {file}: expected a file in a folder that is there")
    if settings and not is_recipe:
        raise UserError(
            f"{settings[0]}: a run is evaluated with the settings of its own recipe; "
            f"expected `{_RUN}`, with settings for a recipe alone"
        )
    quiet_libraries()
    from sdpo_jax.api import load_components
    from sdpo_jax.compilation import persistent_cache
    from sdpo_jax.devices import fitting_mesh
    from sdpo_jax.environments.registry import make_environment
    from sdpo_jax.run.recipes import load_recipe
    from sdpo_jax.run.run_ref import find_run
    from sdpo_models.gguf.convert import cache_folder

    reference = None if is_recipe else find_run(target)
    config = load_recipe(target, settings) if reference is None else reference.config
    environment = make_environment(config.environment)  # before there is a device
    config = replace(config, mesh=fitting_mesh(config.mesh))
    with persistent_cache(cache_folder, partial(print, file=stderr)):
        components = load_components(config, environment=environment)
        name = target if reference is None else str(reference.folder)
        evaluate(name, config, components, arguments.samples, run=reference, file=file)


def evaluate(
    name: str,
    config: "Config",
    components: "RunComponents",
    samples: int,
    *,
    run: "RunRef | None" = None,
    file: Path | None = None,
) -> None:
    """Evaluates the start model, and a run after training; prints a table, writes JSON.

    Args:
      name: what is evaluated, for messages.
      config: the recipe.
      components: of the recipe.
      samples: answers to each prompt.
      run: the run, which gets an `eval.json`; with a checkpoint in the reference, `eval@STEP.json`.
      file: gets the same JSON.

    Raises:
      UserError: the run has no such checkpoint, or the recipe evaluates no prompts.
    """
    from sdpo_jax.run.components import make_trainer
    from sdpo_jax.run.evaluate import evaluate_fully, make_evaluator
    from sdpo_jax.run.restore import restore_run

    if config.evaluation.prompts == 0:
        raise UserError(
            f"{name}: evaluation.prompts = 0, there is nothing to evaluate; expected a recipe "
            "that sets it above 0"
        )
    trainer = make_trainer(config, components)
    evaluator = make_evaluator(trainer, components.environment)
    trained: dict[str, Evaluation] = {}
    files = [] if file is None else [file]
    if run is not None:
        step, state, _ = restore_run(trainer, run, components.params)
        trained[f"step {step}"] = evaluate_fully(trainer, evaluator, state, samples)
        files.insert(0, run.folder / ("eval.json" if run.step is None else f"eval@{run.step}.json"))
    state = trainer.initial_state(components.params())
    start = evaluate_fully(trainer, evaluator, state, samples)
    _show({"start": start, **trained}, config, samples, files)


def _show(
    rows: Mapping[str, "Evaluation"], config: "Config", samples: int, files: Sequence[Path]
) -> None:
    """Writes the files and prints the table, on the first process."""
    from sdpo_jax.distributed import is_leader
    from sdpo_jax.evaluation.report import report, table

    if not is_leader():
        return
    result = report(dict(rows), config, samples)
    for file in files:
        file.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
    prompts = len(rows["start"].prompts)
    print(
        f"avg@{samples} and greedy, {prompts} held-out prompts of {config.environment.kind}; "
        "in brackets 95 % intervals over prompts"
    )
    print(table(result))


_RUN = "sdpo eval RUN_DIR|RECIPE [--samples K] [--json FILE]"
COMMAND = Command(
    "eval",
    (
        (
            "sdpo eval RUN_DIR [--samples K] [--json FILE]",
            "evaluate a run and its start model on held-out prompts",
        ),
        (
            "sdpo eval RECIPE [--samples K] [--json FILE] [--SECTION.KEY VALUE ...]",
            "evaluate the start model of a recipe",
        ),
    ),
    add_arguments,
    run,
    takes_settings=True,
)
