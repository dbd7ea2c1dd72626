"""discovery@k: the probability that a method has solved a question within k generations.

    discovery@k = P(the first correct answer is among the first k generations)

(arXiv 2601.20802, section 5; for independent samples it is pass@k). A `Cell` is one method on one
question with one seed. Two kinds of method need two estimators of a question's discovery@k:

* Methods that stop at their first success: the share of seeds with `first <= k`. A cell without a
  success counts as not discovered up to its budget; beyond the budget there is no estimate.
* Methods that draw independent samples: with `c` successes in the `n` samples of all seeds,
  1 - C(n-c, k) / C(n, k), unbiased, for k up to n.

Questions count equally. Intervals are percentiles of a bootstrap over the seeds of each question,
as in the paper; questions are not resampled, since they were chosen and not drawn. Where all seeds
agree, the interval has no width, although other seeds might differ. Needs numpy alone; validated in
tests/test_discovery.py against enumeration of all samples and draws with known probabilities.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sdpo_jax.evaluation.estimators import pass_at_k, powers_of_two

CONFIDENCE = 0.9
"""Level of the intervals, as in the paper's figures 19 and 20."""
RESAMPLES = 2000


class Cell(NamedTuple):
    """The result of one method on one question with one seed."""

    method: str
    question: str
    seed: int
    budget: int
    """Generations that the method may use."""
    first: int | None
    """Generations up to and including the first success; None without a success."""
    generations: int
    """Generations that were sampled, all of the last step included."""
    passed: tuple[int, ...]
    """Successes of each step; a step is a batch of generations, or one turn."""
    failed: int
    """Generations that the environment could not grade; they count as generations."""
    seconds: float
    independent: bool = False
    """Whether all `generations` are independent samples that no success has stopped."""


class Estimate(NamedTuple):
    """A probability with its interval."""

    k: int
    probability: float
    low: float
    high: float


def fine_grid(most: int, per_doubling: int = 8) -> list[int]:
    """Whole numbers from 1 to `most`, about evenly spread on a log axis; for curves."""
    count = max(1, round(per_doubling * math.log2(max(most, 2))))
    return sorted({round(most ** (i / count)) for i in range(count + 1)})


def reach(cells: Sequence[Cell]) -> int:
    """The largest k for which the cells of one method give an estimate, for every question."""
    return min(
        sum(c.generations for c in group) if group[0].independent else min(c.budget for c in group)
        for group in _by_question(cells)
    )


def discovery(
    cells: Sequence[Cell], ks: Sequence[int], *, seed: int = 0, resamples: int = RESAMPLES
) -> list[Estimate]:
    """discovery@k of one method at each k up to its `reach`, with bootstrap intervals.

    Args:
      cells: of one method; any number of seeds for each question.
      ks: generations; larger ones than the cells reach are left out.
      seed: of the bootstrap.
      resamples: of the bootstrap.
    """
    ks = [k for k in ks if k <= reach(cells)]
    rng = np.random.default_rng(seed)
    groups = _by_question(cells)
    as_drawn = [_resampled(group, np.arange(len(group))[None], ks)[0] for group in groups]
    point = np.mean(as_drawn, axis=0)  # [K]
    drawn = np.zeros((resamples, len(ks)))  # [R, K]
    for group in groups:
        picks = rng.integers(len(group), size=(resamples, len(group)))  # [R, seeds]
        drawn += _resampled(group, picks, ks) / len(groups)
    edges = (0.5 - CONFIDENCE / 2, 0.5 + CONFIDENCE / 2)
    low, high = np.quantile(drawn, edges, axis=0)
    return [Estimate(k, *map(float, x)) for k, *x in zip(ks, point, low, high, strict=True)]


def mean_generations(cells: Sequence[Cell], budget: int) -> float:
    """Mean generations to discovery, truncated at `budget`: the sum of P(not yet) over k < budget.

    Raises:
      ValueError: the cells do not reach the budget.
    """
    if budget > reach(cells):
        raise ValueError(f"budget {budget}: the cells reach {reach(cells)} generations")
    means: list[float] = []
    for group in _by_question(cells):
        if group[0].independent:
            n, c = sum(cell.generations for cell in group), sum(sum(cell.passed) for cell in group)
            means.append(sum(1.0 - pass_at_k(n, c, k) for k in range(budget)))
        else:
            means.append(sum(min(cell.first or budget, budget) for cell in group) / len(group))
    return sum(means) / len(means)


def discovered(cells: Sequence[Cell]) -> int:
    """Number of cells with a success."""
    return sum(cell.first is not None for cell in cells)


class SpeedUp(NamedTuple):
    """Generations of two methods for the same probability of discovery."""

    probability: float
    """The highest probability that both reach."""
    ours: int
    theirs: int
    ratio: float
    """How many times more generations the other method needs."""


def speed_up(ours: Sequence[Cell], theirs: Sequence[Cell]) -> SpeedUp | None:
    """Generations at equal probability; None if one of the two never discovers anything."""
    curves = [discovery(cells, range(1, reach(cells) + 1), resamples=1) for cells in (ours, theirs)]
    probability = min(curve[-1].probability for curve in curves)
    if probability <= 0.0:
        return None
    our_k, their_k = (
        next(e.k for e in curve if e.probability >= probability - 1e-12) for curve in curves
    )
    return SpeedUp(probability, our_k, their_k, their_k / our_k)


def summary(cells: Sequence[Cell], budget: int) -> dict[str, Any]:
    """All results of a run, for JSON: by method, by question, and speed-ups of the first method.

    Args:
      cells: of all methods; the others are compared with the method of the first cell.
      budget: where means are truncated.
    """
    methods = grouped(cells, lambda cell: cell.method)
    (first, ours), *others = methods.items()
    speed_ups = {name: speed_up(ours, theirs) for name, theirs in others}
    return {
        "confidence": CONFIDENCE,
        "budget": budget,
        "methods": {name: _summary_of(group, budget) for name, group in methods.items()},
        "speed_up_of": first,
        "speed_up_over": {name: gain and gain._asdict() for name, gain in speed_ups.items()},
    }


def _summary_of(cells: Sequence[Cell], budget: int) -> dict[str, Any]:
    return {
        "cells": len(cells),
        "discovered": discovered(cells),
        "mean_generations": mean_generations(cells, budget),
        "generations": sum(cell.generations for cell in cells),
        "seconds": sum(cell.seconds for cell in cells),
        "discovery": [e._asdict() for e in discovery(cells, powers_of_two(reach(cells)))],
        "questions": {
            group[0].question: {
                "seeds": len(group),
                "discovered": discovered(group),
                "mean_generations": mean_generations(group, budget),
            }
            for group in _by_question(cells)
        },
    }


def _by_question(cells: Sequence[Cell]) -> list[list[Cell]]:
    return list(grouped(cells, lambda cell: cell.question).values())


def grouped(cells: Sequence[Cell], key: Callable[[Cell], str]) -> dict[str, list[Cell]]:
    """The cells of each key, such as their method, in the order of the first ones."""
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(key(cell), []).append(cell)
    return groups


def _resampled(
    group: Sequence[Cell], picks: NDArray[np.integer[Any]], ks: Sequence[int]
) -> NDArray[np.float64]:
    """discovery@k [R, K] of one question for seeds drawn with replacement, `picks: [R, seeds]`."""
    if not group[0].independent:
        first = np.asarray([math.inf if c.first is None else c.first for c in group])
        is_solved = first[:, None] <= np.asarray(ks)[None]  # [seeds, K]
        return is_solved[picks].mean(axis=1)
    n = np.asarray([c.generations for c in group])[picks].sum(axis=1)  # [R]
    c = np.asarray([sum(cell.passed) for cell in group])[picks].sum(axis=1)
    pairs: list[tuple[int, int]] = list(zip(n.tolist(), c.tolist(), strict=True))
    known = {pair: [pass_at_k(*pair, min(k, pair[0])) for k in ks] for pair in set(pairs)}
    return np.asarray([known[pair] for pair in pairs])
