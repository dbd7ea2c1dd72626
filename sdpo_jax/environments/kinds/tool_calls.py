"""Kind `tool_calls`: toy tool use for the embedded model, generated requests with one call each.

The task models API drift. Every argument can be written in several *forms* (`"19:30"`, `"7:30 pm"`,
`"1930"`). An `Api` fixes one form for each argument, and the environment grades with a fixed API
(`TODAY`). The model was pre-trained on many APIs: it can write every form but prefers the one that
it saw most. The feedback names the form that is expected. No prompt mentions `TODAY`, so a model
can learn it only from feedback or from a successful sibling.

Training and held-out tasks are disjoint by construction: a hash of a task's values assigns it to a
side (`is_held_out`), for prompts as well as for the embedded model's pre-training text.

Departures from the paper's ToolAlpaca environment: calls are Python-like expressions read by a real
parser, not JSON found by a pattern; feedback names the argument and the expected form and never the
expected value (the reference prints the expected call, which gives the answer to the teacher).
"""

import ast
import random
import warnings
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from sdpo_jax.config import SEED, EnvironmentConfig, at_least, setting
from sdpo_jax.environments.answer_forms import shown, without_thinking
from sdpo_jax.environments.base import Outcome, Prompt
from sdpo_jax.environments.toy_apis import FAMILIES, TODAY, Api, Form, Slot, Value, Values
from sdpo_jax.errors import UserError


@dataclass(frozen=True)
class ToolCallsConfig(EnvironmentConfig):
    """Generated requests, answered by one call each."""

    kind: Literal["tool_calls"] = "tool_calls"
    train_prompts: int = setting(2048, at_least(1))
    """Number of distinct training prompts."""
    held_out_prompts: int = setting(256, at_least(1))
    """Number of distinct held-out prompts, disjoint from the training prompts."""
    families: tuple[str, ...] = ()
    """Task families to draw from; empty means all."""
    held_out_families: tuple[str, ...] = ()
    """Task families of the held-out prompts, to measure forgetting or transfer; empty means
    `families`."""
    allow_preamble: bool = False
    """Whether any text may precede the call; only the last line of a response is then graded."""
    seed: int = setting(0, SEED)
    """Seed of the prompts. It is separate from the run's seed, so every run sees the same tasks."""


class Task(NamedTuple):
    """A request and the values that are needed to write and to grade its call."""

    family: str
    values: Values
    request: str
    tools: tuple[str, ...]


def draw_task(rng: random.Random, family: str) -> Task:
    """Draws the values, the phrasing and the list of tools (the right one among two others)."""
    spec = FAMILIES[family]
    values = {slot.name: slot.draw(rng) for slot in spec.slots}
    said = {slot.name: slot.say(values[slot.name]) for slot in spec.slots}
    request = rng.choice(spec.phrases).format(**said)
    others = [f.tool for name, f in FAMILIES.items() if name != family]
    tools = [spec.tool, *rng.sample(others, 2)]
    rng.shuffle(tools)
    return Task(family, values, request, tuple(tools))


def is_held_out(task: Task) -> bool:
    """Whether a hash of the task's values holds it out (one in four), whatever its phrasing."""
    key = repr((task.family, sorted(task.values.items())))
    return zlib.crc32(key.encode()) % 4 == 0


def question(task: Task) -> str:
    """The user message."""
    return f"tools: {', '.join(task.tools)}\n{task.request}"


def expected_arguments(task: Task, api: Api) -> dict[str, Value]:
    """The arguments of the call that `api` accepts for this task."""
    slots = FAMILIES[task.family].slots
    forms = {slot.name: slot.forms[api[task.family, slot.name]] for slot in slots}
    return {n: f.write(task.values[n]) for n, f in forms.items() if f.write is not None}


def write_call(task: Task, api: Api) -> str:
    """Writes the call that `api` accepts for this task."""
    arguments = (f"{n}={_literal(value)}" for n, value in expected_arguments(task, api).items())
    return f"{FAMILIES[task.family].tool}({', '.join(arguments)})"


def _literal(value: Value) -> str:
    return f'"{value}"' if isinstance(value, str) else repr(value)


class Call(NamedTuple):
    """A parsed call."""

    tool: str
    arguments: Mapping[str, Value]


MAX_CALL_CHARACTERS = 400
_MALFORMED = "malformed call: expected tool(argument=value, ...)"


def parse_call(text: str) -> Call | str:
    """Parses `tool(argument=literal, ...)`; returns the feedback if the text is malformed."""
    if len(text) > MAX_CALL_CHARACTERS:  # A long text could exhaust the parser's stack.
        return _MALFORMED
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd literals would print warnings
            node = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return _MALFORMED
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or node.args:
        return _MALFORMED
    arguments: dict[str, Value] = {}
    for keyword in node.keywords:
        value = keyword.value.value if isinstance(keyword.value, ast.Constant) else None
        if keyword.arg is None or type(value) not in (str, int, float):
            return _MALFORMED
        if keyword.arg in arguments:
            return f"repeated argument: {keyword.arg}"
        arguments[keyword.arg] = value  # pyright: ignore[reportArgumentType]
    return Call(node.func.id, arguments)


def complaints(task: Task, response: str, api: Api) -> list[str]:
    """Lists everything that is wrong with a response, in signature order; empty if accepted."""
    call = parse_call(response)
    if isinstance(call, str):
        return [call]
    spec = FAMILIES[task.family]
    if call.tool not in task.tools:
        return [f"unknown tool: {call.tool[:32]}"]
    if call.tool != spec.tool:
        return [f"wrong tool for this request: {call.tool}"]
    found: list[str] = []
    for slot in spec.slots:
        found += _slot_complaints(slot, slot.forms[api[task.family, slot.name]], task.values, call)
    names = {slot.name for slot in spec.slots}
    found += [f"unexpected argument: {name[:32]}" for name in call.arguments if name not in names]
    return found


def _slot_complaints(slot: Slot, form: Form, values: Values, call: Call) -> list[str]:
    if form.write is None:
        return [f"unexpected argument: {slot.name}"] if slot.name in call.arguments else []
    if slot.name not in call.arguments:
        return [f"missing argument: {slot.name}, {form.description}"]
    given, expected = call.arguments[slot.name], form.write(values[slot.name])
    if given == expected and type(given) is type(expected):
        return []
    if form.reads(given):
        return [f"{slot.name}: wrong value {shown(_literal(given), 32)}"]
    return [f"{slot.name}: expected {form.description}"]


class ToolCalls:
    """The environment: seeded prompts, graded exactly against `TODAY`.

    The reward is 1 for an accepted call, else 0. `metrics` holds `well_formed`. With
    `allow_preamble` only the last line of a response is graded.
    """

    def __init__(
        self,
        *,
        train_prompts: int,
        held_out_prompts: int,
        families: Sequence[str] = (),
        held_out_families: Sequence[str] = (),
        allow_preamble: bool = False,
        seed: int = 0,
    ):
        self._allow_preamble = allow_preamble
        _check_families("families", families)
        _check_families("held_out_families", held_out_families)
        chosen = tuple(families) or tuple(FAMILIES)
        held_out = tuple(held_out_families) or chosen
        self.train = _prompts(chosen, train_prompts, held_out=False, seed=seed)
        self.held_out = _prompts(held_out, held_out_prompts, held_out=True, seed=seed)

    def grade(self, prompt: Prompt, response: str) -> Outcome:
        """Passes exactly the call that `TODAY` expects; feedback lists every mistake."""
        task: Task = prompt.data["task"]
        call = self._call(response)
        found = complaints(task, call, TODAY)
        well_formed = float(isinstance(parse_call(call), Call))
        return Outcome(float(not found), not found, "\n".join(found), {"well_formed": well_formed})

    def answer(self, prompt: Prompt, response: str) -> str | None:
        """The call with its arguments sorted by name."""
        del prompt
        call = parse_call(self._call(response))
        return repr((call.tool, sorted(call.arguments.items()))) if isinstance(call, Call) else None

    def _call(self, response: str) -> str:
        if not self._allow_preamble:
            return response
        return without_thinking(response).strip().rpartition("\n")[2]

    def reference(self, prompt: Prompt) -> str:
        """The call that `TODAY` expects."""
        return write_call(prompt.data["task"], TODAY)


def build(config: ToolCallsConfig) -> ToolCalls:
    """Builds the environment from its settings."""
    return ToolCalls(
        train_prompts=config.train_prompts,
        held_out_prompts=config.held_out_prompts,
        families=config.families,
        held_out_families=config.held_out_families,
        allow_preamble=config.allow_preamble,
        seed=config.seed,
    )


def _check_families(key: str, families: Sequence[str]) -> None:
    unknown = [name for name in families if name not in FAMILIES]
    if unknown:
        raise UserError(
            f"environment.{key}: unknown {', '.join(map(repr, unknown))}; "
            f"expected some of {', '.join(FAMILIES)}"
        )


def _prompts(families: Sequence[str], count: int, *, held_out: bool, seed: int) -> list[Prompt]:
    """Makes `count` prompts with distinct questions, cycling through the families."""
    side = "held_out" if held_out else "train"
    rng = random.Random(f"tool_calls:{side}:{seed}")
    prompts: list[Prompt] = []
    seen: set[str] = set()
    misses = 0
    while len(prompts) < count:
        if misses > 2000:  # Consecutive ones: the family has hardly any new questions.
            raise UserError(
                f"environment.{side}_prompts: expected at most about {len(prompts)} for families "
                f"{', '.join(families)}, got {count}; lower it or add families"
            )
        task = draw_task(rng, families[len(prompts) % len(families)])
        text = question(task)
        if is_held_out(task) != held_out or text in seen:
            misses += 1
            continue
        misses = 0
        seen.add(text)
        name = f"{task.family}-{side}-{len(prompts)}"
        data = {"task": task, "family": task.family}
        prompts.append(Prompt(name, ({"role": "user", "content": text},), data))
    return prompts
