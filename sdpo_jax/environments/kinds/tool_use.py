r"""Kind `tool_use`: ToolAlpaca's requests, answered by calls `Action: name`, `Action Input: {...}`.

The prompt comes from the data and holds the tools' documentation, the request and this form. A
response passes if its calls are the expected ones in any order. The reward is 1 or 0; `metrics`
holds `well_formed`: every call could be parsed.

Departures from the reference's grader (lasgroup/SDPO, `verl/utils/reward_score/feedback/
tooluse.py`):

* Inputs are decoded as JSON; the reference's pattern ends at the first `}`, so it never reads a
  nested object.
* Calls are compared one by one; the reference merges the inputs of all calls, so that a later call
  overwrites an earlier one, and inputs of the wrong action pass.
* Feedback names the call, the argument and every mistake; it does not contain what was expected,
  which the reference prints, unless `reveal_expected`.
* Repeated arguments, NaN, and `true` for 1 are refused; 1 equals 1.0, as in the reference.
* Text up to `</think>` does not count.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

from sdpo_jax.environments import rows
from sdpo_jax.environments.answer_forms import (
    MAX_DEPTH,
    cut_off,
    is_deeper,
    shown,
    without_thinking,
)
from sdpo_jax.environments.base import Outcome, Prompt
from sdpo_jax.environments.rows import BadRow, Split, type_name
from sdpo_jax.environments.settings import FilesConfig, print_skipped, require_files

MAX_CHARACTERS, MAX_CALLS = 20_000, 16
FORM = 'lines "Action: name" and "Action Input: {JSON object}" for each call'
_ACTION = re.compile(r"^[ \t]*Action:[ \t]*(.*)$", re.MULTILINE)
_INPUT = re.compile(r"^[ \t]*Action Input:\s*(?:```(?:json)?\s*)?", re.MULTILINE)
_ROW_FORM = '{"prompt": "...", "answer": [{"action": "...", "input": {...}}]}'


@dataclass(frozen=True)
class ToolUseConfig(FilesConfig):
    """ToolAlpaca's requests, answered by actions with JSON inputs."""

    kind: Literal["tool_use"] = "tool_use"
    reveal_expected: bool = False
    """Whether feedback contains the expected call, which gives the answer away."""


class ToolCall(NamedTuple):
    """One call: the tool's name and its arguments, as decoded from JSON."""

    action: str
    input: Mapping[str, Any]


class Task(NamedTuple):
    """A prompt and the calls that answer it."""

    id: str
    messages: tuple[Mapping[str, str], ...]
    calls: tuple[ToolCall, ...]


class ToolUse:
    """The environment: every task given, in order."""

    def __init__(
        self, train: Sequence[Task], held_out: Sequence[Task], *, reveal_expected: bool = False
    ):
        """Checks that no task is on both sides.

        Args:
          train: tasks to train on.
          held_out: tasks to evaluate on.
          reveal_expected: whether feedback contains the expected call, which the teacher then
            copies.

        Raises:
          UserError: an id or a prompt occurs twice.
        """
        self.train = [Prompt(task.id, task.messages, {"task": task}) for task in train]
        self.held_out = [Prompt(task.id, task.messages, {"task": task}) for task in held_out]
        rows.check_sides(self.train, self.held_out)
        self._reveal = reveal_expected

    def grade(self, prompt: Prompt, response: str) -> Outcome:
        """Passes the expected calls in any order; feedback lists every mistake."""
        calls = parse_calls(response)
        if isinstance(calls, str):
            return Outcome(0.0, False, calls, {"well_formed": 0.0})
        found = complaints(calls, prompt.data["task"].calls, reveal=self._reveal)
        return Outcome(float(not found), not found, "\n".join(found), {"well_formed": 1.0})

    def grade_truncated(self, prompt: Prompt, response: str) -> Outcome:
        """Grades like `grade`; on a failure, the feedback is that the response was cut."""
        return cut_off(self.grade(prompt, response), FORM)

    def reference(self, prompt: Prompt) -> str:
        """The expected calls."""
        return write_calls(prompt.data["task"].calls)


def build(config: ToolUseConfig) -> ToolUse:
    """Builds the environment from its settings and files."""
    require_files(config)
    sides = load_tool_use(config.train, config.held_out, config.on_error)
    print_skipped(sides.problems)
    return ToolUse(sides.train, sides.held_out, reveal_expected=config.reveal_expected)


def write_calls(calls: Sequence[ToolCall]) -> str:
    """Writes calls in the form that `parse_calls` reads."""
    return "\n".join(
        f"Action: {call.action}\nAction Input: {json.dumps(call.input, ensure_ascii=False)}"
        for call in calls
    )


class _Refused(Exception):
    """An answer cannot be parsed; the message is the feedback."""


def parse_calls(response: str) -> list[ToolCall] | str:
    """Parses the calls of a response; returns the feedback if it is malformed."""
    text = without_thinking(response)
    if len(text) > MAX_CHARACTERS:  # The model must not control the cost of decoding.
        return f"The answer is longer than {MAX_CHARACTERS} characters."
    calls: list[ToolCall] = []
    position = 0
    try:
        while action := _ACTION.search(text, position):
            if len(calls) == MAX_CALLS:
                return f"More than {MAX_CALLS} calls."
            call, position = _call(text, action, len(calls) + 1)
            calls.append(call)
    except _Refused as refused:
        return str(refused)
    return calls or f"No call found: expected {FORM}."


def _call(text: str, action: re.Match[str], number: int) -> tuple[ToolCall, int]:
    """One call and where its decoded input ends; the next action is searched from there."""
    name = action[1].strip().strip("`*\"'")
    if not name:
        raise _Refused(f'Call {number}: no name after "Action:".')
    where = f"Call {number} ({shown(name)})"
    following = _ACTION.search(text, action.end())
    given = _INPUT.search(text, action.end(), following.start() if following else len(text))
    if given is None:
        raise _Refused(f'{where}: no "Action Input:" follows, expected {FORM}.')
    decoder = json.JSONDecoder(object_pairs_hook=_once, parse_constant=_no_constant)
    start = given.end()
    try:
        value, end = decoder.raw_decode(text, start)
    except json.JSONDecodeError as error:
        at = error.pos - start + 1
        raise _Refused(f"{where}: the input is not JSON: {error.msg}, character {at}.") from None
    except _Refused as refused:
        raise _Refused(f"{where}: {refused}") from None
    except (RecursionError, ValueError):
        raise _Refused(f"{where}: the input is nested too deep or holds a huge number.") from None
    if not isinstance(value, dict):
        raise _Refused(f"{where}: the input is {type_name(value)}, expected a JSON object.")
    if is_deeper(value):
        raise _Refused(f"{where}: the input is nested deeper than {MAX_DEPTH} levels.")
    return ToolCall(name, cast(dict[str, Any], value)), end


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for name, value in pairs:
        if name in made:
            raise _Refused(f"the argument {shown(name)} is given twice.")
        made[name] = value
    return made


def _no_constant(name: str) -> None:
    raise _Refused(f"{name} is not a JSON value.")


def complaints(
    given: Sequence[ToolCall], expected: Sequence[ToolCall], *, reveal: bool = False
) -> list[str]:
    """Lists everything that is wrong with the calls; empty if they are the expected ones.

    Equal calls are paired first, in any order; then calls of the same action, starting with those
    that share the most arguments. No complaint contains an expected value or name, unless `reveal`.
    """
    # By index: `list.remove` compares as Python does, where True equals 1.
    left: list[ToolCall] = []
    wanted = list(expected)
    for call in given:
        match = next((i for i, other in enumerate(wanted) if _same_call(call, other)), None)
        if match is None:
            left.append(call)
        else:
            del wanted[match]
    found: list[str] = []
    while pair := _closest(left, wanted):
        found += _differences(left.pop(pair[0]), wanted.pop(pair[1]), reveal)
    found += [f"{shown(call.action)}: this call is not wanted here." for call in left]
    missing = [f": {write_calls([call])}" if reveal else "." for call in wanted]
    return [*found, *(f"A call is missing{end}" for end in missing)]


def _same_call(call: ToolCall, other: ToolCall) -> bool:
    return call.action == other.action and _key(call.input) == _key(other.input)


def _key(value: Any) -> Any:
    """A key that is equal for equal JSON values: 1 equals 1.0 and does not equal true."""
    if isinstance(value, dict):
        return {name: _key(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_key(item) for item in value]
    return (type(value) is bool, value)


def _closest(left: Sequence[ToolCall], wanted: Sequence[ToolCall]) -> tuple[int, int] | None:
    """The indices of the two calls of the same action that share the most arguments."""
    pairs = [
        (i, j)
        for i, call in enumerate(left)
        for j, other in enumerate(wanted)
        if call.action == other.action
    ]
    return max(pairs, key=lambda pair: _shared(left[pair[0]], wanted[pair[1]]), default=None)


def _shared(call: ToolCall, other: ToolCall) -> int:
    names = call.input.keys() & other.input.keys()
    return sum(_key(call.input[name]) == _key(other.input[name]) for name in names)


def _differences(call: ToolCall, expected: ToolCall, reveal: bool) -> list[str]:
    """Lists what is wrong with the arguments, in the order of the expected ones."""
    found: list[str] = []
    for name, value in expected.input.items():
        hint = f"; expected {json.dumps(value, ensure_ascii=False)}" if reveal else ""
        if name not in call.input:
            found.append(f"missing argument {shown(name)}{hint}")
        elif _key(call.input[name]) != _key(value):
            wrong = call.input[name]
            problem = f"wrong value {shown(json.dumps(wrong, ensure_ascii=False))}"
            if type_name(wrong) != type_name(value):
                problem = f"expected {type_name(value)}, got {type_name(wrong)}"
            found.append(f"{shown(name)}: {problem}{hint}")
    extra = [name for name in call.input if name not in expected.input]
    found += [f"unknown argument {shown(name)}" for name in extra]
    return [f"{shown(call.action)}: {complaint}" for complaint in found]


def load_tool_use(
    train: str | Path, held_out: str | Path, on_error: Literal["stop", "skip"] = "stop"
) -> Split[Task]:
    """Reads two JSONL files in the form of ToolAlpaca.

    A row has a `prompt` (a string or chat messages) and an `answer` (or `golden_answer`): a list of
    `{"action": ..., "input": ...}` (or `Action`, `Action_Input`), or such a list as a JSON string.
    An input is an object, or one as a JSON string.

    Raises:
      UserError: a file is missing, or holds bad rows.
    """
    content = "tool-use tasks"
    return rows.read_sides(train, held_out, parse_row, on_error, form=_ROW_FORM, content=content)


def parse_row(row: dict[str, Any], place: str) -> Task:
    """Parses one row of the form that `load_tool_use` describes."""
    name = rows.row_id(row, place, "idx" if "idx" in row and "id" not in row else "id")
    messages = rows.chat(rows.get(row, "prompt"), "prompt")
    if isinstance(system := row.get("system"), str) and system.strip():
        messages = ({"role": "system", "content": rows.text(system, "system")}, *messages)
    key = "golden_answer" if "golden_answer" in row and "answer" not in row else "answer"
    items = _decoded(rows.get(row, key), key)
    if not isinstance(items, list) or not items:
        raise BadRow(f"{key} is {type_name(items) if items else 'empty'}, expected a list of calls")
    calls = tuple(_expected(item, f"{key}[{i}]") for i, item in enumerate(cast(list[Any], items)))
    if len(calls) > MAX_CALLS:
        raise BadRow(f"{key} has {len(calls)} calls, expected at most {MAX_CALLS}")
    if parse_calls(rows.text(write_calls(calls), key)) != list(calls):
        raise BadRow(f"{key} cannot be written as {FORM}")
    return Task(name, messages, calls)


def _expected(item: Any, where: str) -> ToolCall:
    if not isinstance(item, dict):
        raise BadRow(f"{where} is {type_name(item)}, expected an object")
    call = cast(dict[str, Any], item)
    names = {name.lower().removeprefix("action_"): name for name in call}
    action = rows.text(rows.get(call, names.get("action", "action"), where), f"{where}.action")
    arguments = _decoded(rows.get(call, names.get("input", "input"), where), f"{where}.input")
    if not isinstance(arguments, dict):
        raise BadRow(f"{where}.input is {type_name(arguments)}, expected an object")
    return ToolCall(action.strip(), cast(dict[str, Any], arguments))


def _decoded(value: Any, key: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (RecursionError, ValueError) as error:
        raise BadRow(f"{key} is no JSON: {error}") from None
