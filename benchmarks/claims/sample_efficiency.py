"""SDPO against GRPO where rewards are sparse: generations, time, length, and the teacher.

    python benchmarks/claims/sample_efficiency.py

Families of requests that the start model solves in at most 3 of 100 attempts. Each objective has
its rate from the same grid on a separate seed (docs/experiments.md). "Siblings only": no feedback.
"""

from runs import (
    RESULTS,
    Arm,
    Run,
    Verdict,
    accuracy,
    interval,
    mean_accuracy,
    paired,
    parse,
    picture,
    tabulate,
    train_all,
    write,
)

NAME = "sample_efficiency"
SPARSE = ("--environment.families", "alarm", "music", "table")
ARMS = (
    Arm("SDPO", "configs/nano.toml", SPARSE),
    Arm("SDPO siblings only", "configs/nano.toml", (*SPARSE, "--teacher.no-feedback")),
    Arm("GRPO", "configs/nano_grpo.toml", SPARSE),
)


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


def length(run: Run) -> float:
    """Tokens of held-out responses at the end."""
    return run.final["response_tokens"]


def main() -> None:
    """Trains, prints the table and the verdicts, draws the picture."""
    options = parse(__doc__, NAME)
    found = train_all(ARMS, options)
    sdpo, siblings, grpo = (found[arm.name] for arm in ARMS)
    measures = [
        ("before", lambda run: run.evaluations[0]["accuracy"]),
        ("accuracy", accuracy),
        ("mean over the run", mean_accuracy),
        ("response tokens", length),
        ("seconds of steps", lambda run: run.spent(run.final["step"])[1]),
    ]
    table = tabulate(found, measures)
    generations = interval(share_to_reach(sdpo, grpo, 0))
    seconds = interval(share_to_reach(sdpo, grpo, 1))
    ahead = paired([*map(accuracy, siblings)], [*map(accuracy, grpo)])
    teacher = [
        (run.evaluations[0].get("teacher_accuracy", 0.0), run.final.get("teacher_accuracy", 0.0))
        for run in sdpo
    ]
    risen = paired([last for _, last in teacher], [first for first, _ in teacher])
    beaten = paired([*map(accuracy, sdpo)], [first for first, _ in teacher])
    shorter = paired([*map(length, sdpo)], [*map(length, grpo)])
    verdicts = [
        Verdict(
            "SDPO reaches GRPO's final accuracy in a quarter of the generations",
            generations.high <= 0.25,
            f"share of GRPO's generations {generations}, of its seconds {seconds}",
        ),
        Verdict(
            "without rich feedback SDPO is ahead or equal",
            ahead.high >= 0.0,
            f"siblings only - GRPO, accuracy {ahead}",
        ),
        Verdict("the teacher's accuracy rises", risen.low > 0.0, f"last - first {risen}"),
        Verdict(
            "the final student beats the initial teacher",
            beaten.low > 0.0,
            f"student's accuracy - initial teacher's {beaten}",
        ),
        Verdict(
            "responses get shorter than GRPO's",
            shorter.high < 0.0,
            f"SDPO - GRPO {shorter} tokens; these requests leave little to pad",
        ),
    ]
    write(NAME, options, table, verdicts, found)
    if options.results == RESULTS:
        picture(RESULTS / f"{NAME}.svg", "accuracy", ARMS, options)


if __name__ == "__main__":
    main()
