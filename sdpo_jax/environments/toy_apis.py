"""The six toy tools of the kinds `tool_calls` and `nano_code`: their requests and argument formats.

A `Family` is one tool: how its requests are drawn and phrased, and the `Form`s (formats) of each
argument. An `Api` fixes one form per argument; `TODAY` is the API that the environments grade with.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from sdpo_jax.environments.code.nano_api import (
    is_clock,
    is_code,
    is_digits,
    is_marked,
    is_text,
    is_whole,
)

Value = str | int | float
Values = Mapping[str, Any]
Draw = Callable[[random.Random], Any]
Say = Callable[[Any], str]


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
    """An argument: how its value is drawn and said in a request, and its forms in a call."""

    name: str
    draw: Draw
    say: Say
    forms: Mapping[str, Form]


class Family(NamedTuple):
    """One tool: how its requests are phrased, and its arguments."""

    tool: str
    phrases: tuple[str, ...]
    slots: tuple[Slot, ...]


Api = Mapping[tuple[str, str], str]
"""Maps (family, argument) to the name of the argument's form."""


def _slot(name: str, draw: Draw, say: Say = str, /, **forms: Form) -> Slot:
    return Slot(name, draw, say, forms)


def _one_of(values: Sequence[str]) -> Draw:
    return lambda rng: rng.choice(values)


def _whole(low: int, high: int, step: int = 1) -> Draw:
    return lambda rng: step * rng.randint(low, high)


def _as_it_is(value: Any) -> Any:
    return value


def _ends_with(*ends: str) -> Callable[[Value], bool]:
    return lambda x: isinstance(x, str) and x.endswith(ends)


def _absent(share: float) -> Form:
    return Form("no such argument", None, lambda x: False, share)


def _named(name: str, description: str, values: Sequence[str]) -> Slot:
    return _slot(name, _one_of(values), plain=Form(description, _as_it_is, is_text(), 1.0))


def _clock_12(t: tuple[int, int, str]) -> str:
    return f"{t[0]}:{t[1]:02d} {t[2]}"


def _clock_24(t: tuple[int, int, str], separator: str = ":") -> str:
    hour, minute, half = t
    return f"{hour % 12 + (12 if half == 'pm' else 0):02d}{separator}{minute:02d}"


def _time(am_pm: float, clock: float, digits: float) -> Slot:
    return _slot(
        "time",
        lambda rng: (rng.randint(1, 12), 5 * rng.randrange(12), rng.choice(("am", "pm"))),
        _clock_12,
        am_pm=Form("12-hour time with am or pm", _clock_12, _ends_with("am", "pm"), am_pm),
        clock=Form("24-hour HH:MM", _clock_24, is_clock, clock),
        digits=Form(
            "four digits HHMM", lambda t: _clock_24(t, ""), lambda x: is_digits(x, 4), digits
        ),
    )


def _day(full: float, short: float, number: float) -> Slot:
    return _slot(
        "day",
        _one_of(DAYS),
        full=Form("full weekday name", _as_it_is, lambda x: x in DAYS, full),
        short=Form("three-letter weekday", lambda d: d[:3], is_text(3), short),
        number=Form(
            "weekday number from 1 to 7", lambda d: DAYS.index(d) + 1, is_whole(1, 7), number
        ),
    )


def _date_in_words(date: tuple[int, int]) -> str:
    return f"{date[0]} {MONTHS[date[1] - 1]}"


def _count_in_words(count: int) -> str:
    return COUNTS[count - 1]


FAMILIES: dict[str, Family] = {
    "alarm": Family(
        "set_alarm",
        ("wake me on {day} at {time}", "alarm for {time} on {day}", "i get up at {time} on {day}"),
        (_time(0.7, 0.12, 0.18), _day(0.7, 0.18, 0.12)),
    ),
    "weather": Family(
        "get_weather",
        (
            "how warm is it in {city} on {day} in {unit}",
            "weather for {city} on {day} in {unit}",
            "{day} forecast for {city} in {unit}",
        ),
        (
            _slot(
                "city",
                _one_of(CITIES),
                name=Form("city name", _as_it_is, is_text(), 0.75),
                code=Form("three-letter code", lambda c: c[:3].upper(), is_code, 0.25),
            ),
            _day(0.8, 0.1, 0.1),
            _slot(
                "unit",
                _one_of(("celsius", "fahrenheit", "kelvin")),
                word=Form("unit as a word", _as_it_is, is_text(6, 7, 10), 0.6),
                letter=Form("one capital letter", lambda u: u[0].upper(), is_text(1), 0.3),
                absent=_absent(0.1),
            ),
        ),
    ),
    "money": Family(
        "send_money",
        (
            "send {amount} {currency} to {name}",
            "pay {name} {amount} {currency}",
            "{name} gets {amount} {currency}",
        ),
        (
            _named("name", "first name", NAMES),
            _slot(
                "amount",
                _whole(1, 99),
                whole=Form("whole number", _as_it_is, is_whole(0, 99), 0.65),
                cents=Form("whole number of cents", lambda a: 100 * a, is_whole(100), 0.15),
                decimal=Form(
                    "text with two decimals",
                    lambda a: f"{a}.00",
                    lambda x: isinstance(x, str) and x[-3:-2] == ".",
                    0.2,
                ),
            ),
            _slot(
                "currency",
                _one_of(tuple(CURRENCIES)),
                word=Form("currency as a word", _as_it_is, is_text(4, 5, 6), 0.6),
                code=Form("three-letter code", lambda c: CURRENCIES[c], is_code, 0.4),
            ),
        ),
    ),
    "table": Family(
        "book_table",
        (
            "table for {people} on {date} at {time}",
            "dinner on {date} at {time} for {people}",
            "reserve for {people} people at {time} on {date}",
        ),
        (
            _slot(
                "people",
                _whole(1, 8),
                _count_in_words,
                number=Form("whole number", _as_it_is, is_whole(1, 8), 0.5),
                word=Form("number as a word", _count_in_words, is_text(), 0.5),
            ),
            _slot(
                "date",
                lambda rng: (rng.randint(1, 28), rng.randint(1, 12)),
                _date_in_words,
                words=Form(
                    "day and month name",
                    _date_in_words,
                    lambda x: isinstance(x, str) and x[-1:].isalpha(),
                    0.7,
                ),
                dashed=Form(
                    "MM-DD", lambda d: f"{d[1]:02d}-{d[0]:02d}", is_marked("-", 2, 5), 0.12
                ),
                dotted=Form(
                    "DD.MM", lambda d: f"{d[0]:02d}.{d[1]:02d}", is_marked(".", 2, 5), 0.18
                ),
            ),
            _time(0.7, 0.15, 0.15),
        ),
    ),
    "light": Family(
        "set_light",
        (
            "dim the {room} to {level} percent in {seconds} seconds",
            "{room} light at {level} percent after {seconds} seconds",
            "in {seconds} seconds set the {room} to {level} percent",
        ),
        (
            _named("room", "room name", ROOMS),
            _slot(
                "level",
                _whole(1, 19, step=5),
                percent=Form("whole percent", _as_it_is, lambda x: type(x) is int, 0.6),
                fraction=Form(
                    "fraction of 1", lambda p: p / 100, lambda x: isinstance(x, float), 0.25
                ),
                sign=Form("text with a percent sign", lambda p: f"{p}%", _ends_with("%"), 0.15),
            ),
            _slot(
                "seconds",
                _whole(2, 30),
                whole=Form("whole seconds", _as_it_is, is_whole(), 0.5),
                absent=_absent(0.5),
            ),
        ),
    ),
    "music": Family(
        "play_music",
        (
            "play {genre} for {length} minutes at volume {volume}",
            "{length} minutes of {genre} at volume {volume}",
            "i want {genre} at volume {volume} for {length} minutes",
        ),
        (
            _named("genre", "genre name", GENRES),
            _slot(
                "length",
                _whole(2, 19, step=5),
                minutes=Form("whole minutes", _as_it_is, is_whole(0, 99), 0.65),
                seconds=Form("number of seconds", lambda m: 60 * m, is_whole(100), 0.15),
                clock=Form("H:MM", lambda m: f"{m // 60}:{m % 60:02d}", is_marked(":", 1, 4), 0.2),
            ),
            _slot(
                "volume",
                _whole(1, 10),
                whole=Form("whole number", _as_it_is, is_whole(0, 10), 0.7),
                absent=_absent(0.3),
            ),
        ),
    ),
}

_TODAY = {
    "alarm": {"time": "clock", "day": "short"},
    "weather": {"city": "name", "day": "full", "unit": "letter"},
    "money": {"name": "plain", "amount": "cents", "currency": "code"},
    "table": {"people": "number", "date": "dashed", "time": "digits"},
    "light": {"room": "plain", "level": "fraction", "seconds": "whole"},
    "music": {"genre": "plain", "length": "seconds", "volume": "absent"},
}
TODAY: Api = {
    (family, name): form for family, forms in _TODAY.items() for name, form in forms.items()
}
"""The API of the environments; `table` and `alarm` need forms that are rare in pre-training."""
