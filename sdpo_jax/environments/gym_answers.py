r"""Whether a whole answer to a puzzle of reasoning-gym is right, where its scorer looks at a part.

Scorers of the package (version 0.1.25) give full marks to answers that are not right:

* `gsm_symbolic` takes the first digits of any text: `-20` and `20 or 3` count as 20, and `1,754`
  does not count as 1754; `coin_flip` takes a common beginning: `0` counts as 0.234.
* `complex_arithmetic` and `number_sorting` accept NaN, the latter also numbers that are off by 1.
* `puzzle24` does not check which numbers were given, and rounds; `countdown` reads 1.5 as 1 and 5.
* Others skip what they do not expect: text behind a fraction, rows below a grid, further words.

A number is compared as one number and is right or wrong. Elsewhere an answer needs the form in
`FORMS`, and full marks of the scorer count only if the answer `is_whole`.
"""

import re
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

ROUNDED = frozenset(["coin_flip", "number_format", "power_function"])
"""Generators whose numbers may be rounded as the scorer says, and by at most one per cent."""
FORMS: Mapping[str, str] = {
    "complex_arithmetic": r"[-+\d.\sij()]+",
    "fraction_simplification": r"\$?\s*(\\d?frac\s*{\s*\d+\s*}\s*{\s*\d+\s*}|\d+\s*/\s*\d+)\s*\$?",
    "knights_knaves": r"\w+ is an? \w+((,|,?\s+and)\s+\w+ is an? \w+)*\.?",
    "quantum_lock": r"[ABC]([\s,→>-]*[ABC])*",
    "rush_hour": r"([A-Z][+-]\d+\s*)+",
    "sokoban": r"(?-i:[UDLR\s]+)",
    "time_intervals": r"-?\d+ days?(, \d+:\d\d(:\d\d)?)?|\d+:\d\d(:\d\d(\.\d+)?)?",
    "tower_of_hanoi": r"(Move disk \d+ from Peg \d+ to Peg \d+\s*)+",
}
"""By generator, a pattern for the whole answer, in any case."""
_NUMBER = re.compile(r"[-+]?(\d{1,3}(,\d{3})+|\d+)?(\.\d*)?([eE][-+]?\d{1,3})?", re.ASCII)
_SAME_LETTERS = frozenset(
    [
        *("cryptarithm", "game_of_life", "letter_jumble"),
        *("palindrome_partitioning", "spell_backward", "word_sorting"),
    ]
)
"""Generators whose right answers have the same letters and digits, perhaps in another order."""
_DIGITS: Mapping[str, int | None] = {
    **{"advanced_geometry": None, "kakurasu": None, "polynomial_equations": None},
    **{"number_sorting": 99, "pool_matrix": 2, "survo": 99},
}
"""By generator of a list of numbers, the digits at which each equals the oracle's, or None."""


def as_number(text: Any, *, ratio: bool = False) -> Fraction | None:
    """The number that a whole text is, with or without separators of thousands; None if none."""
    plain = text.strip().replace("\N{MINUS SIGN}", "-") if isinstance(text, str) else "?"
    if not (_NUMBER.fullmatch(plain) or (ratio and re.fullmatch("[0-9]+/[0-9]+", plain))):
        return None
    try:
        return Fraction(plain.replace(",", ""))
    except (ValueError, ZeroDivisionError):
        return None


def is_close(found: Fraction | None, expected: Fraction) -> bool:
    """Whether a rounded number is meant: a tolerance in absolute terms takes 0 for 0.00003."""
    return found is not None and 100 * abs(found - expected) <= abs(expected)


def is_whole(family: str, entry: Mapping[str, Any], given: str) -> bool:
    """Whether a scorer's full marks for an answer are for all of it."""
    oracle, about = entry["answer"], entry["metadata"]
    if family in _SAME_LETTERS:
        return _letters(given) == _letters(oracle)
    if family in _DIGITS:
        return _is_same_list(given, oracle, _DIGITS[family])
    if family in ("countdown", "puzzle24"):
        from sympy import parse_expr

        used = sorted(map(int, re.findall(r"\d+", given)))
        plain = re.fullmatch(r"([-+(\s]*\d+[)\s]*([-+*/](?![*/])|\Z))+", given, re.ASCII)
        exact = plain is not None and used == sorted(about["numbers"])
        return exact and parse_expr(given) == about.get("target", 24)
    return True


def _letters(text: str) -> list[str]:
    return sorted(filter(str.isalnum, text.casefold()))


def _is_same_list(given: str, oracle: str, digits: int | None) -> bool:
    found, expected = (
        [as_number(piece) for piece in re.split(r"[\s,;()\[\]'\"°]+", text) if piece]
        for text in (given, oracle)
    )
    same = digits is None or [round(number or 0, digits) for number in found] == expected
    return same and None not in found and len(found) == len(expected)
