"""Forgetting, normalised scores, and the table over the seeds."""

import numpy as np
import pytest

from benchmarks.claims.forgetting import (
    final_mean,
    forgetting,
    learned,
    normalised,
    normalised_table,
    spread,
)

BEFORE, FIRST, SECOND, THIRD = [0.1, 0.2, 0.3], [0.9, 0.2, 0.3], [0.5, 0.8, 0.2], [0.7, 0.6, 0.7]
SEQUENCE = [BEFORE, FIRST, SECOND, THIRD]


def test_learned_is_the_diagonal_and_the_end_is_the_last_row():
    assert learned(SEQUENCE) == pytest.approx((0.9 + 0.8 + 0.7) / 3)
    assert final_mean(SEQUENCE) == pytest.approx((0.7 + 0.6 + 0.7) / 3)


def test_forgetting_is_what_earlier_tasks_lost_since_their_best():
    assert forgetting(SEQUENCE) == pytest.approx((0.2 + 0.2) / 2)


def test_what_a_task_had_before_it_was_trained_is_not_forgotten():
    assert forgetting([[0.9, 0.0], [0.5, 0.0], [0.5, 1.0]]) == 0.0


@pytest.mark.parametrize("seed", range(5))
def test_forgetting_is_never_negative_and_zero_where_accuracy_never_falls(seed):
    table = np.random.default_rng(seed).uniform(size=(4, 3))
    assert forgetting(table.tolist()) >= 0.0
    assert forgetting(np.sort(table, axis=0).tolist()) == 0.0


def test_a_single_task_has_nothing_to_forget():
    assert forgetting([[0.1], [0.8]]) == 0.0


def test_the_scale_goes_from_the_model_before_training_to_the_best_method():
    assert [normalised(x, 0.2, 0.6) for x in (0.2, 0.6)] == [0.0, 1.0]
    assert normalised(0.1, 0.2, 0.6) == pytest.approx(-0.25)
    table = normalised_table(SEQUENCE, [0.9, 0.8, 0.7])
    assert table[0] == [0.0, 0.0, 0.0]
    assert [max(column) for column in zip(*table, strict=True)] == [1.0, 1.0, 1.0]
    assert table[2][2] < 0.0


def test_without_a_method_better_than_before_there_is_no_scale():
    with pytest.raises(ValueError, match=r"above that before training, got 0\.5 and 0\.5"):
        normalised(0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ([[0.1, 0.2], [0.3]], "one accuracy per task"),
        ([[], []], "one accuracy per task"),
        ([[0.1, 0.2], [0.3, 0.4]], "each of 2 stages, got 2 rows"),
    ],
)
def test_a_table_with_another_shape_is_refused(table, message):
    with pytest.raises(ValueError, match=message):
        forgetting(table)


def test_a_spread_is_mean_smallest_and_largest():
    assert spread([0.5, 0.1, 0.6]) == pytest.approx((0.4, 0.1, 0.6))
    with pytest.raises(ValueError, match="at least one seed"):
        spread([])
