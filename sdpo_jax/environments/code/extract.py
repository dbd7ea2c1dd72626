"""Finds the program in a response: the longest fenced block, as in the SDPO reference.

Departures from the reference (one regular expression over the whole response):

* Lines are read once, so that no response makes extraction slow.
* Text before the last `</think>`, or after a `<think>` that is never closed, is reasoning and holds
  no program.
* A block inside a list item loses the item's indentation; tildes and longer fences work as well,
  and a longer fence may contain shorter ones.
* A last block that is never closed is not a program, as in the reference, but is reported: the
  response was most likely cut off at its length limit, which the reference learns from the sampler.
"""

import re
from typing import NamedTuple

_FENCE = re.compile(r"([ \t]*)(`{3,}|~{3,})([^`]*)\Z")


class Extracted(NamedTuple):
    """The program of a response, or None, and whether the response seems to be cut off."""

    program: str | None
    cut_off: bool
    """A block or the reasoning was opened and never closed."""


class _Block(NamedTuple):
    """A fenced block that is open."""

    indent: str
    fence: str
    lines: list[str]


def extract(response: str) -> Extracted:
    """The longest closed block of a response (the first of equals), whatever its language."""
    best: str | None = None
    block: _Block | None = None
    answer, thinks, _ = response.rpartition("</think>")[2].partition("<think>")
    for line in answer.replace("\r\n", "\n").split("\n"):
        match = _FENCE.match(line)
        if block is None:
            block = _Block(match[1], match[2], []) if match else None
        elif match and match[2].startswith(block.fence) and not match[3].strip():
            text = "\n".join(block.lines)
            best = text if best is None or len(text) > len(best) else best
            block = None
        else:
            block.lines.append(line.removeprefix(block.indent))
    if best is not None and not best.strip():
        best = None
    return Extracted(best, block is not None or bool(thinks))
