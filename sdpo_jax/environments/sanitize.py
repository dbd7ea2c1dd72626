r"""What a program printed, made fit for a prompt: bounded, printable, the same on every run.

Feedback becomes part of the teacher's prompt. Whatever changes from run to run (addresses, names of
temporary files, process ids, durations) would change the prompt, so that a resumed run would leave
the path of the one that was stopped; escapes and control characters would hide text from whoever
reads the logs. What spells a control token (`<|im_end|>`) stays as it is: the tokenizer encodes
foreign text without control tokens.

Normalised are: `0x...` addresses (after `at`, or of nine digits or more, so that `0xff` survives),
paths below temporary folders and `/proc`, process ids, clock times with fractions of a second, and
numbers with a decimal point and a unit of time. Whole seconds and bare numbers stay: they may be
what the program was asked for.

The SDPO reference cleans nothing and cuts by characters alone; all of this is a departure. Every
pattern is linear in the text: a program chooses the text.
"""

import re

# Terminal strings end at BEL, ST or the next escape; a lone introducer goes as a control character.
_ESCAPES = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]"
    r"|(?:\x1b[\]PX^_]|[\x90\x98\x9d\x9e\x9f])[^\x07\x1b\x9c\n]*(?:\x07|\x1b\\|\x9c)?"
    r"|\x1b[ -/]*[0-~]"
)
_NEW_LINES = re.compile("\r\n|[\r\x0b\x0c\x85\u2028\u2029]")
# Controls, and format characters that hide or reorder what follows (tags, directions, zero width).
_CONTROLS = re.compile(
    "[\x00-\x08\x0e-\x1f\x7f-\x9f\u00ad\u061c\u180e\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufeff"
    "\ufff9-\ufffb\U000e0000-\U000e007f]"
)
ADDRESS = re.compile(r"(?<=\bat )0x[0-9a-fA-F]+|\b0x[0-9a-fA-F]{9,}")
"""Of an object in memory, which changes from run to run."""
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


def clean(text: str, *, max_lines: int, max_line_characters: int, max_characters: int) -> str:
    r"""Foreign text for a prompt.

    Args:
      text: anything, half surrogate pairs included.
      max_lines: lines kept; a last line `... (n more lines)` then says how many were not.
      max_line_characters: of a line, before `...`.
      max_characters: of the result, its own `...` included; at least 3.

    Returns:
      Text of printable characters, tabs and `\n`, without white space at its ends of lines.
    """
    lines = _printable(text).rstrip().split("\n")
    shown = [_cut(line.rstrip(), max_line_characters) for line in map(_steady, lines[:max_lines])]
    if len(lines) > max_lines:
        shown.append(f"... ({len(lines) - max_lines} more lines)")
    whole = "\n".join(shown)
    if len(whole) <= max_characters:
        return whole
    return whole[: max_characters - len(_CUT)].rstrip() + _CUT


def _printable(text: str) -> str:
    # Through UTF-16, which joins the halves of a pair and replaces a half that is alone.
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return _CONTROLS.sub("", _NEW_LINES.sub("\n", _ESCAPES.sub("", text)))


def _steady(line: str) -> str:
    for pattern, word in _NOISE:
        line = pattern.sub(word, line)
    return line


def _cut(line: str, limit: int) -> str:
    return line if len(line) <= limit else line[:limit] + _CUT
