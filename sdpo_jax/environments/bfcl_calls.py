"""Parser and checker of function calls for the Berkeley Function-Calling Leaderboard (kind `bfcl`).

An answer is `name(argument=value, ...)` in Python's syntax or `{"name": ..., "arguments": ...}` in
JSON, alone or as the only item of a list. It is parsed and never evaluated. The comparison is the
leaderboard's: each argument has a list of accepted values, and `""` in that list makes the argument
optional; strings are compared without case, spaces and `,./-_*^`, also directly inside an array or
dict but not deeper; an integer is accepted as a float, except inside arrays; accepted values of
another type than documented override the documentation. Rows of one's own may also document the
types `number`, an integer or a float at any depth, and `object`, another name of `dict`.
"""

import ast
import json
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from sdpo_jax.environments.answer_forms import MAX_DEPTH, is_deeper, without_thinking

MAX_CHARACTERS = 2000
MALFORMED = 'malformed call: expected name(argument=value, ...) or {"name": ..., "arguments": ...}'
_TYPE_NAMES = {
    **{str: "string", bool: "boolean", int: "integer", float: "float"},
    **{list: "array", dict: "dict", type(None): "null"},
}
_DOCUMENTED = {
    **{name: kind for kind, name in _TYPE_NAMES.items()},
    **{"tuple": list, "any": str, "number": float, "object": dict},
}
"""The types; `any` stands for a string or for the type of the accepted values."""
_FITS = {"tuple": ["array"], "float": ["float", "integer"], "object": ["dict"]}
_FITS["number"] = _FITS["float"]
_FENCE = re.compile(r"\A(```+|~~~+)[ \t]*\w*[ \t]*\n(.*)\n\1\Z", re.DOTALL)

Accepted = Mapping[str, Sequence[Any]]
"""Maps an argument to its accepted values."""


class Call(NamedTuple):
    """A parsed call; tuples are converted to lists."""

    name: str
    arguments: Mapping[str, Any]


def parse_call(answer: str) -> Call | str:
    """Parses an answer, without its thinking; returns the feedback if it is malformed."""
    text = re.sub("\r\n?", "\n", without_thinking(answer)).strip()
    if fenced := _FENCE.match(text):
        text = fenced[2].strip()
    if len(text) > MAX_CHARACTERS:  # A long answer could exhaust the parsers' stacks.
        return f"malformed call: longer than {MAX_CHARACTERS} characters"
    try:
        # Try both parsers: a list in Python's syntax begins like one in JSON.
        calls = _json_calls(text) if text.startswith(("{", "[")) else None
        calls = _python_calls(text) if calls is None else calls
    except _Refused as refused:
        return _clean(str(refused))
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
        return MALFORMED
    if len(calls) != 1:
        return f"expected one call, got {len(calls)}"
    deep = is_deeper(calls[0].arguments)
    return f"malformed call: nested deeper than {MAX_DEPTH} levels" if deep else calls[0]


class _Refused(Exception):
    """The answer parses but is not a valid call; the message is the feedback."""


def _json_calls(text: str) -> list[Call] | None:
    try:
        value = json.loads(text, object_pairs_hook=_once, parse_constant=_no_constant)
    except json.JSONDecodeError:
        return None
    return [_json_call(item) for item in (value if isinstance(value, list) else [value])]


def _json_call(item: Any) -> Call:
    match item:
        case {"name": str(name), "arguments": dict(arguments)} if len(item) == 2:
            return Call(name, arguments)
        case _:
            raise _Refused(MALFORMED)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    for i, (name, _) in enumerate(pairs):
        if any(name == other for other, _ in pairs[:i]):
            raise _Refused(f"repeated argument: {name[:64]}")
    return dict(pairs)


def _no_constant(name: str) -> None:
    raise _Refused(f"malformed call: {name} is not a value")


def _python_calls(text: str) -> list[Call]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Invalid escapes would print warnings.
        node = ast.parse(text, mode="eval").body
    return [_python_call(item) for item in (node.elts if isinstance(node, ast.List) else [node])]


def _python_call(node: ast.expr) -> Call:
    if not isinstance(node, ast.Call):
        raise _Refused(MALFORMED)
    name = _dotted(node.func)
    if node.args:
        raise _Refused("positional argument: write every argument as name=value")
    arguments: dict[str, Any] = {}
    for keyword in node.keywords:
        if keyword.arg is None:
            raise _Refused(MALFORMED)
        if keyword.arg in arguments:
            raise _Refused(f"repeated argument: {keyword.arg[:64]}")
        try:
            arguments[keyword.arg] = _listed(ast.literal_eval(keyword.value))
        except (ValueError, TypeError):
            raise _Refused(f"{keyword.arg[:64]}: expected a literal value") from None
    return Call(name, arguments)


def _dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    if isinstance(node, ast.Name):
        return node.id
    raise _Refused(MALFORMED)


def _listed(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_listed(item) for item in value]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: _listed(item) for key, item in value.items()}
    if isinstance(value, dict) or type(value) not in _TYPE_NAMES:
        raise ValueError("bytes, sets, complex numbers and other keys than strings")
    return value


def complaints(
    call: Call, function: Mapping[str, Any], accepted: Accepted, *, reveal: bool = False
) -> list[str]:
    """Lists everything that is wrong with a call, in the documentation's order; empty if accepted.

    `function` is the documentation: `name` and `parameters` with `properties` and `required`. No
    complaint contains an accepted value, unless `reveal`.
    """
    if call.name != function["name"]:
        return [_clean(f"unknown function: {call.name[:64]}")]
    documented: Mapping[str, Any] = function["parameters"]["properties"]
    required = function["parameters"].get("required", [])
    found: list[str] = []
    for name, schema in documented.items():
        values = [value for value in accepted.get(name, []) if value != ""]
        hint = f"; expected {example(values[0])!r}" if reveal and values else ""
        if name in call.arguments and name not in accepted:
            found.append(f"argument not wanted here: {name}")
        elif name in call.arguments:
            wrong = _wrong(name, call.arguments[name], schema, accepted[name])
            found += [f"{text}{hint}" for text in wrong]
        elif name in required or (name in accepted and "" not in accepted[name]):
            found.append(f"missing argument: {name} ({schema.get('type', 'any')}){hint}")
    unknown = [name for name in call.arguments if name not in documented]
    return [*map(_clean, found + [f"unknown argument: {name[:64]}" for name in unknown])]


def check_row(function: Mapping[str, Any], accepted: Accepted) -> None:
    """Checks that calls of a function can be compared, whatever they hold.

    Raises:
      ValueError: a type is unknown, or an argument has no list of values.
    """
    for name, schema in function["parameters"]["properties"].items():
        _check_type(name, schema)
    for name, values in accepted.items():
        _check_values(name, values)


def _check_type(where: str, schema: Any) -> None:
    documented = schema.get("type", "any") if isinstance(schema, dict) else None
    if not isinstance(documented, str) or documented not in _DOCUMENTED:
        names = ", ".join(_DOCUMENTED)
        raise ValueError(f"{where} has the type {documented!r}, expected one of {names}")
    if schema.get("items"):
        _check_type(f"{where}[]", schema["items"])
    for name, inner in (schema.get("properties") or {}).items():
        _check_type(f"{where}.{name}", inner)


def _check_values(where: str, values: Any) -> None:
    if not isinstance(values, list):
        raise ValueError(f"{where} has no list of accepted values")
    for value in values:
        if isinstance(value, list):
            _check_values(where, value)
        for name, inner in value.items() if isinstance(value, dict) else ():
            _check_values(f"{where}.{name}", inner)


def _wrong(where: str, value: Any, schema: Mapping[str, Any], accepted: Sequence[Any]) -> list[str]:
    """Lists what is wrong with one argument; empty if it is accepted."""
    if is_accepted(value, schema, accepted):
        return []
    answer = next((a for a in accepted if a != ""), None)
    if isinstance(value, dict) and isinstance(answer, dict):
        found = _wrong_keys(where, value, answer, schema.get("properties") or {})
        return found or [f"{where}: wrong value {_shown(value)}"]
    return [_why(where, value, schema, accepted)]


def _wrong_keys(
    where: str, value: Mapping[str, Any], accepted: Accepted, properties: Mapping[str, Any]
) -> list[str]:
    found: list[str] = []
    for key, values in accepted.items():
        if key in value and not _is_one_of(value[key], values):
            found.append(_why(f"{where}.{key}", value[key], properties.get(key, {}), values))
        elif key not in value and "" not in values:
            # An undocumented key is part of the accepted value and must not be revealed.
            missing = f"missing key {key}" if key in properties else "a key is missing"
            found.append(f"{where}: {missing}")
    found += [f"{where}: unknown key {k[:64]}" for k in value if k not in accepted]
    return list(dict.fromkeys(found))


def _why(where: str, value: Any, schema: Mapping[str, Any], accepted: Sequence[Any]) -> str:
    """Explains why a value is refused: its type or the value itself."""
    values = [a for a in accepted if a != ""]
    wrong_type = _wrong_type(where, value, schema)
    # If no accepted value has the documented type, the type is not the mistake.
    if wrong_type and (
        not values or any(_wrong_type("", example(item), schema) is None for item in values)
    ):
        return wrong_type
    if "enum" in schema and value not in schema["enum"]:
        return f"{where}: {_shown(value)} is none of the documented choices"
    return f"{where}: wrong value {_shown(value)}"


def _wrong_type(
    where: str, value: Any, schema: Mapping[str, Any], *, in_array: bool = False
) -> str | None:
    """Describes the first type that differs from the documentation, at any depth."""
    expected, given = schema.get("type", "any"), _TYPE_NAMES[type(value)]
    fits = ["float"] if expected == "float" and in_array else _FITS.get(expected, [expected])
    if expected != "any" and given not in fits:
        return f"{where}: expected {expected}, got {given}"
    found: list[str | None] = []
    if isinstance(value, list):
        items = schema.get("items") or {}
        found = [
            _wrong_type(f"{where}[{i}]", item, items, in_array=True) for i, item in enumerate(value)
        ]
    elif isinstance(value, dict):
        properties = schema.get("properties") or {}
        found = [_wrong_type(f"{where}.{k}", v, properties.get(k, {})) for k, v in value.items()]
    return next((text for text in found if text), None)


def is_accepted(value: Any, schema: Mapping[str, Any], accepted: Sequence[Any]) -> bool:
    """The leaderboard's verdict on one argument."""
    documented = _DOCUMENTED[schema.get("type", "any")]
    given = float if documented is float and type(value) is int else type(value)
    if given not in (documented, answers := _type_of(accepted) or documented):
        return False
    # e.g. a variable in place of a literal
    if given is not documented or answers is not documented:
        return value in accepted
    if documented is list:
        items = schema.get("items") or {}
        return _is_list(value, items.get("type", "any"), accepted)
    if documented is dict:
        return any(_is_dict(value, answer) for answer in accepted)
    return _is_one_of(value, accepted)


def _type_of(accepted: Sequence[Any]) -> type | None:
    return next((type(answer) for answer in accepted if answer != ""), None)


def _is_list(value: Any, item_type: str, accepted: Sequence[Any]) -> bool:
    """Whether a list is accepted; its items have the documented type or that of accepted ones."""
    types = [_DOCUMENTED[item_type], *([int] if item_type == "number" else [])]
    typed = any(
        answer == "" or all(type(item) in (*types, _type_of(answer)) for item in value)
        for answer in accepted
    )
    if types == [dict]:
        same = any(
            len(value) == len(answer) and all(map(_is_dict, value, answer)) for answer in accepted
        )
    else:
        same = [*map(_standard, value)] in [[*map(_standard, answer)] for answer in accepted]
    return typed and same


def _is_dict(value: Any, accepted: Any) -> bool:
    """Whether a dict is accepted; an accepted dict lists values per key, whatever their types."""
    return (
        isinstance(value, dict)
        and isinstance(accepted, dict)
        and all(k in accepted and _is_one_of(v, accepted[k]) for k, v in value.items())
        and all(k in value or "" in values for k, values in accepted.items())
    )


def _is_one_of(value: Any, accepted: Sequence[Any]) -> bool:
    return _standard(value) in map(_standard, accepted)


def _standard(value: Any) -> Any:
    """A string without the characters that the leaderboard ignores, in lower case."""
    if not isinstance(value, str):
        return value
    return re.sub(r"[ ,./\-_*^]", "", value).lower().replace("'", '"')


def example(accepted: Any) -> Any:
    """A concrete value for an accepted one: a dict takes the first value listed for each key."""
    if isinstance(accepted, list):
        return [example(item) for item in accepted]
    if isinstance(accepted, dict):
        chosen = {k: [v for v in values if v != ""] for k, values in accepted.items()}
        return {k: example(values[0]) for k, values in chosen.items() if values}
    return accepted


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 48 else f"{text[:48]}..."


def _clean(text: str) -> str:
    """Replaces lone surrogates, which both syntaxes can spell and UTF-8 cannot encode."""
    return text.encode(errors="replace").decode()


def write_call(name: str, arguments: Mapping[str, Any]) -> str:
    """Writes a call in Python's syntax, as `parse_call` reads it."""
    return f"{name}({', '.join(f'{key}={value!r}' for key, value in arguments.items())})"
