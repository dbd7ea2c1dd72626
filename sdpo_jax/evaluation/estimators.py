"""Estimators from graded samples: pass@k, majority of k, best of k, with confidence intervals.

Plain numpy on the host. A metric is a `Measure`: sums and weights of each prompt. Intervals
resample whole prompts, because samples of one prompt are not independent.

`tests/test_estimators.py` compares each estimator with enumeration of all subsets, and the
intervals' coverage with simulations.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

LEVEL = 0.95
RESAMPLES = 2000
EXACT_SAMPLES = 128
"""Up to this many samples of a prompt, majorities are exact; above, subsets are drawn."""
SUBSETS = 1000
_DRAWS_AT_A_TIME = 1 << 20


class Measure(NamedTuple):
    """A mean in parts: prompt `i` adds `sums[i]` and `weights[i]`; weight 0 leaves it out."""

    sums: NDArray[np.float64]  # [P]
    weights: NDArray[np.float64]  # [P]
    share: bool = True
    """Whether it is a mean of numbers between 0 and 1."""

    @property
    def value(self) -> float:
        """Σ sums / Σ weights; not a number if no prompt has weight."""
        weight = float(self.weights.sum())
        return float(self.sums.sum()) / weight if weight else math.nan

    def resampled(self, rows: NDArray[np.intp]) -> NDArray[np.float64]:
        """The value `[R]` of each draw of prompts, `rows: [R, P]`."""
        return self.sums[rows].sum(axis=-1) / self.weights[rows].sum(axis=-1)

    def of(self, rows: NDArray[np.bool_]) -> "Measure":
        """The same measure over the prompts with `rows[P]` True."""
        return Measure(
            np.where(rows, self.sums, 0.0), np.where(rows, self.weights, 0.0), self.share
        )


class Estimate(NamedTuple):
    """A value with its interval; None if the data give no interval."""

    value: float
    low: float | None = None
    high: float | None = None


def powers_of_two(most: int) -> list[int]:
    """Numbers of samples `k` up to `most`: 1, 2, 4, ... and `most` itself.

    >>> powers_of_two(6)
    [1, 2, 4, 6]
    """
    return [*(1 << i for i in range((most - 1).bit_length())), most]


def pass_at_k(samples: int, successes: int, k: int) -> float:
    """Unbiased estimate of the probability that at least one of `k` samples passes.

        1 − C(n − c, k) / C(n, k) = 1 − Π_{i = n−c+1}^{n} (1 − k / i)

    Args:
      samples: graded samples of a prompt, n.
      successes: how many of them pass, c.
      k: from 0 to n.

    Raises:
      ValueError: not 0 ≤ c ≤ n, or not 0 ≤ k ≤ n.

    Source: Chen et al., arXiv 2107.03374, equation 1. The product is a sum of logarithms, which
    cannot overflow and stays precise for small probabilities.

    >>> print(f"{pass_at_k(4, 1, 2):.2f}")
    0.50
    """
    if not (0 <= successes <= samples and 0 <= k <= samples):
        raise ValueError(
            f"expected 0 <= c <= n and 0 <= k <= n; got n={samples}, c={successes}, k={k}"
        )
    if samples - successes < k:
        return 1.0
    some = range(samples - successes + 1, samples + 1)
    return -math.expm1(math.fsum(math.log1p(-k / i) for i in some))


def best_at_k(rewards: Sequence[float], k: int) -> float:
    """Mean of the largest of `k` rewards over all subsets of that size; unbiased.

    With rewards in ascending order, Σ_i r_i · C(i − 1, k − 1) / C(n, k). For rewards of 0 and 1 it
    is `pass_at_k`.

    Raises:
      ValueError: not 1 ≤ k ≤ n.

    >>> best_at_k([0.0, 0.5, 1.0], 2)  # of 0.5, 1.0, 1.0
    0.8333333333333333
    """
    n = len(rewards)
    if not 1 <= k <= n:
        raise ValueError(f"expected 1 <= k <= {n}, the number of rewards; got k={k}")
    total, weight = 0.0, k / n
    for i, reward in zip(range(n, k - 1, -1), sorted(rewards, reverse=True), strict=False):
        total += weight * reward
        weight *= (i - k) / (i - 1) if i > 1 else 0.0
    return total


def majority_at_k(
    answers: Sequence[str | None], values: Sequence[float], k: int, *, seed: int = 0
) -> float:
    """Expected value of the answer that most of `k` samples give (maj@k, self-consistency).

    Unbiased: the mean over all subsets of `k` of the `n` samples, computed by counting up to
    `EXACT_SAMPLES` samples; above, over `SUBSETS` seeded draws of a subset. The value of tied
    answers is their mean, because ties are broken at random. A sample without an answer has no
    vote; a subset without a vote has value 0. The value of an answer is the mean value of the
    samples that give it.

    Args:
      answers: [n], equal texts are equal answers; None: no answer.
      values: [n], 1 where a sample passes, else 0.
      k: from 1 to n.
      seed: of the draws.

    Raises:
      ValueError: not 1 ≤ k ≤ n, or not n values.

    Source: Wang et al., arXiv 2203.11171 (self-consistency).

    >>> majority_at_k(["a", "b", "b"], [0.0, 1.0, 1.0], 3)
    1.0
    >>> majority_at_k(["a", "b", "b"], [0.0, 1.0, 1.0], 1) == 2 / 3
    True
    """
    n = len(answers)
    if len(values) != n or not 1 <= k <= n:
        raise ValueError(f"expected {n} values and 1 <= k <= {n}; got {len(values)} and k={k}")
    of_answer: dict[str, list[float]] = {}
    for answer, value in zip(answers, values, strict=True):
        if answer is not None:
            of_answer.setdefault(answer, []).append(value)
    worth = {answer: sum(v) / len(v) for answer, v in of_answer.items()}
    if k == n:
        return _elected(answers, worth)
    if n <= EXACT_SAMPLES:
        votes = [(len(v), worth[answer]) for answer, v in of_answer.items()]
        return _over_subsets(votes, n, k)
    draws = np.random.default_rng(seed)
    subsets = (draws.permutation(n)[:k].tolist() for _ in range(SUBSETS))
    return sum(_elected([answers[i] for i in s], worth) for s in subsets) / SUBSETS


def _elected(answers: Sequence[str | None], worth: dict[str, float]) -> float:
    """Mean value of the most frequent answers."""
    counts = Counter(answer for answer in answers if answer is not None)
    most = max(counts.values(), default=0)
    tied = [worth[answer] for answer, count in counts.items() if count == most]
    return sum(tied) / len(tied) if tied else 0.0


def _over_subsets(votes: Sequence[tuple[int, float]], n: int, k: int) -> float:
    """Mean of `_elected` over all subsets of `k`; `votes` are (samples, value) of each answer.

    For each winning number of votes `top`, `ways[u, j]` counts the ways to choose `u` samples such
    that no answer has more than `top` and exactly `j` answers have `top`; `worth[u, j]` is the sum
    over these ways of the values of those `j` answers.
    """
    silent, total = n - sum(count for count, _ in votes), 0.0
    for top in range(1, min(k, max((count for count, _ in votes), default=0)) + 1):
        ways = np.zeros((k + 1, k // top + 1))  # [u, j]
        ways[0, 0], worth = 1.0, np.zeros((k + 1, k // top + 1))
        for count, value in votes:
            more_ways, more_worth = np.zeros_like(ways), np.zeros_like(worth)
            for given in range(min(count, top - 1, k) + 1):
                chosen, left = math.comb(count, given), k + 1 - given
                more_ways[given:] += chosen * ways[:left]
                more_worth[given:] += chosen * worth[:left]
            if count >= top:
                chosen, left = math.comb(count, top), k + 1 - top
                more_ways[top:, 1:] += chosen * ways[:left, :-1]
                more_worth[top:, 1:] += chosen * (worth[:left, :-1] + value * ways[:left, :-1])
            ways, worth = more_ways, more_worth
        ties = np.arange(1, worth.shape[1])
        for given in range(min(silent, k) + 1):
            total += math.comb(silent, given) * float(np.sum(worth[k - given, 1:] / ties))
    return total / math.comb(n, k)


def wilson_interval(share: float, trials: int) -> tuple[float, float]:
    """Wilson's score interval of a share of independent trials.

        (p + z²/2n ± z √(p (1 − p) / n + z²/4n²)) / (1 + z²/n)

    Source: Wilson, J. Am. Stat. Assoc. 22 (1927).

    >>> low, high = wilson_interval(0.0, 10)
    >>> low, round(high, 3)
    (0.0, 0.278)
    """
    if trials < 1 or not 0.0 <= share <= 1.0:
        raise ValueError(f"expected a share of at least one trial; got {share} of {trials}")
    z = NormalDist().inv_cdf((1.0 + LEVEL) / 2.0)
    middle = share + z * z / (2 * trials)
    half = z * math.sqrt(share * (1.0 - share) / trials + (z / (2 * trials)) ** 2)
    scale = 1.0 + z * z / trials
    # In exact arithmetic the ends are 0 and 1; floating point misses them.
    low = (middle - half) / scale if share > 0.0 else 0.0
    return low, (middle + half) / scale if share < 1.0 else 1.0


def estimate(measure: Measure, *, seed: int = 0) -> Estimate:
    """Value and interval of a measure.

    If every prompt is 0 or 1 (one sample of each, pass@n, no success at all), prompts are trials
    and the interval is Wilson's: a bootstrap of zeros alone would have no width. Otherwise it is
    the percentile interval of a bootstrap that draws prompts with all their samples (a cluster
    bootstrap). There is none if all prompts have the same mean, since the bootstrap has no width.
    """
    kept = np.flatnonzero(measure.weights > 0)
    sums, weights = measure.sums[kept], measure.weights[kept]
    if measure.share and len(kept) and bool(np.all((sums == 0) | (sums == weights))):
        return Estimate(measure.value, *wilson_interval(measure.value, len(kept)))
    return Estimate(measure.value, *_interval(measure.resampled, kept, seed))


def paired_difference(before: Measure, after: Measure, *, seed: int = 0) -> Estimate:
    """`after − before` of two evaluations of the same prompts, in the same order.

    Each bootstrap draw takes the same prompts of both, so that the difficulty of a prompt cancels
    out. Prompts without weight on either side are left out.

    Raises:
      ValueError: the two have different numbers of prompts.
    """
    if len(before.sums) != len(after.sums):
        raise ValueError(
            f"expected the same prompts; got {len(before.sums)} and {len(after.sums)} of them"
        )
    both = (before.weights > 0) & (after.weights > 0)

    def difference(rows: NDArray[np.intp]) -> NDArray[np.float64]:
        return after.resampled(rows) - before.resampled(rows)

    value = after.of(both).value - before.of(both).value
    return Estimate(value, *_interval(difference, np.flatnonzero(both), seed))


def _interval(
    resampled: Callable[[NDArray[np.intp]], NDArray[np.float64]], kept: NDArray[np.intp], seed: int
) -> tuple[float | None, float | None]:
    """Percentiles of `resampled` over draws of the prompts `kept`, in batches to bound memory."""
    prompts = len(kept)
    if prompts < 2:  # there is no variance between prompts to estimate
        return None, None
    draws = np.random.default_rng(seed)
    at_a_time = max(1, _DRAWS_AT_A_TIME // prompts)
    sizes = [min(at_a_time, RESAMPLES - start) for start in range(0, RESAMPLES, at_a_time)]
    drawn = [resampled(kept[draws.integers(prompts, size=(size, prompts))]) for size in sizes]
    values = np.concatenate(drawn)
    if np.ptp(values) < 1e-12:
        return None, None
    low, high = np.quantile(values, [(1.0 - LEVEL) / 2.0, (1.0 + LEVEL) / 2.0])
    return float(low), float(high)
