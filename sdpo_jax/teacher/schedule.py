"""Decides when a `refreshed` teacher moves, on the host, from the metrics of the steps.

A teacher that follows a little every step feeds the student's artefacts back to it; standing still
between rare moves is what stabilises (CGTR, arXiv 2606.03532; StableSDPO, arXiv 2607.01763). CGTR
published neither thresholds nor windows: the gate here is our reading of "reward improvement and a
safe length tail". Validated against an independent replay of its rules and, at its ends, against
the moving average and the frozen teacher (tests/test_schedule.py, tests/test_switches.py).
"""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, TypeAlias

from sdpo_jax.config import TeacherConfig

Move: TypeAlias = Literal["stay", "refresh", "return"]


class Observed(NamedTuple):
    """The student at one step."""

    reward: float
    length: float  # 95th percentile, in tokens
    truncated: float  # share of answers that were cut off


class RefreshSchedule:
    """Decides once per step; its history is part of a checkpoint."""

    def __init__(self, config: TeacherConfig):
        self._config = config
        self._recent: list[Observed] = []  # the last `refresh_window` steps
        self.since = 0
        """Steps since the teacher last moved."""
        self._here: Observed | None = None  # means when this teacher came
        self._before: Observed | None = None  # of the teacher that may still come back

    def __call__(self, observed: Observed | None, *, moved: bool) -> Move:
        """What the teacher does after a step.

        Args:
            observed: the step; None where nothing could be graded.
            moved: whether the step changed the student. A refresh waits for a step that did.

        Returns:
            `refresh`: towards the student; `return`: the teacher before the last refresh.
        """
        config = self._config
        self.since += 1
        if observed is not None:
            self._recent = [*self._recent, observed][-config.refresh_window :]
        mean = self._mean()
        if self._here is None and mean is not None:
            self._here = mean  # of the initial teacher: the first full window
        if self._is_worse(mean):
            self._here, self._before, self.since = self._before, None, 0
            return "return"
        due = config.refresh != "never" and moved and self.since >= config.refresh_steps
        if not due or (config.refresh == "gated" and not self._gate(mean)):
            return "stay"
        self._before = self._here if config.return_drop > 0 else None
        self._here, self.since = mean, 0
        return "refresh"

    def _mean(self) -> Observed | None:
        if len(self._recent) < self._config.refresh_window:
            return None
        return Observed(*(sum(x) / len(x) for x in zip(*self._recent, strict=True)))

    def _is_worse(self, mean: Observed | None) -> bool:
        """Whether reward fell too far; judged on steps with the present teacher alone."""
        if mean is None or self._here is None or self._before is None:
            return False
        settled = self.since >= self._config.refresh_window
        return settled and mean.reward < self._here.reward - self._config.return_drop

    def _gate(self, mean: Observed | None) -> bool:
        if mean is None or self._here is None:
            return False
        return (
            mean.reward > self._here.reward + self._config.refresh_gain
            and mean.length <= (1.0 + self._config.refresh_length) * self._here.length
            and mean.truncated <= self._here.truncated
        )

    def get_state(self) -> dict[str, Any]:
        """The history, JSON-serialisable."""
        return {
            "recent": [list(x) for x in self._recent],
            "since": self.since,
            "here": self._here and list(self._here),
            "before": self._before and list(self._before),
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Restores a saved history."""
        self._recent = [Observed(*x) for x in state["recent"]]
        self.since = state["since"]
        self._here = state["here"] and Observed(*state["here"])
        self._before = state["before"] and Observed(*state["before"])
