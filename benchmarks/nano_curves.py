"""SDPO and GRPO on the embedded model: seeds, a table, and a picture.

    python benchmarks/nano_curves.py --seeds 1 2 3 4 5 --svg docs/nano_curves.svg
    python benchmarks/nano_curves.py --seeds 100 --rates 1e-4 3e-4 1e-3 3e-3      # choose a rate

Every run is its own process and starts from the same embedded weights; runs that are finished in
`--runs` are read, not repeated. All values are of the held-out prompts at temperature 1.
"""

import argparse
import itertools
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from sdpo_jax.reports import curves
from sdpo_jax.run.metrics import read_metrics

RECIPES = {"SDPO": "configs/nano.toml", "GRPO": "configs/nano_grpo.toml"}


def train(recipe: str, folder: Path, seed: int, rate: float | None, extra: list[str]) -> None:
    """One run, in a process of its own."""
    words = [sys.executable, "-m", "sdpo_jax.cli", "train", recipe, "--run-dir", str(folder)]
    words += ["--seed", str(seed), *extra]
    if rate is not None:
        words += ["--optimizer.learning-rate", str(rate)]
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)


def measure(folder: Path) -> dict[str, Any]:
    """What the table shows of a run."""
    rows = read_metrics(folder / "metrics.jsonl")
    evaluations = [row for row in rows if row["kind"] == "eval"]
    steps = [row for row in rows if row["kind"] == "train"]
    halfway = next((r["step"] for r in evaluations if r["accuracy"] >= 0.5), None)
    per_step = steps[0]["generations"]
    return {
        "start": evaluations[0]["accuracy"],
        "final": evaluations[-1]["accuracy"],
        "best": max(row["accuracy"] for row in evaluations),
        "mean": sum(row["accuracy"] for row in evaluations) / len(evaluations),
        "to_half": None if halfway is None else halfway * per_step,
        "tokens": evaluations[-1]["response_tokens"],
        "step_seconds": sorted(sum_of_phases(row) for row in steps)[len(steps) // 2],
    }


def sum_of_phases(row: dict[str, Any]) -> float:
    """Seconds of a step, without evaluation and checkpoint."""
    return sum(value for key, value in row.items() if key.startswith("seconds_"))


def show(name: str, rate: float | None, found: list[dict[str, Any]]) -> None:
    """A row of the table: mean, smallest and largest over the seeds."""
    cells = [f"{name:<5} {'recipe' if rate is None else rate!s:>7}"]
    for key in ("start", "final", "best", "mean"):
        values = [run[key] for run in found]
        mean = sum(values) / len(values)
        cells.append(f"{mean:7.1%} ({min(values):.1%} to {max(values):.1%})")
    half = [run["to_half"] for run in found]
    cells.append(f"{'never' if None in half else f'{sum(half) / len(half):.0f}':>8}")
    cells.append(f"{sum(run['tokens'] for run in found) / len(found):6.1f}")
    cells.append(f"{sorted(run['step_seconds'] for run in found)[len(found) // 2]:6.2f}")
    print(" | ".join(cells), flush=True)


def main() -> None:
    """Runs what is missing, prints the table, draws the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--rates", type=float, nargs="+", help="default: the recipe's")
    parser.add_argument("--only", choices=list(RECIPES), help="one objective")
    parser.add_argument("--runs", type=Path, default=Path("runs/nano_curves"))
    parser.add_argument("--svg", type=Path)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument(
        "--extra", nargs=argparse.REMAINDER, default=[], help="options of sdpo train"
    )
    options = parser.parse_args()
    rates: list[float | None] = options.rates or [None]
    names = [options.only] if options.only else list(RECIPES)

    def folder(name: str, rate: float | None, seed: int) -> Path:
        return options.runs / f"{name.lower()}_{rate or 'recipe'}_{seed}"

    jobs = list(itertools.product(names, rates, options.seeds))
    with ThreadPoolExecutor(options.jobs) as pool:
        list(
            pool.map(
                lambda job: train(RECIPES[job[0]], folder(*job), job[2], job[1], options.extra),
                jobs,
            )
        )
    print("objective, rate | start | final | best | mean over evaluations | generations to 50 % ")
    print("  | response tokens | seconds a step (median)")
    for name, rate in itertools.product(names, rates):
        show(name, rate, [measure(folder(name, rate, seed)) for seed in options.seeds])
    if options.svg:
        words: list[str] = []
        for name in names:
            folders = [folder(name, rates[0], seed) for seed in options.seeds]
            words.append(f"{name}=" + ",".join(str(f / "metrics.jsonl") for f in folders))
        curves.main([str(options.svg), "--metric", "accuracy", *words])


if __name__ == "__main__":
    main()
