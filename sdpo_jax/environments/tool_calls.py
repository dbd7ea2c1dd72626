"""Tool use in small: a request, a few tools, one call; feedback says what the call got wrong.

The story is API drift. Every argument can be written in several *forms* (`"19:30"`, `"7:30 pm"`,
`"1930"`). An `Api` fixes one form for each argument, and the environment's API is fixed (`TODAY`).
A model that grew up with other APIs knows how to write every form but writes the one that it saw
most; the environment's feedback names the form that it wants. Nothing of `TODAY` stands in a
prompt, so a model can only learn it from feedback or from a successful sibling.

Train and held-out tasks are disjoint by construction: a hash of the task's values decides on which
side it lies (`is_held_out`), for prompts as well as for the embedded model's pre-training text.

Departures from the paper's ToolAlpaca environment: calls are Python-like expressions read by a real
parser, not JSON found by a pattern; feedback names the argument and the expected form and never the
expected value (the reference prints the expected call, which hands the answer to the teacher).
"""

import ast
import random
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from sdpo_jax.environments.base import Outcome, Prompt
from sdpo_jax.errors import UserError

Literal = str | int | float
Values = Mapping[str, Any]

DAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
MONTHS = (
    "january",
    "february",
    "march",
    "april",
    "may",
    "june",
    "july",
    "august",
    "september",
    "october",
    "november",
    "december",
)
CITIES = (
    "oslo",
    "paris",
    "rome",
    "berlin",
    "madrid",
    "lisbon",
    "vienna",
    "prague",
    "dublin",
    "athens",
    "zurich",
    "warsaw",
    "tokyo",
    "delhi",
    "cairo",
    "lima",
    "boston",
    "denver",
    "austin",
    "seattle",
    "toronto",
    "sydney",
    "nairobi",
    "seoul",
)
NAMES = (
    "anna",
    "ben",
    "carla",
    "david",
    "emma",
    "felix",
    "greta",
    "hugo",
    "ida",
    "jonas",
    "klara",
    "leo",
    "mia",
    "noah",
    "olga",
    "paul",
)
COUNTS = (
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
)
CURRENCIES = {"euro": "EUR", "dollar": "USD", "pound": "GBP", "franc": "CHF"}
ROOMS = (
    "kitchen",
    "bedroom",
    "hallway",
    "bathroom",
    "office",
    "garage",
    "balcony",
    "cellar",
)
GENRES = (
    "jazz",
    "rock",
    "folk",
    "soul",
    "blues",
    "metal",
    "opera",
    "techno",
    "swing",
    "reggae",
    "disco",
    "gospel",
)


class Form(NamedTuple):
    """One way of writing an argument. `write` is None where the API does not take the argument."""

    description: str
    write: Callable[[Any], Literal] | None
    reads: Callable[[Literal], bool]
    share: float
    """How often the pre-training text uses this form; the shares of a slot sum to 1."""


class Slot(NamedTuple):
    """An argument and its forms."""

    name: str
    forms: Mapping[str, Form]


class Family(NamedTuple):
    """One tool: how requests are drawn and phrased, and how its arguments may be written."""

    tool: str
    phrases: tuple[str, ...]
    draw: Callable[[random.Random], dict[str, Any]]
    say: Callable[[Values], dict[str, str]]
    slots: tuple[Slot, ...]


class Task(NamedTuple):
    """A request with everything that is needed to write and to grade its call."""

    family: str
    values: Values
    request: str
    tools: tuple[str, ...]


Api = Mapping[tuple[str, str], str]
"""The form of every argument: (family, argument) -> name of the form."""


def _is_text(*lengths: int) -> Callable[[Literal], bool]:
    return lambda x: isinstance(x, str) and (not lengths or len(x) in lengths)


def _is_int(low: int = 0, high: int = 10**9) -> Callable[[Literal], bool]:
    return lambda x: isinstance(x, int) and low <= x <= high


def _clock_24(t: tuple[int, int, str]) -> tuple[int, int]:
    hour, minute, half = t
    return hour % 12 + (12 if half == "pm" else 0), minute


def _is_clock_24(x: Literal) -> bool:
    return isinstance(x, str) and len(x) == 5 and x[2] == ":" and (x[:2] + x[3:]).isdigit()


def _time_forms(am_pm: float, clock: float, digits: float) -> dict[str, Form]:
    return {
        "am_pm": Form(
            "12-hour time with am or pm",
            lambda t: f"{t[0]}:{t[1]:02d} {t[2]}",
            lambda x: isinstance(x, str) and x[-2:] in ("am", "pm"),
            am_pm,
        ),
        "clock": Form(
            "24-hour HH:MM", lambda t: "{:02d}:{:02d}".format(*_clock_24(t)), _is_clock_24, clock
        ),
        "digits": Form(
            "four digits HHMM",
            lambda t: "{:02d}{:02d}".format(*_clock_24(t)),
            lambda x: isinstance(x, str) and len(x) == 4 and x.isdigit(),
            digits,
        ),
    }


def _day_forms(full: float, short: float, number: float) -> dict[str, Form]:
    return {
        "full": Form("full weekday name", lambda d: d, lambda x: x in DAYS, full),
        "short": Form("three-letter weekday", lambda d: d[:3], _is_text(3), short),
        "number": Form(
            "weekday number from 1 to 7", lambda d: DAYS.index(d) + 1, _is_int(1, 7), number
        ),
    }


def _plain(name: str, description: str) -> Slot:
    return Slot(name, {"plain": Form(description, lambda v: v, _is_text(), 1.0)})


def _draw_time(rng: random.Random) -> tuple[int, int, str]:
    return rng.randint(1, 12), 5 * rng.randrange(12), rng.choice(("am", "pm"))


def _say_time(t: tuple[int, int, str]) -> str:
    return f"{t[0]}:{t[1]:02d} {t[2]}"


_ALARM = Family(
    tool="set_alarm",
    phrases=(
        "wake me on {day} at {time}",
        "alarm for {time} on {day}",
        "i get up at {time} on {day}",
    ),
    draw=lambda rng: {"time": _draw_time(rng), "day": rng.choice(DAYS)},
    say=lambda v: {"time": _say_time(v["time"]), "day": v["day"]},
    slots=(Slot("time", _time_forms(0.7, 0.12, 0.18)), Slot("day", _day_forms(0.7, 0.18, 0.12))),
)

_WEATHER = Family(
    tool="get_weather",
    phrases=(
        "how warm is it in {city} on {day} in {unit}",
        "weather for {city} on {day} in {unit}",
        "{day} forecast for {city} in {unit}",
    ),
    draw=lambda rng: {
        "city": rng.choice(CITIES),
        "day": rng.choice(DAYS),
        "unit": rng.choice(("celsius", "fahrenheit", "kelvin")),
    },
    say=lambda v: {**v},
    slots=(
        Slot(
            "city",
            {
                "name": Form("city name", lambda c: c, _is_text(), 0.75),
                "code": Form(
                    "three-letter code",
                    lambda c: c[:3].upper(),
                    lambda x: isinstance(x, str) and len(x) == 3 and x.isupper(),
                    0.25,
                ),
            },
        ),
        Slot("day", _day_forms(0.8, 0.1, 0.1)),
        Slot(
            "unit",
            {
                "word": Form("unit as a word", lambda u: u, _is_text(6, 7, 10), 0.6),
                "letter": Form("one capital letter", lambda u: u[0].upper(), _is_text(1), 0.3),
                "absent": Form("no such argument", None, lambda x: False, 0.1),
            },
        ),
    ),
)

_MONEY = Family(
    tool="send_money",
    phrases=(
        "send {amount} {currency} to {name}",
        "pay {name} {amount} {currency}",
        "{name} gets {amount} {currency}",
    ),
    draw=lambda rng: {
        "name": rng.choice(NAMES),
        "amount": rng.randint(1, 99),
        "currency": rng.choice(tuple(CURRENCIES)),
    },
    say=lambda v: {"name": v["name"], "amount": str(v["amount"]), "currency": v["currency"]},
    slots=(
        _plain("name", "first name"),
        Slot(
            "amount",
            {
                "whole": Form("whole number", lambda a: a, _is_int(0, 99), 0.65),
                "cents": Form("whole number of cents", lambda a: 100 * a, _is_int(100), 0.15),
                "decimal": Form(
                    "text with two decimals",
                    lambda a: f"{a}.00",
                    lambda x: isinstance(x, str) and x[-3:-2] == ".",
                    0.2,
                ),
            },
        ),
        Slot(
            "currency",
            {
                "word": Form("currency as a word", lambda c: c, _is_text(4, 5, 6), 0.6),
                "code": Form(
                    "three-letter code",
                    lambda c: CURRENCIES[c],
                    lambda x: isinstance(x, str) and len(x) == 3 and x.isupper(),
                    0.4,
                ),
            },
        ),
    ),
)

_TABLE = Family(
    tool="book_table",
    phrases=(
        "table for {people} on {date} at {time}",
        "dinner on {date} at {time} for {people}",
        "reserve for {people} people at {time} on {date}",
    ),
    draw=lambda rng: {
        "people": rng.randint(1, 8),
        "date": (rng.randint(1, 28), rng.randint(1, 12)),
        "time": _draw_time(rng),
    },
    say=lambda v: {
        "people": COUNTS[v["people"] - 1],
        "date": f"{v['date'][0]} {MONTHS[v['date'][1] - 1]}",
        "time": _say_time(v["time"]),
    },
    slots=(
        Slot(
            "people",
            {
                "number": Form("whole number", lambda n: n, _is_int(1, 8), 0.5),
                "word": Form("number as a word", lambda n: COUNTS[n - 1], _is_text(), 0.5),
            },
        ),
        Slot(
            "date",
            {
                "words": Form(
                    "day and month name",
                    lambda d: f"{d[0]} {MONTHS[d[1] - 1]}",
                    lambda x: isinstance(x, str) and x[-1:].isalpha(),
                    0.7,
                ),
                "dashed": Form(
                    "MM-DD",
                    lambda d: f"{d[1]:02d}-{d[0]:02d}",
                    lambda x: isinstance(x, str) and len(x) == 5 and x[2] == "-",
                    0.12,
                ),
                "dotted": Form(
                    "DD.MM",
                    lambda d: f"{d[0]:02d}.{d[1]:02d}",
                    lambda x: isinstance(x, str) and len(x) == 5 and x[2] == ".",
                    0.18,
                ),
            },
        ),
        Slot("time", _time_forms(0.7, 0.15, 0.15)),
    ),
)

_LIGHT = Family(
    tool="set_light",
    phrases=(
        "dim the {room} to {level} percent in {seconds} seconds",
        "{room} light at {level} percent after {seconds} seconds",
        "in {seconds} seconds set the {room} to {level} percent",
    ),
    draw=lambda rng: {
        "room": rng.choice(ROOMS),
        "level": 5 * rng.randint(1, 19),
        "seconds": rng.randint(2, 30),
    },
    say=lambda v: {"room": v["room"], "level": str(v["level"]), "seconds": str(v["seconds"])},
    slots=(
        _plain("room", "room name"),
        Slot(
            "level",
            {
                "percent": Form("whole percent", lambda p: p, lambda x: type(x) is int, 0.6),
                "fraction": Form(
                    "fraction of 1", lambda p: p / 100, lambda x: isinstance(x, float), 0.25
                ),
                "sign": Form(
                    "text with a percent sign",
                    lambda p: f"{p}%",
                    lambda x: isinstance(x, str) and x.endswith("%"),
                    0.15,
                ),
            },
        ),
        Slot(
            "seconds",
            {
                "whole": Form("whole seconds", lambda s: s, _is_int(), 0.5),
                "absent": Form("no such argument", None, lambda x: False, 0.5),
            },
        ),
    ),
)

_MUSIC = Family(
    tool="play_music",
    phrases=(
        "play {genre} for {length} minutes at volume {volume}",
        "{length} minutes of {genre} at volume {volume}",
        "i want {genre} at volume {volume} for {length} minutes",
    ),
    draw=lambda rng: {
        "genre": rng.choice(GENRES),
        "length": 5 * rng.randint(2, 19),
        "volume": rng.randint(1, 10),
    },
    say=lambda v: {k: str(x) for k, x in v.items()},
    slots=(
        _plain("genre", "genre name"),
        Slot(
            "length",
            {
                "minutes": Form("whole minutes", lambda m: m, _is_int(0, 99), 0.65),
                "seconds": Form("number of seconds", lambda m: 60 * m, _is_int(100), 0.15),
                "clock": Form(
                    "H:MM",
                    lambda m: f"{m // 60}:{m % 60:02d}",
                    lambda x: isinstance(x, str) and len(x) == 4 and x[1] == ":",
                    0.2,
                ),
            },
        ),
        Slot(
            "volume",
            {
                "whole": Form("whole number", lambda n: n, _is_int(0, 10), 0.7),
                "absent": Form("no such argument", None, lambda x: False, 0.3),
            },
        ),
    ),
)

FAMILIES: dict[str, Family] = {
    "alarm": _ALARM,
    "weather": _WEATHER,
    "money": _MONEY,
    "table": _TABLE,
    "light": _LIGHT,
    "music": _MUSIC,
}

TODAY: Api = {
    ("alarm", "time"): "clock",
    ("alarm", "day"): "short",
    ("weather", "city"): "name",
    ("weather", "day"): "full",
    ("weather", "unit"): "letter",
    ("money", "name"): "plain",
    ("money", "amount"): "cents",
    ("money", "currency"): "code",
    ("table", "people"): "number",
    ("table", "date"): "dashed",
    ("table", "time"): "digits",
    ("light", "room"): "plain",
    ("light", "level"): "fraction",
    ("light", "seconds"): "whole",
    ("music", "genre"): "plain",
    ("music", "length"): "seconds",
    ("music", "volume"): "absent",
}
"""The environment's API: `table` and `alarm` ask for forms that are rare in the model's past."""


def draw_task(rng: random.Random, family: str) -> Task:
    """Draws the values, the phrasing and the list of tools (the right one among two others)."""
    spec = FAMILIES[family]
    values = spec.draw(rng)
    request = rng.choice(spec.phrases).format(**spec.say(values))
    others = [f.tool for name, f in FAMILIES.items() if name != family]
    tools = [spec.tool, *rng.sample(others, 2)]
    rng.shuffle(tools)
    return Task(family, values, request, tuple(tools))


def is_held_out(task: Task) -> bool:
    """Whether the task's values lie on the held-out side (one in four), however phrased."""
    key = repr((task.family, sorted(task.values.items())))
    return zlib.crc32(key.encode()) % 4 == 0


def question(task: Task) -> str:
    """The user message."""
    return f"tools: {', '.join(task.tools)}\n{task.request}"


def write_call(task: Task, api: Api) -> str:
    """The call that `api` accepts for this task."""
    arguments: list[str] = []
    for slot in FAMILIES[task.family].slots:
        form = slot.forms[api[task.family, slot.name]]
        if form.write is not None:
            arguments.append(f"{slot.name}={_literal(form.write(task.values[slot.name]))}")
    return f"{FAMILIES[task.family].tool}({', '.join(arguments)})"


def _literal(value: Literal) -> str:
    return f'"{value}"' if isinstance(value, str) else repr(value)


class Call(NamedTuple):
    """A parsed call."""

    tool: str
    arguments: Mapping[str, Literal]


MAX_CALL_CHARACTERS = 400
_MALFORMED = "malformed call: expected tool(argument=value, ...)"


def parse_call(text: str) -> Call | str:
    """Reads `tool(argument=literal, ...)`; a string instead of a `Call` says why it cannot."""
    if len(text) > MAX_CALL_CHARACTERS:  # The parser's own stack must not be at the model's mercy.
        return _MALFORMED
    try:
        node = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return _MALFORMED
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or node.args:
        return _MALFORMED
    arguments: dict[str, Literal] = {}
    for keyword in node.keywords:
        value = keyword.value.value if isinstance(keyword.value, ast.Constant) else None
        if keyword.arg is None or type(value) not in (str, int, float):
            return _MALFORMED
        if keyword.arg in arguments:
            return f"repeated argument: {keyword.arg}"
        arguments[keyword.arg] = value  # pyright: ignore[reportArgumentType]
    return Call(node.func.id, arguments)


def complaints(task: Task, response: str, api: Api) -> list[str]:
    """All that is wrong with a response, in the order of the signature; empty: accepted."""
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
        return [f"{slot.name}: wrong value {_literal(given)[:32]}"]
    return [f"{slot.name}: expected {form.description}"]


class ToolCalls:
    """The environment: seeded prompts, exact grading against `TODAY`.

    Reward is 1 for an accepted call, else 0. `metrics` holds `well_formed`.
    """

    def __init__(
        self,
        *,
        train_prompts: int,
        held_out_prompts: int,
        families: Sequence[str] = (),
        seed: int = 0,
    ):
        unknown = [name for name in families if name not in FAMILIES]
        if unknown:
            raise UserError(
                f"environment.families: unknown {', '.join(map(repr, unknown))}; "
                f"expected some of {', '.join(FAMILIES)}"
            )
        chosen = tuple(families) or tuple(FAMILIES)
        self.train = _prompts(chosen, train_prompts, held_out=False, seed=seed)
        self.held_out = _prompts(chosen, held_out_prompts, held_out=True, seed=seed)

    def grade(self, prompt: Prompt, response: str) -> Outcome:
        """Accepts exactly the call that today's API wants; feedback lists every complaint."""
        task: Task = prompt.data["task"]
        found = complaints(task, response, TODAY)
        well_formed = float(isinstance(parse_call(response), Call))
        return Outcome(float(not found), not found, "\n".join(found), {"well_formed": well_formed})


def _prompts(families: Sequence[str], count: int, *, held_out: bool, seed: int) -> list[Prompt]:
    """`count` prompts with distinct questions, families in turn."""
    side = "held_out" if held_out else "train"
    rng = random.Random(f"tool_calls:{side}:{seed}")
    prompts: list[Prompt] = []
    seen: set[str] = set()
    misses = 0
    while len(prompts) < count:
        if misses > 2000:  # In a row: the family has hardly anything new to offer.
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
        prompts.append(
            Prompt(
                id=f"{task.family}-{side}-{len(prompts)}",
                messages=({"role": "user", "content": text},),
                data={"task": task, "family": task.family},
            )
        )
    return prompts
