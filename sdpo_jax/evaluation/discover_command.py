"""`sdpo discover`: test-time training on hard questions, and its baselines.

A run's folder:

config.toml      the resolved recipe
cells.jsonl      one object for each finished (method, question, seed), see `discovery.Cell`
discovery.json   the numbers of the table
discovery.svg    discovery@k on a log axis

A cell that has its line is read and not repeated, whatever happened to the run; one that has none
starts anew. One process: questions could be spread over many, but nothing here does.
"""

import difflib
import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax

from sdpo_jax.config import Config, GrpoObjective, Objective, SdpoObjective
from sdpo_jax.devices import Devices, make_mesh
from sdpo_jax.environments.base import Environment, Prompt
from sdpo_jax.errors import UserError
from sdpo_jax.evaluation.baselines import StartModel, best_of_k, multi_turn
from sdpo_jax.evaluation.discovery import Cell, log_grid, summary
from sdpo_jax.evaluation.test_time_training import TestTimeTraining
from sdpo_jax.recipe import load_recipe, problems
from sdpo_jax.reports.discovery import draw
from sdpo_jax.sampling.sampler import Sampler
from sdpo_jax.training import run_directory

USAGE = """sdpo discover RECIPE --question ID [ID ...] [--seeds N | S S ...] [--budget GENERATIONS]
      [--method NAME [NAME ...]] [--samples N] [--run-dir DIR] [--SECTION.KEY VALUE ...]"""
TRAINED: dict[str, type[Objective]] = {"sdpo": SdpoObjective, "grpo": GrpoObjective}
ASKED = {"multi_turn_feedback": False, "multi_turn_conversation": True}
"""Whether attempts are shown."""
METHODS = (*TRAINED, "best_of_k", *ASKED)
CELLS = "cells.jsonl"
_TOLD_EVERY_SECONDS = 10.0


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


def discover(
    config: Config,
    options: Options,
    questions: Sequence[Prompt],
    parts: Mapping[str, Any],
    say: Callable[[str], None] = print,
) -> list[Cell]:
    """Runs what is missing, prints the table, writes JSON and SVG.

    Args:
      config: of `parse`; `run_dir` is set.
      options: of `parse`.
      questions: of `find_questions`.
      parts: `model`, `params` (a function), `tokenizer` and `environment`.
      say: prints a line.

    Returns:
      All cells that were asked for, by method, question and seed.

    Raises:
      UserError: the folder holds another run, or a cell cannot go on.
    """
    run_dir = Path(config.run_dir)
    run_directory.check(run_dir, config)
    with run_directory.locked(run_dir):
        run_directory.claim(run_dir, config)
        asked = [(m, q, s) for m in options.methods for q in questions for s in options.seeds]
        known = {_key(c): c for c in read_cells(run_dir / CELLS)}
        keys = [(m, q.id, s, options.budget_of(m)) for m, q, s in asked]
        missing = [x for x, key in zip(asked, keys, strict=True) if key not in known]
        say(
            f"discover  {len(asked)} cells in {run_dir}, {len(asked) - len(missing)} of them done; "
            f"budget {options.budget} generations"
        )
        if missing:
            _run(config, options, missing, parts, _Log(run_dir / CELLS, known, say))
        cells = [known[key] for key in keys]
        numbers = summary(cells, options.budget)
        run_directory.write_whole(run_dir / "discovery.json", json.dumps(numbers, indent=2) + "\n")
        run_directory.write_whole(run_dir / "discovery.svg", draw(cells))
        say(table(numbers))
        say(f"wrote     {run_dir}/discovery.json, {run_dir}/discovery.svg")
    return cells


def read_cells(path: Path) -> list[Cell]:
    """The finished cells of a folder; a last line without its end, of a killed run, is left out.

    Raises:
      UserError: any other line that is no cell.
    """
    if not path.exists():
        return []
    *lines, _ = path.read_bytes().split(b"\n")
    cells: list[Cell] = []
    for number, line in enumerate(lines, start=1):
        try:
            row: dict[str, Any] = json.loads(line)
            row["passed"] = tuple(row["passed"])
            cells.append(Cell(**row))
        except (ValueError, TypeError, KeyError) as error:
            text = f"{path}:{number}: not a finished cell ({error}). Remove the line."
            raise UserError(text) from error
    return cells


def _key(cell: Cell) -> tuple[str, str, int, int]:
    return cell.method, cell.question, cell.seed, cell.budget


class _Log:
    """Appends finished cells to the file, and tells of them and of what goes on."""

    def __init__(
        self, path: Path, known: dict[tuple[str, str, int, int], Cell], say: Callable[[str], None]
    ):
        self._path, self._known, self._say = path, known, say
        self._last = time.monotonic()
        if path.exists():  # what a killed run left unfinished would spoil the next line
            whole = path.read_bytes()
            run_directory.write_whole(path, whole[: whole.rfind(b"\n") + 1].decode())

    def done(self, cell: Cell) -> None:
        """A finished cell; on the disk when this returns."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(cell._asdict()) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._known[_key(cell)] = cell
        found = f"first success at {cell.first}" if cell.first else "no success"
        if cell.independent:
            found = f"{sum(cell.passed)} successes"
        self._say(
            f"{cell.method:<24}{cell.question}  seed {cell.seed}  {found} "
            f"in {cell.budget} generations, {cell.seconds:.1f} s"
        )

    def going_on(self, what: str, generations: int, budget: int) -> None:
        """A sign of life of a long cell."""
        if time.monotonic() - self._last >= _TOLD_EVERY_SECONDS:
            self._last = time.monotonic()
            self._say(f"{what}  {generations} of {budget} generations")


def _run(
    config: Config,
    options: Options,
    missing: Sequence[tuple[str, Prompt, int]],
    parts: Mapping[str, Any],
    log: _Log,
) -> None:
    params = parts["params"]()
    model, tokenizer, environment = (parts[k] for k in ("model", "tokenizer", "environment"))
    devices = Devices(make_mesh(config.mesh))
    sampler = Sampler(model, devices, tokenizer.stop_ids, slots=config.rollout.slots)
    start = StartModel(config, sampler, tokenizer, environment, params)
    for method in options.methods:
        budget = options.budget_of(method)
        pairs = [(question, seed) for name, question, seed in missing if name == method]
        if not pairs:
            continue
        if method in ASKED:
            tell = partial(log.going_on, f"{method:<24}{len(pairs)} chains")
            multi_turn(start, pairs, budget, log.done, tell, shows_attempts=ASKED[method])
            continue
        train = None
        if method in TRAINED:
            own = _with_objective(config, method)
            train = TestTimeTraining(own, model, tokenizer, environment, params)
        for question, seed in pairs:
            tell = partial(log.going_on, f"{method:<24}{question.id}  seed {seed}")
            if train is None:
                log.done(best_of_k(start, question, seed, budget, tell))
            else:
                log.done(train(question, seed, budget, tell))
            jax.block_until_ready(params)


def _with_objective(config: Config, method: str) -> Config:
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


def table(numbers: Mapping[str, Any]) -> str:
    """discovery@k of each method with its interval, mean generations, speed-ups."""
    methods: Mapping[str, Any] = numbers["methods"]
    most = max(own["discovery"][-1]["k"] for own in methods.values())
    ks = log_grid(most)[-8:]
    head = f"{'discovery@k, %':<26}" + "".join(f"{k:>12}" for k in ks) + f"{'mean':>9}{'found':>10}"
    lines = ["", head]
    for name, own in methods.items():
        at = {e["k"]: e for e in own["discovery"]}
        cells = "".join(f"{_interval(at.get(k)):>12}" for k in ks)
        found = f"{own['discovered']}/{own['cells']}"
        lines.append(f"{name:<26}{cells}{own['mean_generations']:>9.0f}{found:>10}")
    level = round(100 * numbers["confidence"])
    lines.append(
        f"in brackets: {level} % bootstrap over seeds; mean: generations to the first success, "
        f"truncated at {numbers['budget']}; found: cells with a success"
    )
    for other, gain in numbers["speed_up_over"].items():
        lines.append(_speed_up(numbers["speed_up_of"], other, gain))
    return "\n".join([*lines, *_by_question(methods), ""])


def _interval(estimate: Mapping[str, float] | None) -> str:
    if estimate is None:
        return "-"
    p, low, high = (100 * estimate[name] for name in ("probability", "low", "high"))
    return f"{p:.0f} [{low:.0f},{high:.0f}]"


def _speed_up(ours: str, other: str, gain: Mapping[str, Any] | None) -> str:
    if gain is None:
        return f"{ours} and {other}: one of them discovered nothing, there is no equal probability"
    return (
        f"{ours} reaches {100 * gain['probability']:.0f} % after {gain['ours']} generations, "
        f"{other} after {gain['theirs']}: a ratio of {gain['ratio']:.1f}"
    )


def _by_question(methods: Mapping[str, Any]) -> list[str]:
    names = list(dict.fromkeys(q for own in methods.values() for q in own["questions"]))
    if len(names) < 2:
        return []
    width = max(map(len, names))
    lines = ["", f"{'mean generations (found)':<{max(width, 24)}}  " + "  ".join(methods)]
    for name in names:
        cells: list[str] = []
        for method, own in methods.items():
            q = own["questions"][name]
            text = f"{q['mean_generations']:.0f} ({q['discovered']}/{q['seeds']})"
            cells.append(f"{text:>{len(method)}}")
        lines.append(f"{name:<{max(width, 24)}}  " + "  ".join(cells))
    return lines
