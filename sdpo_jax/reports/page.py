"""Self-contained HTML pages: styles, script and data in one file, no network requests.

Text that a model or an environment wrote is data, never markup: it is in an `application/json`
element whose `<`, `>` and `&` are escaped, so that no text can end the element, or it passes
`html.escape`. A content security policy forbids every request and every script but the page's own,
which it names by hash, so that injected markup would not run.
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
    """The text of a file of the package."""
    return (ASSETS / name).read_text(encoding="utf-8")


def embedded_json(value: Any) -> str:
    r"""Compact JSON that is safe in a script element: ASCII, with `<`, `>` and `&` escaped.

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
      body: markup, in which all foreign text is escaped.
      styles: names of assets, after `page.css`.
      scripts: names of assets, after `page.js`; they run after the body.
      data: content of the element `data` for the scripts; None: no such element.
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
    """Writes a page atomically; characters that UTF-8 cannot hold become question marks."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_bytes(text.encode("utf-8", errors="replace"))
    partial.replace(path)
