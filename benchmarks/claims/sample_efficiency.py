"""SDPO and GRPO at sparse rewards: generations, time, and the teacher's accuracy.

    python benchmarks/claims/sample_efficiency.py

The requests are for a table, and the start model answers 1 of 100 attempts correctly. A step has 8
prompts with 4 rollouts each, and two steps in three see no success at first. The learning rate of
each arm is chosen from one grid, on a separate seed, by mean accuracy over the run, because the
claim is about how early an arm learns. "Siblings only" is SDPO without feedback: its teacher sees a
sibling's success or nothing. A run that never reaches GRPO's final accuracy counts as twice its
generations. Held-out accuracy is measured every 3 steps, so that a quarter of GRPO's generations
can be resolved.
"""

from runs import (
    Arm,
    Run,
    Verdict,
    accuracy,
    ahead,
    best_rates,
    interval,
    mean_accuracy,
    no_worse,
    paired,
    parse,
    pictures,
    seconds_of,
    tabulate,
    train_all,
    write,
)

NAME = "sample_efficiency"
SPARSE = (
    *("--environment.families", "table", "--train.steps", "60"),
    *("--rollout.prompts-per-step", "8", "--rollout.rollouts-per-prompt", "4"),
    *("--evaluation.every-steps", "3", "--evaluation.prompts", "64"),
    *("--evaluation.samples-per-prompt", "4", "--checkpoint.every-steps", "1000"),
)
ARMS = (
    Arm("SDPO", "configs/nano.toml", SPARSE),
    Arm("SDPO siblings only", "configs/nano.toml", (*SPARSE, "--teacher.no-feedback")),
    Arm("GRPO", "configs/nano_grpo.toml", SPARSE),
)
RATES = ("3e-4", "6e-4", "1e-3", "2e-3")


def share_to_reach(runs: list[Run], others: list[Run], which: int) -> list[float]:
    """What each run spends until it has the other's final accuracy, over what the other spent.

    `which` is 0 for generations, 1 for seconds. A run that never gets there counts twice its own.
    """
    shares: list[float] = []
    for run, other in zip(runs, others, strict=True):
        reached = run.to_reach(accuracy(other))
        spent = (reached or run.spent(run.final["step"]))[which] * (1 if reached else 2)
        shares.append(spent / max(other.spent(other.final["step"])[which], 1e-9))
    return shares


def verdicts_of(found: dict[str, list[Run]]) -> list[Verdict]:
    """Claims 1, 2 and 5."""
    sdpo, siblings, grpo = (found[arm.name] for arm in ARMS)
    generations = interval(share_to_reach(sdpo, grpo, 0))
    seconds = interval(share_to_reach(sdpo, grpo, 1))
    first = [run.evaluations[0].get("teacher_accuracy", 0.0) for run in sdpo]
    last = [run.final.get("teacher_accuracy", 0.0) for run in sdpo]
    return [
        Verdict(
            1,
            "SDPO reaches GRPO's final accuracy in a quarter of the generations",
            generations.high <= 0.25,
            f"share of GRPO's generations {generations}; "
            f"step seconds over GRPO's (above 1 is slower) {seconds}",
        ),
        no_worse(
            2,
            "without rich feedback SDPO is ahead or equal",
            ("siblings only - GRPO", paired([*map(accuracy, siblings)], [*map(accuracy, grpo)])),
        ),
        ahead(
            5,
            "the teacher gets better, and the final student beats the initial teacher",
            ("teacher, last - first", paired(last, first)),
            ("student's last - teacher's first", paired([*map(accuracy, sdpo)], first)),
        ),
    ]


def main() -> None:
    """Chooses rates, trains, prints the table and the verdicts, draws the picture."""
    options = parse(__doc__, NAME)
    arms, rates = best_rates(ARMS, RATES[:1] if options.quick else RATES, options, mean_accuracy)
    found = train_all(arms, options)
    measures = [
        ("before", lambda run: run.evaluations[0]["accuracy"]),
        ("best", lambda run: max(row["accuracy"] for row in run.evaluations)),
        ("accuracy", accuracy),
        ("mean over the run", mean_accuracy),
        ("seconds of steps", lambda run: run.spent(run.final["step"])[1]),
    ]
    table = tabulate(found, measures)
    drawn = pictures({f"{NAME}.svg": arms}, options)
    drawn += pictures({"teacher_accuracy.svg": arms[:1]}, options, metric="teacher_accuracy")
    write(NAME, options, table, verdicts_of(found), seconds_of(found), rates=rates, pictures=drawn)


if __name__ == "__main__":
    main()
