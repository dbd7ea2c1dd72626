"""`sdpo discover`: test-time training on hard questions, and its baselines.

A run's folder:

config.toml      the resolved recipe
cells.jsonl      one object for each finished (method, question, seed), see `discovery.Cell`
discovery.json   the numbers of the table
discovery.svg    discovery@k on a log axis

A cell that has its line is read and not repeated, whatever happened to the run; one that has none
starts anew. One process: questions could be spread over many, but nothing here does.
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
from sdpo_jax.discovery.estimator import Cell, log_grid, summary
from sdpo_jax.discovery.options import ASKED, TRAINED, Options, with_objective
from sdpo_jax.discovery.picture import draw
from sdpo_jax.discovery.test_time import TestTimeTraining
from sdpo_jax.environments.base import Prompt
from sdpo_jax.errors import UserError
from sdpo_jax.rollouts.sampler import Sampler
from sdpo_jax.run import run_directory

CELLS = "cells.jsonl"
_TOLD_EVERY_SECONDS = 10.0


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
        _report(run_dir, cells, options.budget, say)
    return cells


def _report(run_dir: Path, cells: Sequence[Cell], budget: int, say: Callable[[str], None]) -> None:
    numbers = summary(cells, budget)
    run_directory.write_whole(run_dir / "discovery.json", json.dumps(numbers, indent=2) + "\n")
    run_directory.write_whole(run_dir / "discovery.svg", draw(cells))
    say(table(numbers))
    say(f"wrote     {run_dir}/discovery.json, {run_dir}/discovery.svg")


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
            own = with_objective(config, method)
            train = TestTimeTraining(own, model, tokenizer, environment, params)
        for question, seed in pairs:
            tell = partial(log.going_on, f"{method:<24}{question.id}  seed {seed}")
            if train is None:
                log.done(best_of_k(start, question, seed, budget, tell))
            else:
                log.done(train(question, seed, budget, tell))
            jax.block_until_ready(params)


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
