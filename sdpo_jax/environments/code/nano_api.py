"""The API that runs in the sandbox before a program of kind `nano_code`.

It is self-contained. Each function takes its arguments by name, raises a
`TypeError` that lists everything that is wrong with them, and records the call in `done`. Names,
forms and wording are those of `toy_apis.TODAY`; `tests/test_nano_code.py` compares them.
"""

done: list[list[object]] = []


def _is_digits(value: object, *lengths: int) -> bool:
    return isinstance(value, str) and value.isdigit() and len(value) in lengths


def _is_clock(value: object) -> bool:
    return isinstance(value, str) and value[2:3] == ":" and _is_digits(value[:2] + value[3:], 4)


def _is_text(*lengths: int):
    return lambda value: isinstance(value, str) and (not lengths or len(value) in lengths)


def _is_whole(low: int, high: int):
    return lambda value: type(value) is int and low <= value <= high


def _is_code(value: object) -> bool:
    return isinstance(value, str) and len(value) == 3 and value.isupper()


def _is_dashed(value: object) -> bool:
    return isinstance(value, str) and len(value) == 5 and value[2] == "-"


_DAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
_ANY = 10**9
_TOOLS = {
    "set_alarm": {
        "time": ("24-hour HH:MM", _is_clock),
        "day": ("three-letter weekday", _is_text(3)),
    },
    "get_weather": {
        "city": ("city name", _is_text()),
        "day": ("full weekday name", lambda value: value in _DAYS),
        "unit": ("one capital letter", _is_text(1)),
    },
    "send_money": {
        "name": ("first name", _is_text()),
        "amount": ("whole number of cents", _is_whole(100, _ANY)),
        "currency": ("three-letter code", _is_code),
    },
    "book_table": {
        "people": ("whole number", _is_whole(1, 8)),
        "date": ("MM-DD", _is_dashed),
        "time": ("four digits HHMM", lambda value: _is_digits(value, 4)),
    },
    "set_light": {
        "room": ("room name", _is_text()),
        "level": ("fraction of 1", lambda value: type(value) is float),
        "seconds": ("whole seconds", _is_whole(0, _ANY)),
    },
    "play_music": {
        "genre": ("genre name", _is_text()),
        "length": ("number of seconds", _is_whole(100, _ANY)),
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


set_alarm = _make("set_alarm")
get_weather = _make("get_weather")
send_money = _make("send_money")
book_table = _make("book_table")
set_light = _make("set_light")
play_music = _make("play_music")
