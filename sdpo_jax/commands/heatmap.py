"""`sdpo heatmap`: a batch of a run, token by token, as rows of JSON and as a page."""

from argparse import ArgumentParser, Namespace
from dataclasses import replace
from functools import partial
from sys import stderr
from typing import TYPE_CHECKING

from sdpo_jax.commands.command import Command, positive, quiet_libraries

if TYPE_CHECKING:
    from sdpo_jax.run.components import RunComponents
    from sdpo_jax.run.run_ref import RunRef


def add_arguments(parser: ArgumentParser) -> None:
    """The run, and how much of its batch."""
    option = partial(parser.add_argument, type=positive)
    parser.add_argument("run", metavar="RUN_DIR", help="folder of a run, RUN@best or RUN@STEP")
    option("--prompts", metavar="P", default=8, help="the first P prompts of the batch (8)")
    option("--top", metavar="K", default=5, help="alternatives per token and model (5)")
    option("--tokens", metavar="T", default=512, help="tokens of a response on the page (512)")


def run(arguments: Namespace) -> None:
    """Writes rows and page into the folder of the run."""
    quiet_libraries()
    from sdpo_jax.api import load_components
    from sdpo_jax.compilation import persistent_cache
    from sdpo_jax.devices import fitting_mesh
    from sdpo_jax.environments.registry import make_environment
    from sdpo_jax.run.run_ref import find_run
    from sdpo_models.gguf.convert import cache_folder

    run = find_run(arguments.run)
    environment = make_environment(run.config.environment)  # before there is a device
    run = run._replace(config=replace(run.config, mesh=fitting_mesh(run.config.mesh)))
    with persistent_cache(cache_folder, partial(print, file=stderr)):
        write_heatmap(
            run,
            load_components(run.config, environment=environment),
            prompts=arguments.prompts,
            top=arguments.top,
            tokens=arguments.tokens,
        )


def write_heatmap(
    run: "RunRef", components: "RunComponents", *, prompts: int, top: int, tokens: int
) -> None:
    """Writes `token_batch.jsonl` and `heatmap.html` into the folder of the run.

    Args:
      run: the run, and which of its checkpoints.
      components: of the run.
      prompts: how many prompts of the batch, the first ones.
      top: alternatives per token of student and of teacher.
      tokens: of each response that are on the page; the rows hold all.

    Raises:
      UserError: the run has no such checkpoint, or its environment fails too often.
    """
    from sdpo_jax.reports.heatmap import HEATMAP, heatmap_page
    from sdpo_jax.reports.page import write_page
    from sdpo_jax.reports.token_batch import TOKEN_BATCH, token_batch, write_rows

    rows, run_dir = token_batch(run, components, prompts=prompts, top=top), run.folder
    write_rows(run_dir / TOKEN_BATCH, rows)
    write_page(run_dir / HEATMAP, heatmap_page(rows, max_tokens=tokens))
    count = sum(len(row["tokens"]) for row in rows[1:])
    print(
        f"wrote {run_dir / HEATMAP} and {run_dir / TOKEN_BATCH}: {len(rows) - 1} responses with "
        f"{count:,} tokens, after step {rows[0]['step']}"
    )


COMMAND = Command(
    "heatmap",
    (
        (
            "sdpo heatmap RUN_DIR [--prompts P] [--top K] [--tokens T]",
            "write a page with the teacher's advantage of each token of a batch",
        ),
    ),
    add_arguments,
    run,
)
