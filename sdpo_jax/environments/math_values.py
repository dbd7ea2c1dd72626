"""Values of formulas: which may be computed, and whether two of them are equal.

math-verify's parser reads a formula. Its comparison is not used: it finds two numbers equal that
differ by less than 1e-15, takes a number out of what it cannot read, and simplifies formulas, which
may never end. Here a formula is read whole or not at all, decimals are fractions, and the
difference of two formulas must vanish at points that nobody chose.
"""

import random
import re
from fractions import Fraction
from itertools import accumulate
from typing import Any

from sdpo_jax.environments.math_spelling import (
    FUNCTIONS,
    LETTERS,
    MAX_CHARACTERS,
    spelled,
    split_words,
)

MAX_DIGITS, MAX_DEPTH = 60, 20
MAX_POWER = 10_000
"""Bound on the product of nested exponents; a tenth of it bounds the operand of a factorial."""
_POINTS = 4
"""Points at which formulas with variables are compared."""
_CONSTANT_DIGITS, _POINT_DIGITS = (60, 400), (30, 100)
"""Two precisions at which a difference without or with variables is computed."""

_COMMAND_NAMES = (
    "frac sqrt times cdot div pi infty cup cap pm mp leq geq neq binom in emptyset mathbb begin "
    "end alpha beta gamma delta epsilon varepsilon zeta eta theta kappa lambda mu nu xi rho sigma "
    "tau phi varphi chi psi omega Gamma Delta Theta Lambda Sigma Phi Psi Omega lfloor rfloor lceil "
    "rceil"
)
_COMMANDS = FUNCTIONS.union(_COMMAND_NAMES.split())
"""Commands that the parser reads by their meaning."""
_READABLE = re.compile(r"(?:[A-Za-z0-9\s+\-*/^_=<>!|()\[\]{},.&\u00b0]|\\[A-Za-z]+|\\[{}%\\])*")
# `413_5`, whose base counts, and inverse functions, which the parser takes for reciprocals.
_BASE = re.compile(r"(?:\d[A-F]*|\)) ?_|(?<![\\A-Za-z])[A-Za-z]\^\{-1\} ?\(")
_DIGITS = re.compile(r"\d+")
_EXPONENT = re.compile(r"(?:\^|\*\*)\s*")
_TOKEN = re.compile(r"\\[A-Za-z]+|[-+]?\s*[\d.]+|.", re.DOTALL)
_UNBOUNDED = re.compile(r"\\(?:sum|prod|i*int|oint|lim|choose)(?![A-Za-z])")
_LARGE_BINOMIAL = re.compile(r"\\[dt]?binom\D*\d{4}|\\[dt]?binom[^{]*\{[^{}]*\}\D*\d{4}")


def why_refused(answer: str) -> str | None:
    """The reason why an answer must not reach computer algebra; None if it may."""
    if len(answer) > MAX_CHARACTERS:
        return f"it is longer than {MAX_CHARACTERS} characters"
    text = spelled(answer)
    if any(len(number) > MAX_DIGITS for number in _DIGITS.findall(text)):
        return f"it holds a number of more than {MAX_DIGITS} digits"
    if _depth(text) > MAX_DEPTH:
        return f"it is nested deeper than {MAX_DEPTH} levels"
    if _UNBOUNDED.search(text) or _LARGE_BINOMIAL.search(text):
        return "it is not evaluated (a sum, product, integral, limit or binomial)"
    if _power(text) > MAX_POWER or _largest_factorial(text) > MAX_POWER // 10:
        return "its powers or factorials are too large to evaluate"
    return None


def why_only_text(answer: str) -> str | None:
    """The reason why only the same text equals an answer that is no word; None if its value does.

    Reads its spelling only, so it may be asked for every row of a file.
    """
    if reason := why_refused(answer):
        return reason
    math, _ = split_words(spelled(answer))
    named = [name for name in re.findall(r"\\([A-Za-z]+)", math) if name not in _COMMANDS]
    named = [name for name in named if name not in ("ldots", "angle", "triangle")]
    return f"\\{named[0]} is not read" if named else None


def same_formula(a: str, b: str) -> bool:
    """Whether two formulas are read whole and have equal values."""
    if any(why_refused(text) or not _is_readable(text) for text in (a, b)):
        return False
    if LETTERS.fullmatch(a) and LETTERS.fullmatch(b):  # `No` is not `On`.
        return a.replace(" ", "") == b.replace(" ", "")
    try:
        return _same_value(_value(a), _value(b))
    except MemoryError:
        raise
    except Exception:  # The parser and sympy raise anything on what they cannot read.
        return False


def close(found: str, expected: str, tolerance: float) -> bool:
    """Whether two numbers differ by at most `tolerance` times the second one."""
    if not (_is_readable(found) and _is_readable(expected)):
        return False
    try:
        number, true = (_value(text).evalf(30) for text in (found, expected))
        return bool(abs(number - true) <= tolerance * abs(true))
    except Exception:  # As above; formulas with variables cannot be ordered.
        return False


def _is_readable(text: str) -> bool:
    """Whether the parser reads all of a text: it skips or multiplies what it does not know."""
    named = re.findall(r"\\([A-Za-z]+)", text)
    return (
        bool(_READABLE.fullmatch(text))
        and _COMMANDS.issuperset(named)
        and not re.search(r"\d \d", text)
        and not _BASE.search(text)
    )


def _value(text: str) -> Any:
    """The formula as an object of sympy, with decimals as fractions."""
    import sympy
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig, latex2sympy
    from sympy.core.function import AppliedUndef

    value: Any = latex2sympy(
        text,
        is_real=True,
        convert_degrees=False,
        normalization_config=None,
        conversion_config=ConversionConfig(lowercase_symbols=False),
    )

    def exact(part: Any) -> Any:
        known = {f: sympy.Rational(str(f)) for f in part.atoms(sympy.Float)}
        known |= {f: sympy.Symbol(str(f)) for f in part.atoms(AppliedUndef)}
        known |= {s: sympy.I for s in part.free_symbols if str(s) == "i"}
        return part.xreplace(known).doit()

    return value.applyfunc(exact) if isinstance(value, sympy.MatrixBase) else exact(value)


def _same_value(a: Any, b: Any) -> bool:
    import sympy

    if isinstance(a, sympy.MatrixBase) or isinstance(b, sympy.MatrixBase):
        both = isinstance(a, sympy.MatrixBase) and isinstance(b, sympy.MatrixBase)
        return both and a.shape == b.shape and all(map(_same_value, a.flat(), b.flat()))
    senseless = (sympy.nan, sympy.zoo, sympy.true, sympy.false)
    if a in senseless or b in senseless:
        return False
    if a == b:
        return True
    if isinstance(a, sympy.And) and isinstance(b, sympy.And):
        return len(a.args) == len(b.args) and all(map(_same_value, a.args, b.args))
    if isinstance(a, sympy.core.relational.Relational):
        return isinstance(b, sympy.core.relational.Relational) and _same_relation(a, b)
    if not (isinstance(a, sympy.Expr) and isinstance(b, sympy.Expr)):
        return False
    return _vanishes(sympy.Add(a, sympy.Mul(-1, b)))


def _same_relation(a: Any, b: Any) -> bool:
    """Whether the differences of the sides of two relations are in one constant ratio."""
    import sympy

    flipped = (sympy.Gt, sympy.Ge)
    first, second = (r.rhs - r.lhs if r.func in flipped else r.lhs - r.rhs for r in (a, b))
    kinds = [r.reversed.func if r.func in flipped else r.func for r in (a, b)]
    if kinds[0] != kinds[1] or not (first.free_symbols and second.free_symbols):
        return False
    symbols = sorted(first.free_symbols | second.free_symbols, key=str)
    point = dict(zip(symbols, map(sympy.Rational, _point(symbols, 0)), strict=True))
    ratio = (first / second).xreplace(point)
    is_directed = kinds[0] in (sympy.Eq, sympy.Ne) or bool(ratio.evalf() > 0)
    return is_directed and ratio != 0 and _vanishes(first - ratio * second)


def _point(symbols: list[Any], number: int) -> list[Fraction]:
    """Fractions of both signs for the variables of a formula, the same ones at every call."""
    draw = random.Random(f"{number} {symbols}")
    return [Fraction(draw.randint(-2999, 2999), 1009) for _ in symbols]


def _vanishes(difference: Any) -> bool:
    """Whether a formula is zero at all points at which it has a value, of which there is one.

    Rounding decides: a value that is zero shrinks by as many digits as the precision grows.
    """
    import mpmath
    import sympy

    if difference.is_Rational:
        return difference == 0
    symbols = sorted(difference.free_symbols, key=str)
    compute = sympy.lambdify(symbols, difference, "mpmath", dummify=True)
    coarse, fine = _POINT_DIGITS if symbols else _CONSTANT_DIGITS
    compared = False
    for number in range(_POINTS if symbols else 1):
        sizes = list[Any]()
        for digits in (coarse, fine):
            with mpmath.workdps(digits):
                point = [mpmath.mpf(x.numerator) / x.denominator for x in _point(symbols, number)]
                try:
                    sizes.append(abs(mpmath.mpmathify(compute(*point))))
                except (ZeroDivisionError, ValueError):  # A pole.
                    sizes.append(mpmath.inf)
        if all(map(mpmath.isfinite, sizes)):
            slack = mpmath.mpf(10) ** (coarse + 15 - fine)
            if sizes[1] > slack * (sizes[0] or mpmath.mpf(10) ** -coarse):
                return False
            compared = True
    return compared


def _depth(answer: str) -> int:
    steps = ((character in "([{") - (character in ")]}") for character in answer)
    return max(accumulate(steps, initial=0))


def _power(answer: str) -> int:
    """An upper bound on the product of nested exponents: those of groups, and one plain one.

    An exponent counts as its largest integer. A power or factorial inside an exponent is a tower
    and counts as more than is allowed.
    """
    nested = plain = 1
    for match in _EXPONENT.finditer(answer):
        exponent, end = _argument(answer, match.end())
        raised = re.search(r"\d[\s})]*(?:\^|\*\*|!)", exponent)
        if raised or (_EXPONENT.match(answer, end) and _DIGITS.search(exponent)):
            return MAX_POWER + 1
        size = max([1, *map(int, _DIGITS.findall(exponent))])
        if answer[: match.start()].rstrip()[-1:] in (")", "}", "]"):
            nested *= size
        else:
            plain = max(plain, size)
    return nested * plain


def _argument(answer: str, start: int) -> tuple[str, int]:
    """The group or token that begins at `start`, and the position after it."""
    if answer[start : start + 1] not in ("{", "("):
        token = _TOKEN.match(answer, start)
        return (token[0], token.end()) if token else ("", start)
    depth = 0
    for end in range(start, len(answer)):
        depth += (answer[end] in "({") - (answer[end] in ")}")
        if depth == 0:
            return answer[start : end + 1], end + 1
    return answer[start:], len(answer)


def _largest_factorial(answer: str) -> int:
    """The largest integer before `!`; a factorial of a group with numbers exceeds the bound."""
    largest = 0
    for match in re.finditer(r"(\d+|[A-Za-z]|\([A-Za-z\d\s+-]*\)|)\s*(!+)(?!=)", answer):
        operand, marks = match[1], match[2]
        numbers = [int(number) for number in _DIGITS.findall(operand)]
        bounded = operand and (operand.isdigit() or re.search("[A-Za-z]", operand))
        largest = max([largest, *numbers, 0 if bounded and marks == "!" else MAX_POWER])
    return largest
