"""Training from Python: `load` a recipe, then train it, step through it, or evaluate it.

    run = sdpo_jax.load("configs/nano.toml", **{"train.steps": 20})
    for row in run.steps():
        print(row.step, row.metrics["reward"])
    print(run.evaluate().metrics["accuracy"])

The commands of `sdpo` are thin shells over this module. Without `verbose` nothing is printed, and
signals stay as they are.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax

from sdpo_jax.config import Config
from sdpo_jax.config.resolved import flatten
from sdpo_jax.data.demonstrations import load_demonstrations
from sdpo_jax.devices import Devices, fitting_mesh, make_mesh
from sdpo_jax.environments.base import Environment
from sdpo_jax.environments.kinds.file import checked
from sdpo_jax.environments.registry import make_environment
from sdpo_jax.errors import UserError
from sdpo_jax.model import Model, Params
from sdpo_jax.run.callbacks import Callbacks, merge
from sdpo_jax.run.components import RunComponents, objective_of
from sdpo_jax.run.console import Console
from sdpo_jax.run.loop import EvaluationResult, Run, StepResult
from sdpo_jax.run.recipes import load_recipe, override_config
from sdpo_jax.run.restore import restore_student
from sdpo_jax.run.run_ref import RunRef, find_run, is_run, run_config
from sdpo_jax.run.summary import Summary
from sdpo_jax.teacher.contexts import ContextBuilder
from sdpo_jax.tokens import Tokenizer
from sdpo_jax.training.objective import Objective
from sdpo_jax.training.state import make_parameters
from sdpo_jax.training.trainer import LoadParams
from sdpo_models.architecture import Architecture
from sdpo_models.gguf.convert import package_folder
from sdpo_models.hugging_face import load_architecture, load_params
from sdpo_models.nano import FOLDER
from sdpo_models.tokenizer import ChatTokenizer
from sdpo_models.transformer import build_model

__all__ = ["Callbacks", "EvaluationResult", "Run", "StepResult", "Summary", "load", "train"]


def load(
    recipe: str | Path | Config,
    *,
    environment: Environment | None = None,
    model: Model | None = None,
    params: Params | LoadParams | None = None,
    tokenizer: Tokenizer | None = None,
    optimizer: optax.GradientTransformation | None = None,
    objective: Objective | None = None,
    context: ContextBuilder | None = None,
    callbacks: Callbacks | Sequence[Callbacks] = (),
    verbose: bool | Console = False,
    **overrides: Any,
) -> Run:
    """Prepares a run; weights are loaded when they are first needed.

    Args:
      recipe: path of a TOML recipe, or its settings. The run lies in `run_dir`, by default in
        `runs/` under the name of the recipe's file.
      environment: prompts and grader, in place of the recipe's `[environment]`.
      model: pure functions in place of `[model]`, see `sdpo_jax.model`; needs `params` and
        `tokenizer` beside it.
      params: initial weights, or a function that loads them; they stay the caller's.
      tokenizer: see `sdpo_jax.tokens`.
      optimizer: an `optax.GradientTransformation` in place of `[optimizer]`'s AdamW.
      objective: a bundle of functions in place of `[objective]`, see
        `sdpo_jax.training.objective`.
      context: builds what the teacher sees of each rollout, in place of `[teacher]`'s rules, see
        `sdpo_jax.teacher.contexts`.
      callbacks: functions to call on rollouts, steps, evaluations, checkpoints and the end.
      verbose: prints one line per step on standard output, or to the given console.
      **overrides: settings by their dotted keys, `**{"train.steps": 20}`.

    Raises:
      UserError: one error that lists every problem of the recipe and of the overrides; or a file
        or a package is missing.
    """
    config = load_config(recipe, overrides, objective)
    components = load_components(
        config, environment=environment, model=model, params=params, tokenizer=tokenizer
    )._replace(optimizer=optimizer, objective=objective, context=context)
    if verbose is True:
        columns = objective_of(config, components).columns
        verbose = Console(columns, steps=config.train.steps, live=False)
    called = merge([callbacks] if isinstance(callbacks, Callbacks) else callbacks)
    return Run(config, components, callbacks=called, console=verbose or None)


def train(recipe: str | Path | Config, **arguments: Any) -> Summary:
    """`load(recipe, **arguments).train()`: trains a recipe to its end, or resumes its run.

    Raises:
      UserError: as `load` and `Run.train`.
    """
    return load(recipe, **arguments).train()


def load_config(
    recipe: str | Path | Config, overrides: Mapping[str, Any], objective: Objective | None = None
) -> Config:
    """The settings of a run: a recipe with overrides, checked, and with a folder.

    The settings of `objective` take the place of the recipe's `[objective]`.

    Raises:
      UserError: one error that lists every problem of both.
    """
    if isinstance(recipe, Config):
        config = override_config(recipe, overrides, objectives=[type(recipe.objective)])
        if not config.run_dir:
            raise UserError('run_dir = "": expected the folder of the run')
    else:
        config = load_recipe(recipe, values=overrides)
        if not config.run_dir:
            config = replace(config, run_dir=str(Path("runs") / Path(recipe).stem))
    if objective is None:
        return config
    settings = objective.settings
    return override_config(replace(config, objective=settings), {}, objectives=[type(settings)])


def load_components(
    config: Config,
    *,
    environment: Environment | None = None,
    model: Model | None = None,
    params: Params | LoadParams | None = None,
    tokenizer: Tokenizer | None = None,
) -> RunComponents:
    """Loads what a recipe names, but for what is given; the arguments are those of `load`.

    Raises:
      UserError: a file or a package is missing, or the parts do not fit together.
    """
    given = (model, params, tokenizer)
    if model is not None and any(part is None for part in given):
        raise UserError("model= comes with its own weights: expected params= and tokenizer= too")
    if environment is None:
        environment = make_environment(config.environment)
    else:
        checked(environment, "environment")
    is_taught = config.objective.learns_from == "demonstrations"
    demonstrations = load_demonstrations(config.data, environment) if is_taught else ()
    load_given = params if callable(params) else lambda: params
    if model is None:
        folder = model_folder(config)
        architecture, model = _load_model(config, folder)
        if params is None:
            load_given = partial(_initial_params, config, model, folder, architecture)
        if tokenizer is None:
            chat = ChatTokenizer.from_pretrained(folder, thinking=config.model.thinking)
            chat.check_vocabulary(architecture.vocabulary)
            tokenizer = cast(Tokenizer, chat)  # pyright takes no cached_property for a property
    assert tokenizer is not None
    return RunComponents(model, load_given, tokenizer, environment, demonstrations)


def model_folder(config: Config) -> Path:
    """The folder of the weights that `model.path` names; a package's are converted once.

    The folder of a run stands for the folder of its start model.

    Raises:
      UserError: there is no such model.
    """
    path = config.model.path
    if is_run(path):
        return model_folder(run_config(path))
    if path.startswith("package:"):
        return package_folder(path)
    if path.endswith(".gguf"):
        raise UserError(
            f"model.path = {path!r}: expected a folder in Hugging Face layout; "
            f"make one: sdpo convert {path} FOLDER"
        )
    folder = FOLDER if path == "nano" else Path(path)
    if not (folder / "config.json").is_file():
        raise UserError(
            f"model.path = {path!r}: expected 'nano', 'package:NAME', the folder of a run (also "
            "RUN@best, RUN@STEP), or a folder in Hugging Face layout; found no "
            f"{folder / 'config.json'}"
        )
    return folder


def _load_model(config: Config, folder: Path) -> tuple[Architecture, Model]:
    """Architecture and model; settings that do not fit them are refused before weights are read."""
    architecture, objective = load_architecture(folder), config.objective
    for problem in objective.check_vocabulary(architecture.vocabulary):
        value = flatten(config)[problem.key]
        raise UserError(f"{problem.key} = {value}: expected {problem.expected}")
    dtype = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}[config.model.dtype]
    attention = config.model.attention
    if attention == "auto":
        attention = "splash" if jax.default_backend() == "tpu" else "xla"
    model = build_model(architecture, dtype=dtype, remat=config.model.remat, attention=attention)
    key = jax.random.key(0)
    jax.eval_shape(make_parameters(config).trainable, jax.eval_shape(model.init, key), key)
    return architecture, model


def _initial_params(
    config: Config, model: Model, folder: Path, architecture: Architecture
) -> Params:
    """The weights that a run starts from: drawn, the student of another run, or a folder's."""
    if config.model.random_init:
        return jax.jit(model.init)(jax.random.key(config.seed))
    if is_run(config.model.path):
        run = find_run(config.model.path)
        return load_student(run._replace(config=replace(run.config, mesh=config.mesh)))[1]
    devices = Devices(make_mesh(config.mesh))
    return load_params(folder, architecture, shardings=devices.parameter_shardings)


def load_student(run: RunRef) -> tuple[int, Params]:
    """Step and weights of a run's checkpoint, on whatever devices are here.

    Raises:
      UserError: the run has no such checkpoint.
    """
    config = replace(run.config, mesh=fitting_mesh(run.config.mesh))
    folder = model_folder(config)
    architecture, model = _load_model(config, folder)
    load_start = partial(_initial_params, config, model, folder, architecture)
    return restore_student(run._replace(config=config), model, load_start)
