"""The `sdpo` command. Parses, loads, calls `train`; nothing here knows the algorithm.

Exit codes: 0 done (or stopped on request and saved), 1 a bug (traceback), 2 bad input (one
message), 130 interrupted at once.
"""

import os
import sys
import traceback
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from sdpo_jax.config import Config
from sdpo_jax.environments.base import Environment
from sdpo_jax.errors import UserError

if TYPE_CHECKING:
    from sdpo_jax.run.run_ref import RunRef

_HELP = ("-h", "--help")
USAGE = """usage: sdpo COMMAND ...

  sdpo train RECIPE [--run-dir DIR] [--SECTION.KEY VALUE ...]   train, or go on with a run
  sdpo train RECIPE --help                                      every setting and its value
  sdpo eval RUN_DIR [--samples K] [--json FILE]                 held-out accuracy of a run
  sdpo eval RECIPE [--samples K] [--SECTION.KEY VALUE ...]      the same of its start model
  sdpo report RUN_DIR [RUN_DIR ...] [--out FILE.html]           curves, times, recipes of runs
  sdpo heatmap RUN_DIR [--prompts P] [--top K] [--tokens T]     advantages, token by token
  sdpo discover RECIPE --question ID [...] [--method NAME ...]  solve one hard question
  sdpo convert RUN_DIR OUT [--dtype float32|bfloat16]           weights, in Hugging Face layout
  sdpo convert FILE.gguf OUT [--dtype float32|bfloat16]         the same, from a GGUF file
  sdpo env check FILE.py|RECIPE [--SECTION.KEY VALUE ...]       is this environment sound?
  sdpo env template [FILE.py]                                   an environment to start from

Recipes lie in configs/. A run lies in runs/RECIPE unless --run-dir says otherwise. eval, heatmap
and convert take its last checkpoint; of RUN_DIR@best that with the highest held-out accuracy, of
RUN_DIR@STEP another that is saved.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point; exits with the codes above."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code = _dispatch(words)
    except UserError as error:
        print(f"sdpo: {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("sdpo: interrupted; the last checkpoint is kept", file=sys.stderr)
        code = 130
    except Exception:
        traceback.print_exc()
        code = 1
    _leave(code)


def _leave(code: int) -> NoReturn:
    """Ends the process; a job of several ends with it, or the others would wait for ever."""
    if code and "sdpo_jax.distributed" in sys.modules:
        from sdpo_jax.distributed import leave

        leave(code)
    sys.exit(code)


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in (*_HELP, "help"):
        print(USAGE)
        return 0 if words else 2
    commands = {"train": _train, "eval": _eval, "convert": _convert, "env": _env}
    commands |= {"report": _report, "heatmap": _heatmap, "discover": _discover}
    if words[0] not in commands:
        raise UserError(
            f"unknown command {words[0]!r}; expected one of {', '.join(commands)}\n\n{USAGE}"
        )
    return commands[words[0]](words[1:]) or 0


def _train(words: list[str]) -> None:
    from sdpo_jax.run.recipes import load_recipe

    if not words or words[0].startswith("-"):
        raise UserError("sdpo train: expected a recipe first, as in `sdpo train configs/nano.toml`")
    recipe = Path(words[0])
    config = load_recipe(recipe, words[1:])
    if not config.run_dir:
        config = replace(config, run_dir=str(Path("runs") / recipe.stem))
    _quiet_libraries()
    from sdpo_jax.compilation import persistent_cache
    from sdpo_jax.distributed import initialize_from_environment, is_leader
    from sdpo_jax.environments.registry import make_environment
    from sdpo_jax.run import run_directory
    from sdpo_jax.run.console import Console
    from sdpo_jax.run.loop import show_summary, train
    from sdpo_models.gguf.convert import cache_folder

    run_dir = Path(config.run_dir)
    summary = run_directory.read_summary(run_dir)
    complete = summary is not None and summary["steps"] >= config.train.steps
    # Before there is a device: an environment may start processes of its own.
    environment = None if complete else make_environment(config.environment)
    initialize_from_environment()
    stream = None if is_leader() else open(os.devnull, "w")  # noqa: SIM115, lives as long as we do
    console = Console(config.objective.name, steps=config.train.steps, stream=stream)
    if summary is not None:
        run_directory.claim(run_dir, config)
    if summary is not None and complete:
        console.note(
            f"complete  {run_dir} holds this run, finished. To train anew: rm -r {run_dir}"
        )
        show_summary(config, summary, console, run_dir)
        return
    with persistent_cache(cache_folder, console.note):
        parts = load_parts(config, environment)
        train(config, **parts, console=console)


def _eval(words: list[str]) -> None:
    from sdpo_jax.commands.evaluate import evaluate_run, evaluate_start, parse_options
    from sdpo_jax.compilation import persistent_cache
    from sdpo_jax.devices import fitting_mesh
    from sdpo_jax.environments.registry import make_environment
    from sdpo_jax.run.recipes import load_recipe
    from sdpo_jax.run.run_ref import find
    from sdpo_models.gguf.convert import cache_folder

    options = parse_options(words)
    _quiet_libraries()
    run = None if options.is_recipe else find(options.target)
    config = load_recipe(Path(options.target), options.settings) if run is None else run.config
    environment = make_environment(config.environment)  # before there is a device
    config = replace(config, mesh=fitting_mesh(config.mesh))
    asked: dict[str, Any] = {"samples": options.samples, "json_file": options.json_file}
    with persistent_cache(cache_folder, partial(print, file=sys.stderr)):
        parts = load_parts(config, environment)
        if run is None:
            evaluate_start(options.target, config, parts, **asked)
        else:
            evaluate_run(run._replace(config=config), parts, **asked)


def _report(words: list[str]) -> None:
    from sdpo_jax.reports.run_report import main

    main(words)


def _heatmap(words: list[str]) -> None:
    from sdpo_jax.commands.heatmap_options import heatmap_run, parse_options
    from sdpo_jax.compilation import persistent_cache
    from sdpo_jax.devices import fitting_mesh
    from sdpo_jax.environments.registry import make_environment
    from sdpo_jax.run.run_ref import find
    from sdpo_models.gguf.convert import cache_folder

    options = parse_options(words)
    _quiet_libraries()
    run = find(words[0])
    environment = make_environment(run.config.environment)  # before there is a device
    run = run._replace(config=replace(run.config, mesh=fitting_mesh(run.config.mesh)))
    with persistent_cache(cache_folder, partial(print, file=sys.stderr)):
        heatmap_run(run, load_parts(run.config, environment), **options)


def _discover(words: list[str]) -> None:
    if not words or words[0] in _HELP:
        from sdpo_jax.discovery.options import USAGE as usage

        print(f"usage: {usage}")
        return
    _quiet_libraries()
    from sdpo_jax.compilation import persistent_cache
    from sdpo_jax.discovery.options import find_questions, parse
    from sdpo_jax.discovery.runner import discover
    from sdpo_jax.environments.registry import make_environment
    from sdpo_models.gguf.convert import cache_folder

    config, options = parse(words)
    environment = make_environment(config.environment)  # before there is a device
    questions = find_questions(environment, options.questions)
    with persistent_cache(cache_folder, partial(print, file=sys.stderr)):
        discover(config, options, questions, load_parts(config, environment))


def _convert(words: list[str]) -> None:
    usage = "sdpo convert RUN_DIR|FILE.gguf OUT [--dtype float32|bfloat16]"
    if len(words) not in (2, 4) or words[2:3] not in ([], ["--dtype"]) or words[0].startswith("-"):
        raise UserError(f"expected `{usage}`")
    source, out = words[0], Path(words[1])
    # Half the place for a run; all of what quantised weights say.
    dtype = words[3] if len(words) == 4 else "float32" if source.endswith(".gguf") else "bfloat16"
    if dtype != "float32" and dtype != "bfloat16":
        raise UserError(f"--dtype {dtype}: expected `{usage}`")
    _quiet_libraries()
    if source.endswith(".gguf"):
        from sdpo_models.gguf.convert import convert

        convert(source, out, dtype=dtype)
        print(f"wrote {out}: {source} as {dtype}")
        return
    from sdpo_jax.run.run_ref import find
    from sdpo_models.hugging_face import save_run

    run = find(source)
    step, params = _student(run)
    save_run(out, params, source=model_folder(run.config), dtype=dtype)
    print(f"wrote {out}: the student of {run.folder} after step {step}, as {dtype}")


def _env(words: list[str]) -> int:
    usage = "sdpo env check FILE.py|RECIPE, or sdpo env template [FILE.py]"
    if any(word in _HELP for word in words):
        print(f"usage: {usage}")
        return 0
    if not words or words[0] not in ("check", "template"):
        raise UserError(f"expected `{usage}`")
    if words[0] == "check":
        if len(words) < 2 or words[1].startswith("-"):
            raise UserError(f"expected `{usage}`")
        return _env_check(Path(words[1]), words[2:])
    if len(words) > 2:
        raise UserError(f"{words[2]}: unexpected argument; expected `{usage}`")
    text = (Path(__file__).parent / "environments" / "template.py").read_text(encoding="utf-8")
    if len(words) == 1:
        print(text, end="")
        return 0
    out = Path(words[1])
    if out.suffix != ".py" or out.exists() or not out.parent.is_dir():
        raise UserError(
            f"{out}: expected the name of a new file, with .py, in a folder that is there"
        )
    out.write_text(text.replace("THIS_FILE", str(out)), encoding="utf-8")
    print(f"wrote {out}; next: sdpo env check {out}")
    return 0


def _env_check(path: Path, options: list[str]) -> int:
    """Prints the table; 2 if there is a problem."""
    from sdpo_jax.config.environments import (
        CodeEnvironment,
        FileEnvironment,
        NanoCodeEnvironment,
    )
    from sdpo_jax.environments.check import check, report
    from sdpo_jax.environments.registry import make_environment
    from sdpo_jax.run.recipes import load_recipe

    _quiet_libraries()
    if path.suffix == ".toml":
        settings = load_recipe(path, options).environment
    elif options:
        raise UserError(f"{options[0]}: options go with a recipe; expected `sdpo env check {path}`")
    else:
        settings = FileEnvironment(path=str(path))
    runs_programs = isinstance(settings, CodeEnvironment | NanoCodeEnvironment)
    lines = check(make_environment(settings), runs_programs=runs_programs)
    print(report(lines))
    return 2 if any(line.problem for line in lines) else 0


def model_folder(config: Config) -> Path:
    """The folder that `model.path` names; a package's weights are converted the first time.

    A run's folder leads to the folder that the run itself started from.
    """
    from sdpo_jax.run.run_ref import config_of, names_a_run
    from sdpo_models.nano import FOLDER

    path = config.model.path
    if names_a_run(path):
        return model_folder(config_of(path))
    if path.startswith("package:"):
        from sdpo_models.gguf.convert import package_folder

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


def load_parts(config: Config, environment: Environment | None = None) -> dict[str, Any]:
    """What a recipe names, loaded; keys are the argument names of `train`.

    `environment` is the recipe's, if the caller has built it already.
    `params` is a function: nobody but the run holds what it loads.
    """
    from sdpo_jax.data.demonstrations import load_demonstrations
    from sdpo_jax.environments.registry import make_environment
    from sdpo_models.tokenizer import ChatTokenizer

    if environment is None:
        environment = make_environment(config.environment)
    taught = config.objective.learns_from == "demonstrations"
    demonstrations = load_demonstrations(config.data, environment) if taught else ()
    folder = model_folder(config)
    architecture, model = _model(config, folder)
    tokenizer = ChatTokenizer.from_pretrained(folder, thinking=config.model.thinking)
    tokenizer.check_vocabulary(architecture.vocabulary)
    return {
        "model": model,
        "params": partial(_initial_params, config, model, folder, architecture),
        "tokenizer": tokenizer,
        "environment": environment,
        "demonstrations": demonstrations,
    }


def _model(config: Config, folder: Path) -> tuple[Any, Any]:
    """Architecture and model; what the recipe asks of them is checked before weights are read."""
    import jax
    import jax.numpy as jnp

    from sdpo_jax.config.objectives import SdftConfig, SdpoConfig
    from sdpo_jax.training.state import make_parameters
    from sdpo_models.hugging_face import load_architecture
    from sdpo_models.transformer import build_model

    architecture, objective = load_architecture(folder), config.objective
    compares = isinstance(objective, SdpoConfig | SdftConfig)
    if compares and objective.top_k > architecture.vocabulary:
        raise UserError(
            f"objective.top_k = {objective.top_k}: expected at most {architecture.vocabulary}, the "
            f"vocabulary of {config.model.path}; 0 compares all of it"
        )
    dtype = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}[config.model.dtype]
    attention = config.model.attention
    if attention == "auto":
        attention = "splash" if jax.default_backend() == "tpu" else "xla"
    model = build_model(architecture, dtype=dtype, remat=config.model.remat, attention=attention)
    key = jax.random.key(0)
    jax.eval_shape(make_parameters(config).trainable, jax.eval_shape(model.init, key), key)
    return architecture, model


def _initial_params(config: Config, model: Any, folder: Path, architecture: Any) -> Any:
    """The weights a run starts from: drawn, another run's student, or a folder's."""
    import jax

    from sdpo_jax.devices import Devices, make_mesh
    from sdpo_jax.run.run_ref import find, names_a_run
    from sdpo_models.hugging_face import load_params

    if config.model.random_init:
        return jax.jit(model.init)(jax.random.key(config.seed))
    if names_a_run(config.model.path):
        run = find(config.model.path)
        return _student(run._replace(config=replace(run.config, mesh=config.mesh)))[1]
    devices = Devices(make_mesh(config.mesh))
    return load_params(folder, architecture, shardings=devices.parameter_shardings)


def _student(run: "RunRef") -> tuple[int, Any]:
    """Step and weights of a run's checkpoint, on whatever devices are here."""
    from sdpo_jax.commands.evaluate import restore_student
    from sdpo_jax.devices import fitting_mesh

    config = replace(run.config, mesh=fitting_mesh(run.config.mesh))
    folder = model_folder(config)
    architecture, model = _model(config, folder)
    load_params = partial(_initial_params, config, model, folder, architecture)
    return restore_student(run._replace(config=config), model, load_params)


def _quiet_libraries() -> None:
    """Keeps third parties' notices out of the run's output; must run before they are imported."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    import logging

    logging.getLogger("absl").setLevel(logging.WARNING)


if __name__ == "__main__":
    main()
