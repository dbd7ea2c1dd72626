"""`sdpo heatmap`: a batch of a run, token by token, as rows of JSON and as a page."""

from collections.abc import Mapping, Sequence
from typing import Any

from sdpo_jax.errors import UserError
from sdpo_jax.reports.heatmap import HEATMAP, heatmap_page
from sdpo_jax.reports.page import write_page
from sdpo_jax.reports.token_batch import TOKEN_BATCH, token_batch, write_rows
from sdpo_jax.run.run_ref import RunRef


def heatmap_run(
    run: RunRef, parts: Mapping[str, Any], *, prompts: int, top: int, tokens: int
) -> None:
    """Writes `token_batch.jsonl` and `heatmap.html` into the run's folder.

    Args:
      run: and which of its checkpoints.
      parts: what `load_parts` returns.
      prompts: how many of the batch's prompts, the first ones.
      top: alternatives per token of student and of teacher.
      tokens: of each response that are on the page; the rows hold all.

    Raises:
      UserError: the run has no such checkpoint, or its environment fails too often.
    """
    rows, run_dir = token_batch(run, parts, prompts=prompts, top=top), run.folder
    write_rows(run_dir / TOKEN_BATCH, rows)
    write_page(run_dir / HEATMAP, heatmap_page(rows, max_tokens=tokens))
    count = sum(len(row["tokens"]) for row in rows[1:])
    print(
        f"wrote {run_dir / HEATMAP} and {run_dir / TOKEN_BATCH}: {len(rows) - 1} responses with "
        f"{count:,} tokens, after step {rows[0]['step']}"
    )


def parse_options(words: Sequence[str]) -> dict[str, int]:
    """The words after `sdpo heatmap` as `heatmap_run`'s arguments; the first is the run's folder.

    Raises:
      UserError: no folder, an unknown option, or a value that is no positive integer.
    """
    usage = "sdpo heatmap RUN_DIR [--prompts P] [--top K] [--tokens T]"
    if not words or words[0].startswith("-"):
        raise UserError(f"expected `{usage}`")
    values, rest = {"prompts": 8, "top": 5, "tokens": 512}, words[1:]
    if len(rest) % 2:
        raise UserError(f"option {rest[-1]!r} has no value; expected `{usage}`")
    for option, value in zip(rest[::2], rest[1::2], strict=True):
        name = option.removeprefix("--")
        if f"--{name}" != option or name not in values or not value.isdigit() or int(value) < 1:
            raise UserError(f"{option} {value}: expected `{usage}` with a positive integer")
        values[name] = int(value)
    return values
