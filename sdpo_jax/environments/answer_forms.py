r"""Finds the final answer in a response: `<answer>...</answer>` or `\boxed{...}`, in linear time.

Text up to the last `</think>` is a model's reasoning and does not count as its answer; a response
whose last `<think>` is never closed has no answer.
"""

import re
from typing import Any

from sdpo_jax.environments.base import Outcome

MAX_DEPTH = 16
"""Levels of nesting that a grader accepts in decoded arguments."""
_OPEN, _CLOSE, _BOX = "<answer>", "</answer>", "\\boxed{"
_BRACES = re.compile(r"\\.|[{}]", re.DOTALL)


def without_thinking(response: str) -> str:
    """The part of a response after its thinking; empty if the thinking is unfinished."""
    answer = response.rpartition("</think>")[2]
    return "" if "<think>" in answer else answer


def last_tagged(text: str) -> str | None:
    """The stripped content of the last complete pair of answer tags; None if there is no pair."""
    end = text.rfind(_CLOSE)
    start = text.rfind(_OPEN, 0, max(end, 0))
    return None if start < 0 else text[start + len(_OPEN) : end].strip()


def last_boxed(text: str) -> str | None:
    r"""The stripped content of the last `\boxed{...}`; None if there is none or it is not closed.

    Nested braces are balanced; `\{` and `\}` do not count.
    """
    start = text.rfind(_BOX)
    if start < 0:
        return None
    start += len(_BOX)
    depth = 1
    for match in _BRACES.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0:
            return text[start : match.start()].strip()
    return None


def is_deeper(value: Any, levels: int = MAX_DEPTH) -> bool:
    """Whether a decoded value is nested deeper than `levels`: comparing it recurses into it."""
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels < 0 or any(is_deeper(item, levels - 1) for item in items)


def shown(answer: str, limit: int = 48) -> str:
    """A model's answer as feedback may quote it: one line, cut to `limit`, encodable as UTF-8."""
    line = " ".join(answer[: 4 * limit].split()).encode(errors="replace").decode()
    return line if len(line) <= limit else f"{line[:limit]}..."


def cut_off(outcome: Outcome, form: str) -> Outcome:
    """The outcome of a response that was cut at the token limit; one that passes still passes.

    `form` describes the form of the answer that the response should have reached.
    """
    if outcome.passed:
        return outcome
    feedback = f"The response was cut off at the length limit. Be shorter and end with {form}."
    return outcome._replace(feedback=feedback)
