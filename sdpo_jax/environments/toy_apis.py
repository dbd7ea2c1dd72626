"""The six toy tools of the kinds `tool_calls` and `nano_code`: their requests and argument formats.

A `Family` is one tool: how its requests are drawn and phrased, and the `Form`s (formats) of each
argument. An `Api` fixes one form per argument; `TODAY` is the API that the environments grade with.
"""

import random
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

Value = str | int | float
Values = Mapping[str, Any]


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


DAYS = _words("monday tuesday wednesday thursday friday saturday sunday")
MONTHS = _words(
    "january february march april may june july august september october november december"
)
CITIES = _words(
    "oslo paris rome berlin madrid lisbon vienna prague dublin athens zurich warsaw tokyo "
    "delhi cairo lima boston denver austin seattle toronto sydney nairobi seoul"
)
NAMES = _words("anna ben carla david emma felix greta hugo ida jonas klara leo mia noah olga paul")
COUNTS = _words("one two three four five six seven eight")
CURRENCIES = {"euro": "EUR", "dollar": "USD", "pound": "GBP", "franc": "CHF"}
ROOMS = _words("kitchen bedroom hallway bathroom office garage balcony cellar")
GENRES = _words("jazz rock folk soul blues metal opera techno swing reggae disco gospel")


class Form(NamedTuple):
    """One format of an argument; `write` is None if the API does not take the argument."""

    description: str
    write: Callable[[Any], Value] | None
    reads: Callable[[Value], bool]
    share: float
    """Frequency of this form in the pre-training text; the shares of a slot sum to 1."""


class Slot(NamedTuple):
    """An argument and its forms."""

    name: str
    forms: Mapping[str, Form]


class Family(NamedTuple):
    """One tool: how its requests are drawn and phrased, and the forms of its arguments."""

    tool: str
    phrases: tuple[str, ...]
    draw: Callable[[random.Random], dict[str, Any]]
    say: Callable[[Values], dict[str, str]]
    slots: tuple[Slot, ...]


Api = Mapping[tuple[str, str], str]
"""Maps (family, argument) to the name of the argument's form."""


def _is_text(*lengths: int) -> Callable[[Value], bool]:
    return lambda x: isinstance(x, str) and (not lengths or len(x) in lengths)


def _is_int(low: int = 0, high: int = 10**9) -> Callable[[Value], bool]:
    return lambda x: isinstance(x, int) and low <= x <= high


def _clock_24(t: tuple[int, int, str]) -> tuple[int, int]:
    hour, minute, half = t
    return hour % 12 + (12 if half == "pm" else 0), minute


def _is_clock_24(x: Value) -> bool:
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
"""The API of the environments; `table` and `alarm` need forms that are rare in pre-training."""
