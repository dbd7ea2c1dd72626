"""What of SDPO does the work: who gets credit, what the teacher sees, information or style.

    python benchmarks/claims/credit_and_context.py

All arms are `configs/nano.toml` with one difference. Credit is compared under reverse KL, of which
the sampled token's form is an unbiased estimate. The controls show another question's context, and
give a fixed negative advantage to unlikely tokens of failures without any teacher.
"""

from runs import (
    RESULTS,
    Arm,
    Verdict,
    accuracy,
    mean_accuracy,
    paired,
    parse,
    picture,
    tabulate,
    train_all,
    write,
)

NAME = "credit_and_context"
RECIPE = "configs/nano.toml"
REVERSE = ("--objective.alpha", "1")
ARMS = (
    Arm("SDPO", RECIPE),
    Arm("solution only", RECIPE, ("--teacher.no-feedback",)),
    Arm("feedback only", RECIPE, ("--teacher.demonstration", "none")),
    Arm("logit credit", RECIPE, REVERSE),
    Arm("token credit", RECIPE, (*REVERSE, "--objective.credit", "token")),
    Arm("sequence credit", RECIPE, ("--objective.credit", "sequence")),
    Arm("shuffled context", RECIPE, ("--teacher.control", "shuffled")),
    Arm("fixed negative", RECIPE, ("--objective.credit", "fixed_negative")),
)


def main() -> None:
    """Trains, prints the table and the verdicts, draws the pictures."""
    options = parse(__doc__, NAME)
    found = train_all(ARMS, options)
    measures = [("accuracy", accuracy), ("mean over the run", mean_accuracy)]
    table = tabulate(found, measures)

    def ahead(first: str, second: str, least: float = 0.0) -> tuple[bool, str]:
        gain = paired([*map(accuracy, found[first])], [*map(accuracy, found[second])])
        return gain.high >= least if least == 0.0 else gain.low > 0.0, f"{first} - {second} {gain}"

    def both(claim: str, *pairs: tuple[bool, str]) -> Verdict:
        return Verdict(claim, all(ok for ok, _ in pairs), "; ".join(text for _, text in pairs))

    verdicts = [
        both(
            "credit for logits is no worse than for tokens, and that no worse than for sequences",
            ahead("logit credit", "token credit"),
            ahead("token credit", "sequence credit"),
        ),
        both(
            "solution and feedback are no worse than either alone",
            ahead("SDPO", "solution only"),
            ahead("SDPO", "feedback only"),
        ),
        both(
            "the gain is information: ahead of both controls",
            ahead("SDPO", "shuffled context", 1.0),
            ahead("SDPO", "fixed negative", 1.0),
        ),
    ]
    write(NAME, options, table, verdicts, found)
    if options.results == RESULTS:
        picture(RESULTS / "context.svg", "accuracy", [ARMS[i] for i in (0, 1, 2, 6)], options)
        picture(RESULTS / "credit.svg", "accuracy", [ARMS[i] for i in (3, 4, 5, 7)], options)


if __name__ == "__main__":
    main()
