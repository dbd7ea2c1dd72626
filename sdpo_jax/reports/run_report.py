"""`sdpo report RUN_DIR [RUN_DIR ...]`: one HTML file about one run, or several side by side.

It reads only the files of the runs and needs neither weights nor devices, so that it also works
while a run trains. Curves are drawn against generations and against minutes of training: the sum
of the phases of all steps, compilation included, but not initialisation, evaluation and
checkpoints, as in figure 6 of arXiv 2601.20802.
"""

import os
import statistics
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from sdpo_jax.errors import UserError
from sdpo_jax.evaluation.metric_table import METRICS, duration, text_of
from sdpo_jax.reports.heatmap import HEATMAP
from sdpo_jax.reports.page import page, write_page
from sdpo_jax.reports.panels import Points, Series, panel, rolling_mean
from sdpo_jax.run.metrics import METRICS_FILE, read_metrics
from sdpo_jax.run.run_directory import CONFIG, read_summary

MOST_RUNS = 6
"""As many as there are colours."""
SMOOTHED = 5
"""Steps of a rolling mean, as in the paper's figure 10."""
INSIDE = ("seconds_grade",)
"""Phases that lie inside others."""


class Run(NamedTuple):
    """The files of a run."""

    name: str
    folder: Path
    recipe: str
    train: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    summary: dict[str, Any] | None


def write_report(folders: Sequence[Path], out: Path | None = None) -> None:
    """Writes the page of one run or of several, by default into the first folder.

    Raises:
      UserError: too many runs or one twice, another name than `.html`, or a folder without a run.
    """
    if out and out.suffix != ".html":
        raise UserError(f"--out {out}: expected the name of a file with .html")
    if len(set(folders)) != len(folders) or len(folders) > MOST_RUNS:
        raise UserError(f"expected different runs, at most {MOST_RUNS}")
    runs = [read_run(folder) for folder in folders]
    if out and not out.parent.is_dir():
        raise UserError(f"--out {out}: there is no folder {out.parent}; make it first")
    name = "report.html" if len(runs) == 1 else "comparison.html"
    out = out or runs[0].folder / name
    write_page(out, report_page(runs, out.parent))
    print(f"wrote {out}: {', '.join(run.name for run in runs)}")


def read_run(folder: Path) -> Run:
    """Reads the files of a run, which may still be training.

    Raises:
      UserError: the folder holds no run, or its metrics have no row yet.
    """
    if not (folder / CONFIG).is_file():
        raise UserError(
            f"{folder}: expected the folder of a run, with {CONFIG} in it, and no checkpoint of it "
            "(@); `sdpo train RECIPE` makes one under runs/"
        )
    rows = read_metrics(folder / METRICS_FILE) if (folder / METRICS_FILE).is_file() else []
    if not rows:
        raise UserError(f"{folder}: {METRICS_FILE} has no row yet; wait for the first evaluation")
    by_kind = {kind: [row for row in rows if row.get("kind") == kind] for kind in ("train", "eval")}
    recipe = (folder / CONFIG).read_text(encoding="utf-8")
    return Run(str(folder), folder, recipe, by_kind["train"], by_kind["eval"], read_summary(folder))


def minutes(run: Run) -> dict[int, float]:
    """Minutes of training at the end of each step; 0 at step 0."""
    spent, total = {0: 0.0}, 0.0
    for row in run.train:
        total += sum(value for name, value in row.items() if _is_phase(name)) / 60
        spent[row["step"]] = total
    return spent


def _is_phase(name: str) -> bool:
    return name.startswith("seconds_") and name not in INSIDE


def generations(run: Run) -> dict[int, float]:
    """Generations at the end of each step; 0 at step 0. Empty if the run samples nothing."""
    counted = {row["step"]: float(row["generations"]) for row in run.train if "generations" in row}
    return {0: 0.0, **counted} if counted else {}


def points(rows: Sequence[Mapping[str, Any]], metric: str, at: Mapping[int, float]) -> Points:
    """(at[step], value) of the rows that have the metric."""
    return [
        (at[row["step"]], float(row[metric]))
        for row in rows
        if row.get(metric) is not None and row["step"] in at
    ]


def report_page(runs: Sequence[Run], folder: Path) -> str:
    """The HTML; links are relative to `folder`, the folder of the page."""
    title = "Run report" if len(runs) == 1 else f"Report of {len(runs)} runs"
    names = ", ".join(run.name for run in runs)
    body = [
        f'<header class="top"><div><h1>{title}</h1><p class="soft">{escape(names)}</p></div>',
        '<button id="theme" type="button"></button></header>',
        _overview(runs, folder),
        "<h2>Held-out accuracy</h2>",
        _legend(runs),
        _accuracy_panels(runs),
        "<h2>Training</h2>",
        _training_panels(runs),
        "<h2>Before and after</h2>",
        _before_and_after(runs),
        "<h2>Where a step's time goes</h2>",
        _phases(runs),
        "<h2>Recipes</h2>" if len(runs) > 1 else "<h2>Recipe</h2>",
        _recipes(runs),
    ]
    return page(f"{title}: {names}", "\n".join(body), styles=["report.css"], scripts=[])


def _swatch(kind: str) -> str:
    path = f'<path class="{kind}" d="M1 4H23"/>'
    return f'<svg class="swatch" viewBox="0 0 24 8" aria-hidden="true">{path}</svg>'


def _name(index: int, run: Run) -> str:
    """The name of a run beside the colour of its lines."""
    return f"{_swatch(f'run{index}')} {escape(run.name)}"


def _overview(runs: Sequence[Run], folder: Path) -> str:
    rows: list[str] = []
    for i, run in enumerate(runs):
        settings = tomllib.loads(run.recipe)
        done = max((row["step"] for row in run.train), default=0)
        wanted, objective = settings["train"]["steps"], settings["objective"]["name"]
        task = settings["data"]["source"] if objective == "sft" else settings["environment"]["kind"]
        cells = [
            _name(i, run),
            escape(f"{objective} on {task}"),
            escape(settings["model"]["path"]),
            f"{done} of {wanted}",
            f"{max(generations(run).values(), default=0):,.0f}",
            duration(60 * max(minutes(run).values())),
            "complete" if run.summary else "not complete",
            _heatmap_link(run, folder),
        ]
        rows.append("".join(f"<td>{cell}</td>" for cell in cells))
    heads = ("Run", "Objective", "Model", "Steps", "Generations", "Training", "State", "Tokens")
    return _table(heads, rows)


def _heatmap_link(run: Run, folder: Path) -> str:
    path = run.folder / HEATMAP
    if not path.is_file():
        return f"<code>sdpo heatmap {escape(run.name)}</code>"
    return f'<a href="{escape(quote(os.path.relpath(path, folder)))}">heat-map</a>'


def _table(heads: Sequence[str], rows: Sequence[str]) -> str:
    """A table; heads and rows are markup."""
    head = "".join(f'<th scope="col">{name}</th>' for name in heads)
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="wide">{table}</div>'


def _legend(runs: Sequence[Run]) -> str:
    """The colour of each run's lines."""
    entries = "".join(f"<span>{_name(i, run)}</span>" for i, run in enumerate(runs))
    note = "Minutes of training are those of rollout, teacher and update, compilation included."
    return (
        f'<p class="legend">{entries}<span>{_swatch("dashed")} dashed: the teacher</span></p>'
        f'<p class="soft">{note}</p>'
    )


def _accuracy_panels(runs: Sequence[Run]) -> str:
    figures: list[str] = []
    ends = (("student", "accuracy", False), ("teacher", "teacher_accuracy", True))
    for label, clock in (("generations", generations), ("minutes of training", minutes)):
        series = [
            Series(f"{run.name}, {who}", points(run.evaluations, metric, clock(run)), i, dashed)
            for i, run in enumerate(runs)
            for who, metric, dashed in ends
        ]
        figures.append(panel(f"Accuracy against {label}", series, x_label=label, share=True))
    steps = {"student": ("success", "train", False), "teacher": ("teacher_accuracy", "eval", True)}
    series = [
        Series(f"{run.name}, {who}", _against_steps(run, metric, kind), i, dashed)
        for i, run in enumerate(runs)
        for who, (metric, kind, dashed) in steps.items()
    ]
    title = f"Success on training batches, mean of {SMOOTHED} (dashed: teacher, held out)"
    figures.append(panel(title, series, x_label="steps", share=True))
    return _grid(figures, "no evaluation yet")


def _against_steps(run: Run, metric: str, kind: str) -> Points:
    rows = run.train if kind == "train" else run.evaluations
    found = points(rows, metric, {row["step"]: float(row["step"]) for row in rows})
    return rolling_mean(found, SMOOTHED) if kind == "train" else found


def _training_panels(runs: Sequence[Run]) -> str:
    figures: list[str] = []
    for title in dict.fromkeys(m.panel for m in METRICS.values() if m.panel):
        shown = {name: m for name, m in METRICS.items() if m.panel == title}
        series = [
            Series(f"{run.name}, {m.label}", _against_steps(run, name, "train"), i, m.dashed)
            for i, run in enumerate(runs)
            for name, m in shown.items()
        ]
        share = all(m.is_share for m in shown.values())
        figures.append(panel(title, series, x_label="steps", share=share))
    return f'<p class="soft">Means of {SMOOTHED} steps.</p>' + _grid(figures, "no step yet")


def _grid(figures: Sequence[str], nothing: str) -> str:
    drawn = "\n".join(figure for figure in figures if figure)
    return f'<div class="panels">{drawn}</div>' if drawn else f'<p class="soft">{nothing}</p>'


def _before_and_after(runs: Sequence[Run]) -> str:
    """First and last evaluation of each run."""
    ends = [(run, run.evaluations[i]) for run in runs if run.evaluations for i in (0, -1)]
    if not ends:
        return '<p class="soft">no evaluation yet</p>'
    heads = [f"{escape(run.name)}: step {row['step']}" for run, row in ends]
    rows = [
        f'<th scope="row">{escape(name)}</th>'
        + "".join(f"<td>{_value(name, row.get(name))}</td>" for _, row in ends)
        for name in dict.fromkeys(key for _, row in ends for key in row)
        if name not in ("kind", "step")
    ]
    return _table(["Metric", *heads], rows)


def _value(name: str, value: Any) -> str:
    return escape(text_of(name, value)) if isinstance(value, int | float) else "-"


def _phases(runs: Sequence[Run]) -> str:
    """Median seconds of each phase; a median leaves out the steps that compiled."""
    medians = [_medians(run) for run in runs]
    names = list(dict.fromkeys(name for found in medians for name in found))
    if not names:
        return '<p class="soft">no step yet</p>'
    longest = max(sum(found.values()) for found in medians)
    rows: list[str] = []
    for i, (run, found) in enumerate(zip(runs, medians, strict=True)):
        bars = "".join(
            f'<span class="phase{k % 6}" style="width:{100 * found[n] / longest:.2f}%"></span>'
            for k, n in enumerate(names)
            if n in found
        )
        cells = "".join(f"<td>{duration(found[n]) if n in found else '-'}</td>" for n in names)
        total = duration(sum(found.values()))
        rows.append(
            f'<th scope="row">{_name(i, run)}</th>{cells}<td>{total}</td>'
            f'<td class="bars"><div aria-hidden="true">{bars}</div></td>'
        )
    chips = [
        f'<span class="chip phase{k % 6}"></span>{escape(n.removeprefix("seconds_"))}'
        for k, n in enumerate(names)
    ]
    return _table(["Median of steps", *chips, "together", ""], rows)


def _medians(run: Run) -> dict[str, float]:
    """Of the seconds of each phase."""
    names = dict.fromkeys(name for row in run.train for name in row if _is_phase(name))
    return {n: statistics.median(row[n] for row in run.train if n in row) for n in names}


def _recipes(runs: Sequence[Run]) -> str:
    parts = [_differences(runs)] if len(runs) > 1 else []
    opened = "" if len(runs) > 1 else " open"
    parts += [
        f"<details{opened}><summary>{escape(run.name)}/{CONFIG}</summary>"
        f"<pre>{escape(run.recipe)}</pre></details>"
        for run in runs
    ]
    return "\n".join(parts)


def _differences(runs: Sequence[Run]) -> str:
    flat = [dict(_leaves(tomllib.loads(run.recipe))) for run in runs]
    rows = [
        f'<th scope="row"><code>{escape(key)}</code></th>'
        + "".join(f"<td>{escape(str(f.get(key, '-')))}</td>" for f in flat)
        for key in dict.fromkeys(key for f in flat for key in f)
        if key != "run_dir" and len({repr(f.get(key)) for f in flat}) > 1
    ]
    if not rows:
        return '<p class="soft">The recipes agree but for the folder.</p>'
    return _table(["Setting", *(escape(run.name) for run in runs)], rows)


def _leaves(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
