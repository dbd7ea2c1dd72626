"""`sdpo report`: one HTML file about a run, or several side by side."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from sdpo_jax.commands.command import Command


def add_arguments(parser: ArgumentParser) -> None:
    """The runs, and where to write."""
    parser.add_argument("runs", metavar="RUN_DIR", nargs="+", type=Path, help="folder of a run")
    parser.add_argument(
        "--out",
        metavar="FILE.html",
        type=Path,
        help="the file to write; by default report.html or comparison.html in the first folder",
    )


def run(arguments: Namespace) -> None:
    """Writes the page."""
    from sdpo_jax.reports.run_report import write_report

    write_report(arguments.runs, arguments.out)


COMMAND = Command(
    "report",
    (
        (
            "sdpo report RUN_DIR [RUN_DIR ...] [--out FILE.html]",
            "write a page with curves, times and recipes of runs",
        ),
    ),
    add_arguments,
    run,
)
