r"""Learning curves of several runs as one SVG file, without a plotting library.

    python -m sdpo_jax.reports.curves OUT.svg --metric accuracy \
        SDPO=runs/a/metrics.jsonl,runs/b/metrics.jsonl GRPO=runs/c/metrics.jsonl

Each `NAME=FILES` is one curve: the mean over its files, which are seeds of one recipe, and a band
from the smallest to the largest. The horizontal axis is the number of generations, so that
objectives with different batch sizes compare. A point needs a value of every seed. Colours follow
the reader's light or dark mode.
"""

import math
import sys
from argparse import ArgumentParser
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from sdpo_jax.errors import UserError
from sdpo_jax.evaluation.metric_table import metric_of
from sdpo_jax.reports.plot import Axis, Frame, coordinates, nice_ticks
from sdpo_jax.run.metrics import read_metrics

FRAME = Frame(720, 400, 64, 84, 44, 56, left_gap=10, tick_drop=20, label_rise=12)
LETTER = 8
"""Upper bound of the width of a letter of the legend, in pixels."""
NAME_HEIGHT = 17
"""Least distance between two names of the legend, in pixels."""
COLOURS = (
    ("#0b62c4", "#6cb0ff"),
    ("#c2500a", "#ff9d57"),
    ("#1f7a45", "#5ccb8c"),
    ("#8a3ab0", "#d18cf0"),
    ("#5a6572", "#a9b4c0"),
    ("#a3711f", "#e3bd62"),
)
"""Colour of each curve, on light and on dark ground."""


class Point(NamedTuple):
    """A metric after some generations: mean, smallest and largest over the seeds."""

    generations: int
    mean: float
    low: float
    high: float


class Curve(NamedTuple):
    """A named line with its band."""

    name: str
    points: list[Point]
    seeds: int


def evaluations(rows: Sequence[Mapping[str, Any]], metric: str) -> dict[int, float]:
    """Value of the metric by generations, from the evaluation rows of one run.

    An evaluation after step k is at the generations of the train row of step k, the evaluation
    before training at 0.
    """
    generations = {row["step"]: row["generations"] for row in rows if "generations" in row}
    generations[0] = 0
    return {
        generations[row["step"]]: row[metric]
        for row in rows
        if row.get("kind") == "eval" and row["step"] in generations and row.get(metric) is not None
    }


def merge(name: str, runs: Sequence[Mapping[int, float]]) -> Curve:
    """The curve of several seeds, at the generations that all seeds have."""
    shared = set(runs[0]).intersection(*runs[1:])
    points: list[Point] = []
    for generations in sorted(shared):
        values = [run[generations] for run in runs]
        points.append(Point(generations, sum(values) / len(values), min(values), max(values)))
    return Curve(name, points, len(runs))


def read_curve(name: str, files: Sequence[str], metric: str) -> Curve:
    """Reads the metrics files of one name.

    Raises:
      UserError: a file is missing or has no evaluation with the metric, or the files share none.
    """
    runs: list[dict[int, float]] = []
    for file in files:
        if not Path(file).is_file():
            raise UserError(f"{name}: no such file {file}; expected the metrics.jsonl of a run")
        rows = read_metrics(file)
        runs.append(evaluations(rows, metric))
        if not runs[-1]:
            known = {key for row in rows if row.get("kind") == "eval" for key in row}
            raise UserError(
                f"{file}: expected evaluations with {metric!r}, found "
                f"{', '.join(sorted(known)) or 'no evaluation'}"
            )
    curve = merge(name, runs)
    if not curve.points:
        raise UserError(
            f"{name}: the files have no evaluation at equal generations; "
            "expected seeds of one recipe"
        )
    return curve


def axes_for(curves: Sequence[Curve]) -> tuple[Axis, Axis]:
    """The axes that hold every curve; the vertical one starts at 0 unless values are negative."""
    points = [point for curve in curves for point in curve.points]
    most = max(max(p.generations for p in points), 1)
    low, high = min(0.0, *(p.low for p in points)), max(p.high for p in points)
    x = FRAME.horizontal(0, most, nice_ticks(0, most, 6))
    return x, FRAME.vertical(nice_ticks(low, high, 5))


def draw(curves: Sequence[Curve], metric: str, *, across: str = "generations") -> str:
    """The SVG; `across` is the label of the horizontal axis, if it is not generations."""
    if len(curves) > len(COLOURS):
        raise UserError(f"{len(curves)} curves; expected at most {len(COLOURS)} in one picture")
    x, y = axes_for(curves)
    shown = metric_of(metric)
    is_share = shown.is_share and y.high <= 1.0
    seeds = sorted({curve.seeds for curve in curves})
    count = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    note = f"mean of {count} seeds; band: smallest to largest" if seeds[-1] > 1 else ""
    return picture(curves, x, y, shown.label, note, is_share=is_share, across=across)


def picture(
    curves: Sequence[Curve],
    x: Axis,
    y: Axis,
    label: str,
    note: str,
    *,
    is_share: bool,
    across: str = "generations",
) -> str:
    """The SVG of curves on given axes, with a label on the left and a note on the right."""
    title = f"{label} of {', '.join(curve.name for curve in curves)} against {across}"
    # A long name stands beside its line, not beyond the picture's edge.
    longest = max(len(curve.name) for curve in curves)
    width = FRAME.width + max(0, LETTER * longest + 14 - FRAME.right)
    end = FRAME.width - FRAME.right
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {FRAME.height}" role="img">',
        f"<title>{escape(title)}</title>",
        _style(len(curves)),
        f'<rect class="ground" width="{width}" height="{FRAME.height}" rx="8"/>',
        f'<text class="label" x="{FRAME.left}" y="26">{escape(label)}</text>',
        *FRAME.grid(x, y, across, share=is_share),
        *(_band(i, curve, x, y) for i, curve in enumerate(curves) if curve.seeds > 1),
        *(_line(i, curve, x, y) for i, curve in enumerate(curves)),
        *_names(curves, x, y),
        *([f'<text x="{end}" y="26" text-anchor="end">{note}</text>'] if note else []),
        "</svg>",
    ]
    return "\n".join([*lines, ""])


def _style(count: int) -> str:
    def rules(mode: int, ground: str, text: str, soft: str) -> str:
        own = [
            f".line{i}{{stroke:{c[mode]}}}.band{i},.name{i}{{fill:{c[mode]}}}"
            for i, c in enumerate(COLOURS[:count])
        ]
        basic = f".ground{{fill:{ground}}}text{{fill:{text}}}.grid{{stroke:{soft}}}"
        return basic + "".join(own)

    fixed = (
        "text{font:13px system-ui,-apple-system,'Segoe UI',Helvetica,Arial,sans-serif}"
        ".label{font-weight:600}.name{font-weight:600}.grid{stroke-width:1}"
        ".line{fill:none;stroke-width:2.5;stroke-linejoin:round;stroke-linecap:round}.band{opacity:.18}"
    )
    light = rules(0, "#ffffff", "#30363d", "#e3e6ea")
    dark = rules(1, "#0f1419", "#d6dbe0", "#2b323a")
    return f"<style>{fixed}{light}@media(prefers-color-scheme:dark){{{dark}}}</style>"


def _line(index: int, curve: Curve, x: Axis, y: Axis) -> str:
    places = [(x.place(p.generations), y.place(p.mean)) for p in curve.points]
    return f'<polyline class="line line{index}" points="{coordinates(places)}"/>'


def _band(index: int, curve: Curve, x: Axis, y: Axis) -> str:
    there = [(x.place(p.generations), y.place(p.high)) for p in curve.points]
    back = [(x.place(p.generations), y.place(p.low)) for p in reversed(curve.points)]
    return f'<polygon class="band band{index}" points="{coordinates(there + back)}"/>'


def _names(curves: Sequence[Curve], x: Axis, y: Axis) -> list[str]:
    """The legend: each name at the end of its line, moved apart where lines end together."""
    out: list[str] = []
    order = sorted(enumerate(curves), key=lambda numbered: -numbered[1].points[-1].mean)
    lowest = -math.inf
    for below, (index, curve) in zip(reversed(range(len(order))), order, strict=True):
        # Below the axis a name would cover its numbers, so the names above it move up instead.
        at = min(y.place(curve.points[-1].mean) + 4, y.place(y.low) - NAME_HEIGHT * below)
        at = lowest = max(at, lowest + NAME_HEIGHT)
        left = x.place(curve.points[-1].generations) + 9
        place = f'x="{left:.1f}" y="{at:.1f}"'
        out.append(f'<text class="name name{index}" {place}>{escape(curve.name)}</text>')
    return out


def main(argv: Sequence[str]) -> None:
    """Parses the command line and writes the picture.

    Raises:
      UserError: a file does not fit.
    """
    parser = ArgumentParser(prog="python -m sdpo_jax.reports.curves")
    parser.add_argument("out", metavar="OUT.svg", type=Path)
    parser.add_argument("--metric", default="accuracy")
    parser.add_argument("curves", metavar="NAME=FILE[,FILE...]", nargs="+")
    arguments = parser.parse_args(argv)
    out, metric = arguments.out, arguments.metric
    if out.suffix != ".svg" or not all("=" in text for text in arguments.curves):
        parser.error("expected a file with .svg, then NAME=FILE[,FILE...] ...")
    pairs = [text.split("=", 1) for text in arguments.curves]
    curves = [read_curve(name, files.split(","), metric) for name, files in pairs]
    out.write_text(draw(curves, metric), encoding="utf-8")
    print(f"wrote {out}: {', '.join(f'{c.name} ({c.seeds} run(s))' for c in curves)}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"curves: {error}", file=sys.stderr)
        sys.exit(2)
