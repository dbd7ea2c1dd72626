"""The result of `sdpo eval`, as JSON and as a table of metrics.

The JSON also holds the results of every prompt, so that metrics can be computed again;
`docs/evaluation.md` describes every key.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from sdpo_jax.config import Config
from sdpo_jax.environments.base import Outcome, Prompt
from sdpo_jax.evaluation.estimators import (
    LEVEL,
    RESAMPLES,
    Estimate,
    estimate,
    paired_difference,
    powers_of_two,
)
from sdpo_jax.evaluation.measures import Graded, Measures, label_of, plain_numbers, student_measures

FORMAT = 1


class Evaluation(NamedTuple):
    """The results of one model on all prompts."""

    measures: Measures
    plain: dict[str, float]
    """Numbers without an interval."""
    prompts: list[dict[str, Any]]


def evaluation(
    prompts: Sequence[Prompt],
    sampled: Graded,
    answers: Sequence[str | None] | None,
    greedy: Graded,
    teacher: Measures,
) -> Evaluation:
    """The measures and the results by prompt of one model.

    Args:
      prompts: [P].
      sampled: `G` samples of each.
      answers: [P·G], see `HasAnswers`; None: the environment has none.
      greedy: one response of each.
      teacher: see `teacher_measures`.
    """
    group = len(sampled.responses) // len(prompts)
    measures = student_measures(sampled, prompts, answers, ks=powers_of_two(group))
    if (greedily := student_measures(greedy, prompts).get("accuracy")) is not None:
        measures["accuracy_greedy"] = greedily
    listed = [
        _prompt(prompt, sampled, answers, slice(i * group, (i + 1) * group))
        | {"greedy": _passed(greedy.outcomes[i])}
        | {"teacher": {k: [float(m.sums[i]), float(m.weights[i])] for k, m in teacher.items()}}
        for i, prompt in enumerate(prompts)
    ]
    return Evaluation(measures | teacher, plain_numbers(sampled), listed)


def _prompt(
    prompt: Prompt, sampled: Graded, answers: Sequence[str | None] | None, rows: slice
) -> dict[str, Any]:
    outcomes = sampled.outcomes[rows]
    return {
        "id": prompt.id,
        "family": label_of(prompt, "family"),
        "difficulty": label_of(prompt, "difficulty"),
        "samples": sum(outcome.graded for outcome in outcomes),
        "successes": sum(outcome.graded and outcome.passed for outcome in outcomes),
        "passed": [_passed(outcome) for outcome in outcomes],
        "rewards": [float(outcome.reward) if outcome.graded else None for outcome in outcomes],
        "answers": None if answers is None else list(answers[rows]),
        "tokens": sampled.lengths[rows],
        "truncated": [not stopped for stopped in sampled.stopped[rows]],
        "log_probs": list(sampled.log_probs[rows]),
    }


def _passed(outcome: Outcome) -> bool | None:
    return bool(outcome.passed) if outcome.graded else None


def report(rows: Mapping[str, Evaluation], config: Config, samples: int) -> dict[str, Any]:
    """The JSON of evaluations of the same prompts; each is compared with the first.

    Args:
      rows: by name, such as `start` and `step 60`.
      config: the settings of all of them.
      samples: of each prompt.
    """
    settings = config.evaluation
    first, *others = rows.items()
    return {
        "format": FORMAT,
        "settings": {
            "model": config.model.path,
            "environment": config.environment.kind,
            "seed": config.seed,
            "samples": samples,
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            "top_k": settings.top_k,
            "min_p": settings.min_p,
            "max_response_tokens": config.rollout.max_response_tokens,
            "level": LEVEL,
            "resamples": RESAMPLES,
        },
        "rows": {
            name: {"metrics": _metrics(row, config.seed), "prompts": row.prompts}
            for name, row in rows.items()
        },
        "differences": {name: _differences(first[1], row, config.seed) for name, row in others},
    }


def _metrics(row: Evaluation, seed: int) -> dict[str, dict[str, float | None]]:
    found = {name: estimate(m, seed=seed)._asdict() for name, m in row.measures.items()}
    return found | {name: Estimate(v)._asdict() for name, v in row.plain.items()}


def _differences(
    before: Evaluation, after: Evaluation, seed: int
) -> dict[str, dict[str, float | None]]:
    """Paired differences of the metrics that both evaluations have."""
    both = [name for name in before.measures if name in after.measures]
    found = {
        name: paired_difference(before.measures[name], after.measures[name], seed=seed)
        for name in both
    }
    plain = [name for name in before.plain if name in after.plain]
    found |= {name: Estimate(after.plain[name] - before.plain[name]) for name in plain}
    return {name: e._asdict() for name, e in found.items() if math.isfinite(e.value)}


def table(made: Mapping[str, Any]) -> str:
    """A report as text: one line per metric, with every row and its difference from the first."""
    columns = {name: row["metrics"] for name, row in made["rows"].items()}
    start = next(iter(columns))
    differences = {f"{name} - {start}": row for name, row in made["differences"].items()}
    whole = {name: name.partition("/")[0] for row in columns.values() for name in row}
    order = list(dict.fromkeys(whole.values()))
    names = sorted(whole, key=lambda name: order.index(whole[name]))  # parts below their metric
    signed = [(row, "") for row in columns.values()] + [(row, "+") for row in differences.values()]
    cells = [["", *columns, *differences]]
    cells += [[name, *(_cell(row.get(name), sign) for row, sign in signed)] for name in names]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = (zip(line, widths, strict=True) for line in cells)
    return "\n".join("  ".join(f"{c:<{w}}" for c, w in line).rstrip() for line in lines)


def _cell(estimated: Mapping[str, float | None] | None, sign: str) -> str:
    if estimated is None:
        return "-"
    value, low, high = (estimated[key] for key in Estimate._fields)
    if low is None:
        return f"{value:{sign}.3f}"
    return f"{value:{sign}.3f} [{low:{sign}.3f}, {high:{sign}.3f}]"
