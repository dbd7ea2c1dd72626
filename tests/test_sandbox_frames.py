"""Frames, strict JSON values and the system-call filter of the sandbox."""

import itertools
import os
from typing import Any

import pytest

from sdpo_jax.environments.sandbox import frames, seccomp, values


@pytest.mark.parametrize(
    "value", [None, True, 0, -(10**50), 1.5, -0.0, "é\ud7ff", [], {}, {"a": [{"b": None}]}]
)
def test_a_json_value_survives_the_way_out(value: Any) -> None:
    assert repr(values.loads(values.dumps(value, 1000))) == repr(value)


@pytest.mark.parametrize(
    "text",
    [
        "NaN",
        "Infinity",
        "1e999",
        '{"a":1,"a":2}',
        '{"tuple":{"a":1}}',
        '{"set":[[1]]}',
        '{"fraction":["1e99",1]}',
        '{"decimal":"1e999999999"}',
        '{"decimal":"sNaN"}',
        '{"unknown":[]}',
        '"\\ud800"',
        "[" * 5000,
        "[" * 200 + "]" * 200,
        "",
        "1 2",
        "9" * 5000,
        "{1:2}",
        '{"\\udfff":1}',
    ],
)
def test_forged_text_is_no_value(text: str) -> None:
    with pytest.raises(values.NotJsonError):
        values.loads(text)


@pytest.mark.parametrize(
    "value", [object(), len, ValueError("x"), "\ud800", lambda: 1, itertools.count(), [[object()]]]
)
def test_what_has_no_plain_form_is_no_value(value: Any) -> None:
    with pytest.raises(ValueError):
        values.dumps(value, 1000)


def test_a_value_longer_than_the_limit_is_refused() -> None:
    assert values.dumps("x" * 8, 10) == '"xxxxxxxx"'
    with pytest.raises(values.NotJsonError):
        values.dumps("x" * 9, 10)


def test_frames_carry_messages_and_refuse_the_rest() -> None:
    reading, writing = os.pipe()
    message = {"a": ["é", 1, None]}
    frames.write(writing, message)
    assert frames.read(reading) == message
    frames.write_all(writing, (1 << 31).to_bytes(4, "big"))
    with pytest.raises(frames.FrameError, match="limit"):
        frames.read(reading)
    frames.write_all(writing, (3).to_bytes(4, "big") + b"{]}")
    with pytest.raises(frames.FrameError, match="JSON"):
        frames.read(reading)
    frames.write_all(writing, (9).to_bytes(4, "big") + b"cut")
    os.close(writing)
    with pytest.raises(frames.FrameError, match="ended"):
        frames.read(reading)
    assert frames.read(reading) is None
    os.close(reading)


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_the_filter_denies_and_allows_by_number(
    machine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A small interpreter of BPF runs the program on made-up calls of both architectures."""
    monkeypatch.setattr(seccomp.platform, "machine", lambda: machine)
    code = seccomp.program()
    column = 0 if machine == "x86_64" else 1
    audit = seccomp._AUDIT[machine]

    def verdict(number: int, *arguments: int, arch: int = audit) -> int:
        data = b"".join(
            [number.to_bytes(4, "little"), arch.to_bytes(4, "little"), bytes(8)]
            + [a.to_bytes(8, "little") for a in (*arguments, 0, 0, 0, 0, 0, 0)[:6]]
        )
        return run_bpf(code, data)

    for name, numbers in seccomp._NUMBERS.items():
        if numbers[column] >= 0:
            assert verdict(numbers[column]) == seccomp._EPERM, name
    for number in {0: (0, 1, 60, 231), 1: (63, 64, 93, 94)}[column]:
        assert verdict(number) == seccomp._ALLOW
    clone, pair = seccomp._CLONE[column], seccomp._SOCKETPAIR[column]
    assert verdict(clone, 0x01200011) == seccomp._ALLOW
    assert verdict(clone, 0x10000011) == seccomp._EPERM
    assert verdict(pair, 1, 0o2000001) == seccomp._ALLOW
    assert verdict(pair, 1, 2) == seccomp._EPERM
    assert verdict(seccomp._CLONE3[column]) == seccomp._ENOSYS
    assert verdict(0, arch=0x40000003) == seccomp._KILL
    if machine == "x86_64":
        assert verdict(0x40000000) == seccomp._KILL
    # What a test may ask of itself, and not of the process above it.
    fcntl, limit, option = (n[column] for n in (seccomp._FCNTL, seccomp._PRLIMIT, seccomp._PRCTL))
    assert [verdict(limit, pid) for pid in (0, 1)] == [seccomp._ALLOW, seccomp._EPERM]
    assert [verdict(fcntl, 5, n) for n in (1, 8, 15)] == [seccomp._ALLOW] + [seccomp._EPERM] * 2
    assert [verdict(option, n) for n in (3, 4)] == [seccomp._ALLOW, seccomp._SILENT]
    action = seccomp._SIGACTION[column]
    assert [verdict(action, 17, p) for p in (0, 1, 1 << 32)] == [seccomp._ALLOW] + [
        seccomp._SILENT
    ] * 2
    assert verdict(action, 2, 1) == seccomp._ALLOW
    openat, touch = seccomp._OPENAT[column], seccomp._METADATA["utimensat"][column]
    assert verdict(openat, 0, 0, seccomp._TMPFILE | 2) == verdict(touch) == seccomp._ALLOW
    code = seccomp.program(own_files=False)
    assert verdict(openat, 0, 0, seccomp._TMPFILE | 2) == seccomp._EOPNOTSUPP
    assert verdict(openat, 0, 0, 2) == seccomp._ALLOW
    assert verdict(touch) == seccomp._SILENT


def run_bpf(code: bytes, data: bytes) -> int:
    at = accumulator = 0
    while True:
        step = code[at * 8 : at * 8 + 8]
        kind, value = int.from_bytes(step[:2], "little"), int.from_bytes(step[4:], "little")
        at += 1
        if kind == seccomp._RET:
            return value
        if kind == seccomp._LOAD:
            accumulator = int.from_bytes(data[value : value + 4], "little")
        elif kind == seccomp._AND:
            accumulator &= value
        else:
            holds = {
                seccomp._JEQ: accumulator == value,
                seccomp._JGE: accumulator >= value,
                seccomp._JSET: bool(accumulator & value),
            }[kind]
            at += step[2] if holds else step[3]
