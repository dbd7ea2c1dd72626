"""Axes, ticks and grid of line charts in SVG, for every picture that this package draws.

A `Frame` is the size of a picture and the margins around its data; it makes the axes and draws the
grid. Colors, lines and legends belong to the pictures: `curves` and `panels`.
"""

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

EDGE = 40
"""Pixels beside the right edge within which a centered number would be cut off."""


class Axis(NamedTuple):
    """A range of values with its ticks, laid over a range of pixels."""

    low: float
    high: float
    ticks: list[float]
    start: float
    stop: float
    is_log: bool = False

    def place(self, value: float) -> float:
        """The pixel of a value."""
        low, high = self.low, self.high
        if self.is_log:
            value, low, high = math.log(value), math.log(low), math.log(high)
        share = (value - low) / (high - low)
        return self.start + share * (self.stop - self.start)


class Frame(NamedTuple):
    """Size of a picture and its margins, in pixels."""

    width: int
    height: int
    left: int
    right: int
    top: int
    bottom: int
    left_gap: int
    """Between the vertical axis and its numbers."""
    tick_drop: int
    """From the horizontal axis down to the baseline of its numbers."""
    label_rise: int
    """From the lower edge up to the baseline of the horizontal axis's label."""

    def horizontal(
        self, low: float, high: float, ticks: Sequence[float], *, is_log: bool = False
    ) -> Axis:
        """The axis along the bottom; ticks beyond `high` would be empty space and are left out."""
        shown = [tick for tick in ticks if tick <= high]
        return Axis(low, high, shown, self.left, self.width - self.right, is_log)

    def vertical(self, ticks: Sequence[float]) -> Axis:
        """The axis on the left, from its first tick to its last."""
        return Axis(ticks[0], ticks[-1], list(ticks), self.height - self.bottom, self.top)

    def grid(self, x: Axis, y: Axis, label: str, *, share: bool) -> list[str]:
        """Grid lines, the numbers of both axes, and the label below.

        Args:
          x: along the bottom.
          y: on the left.
          label: what lies along the bottom.
          share: values are fractions and are shown in percent.
        """
        out: list[str] = []
        digits = max(0, math.ceil(-math.log10(100 * (y.ticks[1] - y.ticks[0])) - 1e-9))
        for tick in y.ticks:
            at, text = f"{y.place(tick):.1f}", f"{tick:g}"
            if share:
                text = f"{100 * tick:.{digits}f} %"
            out.append(f'<path class="grid" d="M{self.left} {at}H{self.width - self.right}"/>')
            out.append(_text(self.left - self.left_gap, at, "end", text, 'dy="4" '))
        for tick in x.ticks:
            text = f"{tick:,.0f}" if x.high > 8 else f"{tick:g}"
            anchor = "end" if x.place(tick) > self.width - EDGE else "middle"
            baseline = self.height - self.bottom + self.tick_drop
            out.append(_text(f"{x.place(tick):.1f}", baseline, anchor, text))
        middle = (self.left + self.width - self.right) / 2
        out.append(_text(f"{middle:g}", self.height - self.label_rise, "middle", escape(label)))
        return out


def _text(x: str | int, y: str | int, anchor: str, text: str, shift: str = "") -> str:
    return f'<text x="{x}" y="{y}" {shift}text-anchor="{anchor}">{text}</text>'


def nice_ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round values that cover low to high, both ends included."""
    raw = (high - low) / count or 1.0
    scale = 10.0 ** math.floor(math.log10(raw))
    step = next(m * scale for m in (1, 2, 2.5, 5, 10) if m * scale >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, max(last, first + 1) + 1)]


def coordinates(places: Sequence[tuple[float, float]]) -> str:
    """Pixels as the `points` of a line or an area."""
    return " ".join(f"{a:.1f},{b:.1f}" for a, b in places)
