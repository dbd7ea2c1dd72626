"""Measures of forgetting when one model learns several tasks in sequence.

`accuracies[s][t]` is the accuracy on task t after stage s, where row 0 is the model before all
training and stage s trained task s - 1. The protocol is that of SDFT (arXiv 2601.19897, section 5):
one model learns the tasks in order, all accuracies are tracked, and each is normalised so that 0 is
the model before training and 1 the best of the compared methods. Pure Python.
"""

from collections.abc import Sequence
from typing import NamedTuple

Accuracies = Sequence[Sequence[float]]
"""`[stages + 1][tasks]`."""


class Spread(NamedTuple):
    """A number over the seeds of one setting."""

    mean: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """Mean, smallest and largest.

    >>> spread([1.0, 2.0, 6.0])
    Spread(mean=3.0, low=1.0, high=6.0)
    """
    if not values:
        raise ValueError("expected the value of at least one seed, got none")
    return Spread(sum(values) / len(values), min(values), max(values))


def final_mean(accuracies: Accuracies) -> float:
    """Mean over the tasks after the last stage.

    >>> final_mean([[0.0, 0.0], [0.8, 0.1], [0.6, 0.9]])
    0.75
    """
    _check(accuracies)
    return sum(accuracies[-1]) / len(accuracies[-1])


def learned(accuracies: Accuracies) -> float:
    """Mean over the tasks of the accuracy right after the stage that trained it.

    >>> learned([[0.0, 0.0], [0.8, 0.1], [0.6, 0.9]])
    0.8500000000000001
    """
    _check(accuracies)
    tasks = len(accuracies[0])
    return sum(accuracies[t + 1][t] for t in range(tasks)) / tasks


def forgetting(accuracies: Accuracies) -> float:
    """Mean over the tasks but the last of: best since it was trained, minus that at the end.

    At least 0; later stages that help an earlier task count as no forgetting, not as negative.

    Source: Chaudhry et al., arXiv 1801.10112, with the last stage among those that may be best.

    >>> forgetting([[0.0, 0.0], [0.75, 0.125], [0.5, 1.0]])
    0.25
    """
    _check(accuracies)
    tasks = len(accuracies[0])
    if tasks < 2:
        return 0.0
    lost = [
        max(row[t] for row in accuracies[t + 1 :]) - accuracies[-1][t] for t in range(tasks - 1)
    ]
    return sum(lost) / len(lost)


def normalised(value: float, base: float, best: float) -> float:
    """(value - base) / (best - base): 0 is the model before training, 1 the best method.

    Negative where a method falls below the model before training.

    Raises:
      ValueError: no method is better than the model before training: there is no scale.

    >>> normalised(0.5, base=0.25, best=0.75)
    0.5
    """
    if not best > base:
        raise ValueError(f"expected a best value above that before training, got {best} and {base}")
    return (value - base) / (best - base)


def normalised_table(accuracies: Accuracies, best: Sequence[float]) -> list[list[float]]:
    """Each accuracy on its task's scale; `best[t]` over all methods, seeds and stages.

    >>> normalised_table([[0.0, 0.5], [1.0, 0.0]], best=[2.0, 1.0])
    [[0.0, 0.0], [0.5, -1.0]]
    """
    _check(accuracies, stages_of_each=False)
    base = accuracies[0]
    return [
        [normalised(x, b, most) for x, b, most in zip(row, base, best, strict=True)]
        for row in accuracies
    ]


def _check(accuracies: Accuracies, *, stages_of_each: bool = True) -> None:
    tasks = {len(row) for row in accuracies}
    if len(tasks) != 1 or tasks == {0}:
        raise ValueError(f"expected one accuracy per task in every row, got rows of {tasks}")
    if stages_of_each and len(accuracies) != tasks.pop() + 1:
        raise ValueError(
            f"expected a row before training and one after each of {len(accuracies[0])} stages, "
            f"got {len(accuracies)} rows"
        )
