"""One model learns several tasks one after the other: what it learns, and what it keeps.

    PYTHONPATH=models:. python benchmarks/claims/continual.py --seeds 1 2 3 --methods sft sdft
    ... --seeds 100 --tasks alarm,light,money,music,table,weather --steps 60    # one task, no order
    ... --rates sft=1e-3 sdft=1e-3 --svg docs                                   # and the pictures

A task is some families of the environment `tool_calls`; every stage is a run of its own that starts
from the run before it and is evaluated on the held-out requests of all tasks. Methods are recipes
that differ in their objective and its rate; `sft` and `sdft` see the same demonstrations
in the same order. `prior` is the suite of `nano_prior.py`: reading of contexts, before and after.
Runs that are finished in `--runs` are read, not repeated.

The protocol is that of SDFT (arXiv 2601.19897, section 5) with tasks that a CPU learns in a minute.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nano_prior

from sdpo_jax.evaluation.continual import (
    final_mean,
    forgetting,
    learned,
    normalised_table,
    spread,
)
from sdpo_jax.reports.curves import Curve, Point, draw
from sdpo_jax.training.metrics import read_metrics

RECIPES = {
    "sft": "configs/nano_sft.toml",
    "sdft": "configs/nano_sdft.toml",
    "sdpo": "configs/nano.toml",
    "grpo": "configs/nano_grpo.toml",
}
TASKS = ("alarm,music", "table,light", "money,weather")
TRAIN_PROMPTS, EVALUATIONS = 1024, 3
"""Of each task, and in each stage."""


def train_stage(
    options: argparse.Namespace, method: str, seed: int, stage: int, start: str
) -> Path:
    """One run in a process of its own, from the weights of `start`; returns its folder."""
    folder = options.runs / f"{method}_{options.rates.get(method, 'recipe')}_{seed}_{stage}"
    every = [family for task in options.tasks for family in task.split(",")]
    words = [sys.executable, "-m", "sdpo_jax.cli", "train", RECIPES[method]]
    words += ["--run-dir", str(folder), "--seed", str(seed), "--model.path", start]
    words += ["--environment.families", *options.tasks[stage].split(",")]
    words += ["--environment.held-out-families", *every]
    words += ["--environment.train-prompts", str(TRAIN_PROMPTS), "--evaluation.teacher", "false"]
    words += ["--train.steps", str(options.steps)]
    words += ["--evaluation.every-steps", str(max(1, options.steps // EVALUATIONS))]
    if method in options.rates:
        words += ["--optimizer.learning-rate", options.rates[method]]
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
    return folder


def by_task(row: dict[str, Any], tasks: Sequence[str]) -> list[float]:
    """Accuracy on each task: the mean over its families."""
    families = [task.split(",") for task in tasks]
    if sum(map(len, families)) == 1:  # a single family has no parts
        return [row["accuracy"]]
    return [sum(row[f"accuracy/{name}"] for name in names) / len(names) for names in families]


def sequence(options: argparse.Namespace, method: str, seed: int) -> dict[str, Any]:
    """All stages of one method and seed: accuracies, the way there, and the prior suite."""
    start, rows, way = "nano", list[list[float]](), list[list[Any]]()
    for stage in range(len(options.tasks)):
        folder = train_stage(options, method, seed, stage, start)
        found = [r for r in read_metrics(folder / "metrics.jsonl") if r["kind"] == "eval"]
        for row in found[1 if stage else 0 :]:  # a stage starts where the one before ended
            way.append([stage * options.steps + row["step"], by_task(row, options.tasks)])
        rows += [way[0][1]] if stage == 0 else []
        rows.append(way[-1][1])
        start = str(folder)
    return {"accuracies": rows, "way": way, "prior": nano_prior.measure(start)}


def curves_of(found: Sequence[dict[str, Any]], tasks: Sequence[str]) -> list[Curve]:
    """Accuracy on each task over the steps of all stages, over the seeds."""
    curves: list[Curve] = []
    for t, task in enumerate(tasks):
        points: list[Point] = []
        for place, (step, _) in enumerate(found[0]["way"]):
            points.append(Point(step, *spread([run["way"][place][1][t] for run in found])))
        curves.append(Curve(task.replace(",", ", "), points, len(found)))
    return curves


def show(results: dict[str, list[dict[str, Any]]], base: dict[str, float]) -> None:
    """The tables: mean, smallest and largest over the seeds."""
    every = [run for found in results.values() for run in found]
    tasks = range(len(every[0]["accuracies"][0]))
    best = [max(row[t] for run in every for row in run["accuracies"]) for t in tasks]
    print("method | learned | at the end | forgetting | at the end, each task from 0 to 1")
    for method, found in results.items():
        tables = [run["accuracies"] for run in found]
        cells = [_cell([f(table) for table in tables]) for f in (learned, final_mean, forgetting)]
        ends = [normalised_table(table, best)[-1] for table in tables]
        cells += [f"{spread([end[t] for end in ends]).mean:.2f}" for t in tasks]
        print(" | ".join([method, *cells]))
    print("prior  | " + " | ".join(base))
    print(" | ".join(["before", *(f"{value:.3f}" for value in base.values())]))
    for method, found in results.items():
        cells = [_cell([run["prior"][name] for run in found], "{:.3f}") for name in base]
        print(" | ".join([method, *cells]))


def _cell(values: Sequence[float], form: str = "{:.1%}") -> str:
    mean, low, high = (form.format(x) for x in spread(values))
    return f"{mean} ({low} to {high})"


def main() -> None:
    """Trains what is missing, prints the tables, writes results and pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--methods", nargs="+", choices=list(RECIPES), default=["sft", "sdft"])
    parser.add_argument("--steps", type=int, default=40, help="of each stage")
    parser.add_argument("--tasks", nargs="+", default=TASKS, help="families of each task: a,b c,d")
    parser.add_argument("--rates", nargs="+", default=[], help="METHOD=RATE, else the recipe's")
    parser.add_argument("--runs", type=Path, default=Path("runs/continual"))
    parser.add_argument("--svg", type=Path, help="folder for one picture per method")
    options = parser.parse_args()
    options.rates = dict(pair.split("=") for pair in options.rates)
    results = {
        method: [sequence(options, method, seed) for seed in options.seeds]
        for method in options.methods
    }
    base = nano_prior.measure("nano")
    settings = {key: str(value) for key, value in vars(options).items()}
    report = {"settings": settings, "prior": base, "methods": results}
    (options.runs / "results.json").write_text(json.dumps(report, indent=1) + "\n")
    show(results, base)
    if options.svg:
        for method, found in results.items():
            picture = draw(curves_of(found, options.tasks), "accuracy", across="steps")
            (options.svg / f"continual_{method}.svg").write_text(picture, encoding="utf-8")


if __name__ == "__main__":
    main()
