"""Finds the program in a response: the last fenced block of Python.

A block is Python if its fence says so. Without such a block the last one that parses as a program
is taken, and without that the longest; `7` or `[1, 2]`, a sample of output, is no program.

Departures from the reference (one regular expression for the longest block, whatever its language):

* The longest block is often a shell session, or the output below the program.
* Lines are read once, so that no response makes extraction slow.
* Text before the last `</think>`, or after a `<think>` that is never closed, is reasoning and holds
  no program.
* A fence may stand on a line with text, at the beginning and at the end of a block. A block inside
  a list item loses the item's indentation; tildes and longer fences work as well, and a longer
  fence may contain shorter ones.
* A last block that is never closed is not a program, as in the reference, but is reported: the
  response was most likely cut off at its length limit, which the reference learns from the sampler.
"""

import ast
import re
import warnings
from typing import NamedTuple

from sdpo_jax.environments.answer_forms import without_thinking

_FENCE = re.compile(r"([ \t]*)(`{3,}|~{3,})([^`]*)\Z")
_BEHIND_TEXT = re.compile(r"([ \t]*)[^ \t`~][^`~]*(`{3,}|~{3,})([ \t]*[\w+.-]*)\Z")
_PYTHON = re.compile(r"[\s{.]*(?:i?python|py)[\d.]*(?![\w-])", re.IGNORECASE)


class Extracted(NamedTuple):
    """The program of a response, or None, and whether the response seems to be cut off."""

    program: str | None
    cut_off: bool
    """A block or the reasoning was opened and never closed."""


class _Block(NamedTuple):
    """A fenced block that is open."""

    indent: str
    fence: str
    language: str
    lines: list[str]


def extract(response: str) -> Extracted:
    """The last closed block of Python in a response."""
    answer = without_thinking(response)
    thinks = "<think>" in response.rpartition("</think>")[2]
    blocks: list[tuple[str, str]] = []
    block: _Block | None = None
    for line in re.sub("\r\n?", "\n", answer).split("\n"):
        match = _FENCE.match(line)
        if block is None:
            match = match or _BEHIND_TEXT.match(line.rstrip())
            block = _Block(match[1], match[2], match[3], []) if match else None
        elif match and match[2].startswith(block.fence) and not match[3].strip():
            blocks.append((block.language, _text(block)))
            block = None
        else:
            block.lines.append(line.removeprefix(block.indent))
    if block and any(block.fence in line for line in block.lines):
        blocks.append((block.language, _text(block)))
        block = None
    return Extracted(_best(blocks), block is not None or thinks)


def _text(block: _Block) -> str:
    """The text of a block, without what follows a closing fence that stands on a line with text."""
    text = "\n".join(block.lines)
    if block.fence not in text or _statements(text) is not None:
        return text
    return text.partition(block.fence)[0]


def _best(blocks: list[tuple[str, str]]) -> str | None:
    ranks: list[tuple[int, int, str]] = []
    for place, (language, text) in enumerate(blocks):
        if _PYTHON.match(language) and not text.lstrip().startswith(">>>"):
            ranks.append((3, place, text))
        elif _statements(text):
            ranks.append((1 if language.strip() else 2, place, text))
        else:
            ranks.append((0, len(text), text))
    best = max((rank for rank in ranks if rank[2].strip()), key=lambda rank: rank[:2], default=None)
    return best[2] if best else None


def _statements(text: str) -> list[ast.stmt] | None:
    """The statements of a program except values that stand alone; None if it does not parse."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Odd literals would print warnings.
            body = ast.parse(text).body
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return None
    return [s for s in body if not isinstance(s, ast.Expr) or isinstance(s.value, ast.Call)]
