r"""Where an answer stands in a response: `<answer>...</answer>`, `\boxed{...}`; all linear in time.

What a reasoning model thinks is not its answer: text up to the last `</think>` does not count.
"""

import re

from sdpo_jax.environments.base import Outcome

_OPEN, _CLOSE, _BOX, _THOUGHT = "<answer>", "</answer>", "\\boxed{", "</think>"
_BRACES = re.compile(r"\\.|[{}]", re.DOTALL)


def without_thinking(response: str) -> str:
    """The response after its thinking."""
    return response.rpartition(_THOUGHT)[2]


def last_tagged(text: str) -> str | None:
    """What the last complete pair of answer tags encloses, stripped; None: there is no pair."""
    end = text.rfind(_CLOSE)
    start = text.rfind(_OPEN, 0, max(end, 0))
    return None if start < 0 else text[start + len(_OPEN) : end].strip()


def last_boxed(text: str) -> str | None:
    r"""What the last `\boxed{...}` encloses, stripped; None: there is none, or it does not end.

    Braces inside are balanced; `\{` and `\}` do not count.
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


def shown(answer: str, limit: int = 48) -> str:
    """The model's own answer for a feedback: one line, cut, encodable."""
    line = " ".join(answer[: 4 * limit].split()).encode(errors="replace").decode()
    return line if len(line) <= limit else f"{line[:limit]}..."


def cut_off(outcome: Outcome, form: str) -> Outcome:
    """The outcome of a response that was cut: an answer that is there counts.

    `form` says what the response has to hold before the limit.
    """
    if outcome.passed:
        return outcome
    feedback = f"The response was cut off at the length limit. Be shorter and end with {form}."
    return outcome._replace(feedback=feedback)
