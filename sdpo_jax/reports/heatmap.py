"""Token heat-map of a batch as one HTML file, from the rows of `sdpo_jax.reports.token_batch`.

A token is red if it is less likely to the teacher than to the student, and blue if it is more
likely: log q / p, figures 4, 9, 21 and 22 of arXiv 2601.20802, beside the advantage that GRPO gives
the same tokens. The scale is asymmetric and clipped, as in figure 21, and can be changed on the
page.

The page holds less than the rows: log-probabilities are rounded to 0.001 and probabilities to
0.0001; candidates below 0.0005 under both models and tokens after the first `max_tokens` are left
out.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sdpo_jax.reports.page import asset, page

HEATMAP = "heatmap.html"
FAINT = 5e-4
"""Candidates below this probability under student and teacher are not on the page."""

SIGNAL = 0.25
"""Tokens with a larger |log q / p| determine the ends of the scale."""


class _Table:
    """Numbers values, each once, so that the page can refer to them."""

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
      max_tokens: tokens of each response that are on the page.
    """
    batch, *responses = rows
    texts, long = _Table(), _Table()
    stop_ids = set(batch["stop_ids"])

    def text(token: Mapping[str, Any]) -> int | None:
        # A list marks a control token: text that a model writes is never a list.
        control = ["end" if token["id"] in stop_ids else str(token["id"])]
        return texts(token["text"] or control)

    data = {
        "meta": {name: batch[name] for name in batch if name != "kind"},
        "scale": scale(responses),
        "rows": [_row(row, text, long, max_tokens) for row in responses],
        "texts": texts.values,
        "long": long.values,
    }
    return page(
        f"Token advantages, {batch['run']}",
        asset("heatmap.html"),
        styles=["heatmap.css"],
        scripts=["colours.js", "matrix.js", "heatmap.js"],
        data=data,
    )


def scale(responses: Sequence[Mapping[str, Any]]) -> list[float]:
    """Ends of the colour scale: the 0.9 quantile of the tokens with a signal, at least 1.

    Most tokens have no signal (figure 21), so a quantile of all tokens would be almost zero.
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
    """One response under short keys, which `heatmap.js` explains."""
    tokens = row["tokens"][:max_tokens]
    shown = row["shown"] or {}
    return {
        "n": row["row"],
        "id": row["prompt_id"],
        "ask": long([[m["role"], m["content"]] for m in row["prompt"]]),
        "reward": round(row["reward"], 4),
        "verdict": "passed" if row["passed"] else "failed" if row["graded"] else "not graded",
        "said": long(row["feedback"] or None),
        "demo": long(shown.get("demonstration")),
        "feed": long(shown.get("feedback")),
        "read": long(row["teacher_prompt"]),
        "grpo": round(row["grpo_advantage"], 4),
        "total": len(row["tokens"]),
        "w": [text(token) for token in tokens],
        "p": [round(1000 * token["log_p"]) for token in tokens],
        "q": [round(1000 * token["log_q"]) for token in tokens] if shown else None,
        "c": [_candidates(token, text) for token in tokens],
    }


def _candidates(token: Mapping[str, Any], text: Any) -> list[Any]:
    """Flat list: text, then probabilities in 1/10000 of the student and, if any, the teacher."""
    flat: list[Any] = []
    for candidate in token["alternatives"]:
        logs = [x for x in (candidate["log_p"], candidate["log_q"]) if x is not None]
        if max(logs) >= math.log(FAINT):
            flat += [text(candidate), *(round(1e4 * math.exp(x)) for x in logs)]
    return flat
