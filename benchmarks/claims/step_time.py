"""Time of a training step of SDPO over that of GRPO, on equal shapes.

    python benchmarks/claims/step_time.py

CPU seconds of one pinned thread, from `benchmarks/step.py`: SDPO with the full-vocabulary
divergence and an EMA teacher, GRPO with one update per batch. Setting A has responses of 64 tokens,
C of 256. A seed is one round of both objectives, one after the other, and the ratio is that of the
round. Grading is free here; an environment that takes time makes the ratio smaller.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from forgetting import spread
from runs import Verdict, interval, parse, table_of, write

from sdpo_jax.reports.curves import Curve, Point, draw

NAME = "step_time"
STEP = Path(__file__).parent.parent / "step.py"
MOST = 1.25
"""Of GRPO's time, what "virtually the same" is taken to mean here, on responses of 256 tokens."""
TOKENS = {"A": 64, "C": 256}
"""Of a response, by setting."""
TINY = ("--layers", "1", "--response-tokens", "8")


def seconds(setting: str, objective: str, options: argparse.Namespace) -> float:
    """CPU seconds of a step, median over a few."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "record.jsonl"
        words = [sys.executable, str(STEP), "--setting", setting, "--objective", objective]
        words += ["--steps", "3", "--json", str(file), *(TINY if options.quick else ())]
        subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
        return json.loads(file.read_text())["cpu_seconds"]


def curves_of(rows: Mapping[str, Mapping[str, Sequence[float]]]) -> list[Curve]:
    """Seconds of a step against tokens of a response, a line for each objective."""
    found: list[Curve] = []
    for name in ("SDPO", "GRPO"):
        values = [rows[f"setting {setting}"][f"{name}, s"] for setting in TOKENS]
        points = [Point(n, *spread(own)) for n, own in zip(TOKENS.values(), values, strict=True)]
        found.append(Curve(name, points, len(values[0])))
    return found


def main() -> None:
    """Measures, prints the table and the verdict, draws the picture."""
    options = parse(__doc__, NAME)
    rows: dict[str, dict[str, list[float]]] = {}
    for setting in TOKENS:
        spent = [[seconds(setting, o, options) for o in ("sdpo", "grpo")] for _ in options.seeds]
        rows[f"setting {setting}"] = {
            "SDPO, s": [a for a, _ in spent],
            "GRPO, s": [b for _, b in spent],
            "ratio": [a / b for a, b in spent],
        }
    table = table_of(rows)
    ratios = {name: interval(row["ratio"]) for name, row in rows.items()}
    verdict = Verdict(
        11,
        f"a step of SDPO takes at most {MOST} times one of GRPO, with responses of 256 tokens",
        ratios["setting C"].high <= MOST,
        "step time over GRPO's (above 1 is slower): "
        + "; ".join(f"{name} {ratio}" for name, ratio in ratios.items()),
    )
    total = sum(sum(row["SDPO, s"]) + sum(row["GRPO, s"]) for row in rows.values())
    options.results.mkdir(parents=True, exist_ok=True)
    picture = draw(curves_of(rows), "cpu_seconds", across="tokens of a response")
    (options.results / f"{NAME}.svg").write_text(picture, encoding="utf-8")
    drawn = [f"{NAME}.svg"]
    # Two steps of warm-up, three that count.
    write(NAME, options, table, [verdict], 5 * total, pictures=drawn)


if __name__ == "__main__":
    main()
