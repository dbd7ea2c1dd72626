"""When a refreshed teacher moves: the rules, replayed from the whole history, and resumption."""

import json

import numpy as np
import pytest

from sdpo_jax.config import TeacherConfig
from sdpo_jax.teacher.schedule import Observed, RefreshSchedule

WINDOW = 3


def settings(refresh, **changes):
    fixed = {"refresh_steps": 4, "refresh_window": WINDOW}
    return TeacherConfig(weights="refreshed", refresh=refresh, **fixed | changes)


def decide(config, history, moved=None):
    schedule = RefreshSchedule(config)
    moved = [True] * len(history) if moved is None else moved
    return [schedule(o, moved=m) for o, m in zip(history, moved, strict=True)]


def steady(count, reward=0.5, length=10.0, truncated=0.1):
    return [Observed(reward, length, truncated)] * count


def test_every_refreshes_after_that_many_steps_and_never_does_not():
    decisions = decide(settings("every"), steady(10))
    assert [i + 1 for i, d in enumerate(decisions) if d == "refresh"] == [4, 8]
    assert set(decide(settings("never"), steady(10))) == {"stay"}


def test_a_due_refresh_waits_for_a_step_that_moved_the_student():
    moved = [True] * 3 + [False, False, True] + [True] * 4
    decisions = decide(settings("every"), steady(10), moved)
    assert [i + 1 for i, d in enumerate(decisions) if d == "refresh"] == [6, 10]


@pytest.mark.parametrize(
    ("late", "opens"),
    [
        ({"reward": 0.7}, True),
        ({"reward": 0.519}, False),
        ({"reward": 0.7, "length": 12.1}, False),
        ({"reward": 0.7, "length": 12.0}, True),
        ({"reward": 0.7, "truncated": 0.11}, False),
    ],
)
def test_the_gate_wants_reward_up_length_within_bounds_and_no_more_cut_off(late, opens):
    config = settings("gated", refresh_steps=6, refresh_gain=0.02, refresh_length=0.2)
    decisions = decide(config, steady(WINDOW) + steady(WINDOW, **late))
    assert ("refresh" in decisions) is opens


def test_a_fall_of_reward_brings_the_teacher_before_back_once():
    config = settings("every", return_drop=0.1)
    history = steady(4) + steady(3, reward=0.3) + steady(12, reward=0.1)
    decisions = decide(config, history)
    # Refreshed at step 4; three steps later the mean is 0.2 lower. Then four steps, a refresh at
    # a mean of 0.1, and nothing falls any more.
    assert decisions[:11] == ["stay"] * 3 + ["refresh"] + ["stay"] * 2 + ["return"] + [
        *["stay"] * 3,
        "refresh",
    ]
    assert "return" not in decisions[7:]
    assert "return" not in decide(settings("every"), history)


def replay(config, history):
    """The rules anew at every step, from the whole history and the moves so far."""
    moves = []
    window = config.refresh_window
    reached: list[float] = []
    last = 0
    old: list[float] = []
    for step in range(1, len(history) + 1):
        mean: list[float] = []
        if step >= window:
            mean = np.mean(np.asarray(history[step - window : step]), axis=0).tolist()
        if not reached:
            reached = mean
        decision = "stay"
        if old and step - last >= window and mean[0] < reached[0] - config.return_drop:
            decision, reached, old, last = "return", old, [], step
        elif step - last >= config.refresh_steps and (
            config.refresh == "every"
            or (
                mean != []
                and mean[0] > reached[0] + config.refresh_gain
                and mean[1] <= (1 + config.refresh_length) * reached[1]
                and mean[2] <= reached[2]
            )
        ):
            decision, old, reached, last = "refresh", reached, mean, step
        moves.append(decision)
    return moves


@pytest.mark.parametrize("refresh", ["every", "gated"])
@pytest.mark.parametrize("seed", range(5))
def test_decisions_are_those_of_the_rules_replayed(refresh, seed):
    random = np.random.default_rng(seed)
    walk = np.cumsum(random.normal(0.0, 0.05, 200)) + 0.5
    history = [Observed(float(r), float(10 + random.integers(3)), 0.0) for r in walk]
    config = settings(refresh, return_drop=0.08, refresh_gain=0.01, refresh_length=0.3)
    decisions = decide(config, history)
    assert decisions == replay(config, history)
    assert {"refresh", "return"} <= set(decisions)


def test_a_saved_history_goes_on_as_if_nothing_had_happened():
    random = np.random.default_rng(0)
    walk = np.cumsum(random.normal(0.0, 0.05, 60)) + 0.5
    history = [Observed(float(r), 10.0, 0.0) for r in walk]
    config = settings("gated", return_drop=0.05)
    whole = decide(config, history)
    for cut in (0, 2, 17, 40):
        first, second = RefreshSchedule(config), RefreshSchedule(config)
        begun = [first(o, moved=True) for o in history[:cut]]
        second.set_state(json.loads(json.dumps(first.get_state())))
        assert begun + [second(o, moved=True) for o in history[cut:]] == whole


def test_a_step_without_anything_graded_counts_and_says_nothing():
    decisions = decide(settings("every"), [None] * 8)
    assert [i + 1 for i, d in enumerate(decisions) if d == "refresh"] == [4, 8]
    assert set(decide(settings("gated"), [None] * 8)) == {"stay"}
