r"""One spelling for answers in mathematics, and the words beside their numbers."""

import re

MAX_CHARACTERS = 500
"""A longer answer is compared as it stands: some expressions here take quadratic time."""


def _by_name(table: str) -> dict[str, str]:
    """Reads rows of names, separated by `;`, as a map from each name to the first of its row."""
    rows = [row.split() for row in table.split(";")]
    return {name: row[0] for row in rows for name in row}


_CHARACTERS = _by_name(
    "- \u2212 \u2013; / \u00f7; \\times \u00d7; \\cdot \u00b7; \\pi \u03c0; \\infty \u221e;"
    "\\cup \u222a; \\sqrt \u221a; \\emptyset \u2205; \\leq \u2264; \\geq \u2265; \\neq \u2260;"
    "\\ldots \u2026"
)
_SYNONYMS = _by_name(
    r"\frac dfrac tfrac cfrac; \binom dbinom tbinom; \emptyset varnothing; \leq le leqslant;"
    r"\geq ge geqslant; \neq ne; < lt; > gt; | lvert rvert vert; \{ lbrace; \} rbrace;"
    "\u00b0 degree;" + r"\ldots dots cdots dotsc dotsb dotsm; \| |"
) | dict.fromkeys([*"! ,>:;", "quad", "qquad", "thinspace", "enspace"], " ")
"""What a command is replaced by; spacing commands are blanks."""
_DROPPED = re.compile(
    r"(?<!\\)\\(?:(?:left|right|displaystyle|textstyle|[bB]igg?[lr]?)(?![A-Za-z])|[$()\[\]])|\$"
)
_COMMAND = re.compile(r"\\([A-Za-z]+|.)", re.DOTALL)
_SEPARATOR = re.compile(
    r"(?<=\d)(?:\{,\}(?:\\!)?|,\\!\s*|(?:\\[!,;:> ]|\\thinspace|[~'\u00a0\u2009\u202f])\s*)"
    r"(?=\d{3}(?!\d))"
)
_RULES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"[~\s]+", " "),
        (r"\\not ?=|!=", r"\\neq "),
        (r"<=", r"\\leq "),
        (r">=", r"\\geq "),
        (r"\.{3}", r"\\ldots "),
        (r"\\\{ ?\\\}", r"\\emptyset "),
        # Degrees, percent, times of the day.
        (r"\^ ?(?:\{ ?\\circ ?\}|\\circ(?![A-Za-z]))| ?\\text\{ ?degrees? ?\}", "\u00b0"),
        (r" ?(?<![A-Za-z])degrees?\b", "\u00b0"),
        ("\u00b0 ?(?:\\\\(?:text|mathrm)\\{ ?)?([CF])\\b\\}?", r"\\text{ degree\1}"),
        (r"\\text\{ ?(?:percent(?:age)?|pct) ?\}|(?<![A-Za-z])(?:percent(?:age)?|pct)\b", "%"),
        (r" ?\\?%", r"\\%"),
        (r"\b([ap])\. ?m\b\.?", r"\1m"),
        # A missing zero, missing braces, needless parentheses.
        (r"(?<![\d.])\.(?=\d)", "0."),
        (r"\*\*", "^"),
        (r"([_^]) ?(\d+|[A-Za-z])", r"\1{\2}"),
        (r"\^ ?\(([^()]*)\)", r"^{\1}"),
        (r"\\frac ?([A-Za-z\d])", r"\\frac{\1}"),
        (r"\\frac(\{(?:[^{}]|\{[^{}]*\})*\}) ?([A-Za-z\d])", r"\\frac\1{\2}"),
        (r"\\?sqrt ?(?:\(([^()]*)\)|([A-Za-z\d]))", r"\\sqrt{\1\2}"),
        (r"(\\(?:text|mathrm)\{[^{}^]*)\^\{(\d)\}\}", r"\1}^{\2}"),
        (r"\((\d+)\) ?_", r"\1_"),
    )
]
_THOUSANDS = re.compile(r"(?<![\d.,_^{])(\d{1,3}(?:,\d{3})+|\d{1,2}(?:,\d\d)+,\d{3})(?![\d,])")
_SPACED = re.compile(r"(?<![\d.,] )(?<![\w.,])([1-9]\d{0,2}(?: \d{3})+)(?! ?[\d/])")
_MIXED = re.compile(r"(?<![\w.,}\\)^/])(\d+) (\d+) ?/ ?(\d+)(?! ?[\d/])")
_REPEATING = re.compile(
    r"(\d*)\.(\d*)(?:\\(?:overline|bar|dot) ?(?:\{(\d+)\}|(\d))|\((\d+)\)(?![\w(^!]))"
)
_SCIENTIFIC = re.compile(r"(?<![\w.\\}])(\d+(?:\.\d+)?)[eE]\+?(-?)0*(\d+)(?![\w.])")
# `2e-1` may be twice e less one; `1e-05`, `2.5e-1` and `3e8` are numbers.
_EULER = re.compile(r"(?<![\w.\\}])(?!1[eE])\d+[eE]-\d(?![\w.])")
_TEXT = re.compile(
    r"\\(?:text[a-z]*|math(?:rm|bf|it|sf|tt|normal)|mbox|operatorname)\*? ?\{([^{}]*)\}"
)
_FUNCTIONS = "sin cos tan cot sec csc sinh cosh tanh arcsin arccos arctan log ln exp max min"
FUNCTIONS = frozenset(_FUNCTIONS.split())
"""Names of functions that the parser reads as commands."""
_WORDS = re.compile(r"[^\W\d_]+(?:['-][^\W\d_]+)*")
LETTERS = re.compile(r"[^\W\d_]{2,}(?:[ '-]+[^\W\d_]+)*")
_BARE = re.compile(r"(?<![\\A-Za-z_^{(\0])[A-Za-z]{2,}(?:-[A-Za-z]+)*(?![A-Za-z(_^}])\.?")
_UNITS = _by_name(
    "km kilometer kilometre; m meter metre; cm centimeter centimetre; mm millimeter millimetre;"
    "mile mi; ft foot feet; in inch inche; yard yd; kg kilogram; g gram; mg milligram; lb pound;"
    "oz ounce; ton tonne; s second sec; min minute; h hour hr; day; week; month; year yr; cent;"
    "dollar usd; euro eur; l liter litre; ml milliliter millilitre; mph; degree deg; radian rad;"
    "unit; gallon gal; square sq; cubic; per"
)


def same_text(given: str, answer: str) -> bool:
    r"""Whether two answers are the same text, whatever their spacing, `\text{}` and the like."""
    return given == answer or plain(given) == plain(answer)


def plain(answer: str) -> str:
    r"""An answer in one spelling without `\text{}`: words in lower case, others without spaces.

    A blank between two digits or two letters stays: `1 1/2` is not `11/2`.
    """
    if len(answer) > MAX_CHARACTERS:
        return "".join(answer.split())
    text = " ".join(_TEXT.sub(r" \1 ", spelled(answer)).split()).removesuffix(".").strip()
    if LETTERS.fullmatch(text) and (len(text) > 2 or text.capitalize() in ("No", "Am", "Pm")):
        return text.casefold().replace("-", " ")
    return re.sub(r"(?<=\d) (?!\d)|(?<=[A-Za-z]) (?![A-Za-z])|(?<![A-Za-z\d]) ", "", text)


def spelled(answer: str) -> str:
    """One spelling for spaces, thousands, operators, mixed numbers and repeating decimals."""
    text = answer if "\\begin" in answer else re.sub(r"\\\\(?=[A-Za-z(])", r"\\", answer)
    named = (_CHARACTERS.get(character, character) for character in text)
    text = "".join(name if len(name) == 1 else f"{name} " for name in named)
    text = _DROPPED.sub("", _SEPARATOR.sub("", text))
    text = _COMMAND.sub(lambda match: _SYNONYMS.get(match[1], match[0]), text)
    for pattern, replacement in _RULES:
        text = pattern.sub(replacement, text)
    text = _SPACED.sub(lambda match: match[1].replace(" ", ""), text)
    text = _MIXED.sub(_mixed, _REPEATING.sub(_repeating, text))
    return text.strip().removesuffix(".").strip()


def _repeating(match: re.Match[str]) -> str:
    r"""`0.1\overline{6}` as a fraction."""
    whole, fixed, block = match[1] or "0", match[2], match[3] or match[4] or match[5]
    above = int(whole + fixed + block) - int(whole + fixed)
    return rf"\frac{{{above}}}{{{'9' * len(block)}{'0' * len(fixed)}}}"


def _mixed(match: re.Match[str]) -> str:
    whole, above, below = (int(part) for part in match.groups())
    return rf"\frac{{{whole * below + above}}}{{{below}}}" if above < below else match[0]


def readings(answer: str) -> list[tuple[str, tuple[str, ...]]]:
    """An answer without its words, and the words; `1,234` and `2e-1` have two readings each."""
    text = spelled(answer)
    merged = _THOUSANDS.sub(lambda match: match[1].replace(",", ""), text)
    texts = [_SCIENTIFIC.sub(r"\1\\times 10^{\2\3}", reading) for reading in (merged, text)]
    return [split_words(reading) for reading in dict.fromkeys([*texts, *_EULER.findall(text)])]


def split_words(text: str) -> tuple[str, tuple[str, ...]]:
    """Takes the words and units out of an answer: they are compared apart from its formulas."""
    if not re.search(r"[<>]|\\(?:leq|geq|neq)", text):
        text = re.sub(r",? ?(?:\\text\{ ?(?:and|or) ?\}|(?<![A-Za-z])(?:and|or)\b) ?", ", ", text)
    text = _BARE.sub(_marked_word, re.sub(_TEXT.pattern + r" ?(\^\{\d\})?", _marked_text, text))
    words = [word.casefold() for word in re.findall("\0([^\0]*)\0", text)]
    singular = [_UNITS.get(w) or _UNITS.get(w.removesuffix("s")) or w for w in words]
    text = re.sub("\0[^\0]*\0", " ", text)
    if not re.search(r"\\(?:sin|cos|tan|cot|sec|csc)", text):
        text = text.replace("\u00b0", "")
    return " ".join(text.split()).strip(" ,;"), tuple(singular)


def is_unit(word: str) -> bool:
    """Whether a word names a unit of measure, which may have an exponent."""
    return word.partition("^")[0] in _UNITS.values()


def _marked_text(match: re.Match[str]) -> str:
    r"""The content of `\text{}` with its words between marks; a letter may be a variable."""
    measured = re.search(r"[\d)}%\u00b0] ?$", match.string[: match.start()])

    def marked(word: re.Match[str]) -> str:
        is_word = len(word[0]) > 1 or (measured and word[0].casefold() in _UNITS)
        return f"\0{word[0]}\0" if is_word else word[0]

    text, exponent = _WORDS.sub(marked, match[1]).rstrip(), match[2] or ""
    return f" {text[:-1]}{exponent}\0 " if text.endswith("\0") else f" {text}{exponent} "


def _marked_word(match: re.Match[str]) -> str:
    r"""Letters outside `\text{}` between marks, if they are a word and no product of variables."""
    name, before = match[0].rstrip(".").casefold(), match.string[: match.start()]
    near = before.rstrip()[-1:] + match.string[match.end() :].lstrip()[:1]
    is_known = is_unit(_UNITS.get(name, _UNITS.get(name.removesuffix("s"), ""))) or name in "ampm"
    in_formula = re.search(r"[-+*/^=<>]", near) or not re.search(r"(?:^|[\s\d}%\0\u00b0])$", before)
    is_word = is_known or (len(name) > 2 and name not in FUNCTIONS)
    if not near or in_formula or not is_word:
        return match[0]
    return f"\0{name}\0"
