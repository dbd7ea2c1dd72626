"""Small line charts of a report as inline SVG; colours and dashes come from the page's style.

A long run is thinned to means of neighbouring steps, so that a page stays small; the title of a
smoothed line names the width of the mean.
"""

from collections.abc import Sequence
from html import escape
from statistics import fmean
from typing import NamedTuple

from sdpo_jax.reports.plot import Axis, Frame, coordinates, nice_ticks

FRAME = Frame(420, 240, 56, 14, 12, 34, left_gap=8, tick_drop=16, label_rise=3)
MOST_POINTS = 200

Points = Sequence[tuple[float, float]]


class Series(NamedTuple):
    """One line: the number of its colour, and whether it is dashed."""

    name: str
    points: Points
    colour: int
    dashed: bool = False


def rolling_mean(points: Points, width: int) -> list[tuple[float, float]]:
    """Each y becomes the mean of itself and the `width - 1` before it, fewer at the start."""
    ys = [y for _, y in points]
    return [(x, fmean(ys[max(0, i + 1 - width) : i + 1])) for i, (x, _) in enumerate(points)]


def thinned(points: Points, most: int = MOST_POINTS) -> list[tuple[float, float]]:
    """At most `most` points: means of equally many neighbours, each at its last one's x."""
    size = -(-len(points) // most) or 1
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(group[-1][0], fmean(y for _, y in group)) for group in groups]


def panel(title: str, series: Sequence[Series], *, x_label: str, share: bool = False) -> str:
    """A figure, or empty text if no series has a point.

    Args:
      title: caption of the figure.
      series: lines; those without points are left out.
      x_label: label of the horizontal axis.
      share: values are fractions, shown in per cent from 0 to at most 100.
    """
    drawn = [s._replace(points=thinned(s.points)) for s in series if s.points]
    if not drawn:
        return ""
    x, y = _axes(drawn, share)
    ends = "; ".join(
        f"{s.name} from {_text(s.points[0][1])} to {_text(s.points[-1][1])}" for s in drawn
    )
    label = escape(f"{title}: {ends}")
    lines = [
        f'<figure class="panel"><figcaption>{escape(title)}</figcaption>',
        f'<svg viewBox="0 0 {FRAME.width} {FRAME.height}" role="img" aria-label="{label}">',
        *FRAME.grid(x, y, x_label, share=share),
        *(line for s in drawn for line in _line(s, x, y, share)),
        "</svg></figure>",
    ]
    return "\n".join(lines)


def _axes(series: Sequence[Series], share: bool) -> tuple[Axis, Axis]:
    xs = [x for s in series for x, _ in s.points]
    ys = [y for s in series for _, y in s.points]
    most = max(max(xs), 1e-9)
    low = 0.0 if share or 0.0 <= min(ys) <= 0.5 * max(ys) else min(ys)
    x = FRAME.horizontal(0, most, nice_ticks(0, most, 4))
    return x, FRAME.vertical(nice_ticks(low, max(ys), 4))


def _text(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.3g}"


def _line(series: Series, x: Axis, y: Axis, share: bool) -> list[str]:
    places = [(x.place(a), y.place(b)) for a, b in series.points]
    kind = f"run{series.colour}{' dashed' if series.dashed else ''}"
    out = [f'<polyline class="{kind}" points="{coordinates(places)}"/>']
    for (a, b), (at, value) in zip(places, series.points, strict=True):
        text = f"{100 * value:.1f} %" if share else _text(value)
        hint = escape(f"{series.name}: {text} at {_text(at)}")
        place = f'cx="{a:.1f}" cy="{b:.1f}" r="{3 if len(places) <= 20 else 1.5}"'
        out.append(f'<circle class="{kind}" {place}><title>{hint}</title></circle>')
    return out
