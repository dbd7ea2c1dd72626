"""`sdpo discover`: test-time training on hard questions, and its baselines.

The folder of a run:

config.toml      the resolved recipe
cells.jsonl      one object for each finished (method, question, seed), see `discovery.Cell`
discovery.json   the numbers of the table
discovery.svg    discovery@k on a log axis

A cell that has a line in `cells.jsonl` is not repeated; any other one starts from the beginning.
Runs in one process.
"""

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax

from sdpo_jax.config import Config
from sdpo_jax.devices import Devices, make_mesh
from sdpo_jax.discovery.baselines import StartModel, best_of_k, multi_turn
from sdpo_jax.discovery.estimator import Cell, summary
from sdpo_jax.discovery.options import MULTI_TURN, TRAINED, Options, with_objective
from sdpo_jax.discovery.picture import draw
from sdpo_jax.discovery.test_time import QuestionTrainer
from sdpo_jax.environments.base import Prompt
from sdpo_jax.errors import UserError
from sdpo_jax.evaluation.estimators import powers_of_two
from sdpo_jax.rollouts.sampler import Sampler
from sdpo_jax.run import run_directory
from sdpo_jax.run.components import RunComponents

CELLS = "cells.jsonl"
_REPORT_EVERY_SECONDS = 10.0


def discover(
    config: Config,
    options: Options,
    questions: Sequence[Prompt],
    components: RunComponents,
    say: Callable[[str], None] = print,
) -> list[Cell]:
    """Runs what is missing, prints the table, writes JSON and SVG.

    Args:
      config: from `for_one_question`; `run_dir` is set.
      options: from `make_options`.
      questions: from `find_questions`.
      components: of the recipe.
      say: prints a line.

    Returns:
      The cells of all options, ordered by method, question and seed.

    Raises:
      UserError: the folder holds another run, or a cell cannot go on.
    """
    run_dir = Path(config.run_dir)
    run_directory.check(run_dir, config)
    with run_directory.locked(run_dir):
        run_directory.claim(run_dir, config)
        jobs = [(m, q, s) for m in options.methods for q in questions for s in options.seeds]
        known = {_key(c): c for c in read_cells(run_dir / CELLS)}
        keys = [(m, q.id, s, options.budget_of(m)) for m, q, s in jobs]
        missing = [job for job, key in zip(jobs, keys, strict=True) if key not in known]
        say(
            f"discover  {len(jobs)} cells in {run_dir}, {len(jobs) - len(missing)} of them done; "
            f"budget {options.budget} generations"
        )
        if missing:
            _run(config, options, missing, components, _Log(run_dir / CELLS, known, say))
        cells = [known[key] for key in keys]
        _report(run_dir, cells, options.budget, say)
    return cells


def _report(run_dir: Path, cells: Sequence[Cell], budget: int, say: Callable[[str], None]) -> None:
    numbers = summary(cells, budget)
    run_directory.write_atomically(run_dir / "discovery.json", json.dumps(numbers, indent=2) + "\n")
    run_directory.write_atomically(run_dir / "discovery.svg", draw(cells))
    say(table(numbers))
    say(f"wrote     {run_dir}/discovery.json, {run_dir}/discovery.svg")


def read_cells(path: Path) -> list[Cell]:
    """The finished cells of a file; ignores a last line that a killed run did not finish.

    Raises:
      UserError: any other line is not a cell.
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
    """Appends finished cells to the file; prints them, and the progress of long ones."""

    def __init__(
        self, path: Path, known: dict[tuple[str, str, int, int], Cell], say: Callable[[str], None]
    ):
        self._path, self._known, self._say = path, known, say
        self._last = time.monotonic()
        if path.exists():  # a killed run may have left half a line, which would spoil the next one
            text = path.read_bytes()
            run_directory.write_atomically(path, text[: text.rfind(b"\n") + 1].decode())

    def done(self, cell: Cell) -> None:
        """Writes a finished cell, to the disk, and prints it."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(cell._asdict()) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._known[_key(cell)] = cell
        result = f"first success at {cell.first}" if cell.first else "no success"
        if cell.independent:
            result = f"{sum(cell.passed)} successes"
        self._say(
            f"{cell.method:<24}{cell.question}  seed {cell.seed}  {result} "
            f"in {cell.budget} generations, {cell.seconds:.1f} s"
        )

    def progress(self, what: str, generations: int, budget: int) -> None:
        """Prints how far a long cell is, once in a while."""
        if time.monotonic() - self._last >= _REPORT_EVERY_SECONDS:
            self._last = time.monotonic()
            self._say(f"{what}  {generations} of {budget} generations")


def _run(
    config: Config,
    options: Options,
    missing: Sequence[tuple[str, Prompt, int]],
    components: RunComponents,
    log: _Log,
) -> None:
    params = components.params()
    model, tokenizer, environment = components.model, components.tokenizer, components.environment
    devices = Devices(make_mesh(config.mesh))
    sampler = Sampler(model, devices, tokenizer.stop_ids, slots=config.rollout.slots)
    start = StartModel(config, sampler, tokenizer, environment, params)
    for method in options.methods:
        budget = options.budget_of(method)
        pairs = [(question, seed) for name, question, seed in missing if name == method]
        if not pairs:
            continue
        if method in MULTI_TURN:
            report = partial(log.progress, f"{method:<24}{len(pairs)} chains")
            multi_turn(start, method, pairs, budget, log.done, report)
            continue
        solve = partial(best_of_k, start)
        if method in TRAINED:
            trained = with_objective(config, method)
            solve = QuestionTrainer(trained, model, tokenizer, environment, params)
        for question, seed in pairs:
            report = partial(log.progress, f"{method:<24}{question.id}  seed {seed}")
            log.done(solve(question, seed, budget, report))
            jax.block_until_ready(params)


def table(numbers: Mapping[str, Any]) -> str:
    """discovery@k of each method with its interval, mean generations, speed-ups."""
    methods: Mapping[str, Any] = numbers["methods"]
    most = max(method["discovery"][-1]["k"] for method in methods.values())
    ks = powers_of_two(most)[-8:]
    head = f"{'discovery@k, %':<26}" + "".join(f"{k:>12}" for k in ks) + f"{'mean':>9}{'found':>10}"
    lines = ["", head]
    for name, method in methods.items():
        at = {e["k"]: e for e in method["discovery"]}
        cells = "".join(f"{_interval(at.get(k)):>12}" for k in ks)
        solved = f"{method['discovered']}/{method['cells']}"
        lines.append(f"{name:<26}{cells}{method['mean_generations']:>9.0f}{solved:>10}")
    level = round(100 * numbers["confidence"])
    lines.append(
        f"in brackets: {level} % bootstrap over seeds; mean: generations to the first success, "
        f"truncated at {numbers['budget']}; found: cells with a success"
    )
    gains = numbers["speed_up_over"].items()
    lines += [_speed_up(numbers["speed_up_of"], other, gain) for other, gain in gains]
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
    names = list(dict.fromkeys(q for m in methods.values() for q in m["questions"]))
    if len(names) < 2:
        return []
    head = "mean generations (found)"
    width = max(map(len, (head, *names)))
    lines = ["", f"{head:<{width}}  " + "  ".join(methods)]
    for name in names:
        found = {method: numbers["questions"][name] for method, numbers in methods.items()}
        cells = [
            f"{q['mean_generations']:.0f} ({q['discovered']}/{q['seeds']})".rjust(len(method))
            for method, q in found.items()
        ]
        lines.append(f"{name:<{width}}  " + "  ".join(cells))
    return lines
