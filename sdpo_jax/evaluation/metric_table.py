"""The metrics that people read: label and format of each, for console, summary, report and curves.

A metric is known by its name in `metrics.jsonl`. `accuracy/alarm` is a part of `accuracy` and is
formatted like it. A name that is not in the table is shown as it is, its value with four digits.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple


def duration(seconds: float) -> str:
    """Seconds with the unit that reads best: `85 ms`, `1.20 s`, `3 min 05 s`, `2 h 04 min`."""
    if seconds < 0.9995:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 59.995:
        return f"{seconds:.2f} s"
    if round(seconds) < 3600:
        minutes, rest = divmod(round(seconds), 60)
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min"


def percent(fraction: float) -> str:
    """A fraction as `41.2 %`."""
    return f"{100 * fraction:.1f} %"


def number(value: float) -> str:
    """Four significant digits, without an exponent where people do not expect one."""
    return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"


class Metric(NamedTuple):
    """How a metric is shown."""

    label: str
    show: Callable[[float], str] = number
    column: str = ""
    """Title of its column on the console, where that differs from the label."""
    heading: str = ""
    """The same in the live table, which has to fit 80 characters; by default one word a line."""
    evaluated: bool = False
    """Whether it comes with evaluations; plain step lines leave it out unless the row has it."""
    panel: str = ""
    """Title of its panel in the run report; metrics with the same title share one. Empty: none."""
    dashed: bool = False
    """Whether its line in that panel is dashed."""

    @property
    def is_share(self) -> bool:
        """Whether it is a fraction, shown in percent."""
        return self.show is percent

    @property
    def title(self) -> str:
        """Of the column on the console."""
        return self.column or self.label


_SIGNAL = "Responses with a signal"
_AGREEMENT = "Teacher agrees with the outcome: successes (dashed: failures)"
_ENTROPY = "Entropy, student (dashed: teacher)"

METRICS: dict[str, Metric] = {
    "accuracy": Metric("held-out accuracy", percent, evaluated=True),
    "teacher_accuracy": Metric("teacher accuracy", percent, evaluated=True),
    "success": Metric("success", percent),
    "reward": Metric("reward", "{:.3f}".format, panel="Reward of the batch"),
    "response_tokens": Metric(
        "response tokens", "{:.1f}".format, column="tokens", panel="Response length, tokens"
    ),
    "truncated": Metric("cut off at the limit", percent, panel="Truncated responses"),
    "teacher_signal": Metric("signal", percent, panel=_SIGNAL),
    "advantage_signal": Metric("advantage signal", percent, panel=_SIGNAL),
    "loss": Metric("loss", "{:.4f}".format, panel="Loss"),
    "divergence": Metric("divergence", "{:.4f}".format, heading="diver-\ngence"),
    "jsd": Metric("jsd", panel="Divergence of student and teacher (JSD)"),
    "divergence_p99": Metric("divergence p99", panel="99th percentile of the tokens' divergence"),
    "divergence_top20_tokens": Metric(
        "divergence top20 tokens", percent, panel="Divergence on the 20 tokens with most of it"
    ),
    "same_token": Metric("same token", percent, panel="Top-1 agreement of student and teacher"),
    "gap_agreement/success": Metric("gap agreement, successes", percent, panel=_AGREEMENT),
    "gap_agreement/failure": Metric(
        "gap agreement, failures", percent, panel=_AGREEMENT, dashed=True
    ),
    "student_entropy": Metric("student entropy", panel=_ENTROPY),
    "teacher_entropy": Metric("teacher entropy", panel=_ENTROPY, dashed=True),
    "grad_norm": Metric("grad norm", panel="Gradient norm"),
    "clipped": Metric("clipped", percent, panel="Clipped tokens"),
    "token_accuracy": Metric("token accuracy", percent, panel="Accuracy on demonstrations' tokens"),
    "entropy": Metric("entropy, nats a token", "{:.3f}".format),
    "repetition": Metric("repeated 4-grams", percent),
    "most_common_output": Metric("most common output", percent),
    "same_output": Metric("teacher repeats the attempt", percent),
    "student_teacher_kl": Metric(
        "student to teacher without a context, nats a token", "{:.4f}".format
    ),
    "seconds": Metric("time", duration),
    **{
        f"seconds_{phase}": Metric(f"{phase} time", duration)
        for phase in ("rollout", "grade", "teacher", "train")
    },
}
"""By name, in the order of the report's panels."""

AT_K = ("pass_at_", "maj_at_")
"""Metrics of `k` samples, shares, by the start of their names."""


def metric_of(name: str) -> Metric:
    """How a metric is shown; one without a row in the table by its name."""
    if name in METRICS:
        return METRICS[name]
    whole, _, part = name.partition("/")
    if whole.startswith(AT_K):
        found = Metric(whole.replace("_at_", "@"), percent)
    else:
        found = METRICS.get(whole) or Metric(whole.replace("_", " "))
    return found._replace(label=f"{found.label}, {part.replace('_', ' ')}") if part else found


def text_of(name: str, value: Any) -> str:
    """A metric's value; `-` for a missing one, words as they are."""
    if value is None:
        return "-"
    if isinstance(value, str):
        return value
    plain = float(value)
    return metric_of(name).show(plain) if math.isfinite(plain) else str(plain)
