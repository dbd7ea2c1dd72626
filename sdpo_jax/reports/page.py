"""A page in one file: styles, script and data inside it, nothing from a network.

Text that a model or an environment wrote reaches a page as data alone: in a `application/json`
element whose `<`, `>` and `&` are escapes, so that no text can end it, or through `html.escape`.
A content security policy forbids every request, and every script but the page's own by its hash:
markup that slipped through would still not run.
"""

import base64
import hashlib
import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

ASSETS = Path(__file__).parent / "assets"


def asset(name: str) -> str:
    """A file that comes with the package."""
    return (ASSETS / name).read_text(encoding="utf-8")


def embedded_json(value: Any) -> str:
    r"""Compact JSON that may stand in a script element: ASCII, `<`, `>` and `&` escaped.

    >>> print(embedded_json("</script>\u2028"))
    "\u003c/script\u003e\u2028"
    """
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def page(
    title: str, body: str, *, styles: Sequence[str], scripts: Sequence[str], data: Any = None
) -> str:
    """The document.

    Args:
      title: plain text.
      body: markup, all foreign text in it escaped.
      styles: names of assets, after `page.css`.
      scripts: names of assets, after `page.js`; they run when the body is there.
      data: what the scripts find in the element `data`; None for nothing.
    """
    style = "\n".join(map(asset, ("page.css", *styles)))
    code = "\n".join(map(asset, ("page.js", *scripts)))
    digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; "
        "base-uri 'none'; form-action 'none'"
    )
    holder = ""
    if data is not None:
        holder = f'<script type="application/json" id="data">{embedded_json(data)}</script>\n'
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n"
        f"{body}\n{holder}<script>{code}</script>\n</body>\n</html>\n"
    )


def write_page(path: Path, text: str) -> None:
    """Writes a page, whole or not at all; what UTF-8 cannot hold becomes a question mark."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_bytes(text.encode("utf-8", errors="replace"))
    partial.replace(path)
