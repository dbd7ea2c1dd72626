"""Estimators against enumeration of all subsets, intervals against simulation."""

import doctest
import math
from itertools import combinations

import numpy as np
import pytest

from benchmarks.claims import forgetting
from sdpo_jax.evaluation import estimators
from sdpo_jax.evaluation.estimators import (
    Measure,
    best_at_k,
    estimate,
    majority_at_k,
    paired_difference,
    pass_at_k,
    powers_of_two,
    wilson_interval,
)
from sdpo_jax.rollouts import diagnostics


def by_enumeration(items, k, value):
    """Mean of `value` over all subsets of `k` items."""
    return np.mean([value([items[i] for i in s]) for s in combinations(range(len(items)), k)])


def measure(sums, weights, share=True):
    return Measure(np.asarray(sums, np.float64), np.asarray(weights, np.float64), share)


def bounds(found):
    """The interval of an estimate that has one."""
    assert found.low is not None and found.high is not None
    return found.low, found.high


@pytest.mark.parametrize("module", [estimators, diagnostics, forgetting])
def test_examples_in_docstrings_run(module):
    result = doctest.testmod(module)
    assert result.failed == 0 and result.attempted > 0


def test_k_are_powers_of_two_and_all_samples():
    assert [powers_of_two(n) for n in (1, 2, 4, 6)] == [[1], [1, 2], [1, 2, 4], [1, 2, 4, 6]]


# pass@k and best@k


@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_pass_at_k_is_the_share_of_subsets_with_a_success(n):
    for c in range(n + 1):
        passed = [True] * c + [False] * (n - c)
        for k in range(1, n + 1):
            assert pass_at_k(n, c, k) == pytest.approx(by_enumeration(passed, k, any), abs=1e-14)


def test_pass_at_k_is_unbiased_for_independent_samples():
    random, p, n, k = np.random.default_rng(0), 0.15, 12, 5
    counts = random.binomial(n, p, size=20_000)
    of_count = np.array([pass_at_k(n, c, k) for c in range(n + 1)])
    mean, error = of_count[counts].mean(), of_count[counts].std() / math.sqrt(len(counts))
    assert abs(mean - (1 - (1 - p) ** k)) < 4 * error
    # The plug-in estimate is what a naive implementation would do, and is far off.
    plug_in = (1 - (1 - counts / n) ** k).mean()
    assert abs(plug_in - (1 - (1 - p) ** k)) > 10 * error


def test_pass_at_k_of_many_samples_neither_overflows_nor_loses_digits():
    n, c, k = 10_000, 7, 3_000
    exact = 1 - math.comb(n - c, k) / math.comb(n, k)
    assert pass_at_k(n, c, k) == pytest.approx(exact, rel=1e-12)
    assert pass_at_k(10**9, 1, 1) == pytest.approx(1e-9, rel=1e-9)


def test_best_at_k_is_the_mean_of_the_largest_of_each_subset():
    rewards = [0.25, 1.0, 0.0, 0.5, 0.5, -1.0]
    for k in range(1, len(rewards) + 1):
        assert best_at_k(rewards, k) == pytest.approx(by_enumeration(rewards, k, max), abs=1e-14)
    assert best_at_k([3.0], 1) == 3.0


def test_best_at_k_of_zeros_and_ones_is_pass_at_k():
    for c in range(7):
        for k in range(1, 7):
            rewards = [1.0] * c + [0.0] * (6 - c)
            assert best_at_k(rewards, k) == pytest.approx(pass_at_k(6, c, k), abs=1e-14)


# maj@k


def elected(worth):
    """Value of the majority among (answer, value) pairs, ties shared; written anew."""

    def value(pairs):
        votes = [answer for answer, _ in pairs if answer is not None]
        if not votes:
            return 0.0
        most = max(votes.count(a) for a in votes)
        return np.mean([worth[a] for a in sorted(set(votes)) if votes.count(a) == most])

    return value


@pytest.mark.parametrize("seed", range(6))
def test_majority_is_the_mean_over_all_subsets_with_ties_shared(seed):
    random = np.random.default_rng(seed)
    n = 8
    answers = [None if a == 0 else "abcd"[a - 1] for a in random.integers(0, 4, size=n)]
    worth = {"a": 1.0, "b": 0.0, "c": 0.5, "d": 1.0}
    values = [0.0 if a is None else worth[a] for a in answers]
    for k in range(1, n + 1):
        expected = by_enumeration(list(zip(answers, values, strict=True)), k, elected(worth))
        assert majority_at_k(answers, values, k) == pytest.approx(expected, abs=1e-12)


def test_a_tie_is_worth_the_mean_of_the_tied_answers():
    assert majority_at_k(["a", "b", "b", "a", "c"], [1, 0, 0, 1, 0], 5) == 0.5
    assert majority_at_k(["a", "b", "c"], [1, 0, 0], 3) == pytest.approx(1 / 3)


def test_samples_without_an_answer_do_not_vote():
    assert majority_at_k([None, None, None, "a"], [0, 0, 0, 1], 4) == 1.0
    assert majority_at_k([None, None], [0, 0], 2) == 0.0
    assert majority_at_k([None, "a"], [0, 1], 1) == 0.5


def test_majority_of_one_and_of_two_is_accuracy_where_all_answer():
    answers, values = list("aabcc"), [1, 1, 0, 0, 0]
    for k in (1, 2):
        assert majority_at_k(answers, values, k) == pytest.approx(2 / 5)


def test_drawn_subsets_agree_with_counted_ones(monkeypatch):
    answers = list("aaaaabbbbcccdd") + [None] * 3
    values = [float(a == "b") for a in answers]
    exact = majority_at_k(answers, values, 6)
    monkeypatch.setattr(estimators, "EXACT_SAMPLES", 1)
    drawn = majority_at_k(answers, values, 6, seed=1)
    assert drawn != exact  # or the other path was not taken
    assert abs(drawn - exact) < 4 * 0.5 / math.sqrt(estimators.SUBSETS)
    assert majority_at_k(answers, values, 6, seed=1) == drawn


@pytest.mark.parametrize("k", [0, 4])
def test_k_outside_the_samples_is_refused(k):
    for call in (
        lambda: pass_at_k(3, 1, k or -1),
        lambda: best_at_k([0.0, 1.0, 1.0], k),
        lambda: majority_at_k(["a", "b", "b"], [0.0, 1.0, 1.0], k),
    ):
        with pytest.raises(ValueError, match=r"[01] <= k <= "):
            call()


# Intervals


def test_wilson_solves_its_defining_equation():
    for share, n in ((0.3, 10), (0.5, 1), (0.97, 400)):
        for bound in wilson_interval(share, n):
            z = abs(share - bound) / math.sqrt(bound * (1 - bound) / n)
            assert z == pytest.approx(1.959964, abs=1e-5)
    assert wilson_interval(0.0, 5)[0] == 0.0 and wilson_interval(1.0, 5)[1] == 1.0


def coverage(samples, runs=300, prompts=60):
    """Share of intervals that hold the true mean; prompts differ in difficulty."""
    random, held, naive = np.random.default_rng(samples), 0, 0
    for run in range(runs):
        chance = random.beta(0.6, 0.9, size=prompts)
        sums = random.binomial(samples, chance)
        found = estimate(measure(sums, [samples] * prompts), seed=run)
        held += bounds(found)[0] <= 0.4 <= bounds(found)[1]
        low, high = wilson_interval(sums.mean() / samples, prompts * samples)
        naive += low <= 0.4 <= high
    return held / runs, naive / runs


def test_intervals_hold_the_truth_in_about_95_of_100_evaluations(monkeypatch):
    monkeypatch.setattr(estimators, "RESAMPLES", 400)
    # Binomial noise of 300 runs: 0.0126; the percentile interval is a little narrow.
    assert 0.89 <= coverage(1)[0] <= 0.99
    clustered, naive = coverage(8)
    assert 0.89 <= clustered <= 0.99
    assert naive < 0.8  # samples of one prompt are not independent


def test_one_sample_of_each_prompt_has_wilsons_interval():
    sums = [1, 0, 0, 1, 1]
    found = estimate(measure(sums, [1] * 5))
    assert found == (0.6, *wilson_interval(0.6, 5))
    # Prompts that were not graded are no trials.
    assert estimate(measure([*sums, 0], [1] * 5 + [0])) == found


def test_no_success_at_all_still_has_an_upper_bound():
    found = estimate(measure([0] * 20, [4] * 20))
    assert found.value == found.low == 0.0
    assert bounds(found)[1] == pytest.approx(wilson_interval(0.0, 20)[1]) and bounds(found)[1] > 0.1


def test_the_bootstrap_agrees_with_the_normal_approximation_of_a_ratio():
    random = np.random.default_rng(3)
    weights = random.integers(1, 9, size=400).astype(float)
    sums = random.gamma(2.0, 3.0, size=400) * weights
    found = estimate(measure(sums, weights, share=False))
    value = sums.sum() / weights.sum()
    error = math.sqrt(np.sum((sums - value * weights) ** 2)) / weights.sum()
    assert found.value == pytest.approx(value)
    assert found.low == pytest.approx(value - 1.96 * error, abs=0.25 * error)
    assert found.high == pytest.approx(value + 1.96 * error, abs=0.25 * error)


def test_the_same_seed_gives_the_same_interval_whatever_is_drawn_at_a_time(monkeypatch):
    random = np.random.default_rng(0)
    one = measure(random.binomial(4, 0.3, size=50), [4] * 50)
    found = estimate(one, seed=5)
    monkeypatch.setattr(estimators, "_DRAWS_AT_A_TIME", 700)
    assert estimate(one, seed=5) == found
    assert estimate(one, seed=6) != found


def test_where_prompts_agree_or_there_is_one_there_is_no_interval():
    assert estimate(measure([6, 6, 6], [2, 2, 2], share=False)) == (3.0, None, None)
    assert estimate(measure([1], [2])) == (0.5, None, None)
    nothing = estimate(measure([0, 0], [0, 0]))
    assert math.isnan(nothing.value) and nothing[1:] == (None, None)


# Two evaluations of the same prompts


def test_a_paired_difference_is_far_surer_than_two_intervals_apart():
    random = np.random.default_rng(1)
    chance = random.choice([0.05, 0.9], size=200)
    before = measure(random.binomial(8, chance), [8] * 200)
    after = measure(random.binomial(8, np.minimum(1.0, chance + 0.08)), [8] * 200)
    found = paired_difference(before, after)
    assert found.value == pytest.approx(after.value - before.value)
    low, high = bounds(found)
    assert 0 < low < found.value < high
    first, second = bounds(estimate(before)), bounds(estimate(after))
    assert first[1] > second[0]  # apart, the two overlap
    assert high - low < 0.6 * (second[1] - second[0])
    per_prompt = (after.sums - before.sums) / 8
    error = per_prompt.std() / math.sqrt(200)
    assert found.low == pytest.approx(found.value - 1.96 * error, abs=0.25 * error)
    assert found.high == pytest.approx(found.value + 1.96 * error, abs=0.25 * error)


def test_prompts_that_only_one_side_could_grade_have_no_part_in_a_difference():
    before = measure([1, 0, 4, 2], [4, 0, 4, 4])
    after = measure([3, 4, 0, 1], [4, 4, 0, 4])
    found = paired_difference(before, after)
    assert found.value == pytest.approx(4 / 8 - 3 / 8)
    assert found == paired_difference(measure([1, 2], [4, 4]), measure([3, 1], [4, 4]))
    with pytest.raises(ValueError, match="the same prompts; got 1 and 4"):
        paired_difference(measure([1], [1]), after)


def test_an_evaluation_does_not_differ_from_itself():
    one = measure([1, 2, 3], [4, 4, 4])
    assert paired_difference(one, one) == (0.0, None, None)
