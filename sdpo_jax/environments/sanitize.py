r"""Sanitizes text that a program printed for use in a prompt: bounded, printable, reproducible.

Feedback becomes part of the teacher's prompt. Text that changes from run to run (addresses, names
of temporary files, process ids, durations) would change the prompt, so that a resumed run would
diverge from an uninterrupted one; escapes and control characters would hide text from a reader of
the logs. Text that spells a control token (`<|im_end|>`) stays: the tokenizer encodes it as plain
text.

These are normalized: `0x...` addresses (after `at`, or with nine digits or more, so that `0xff`
survives), paths below temporary folders and `/proc`, process ids, clock times with fractions of a
second, and decimal numbers with a unit of time. Whole seconds and bare numbers stay, since they may
be the answer that the program was asked for.

The SDPO reference sanitizes nothing and only cuts by characters; all of this is a departure. Every
pattern runs in linear time, because the program chooses the text.
"""

import re

# Terminal strings end at BEL, ST or the next escape; a lone introducer is removed by `_CONTROLS`.
_ESCAPES = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]"
    r"|(?:\x1b[\]PX^_]|[\x90\x98\x9d\x9e\x9f])[^\x07\x1b\x9c\n]*(?:\x07|\x1b\\|\x9c)?"
    r"|\x1b[ -/]*[0-~]"
)
_NEW_LINES = re.compile("\r\n|[\r\x0b\x0c\x85\u2028\u2029]")
# Control characters, and format characters that hide or reorder text (tags, zero width, ...).
_CONTROLS = re.compile(
    "[\x00-\x08\x0e-\x1f\x7f-\x9f\u00ad\u061c\u180e\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufeff"
    "\ufff9-\ufffb\U000e0000-\U000e007f]"
)
ADDRESS = re.compile(r"(?<=\bat )0x[0-9a-fA-F]+|\b0x[0-9a-fA-F]{9,}")
"""The address of an object in memory, which changes from run to run."""
_NOISE = (
    (ADDRESS, "0x..."),
    (
        re.compile(r"/(?:(?:private/)?(?:var/)?(?:tmp|folders)|dev/shm)/[^\s\"'`<>():;,]+"),
        "/tmp/...",
    ),
    (re.compile(r"/proc/\d+"), "/proc/..."),
    (re.compile(r"\b(pid)[\s=:#]{0,3}\d+", re.IGNORECASE), r"\1 ..."),
    (re.compile(r"\b\d{1,2}:\d{2}:\d{2}[.,]\d{3,}"), "..."),
    (
        re.compile(
            r"(?<![\w.])\d+\.\d+(?:e-?\d+)?[ ]?"
            r"(?:ns|us|µs|μs|ms|s|sec|secs|seconds?|milliseconds?|microseconds?)\b"
        ),
        "... s",
    ),
)
_CUT = "..."


def sanitize(text: str, *, max_lines: int, max_line_characters: int, max_characters: int) -> str:
    r"""Makes foreign text fit for a prompt.

    Args:
      text: any string, half surrogate pairs included.
      max_lines: lines that are kept; `... (n more lines)` stands for the others.
      max_line_characters: characters of a line that are kept before `...`.
      max_characters: characters of the result, a final `...` included; at least 3.

    Returns:
      Text of printable characters, tabs and `\n`, without trailing white space on any line.
    """
    lines = _printable(text).rstrip().split("\n")
    shown = [
        _cut(line.rstrip(), max_line_characters) for line in map(_normalize, lines[:max_lines])
    ]
    if len(lines) > max_lines:
        shown.append(f"... ({len(lines) - max_lines} more lines)")
    whole = "\n".join(shown)
    if len(whole) <= max_characters:
        return whole
    return whole[: max_characters - len(_CUT)].rstrip() + _CUT


def _printable(text: str) -> str:
    # A round trip through UTF-16 joins surrogate pairs and replaces lone halves.
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return _CONTROLS.sub("", _NEW_LINES.sub("\n", _ESCAPES.sub("", text)))


def _normalize(line: str) -> str:
    for pattern, word in _NOISE:
        line = pattern.sub(word, line)
    return line


def _cut(line: str, limit: int) -> str:
    return line if len(line) <= limit else line[:limit] + _CUT
