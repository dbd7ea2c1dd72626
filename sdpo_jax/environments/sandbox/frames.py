"""Length-prefixed JSON frames on a file descriptor: four bytes of length, then UTF-8 JSON.

JSON and never pickle, so that a frame is data whatever its bytes are. Both sides bound the length
before they allocate anything.
"""

import json
import os
import struct
from typing import Any

MAX_FRAME = 64 * 1024 * 1024
"""Bytes of the largest frame: a program with its tests, or all its observations."""
_HEADER = struct.Struct("!I")


class FrameError(Exception):
    """A frame that is too long, cut off or not JSON."""


def encode(message: Any) -> bytes:
    """The frame of a message; raises `FrameError` if it is longer than `MAX_FRAME`."""
    body = json.dumps(message).encode()
    if len(body) > MAX_FRAME:
        raise FrameError(f"a frame of {len(body)} bytes; the limit is {MAX_FRAME}")
    return _HEADER.pack(len(body)) + body


def write(fd: int, message: Any) -> None:
    """Writes one frame; raises `OSError` if the other side is gone."""
    write_all(fd, encode(message))


def write_all(fd: int, data: bytes) -> None:
    """Writes all bytes, since a pipe may take only a part at once."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def read(fd: int) -> Any:
    """Reads one frame, or None at the end of the stream; raises `FrameError` for anything else."""
    header = _read_exactly(fd, _HEADER.size)
    if not header:
        return None
    (length,) = _HEADER.unpack(header)
    if length > MAX_FRAME:
        raise FrameError(f"a frame of {length} bytes; the limit is {MAX_FRAME}")
    body = _read_exactly(fd, length)
    if len(body) != length:
        raise FrameError("the stream ended inside a frame")
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise FrameError(f"a frame that is not JSON: {error}") from error


def _read_exactly(fd: int, length: int) -> bytearray:
    """The next bytes; nothing at the end of the stream; raises `FrameError` for a part of them."""
    data = bytearray()
    while len(data) < length and (part := os.read(fd, min(length - len(data), 1 << 20))):
        data += part
    if 0 < len(data) < length:
        raise FrameError("the stream ended inside a frame")
    return data
