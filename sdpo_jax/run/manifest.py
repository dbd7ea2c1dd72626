"""The manifest of a complete checkpoint: its arrays and its files, with their hashes."""

import json
import os
import re
from hashlib import blake2b
from pathlib import Path
from typing import Any

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
    digest = blake2b(digest_size=32)
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _hash_json(body: dict[str, Any]) -> str:
    return blake2b(json.dumps(body, sort_keys=True).encode(), digest_size=32).hexdigest()


def write_manifest(path: Path, step: int, arrays: dict[str, Any]) -> None:
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
    partial = path / f"{MANIFEST}.partial"
    with partial.open("w") as file:
        json.dump({"blake2b": _hash_json(body), "body": body}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path / MANIFEST)


def read_manifest(path: Path) -> dict[str, Any]:
    """Reads `arrays` and `files` of a manifest.

    Raises:
        Damaged: the file is missing, cut off or altered.
    """
    try:
        manifest = json.loads(path.read_bytes())
        body = manifest["body"]
        intact = manifest["blake2b"] == _hash_json(body)
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise Damaged(f"{path.name} cannot be read ({error})") from error
    if not intact:
        raise Damaged(f"{path.name} was altered")
    return body


def verify(path: Path) -> None:
    """Compares every file of a step with the manifest.

    Raises:
        Damaged: names the first file that differs.
    """
    for name, expected in read_manifest(path / MANIFEST)["files"].items():
        file = path / name
        if not file.is_file():
            raise Damaged(f"{name} is missing")
        if file.stat().st_size != expected["bytes"]:
            size = file.stat().st_size
            raise Damaged(f"{name} has {size} bytes instead of {expected['bytes']}")
        if _hash_file(file) != expected["blake2b"]:
            raise Damaged(f"{name} was altered (its hash differs from the manifest)")
