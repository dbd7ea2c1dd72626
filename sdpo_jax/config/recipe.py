"""Recipes: a TOML file and command-line options in, a `Config` out, and back.

File and options become one tree before anything is checked, so both answer to the same rules and
one error lists every problem of both. The rules stand in `_RANGES` (one value) and `_cross_checks`
(several). `--help` is drawn by tyro, with each option's docstring and its value from the recipe.
"""

import difflib
import hashlib
import json
import tomllib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from importlib import metadata
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, cast, get_args, get_origin, get_type_hints

from sdpo_jax.config import (
    Config,
    EnvironmentConfig,
    Objective,
    SdpoObjective,
)
from sdpo_jax.config.checks import contradictions, out_of_range
from sdpo_jax.errors import UserError

Tree = dict[str, Any]


class _Union(NamedTuple):
    """A section of which each kind has its own settings; the first kind is the default."""

    tag: str
    kinds: dict[str, type[Any]]


_UNIONS = {
    "objective": _Union("name", {cls().name: cls for cls in get_args(Objective)}),
    "environment": _Union("kind", {cls().kind: cls for cls in get_args(EnvironmentConfig)}),
}
_TYPE_NAMES: dict[Any, str] = {
    **{bool: "a boolean", int: "an integer", float: "a number"},
    **{str: "a string", list: "a list", dict: "a table"},
}

# A run may resume with these changed: they say where it writes, how far it goes and how the machine
# cuts the same sums. Resuming is bit for bit only where the cut (mesh, micro-batch, chunk) stays.
# Not environment.mounts: a program that imports numpy passes with it and fails without.
_MAY_CHANGE = {
    *("run_dir", "checkpoint.every_steps", "checkpoint.keep", "checkpoint.keep_best"),
    "optimizer.max_skipped_updates",
    *("mesh.data", "mesh.fsdp", "mesh.tensor", "model.remat", "model.attention"),
    *("train.micro_batch_tokens", "train.share_prompts", "train.head_chunk_tokens"),
    *("rollout.slots", "evaluation.batch_prompts", "environment.slots", "environment.workers"),
    *("environment.deadline_seconds", "environment.max_failed_share"),
    *("environment.sandbox", "environment.sandbox_url"),
}


class _Problem(NamedTuple):
    text: str
    key: str
    others: tuple[str, ...] = ()  # the other settings that take part


def load_recipe(
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    values: Mapping[str, Any] = MappingProxyType({}),
) -> Config:
    """Reads a recipe and applies command-line options; one `UserError` lists what is wrong in both.

    Args:
        path: a TOML file with the sections and keys of `Config`; what it leaves out is the default.
        overrides: options such as `--train.steps 40`, `--optimizer.learning-rate=1e-3`,
            `--teacher.no-feedback`, `--environment.families a b`. Later ones win. `--help` prints
            every option with its value and exits.
        values: overrides from Python, `{"train.steps": 40}`.
    """
    path = Path(path)
    tree = _read_toml(path)
    arguments = [word for word in overrides if word not in ("-h", "--help")]
    spelled, lines = _apply_overrides(tree, arguments)
    spelled |= _apply_values(tree, values)
    config = _checked(tree, spelled, lines, f"{path}: ")
    if len(arguments) < len(overrides):
        _print_help(config, path)
    return config


def override(config: Config, values: Mapping[str, Any]) -> Config:
    """The config with other values, `{"train.steps": 40}`; checked as `load_recipe` does."""
    tree: Tree = {}
    _apply_values(tree, _leaves(config))
    return _checked(tree, _apply_values(tree, values), [], "")


def _apply_values(tree: Tree, values: Mapping[str, Any]) -> dict[str, str]:
    """Writes values into the tree; returns the spelling of each key."""
    for key, value in values.items():
        section, _, leaf = key.rpartition(".")
        table = tree.setdefault(section, {}) if section else tree
        if isinstance(table, dict):  # otherwise the section itself is reported
            table[leaf] = list(value) if isinstance(value, tuple) else value
    return {key: key for key in values}


def _checked(tree: Tree, spelled: Mapping[str, str], lines: list[str], where: str) -> Config:
    """The config of a tree; one error with `lines` and every problem of the tree."""
    config, found = _build(tree)
    broken = {problem.key for problem in found}
    found += [p for p in _checks(config) if broken.isdisjoint((p.key, *p.others))]
    lines += [f"{spelled.get(p.key, f'{where}{p.key}')}: {p.text}" for p in found]
    if lines:
        raise UserError("\n  ".join([f"{len(lines)} problems:", *lines][len(lines) == 1 :]))
    return config


def problems(config: Config) -> list[str]:
    """Lists what is wrong with a config's values, each as `key: value, expected ...`."""
    return [f"{problem.key}: {problem.text}" for problem in _checks(config)]


def to_toml(config: Config) -> str:
    """Writes every setting, defaults included; `load_recipe` of it gives the same config."""
    lines = [f"# Every setting of a run, written by sdpo-jax {_version()}."]
    section = ""
    for key, value in _leaves(config).items():
        before, (section, _, name) = section, key.rpartition(".")
        lines += ["", f"[{section}]"] if section != before else []
        lines.append(f"{name} = {_toml(value)}")
    return "\n".join([*lines, ""])


def fingerprint(config: Config) -> str:
    """Hashes every setting that must stay when a run resumes.

    Left out: `run_dir`, `checkpoint.*`, the limit on skipped updates, the mesh and the sizes of the
    pieces (they reorder the same sums; bit-for-bit resumption needs them unchanged too), and the
    number of steps as long as no schedule ends with it: a cosine does, and a distillation's decay.
    """
    kept = {key: value for key, value in _leaves(config).items() if key in _fixed(config)}
    return hashlib.blake2b(json.dumps(kept, sort_keys=True).encode(), digest_size=8).hexdigest()


def differences(old: Config, new: Config) -> list[str]:
    """Lists what keeps `new` from resuming `old`; empty exactly if the fingerprints agree."""
    before, after = _leaves(old), _leaves(new)
    kept = _fixed(old) | _fixed(new)
    pairs = {key: (before.get(key), after.get(key)) for key in [*before, *after] if key in kept}
    return [
        f"{key}: the run has {_toml(ours)}, the recipe has {_toml(theirs)}"
        for key, (ours, theirs) in pairs.items()
        if ours != theirs
    ]


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_bytes().decode("utf-8-sig"))
    except FileNotFoundError:
        message = f"no such recipe; {_recipes_near(path, path.parent)}"
    except IsADirectoryError:
        message = f"a folder, expected a TOML file; {_recipes_near(path, path)}"
    except OSError as error:
        message = f"cannot be read: {error.strerror}"
    except UnicodeDecodeError as error:
        message = f"not UTF-8 at byte {error.start + 1}; save the file as UTF-8"
    except tomllib.TOMLDecodeError as error:
        message = f"not valid TOML: {error}"
    raise UserError(f"{path}: {message}")


def _recipes_near(path: Path, folder: Path) -> str:
    paths = {*folder.glob("*.toml"), *Path("configs").glob("*.toml")}
    names = sorted(str(found) for found in paths)
    near = [name for name in names if Path(name).stem == path.stem]
    near = near or difflib.get_close_matches(str(path), names, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    return f"{hint}available: {', '.join(names) or 'none here and none in configs/'}"


def _apply_overrides(tree: Tree, words: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Writes options into the tree; returns the spelling of each key, and what is no option."""
    spelled: dict[str, str] = {}
    lines: list[str] = []
    kinds = _kinds()
    queue = list(words)
    while queue:
        word = queue.pop(0)
        name, equals, text = word.removeprefix("--").partition("=")
        key = name.replace("-", "_")
        if not equals and ".no_" in key and kinds.get(key.replace(".no_", ".")) is bool:
            key, equals, text = key.replace(".no_", "."), "=", "false"
        if not word.startswith("--"):
            remedy = f"--{name} VALUE" if key in kinds else "options look like --train.steps 40"
            lines.append(f"{word}: unexpected argument; {remedy}")
        elif key not in kinds:
            lines.append(f"--{name}: unknown option; {_nearest(key, kinds, _flag)}")
            _take_values(tuple, queue)
        else:
            values = [text] if equals else _take_values(get_origin(kinds[key]) or kinds[key], queue)
            if not values and get_origin(kinds[key]) is not tuple:
                lines.append(f"--{name}: no value, expected {_expected(kinds[key])}")
                continue
            spelled[key] = f"--{name}"
            section, _, leaf = key.rpartition(".")
            table = tree.setdefault(section, {}) if section else tree
            if isinstance(table, dict):  # otherwise the section itself is reported
                table[leaf] = _parse(kinds[key], values)
    return spelled, lines


def _take_values(kind: Any, queue: list[str]) -> list[str]:
    """Takes the words that belong to an option: a list takes all up to the next option."""
    if kind is bool:
        explicit = queue and queue[0].lower() in ("true", "false")
        return [queue.pop(0)] if explicit else ["true"]
    values: list[str] = []
    while queue and not queue[0].startswith("--") and (kind is tuple or not values):
        values.append(queue.pop(0))
    return values


def _parse(kind: Any, values: list[str]) -> Any:
    """Turns an option's text into a value; what does not parse stays text and fails the check."""
    if get_origin(kind) is tuple:
        return [value for value in values if value]
    if kind is bool:
        return {"true": True, "false": False}.get(values[0].lower(), values[0])
    try:
        return kind(values[0]) if kind in (int, float) else values[0]
    except ValueError:
        return values[0]


def _build(tree: Tree) -> tuple[Config, list[_Problem]]:
    """Builds a config from what is sound in a tree, and lists the rest."""
    found: list[_Problem] = []
    kinds = get_type_hints(Config)
    sections = [f.name for f in fields(Config) if is_dataclass(getattr(Config(), f.name))]
    top = {name: kind for name, kind in kinds.items() if name not in sections}
    values = _table(tree, top, "", found, known=sections)
    for section in [name for name in tree if name in sections]:
        table = tree[section]
        if not isinstance(table, dict):
            found.append(_Problem(f"{_describe(table)}, expected a table [{section}]", section))
        elif section in _UNIONS:
            values[section] = _one_of(section, cast(Tree, table), found)
        else:
            leaves = get_type_hints(kinds[section])
            values[section] = kinds[section](**_table(cast(Tree, table), leaves, section, found))
    return Config(**values), found


def _one_of(section: str, table: Tree, found: list[_Problem]) -> Any:
    """Builds the kind that the tag picks; a setting of another kind is a problem."""
    tag, classes = _UNIONS[section]
    kinds = {name: get_type_hints(cls) for name, cls in classes.items()}
    default = next(iter(kinds))
    name = table.get(tag, default)
    if name not in list(kinds):
        every = {key: kind for own in kinds.values() for key, kind in own.items()}
        _table(table, every | {tag: Literal[tuple(kinds)]}, section, found)
        return classes[default]()
    own = dict(table)
    for key in table:
        owners = [other for other in kinds if key in kinds[other]]
        if owners and name not in owners:
            del own[key]
            hint = "" if tag in table else f" (the default; set {section}.{tag})"
            text = f"a setting of {' and '.join(owners)}, but the {section} is {name}{hint}"
            found.append(_Problem(text, f"{section}.{key}"))
    return classes[name](**_table(own, kinds[name], section, found))


def _table(
    table: Tree, kinds: Tree, section: str, found: list[_Problem], known: Collection[str] = ()
) -> Tree:
    """Converts the values of one table and drops, with a report, what does not fit."""
    values: Tree = {}
    for name, raw in table.items():
        key = f"{section}.{name}" if section else name
        if name in kinds:
            value = _convert(kinds[name], raw)
            if value is not None:
                values[name] = value
                continue
            text = f"{_describe(raw)}, expected {_expected(kinds[name], raw)}"
            found.append(_Problem(text, key))
        elif name not in known:
            found.append(_Problem(f"unknown key; {_nearest(key, _kinds())}", key))
    return values


def _convert(kind: Any, raw: Any) -> Any:
    """Returns the value as `kind`, or None. A boolean is no number, an integer serves as float."""
    if get_origin(kind) is Literal:
        return raw if isinstance(raw, str) and raw in get_args(kind) else None
    if get_origin(kind) is tuple:
        items = cast(list[Any], raw) if isinstance(raw, list) else [None]
        return tuple(items) if all(type(item) is get_args(kind)[0] for item in items) else None
    if kind is float and type(raw) is int:
        return float(raw)
    return raw if type(raw) is kind else None


def _checks(config: Config) -> Iterator[_Problem]:
    leaves = _leaves(config)
    for key, expectation in out_of_range(leaves):
        yield _Problem(f"{_toml(leaves[key])}, expected {expectation}", key)
    for key, others, expectation in contradictions(config):
        text = f"{_toml(leaves[key])}, expected {expectation}"
        tags = [f"{section}.{union.tag}" for section, union in _UNIONS.items()]
        yield _Problem(text, key, (*others.split(), *tags))


def _kinds() -> Tree:
    """Maps every dotted key, of all objectives and environments, to its type."""
    found: Tree = {f"{s}.{u.tag}": Literal[tuple(u.kinds)] for s, u in _UNIONS.items()}
    for name, kind in get_type_hints(Config).items():
        for cls in _UNIONS[name].kinds.values() if name in _UNIONS else (kind,):
            leaves = get_type_hints(cls) if is_dataclass(cls) else {}
            own = {f"{name}.{leaf}": of for leaf, of in leaves.items()} or {name: kind}
            found = own | found
    return found


def _leaves(config: Config) -> Tree:
    found: Tree = {}
    for field in fields(config):
        value = getattr(config, field.name)
        if is_dataclass(value):
            found |= {f"{field.name}.{f.name}": getattr(value, f.name) for f in fields(value)}
        else:
            found[field.name] = value
    return found


def _fixed(config: Config) -> set[str]:
    bends = config.optimizer.schedule != "constant" or (
        isinstance(config.objective, SdpoObjective)
        and config.objective.distillation_decay_steps > 0
    )
    steps = set[str]() if bends else {"train.steps"}
    return set(_leaves(config)) - _MAY_CHANGE - steps


def _nearest(key: str, kinds: Collection[str], spell: Callable[[str], str] = str) -> str:
    """Says which key was meant: a near one in the section, the same name elsewhere, a near one."""
    section, _, leaf = key.rpartition(".")
    siblings = [k for k in kinds if k.rpartition(".")[0] == section]
    sections = sorted({k.rpartition(".")[0] for k in kinds} - {""})
    names = {k.rpartition(".")[2]: k for k in siblings} | (
        {} if section else dict.fromkeys(sections)
    )
    near = [names[name] or name for name in _close(leaf, names)]
    near = near or [k for k in kinds if k.rpartition(".")[2] == leaf] or _close(key, kinds)
    if near:
        return f"did you mean {spell(near[0])}?"
    return f"known here: {', '.join(siblings if section and siblings else sections)}"


def _flag(key: str) -> str:
    return f"--{key.replace('_', '-')}"


def _close(word: str, names: Collection[str]) -> list[str]:
    return difflib.get_close_matches(word, names, n=1)


def _expected(kind: Any, raw: Any = None) -> str:
    if get_origin(kind) is Literal:
        choices = ", ".join(map(_toml, get_args(kind)))
        near = _close(raw, get_args(kind)) if isinstance(raw, str) else []
        return f"one of {choices}" + (f"; did you mean {_toml(near[0])}?" if near else "")
    return "a list of strings" if get_origin(kind) is tuple else _TYPE_NAMES[kind]


def _describe(value: Any) -> str:
    name = _TYPE_NAMES.get(type(value), f"a {type(value).__name__}")
    return "a table" if isinstance(value, dict) else f"{_toml(value)} ({name})"


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_toml, cast(Sequence[Any], value)))}]"
    return "nothing" if value is None else str(value)


def _version() -> str:
    try:
        return metadata.version("sdpo-jax")
    except metadata.PackageNotFoundError:
        return "(source tree)"


def _print_help(config: Config, path: Path) -> None:
    import tyro  # only --help needs it

    text = f"Every setting of {path}; an option replaces the recipe's value, shown as the default."
    for section, union in _UNIONS.items():
        flag, own = _flag(f"{section}.{union.tag}"), getattr(config, section)
        others = [name for name, kind in union.kinds.items() if not isinstance(own, kind)]
        text += f" {flag} may also be {', '.join(others)}, each with settings of its own."
    kind = tyro.conf.AvoidSubcommands[Config]
    tyro.cli(kind, default=config, args=["--help"], prog=f"sdpo train {path}", description=text)
