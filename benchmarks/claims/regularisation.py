"""Runs twelve times as long as needed: which collapse, what prevents it, what warns of it.

    python benchmarks/claims/regularisation.py

SDPO learns these two families of requests within 20 steps of 8 prompts with 4 rollouts each; the
runs have 240 steps. Every arm is `configs/nano.toml` with one difference, at the learning rate of
that recipe; GRPO has the rate of its own recipe.

Diagnostics are means over the last ten steps. A run begins to fall at the first step whose training
reward is 0.2 below its highest so far. An alarm rings at the first step after step 30 at which a
diagnostic exceeds every value that the runs of two stable arms ("frozen", "failures alone") reach
after that step. The threshold was set afterwards, so that these two never ring; it is not a rule
that was tested on other runs. "Default" is the ten runs of "EMA 0.05" and "rate falls", "quick" the
ten runs of "live" and "EMA 0.5". "Rings before" is the share of falls that follow an alarm, "steps
before" the number of steps between an alarm and the fall, negative if the alarm came later.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from runs import (
    Arm,
    Run,
    Verdict,
    accuracy,
    interval,
    parse,
    pictures,
    seconds_of,
    table_of,
    tabulate,
    train_all,
    write,
)

NAME = "regularisation"
LONG = (
    *("--environment.families", "light", "money", "--train.steps", "240"),
    *("--rollout.prompts-per-step", "8", "--rollout.rollouts-per-prompt", "4"),
    *("--evaluation.every-steps", "20", "--evaluation.prompts", "64"),
    *("--checkpoint.every-steps", "1000"),
)


def arm(name: str, *options: str, recipe: str = "configs/nano.toml") -> Arm:
    """A long run with one difference."""
    return Arm(name, recipe, (*LONG, *options))


REFRESHED = ("--teacher.weights", "refreshed", "--teacher.refresh", "gated")
TEACHERS = (
    arm("EMA 0.05 (default)"),
    arm("live", "--teacher.weights", "live"),
    arm("EMA 0.5", "--teacher.ema-rate", "0.5"),
    arm("frozen", "--teacher.weights", "frozen"),
    arm("gated refresh", *REFRESHED, "--teacher.refresh-fraction", "1"),
)
OTHERS = (
    arm("rate falls", "--optimizer.schedule", "cosine"),
    arm("KL to the start", "--objective.reference-kl", "0.01"),
    arm(
        "failures alone",
        *("--objective.route", "outcome", "--objective.token-weights", "teacher_entropy"),
    ),
    arm("GRPO", recipe="configs/nano_grpo.toml"),
)
WINDOW, SETTLED, FALL = 10, 30, 0.2


def means(run: Run, key: str) -> list[float]:
    """Of the last `WINDOW` steps, from the first full window on."""
    values = [row.get(key, 0.0) for row in run.steps]
    return [sum(values[i - WINDOW : i]) / WINDOW for i in range(WINDOW, len(values) + 1)]


def first(found: Sequence[bool]) -> int | None:
    """The step at whose end a condition on `means` first holds."""
    return next((i + WINDOW for i, is_so in enumerate(found) if is_so), None)


def fall(run: Run) -> int | None:
    """Where the training reward has fallen."""
    values = means(run, "reward")
    return first([max(values[: i + 1]) - value >= FALL for i, value in enumerate(values)])


ALARMS = {
    "student's entropy": "student_entropy",
    "length, 95th percentile": "response_tokens_p95",
    "repetition": "repetition",
    "cut off": "truncated",
    "gradient": "grad_norm",
    "teacher's entropy": "teacher_entropy",
    "divergence": "divergence",
}
HOLD = ("frozen", "failures alone")
GROUPS = {"default": ("EMA 0.05 (default)", "rate falls"), "quick": ("live", "EMA 0.5")}
"""Arms whose falls are looked at together."""


def settled(run: Run, key: str) -> list[float]:
    """`means` from step `SETTLED` on."""
    return means(run, key)[SETTLED - WINDOW :]


def alarm(run: Run, key: str, level: float) -> int | None:
    """Where a diagnostic first rings."""
    at = first([value > level for value in settled(run, key)])
    return None if at is None else at + SETTLED - WINDOW


def best(run: Run) -> float:
    """Highest held-out accuracy of all evaluations."""
    return max(row["accuracy"] for row in run.evaluations)


def collapsed(run: Run) -> float:
    """1 for a run that ends below half of its best."""
    return float(accuracy(run) < best(run) / 2)


def diagnostics(found: Mapping[str, Sequence[Run]]) -> dict[str, dict[str, Any]]:
    """How often each alarm rings before a fall, and how many steps before (negative: behind it)."""
    rows: dict[str, dict[str, list[float]]] = {}
    for name, key in ALARMS.items():
        held = [value for arm in HOLD for run in found[arm] for value in settled(run, key)]
        rows[name] = {}
        for group, arms in GROUPS.items():
            runs = [run for arm in arms for run in found[arm]]
            falls = [(run, step) for run in runs if (step := fall(run)) is not None]
            leads = [
                float(step - at)
                for run, step in falls
                if (at := alarm(run, key, max(held, default=0.0))) is not None
            ]
            before = [float(x > 0) for x in leads] + [0.0] * (len(falls) - len(leads))
            rows[name][f"{group}: rings before"] = before or [0.0]
            rows[name][f"{group}: steps before"] = leads or [0.0]
    return table_of(rows)


def verdicts_of(found: Mapping[str, Sequence[Run]]) -> list[Verdict]:
    """Claim 8, and what collapses without regularisation."""
    count = {name: round(sum(map(collapsed, runs))) for name, runs in found.items()}
    seeds = len(next(iter(found.values())))
    listed = ", ".join(f"{name} {n}" for name, n in count.items())
    default, live, large = (a.name for a in TEACHERS[:3])
    return [
        Verdict(
            8,
            "no run with the default teacher collapses",
            count[default] == 0,
            f"collapsed of {seeds}: {listed}",
        ),
        Verdict(
            8,
            "a live teacher and a quickly following one collapse more often",
            min(count[live], count[large]) > count[default],
            f"final accuracy {default} {interval([*map(accuracy, found[default])])}, "
            f"{live} {interval([*map(accuracy, found[live])])}, "
            f"{large} {interval([*map(accuracy, found[large])])}",
        ),
    ]


def main() -> None:
    """Trains, prints the tables and the verdicts, draws the pictures."""
    options = parse(__doc__, NAME)
    found = train_all((*TEACHERS, *OTHERS), options)
    measures = [("best accuracy", best), ("accuracy", accuracy), ("collapsed", collapsed)]
    table = tabulate(found, measures)
    tables = {"What moves before the training reward falls": diagnostics(found)}
    drawn = pictures({"teachers.svg": TEACHERS, "remedies.svg": OTHERS}, options)
    seconds = seconds_of(found)
    write(NAME, options, table, verdicts_of(found), seconds, pictures=drawn, tables=tables)


if __name__ == "__main__":
    main()
