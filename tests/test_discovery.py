"""discovery@k: estimators against enumeration and known distributions; the picture."""

import itertools
import math
import xml.etree.ElementTree as ElementTree
from math import comb

import numpy as np
import pytest

from sdpo_jax.discovery.estimator import (
    Cell,
    discovery,
    fine_grid,
    mean_generations,
    reach,
    speed_up,
    summary,
)
from sdpo_jax.discovery.options import METHODS
from sdpo_jax.discovery.picture import NAMES, draw
from sdpo_jax.reports.curves import COLOURS

SVG = "{http://www.w3.org/2000/svg}"


def stopped(first, *, method="sdpo", question="q", seed=0, budget=64):
    """A cell that ended at its first success, or without one."""
    return Cell(method, question, seed, budget, first, first or budget, (), 0, 1.0)


def drawn(n, c, *, question="q", seed=0):
    """A cell of independent samples."""
    first = 1 if c else None
    return Cell("best_of_k", question, seed, n, first, n, (c,), 0, 1.0, independent=True)


def probabilities(cells, ks, **options):
    return [e.probability for e in discovery(cells, ks, **options)]


def test_independent_samples_give_the_probability_that_they_were_drawn_with():
    rng, p, ks = np.random.default_rng(0), 0.02, [1, 8, 40]
    counts = rng.binomial(40, p, size=(400, 5))
    runs = [[drawn(40, int(c), seed=s) for s, c in enumerate(row)] for row in counts]
    found = np.array([probabilities(cells, ks, resamples=2) for cells in runs])  # [400, 3]
    error = found.std(axis=0) / math.sqrt(len(runs))
    truth = 1 - (1 - p) ** np.array(ks)
    assert (abs(found.mean(axis=0) - truth) < 4 * error).all()


def test_a_cell_without_success_counts_as_not_discovered_and_says_nothing_beyond_its_budget():
    cells = [stopped(3, seed=1), stopped(None, seed=2), stopped(64, seed=3), stopped(None, seed=4)]
    estimates = discovery(cells, [1, 2, 3, 63, 64, 65])
    assert [(e.k, e.probability) for e in estimates] == [
        *((1, 0.0), (2, 0.0), (3, 0.25), (63, 0.25), (64, 0.5))
    ]
    assert reach([*cells, stopped(None, seed=5, budget=10)]) == 10


def test_questions_count_equally_however_many_seeds_they_have():
    cells = [stopped(1, question="a", seed=s) for s in range(3)] + [stopped(None, question="b")]
    assert probabilities(cells, [1]) == [0.5]
    assert mean_generations(cells, 64) == (1 + 64) / 2


def binomial_quantile(n, p, level):
    """The smallest count whose cumulated probability reaches the level."""
    total = 0.0
    for count in range(n + 1):
        total += comb(n, count) * p**count * (1 - p) ** (n - count)
        if total >= level:
            return count
    return n


@pytest.mark.parametrize("successes", range(11))
def test_the_interval_is_that_of_counts_of_seeds_drawn_with_replacement(successes):
    cells = [stopped(5 if s < successes else None, seed=s) for s in range(10)]
    (estimate,) = discovery(cells, [8], resamples=20_000)
    # Resampled, the number of successful seeds is binomial with the share that was seen.
    low, high = (binomial_quantile(10, successes / 10, level) / 10 for level in (0.05, 0.95))
    assert (estimate.low, estimate.high) == pytest.approx((low, high), abs=1e-9)


def test_the_interval_of_two_questions_is_that_of_the_mean_of_their_own_draws():
    rng, first = np.random.default_rng(5), {"a": [2, 9, 40], "b": [1, 3, 60, 61, 62]}
    cells = [stopped(f, question=q, seed=s) for q, fs in first.items() for s, f in enumerate(fs)]
    (estimate,) = discovery(cells, [32], resamples=40_000)
    means = []
    for _ in range(40_000):
        shares = [np.mean(rng.choice(fs, len(fs)) <= 32) for fs in first.values()]
        means.append(np.mean(shares))
    assert estimate.probability == pytest.approx((2 / 3 + 2 / 5) / 2)
    np.testing.assert_allclose(
        (estimate.low, estimate.high), np.quantile(means, (0.05, 0.95)), atol=0.02
    )


def test_the_bootstrap_is_a_function_of_its_seed():
    cells = [stopped(f, seed=s) for s, f in enumerate((2, 7, 20, None, 50))]
    runs = [discovery(cells, [16, 32], seed=seed, resamples=50) for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


@pytest.mark.parametrize("budget", [1, 3, 6])
def test_mean_generations_of_samples_is_that_over_all_orders_of_the_samples(budget):
    passes = [True, True, False, False, False, False]
    orders = list(itertools.permutations(passes))
    firsts = [min(order.index(True) + 1, budget) for order in orders]
    expected = sum(firsts) / len(orders)
    assert mean_generations([drawn(6, 2)], budget) == pytest.approx(expected)


def test_mean_generations_refuses_a_budget_that_the_cells_did_not_have():
    with pytest.raises(ValueError, match="reach 64"):
        mean_generations([stopped(3)], 65)


def test_the_speed_up_is_the_ratio_of_generations_at_the_highest_probability_of_both():
    ours = [stopped(f, seed=s) for s, f in enumerate((4, 10, 20, 30))]
    theirs = [stopped(f, seed=s, method="m") for s, f in enumerate((8, 60, None, None))]
    gain = speed_up(ours, theirs)
    assert gain is not None
    assert (gain.probability, gain.ours, gain.theirs, gain.ratio) == (0.5, 10, 60, 6.0)
    assert speed_up(ours, [stopped(None, method="m")]) is None


def test_the_summary_compares_with_the_first_method():
    cells = [stopped(4), drawn(256, 1), drawn(256, 0, seed=1)]
    numbers = summary(cells, budget=64)
    assert numbers["speed_up_of"] == "sdpo" and list(numbers["speed_up_over"]) == ["best_of_k"]
    assert numbers["methods"]["best_of_k"]["discovery"][-1]["k"] == 512  # samples of both seeds
    assert numbers["methods"]["sdpo"]["discovery"][-1]["k"] == 64
    assert numbers["methods"]["sdpo"]["questions"]["q"] == {
        **{"seeds": 1, "discovered": 1, "mean_generations": 4.0}
    }


def test_the_grid_of_a_curve_goes_from_one_to_the_last():
    grid = fine_grid(1000)
    assert grid[0] == 1 and grid[-1] == 1000 and grid == sorted(set(grid))


def test_points_of_the_picture_lie_at_the_logarithm_of_k():
    cells = [stopped(10), stopped(None, seed=1), *(drawn(128, c, seed=c) for c in (0, 1))]
    root = ElementTree.fromstring(draw(cells))
    lines = [
        [tuple(map(float, pair.split(","))) for pair in line.attrib["points"].split()]
        for line in root.iter(f"{SVG}polyline")
    ]
    assert len(lines) == 2 and len(list(root.iter(f"{SVG}polygon"))) == 2
    ks = fine_grid(64)
    left, right = lines[0][0][0], lines[1][-1][0]  # k = 1, and all 256 samples
    for (x, _), k in zip(lines[0], ks, strict=True):
        assert x == pytest.approx(left + (right - left) * math.log(k) / math.log(256), abs=0.1)
    heights = {y for _, y in lines[0]}
    assert len(heights) == 2  # 0 before the tenth generation, one half after
    assert "prefers-color-scheme:dark" in draw(cells)


def test_every_method_has_a_name_and_a_colour():
    assert set(NAMES) == set(METHODS) and len(METHODS) <= len(COLOURS)
