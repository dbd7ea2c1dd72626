"""`sdpo convert`: weights of a run or of a GGUF file, in Hugging Face layout."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from sdpo_jax.commands.command import Command, quiet_libraries


def add_arguments(parser: ArgumentParser) -> None:
    """Source, target and dtype."""
    parser.add_argument("source", metavar="RUN_DIR|FILE.gguf", help="a run or a GGUF file")
    parser.add_argument("out", metavar="OUT", type=Path, help="a new or empty folder")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="by default bfloat16 for a run and float32 for a GGUF file",
    )


def run(arguments: Namespace) -> None:
    """Writes the folder."""
    quiet_libraries()
    source, out = arguments.source, arguments.out
    if source.endswith(".gguf"):
        from sdpo_models.gguf.convert import convert

        # float32 keeps dequantised values exact.
        dtype = arguments.dtype or "float32"
        convert(source, out, dtype=dtype)
        print(f"wrote {out}: {source} as {dtype}")
        return
    from sdpo_jax.api import load_student, model_folder
    from sdpo_jax.run.run_ref import find_run
    from sdpo_models.hugging_face import save_run

    run, dtype = find_run(source), arguments.dtype or "bfloat16"  # halves the size
    step, params = load_student(run)
    save_run(out, params, source=model_folder(run.config), dtype=dtype)
    print(f"wrote {out}: the student of {run.folder} after step {step}, as {dtype}")


COMMAND = Command(
    "convert",
    (
        (
            "sdpo convert RUN_DIR|FILE.gguf OUT [--dtype float32|bfloat16]",
            "write weights in Hugging Face layout",
        ),
    ),
    add_arguments,
    run,
)
