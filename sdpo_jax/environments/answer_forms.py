r"""Finds the final answer in a response: `<answer>...</answer>` or `\boxed{...}`, in linear time.

Text up to the last `</think>`, or after a `<think>` that is never closed, is a model's reasoning
and does not count as its answer.
"""

import re
from typing import Any

from sdpo_jax.environments.base import Outcome

MAX_DEPTH = 16
"""Levels of nesting that a grader accepts in decoded arguments."""
_OPEN, _CLOSE = "<answer>", "</answer>"
_BRACES = re.compile(
    r"\\(?:boxed|fbox)(?![A-Za-z])\s*(\{|\\[A-Za-z]+|-?\d[\d.,]*(?<=\d)|\w)"
    r"|\\\\(?!boxed|fbox)|\\[{}]|[{}]"
)


def without_thinking(response: str) -> str:
    """The part of a response after the last `</think>`, up to a `<think>` that is not closed."""
    return response.rpartition("</think>")[2].partition("<think>")[0]


def last_tagged(text: str) -> str | None:
    """The stripped content of the last complete pair of answer tags; None if there is no pair."""
    end = text.rfind(_CLOSE)
    start = text.rfind(_OPEN, 0, max(end, 0))
    return None if start < 0 else text[start + len(_OPEN) : end].strip()


def last_boxed(text: str) -> str | None:
    r"""The stripped content of the last `\boxed{...}` that is closed; None if there is none.

    `\fbox` is a box too, and so is `\boxed 2`, whose content is one number, letter or command.
    Nested braces are balanced; `\{` and `\}` do not count.
    """
    last = (-1, 0)
    open_braces: list[int | None] = []  # Where the content of a box begins; None: another brace.
    for match in _BRACES.finditer(text):
        if match[0].endswith("{") and not match[0].endswith("\\{"):
            open_braces.append(match.end() if match[1] else None)
        elif match[1]:
            last = max(last, match.span(1))
        elif match[0] == "}" and open_braces and (start := open_braces.pop()) is not None:
            last = max(last, (start, match.start()))
    return text[slice(*last)].strip() if last[0] >= 0 else None


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
