"""Does SDPO's lead over GRPO grow with the model? The embedded model and two smaller ones.

    python benchmarks/claims/sizes.py

The two smaller models are pre-trained here like the embedded one (`configs/nano_pretrain.toml`),
once, with a separate seed. The learning rate of each size and objective is chosen from one grid, on
a separate seed. The accuracy of the start model with a context shows how good a teacher it is.

The paper's claim is about 0.6 to 8 billion parameters; these models have 0.13 to 0.85 million.
"""

import argparse
import json
import math
import shutil
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from runs import (
    RATE_SEED,
    Arm,
    Run,
    Verdict,
    accuracy,
    best_rates,
    in_parallel,
    interval,
    paired,
    parse,
    pictures,
    run_to_end,
    seconds_of,
    tabulate,
    train_all,
    write,
)

import sdpo_models.nano

NAME = "sizes"
RECIPES = {"SDPO": "configs/nano.toml", "GRPO": "configs/nano_grpo.toml"}
RATES = ("3e-4", "6e-4", "1e-3")
EMBEDDED = Path(sdpo_models.nano.__file__).parent


class Size(NamedTuple):
    """Of a model with heads of 32."""

    name: str
    width: int
    layers: int
    heads: int
    kv_heads: int


MADE = (Size("0.13M", 64, 2, 2, 1), Size("0.37M", 96, 3, 3, 1))
LARGEST = "0.85M"


def made(size: Size, options: argparse.Namespace) -> str:
    """The folder of a pre-training run of this size, which is trained if there is none."""
    source = options.runs / f"{size.name}_config"
    if not source.is_dir():
        shutil.copytree(EMBEDDED, source, ignore=shutil.ignore_patterns("*.py", "*.safetensors"))
        config = json.loads((source / "config.json").read_text())
        config |= {"hidden_size": size.width, "num_hidden_layers": size.layers}
        config |= {"num_attention_heads": size.heads, "num_key_value_heads": size.kv_heads}
        config |= {"intermediate_size": 3 * size.width}
        (source / "config.json").write_text(json.dumps(config))
    words = ["--model.path", str(source), "--seed", str(RATE_SEED)]
    if options.quick:
        words += ["--train.steps", "2", "--optimizer.warmup-steps", "1"]
        words += ["--evaluation.prompts", "8"]
    folder = options.runs / f"{size.name}_pretrained"
    return str(run_to_end("configs/nano_pretrain.toml", folder, words))


def at_start(metric: str) -> Callable[[Run], float]:
    """What a run of SDPO measures of its start model."""
    return lambda run: run.evaluations[0].get(metric, math.nan)


def verdict_of(found: dict[str, list[Run]], names: Sequence[str]) -> Verdict:
    """Claim 6: the gain of each size above that of the next smaller one, over the seeds."""
    gains = [
        [
            accuracy(a) - accuracy(b)
            for a, b in zip(found[f"SDPO {n}"], found[f"GRPO {n}"], strict=True)
        ]
        for n in names
    ]
    steps = [paired(more, less) for less, more in pairwise(gains)]
    because = "; ".join(f"{n}: {interval(g)}" for n, g in zip(names, gains, strict=True))
    return Verdict(
        6,
        "larger models gain more from SDPO over GRPO",
        all(step.low > 0.0 for step in steps),
        f"SDPO - GRPO, accuracy, {because}; growth from size to size {', '.join(map(str, steps))}",
    )


def main() -> None:
    """Pre-trains, chooses rates, trains, prints the table and the verdict, draws the pictures."""
    options = parse(__doc__, NAME)
    options.runs.mkdir(parents=True, exist_ok=True)
    sizes = MADE[:1] if options.quick else MADE  # each has programs of its own to compile
    paths = in_parallel(lambda size: made(size, options), sizes, options.jobs)
    names = [*(size.name for size in sizes), LARGEST]
    arms = [
        Arm(f"{objective} {name}", recipe, ("--model.path", path))
        for name, path in zip(names, [*paths, "nano"], strict=True)
        for objective, recipe in RECIPES.items()
    ]
    arms, rates = best_rates(arms, RATES[:1] if options.quick else RATES, options, accuracy)
    found = train_all(arms, options)
    table = tabulate(found, [("accuracy", accuracy)])
    known = [
        ("alone", at_start("accuracy")),
        ("shown a solution", at_start("teacher_accuracy/demonstration")),
        ("shown feedback", at_start("teacher_accuracy/feedback")),
    ]
    starts = tabulate({name: found[f"SDPO {name}"] for name in names}, known)
    drawn = pictures(
        {f"{NAME}_{n}.svg": [arm for arm in arms if arm.name.endswith(n)] for n in names}, options
    )
    write(
        NAME,
        options,
        table,
        [verdict_of(found, names)],
        seconds_of(found),
        rates=rates,
        pictures=drawn,
        tables={"What the start models pass": starts},
    )


if __name__ == "__main__":
    main()
