"""Reads programming problems from JSONL: LiveCodeBench's files and the plain rows of SDPO's data.

LiveCodeBench's row: `question_id`, `question_content`, `starter_code`, `public_test_cases`,
`private_test_cases`, `metadata`. The plain row: `prompt` (and `idx` or `id`), and `tests`, an
object or its JSON text: `{"inputs": [...], "outputs": [...], "testtype": ..., "fn_name": ...,
"time_limit": ...}`, with the test type `stdin`, `functional` or `code`.

The whole file is read and validated before anything is compiled; an error names the bad rows.

Hidden tests of LiveCodeBench are pickled, compressed and in base64. Unpickling can run arbitrary
code, so they are never unpickled: `hidden_tests` reads the opcodes and accepts a single string.

LiveCodeBench's own runner puts imports before every program (`PRELUDE`) and compares printed lines;
its rows are run and compared in the same way.

Departures from the SDPO reference: the arguments of a function are consecutive JSON values, whereas
the reference splits at white space, so that no argument may contain a blank; methods of
`class Solution` are called as methods; a row's public tests count as tests and stay public, whereas
the reference uses only the hidden ones; the question states the true time limit.
"""

import base64
import json
import pickletools
import zlib
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal, cast

from sdpo_jax.environments.code.asserts import convert_asserts
from sdpo_jax.environments.code.problems import Case, Equals, Prints, Problem
from sdpo_jax.environments.rows import BadRow, Rows, no_constant, read_rows
from sdpo_jax.environments.sandbox.protocol import Call, Limits, Run

MAX_BYTES = 512 * 2**20
"""Bound on one row's hidden tests after decompression: a small file can grow to any size."""
SECONDS = 6.0
"""Time limit of each test if the row has none, as in LiveCodeBench."""
_OPEN = (
    *("string", "re", "datetime", "collections", "heapq", "bisect", "copy", "math", "random"),
    *("statistics", "itertools", "functools", "operator", "io", "sys", "json"),
)
PRELUDE = "\n".join(
    [f"from {module} import *" for module in (*_OPEN, "builtins", "typing")]
    + [f"import {module}" for module in _OPEN]
    + ["sys.setrecursionlimit(50000)"]
)
"""What LiveCodeBench's runner has before each program: all names of these modules, in this order,
the modules themselves, and a recursion limit."""
_FRAMES = ("PROTO", "FRAME", "MEMOIZE", "BINPUT", "LONG_BINPUT", "PUT")
_STRINGS = ("SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "UNICODE")
_FORM = (
    "Answer with one code block that starts with ```python and holds the whole program. {task} "
    "Each test may use {seconds:g} s of processor time."
)
_STDIN = "It reads standard input and writes standard output."
_FUNCTION = "It defines `{name}`, which the tests call."


def read_problems(path: str | Path, on_error: Literal["stop", "skip"] = "stop") -> Rows[Problem]:
    """Reads and validates a whole file; rows of both forms may be mixed.

    Args:
      path: UTF-8, one JSON object per line.
      on_error: `stop` raises one error that lists the bad rows; `skip` leaves them out and returns
        the list.

    Raises:
      UserError: the file cannot be read, has no usable row, or has a bad row under `stop`.
    """
    return read_rows(path, _problem, on_error, form="one problem, as JSON,", content="problems")


def _json(raw: bytes | str, what: str) -> Any:
    try:
        return json.loads(raw, parse_constant=no_constant, parse_int=_integer)
    except (ValueError, RecursionError) as error:
        raise BadRow(f"{what} is not JSON ({error})") from None


def _integer(digits: str) -> int:
    return int(digits) if len(digits) < 4000 else int(Decimal(digits))  # `int` refuses long text


def _checked(value: Any, what: str, kind: type[str] | type[list]) -> Any:
    if not isinstance(value, kind):
        expected = {str: "a string", list: "a list"}[kind]
        raise BadRow(f"{what}: expected {expected}, got {type(value).__name__}")
    return value


def _get(row: Mapping[str, Any], key: str, kind: type[str] | type[list]) -> Any:
    return _checked(row.get(key), key, kind)


def _object(value: Any, what: str) -> dict[str, Any]:
    value = _json(value, what) if isinstance(value, str) else value
    if not isinstance(value, dict):
        raise BadRow(f"{what}: expected an object or its JSON text")
    return cast("dict[str, Any]", value)


def _problem(fields: dict[str, Any], place: str) -> Problem:
    if "question_content" in fields:
        return _live_code_bench(fields)
    if "tests" in fields:
        return _plain(fields, place)
    raise BadRow("expected question_content (LiveCodeBench) or tests (plain), found neither")


def _live_code_bench(row: Mapping[str, Any]) -> Problem:
    name, content = _get(row, "question_id", str), _get(row, "question_content", str)
    function = _object(row.get("metadata") or {}, "metadata").get("func_name")
    cases = [
        _tested(test, function, public)
        for public, tests in (
            (True, _json(_get(row, "public_test_cases", str), "public_test_cases")),
            (False, hidden_tests(_get(row, "private_test_cases", str))),
        )
        for test in _checked(tests, "test cases", list)
    ]
    starter = row.get("starter_code") or ""
    code = f"\n\nBegin with:\n\n```python\n{starter.rstrip()}\n```" if starter.strip() else ""
    made = _made(name, f"{content.strip()}{code}", cases, function, SECONDS)
    return made._replace(difficulty=str(row.get("difficulty") or ""), prelude=PRELUDE)


def _tested(test: Any, function: Any, public: bool) -> Case:
    if not isinstance(test, dict):
        raise BadRow("a test: expected an object with input, output and testtype")
    fields = cast("dict[str, Any]", test)
    given, expected = _get(fields, "input", str), _get(fields, "output", str)
    case = _case(fields.get("testtype"), given, expected, function)._replace(public=public)
    return case._replace(verdict=Prints(expected, True)) if isinstance(case.test, Run) else case


def _plain(row: Mapping[str, Any], place: str) -> Problem:
    fields = _object(row["tests"], "tests")
    inputs, outputs = _get(fields, "inputs", list), _get(fields, "outputs", list)
    if len(inputs) != len(outputs):
        raise BadRow(f"tests: {len(inputs)} inputs, {len(outputs)} outputs; expected as many")
    kind, function = fields.get("testtype"), fields.get("fn_name")
    if kind == "code":
        cases = [case for text in inputs for case in _assert_cases(text, function)]
    else:
        cases = [_case(kind, *pair, function) for pair in zip(inputs, outputs, strict=True)]
    seconds = fields.get("time_limit") or SECONDS
    if type(seconds) not in (int, float) or not 0 < seconds <= 600:
        raise BadRow(f"time_limit: {seconds!r}, expected seconds above 0 and up to 600")
    name = row.get("idx", row.get("id", place))
    return _made(str(name), _get(row, "prompt", str).strip(), cases, function, float(seconds))


def _made(name: str, content: str, cases: Sequence[Case], function: Any, seconds: float) -> Problem:
    if not cases:
        raise BadRow("no tests")
    task = _FUNCTION.format(name=function) if function else _STDIN
    form = _FORM.format(task=task, seconds=seconds)
    # A tuple of one number is written with twice its size: three times the expected text suffices.
    longest = max(len(case.expected.encode("utf-8", "replace")) for case in cases)
    limits = Limits(
        cpu_seconds=seconds,
        wall_seconds=max(Limits().wall_seconds, 5 * seconds),
        output_bytes=Limits().output_bytes + 3 * longest,
    )
    return Problem(name, f"{content}\n\n{form}", tuple(cases), limits=limits)


def _case(kind: Any, given: Any, expected: Any, function: Any) -> Case:
    if kind == "stdin":
        if not isinstance(given, str) or not isinstance(expected, str):
            raise BadRow("a stdin test: expected input and output as strings")
        return Case(Run(given), Prints(expected), given, expected)
    if kind != "functional":
        raise BadRow(f"testtype: {kind!r}, expected stdin, functional or code")
    if not isinstance(function, str) or not function.isidentifier():
        raise BadRow(f"a functional test needs the function's name, got {function!r}")
    value = _json(expected, "an output") if isinstance(expected, str) else expected
    arguments, keywords = _arguments(given)
    shown = given if isinstance(given, str) else json.dumps(given)
    text = expected if isinstance(expected, str) else json.dumps(value)
    return Case(Call(function, arguments, keywords), Equals(value, tuples=True), shown, text)


def _arguments(given: Any) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    """Positional and keyword arguments of a test's input.

    Text holds consecutive JSON values, the positional arguments; a list holds them, too; an object
    holds keyword arguments.
    """
    if isinstance(given, dict):
        return (), cast("dict[str, Any]", given)
    if isinstance(given, list):
        return tuple(cast("list[Any]", given)), {}
    if not isinstance(given, str):
        raise BadRow("an input: expected JSON values as text, a list or an object")
    decoder, values, at = json.JSONDecoder(), list[Any](), 0
    while at < len(given):
        if given[at].isspace():
            at += 1
            continue
        try:
            value, at = decoder.raw_decode(given, at)
        except (ValueError, RecursionError) as error:
            raise BadRow(f"an input is not JSON values one after the other ({error})") from None
        values.append(value)
    return tuple(values), {}


def _assert_cases(text: Any, function: Any) -> list[Case]:
    if not isinstance(text, str) or not isinstance(function, str):
        raise BadRow("a code test: expected Python text and fn_name")
    try:
        return convert_asserts(text, [function])
    except (SyntaxError, ValueError) as error:
        raise BadRow(f"a code test is no Python that can be read ({error})") from None


def hidden_tests(packed: str) -> Any:
    """Decodes `private_test_cases`: JSON, or JSON that was pickled, compressed and encoded."""
    if packed.lstrip()[:1] in ("[", "{"):
        return _json(packed, "private_test_cases")
    steps: tuple[tuple[str, Callable[[Any], Any]], ...] = (
        ("base64", lambda data: base64.b64decode(data, validate=True)),
        ("zlib", _unpacked),
        ("a pickled string", pickled_string),
    )
    data: Any = packed.strip()
    for what, step in steps:
        try:
            data = step(data)
        except (ValueError, zlib.error) as error:
            raise BadRow(f"private_test_cases is neither JSON nor {what} ({error})") from None
    return _json(data, "private_test_cases")


def _unpacked(data: bytes) -> bytes:
    stream = zlib.decompressobj()
    whole = stream.decompress(data, MAX_BYTES)
    if not stream.eof:
        raise ValueError(f"cut off, or more than {MAX_BYTES} bytes")
    return whole


def pickled_string(data: bytes) -> str:
    """Extracts the string from the pickle of a single string, without unpickling.

    Raises:
      ValueError: the pickle is damaged, or holds anything else.
    """
    found: list[str] = []
    try:
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name in _STRINGS:
                found.append(str(argument))
            elif opcode.name not in (*_FRAMES, "STOP"):
                raise ValueError(f"opcode {opcode.name}: only a single string is read")
    except (IndexError, UnicodeDecodeError, AttributeError) as error:
        raise ValueError(f"damaged pickle ({error})") from None
    if len(found) != 1:
        raise ValueError(f"{len(found)} strings, expected one")
    return found[0]
