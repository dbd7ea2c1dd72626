"""Token heat-map of a batch as one HTML file, from the rows of `sdpo_jax.reports.token_batch`.

Red where the teacher finds the sampled token less likely than the student does, blue where more:
log q / p, figures 4, 9, 21 and 22 of arXiv 2601.20802, beside the advantage that GRPO gives to the
same tokens. The scale is asymmetric and clipped, as in figure 21, and can be changed on the page.

The page holds less than the rows: numbers are rounded (log-probabilities to 0.001, probabilities to
0.0001), candidates that neither finds likelier than 0.0005 are left out, and so is what a response
says after `max_tokens` tokens.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sdpo_jax.reports.page import asset, page

HEATMAP = "heatmap.html"
FAINT = 5e-4
"""Candidates below this probability, of student and of teacher, are not on the page."""

SIGNAL = 0.25
"""|log q / p| that counts as one, for the ends of the scale."""


class _Table:
    """Values by number, each once."""

    def __init__(self) -> None:
        self.values: list[Any] = []
        self._known: dict[str, int] = {}

    def __call__(self, value: Any) -> int | None:
        if value is None:
            return None
        number = self._known.setdefault(repr(value), len(self.values))
        if number == len(self.values):
            self.values.append(value)
        return number


def heatmap_page(rows: Sequence[Mapping[str, Any]], *, max_tokens: int = 512) -> str:
    """The HTML of a batch.

    Args:
      rows: the batch, then the responses.
      max_tokens: of each response that are on the page.
    """
    batch, *responses = rows
    texts, long = _Table(), _Table()
    stop_ids = set(batch["stop_ids"])

    def text(token: Mapping[str, Any]) -> int | None:
        if token["text"]:
            return texts(token["text"])
        # In a list: what a model writes can never look like one of these.
        return texts(["end" if token["id"] in stop_ids else str(token["id"])])

    data = {
        "meta": {name: batch[name] for name in batch if name != "kind"},
        "scale": scale(responses),
        "rows": [_row(row, text, long, max_tokens) for row in responses],
        "texts": texts.values,
        "long": long.values,
    }
    title = f"Token advantages, {batch['run']}"
    return page(
        title,
        asset("heatmap.html"),
        styles=["heatmap.css"],
        scripts=["colours.js", "matrix.js", "heatmap.js"],
        data=data,
    )


def scale(responses: Sequence[Mapping[str, Any]]) -> list[float]:
    """Where red and blue are full: nine tenths of the tokens with a signal are paler; at least 1.

    Most tokens have none (figure 21): a quantile of all would be next to zero.
    """
    values = np.asarray(
        [t["advantage"] for row in responses for t in row["tokens"] if t["advantage"] is not None]
    )

    def end(side: Any) -> float:
        if len(side) == 0:
            return 1.0
        value = max(1.0, float(np.quantile(side, 0.9)))
        digit = 10.0 ** math.floor(math.log10(value))
        return math.ceil(value / digit - 1e-9) * digit

    return [-end(-values[values < -SIGNAL]), end(values[values > SIGNAL])]


def _row(row: Mapping[str, Any], text: Any, long: _Table, max_tokens: int) -> dict[str, Any]:
    """One response, short names: their meaning is in `heatmap.js`."""
    tokens = row["tokens"][:max_tokens]
    shown = row["shown"] or {"demonstration": None, "feedback": None}
    has_teacher = row["shown"] is not None
    return {
        "n": row["row"],
        "id": row["prompt_id"],
        "ask": long([[m["role"], m["content"]] for m in row["prompt"]]),
        "reward": round(row["reward"], 4),
        "verdict": "passed" if row["passed"] else "failed" if row["graded"] else "not graded",
        "said": long(row["feedback"] or None),
        "demo": long(shown["demonstration"]),
        "feed": long(shown["feedback"]),
        "read": long(row["teacher_prompt"]),
        "grpo": round(row["grpo_advantage"], 4),
        "total": len(row["tokens"]),
        "w": [text(token) for token in tokens],
        "p": [round(1000 * token["log_p"]) for token in tokens],
        "q": [round(1000 * token["log_q"]) for token in tokens] if has_teacher else None,
        "c": [_candidates(token, text) for token in tokens],
    }


def _candidates(token: Mapping[str, Any], text: Any) -> list[Any]:
    """Flat: text, then ten-thousandths of the student and, where there is one, of the teacher."""
    flat: list[Any] = []
    for candidate in token["alternatives"]:
        logs = [candidate["log_p"]]
        if candidate["log_q"] is not None:
            logs.append(candidate["log_q"])
        if max(logs) >= math.log(FAINT):
            flat += [text(candidate), *(round(1e4 * math.exp(x)) for x in logs)]
    return flat
