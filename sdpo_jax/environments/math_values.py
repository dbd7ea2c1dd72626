"""Values of formulas: which may be computed, and whether two of them are equal.

math-verify's parser reads a formula as a tree, whole or not at all. Its comparison is not used: it
finds two numbers equal that differ by less than 1e-15, takes a number out of what it cannot read,
and simplifies formulas, which may never end. Here nothing simplifies a tree. Its value is computed
at a few points: as a fraction as long as it is one, else by mpmath at two precisions.
"""

import math
import random
import re
from collections.abc import Callable
from fractions import Fraction
from itertools import accumulate
from typing import Any

from sdpo_jax.environments.math_spelling import FUNCTIONS, LETTERS, MAX_CHARACTERS, spelled

MAX_DIGITS, MAX_DEPTH = 60, 20
MAX_BITS = 100_000
"""Bound on the exponent of two of a power; a factorial may have a tenth of it as its operand."""
_POINTS = 5
"""Points at which formulas with variables are compared: two positive, one negative, two mixed."""
_CONSTANT_DIGITS, _POINT_DIGITS = (60, 400), (30, 100)
"""Two precisions at which values without or with variables are computed."""

_COMMAND_NAMES = (
    "frac sqrt times cdot div pi infty cup cap leq geq neq emptyset mathbb begin end alpha beta "
    "gamma delta epsilon varepsilon zeta eta theta kappa lambda mu nu xi rho sigma tau phi varphi "
    "chi psi omega Gamma Delta Theta Lambda Sigma Phi Psi Omega lfloor rfloor lceil rceil mathit"
)
_COMMANDS = FUNCTIONS.union(_COMMAND_NAMES.split())
"""Commands that the parser reads by their meaning."""
_READABLE = re.compile(r"(?:[A-Za-z0-9\s+\-*/^_=<>!|()\[\]{},.&]|\\[A-Za-z]+|\\[{}\\])*")
# What the parser reads otherwise than it is meant: `413_5`, `f^{-1}(x)`, `A^T`, `5!!`, dates.
_MISREAD = re.compile(
    r"(?:\d[A-F]*|\)) ?_|(?<![\\A-Za-z])[A-Za-z]\^\{-1\} ?\(|\^ ?\{?T|! ?!|-0\d|\d \d|\| ?_"
)
_BINOMIAL = re.compile(r"\\binom ?\{([^{}]*)\} ?\{([^{}]*)\}")
_PERCENT = re.compile(r"([\d.]*(?:\d|\\frac\{\d+\}\{\d+\}))\\%")
_PRODUCT = re.compile(r"[b-df-hj-np-tv-z ]+")
_UNBOUNDED = re.compile(r"\\(?:sum|prod|i*int|oint|lim|choose)(?![A-Za-z])")
_EULER = r"\mathit{e}"

_SAME_NAMES = "sin cos tan cot sec csc sinh cosh tanh asin acos atan exp floor log"
_VALUES = {name: name for name in _SAME_NAMES.split()} | {"Abs": "fabs", "ceiling": "ceil"}
"""Functions of sympy, and their names in mpmath."""


class TooLarge(Exception):
    """A power or factorial is too large to evaluate."""


def why_unread(answer: str) -> str | None:
    """The reason why an answer must not reach the parser; None if it may. Reads its spelling."""
    if len(answer) > MAX_CHARACTERS:
        return f"it is longer than {MAX_CHARACTERS} characters"
    text = spelled(answer)
    if any(len(number) > MAX_DIGITS for number in re.findall(r"\d+", text)):
        return f"it holds a number of more than {MAX_DIGITS} digits"
    if max(accumulate(((c in "([{") - (c in ")]}") for c in text), initial=0)) > MAX_DEPTH:
        return f"it is nested deeper than {MAX_DEPTH} levels"
    if _UNBOUNDED.search(text):
        return "it is not evaluated (a sum, product, integral or limit)"
    return None


def unknown_command(math: str) -> str | None:
    """A command that the parser does not know; None if it knows all of a text."""
    named = re.findall(r"\\([A-Za-z]+)", _BINOMIAL.sub("", math))
    return next((name for name in named if name not in _COMMANDS), None)


def same_formula(a: str, b: str) -> bool:
    """Whether two formulas are read whole and have equal values."""
    if LETTERS.fullmatch(a) and LETTERS.fullmatch(b):  # `No` is not `On`, but `xy` is `yx`.
        a, b = a.replace(" ", ""), b.replace(" ", "")
        return a == b or (bool(_PRODUCT.fullmatch(a + b)) and sorted(a) == sorted(b))
    return bool(_attempted(lambda: _same_value(_tree(a), _tree(b))))


def close(found: str, expected: str, tolerance: float) -> bool:
    """Whether two numbers differ by at most `tolerance` times the second one."""

    def is_close() -> bool:
        import mpmath

        trees = _tree(found), _tree(expected)
        with mpmath.workdps(_CONSTANT_DIGITS[1]):
            number, true = (_value(tree, 0) for tree in trees)
            is_constant = not any(tree.free_symbols for tree in trees)
            return is_constant and bool(abs(number - true) <= tolerance * abs(true))

    return bool(_attempted(is_close))


def too_large(text: str) -> bool:
    """Whether a formula holds a power or factorial that is too large to evaluate."""

    def evaluated() -> None:
        _value(_tree(text), 0)

    try:
        _attempted(evaluated, TooLarge)
    except TooLarge:
        return True
    return False


def _attempted(compute: Callable[[], Any], *passed: type[Exception]) -> Any:
    """The result, or None if the text cannot be read or has no value."""
    try:
        return compute()
    except (MemoryError, *passed):
        raise
    except Exception:  # The parser and sympy raise anything on what they cannot read.
        return None


def _tree(text: str) -> Any:
    """The formula as a tree of sympy that nothing has evaluated.

    Raises:
      ValueError: the parser would skip or misread a part of it.
    """
    import sympy
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig, latex2sympy

    read = _PERCENT.sub(r"(\1)/100", _BINOMIAL.sub(r"\\frac{(\1)!}{(\2)!(\1-(\2))!}", text))
    if not _READABLE.fullmatch(read) or _MISREAD.search(read) or unknown_command(read):
        raise ValueError(f"{text!r} cannot be read whole")
    # The parser evaluates powers of `e`, which may never end, but not those of a symbol.
    read = re.sub(r"(\\[A-Za-z]+)|e", lambda match: match[1] or _EULER, read)
    tree: Any = latex2sympy(
        read,
        is_real=True,
        normalization_config=None,
        conversion_config=ConversionConfig(lowercase_symbols=False),
    )
    return tree.doit() if isinstance(tree, sympy.MatrixExpr) else tree


def _same_value(a: Any, b: Any) -> bool:
    import sympy

    if isinstance(a, sympy.MatrixBase) or isinstance(b, sympy.MatrixBase):
        both = isinstance(a, sympy.MatrixBase) and isinstance(b, sympy.MatrixBase)
        return both and a.shape == b.shape and all(map(_same_value, a.flat(), b.flat()))
    if a in (sympy.true, sympy.false, sympy.nan, sympy.zoo):
        return False
    if isinstance(a, sympy.And) and isinstance(b, sympy.And):
        return len(a.args) == len(b.args) and all(map(_same_value, a.args, b.args))
    if isinstance(a, sympy.core.relational.Relational):
        return isinstance(b, sympy.core.relational.Relational) and _same_relation(a, b)
    if not (isinstance(a, sympy.Expr) and isinstance(b, sympy.Expr)) or a.is_infinite:
        return a == b
    points = range(_POINTS if a.free_symbols | b.free_symbols else 1)
    return _agree(
        [((a, point), (b, point)) for point in points], a.has(sympy.Abs) or b.has(sympy.Abs)
    )


def _same_relation(a: Any, b: Any) -> bool:
    """Whether the differences of the sides of two relations are in one constant ratio."""
    import sympy

    first, second = (
        sympy.Add(r.lhs, sympy.Mul(-1, r.rhs, evaluate=False), evaluate=False) for r in (a, b)
    )
    ratio = sympy.Mul(first, sympy.Pow(second, -1, evaluate=False), evaluate=False)
    if not (first.free_symbols and second.free_symbols) or _value(ratio, 0) == 0:
        return False
    if a.func in (sympy.Eq, sympy.Ne):
        is_directed = a.func == b.func
    else:
        is_directed = a.func == (b.func if _value(ratio, 0) > 0 else b.reversed.func)
    return is_directed and _agree([((ratio, n), (ratio, 0)) for n in range(1, _POINTS)])


def _agree(pairs: list[Any], everywhere: bool = False) -> bool:
    r"""Whether the values of two trees agree in all pairs of points in which both are real.

    So `\ln(ab)` is `\ln a + \ln b`. With `everywhere`, as for `\ln|x|` and `\ln x`, a value that is
    real on one side only is a difference. If no pair is real, complex values are compared.
    """
    found = list(filter(None, (_compared(*pair) for pair in pairs)))
    real = [equal for equal, kinds in found if all(kinds)]
    if everywhere and any(len(set(kinds)) > 1 for _, kinds in found):
        return False
    return all(real) if real else bool(found) and all(equal for equal, _ in found)


def _compared(first: Any, second: Any) -> tuple[bool, tuple[bool, bool]] | None:
    """Whether two trees at their points have equal values, and which are real; None without values.

    Rounding decides: a difference that is zero shrinks as the precision grows.
    """
    import mpmath

    constant = not (first[0].free_symbols or second[0].free_symbols)
    coarse, fine = _CONSTANT_DIGITS if constant else _POINT_DIGITS
    sizes, kinds, is_small = list[Any](), (True, True), False
    for digits in (coarse, fine):
        with mpmath.workdps(digits):
            try:
                values = [_value(*first), _value(*second)]
            except (ZeroDivisionError, ValueError):  # A pole.
                return None
            if all(isinstance(value, Fraction) for value in values):
                return values[0] == values[1], kinds
            x, y = map(_rounded, values)
            if not (mpmath.isfinite(x) and mpmath.isfinite(y)):
                return None
            small = mpmath.mpf(10) ** (-digits // 2)
            kinds = tuple(abs(mpmath.im(z)) <= small * abs(z) for z in (x, y))
            sizes.append(abs(x - y))
            # Rounding of `(\sqrt8 - 2\sqrt2) 10^{5000}` shrinks, too, and is far from every answer.
            is_small = sizes[-1] <= max(small, max(abs(x), abs(y)) * mpmath.sqrt(small))
    slack = mpmath.mpf(10) ** (coarse + 15 - fine)
    shrinks = sizes[1] <= slack * (sizes[0] or mpmath.mpf(10) ** -coarse)
    return bool(shrinks and is_small), kinds


def _value(tree: Any, point: int) -> Any:
    """The value of a tree at a point: a `Fraction`, or a number of mpmath.

    Raises:
      TooLarge: a power or factorial is too large.
      ValueError: the tree holds something else than numbers, variables and known functions.
    """
    import mpmath
    from sympy.core.function import AppliedUndef

    name = type(tree).__name__
    if name == "Exp1":  # The parser's own base of `\ln`.
        return +mpmath.e
    if tree.is_Symbol or name in ("ImaginaryUnit", "Pi") or isinstance(tree, AppliedUndef):
        return _coordinate(str(tree), point)
    if tree.is_Rational:
        return Fraction(tree.p, tree.q)
    if tree.is_Float:
        return Fraction(str(tree))
    values = [_value(part, point) for part in tree.args]
    if name in ("Add", "Mul"):
        if not all(isinstance(value, Fraction) for value in values):
            values = [_rounded(value) for value in values]
        return _bounded(sum(values) if name == "Add" else math.prod(values))
    if name == "Pow":
        return _power(*values)
    if name == "UnevaluatedExpr":
        return values[0]
    if name == "factorial":
        return _factorial(values[0])
    if name not in _VALUES:
        raise ValueError(f"{name} has no value")
    numbers = [_rounded(value) for value in values]
    if name in ("exp", "sinh", "cosh", "tanh") and abs(numbers[0]) > MAX_BITS:
        raise TooLarge
    if name == "log":
        return mpmath.log(numbers[0]) / (mpmath.log(numbers[1]) if numbers[1:] else 1)
    return getattr(mpmath, _VALUES[name])(*numbers)


def _bounded(value: Any) -> Any:
    """A sum or product; raises `TooLarge`: many large factors take for ever."""
    parts = (value.numerator, value.denominator) if isinstance(value, Fraction) else ()
    if any(part.bit_length() > 4 * MAX_BITS for part in parts):
        raise TooLarge
    return value


def _rounded(value: Any) -> Any:
    """A value as a number of mpmath, in its precision of the moment."""
    import mpmath

    if isinstance(value, Fraction):
        return mpmath.mpf(value.numerator) / value.denominator
    return mpmath.mpmathify(value)


def _coordinate(name: str, point: int) -> Any:
    """The value of a variable: the same fraction at every call; `e`, `i`, `pi` are numbers."""
    import mpmath

    known = {"math{e}": mpmath.e, "i": mpmath.mpc(0, 1), "pi": mpmath.pi}
    if name in known:
        return +known[name]
    draw = random.Random(f"{point} {name}")
    size, is_negative = Fraction(draw.randint(1, 2999), 1009), draw.random() < 0.5
    return -size if point == 2 or (point > 2 and is_negative) else size


def _power(base: Any, exponent: Any) -> Any:
    """A power; an odd root of a negative number is negative.

    Raises:
      TooLarge: it, or its reciprocal, has more than `MAX_BITS` bits.
    """
    import mpmath

    number, times = _rounded(base), _rounded(exponent)
    if abs(times) * max(1, abs(mpmath.mag(number)) if number else 1) > MAX_BITS:
        raise TooLarge
    if isinstance(exponent, Fraction):
        if exponent.denominator == 1 and isinstance(base, Fraction):
            return base ** int(exponent)
        if exponent.denominator % 2 and mpmath.im(number) == 0 and number < 0:
            return (-1) ** exponent.numerator * mpmath.power(-number, times)
    return mpmath.power(number, times)


def _factorial(value: Any) -> Any:
    import mpmath

    if abs(value) > MAX_BITS // 10:
        raise TooLarge
    if isinstance(value, Fraction) and value.denominator == 1:
        return Fraction(math.factorial(int(value)))
    return mpmath.factorial(_rounded(value))
