r"""Whether two final answers in mathematics are equal; docs/environments.md has the rules.

Both answers are brought to one spelling (`math_spelling.py`), the words beside the numbers are
compared as words, lists, tuples, sets and intervals part by part, and the formulas that remain by
their values (`math_values.py`).
"""

import re
from itertools import accumulate
from typing import NamedTuple

from sdpo_jax.environments.math_spelling import is_unit, plain, readings, same_text
from sdpo_jax.environments.math_values import (
    close,
    same_formula,
    too_large,
    unknown_command,
    why_unread,
)

_RELATION = re.compile(r"\\(?:leq|geq|neq|in)(?![A-Za-z])|[<>=]")
_NAME = re.compile(
    r"(?:\\[A-Za-z]+ ?)?[A-Za-z]+(?:_\{\w+\})?'*(?:\([^()]*\))?|\([a-z](?:, ?[a-z])+\)"
)
_LETTER = re.compile("[A-Za-z]")
_FLIPPED = {"<": ">", ">": "<", "\\leq": "\\geq", "\\geq": "\\leq"}
# A dollar sign is a unit that may be missing.
_DOLLARS = re.compile(r"\\\$|^\s*\$[^$]*$")
_SUSPICIOUS = re.compile(r"!|binom|exp|sinh|cosh|tanh|(?:\^|\*\*).*(?:\^|\*\*|\d{4})", re.DOTALL)


class _Parts(NamedTuple):
    """A list, tuple, set or interval: its brackets, which may be missing, and its items."""

    opening: str
    items: list[str]
    closing: str


def equal(given: str, answer: str, *, missing_units: bool = False, tolerance: float = 0) -> bool:
    """Whether two answers are equal, or numbers within a relative `tolerance`.

    Symmetric, except that `given` may name a unit of measure where the true answer has no words.
    With `missing_units` the unit may be missing on either side.
    """
    if same_text(given, answer):
        return True
    if why_unread(given) or why_unread(answer):
        return False
    paid, pays = (bool(_DOLLARS.search(text)) for text in (given, answer))
    for found, spoken in readings(given):
        for expected, words in readings(answer):
            spoken, words = spoken or ("dollar",) * paid, words or ("dollar",) * pays
            unnamed = all(map(is_unit, (*spoken, *words))) and (
                not words or ((missing_units or pays) and spoken in ((), ("dollar",) * paid))
            )
            if not (found and expected and (spoken == words or unnamed)):
                continue
            if _same(found, expected) or (tolerance and close(found, expected, tolerance)):
                return True
    return False


def why_refused(answer: str) -> str | None:
    """The reason why an answer is not compared by its value; None if it is.

    Evaluates a formula only if its spelling tells that it may be too large.
    """
    if reason := why_unread(answer):
        return reason
    for text, _ in readings(answer) if _SUSPICIOUS.search(answer) else ():
        if any(map(too_large, _formulas(text))):
            return "its powers or factorials are too large to evaluate"
    return None


def why_only_text(answer: str) -> str | None:
    """The reason why only the same text equals an answer that is no word; else None."""
    if reason := why_refused(answer):
        return reason
    formulas = _formulas(readings(answer)[0][0])
    unknown = next(filter(None, map(unknown_command, formulas)), None)
    known = {"ldots", "angle", "triangle"}
    return None if unknown is None or unknown in known else f"\\{unknown} is not read"


def _formulas(text: str) -> list[str]:
    """The formulas between the brackets, commas and relations of an answer."""
    separator = rf"{_RELATION.pattern}|\\cup(?![A-Za-z])"
    pieces = [piece for item in _parts(text).items for piece in _split(item, separator) if piece]
    return pieces if len(pieces) < 2 else [part for piece in pieces for part in _formulas(piece)]


def _same(a: str, b: str) -> bool:
    """Whether two answers without words are equal, part by part."""
    if plain(a) == plain(b):
        return True
    first, second = _parts(a), _parts(b)
    if len(first.items) == len(second.items) == 1 and not first.opening + second.opening:
        return _same_item(first.items[0], second.items[0])
    if not first.opening and len(first.items) == 1 and _RELATION.search(a):
        return _same_related(a, b)
    if not second.opening and len(second.items) == 1 and _RELATION.search(b):
        return _same_related(b, a)
    if "\\emptyset" in (a.strip(), b.strip()):  # A set that holds it is not empty.
        return False
    brackets = {(part.opening, part.closing) for part in (first, second)}
    if len(first.items) != len(second.items) or not (
        len(brackets) == 1 or brackets in ({("", ""), ("\\{", "\\}")}, {("", ""), ("(", ")")})
    ):
        return False
    if "\\ldots" in a or not brackets <= {("", ""), ("\\{", "\\}")}:
        return all(map(_same, first.items, second.items))
    return _matched(first.items, second.items)


def _matched(items: list[str], others: list[str]) -> bool:
    """Whether each item equals another of the others, in any order."""
    left = list(others)
    for item in items:
        found = next((other for other in left if _same(item, other)), None)
        if found is None:
            return False
        left.remove(found)
    return not left


def _parts(text: str) -> _Parts:
    text = text.strip()
    opening = next((mark for mark in ("\\{", "{", "(", "[") if text.startswith(mark)), "")
    closing = next((mark for mark in ("\\}", "}", ")", "]") if text.endswith(mark)), "")
    if opening and closing:
        depths = list(accumulate((c in "([{") - (c in ")]}") for c in text))
        if 0 not in depths[len(opening) : -1]:
            inner = text[len(opening) : -len(closing)]
            items = _split(inner, r"[,;]")
            if opening == "{" and len(items) > 1:
                opening, closing = "\\{", "\\}"
            if len(items) > 1 or opening == "\\{":
                return _Parts(opening, _both_signs(items) if opening == "\\{" else items, closing)
            if opening + closing in ("()", "{}"):
                return _parts(inner)
    return _Parts("", _both_signs(_split(text, r"[,;]")), "")


def _split(text: str, separator: str) -> list[str]:
    """Splits at a separator that stands outside all brackets."""
    pieces, start, depth = list[str](), 0, 0
    for match in re.finditer(rf"(?P<at>{separator})|[(\[{{]|[)\]}}]", text):
        if match["at"] and depth == 0:
            pieces.append(text[start : match.start()].strip())
            start = match.end()
        depth += (match[0] in "([{") - (match[0] in ")]}")
    return [*pieces, text[start:].strip()]


def _both_signs(items: list[str]) -> list[str]:
    r"""`1 \pm 2` as two items."""
    signs = (("+", "-"), ("-", "+"))
    signed = [[re.sub(r"\\pm", p, re.sub(r"\\mp", m, i)) for p, m in signs] for i in items]
    return [re.sub(r"(^|[=(]) ?\+", r"\1", s) for pair in signed for s in dict.fromkeys(pair)]


def _same_item(a: str, b: str) -> bool:
    """Whether two answers without brackets and commas are equal."""
    if _RELATION.search(a):
        return _same_related(a, b)
    if _RELATION.search(b):
        return _same_related(b, a)
    united, other_united = _split(a, r"\\cup"), _split(b, r"\\cup")
    if len(united) > 1 and len(other_united) > 1:
        return _matched(united, other_united)
    return same_formula(a, b)


def _same_related(a: str, b: str) -> bool:
    r"""Compares an equation, inequality or `x \in S` with any answer.

    `x = 3` is 3, since `x` names it, and `1 + 2 = 3` is 3, since both sides are; `4 = 3` and
    `2x = 3` are not.
    """
    (name, values), (other_name, other_values) = _named(a), _named(b)
    if name and plain(name) == plain(other_name):
        return all(_same(value, other) for value in values for other in other_values)
    if values and not _RELATION.search(b):
        return all(_same(value, b) for value in values)
    return bool(_RELATION.search(b)) and same_formula(a, b)


def _named(text: str) -> tuple[str, list[str]]:
    """The name and the values of `x = 1 + 1 = 2` or `x < 3`; no values for other relations."""
    alternatives = [_interval(piece) for piece in re.split(r"\\text\{ ?or ?\}|\bor\b", text)]
    if len({name for name, _ in alternatives}) == 1 and alternatives[0][0]:
        return alternatives[0][0], [" \\cup ".join(interval for _, interval in alternatives)]
    sides = _split(text, r"(?<![<>!])=|\\in(?![A-Za-z])")
    if len(sides) == 1 or any(_RELATION.search(side) for side in sides):
        return "", []
    is_named = _NAME.fullmatch(sides[0]) and sides[0].strip() != "\\pi"
    return (sides[0], sides[1:]) if is_named else ("", sides)


def _interval(text: str) -> tuple[str, str]:
    r"""The letter and the interval of an inequality such as `1 < x \leq 2`; else nothing."""
    sides = [side.strip() for side in re.split(r"(<|>|\\[lg]eq(?![A-Za-z]))", text)]
    if len(sides) == 3 and _LETTER.fullmatch(sides[0]):
        sides = [*sides[::-1]]
        sides[1] = _FLIPPED[sides[1]]
    if len(sides) == 3:  # `3 < x` is `3 < x < \infty`.
        up = sides[1] in ("<", "\\leq")
        sides += ["<", "\\infty"] if up else [">", "-\\infty"]
    if len(sides) != 5 or not _LETTER.fullmatch(sides[2]):
        return "", ""
    if sides[1] in (">", "\\geq"):
        sides = [_FLIPPED.get(side, side) for side in sides[::-1]]
    if not {sides[1], sides[3]} <= {"<", "\\leq"}:
        return "", ""
    opening, closing = "[" if "eq" in sides[1] else "(", "]" if "eq" in sides[3] else ")"
    return sides[2], f"{opening}{sides[0]}, {sides[4]}{closing}"
