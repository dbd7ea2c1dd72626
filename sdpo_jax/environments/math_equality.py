r"""Whether two final answers in mathematics are equal; docs/environments.md has the rules.

Both answers are brought to one spelling (`math_spelling.py`), the words beside the numbers are
compared as words, lists, tuples, sets and intervals part by part, and the formulas that remain by
their values (`math_values.py`).
"""

import re
from itertools import accumulate
from typing import NamedTuple

from sdpo_jax.environments.math_spelling import is_unit, plain, readings, same_text
from sdpo_jax.environments.math_values import close, same_formula, why_refused

_RELATION = re.compile(r"\\(?:leq|geq|neq|in)(?![A-Za-z])|[<>=]")
_NAME = re.compile(
    r"(?:\\[A-Za-z]+ ?)?[A-Za-z]+(?:_\{\w+\})?'*(?:\([^()]*\))?|\([a-z](?:, ?[a-z])+\)"
)


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
    if why_refused(given) or why_refused(answer):
        return False
    pairs = [(a, b) for a in readings(given) for b in readings(answer)]
    for (found, spoken), (expected, words) in pairs:
        unnamed = (not words or (missing_units and not spoken)) and all(
            map(is_unit, (*spoken, *words))
        )
        if not (found and expected and (spoken == words or unnamed)):
            continue
        if _same(found, expected) or (tolerance and close(found, expected, tolerance)):
            return True
    return False


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
    interval, other_interval = _interval(a), _interval(b)
    if interval and not _RELATION.search(b):
        return _same(interval, b)
    if "\\in" in a + b and (interval or other_interval):
        sets = [interval or (values or [""])[-1], other_interval or (other_values or [""])[-1]]
        return _same(*sets)
    return bool(_RELATION.search(b)) and same_formula(a, b)


def _named(text: str) -> tuple[str, list[str]]:
    """The name and the values of `x = 1 + 1 = 2`; no values if another relation stands in it."""
    sides = _split(text, r"(?<![<>!])=|\\in(?![A-Za-z])")
    if len(sides) == 1 or any(_RELATION.search(side) for side in sides):
        return "", []
    is_named = _NAME.fullmatch(sides[0]) and sides[0].strip() != "\\pi"
    return (sides[0], sides[1:]) if is_named else ("", sides)


def _interval(text: str) -> str:
    r"""The interval of an inequality for one letter, such as `1 < x \leq 2`; else nothing."""
    sides = re.split(r"(<|>|\\[lg]eq(?![A-Za-z]))", text)
    if len(sides) == 3:
        left = re.fullmatch("[A-Za-z]", sides[0].strip())
        infinite = "\\infty" if ("<" in sides[1] or "leq" in sides[1]) != bool(left) else "-\\infty"
        strict = "<" if sides[1] in "<\\leq" else ">"
        sides = [*sides, strict, infinite] if not left else [infinite, strict, *sides]
    if len(sides) != 5 or not re.fullmatch("[A-Za-z]", sides[2].strip()):
        return ""
    if sides[1] in (">", "\\geq"):
        sides = sides[::-1]
    if not {sides[1], sides[3]} <= {"<", "\\leq"} and not {sides[1], sides[3]} <= {">", "\\geq"}:
        return ""
    opening, closing = "[" if "eq" in sides[1] else "(", "]" if "eq" in sides[3] else ")"
    return f"{opening}{sides[0].strip()}, {sides[4].strip()}{closing}"
