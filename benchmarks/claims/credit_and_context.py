"""Which part of SDPO causes the gain: the kind of credit, the context, information or style.

    python benchmarks/claims/credit_and_context.py

All families of requests, 80 steps of 8 prompts with 4 rollouts each. Every arm but GRPO is
`configs/nano.toml` with one difference, at the learning rate of that recipe. Kinds of credit are
compared under reverse KL, because token credit is an unbiased estimate of it. "Solution and
feedback" shows both where there is a solution; SDPO's default shows feedback only where there is
no solution. The two controls are "shuffled context" and "fixed negative".
"""

from runs import (
    Arm,
    Interval,
    accuracy,
    ahead,
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

NAME = "credit_and_context"


SMALL = (
    *("--rollout.prompts-per-step", "8", "--rollout.rollouts-per-prompt", "4"),
    *("--train.steps", "80", "--evaluation.every-steps", "20", "--checkpoint.every-steps", "1000"),
)


def arm(name: str, *options: str) -> Arm:
    """SDPO with one difference."""
    return Arm(name, "configs/nano.toml", (*SMALL, *options))


REVERSE = ("--objective.alpha", "1")
SEEN = (
    arm("SDPO"),
    arm("solution and feedback", "--teacher.no-feedback-only-without-demonstration"),
    arm("solution only", "--teacher.no-feedback"),
    arm("feedback only", "--teacher.demonstration", "none"),
    arm("shuffled context", "--teacher.control", "shuffled"),
)
CREDITED = (
    arm("logit credit", *REVERSE),
    arm("token credit", *REVERSE, "--objective.credit", "token"),
    arm("sequence credit", "--objective.credit", "sequence"),
    arm("fixed negative", "--objective.credit", "fixed_negative"),
    Arm("GRPO", "configs/nano_grpo.toml", SMALL),
)


def main() -> None:
    """Trains, prints the table and the verdicts, draws the pictures."""
    options = parse(__doc__, NAME)
    found = train_all((*SEEN, *CREDITED), options)
    table = tabulate(found, [("accuracy", accuracy), ("mean over the run", mean_accuracy)])

    def gain(first: str, second: str) -> tuple[str, Interval]:
        ends = [[*map(accuracy, found[name])] for name in (first, second)]
        return f"{first} - {second}", paired(*ends)

    verdicts = [
        no_worse(
            7,
            "credit for logits is no worse than for tokens, and that no worse than for sequences",
            gain("logit credit", "token credit"),
            gain("token credit", "sequence credit"),
        ),
        no_worse(
            7,
            "solution and feedback are no worse than either alone",
            gain("solution and feedback", "solution only"),
            gain("solution and feedback", "feedback only"),
        ),
        ahead(
            10,
            "the gain is information: ahead of both controls",
            gain("SDPO", "shuffled context"),
            gain("SDPO", "fixed negative"),
        ),
    ]
    drawn = pictures({"context.svg": SEEN, "credit.svg": CREDITED}, options)
    write(NAME, options, table, verdicts, seconds_of(found), pictures=drawn)


if __name__ == "__main__":
    main()
