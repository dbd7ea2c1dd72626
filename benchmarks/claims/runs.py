"""Shared parts of the claims' scripts: arms over seeds, measures, tables, results.

An arm is a recipe with options. Each run is a process of its own from the same start weights;
finished runs in the folder are read, not repeated. A script ends by writing
`docs/claims/NAME.json`: measures of every seed, the verdicts and the command. `table.py` writes the
README's table and `docs/claims.md` from these files.

Intervals are 95 %, from Student's t over the seeds: they estimate what other seeds would give.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple

import jax

from sdpo_jax.reports.curves import main as draw_curves
from sdpo_jax.run.metrics import read_metrics
from sdpo_jax.run.run_directory import read_summary

RESULTS = Path("docs/claims")
RATE_SEED = 100
"""Rates are chosen on this seed, which no result has."""
T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
"""97.5 % quantile of Student's t by the number of seeds; of more, that of 10 (too wide)."""


class Arm(NamedTuple):
    """One way to train."""

    name: str
    recipe: str
    options: tuple[str, ...] = ()


class Run(NamedTuple):
    """A finished run, step by step."""

    evaluations: list[dict[str, Any]]
    steps: list[dict[str, Any]]
    seconds: float
    """On the wall, evaluations and compilation included."""

    @property
    def final(self) -> dict[str, Any]:
        """The last evaluation."""
        return self.evaluations[-1]

    def spent(self, step: int) -> tuple[int, float]:
        """Generations up to a step, and seconds of steps 2 to it: step 1 compiles."""
        rows = [row for row in self.steps if row["step"] <= step]
        times = [sum(v for k, v in row.items() if k in PHASES) for row in rows[1:]]
        return (rows[-1]["generations"] if rows else 0), sum(times)

    def to_reach(self, level: float) -> tuple[int, float] | None:
        """Generations and seconds at the first evaluation of at least this accuracy."""
        found = next((r for r in self.evaluations if r["accuracy"] >= level), None)
        return None if found is None else self.spent(found["step"])


PHASES = (
    *("seconds_rollout", "seconds_teacher", "seconds_advantages", "seconds_train"),
    *("seconds_wait", "seconds_reference", "seconds_data"),
)
"""Of a step; grading lies inside the rollout's."""


def parse(documentation: str | None, name: str) -> argparse.Namespace:
    """The flags of every script; `--quick` is for tests of the machinery."""
    parser = argparse.ArgumentParser(description=(documentation or "").split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--runs", type=Path, default=Path("runs/claims") / name)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--quick", action="store_true", help="two small steps, no verdict's worth")
    return parser.parse_args()


QUICK = (
    *("--train.steps", "2", "--evaluation.every-steps", "1", "--evaluation.prompts", "8"),
    *("--rollout.prompts-per-step", "4", "--rollout.rollouts-per-prompt", "4"),
    *("--optimizer.warmup-steps", "1"),
)


def train_all(
    arms: Sequence[Arm], options: argparse.Namespace, seeds: Sequence[int] = ()
) -> dict[str, list[Run]]:
    """Every arm with every seed; runs by arm, in the order of the seeds."""
    jobs = [(arm, seed) for seed in seeds or options.seeds for arm in arms]
    folders = in_parallel(lambda job: _train(job[0], job[1], options), jobs, options.jobs)
    found: dict[str, list[Run]] = {arm.name: [] for arm in arms}
    for (arm, _), folder in zip(jobs, folders, strict=True):
        found[arm.name].append(read(folder))
    return found


def in_parallel(function: Callable[[Any], Any], jobs: Sequence[Any], at_a_time: int) -> list[Any]:
    """`function` of each job, in order; with several at a time each keeps to cores of its own."""
    if at_a_time == 1 or not hasattr(os, "sched_setaffinity"):
        with ThreadPoolExecutor(at_a_time) as pool:
            return list(pool.map(function, jobs))
    cores, shares = sorted(os.sched_getaffinity(0)), SimpleQueue[list[int]]()
    for place in range(at_a_time):
        shares.put(cores[place::at_a_time] or cores)
    take = lambda: os.sched_setaffinity(0, shares.get())  # noqa: E731  of the thread, inherited
    with ThreadPoolExecutor(at_a_time, initializer=take) as pool:
        return list(pool.map(function, jobs))


def best_rates(
    arms: Sequence[Arm],
    grid: Sequence[str],
    options: argparse.Namespace,
    by: Callable[[Run], float],
) -> tuple[list[Arm], dict[str, dict[str, float]]]:
    """Each arm at the rate of `grid` with the most on `RATE_SEED`; and what each rate gave."""
    tried = [
        Arm(f"{arm.name} {rate}", arm.recipe, (*arm.options, "--optimizer.learning-rate", rate))
        for arm in arms
        for rate in grid
    ]
    found, chosen = train_all(tried, options, [RATE_SEED]), list[Arm]()
    given: dict[str, dict[str, float]] = {}
    for arm in arms:
        given[arm.name] = {rate: by(found[f"{arm.name} {rate}"][0]) for rate in grid}
        rate = max(given[arm.name], key=given[arm.name].__getitem__)
        chosen.append(arm._replace(options=(*arm.options, "--optimizer.learning-rate", rate)))
        print(f"{arm.name}: rate {rate} of {given[arm.name]}", flush=True)
    return chosen, given


def folder_of(arm: Arm, seed: int, options: argparse.Namespace) -> Path:
    """Where a run lies."""
    return options.runs / f"{arm.name.replace(' ', '_')}_{seed}"


def _train(arm: Arm, seed: int, options: argparse.Namespace) -> Path:
    words = ["--seed", str(seed), *arm.options, *(QUICK if options.quick else ())]
    return run_to_end(arm.recipe, folder_of(arm, seed, options), words)


def run_to_end(recipe: str, folder: Path, words: Sequence[str]) -> Path:
    """A training run in a process of its own, unless `folder` holds it; returns `folder`."""
    record, asked = folder.parent / f"{folder.name}.asked.json", [recipe, *words]
    # A finished run of other options must not pass for this one.
    if record.is_file() and json.loads(record.read_text()) != asked:
        raise SystemExit(f"{folder} was asked with other options; remove it, or name other --runs")
    summary = read_summary(folder) if folder.is_dir() else None
    if summary is None or not summary["complete"]:
        folder.parent.mkdir(parents=True, exist_ok=True)
        record.write_text(json.dumps(asked))
        command = [sys.executable, "-m", "sdpo_jax.cli", "train", recipe]
        command += ["--run-dir", str(folder), *words]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{folder}:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    return folder


def read(folder: Path) -> Run:
    """A run's evaluations and steps."""
    rows = read_metrics(folder / "metrics.jsonl")
    of = {kind: [row for row in rows if row["kind"] == kind] for kind in ("eval", "train")}
    summary = read_summary(folder)
    return Run(of["eval"], of["train"], summary["seconds"] if summary else 0.0)


class Interval(NamedTuple):
    """A mean over seeds, with what another set of seeds might give."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3g} [{self.low:.3g}, {self.high:.3g}]"


def interval(values: Sequence[float]) -> Interval:
    """Mean and its 95 % interval by Student's t; of a single value the interval is the value."""
    n, mean = len(values), sum(values) / len(values)
    if n == 1:
        return Interval(mean, mean, mean)
    variance = sum((x - mean) ** 2 for x in values) / (n - 1)
    half = T_95.get(n, T_95[10]) * (variance / n) ** 0.5
    return Interval(mean, mean - half, mean + half)


def paired(first: Sequence[float], second: Sequence[float]) -> Interval:
    """Interval of first - second, seed by seed: the same seed has the same prompts."""
    return interval([a - b for a, b in zip(first, second, strict=True)])


Measure = tuple[str, Callable[[Run], float]]


def tabulate(found: dict[str, list[Run]], measures: Sequence[Measure]) -> dict[str, dict[str, Any]]:
    """Prints a row for each arm; returns values and intervals by arm and measure."""
    return table_of(
        {arm: {n: [of(run) for run in runs] for n, of in measures} for arm, runs in found.items()}
    )


def table_of(values: dict[str, dict[str, list[float]]]) -> dict[str, dict[str, Any]]:
    """The same from the values of each seed, by arm and measure."""
    table: dict[str, dict[str, Any]] = {
        arm: {n: {"values": x, **interval(x)._asdict()} for n, x in measures.items()}
        for arm, measures in values.items()
    }
    print_table(table)
    return table


def print_table(table: dict[str, dict[str, Any]]) -> None:
    """A row for each arm."""
    width = max(map(len, table))
    print(f"{'':<{width}} | " + " | ".join(next(iter(table.values()))))
    for arm, measures in table.items():
        cells = [str(Interval(x["mean"], x["low"], x["high"])) for x in measures.values()]
        print(f"{arm:<{width}} | " + " | ".join(cells), flush=True)


class Verdict(NamedTuple):
    """What came out of one claim."""

    number: int
    """Of the claim, in the README's order."""
    claim: str
    holds: bool
    because: str


def no_worse(number: int, claim: str, *gains: tuple[str, Interval]) -> Verdict:
    """Holds unless a difference lies below 0 with its whole interval."""
    return _all(number, claim, all(gain.high >= 0.0 for _, gain in gains), gains)


def ahead(number: int, claim: str, *gains: tuple[str, Interval]) -> Verdict:
    """Holds where each difference lies above 0 with its whole interval."""
    return _all(number, claim, all(gain.low > 0.0 for _, gain in gains), gains)


def _all(number: int, claim: str, holds: bool, gains: Sequence[tuple[str, Interval]]) -> Verdict:
    return Verdict(number, claim, holds, "; ".join(f"{name} {gain}" for name, gain in gains))


def seconds_of(found: dict[str, list[Run]]) -> float:
    """Of all runs, one after the other."""
    return sum(run.seconds for runs in found.values() for run in runs)


def write(
    name: str,
    options: argparse.Namespace,
    table: dict[str, dict[str, Any]],
    verdicts: Sequence[Verdict],
    seconds: float,
    **more: Any,
) -> None:
    """Prints the verdicts and keeps everything in `NAME.json`.

    `more` may hold what `table.py` shows besides: `rates` of `best_rates`, `pictures`, `tables` by
    title.
    """
    for verdict in verdicts:
        print(f"{'holds' if verdict.holds else 'does not hold'}: {verdict.claim}")
        print(f"  {verdict.because}")
    record = {
        "command": f"python benchmarks/claims/{name}.py",
        "about": (sys.modules["__main__"].__doc__ or "").strip(),
        "seeds": options.seeds,
        "quick": options.quick,
        "seconds": round(seconds),
        "runs_at_a_time": options.jobs,
        "versions": {"jax": jax.__version__, "python": platform.python_version()},
        "table": table,
        "verdicts": [verdict._asdict() for verdict in verdicts],
        **more,
    }
    options.results.mkdir(parents=True, exist_ok=True)
    (options.results / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")


def pictures(
    wanted: dict[str, Sequence[Arm]], options: argparse.Namespace, metric: str = "accuracy"
) -> list[str]:
    """The curves of some arms over their seeds, as SVG beside the results; returns `wanted`."""
    options.results.mkdir(parents=True, exist_ok=True)
    for name, arms in wanted.items():
        words = [str(options.results / name), "--metric", metric]
        for arm in arms:
            folders = [folder_of(arm, seed, options) for seed in options.seeds]
            words.append(f"{arm.name}={','.join(str(f / 'metrics.jsonl') for f in folders)}")
        draw_curves(words)
    return list(wanted)


def accuracy(run: Run) -> float:
    """Held-out accuracy at the end."""
    return run.final["accuracy"]


def mean_accuracy(run: Run) -> float:
    """Over all evaluations: how early it learns."""
    return sum(row["accuracy"] for row in run.evaluations) / len(run.evaluations)
