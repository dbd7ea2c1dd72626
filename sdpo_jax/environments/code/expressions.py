"""Evaluates literals, arithmetic and comparisons of a test outside the sandbox, without `eval`.

Test files are untrusted, too: names are looked up in a given mapping, calls in a fixed table of
pure functions, and sizes and exponents are bounded. `==` means `same_value`, and `is` the same
value of the same type. All else is Python's own, since observed values are of exact types.
"""

import ast
import collections
import decimal
import fractions
import math
import operator
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

from sdpo_jax.environments.code.values import same_value

MAX_ITEMS, MAX_BITS, MAX_DEPTH = 100_000, 1 << 17, 100
_SEQUENCES = str | bytes | list | tuple | collections.deque


class EvaluationError(Exception):
    """The expression is not supported here or fails; the message is the reason."""


def _power(base: Any, exponent: Any) -> Any:
    if not isinstance(exponent, int | float) or not isinstance(base, int | float):
        raise EvaluationError("power of what is no number")
    if isinstance(base, int) and abs(exponent) * base.bit_length() > MAX_BITS:
        raise EvaluationError("power too large")
    return base**exponent


def _remainder(left: Any, right: Any) -> Any:
    # `"%1000000d" % 1` would allocate a huge string.
    if not isinstance(left, int | float) or not isinstance(right, int | float):
        raise EvaluationError("remainder of what is no number")
    return left % _bounded(right)


def _times(left: Any, right: Any) -> Any:
    for one, other in ((left, right), (right, left)):
        repeats = isinstance(one, _SEQUENCES) and isinstance(other, int)
        if repeats and len(cast("str", one)) * other > MAX_ITEMS:
            raise EvaluationError("repetition too long")
    return _bounded(_bounded(left) * _bounded(right))


def _bounded(value: Any) -> Any:
    """Bounds the size of a result: in a loop, `x = x * x` would grow without end."""
    if isinstance(value, int) and value.bit_length() > MAX_BITS:
        raise EvaluationError("number too large")
    if isinstance(value, _SEQUENCES) and len(cast("str", value)) > MAX_ITEMS:
        raise EvaluationError("too long")
    return value


_OPERATORS: dict[type[ast.AST], Callable[..., Any]] = {
    ast.Add: lambda a, b: _bounded(a + b),
    ast.Sub: operator.sub,
    ast.Mult: _times,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: _remainder,
    ast.Pow: _power,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
    ast.Not: operator.not_,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.BitAnd: operator.and_,
    ast.BitOr: operator.or_,
    ast.BitXor: operator.xor,
}
"""Operators of one or two operands; `_compare` has the comparisons that are no order."""
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    **{"abs": abs, "all": all, "any": any, "bool": bool, "float": float, "int": int, "len": len},
    **{"list": list, "max": max, "min": min, "round": round, "sorted": sorted, "str": str},
    **{"sum": sum, "tuple": tuple, "math.fabs": math.fabs, "math.sqrt": math.sqrt},
    **{"math.isclose": math.isclose, "set": set, "frozenset": frozenset, "dict": dict},
    **{"complex": complex, "Counter": collections.Counter, "deque": collections.deque},
    # An exponent of many digits would make a number that never ends.
    "Decimal": lambda given: decimal.Decimal(str(given) if "e" not in str(given).lower() else "x"),
    "Fraction": lambda *parts: fractions.Fraction(*map(operator.index, parts)),
}
_HOMES = re.compile("^(collections|decimal|fractions)[.]")


def evaluate(node: ast.expr, names: Mapping[str, Any]) -> Any:
    """The value of an expression over `names`.

    Raises:
      EvaluationError: a name is unknown, a form is not supported, a bound is exceeded, or the
        operation itself fails.
    """
    try:
        return _value(node, names, 0)
    except (ArithmeticError, LookupError, TypeError, ValueError, RecursionError) as error:
        raise EvaluationError(f"{type(error).__name__}: {error}") from error


def evaluate_text(expression: str, names: Mapping[str, Any]) -> Any:
    """Evaluates the source of an expression, which must be valid Python."""
    return evaluate(ast.parse(expression, mode="eval").body, names)


def _value(node: ast.expr, names: Mapping[str, Any], depth: int) -> Any:
    if depth > MAX_DEPTH:
        raise EvaluationError("nested too deeply")

    def of(child: ast.expr) -> Any:
        return _value(child, names, depth + 1)

    match node:
        case ast.Constant(value):
            return value
        case ast.Name(name) if name in names:
            return names[name]
        case ast.List(items) | ast.Tuple(items) | ast.Set(items):
            kinds: dict[type[ast.AST], Callable[..., Any]] = {ast.Tuple: tuple, ast.Set: set}
            return kinds.get(type(node), list)([of(item) for item in items])
        case ast.Dict(keys, values) if None not in keys:
            return {of(cast("ast.expr", k)): of(v) for k, v in zip(keys, values, strict=True)}
        case ast.UnaryOp(op, operand) if type(op) in _OPERATORS:
            return _OPERATORS[type(op)](of(operand))
        case ast.BinOp(left, op, right) if type(op) in _OPERATORS:
            return _OPERATORS[type(op)](of(left), of(right))
        case ast.BoolOp(op, values):
            return (all if isinstance(op, ast.And) else any)(of(v) for v in values)
        case ast.Compare(left, ops, rights):
            sides = [of(left), *map(of, rights)]
            pairs = zip(sides, ops, sides[1:], strict=False)
            return all(_compare(a, op, b) for a, op, b in pairs)
        case ast.Subscript(value, index) if not isinstance(index, ast.Slice):
            return of(value)[of(index)]
        case ast.Call(function, arguments, []):
            return _call(ast.unparse(function), [of(a) for a in arguments])
        case ast.ListComp(element, [loop]) | ast.GeneratorExp(element, [loop]):
            return [_value(element, inner, depth + 1) for inner in _loop(loop, names, depth + 1)]
        case _:
            raise EvaluationError(f"not evaluated here: {ast.unparse(node)[:80]}")


def _call(name: str, arguments: list[Any]) -> Any:
    if name == "range" and all(type(a) is int for a in arguments):
        numbers = range(*arguments)
        if len(numbers) > MAX_ITEMS:
            raise EvaluationError("range too long")
        return numbers
    name = _HOMES.sub("", name)
    if name not in _FUNCTIONS:
        raise EvaluationError(f"not called here: {name[:80]}")
    return _FUNCTIONS[name](*arguments)


def _loop(
    loop: ast.comprehension, names: Mapping[str, Any], depth: int
) -> Iterator[Mapping[str, Any]]:
    if not isinstance(loop.target, ast.Name) or loop.is_async:
        raise EvaluationError("loop over more than one name")
    for item in _value(loop.iter, names, depth):
        inner = {**names, loop.target.id: item}
        if all(_value(test, inner, depth) for test in loop.ifs):
            yield inner


def _compare(left: Any, op: ast.cmpop, right: Any) -> bool:
    match op:
        case ast.Eq() | ast.NotEq():
            return same_value(left, right) == isinstance(op, ast.Eq)
        case ast.Is() | ast.IsNot():
            same = type(left) is type(right) and same_value(left, right)
            return same == isinstance(op, ast.Is)
        case ast.In() | ast.NotIn():
            if isinstance(right, list | tuple):
                found = any(same_value(left, item) for item in cast("list[Any]", right))
            else:
                found = left in right
            return found == isinstance(op, ast.In)
        case _:
            return bool(_OPERATORS[type(op)](left, right))
