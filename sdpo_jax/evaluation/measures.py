"""The measures that an evaluation reports, as sums and weights of each prompt.

Every measure, lengths included, is over the responses that could be graded, so that all numbers of
an evaluation are about the same responses. None needs another forward pass.

* `accuracy`: avg@k, the share of samples that pass; `accuracy/FAMILY`, `accuracy/difficulty/NAME`.
* `pass_at_K`, `maj_at_K`, `best_at_K`: see `estimators`; over prompts with at least K graded
  samples. A majority of one or two equals accuracy and is left out; `best_at_K` is reported only
  if some reward is neither 0 nor 1.
* `response_tokens`, `truncated`.
* `entropy`: nats per token, Σ −log p(y_t) / Σ tokens over the samples. By the chain rule
  −Σ_t log p(y_t | y_<t) is an unbiased estimate of the entropy of a response; p is the sampling
  distribution, which is the model's own at temperature 1 without filters. Absent if greedy.
* `repetition`: mean share of a response's 4-grams of tokens that occur earlier in it (seq-rep-4,
  Welleck et al., arXiv 1908.04319).
* `most_common_output`: share of a prompt's samples that equal its most frequent one.
* `teacher_accuracy`, `same_output`: shares of the teacher's answers, one for each attempt with a
  context, that pass, and that repeat the attempt (arXiv 2601.20802, table 6); over all answers and
  by kind of context.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sdpo_jax.environments.base import Outcome, Prompt
from sdpo_jax.environments.grading import failed_share
from sdpo_jax.evaluation.estimators import Measure, best_at_k, majority_at_k, pass_at_k

Measures = dict[str, Measure]


class Graded(NamedTuple):
    """Responses with their outcomes; row `n` belongs to prompt `n // G`."""

    responses: list[str]
    outcomes: list[Outcome]
    lengths: list[int]
    stopped: list[bool]
    log_probs: Sequence[float] = ()
    """[N], of whole responses, under the sampling distribution. Empty if greedy: the sampler then
    returns log-probabilities at temperature 1, which do not estimate an entropy."""
    repetition: Sequence[float] = ()
    """[N], see `repeated_share`."""
    first: Sequence[Outcome] = ()
    """[N], outcomes of the first turn if episodes may have several; `outcomes` are of the last."""
    turns: Sequence[int] = ()
    """[N], turns of the model."""
    ids: Sequence[Sequence[int]] = ()
    """[N], tokens of responses of a single turn."""


def student_measures(
    graded: Graded,
    prompts: Sequence[Prompt],
    answers: Sequence[str | None] | None = None,
    *,
    ks: Sequence[int] = (),
) -> Measures:
    """Measures of the student's samples.

    Args:
      graded: `G` samples of each prompt.
      prompts: [P].
      answers: [N], the answer that each sample votes for; None: unknown.
      ks: for pass@k, maj@k and best@k, each at most `G`.
    """
    ok = np.asarray([outcome.graded for outcome in graded.outcomes])
    owner = np.arange(len(ok)) // (len(ok) // len(prompts))

    def mean(values: ArrayLike, weights: ArrayLike = 1.0, *, share: bool = True) -> Measure:
        return by_prompt(owner, np.where(ok, values, 0.0), ok * weights, len(prompts), share=share)

    accuracy = mean([outcome.passed for outcome in graded.outcomes])
    measures = {
        "accuracy": accuracy,
        "response_tokens": mean(graded.lengths, share=False),
        "truncated": mean(~np.asarray(graded.stopped)),
    }
    measures |= {f"accuracy/{name}": accuracy.of(rows) for name, rows in groups(prompts).items()}
    rows_of = [np.flatnonzero(ok & (owner == i)).tolist() for i in range(len(prompts))]
    measures |= _at_k(graded, rows_of, answers, ks)
    if len(graded.log_probs):
        measures["entropy"] = mean(-np.asarray(graded.log_probs), graded.lengths, share=False)
    if len(graded.repetition):
        measures["repetition"] = mean(graded.repetition)
    if graded.turns:
        measures["accuracy_first_turn"] = mean([outcome.passed for outcome in graded.first])
        measures["turns"] = mean(graded.turns, share=False)
    if len(ok) > len(prompts):
        counts = [Counter(graded.responses[i] for i in rows) for rows in rows_of]
        most = [max(count.values(), default=0) for count in counts]
        measures["most_common_output"] = Measure(np.asarray(most, np.float64), accuracy.weights)
    return {name: measure for name, measure in measures.items() if measure.weights.any()}


def _at_k(
    graded: Graded,
    rows_of: Sequence[list[int]],
    answers: Sequence[str | None] | None,
    ks: Sequence[int],
) -> Measures:
    """Estimates for each number of samples `k`, over prompts with at least `k` graded samples."""
    passed = [float(outcome.passed) for outcome in graded.outcomes]
    rewards = [float(outcome.reward) for outcome in graded.outcomes]

    def of(estimator: Callable[[list[int], int], float], k: int, share: bool = True) -> Measure:
        found = [estimator(rows, k) if len(rows) >= k else 0.0 for rows in rows_of]
        enough = [float(len(rows) >= k) for rows in rows_of]
        return Measure(np.asarray(found), np.asarray(enough), share)

    def passes(rows: list[int], k: int) -> float:
        return pass_at_k(len(rows), sum(passed[i] > 0 for i in rows), k)

    def majority(rows: list[int], k: int) -> float:
        votes = [None if answers is None else answers[i] for i in rows]
        return majority_at_k(votes, [passed[i] for i in rows], k)

    def best(rows: list[int], k: int) -> float:
        return best_at_k([rewards[i] for i in rows], k)

    measures = {f"pass_at_{k}": of(passes, k) for k in ks}
    if answers is not None:
        measures |= {f"maj_at_{k}": of(majority, k) for k in ks if k > 2}
    if any(rewards[i] not in (0.0, 1.0) for rows in rows_of for i in rows):
        measures |= {f"best_at_{k}": of(best, k, share=False) for k in ks}
    return measures


def teacher_measures(
    graded: Graded, answered: Graded, rows: Sequence[int], kinds: Sequence[str], prompts: int
) -> Measures:
    """Measures of the teacher's answers, over all of them and by the kind of context.

    Args:
      graded: the student's attempts, [N].
      answered: the teacher's answers, one for each of `rows`.
      rows: which attempts had a context.
      kinds: the kind of context of each of `rows`, see `TeacherContext.kind`.
      prompts: P.
    """
    owner = np.asarray(rows) // (len(graded.responses) // prompts)
    ok = np.asarray([outcome.graded for outcome in answered.outcomes])
    passed = [outcome.passed for outcome in answered.outcomes]
    same = [text == graded.responses[i] for text, i in zip(answered.responses, rows, strict=True)]
    marks = {"": np.ones(len(kinds), np.bool_)}
    marks |= {f"/{kind}": np.asarray(kinds) == kind for kind in sorted(set(kinds))}
    return {
        f"{name}{suffix}": by_prompt(owner, of_kind * np.asarray(values), of_kind * 1.0, prompts)
        for name, values in (("teacher_accuracy", passed), ("same_output", same))
        for suffix, chosen in marks.items()
        if (of_kind := chosen & ok).any()
    }


def by_prompt(
    owner: NDArray[np.int64], sums: Any, weights: Any, prompts: int, *, share: bool = True
) -> Measure:
    """Adds up rows of the same prompt; `owner: [N]` is the prompt of each row."""
    added = [np.asarray(np.bincount(owner, x, prompts), np.float64) for x in (sums, weights)]
    return Measure(*added, share=share)


def groups(prompts: Sequence[Prompt]) -> dict[str, NDArray[np.bool_]]:
    """`[P]` masks of each family and each difficulty; none if there is only one."""
    found: dict[str, NDArray[np.bool_]] = {}
    for key, prefix in (("family", ""), ("difficulty", "difficulty/")):
        labels = np.asarray([label_of(prompt, key) for prompt in prompts], object)
        names = sorted(set(labels) - {""})
        if len(set(labels)) > 1:
            found |= {f"{prefix}{name}": labels == name for name in names}
    return found


def label_of(prompt: Prompt, key: str) -> str:
    """`family` or `difficulty` of a prompt as text; empty if it has none."""
    return str(prompt.data.get(key) or "")


def values(measures: Measures) -> dict[str, float]:
    """The values, without sums and weights."""
    return {name: measure.value for name, measure in measures.items()}


def plain_numbers(graded: Graded) -> dict[str, float]:
    """Numbers without an interval: quantiles of the length, and the share that was not graded.

    The quantiles are the length that half, and 95 %, of the graded responses do not exceed. The
    share is there only where some could not be graded.
    """
    pairs = zip(graded.lengths, graded.outcomes, strict=True)
    lengths = [length for length, outcome in pairs if outcome.graded]
    numbers: dict[str, float] = {}
    if lengths:
        p50, p95 = np.quantile(lengths, [0.5, 0.95], method="inverted_cdf")
        numbers = {"response_tokens/p50": float(p50), "response_tokens/p95": float(p95)}
    if failed := failed_share(graded.outcomes):
        numbers["environment/failed"] = failed
    return numbers
