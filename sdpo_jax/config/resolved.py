"""A resolved config as text, its fingerprint, and its differences from another one."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import Field, fields, is_dataclass
from importlib import metadata
from typing import Any, cast

from sdpo_jax.config import Config


def walk(config: Config) -> Iterator[tuple[str, Field[Any], Any]]:
    """Yields key, field and value of every setting, in the order of the classes."""
    for part in fields(config):
        value = getattr(config, part.name)
        if is_dataclass(value):
            for own in fields(value):
                yield f"{part.name}.{own.name}", own, getattr(value, own.name)
        else:
            yield part.name, part, value


def flatten(config: Config) -> dict[str, Any]:
    """Every setting's value by its key, `SECTION.NAME`."""
    return {key: value for key, _, value in walk(config)}


def to_toml(config: Config) -> str:
    """Writes every setting, defaults included; reading it gives the same config."""
    lines = [f"# Every setting of a run, written by sdpo-jax {_version()}."]
    section = ""
    for key, value in flatten(config).items():
        before, (section, _, name) = section, key.rpartition(".")
        lines += ["", f"[{section}]"] if section != before else []
        lines.append(f"{name} = {toml_value(value)}")
    return "\n".join([*lines, ""])


def fingerprint(config: Config) -> str:
    """Hashes every setting that must stay when a run resumes.

    Left out are the fields that `may_change` (bit-for-bit resumption needs some of them unchanged,
    too: the mesh and the micro-batches reorder the same sums), and the number of steps as long as
    no schedule ends with it: a cosine does, and an objective may have one.
    """
    kept = {key: value for key, value in flatten(config).items() if key in _fixed(config)}
    return hashlib.blake2b(json.dumps(kept, sort_keys=True).encode(), digest_size=8).hexdigest()


def differences(old: Config, new: Config) -> list[str]:
    """Lists what keeps `new` from resuming `old`; empty exactly if the fingerprints agree."""
    before, after = flatten(old), flatten(new)
    kept = _fixed(old) | _fixed(new)
    pairs = {key: (before.get(key), after.get(key)) for key in [*before, *after] if key in kept}
    return [
        f"{key}: the run has {toml_value(ours)}, the recipe has {toml_value(theirs)}"
        for key, (ours, theirs) in pairs.items()
        if ours != theirs
    ]


def toml_value(value: Any) -> str:
    """A value as TOML writes it; `nothing` for None."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(toml_value, cast(Sequence[Any], value)))}]"
    return "nothing" if value is None else str(value)


def _fixed(config: Config) -> set[str]:
    """Keys of the settings that a resumed run must leave as they are."""
    ends = config.optimizer.schedule != "constant" or config.objective.depends_on_steps
    fixed = {key for key, own, _ in walk(config) if not own.metadata.get("may_change", False)}
    return fixed if ends else fixed - {"train.steps"}


def _version() -> str:
    try:
        return metadata.version("sdpo-jax")
    except metadata.PackageNotFoundError:
        return "(source tree)"
