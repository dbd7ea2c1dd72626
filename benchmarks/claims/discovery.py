"""One hard question before any reward: SDPO, best-of-k, and asking in turns.

    python benchmarks/claims/discovery.py

The six questions are the hardest of 24,000 requests, measured by the start model's probability of
the accepted call; four more that settings were chosen on are left out (docs/experiments.md). SDPO
and asking in turns stop at the first success or at 512 generations; best-of-k draws ten times as
many. discovery@k is the probability that the first success is among the first k generations. Its
intervals are 90 % of a bootstrap over seeds, as in the paper. The verdicts compare the curves
themselves, without an interval.
"""

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from runs import Verdict, parse, print_table, write

NAME = "discovery"
RECIPE = "configs/nano_discover.toml"
QUESTIONS = [f"table-train-{n}" for n in (21576, 14193, 1642, 14252, 994, 7706)]
METHODS = {"sdpo": "SDPO", "best_of_k": "best-of-k", "multi_turn_feedback": "asking in turns"}
BUDGET, TIMES = 512, 10
AT = (16, 128, 512)


def discover(options: argparse.Namespace) -> Path:
    """Runs what is missing; returns the folder."""
    folder, budget = options.runs / "cells", 32 if options.quick else BUDGET
    questions = QUESTIONS[:1] if options.quick else QUESTIONS
    words = [sys.executable, "-m", "sdpo_jax.cli", "discover", RECIPE, "--run-dir", str(folder)]
    words += ["--budget", str(budget), "--samples", str(TIMES * budget), "--method", *METHODS]
    words += ["--question", *questions, "--seeds", *map(str, options.seeds)]
    if len(options.seeds) == 1:  # one number alone would be a count
        words.append(str(options.seeds[0]))
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{folder}:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    return folder


def row(own: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """discovery@k of one method, and how many cells it solved."""
    known = {e["k"]: e for e in own["discovery"]}
    cells = {
        f"discovery@{k}": {"mean": e["probability"], "low": e["low"], "high": e["high"]}
        for k in AT
        if (e := known.get(k))
    }
    solved = own["discovered"] / own["cells"]
    return {**cells, "share of cells solved": {"mean": solved, "low": solved, "high": solved}}


def verdict_over(other: str, gain: Mapping[str, Any] | None) -> Verdict:
    """Claim 4: at most half the generations at the highest probability that both reach."""
    name = METHODS[other]
    claim = f"SDPO needs at most half the attempts of {name}"
    if gain is None:
        return Verdict(4, claim, False, f"SDPO or {name} discovered nothing")
    because = (
        f"{100 * gain['probability']:.0f} % after {gain['ours']} generations of SDPO, "
        f"{gain['theirs']} of {name}"
    )
    return Verdict(4, claim, gain["ratio"] >= 2.0, because)


def main() -> None:
    """Runs the cells, prints the table and the verdicts, copies the picture."""
    options = parse(__doc__, NAME)
    folder = discover(options)
    numbers = json.loads((folder / "discovery.json").read_text())
    table = {METHODS[name]: row(own) for name, own in numbers["methods"].items()}
    print_table(table)
    options.results.mkdir(parents=True, exist_ok=True)
    shutil.copy(folder / "discovery.svg", options.results / f"{NAME}.svg")
    seconds = sum(own["seconds"] for own in numbers["methods"].values())
    questions = {METHODS[name]: own["questions"] for name, own in numbers["methods"].items()}
    more = {"questions": questions, "pictures": [f"{NAME}.svg"]}
    verdicts = [verdict_over(other, gain) for other, gain in numbers["speed_up_over"].items()]
    write(NAME, options, table, verdicts, seconds, **more)


if __name__ == "__main__":
    main()
