"""The recipe reader: a TOML file and command-line options in, a `Config` out.

File and options become one tree before anything is checked, so both answer to the same rules and
one error lists every problem of both. Which objectives and environments there are is an argument
(`Kinds`). `--help` is drawn by tyro, with each option's docstring and its value from the recipe.
"""

import difflib
import tomllib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, cast, get_args, get_origin, get_type_hints

from sdpo_jax.config import Config, EnvironmentConfig, ObjectiveConfig
from sdpo_jax.config.checks import contradictions, out_of_range
from sdpo_jax.config.resolved import flatten, toml_value
from sdpo_jax.errors import UserError

Tree = dict[str, Any]

RENAMED = {
    "rollout.ahead": "rollout.one_step_off_policy",
    "environment.say_wrong": "environment.report_incorrect",
    "environment.own_wording": "environment.dataset_prompt",
    "environment.asides": "environment.allow_preamble",
}
"""Keys of earlier versions, each with its new name."""

_TYPE_NAMES: dict[Any, str] = {
    **{bool: "a boolean", int: "an integer", float: "a number"},
    **{str: "a string", list: "a list", dict: "a table"},
}


class Kinds(NamedTuple):
    """The settings classes that a recipe may choose from, by name; the first is the default."""

    objectives: Mapping[str, type[ObjectiveConfig]]
    environments: Mapping[str, type[EnvironmentConfig]]


class _Union(NamedTuple):
    """A section with one settings class per kind; the key `tag` holds the kind's name."""

    tag: str
    kinds: Mapping[str, type[Any]]


class _Schema(NamedTuple):
    """What a recipe may hold."""

    unions: dict[str, _Union]
    types: Tree
    """The type of every key, of all objectives and environments."""


class _Fault(NamedTuple):
    key: str
    text: str


def read_recipe(
    path: str | Path,
    overrides: Sequence[str],
    kinds: Kinds,
    values: Mapping[str, Any] = MappingProxyType({}),
) -> Config:
    """Reads a recipe and applies command-line options.

    Args:
        path: a TOML file with the sections and keys of `Config`; what it leaves out is the default.
        overrides: options such as `--train.steps 40`, `--optimizer.learning-rate=1e-3`,
            `--teacher.no-feedback`, `--environment.families a b`. Later ones win. `--help` prints
            every option with its value and exits.
        kinds: the objectives and environments that the recipe may name.
        values: overrides from Python, `{"train.steps": 40}`.

    Raises:
        UserError: lists everything that is wrong in both.
    """
    path = Path(path)
    schema = _schema(kinds)
    tree = _read_toml(path)
    arguments = [word for word in overrides if word not in ("-h", "--help")]
    spelled, lines = _apply_overrides(tree, arguments, schema.types)
    spelled |= _apply_values(tree, values)
    config = _checked(tree, schema, spelled, lines, f"{path}: ")
    if len(arguments) < len(overrides):
        _print_help(config, path, schema.unions)
    return config


def override(config: Config, values: Mapping[str, Any], kinds: Kinds) -> Config:
    """The config with other values, `{"train.steps": 40}`; checked as `read_recipe` does.

    Raises:
        UserError: lists everything that is wrong.
    """
    tree, schema, current = Tree(), _schema(kinds), flatten(config)
    _apply_values(tree, current)
    for section, union in schema.unions.items():
        key = f"{section}.{union.tag}"
        if values.get(key, current[key]) != current[key]:  # another kind has other settings
            tree[section] = {}
    return _checked(tree, schema, _apply_values(tree, values), [], "")


def _apply_values(tree: Tree, values: Mapping[str, Any]) -> dict[str, str]:
    """Writes values into the tree; returns the spelling of each key."""
    for key, value in values.items():
        _write(tree, key, list(value) if isinstance(value, tuple) else value)
    return {key: key for key in values}


def _write(tree: Tree, key: str, value: Any) -> None:
    section, _, leaf = key.rpartition(".")
    table = tree.setdefault(section, {}) if section else tree
    if isinstance(table, dict):  # otherwise the section itself is reported
        table[leaf] = value


def _checked(
    tree: Tree, schema: _Schema, spelled: Mapping[str, str], lines: list[str], where: str
) -> Config:
    """The config of a tree; one error with `lines` and every problem of the tree."""
    config, faults = _build(tree, schema)
    faults += _wrong_values(config, schema, broken={fault.key for fault in faults})
    lines += [f"{spelled.get(key, f'{where}{key}')}: {text}" for key, text in faults]
    if lines:
        raise UserError("\n  ".join([f"{len(lines)} problems:", *lines][len(lines) == 1 :]))
    return config


def _schema(kinds: Kinds) -> _Schema:
    unions = {
        "objective": _Union("name", kinds.objectives),
        "environment": _Union("kind", kinds.environments),
    }
    types: Tree = {f"{s}.{u.tag}": Literal[tuple(u.kinds)] for s, u in unions.items()}
    for name, kind in _field_types(Config).items():
        for cls in unions[name].kinds.values() if name in unions else (kind,):
            leaves = _field_types(cls) if is_dataclass(cls) else {}
            own = {f"{name}.{leaf}": of for leaf, of in leaves.items()} or {name: kind}
            types = own | types
    return _Schema(unions, types)


def _field_types(cls: Any) -> Tree:
    hints = get_type_hints(cls)
    return {field.name: hints[field.name] for field in fields(cls)}


def _wrong_values(config: Config, schema: _Schema, *, broken: set[str]) -> list[_Fault]:
    """Problems of the values, without those that are consequences of a `broken` key."""
    found, values = list(out_of_range(config)), flatten(config)
    if broken.isdisjoint(f"{section}.{union.tag}" for section, union in schema.unions.items()):
        found += contradictions(config)
    return [
        _Fault(p.key, f"{toml_value(values[p.key])}, expected {p.expected}")
        for p in found
        if broken.isdisjoint((p.key, *p.others))
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


def _apply_overrides(
    tree: Tree, words: Sequence[str], types: Tree
) -> tuple[dict[str, str], list[str]]:
    """Writes options into the tree; returns the spelling of each key, and what is no option."""
    spelled: dict[str, str] = {}
    lines: list[str] = []
    queue = list(words)
    while queue:
        word = queue.pop(0)
        name, equals, text = word.removeprefix("--").partition("=")
        key = name.replace("-", "_")
        if not equals and ".no_" in key and types.get(key.replace(".no_", ".")) is bool:
            key, equals, text = key.replace(".no_", "."), "=", "false"
        if not word.startswith("--"):
            remedy = f"--{name} VALUE" if key in types else "options look like --train.steps 40"
            lines.append(f"{word}: unexpected argument; {remedy}")
        elif key not in types:
            lines.append(f"--{name}: {_unknown_option(key, types)}")
            _take_values(tuple, queue)
        else:
            values = [text] if equals else _take_values(get_origin(types[key]) or types[key], queue)
            if not values and get_origin(types[key]) is not tuple:
                lines.append(f"--{name}: no value, expected {_expected(types[key])}")
                continue
            spelled[key] = f"--{name}"
            _write(tree, key, _parse(types[key], values))
    return spelled, lines


def _unknown_option(key: str, types: Tree) -> str:
    for old, new in RENAMED.items():
        for spelling, now in ((old, new), (old.replace(".", ".no_"), new.replace(".", ".no_"))):
            if key == spelling:
                return f"renamed; write {_flag(now)}"
    return f"unknown option; {_nearest(key, types, _flag)}"


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


def _build(tree: Tree, schema: _Schema) -> tuple[Config, list[_Fault]]:
    """Builds a config from what is sound in a tree, and lists the rest."""
    faults: list[_Fault] = []
    kinds = _field_types(Config)
    sections = [name for name, kind in kinds.items() if is_dataclass(kind)]
    top = {name: kind for name, kind in kinds.items() if name not in sections}
    values = _table(tree, top, "", schema.types, faults, known=sections)
    for section in sections:
        table = tree.get(section, {})
        if not isinstance(table, dict):
            text = f"{_describe(table)}, expected a table [{section}]"
            faults.append(_Fault(section, text))
            table = {}
        if section in schema.unions:
            values[section] = _one_of(section, cast(Tree, table), schema, faults)
        else:
            leaves = _field_types(kinds[section])
            own = _table(cast(Tree, table), leaves, section, schema.types, faults)
            values[section] = kinds[section](**own)
    return Config(**values), faults


def _one_of(section: str, table: Tree, schema: _Schema, faults: list[_Fault]) -> Any:
    """Builds the kind that the tag picks; a setting of another kind is a problem."""
    tag, classes = schema.unions[section]
    kinds = {name: _field_types(cls) for name, cls in classes.items()}
    default = next(iter(kinds))
    name = table.get(tag, default)
    if name not in list(kinds):
        every = {key: kind for own in kinds.values() for key, kind in own.items()}
        _table(table, every | {tag: Literal[tuple(kinds)]}, section, schema.types, faults)
        return classes[default]()
    own = dict(table)
    for key in table:
        owners = [other for other in kinds if key in kinds[other]]
        if owners and name not in owners:
            del own[key]
            hint = "" if tag in table else f" (the default; set {section}.{tag})"
            text = f"a setting of {' and '.join(owners)}, but the {section} is {name}{hint}"
            faults.append(_Fault(f"{section}.{key}", text))
    return classes[name](**_table(own, kinds[name], section, schema.types, faults))


def _table(
    table: Tree,
    kinds: Tree,
    section: str,
    types: Tree,
    faults: list[_Fault],
    known: Collection[str] = (),
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
            faults.append(_Fault(key, f"{_describe(raw)}, expected {_expected(kinds[name], raw)}"))
        elif key in RENAMED:
            faults.append(_Fault(key, f"renamed; write {RENAMED[key]}"))
        elif name not in known:
            faults.append(_Fault(key, f"unknown key; {_nearest(key, types)}"))
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


def _nearest(key: str, types: Collection[str], spell: Callable[[str], str] = str) -> str:
    """Suggests a key: a near one in the section, the same name elsewhere, else a near one."""
    section, _, leaf = key.rpartition(".")
    siblings = [k for k in types if k.rpartition(".")[0] == section]
    sections = sorted({k.rpartition(".")[0] for k in types} - {""})
    names = {k.rpartition(".")[2]: k for k in siblings} | (
        {} if section else dict.fromkeys(sections)
    )
    near = [names[name] or name for name in _close(leaf, names)]
    near = near or [k for k in types if k.rpartition(".")[2] == leaf] or _close(key, types)
    if near:
        return f"did you mean {spell(near[0])}?"
    return f"known here: {', '.join(siblings if section and siblings else sections)}"


def _flag(key: str) -> str:
    return f"--{key.replace('_', '-')}"


def _close(word: str, names: Collection[str]) -> list[str]:
    return difflib.get_close_matches(word, names, n=1)


def _expected(kind: Any, raw: Any = None) -> str:
    if get_origin(kind) is Literal:
        choices = ", ".join(map(toml_value, get_args(kind)))
        near = _close(raw, get_args(kind)) if isinstance(raw, str) else []
        return f"one of {choices}" + (f"; did you mean {toml_value(near[0])}?" if near else "")
    return "a list of strings" if get_origin(kind) is tuple else _TYPE_NAMES[kind]


def _describe(value: Any) -> str:
    name = _TYPE_NAMES.get(type(value), f"a {type(value).__name__}")
    return "a table" if isinstance(value, dict) else f"{toml_value(value)} ({name})"


def _print_help(config: Config, path: Path, unions: Mapping[str, _Union]) -> None:
    import tyro  # only --help needs it

    text = f"Every setting of {path}; an option replaces the recipe's value, shown as the default."
    for section, union in unions.items():
        flag, own = _flag(f"{section}.{union.tag}"), getattr(config, section)
        others = [name for name, kind in union.kinds.items() if kind is not type(own)]
        text += f" {flag} may also be {', '.join(others)}, each with settings of its own."
    kind = tyro.conf.AvoidSubcommands[Config]
    tyro.cli(kind, default=config, args=["--help"], prog=f"sdpo train {path}", description=text)
