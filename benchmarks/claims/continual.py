"""One model learns three tasks in sequence: what it learns, and what it forgets.

    python benchmarks/claims/continual.py

A task is two families of requests. A stage is a run of 40 steps of 32 demonstrations that starts
from the previous stage and is evaluated on the held-out requests of all tasks. SFT and SDFT see the
same demonstrations in the same order, at the rates of their recipes, which were chosen on all
families at once and a separate seed. "A solution shown" and "feedback shown" measure an ability
that the start model has (`nano_prior.py`): the share of 256 greedy answers that are the wanted call
when the prompt holds a solution, or feedback.

Demonstrations come in two forms: in the model's own hand, and in another hand, which is the same
calls after a line of talk. Text before a call is allowed, and only the call is graded, in every
measure here. When it is shown a demonstration in another hand, the start model writes the call
alone.

The protocol is that of SDFT (arXiv 2601.19897, section 5) with tasks that a CPU learns in a minute.
"""

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import nano_prior
from forgetting import final_mean, forgetting, learned, spread
from runs import (
    Verdict,
    ahead,
    in_parallel,
    no_worse,
    paired,
    parse,
    read,
    run_to_end,
    table_of,
    write,
)

from sdpo_jax.data.tool_call_corpus import TALK
from sdpo_jax.environments.kinds.tool_calls import ToolCalls
from sdpo_jax.reports.curves import Curve, Point, draw

NAME = "continual"
RECIPES = {"SFT": "configs/nano_sft.toml", "SDFT": "configs/nano_sdft.toml"}
HANDS = ("", ", another hand")
METHODS = [f"{recipe}{hand}" for hand in HANDS for recipe in RECIPES]
TASKS = ("alarm,music", "table,light", "money,weather")
TRAIN_PROMPTS, STEPS, EVALUATIONS = 1024, 40, 3
"""Of each task; of each stage."""


class Sequel(NamedTuple):
    """All stages of one method and seed."""

    accuracies: list[list[float]]
    """Before, and after each stage: of each task."""
    way: list[tuple[int, list[float]]]
    """The same at every evaluation, with the steps of all stages so far."""
    end: str
    """Folder of the last stage."""
    seconds: float


def train_stages(method: str, seed: int, options: argparse.Namespace) -> Sequel:
    """One run after the other, each from the weights of the one before."""
    steps = 2 if options.quick else STEPS
    every = [family for task in TASKS for family in task.split(",")]
    start, seconds = "nano", 0.0
    rows, way = list[list[float]](), list[tuple[int, list[float]]]()
    for stage, task in enumerate(TASKS):
        words = ["--seed", str(seed), "--model.path", start]
        words += ["--environment.families", *task.split(",")]
        words += ["--environment.held-out-families", *every]
        words += ["--environment.train-prompts", str(TRAIN_PROMPTS), "--evaluation.no-teacher"]
        words += ["--evaluation.every-steps", str(max(1, steps // EVALUATIONS))]
        words += ["--train.steps", str(steps), "--optimizer.warmup-steps", str(min(5, steps - 1))]
        words += ["--evaluation.prompts", "12"] if options.quick else []
        if method.endswith(HANDS[1]):
            words += ["--environment.allow-preamble", "--rollout.max-response-tokens", "64"]
            words += ["--data.source", str(in_another_hand(stage, options.runs))]
        name = method.replace(",", "").replace(" ", "_")
        recipe = RECIPES[method.removesuffix(HANDS[1])]
        folder = run_to_end(recipe, options.runs / f"{name}_{seed}_{stage}", words)
        run = read(folder)
        # A stage starts where the one before ended.
        for row in run.evaluations[1 if stage else 0 :]:
            way.append((stage * steps + row["step"], by_task(row)))
        rows += [way[0][1]] if stage == 0 else []
        rows.append(way[-1][1])
        start, seconds = str(folder), seconds + run.seconds
    return Sequel(rows, way, start, seconds)


def in_another_hand(stage: int, runs: Path) -> Path:
    """The file with a task's demonstrations, a line of talk before each call."""
    return runs / f"another_hand_{stage}.jsonl"


def write_in_another_hand(stage: int, runs: Path) -> None:
    """The demonstrations that the environment gives, with talk."""
    rng, families = random.Random(stage), TASKS[stage].split(",")
    known = ToolCalls(train_prompts=TRAIN_PROMPTS, held_out_prompts=0, families=families)
    lines: list[str] = []
    for prompt in known.train:
        response = f"{rng.choice(TALK)}\n{known.reference(prompt)}"
        lines.append(json.dumps({"prompt": prompt.messages, "response": response}) + "\n")
    in_another_hand(stage, runs).write_text("".join(lines))


def by_task(row: dict[str, Any]) -> list[float]:
    """Accuracy on each task: the mean over its families."""
    families = [task.split(",") for task in TASKS]
    return [sum(row[f"accuracy/{name}"] for name in names) / len(names) for names in families]


def curves_of(found: Sequence[Sequel]) -> list[Curve]:
    """Accuracy on each task over the steps of all stages, over the seeds."""
    curves: list[Curve] = []
    for t, task in enumerate(TASKS):
        points: list[Point] = []
        for place, (step, _) in enumerate(found[0].way):
            points.append(Point(step, *spread([run.way[place][1][t] for run in found])))
        curves.append(Curve(task.replace(",", ", "), points, len(found)))
    return curves


def row_of(found: Sequence[Sequel]) -> dict[str, list[float]]:
    """The measures of one method, of each seed."""
    tables, prior = [run.accuracies for run in found], [nano_prior.measure(r.end) for r in found]
    return {
        "learned": [*map(learned, tables)],
        "at the end": [*map(final_mean, tables)],
        "forgotten": [*map(forgetting, tables)],
        "a solution shown": [x["solution"] for x in prior],
        "feedback shown": [x["feedback"] for x in prior],
    }


def verdicts_of(rows: dict[str, dict[str, list[float]]]) -> list[Verdict]:
    """Claim 9, for demonstrations in each hand."""
    found: list[Verdict] = []
    for hand in HANDS:
        sft, sdft = (rows[f"{recipe}{hand}"] for recipe in RECIPES)
        keeps = [("forgotten, SFT - SDFT", paired(sft["forgotten"], sdft["forgotten"]))]
        for known in ("a solution shown", "feedback shown"):
            keeps.append((f"{known}, SDFT - SFT", paired(sdft[known], sft[known])))
        learns = ("learned, SDFT - SFT", paired(sdft["learned"], sft["learned"]))
        whose = "another" if hand else "the model's own"
        which = f"from demonstrations in {whose} hand SDFT"
        found.append(no_worse(9, f"{which} learns each task as well as SFT", learns))
        found.append(ahead(9, f"{which} keeps earlier tasks and abilities better", *keeps))
    return found


def main() -> None:
    """Trains, prints the table and the verdicts, draws the pictures."""
    options = parse(__doc__, NAME)
    options.runs.mkdir(parents=True, exist_ok=True)
    for stage in range(len(TASKS)):
        write_in_another_hand(stage, options.runs)
    jobs = [(method, seed) for seed in options.seeds for method in METHODS]
    done = in_parallel(lambda job: train_stages(job[0], job[1], options), jobs, options.jobs)
    found = {
        name: [run for (method, _), run in zip(jobs, done, strict=True) if method == name]
        for name in METHODS
    }
    rows = {name: row_of(runs) for name, runs in found.items()}
    table = table_of(rows)
    options.results.mkdir(parents=True, exist_ok=True)
    drawn: list[str] = []
    for name, runs in found.items():
        drawn.append(f"{NAME}_{name.lower().replace(',', '').replace(' ', '_')}.svg")
        text = draw(curves_of(runs), "accuracy", across="steps")
        (options.results / drawn[-1]).write_text(text, encoding="utf-8")
    seconds = sum(run.seconds for run in done)
    write(NAME, options, table, verdicts_of(rows), seconds, pictures=drawn)


if __name__ == "__main__":
    main()
