"""Weights of rollouts and tokens, contexts that outlive a batch, and diagnostics, in numbers."""

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny

from sdpo_jax.config import TeacherConfig, TrainConfig
from sdpo_jax.environments.base import Outcome, Prompt, not_graded
from sdpo_jax.objectives import SdpoConfig
from sdpo_jax.objectives.credit import (
    distillation_weights,
    entropy_weighted,
    token_advantages,
    worth_computing,
)
from sdpo_jax.objectives.loss_weights import distillation_coefficient, make_loss_weights
from sdpo_jax.rollouts.diagnostics import overlap, repeated_share, rollout_diagnostics
from sdpo_jax.rollouts.rollout_batch import RolloutBatch
from sdpo_jax.run.recipes import default_config
from sdpo_jax.teacher.context import TeacherContext
from sdpo_jax.teacher.contexts import SiblingContexts
from sdpo_jax.teacher.controls import shuffled
from sdpo_jax.teacher.prompts import TeacherPrompts

TOKENIZER = tiny.ByteTokenizer()
GROUP = 3
REWARDS = [1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0]  # one, none, two of three pass
TEACHER = np.array([False, True, True, True, True, False, True, True, True])
RANDOM = np.random.default_rng(0)


def rollouts(rewards=REWARDS, names=("p", "q", "r"), ungraded=(), texts=None):
    texts = [f"answer {i}" for i in range(len(rewards))] if texts is None else texts
    outcomes = [
        not_graded("down") if i in ungraded else Outcome(r, r == 1.0, "", {})
        for i, r in enumerate(rewards)
    ]
    lengths = RANDOM.integers(1, 6, len(rewards)).astype(np.int32)
    asked = [Prompt(n, ({"role": "user", "content": f"{n}?"},), {}) for n in names]
    return RolloutBatch(
        prompts=asked,
        group=GROUP,
        prompt_ids=[[1]] * len(rewards),
        response_ids=[[7] * n for n in lengths],
        log_probs=[RANDOM.normal(-2, 1, n).astype(np.float32) for n in lengths],
        lengths=lengths,
        texts=texts,
        outcomes=outcomes,
    )


def weights_of(objective, step=1, steps=10, given=None):
    given = rollouts() if given is None else given
    config = default_config(train=TrainConfig(steps=steps))
    return make_loss_weights(config, objective, given, TEACHER & given.graded, step)


def mini_batch_of(given, rows, denominator=1.0) -> Any:
    """As much of a mini-batch as credit reads."""
    return SimpleNamespace(
        rows=rows,
        weights=[np.ones(given.lengths[i], np.float32) for i in rows],
        denominator=denominator,
        graded_rows=np.arange(len(given.outcomes)),
    )


def step_of(objective, given, weights) -> Any:
    """As much of a step as credit reads."""
    return SimpleNamespace(
        settings=objective,
        engine=SimpleNamespace(config=default_config()),
        rollouts=given,
        has_teacher=TEACHER,
        weights=weights,
    )


def test_plain_sdpo_counts_the_rollouts_with_a_teacher_and_nothing_else():
    weights = weights_of(SdpoConfig())
    np.testing.assert_array_equal(weights.active, TEACHER)
    np.testing.assert_array_equal(weights.distill, TEACHER.astype(np.float32))
    assert not weights.policy_gradient.any()


def test_the_route_goes_by_reward_and_by_whether_there_is_a_teacher():
    weights = weights_of(SdpoConfig(route="outcome"))
    failed = np.asarray(REWARDS) < 1.0
    np.testing.assert_array_equal(weights.distill, (failed & TEACHER).astype(np.float32))
    np.testing.assert_array_equal(weights.policy_gradient, 1.0 - weights.distill)
    assert weights.active.all()


def test_the_gate_distils_only_what_the_reward_prefers():
    weights = weights_of(SdpoConfig(route="positive", grpo_weight=0.25))
    rewards = np.asarray(REWARDS).reshape(-1, GROUP)
    above = (rewards > rewards.mean(axis=1, keepdims=True)).reshape(-1)
    np.testing.assert_allclose(weights.distill, 0.75 * (above & TEACHER))
    np.testing.assert_allclose(weights.policy_gradient, 0.25)


def test_a_rollout_that_could_not_be_graded_has_no_share():
    given = rollouts(ungraded=(1, 6))
    for objective in (SdpoConfig(grpo_weight=0.5), SdpoConfig(route="outcome")):
        weights = weights_of(objective, given=given)
        for part in (weights.active, weights.distill, weights.policy_gradient, weights.advantages):
            assert not part[[1, 6]].any()


def test_questions_weigh_by_the_spread_of_their_outcomes_over_its_mean():
    weights = weights_of(SdpoConfig(question_weights="pass_rate", question_weight_floor=0.1))
    rates = np.array([1 / 3, 0.0, 2 / 3])
    raw = np.maximum(np.sqrt(rates * (1 - rates)), 0.1)
    expected = np.repeat(raw / raw.mean(), GROUP) * TEACHER
    np.testing.assert_allclose(weights.distill, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("step", "expected"), [(1, 0.25), (4, 1.0), (7, 1.0), (8, 2 / 3), (9, 1 / 3), (10, 0.0)]
)
def test_the_coefficient_rises_then_falls_to_nothing(step, expected):
    objective = SdpoConfig(distillation_warmup_steps=4, distillation_decay_steps=3)
    assert distillation_coefficient(objective, step, 10) == pytest.approx(expected)
    weights = weights_of(objective, step=step)
    np.testing.assert_allclose(weights.distill, expected * TEACHER, rtol=1e-6)
    worth = worth_computing(objective, weights)
    np.testing.assert_array_equal(worth, TEACHER if expected else np.zeros_like(TEACHER))


def test_each_half_of_a_mix_is_divided_by_its_own_tokens():
    given, objective = rollouts(), SdpoConfig(grpo_weight=0.4)
    weights = weights_of(objective, given=given)
    tokens = float(given.lengths.sum())
    mini_batch = mini_batch_of(given, list(range(9)), tokens)
    distill = distillation_weights(step_of(objective, given, weights), mini_batch)
    # Over the common denominator: what (1 - lambda) over the distilled tokens would be.
    expected = 0.6 / given.lengths[TEACHER].sum()
    np.testing.assert_allclose(distill / tokens, expected * TEACHER, rtol=1e-6)


def test_teacher_entropy_weights_have_mean_one_over_an_update():
    rows = [np.array([1.0, 1.0], np.float32), np.array([0.0], np.float32), np.ones(3, np.float32)]
    entropies = [RANDOM.uniform(0, 2, len(x)).astype(np.float32) for x in rows]
    weights = entropy_weighted(rows, entropies, beta=1.5)
    flat, mask = np.concatenate(weights), np.concatenate(rows)
    raw = np.exp(-1.5 * np.concatenate(entropies)) * mask
    np.testing.assert_allclose(flat, raw / raw.sum() * mask.sum(), rtol=1e-5)
    assert [len(x) for x in weights] == [2, 1, 3]


def credit(objective, given, gaps, rows):
    weights = weights_of(objective, given=given)
    mini_batch = mini_batch_of(given, rows, float(given.lengths.sum()))
    step = step_of(objective, given, weights)
    told = token_advantages(step, mini_batch, gaps)
    return told, weights, distillation_weights(step, mini_batch)


def test_a_rollout_has_the_mean_of_its_tokens_advantages():
    given, rows = rollouts(), [1, 2, 6]
    gaps = [RANDOM.normal(size=given.lengths[i]).astype(np.float32) for i in rows]
    told, _, _ = credit(SdpoConfig(credit="sequence"), given, gaps, rows)
    for advantages, gap in zip(told, gaps, strict=True):
        np.testing.assert_allclose(advantages, np.full(len(gap), gap.mean()), rtol=1e-5)


def test_a_mix_by_advantages_is_the_papers_equation_3():
    given, rows = rollouts(), [1, 2, 6]
    gaps = [RANDOM.normal(size=given.lengths[i]).astype(np.float32) for i in rows]
    objective = SdpoConfig(credit="sequence", grpo_weight=0.9)
    told, weights, distill = credit(objective, given, gaps, rows)
    for i, advantages, gap in zip(rows, told, gaps, strict=True):
        expected = 0.9 * weights.advantages[i] + distill[i] * gap.mean()
        np.testing.assert_allclose(advantages, np.full(len(gap), expected), rtol=1e-5)


def test_modulated_advantages_are_the_formula_and_plain_without_a_teacher():
    given, rows = rollouts(), [0, 1, 6]  # the first has no teacher
    gaps = [RANDOM.normal(size=given.lengths[i]).astype(np.float32) for i in rows]
    objective = SdpoConfig(credit="modulated", modulation=0.5, modulation_bound=0.2)
    told, weights, _ = credit(objective, given, gaps, rows)
    for i, advantages, gap in zip(rows, told, gaps, strict=True):
        a = weights.advantages[i]
        factor = np.clip(np.exp(np.sign(a) * gap * TEACHER[i]), 0.8, 1.2)
        np.testing.assert_allclose(advantages, a * (0.5 + 0.5 * factor), rtol=1e-4)


def test_the_control_pushes_down_failures_unlikely_tokens_alone():
    given, rows = rollouts(), [1, 6]  # a failure, a success
    objective = SdpoConfig(credit="fixed_negative", control_probability=0.1)
    told, _, _ = credit(objective, given, None, rows)
    unlikely = np.exp(given.log_probs[1]) < 0.1
    np.testing.assert_array_equal(told[0], -unlikely.astype(np.float32))
    assert not told[1].any()


def test_shuffled_contexts_come_whole_from_another_question():
    names = ["a", "b", "a", "c"]
    contexts = [TeacherContext(f"{n}{p}{i}", None) for p, n in enumerate(names) for i in range(2)]
    for seed in range(20):
        out = shuffled(contexts, names, seed=seed)
        assert out == shuffled(contexts, names, seed=seed)
        for place, own in enumerate(names):
            first, second = (x and x.demonstration for x in out[2 * place : 2 * place + 2])
            assert first and second and first[0] == second[0] != own
            assert (first[2], second[2]) == ("0", "1")
    assert shuffled(contexts[:2], ["a"], seed=0) == [None, None]


def contexts_of(**teacher):
    return SiblingContexts(TeacherConfig(feedback=False, **teacher))


def shown(contexts, rewards, texts, step=1) -> list[str | None]:
    """Demonstrations of a batch, which is remembered after it."""
    given = rollouts(rewards, ("p",), texts=texts)
    batch = given.prompts, given.group, given.outcomes, given.texts
    chosen = contexts(*batch, seed=step)
    contexts.remember(*batch)
    return [context and context.demonstration for context in chosen]


def test_a_group_without_a_success_sees_the_newest_that_was_remembered():
    contexts = contexts_of(success_buffer=2)
    assert shown(contexts, [0.0] * 3, ["x"] * 3) == [None] * 3
    shown(contexts, [1.0, 1.0, 0.0], ["old", "new", "bad"])
    shown(contexts, [1.0, 0.0, 0.0], ["newest", "bad", "bad"])
    assert contexts.get_state() == {"p": ["newest", "new"]}
    again = contexts_of(success_buffer=2)
    again.set_state(json.loads(json.dumps(contexts.get_state())))
    for one in (contexts, again):
        assert shown(one, [0.0] * 3, ["x"] * 3) == ["newest"] * 3


def test_a_group_with_a_success_of_its_own_is_not_shown_an_old_one():
    contexts = contexts_of(success_buffer=4)
    shown(contexts, [1.0, 0.0, 0.0], ["old", "x", "y"])
    assert shown(contexts, [1.0, 0.0, 0.0], ["own", "x", "y"]) == [None, "own", "own"]


def test_without_a_buffer_nothing_is_remembered():
    contexts = contexts_of()
    shown(contexts, [1.0, 0.0, 0.0], ["old", "x", "y"])
    assert contexts.get_state() == {}


def test_the_rollouts_own_attempt_stands_before_its_feedback():
    given = rollouts([0.0] * 3, ("p",), texts=["try 0", "try 1", "try 2"])
    outcomes = [Outcome(0.0, False, "too low", {})] * 3

    def prompt(budget):
        config = TeacherConfig(own_attempt=True, max_prompt_tokens=budget)
        contexts = SiblingContexts(config)(given.prompts, GROUP, outcomes, given.texts, seed=1)
        ids = TeacherPrompts(config, TOKENIZER).of_rollouts(given.prompts, GROUP, contexts)
        return TOKENIZER.decode(ids[1] or [])

    text = prompt(120)
    assert text.index("Earlier attempt") < text.index("try 1") < text.index("too low")
    text = prompt(100)
    assert "too low" in text and "try 1" not in text  # the attempt is cut before the feedback


def test_diagnostics_count_by_hand():
    outcomes = rollouts(ungraded=(5,)).outcomes
    responses = [[1, 2, 3, 4, 1, 2, 3, 4], *(list(range(n)) for n in (1, 2, 3, 4, 5, 6, 7, 100))]
    found = rollout_diagnostics(responses, outcomes, GROUP)
    assert found["response_tokens_p95"] == pytest.approx(8 + 0.6 * 92)  # 7.6 of 8 places up
    assert found["repetition"] == pytest.approx(0.2 / 9)
    assert found["groups/no_success"] == found["groups/one_success"] == pytest.approx(1 / 3)
    assert found["groups/all_success"] == 0.0
    assert repeated_share([1, 1, 1, 1, 1, 1]) == pytest.approx(2 / 3)
    assert overlap(range(9), range(8)) == 0.5 and overlap([1], [1]) == 0.0
