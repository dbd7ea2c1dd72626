"""Length of responses under SDPO and GRPO, where the task allows padding.

    python benchmarks/claims/length.py

Lines before a call are allowed, and only the call is graded. The start model is the embedded model
after 300 more steps of pre-training on text in which a call without a context begins with about two
lines of talk, and a call after a context stands alone: a model that has seen the answer does not
need to talk. Nothing rewards short responses. The learning rate of both objectives is chosen from
one grid, on a separate seed.

"At GRPO's accuracy" is the length at the first evaluation that reaches GRPO's final accuracy, or at
the last evaluation if none does.
"""

import argparse
from collections.abc import Sequence

from runs import (
    RATE_SEED,
    Arm,
    Run,
    Verdict,
    accuracy,
    ahead,
    best_rates,
    paired,
    parse,
    pictures,
    run_to_end,
    seconds_of,
    tabulate,
    train_all,
    write,
)

NAME = "length"
RATES = ("3e-4", "6e-4", "1e-3")
TALK = ("--environment.allow-preamble", "--rollout.max-response-tokens", "96")


def talking(options: argparse.Namespace) -> str:
    """The folder of the start model, which is trained if there is none."""
    words = [*TALK, "--model.no-random-init", "--data.source", "tool_call_corpus_with_preamble"]
    words += ["--data.max-tokens", "320", "--train.steps", "2" if options.quick else "300"]
    words += ["--optimizer.learning-rate", "1e-3", "--seed", str(RATE_SEED)]
    words += ["--evaluation.prompts", "8", "--optimizer.warmup-steps", "1"] if options.quick else []
    return str(run_to_end("configs/nano_pretrain.toml", options.runs / "start", words))


def tokens(run: Run) -> float:
    """Mean length of held-out responses at the end."""
    return run.final["response_tokens"]


def tokens_at(run: Run, level: float) -> float:
    """At the first evaluation of at least this accuracy, or the last one."""
    found = next((row for row in run.evaluations if row["accuracy"] >= level), run.final)
    return found["response_tokens"]


def verdict_of(sdpo: Sequence[Run], grpo: Sequence[Run]) -> Verdict:
    """Claim 3."""
    at_equal = [tokens_at(a, accuracy(b)) for a, b in zip(sdpo, grpo, strict=True)]
    verdict = ahead(
        3,
        "SDPO's responses are shorter than GRPO's at equal accuracy, and at the end",
        ("GRPO's tokens - SDPO's, at GRPO's accuracy", paired([*map(tokens, grpo)], at_equal)),
        ("at the end", paired([*map(tokens, grpo)], [*map(tokens, sdpo)])),
    )
    reached = [accuracy(a) >= accuracy(b) for a, b in zip(sdpo, grpo, strict=True)]
    short = f"{sum(reached)} of {len(reached)} seeds of SDPO end at or above GRPO's accuracy"
    return verdict._replace(because=f"{verdict.because}; {short}")


def main() -> None:
    """Trains, prints the table and the verdict, draws the pictures."""
    options = parse(__doc__, NAME)
    options.runs.mkdir(parents=True, exist_ok=True)
    shared = (*TALK, "--model.path", talking(options))
    arms = [Arm("SDPO", "configs/nano.toml", shared), Arm("GRPO", "configs/nano_grpo.toml", shared)]
    arms, rates = best_rates(arms, RATES[:1] if options.quick else RATES, options, accuracy)
    found = train_all(arms, options)
    table = tabulate(
        found,
        [
            ("before", lambda run: run.evaluations[0]["accuracy"]),
            ("tokens before", lambda run: run.evaluations[0]["response_tokens"]),
            ("after 10 steps", lambda run: run.evaluations[1]["response_tokens"]),
            ("accuracy", accuracy),
            ("tokens", tokens),
        ],
    )
    drawn = pictures({"length.svg": arms}, options, metric="response_tokens")
    drawn += pictures({"length_accuracy.svg": arms}, options)
    verdicts, seconds = [verdict_of(found["SDPO"], found["GRPO"])], seconds_of(found)
    write(NAME, options, table, verdicts, seconds, rates=rates, pictures=drawn)


if __name__ == "__main__":
    main()
