"""Kind `bfcl`: the simple Python calls of the Berkeley Function-Calling Leaderboard.

The data are 400 requests, each with the documentation of one function; the answer is one call. They
come from the installed package bfcl-eval (Apache License 2.0): its files are read, its code with
many dependencies is not imported. Feedback names the argument and what is wrong with it, and never
the accepted value, unless `reveal_expected`.

Arguments are graded like in the leaderboard's checker; `tests/test_bfcl.py` compares both on random
changes of every row. Departures: feedback lists everything that is wrong, whereas the checker stops
at the first problem. Our own parser reads the answers (`bfcl_calls.py`): it also accepts calls in
JSON; a tuple counts as a list; arithmetic, variables and other values that are not literals, long
and deeply nested answers are refused, and so is whatever makes the checker itself fail.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from sdpo_jax.config import SEED, EnvironmentConfig, at_least, setting
from sdpo_jax.environments.base import Outcome, Prompt
from sdpo_jax.environments.bfcl_calls import check_row, complaints, example, parse_call, write_call
from sdpo_jax.environments.packages import package_folder
from sdpo_jax.environments.rows import split_by_hash
from sdpo_jax.errors import UserError

QUESTIONS = "BFCL_v4_simple_python.json"
INSTRUCTION = "Answer with one call of the function and nothing else: name(argument=value, ...)"
_INSTALL = "pip install --no-deps 'bfcl-eval>=2026.3'"


@dataclass(frozen=True)
class BfclConfig(EnvironmentConfig):
    """The simple Python calls of the Berkeley Function-Calling Leaderboard (package bfcl-eval)."""

    kind: Literal["bfcl"] = "bfcl"
    train_prompts: int = setting(311, at_least(1))
    held_out_prompts: int = setting(89, at_least(1))
    max_prompt_characters: int = setting(0, at_least(0))
    """Drops longer questions, their documentation included; 0 drops none."""
    reveal_expected: bool = False
    """Whether feedback on a wrong value contains the right one, which gives the answer away."""
    seed: int = setting(0, SEED)
    """Determines which functions are held out."""


class Row(NamedTuple):
    """A request, the documentation of its function, and the accepted argument values."""

    id: str
    request: str
    function: Mapping[str, Any]
    accepted: Mapping[str, Sequence[Any]]


class Bfcl:
    """The environment: the shortest prompts of each side, graded argument by argument.

    A hash of the seed and the function's name holds one row in four out, so that no function is on
    both sides. The reward is 1 for an accepted call, else 0; `metrics` holds `well_formed`.
    """

    def __init__(
        self,
        rows: Iterable[Row],
        *,
        train_prompts: int,
        held_out_prompts: int,
        max_prompt_characters: int = 0,
        reveal_expected: bool = False,
        seed: int = 0,
    ):
        prompts = sorted((_prompt(row) for row in rows), key=lambda p: (_length(p), p.id))
        if max_prompt_characters:
            prompts = [p for p in prompts if _length(p) <= max_prompt_characters]
        self._reveal = reveal_expected
        train, held_out = split_by_hash(prompts, lambda p: p.data["row"].function["name"], seed)
        self.train = _first(train, train_prompts, "train_prompts", max_prompt_characters)
        self.held_out = _first(
            held_out, held_out_prompts, "held_out_prompts", max_prompt_characters
        )

    def grade(self, prompt: Prompt, response: str) -> Outcome:
        """Passes a call that the leaderboard accepts; feedback lists every mistake."""
        row: Row = prompt.data["row"]
        call = parse_call(response)
        if isinstance(call, str):
            return Outcome(0.0, False, call, {"well_formed": 0.0})
        found = complaints(call, row.function, row.accepted, reveal=self._reveal)
        return Outcome(float(not found), not found, "\n".join(found), {"well_formed": 1.0})

    def reference(self, prompt: Prompt) -> str:
        """A call that `grade` passes."""
        return reference_call(prompt.data["row"])


def build(config: BfclConfig) -> Bfcl:
    """Builds the environment from its settings and the data of the installed package."""
    return Bfcl(
        load_rows(),
        train_prompts=config.train_prompts,
        held_out_prompts=config.held_out_prompts,
        max_prompt_characters=config.max_prompt_characters,
        reveal_expected=config.reveal_expected,
        seed=config.seed,
    )


def question(row: Row) -> str:
    """The user message: documentation, request and instruction."""
    documentation = json.dumps(row.function, ensure_ascii=False)
    return f"Function: {documentation}\n\nRequest: {row.request}\n\n{INSTRUCTION}"


def reference_call(row: Row) -> str:
    """An accepted call: every required argument with its first accepted value."""
    required = row.function["parameters"].get("required", [])
    needed = {n: v for n, v in row.accepted.items() if "" not in v or n in required}
    return write_call(row.function["name"], example(needed))


def _prompt(row: Row) -> Prompt:
    return Prompt(row.id, ({"role": "user", "content": question(row)},), {"row": row})


def _length(prompt: Prompt) -> int:
    return len(prompt.messages[0]["content"])


def _first(prompts: Sequence[Prompt], count: int, key: str, limit: int) -> list[Prompt]:
    if count > len(prompts):
        remedy = "lower it" + (" or raise environment.max_prompt_characters" if limit else "")
        raise UserError(
            f"environment.{key}: {count}, expected at most {len(prompts)} with environment.kind = "
            f'"bfcl" and environment.max_prompt_characters = {limit}; {remedy}'
        )
    return list(prompts[:count])


def load_rows(folder: Path | None = None) -> list[Row]:
    """Reads the rows in a folder laid out like bfcl-eval's `data`; None: the installed package's.

    Raises:
      UserError: the package or a file is missing, or a line is not as expected.
    """
    folder = data_folder() if folder is None else folder
    questions, answers = folder / QUESTIONS, folder / "possible_answer" / QUESTIONS
    accepted = {line["id"]: line["ground_truth"] for line in _lines(answers)}
    return [_row(line, accepted, questions) for line in _lines(questions)]


def data_folder() -> Path:
    """The data folder of the installed package, which is not imported."""
    missing = f'environment.kind = "bfcl" reads its data from the package bfcl-eval: {_INSTALL}'
    return package_folder("bfcl_eval", missing) / "data"


def _lines(path: Path) -> list[dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); another version of bfcl-eval? {_INSTALL}"
        ) from error
    lines: list[dict[str, Any]] = []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            lines.append(json.loads(line))
            lines[-1]["id"]
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(
                f"{path}, line {number}: expected a JSON object with an id; {_INSTALL}"
            ) from error
    return lines


def _row(line: Mapping[str, Any], answers: Mapping[str, Any], path: Path) -> Row:
    try:
        ((message,),), (function,) = line["question"], line["function"]
        (answer,) = answers[line["id"]]
        accepted = answer[function["name"]]
        known = set(function["parameters"]["properties"])
        if not known.issuperset(accepted):
            raise ValueError(f"answer names {sorted(set(accepted) - known)}")
        check_row(function, accepted)
        return Row(line["id"], message["content"], function, accepted)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path}: row {line['id']!r} is not one request with one function and its answer "
            f"({error}); another version of bfcl-eval? {_INSTALL}"
        ) from error
