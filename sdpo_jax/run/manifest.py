"""The manifest of a complete checkpoint: its arrays and its files, with their hashes."""

import json
import re
from functools import partial
from hashlib import blake2b, file_digest
from pathlib import Path
from typing import Any

from sdpo_jax.run.run_directory import write_atomically

MANIFEST = "sdpo_manifest.json"


class Damaged(Exception):
    """A step's files disagree with its manifest; the message names the file."""


def numbered(directory: Path) -> list[int]:
    """Numbers of all directories that have a number as their name, ascending."""
    if not directory.is_dir():
        return []
    numbers = [path for path in directory.iterdir() if re.fullmatch(r"0|[1-9]\d*", path.name)]
    return sorted(int(path.name) for path in numbers if path.is_dir())


def complete(directory: Path) -> list[int]:
    """Steps that have a manifest, ascending; their files are not verified."""
    return [step for step in numbered(directory) if (directory / str(step) / MANIFEST).exists()]


def _hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return file_digest(file, partial(blake2b, digest_size=32)).hexdigest()


def _hash_json(body: dict[str, Any]) -> str:
    return blake2b(json.dumps(body, sort_keys=True).encode(), digest_size=32).hexdigest()


def write(path: Path, step: int, arrays: dict[str, Any]) -> None:
    """Hashes every file of a committed step; the rename at the end makes the step complete.

    Args:
        path: of the step's folder.
        step: its number.
        arrays: name -> [dtype, shape] of every array of the state.
    """
    files = {
        str(file.relative_to(path)): {"bytes": file.stat().st_size, "blake2b": _hash_file(file)}
        for file in sorted(path.rglob("*"))
        if file.is_file() and not file.name.startswith(MANIFEST)
    }
    body = {"format": 1, "step": step, "arrays": arrays, "files": files}
    signed = {"blake2b": _hash_json(body), "body": body}
    write_atomically(path / MANIFEST, json.dumps(signed, indent=1))


def read(path: Path) -> dict[str, Any]:
    """Reads `arrays` and `files` of the manifest in a step's folder.

    Raises:
        Damaged: the file is missing, cut off or altered.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        body = manifest["body"]
        intact = manifest["blake2b"] == _hash_json(body)
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise Damaged(f"{MANIFEST} cannot be read ({error})") from error
    if not intact:
        raise Damaged(f"{MANIFEST} was altered")
    return body


def verify(path: Path) -> None:
    """Compares every file of a step with the manifest.

    Raises:
        Damaged: names the first file that differs.
    """
    for name, expected in read(path)["files"].items():
        file = path / name
        if not file.is_file():
            raise Damaged(f"{name} is missing")
        if (size := file.stat().st_size) != expected["bytes"]:
            raise Damaged(f"{name} has {size} bytes instead of {expected['bytes']}")
        if _hash_file(file) != expected["blake2b"]:
            raise Damaged(f"{name} was altered (its hash differs from the manifest)")
