"""The API that runs in the sandbox before a program of kind `nano_code`.

It is self-contained. Each function takes its arguments by name, raises a
`TypeError` that lists everything that is wrong with them, and records the call in `done`. Names,
forms and wording are those of `toy_apis.TODAY`; `tests/test_nano_code.py` compares them. The
checks of formats also serve `toy_apis.py`. Python counts the lines of this file in the message of
some syntax errors (`unterminated string literal (detected at line 95)`), which is feedback: another
length of this file would change it.
"""

done: list[list[object]] = []


def is_digits(value: object, *lengths: int) -> bool:
    """Whether a value is text of so many digits."""
    return isinstance(value, str) and value.isdigit() and len(value) in lengths


def is_clock(value: object) -> bool:
    """Whether a value is text of the form HH:MM."""
    return isinstance(value, str) and value[2:3] == ":" and is_digits(value[:2] + value[3:], 4)


def is_code(value: object) -> bool:
    """Whether a value is text of three characters in capitals."""
    return isinstance(value, str) and len(value) == 3 and value.isupper()


def is_text(*lengths: int):
    """A check for text, of one of these lengths if any are given."""
    return lambda value: isinstance(value, str) and (not lengths or len(value) in lengths)


def is_marked(mark: str, at: int, length: int):
    """A check for text of this length with `mark` at position `at`."""
    return lambda value: isinstance(value, str) and len(value) == length and value[at] == mark


def is_whole(low: int = 0, high: int = 10**9):
    """A check for whole numbers from `low` to `high`."""
    return lambda value: type(value) is int and low <= value <= high


_DAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
_TOOLS = {
    "set_alarm": {"time": ("24-hour HH:MM", is_clock), "day": ("three-letter weekday", is_text(3))},
    "get_weather": {
        "city": ("city name", is_text()),
        "day": ("full weekday name", lambda value: value in _DAYS),
        "unit": ("one capital letter", is_text(1)),
    },
    "send_money": {
        "name": ("first name", is_text()),
        "amount": ("whole number of cents", is_whole(100)),
        "currency": ("three-letter code", is_code),
    },
    "book_table": {
        "people": ("whole number", is_whole(1, 8)),
        "date": ("MM-DD", is_marked("-", 2, 5)),
        "time": ("four digits HHMM", lambda value: is_digits(value, 4)),
    },
    "set_light": {
        "room": ("room name", is_text()),
        "level": ("fraction of 1", lambda value: type(value) is float),
        "seconds": ("whole seconds", is_whole()),
    },
    "play_music": {
        "genre": ("genre name", is_text()),
        "length": ("number of seconds", is_whole(100)),
    },
}


def _make(tool: str):
    forms = _TOOLS[tool]

    def call(**arguments: object):
        wrong: list[str] = []
        for name, (form, fits) in forms.items():
            if name not in arguments:
                wrong.append(f"missing argument: {name}, {form}")
            elif not fits(arguments[name]):
                wrong.append(f"{name}: expected {form}")
        wrong += [f"unexpected argument: {name[:32]}" for name in arguments if name not in forms]
        if wrong:
            raise TypeError("\n".join(wrong))
        done.append([tool, arguments])

    call.__name__ = call.__qualname__ = tool
    return call


globals().update({tool: _make(tool) for tool in _TOOLS})
