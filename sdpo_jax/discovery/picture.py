"""discovery@k of several methods as one SVG with a logarithmic axis, as the paper's figure 19."""

from collections.abc import Sequence

from sdpo_jax.discovery.estimator import CONFIDENCE, Cell, discovery, fine_grid, grouped, reach
from sdpo_jax.reports.curves import FRAME, Curve, Point, picture

NAMES = {
    "sdpo": "SDPO",
    "grpo": "GRPO",
    "best_of_k": "best-of-k",
    "multi_turn_feedback": "turns with feedback",
    "multi_turn_conversation": "turns of conversation",
}
"""The label at the end of each line."""


def draw(cells: Sequence[Cell]) -> str:
    """The SVG: one line for each method, a band for its interval."""
    methods = grouped(cells, lambda cell: cell.method)
    most = max(2, *map(reach, methods.values()))
    curves = [_curve(NAMES[name], group) for name, group in methods.items()]
    x = FRAME.horizontal(1, most, _decades(most), is_log=True)
    y = FRAME.vertical([0.0, 0.2, 0.4, 0.6, 0.8, 1.0])
    questions = len({cell.question for cell in cells})
    counted = "one question" if questions == 1 else f"{questions} questions"
    note = f"{counted}; band: {100 * CONFIDENCE:.0f} % bootstrap over seeds"
    return picture(curves, x, y, "P(discovered)", note, is_share=True)


def _curve(name: str, cells: Sequence[Cell]) -> Curve:
    points = [
        Point(e.k, e.probability, e.low, e.high) for e in discovery(cells, fine_grid(reach(cells)))
    ]
    return Curve(name, points, len({cell.seed for cell in cells}))


def _decades(most: int) -> list[float]:
    """Ticks 1, 10, 100, ... up to `most`; with fewer than four of them also 3, 30, ..."""
    ticks = [float(10**i) for i in range(len(str(most)))]
    if len(ticks) < 4:
        ticks = sorted([*ticks, *(3 * t for t in ticks)])
    return ticks
