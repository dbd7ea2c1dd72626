"""The switches of an `sdpo` recipe, one training step at a time: identities at their ends.

A tiny model on a toy question. All runs draw the same rollouts at their first step, so a switch
that changes nothing must give the same parameters.
"""

import json
from dataclasses import replace
from functools import cache
from typing import Any

import jax
import numpy as np
import pytest
import quick
import tiny

from sdpo_jax.config import LoraConfig, OptimizerConfig, RolloutConfig, TeacherConfig, TrainConfig
from sdpo_jax.environments.base import Outcome, Prompt
from sdpo_jax.objectives import GrpoConfig, SdpoConfig, make_objective
from sdpo_jax.rollouts.sampler import Sampler
from sdpo_jax.run.recipes import default_config
from sdpo_jax.training import trainer as trainer_module
from sdpo_jax.training.state import from_saved, to_saved
from sdpo_jax.training.trainer import Trainer

TOKENIZER = tiny.ByteTokenizer()
ARCHITECTURE = replace(tiny.ARCHITECTURE, vocabulary=TOKENIZER.vocabulary)
MODEL = tiny.make_model(ARCHITECTURE)
GROUP = 4
BASE = default_config(
    rollout=RolloutConfig(
        prompts_per_step=2, rollouts_per_prompt=GROUP, max_prompt_tokens=32, max_response_tokens=6
    ),
    teacher=TeacherConfig(max_prompt_tokens=160, max_feedback_tokens=32),
    optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=1),
    train=TrainConfig(steps=10, micro_batch_tokens=1024, head_chunk_tokens=48),
)


class Judge:
    """Two questions; the answers that pass are chosen by number within their group."""

    train = tuple(
        Prompt(name, ({"role": "user", "content": f"{name}?"},), {}) for name in ("p", "q")
    )
    held_out = ()

    def __init__(self, passing):
        self.passing, self.graded = passing, 0

    def grade(self, prompt, response):
        del prompt, response
        number, self.graded = self.graded % GROUP, self.graded + 1
        passed = number in self.passing
        return Outcome(float(passed), passed, "" if passed else f"answer {number} is wrong", {})


@pytest.fixture(scope="module", autouse=True)
def quick_programs():
    """Cheap compilation; one sampler; one device unless a test says so."""
    with quick.programs(sampler_of=(MODEL, TOKENIZER.stop_ids)):
        yield


def configured(objective=None, teacher=None, **sections):
    base = replace(BASE, **sections)
    kind = objective or SdpoConfig()
    return replace(base, objective=kind, teacher=replace(base.teacher, **(teacher or {})))


def begin(config, passing=(0,)):
    objective = make_objective(config.objective)
    trainer = Trainer(config, MODEL, TOKENIZER, Judge(passing), objective=objective)
    return trainer, trainer.initial_state(tiny.make_params(ARCHITECTURE, scale=0.5))


def after(config, count=1, passing=(0,)):
    """The state on the host after some steps, and the rows of metrics."""
    trainer, state = begin(config, passing)
    rows = []
    for number in range(1, count + 1):
        state, row = trainer.step(state, number)
        rows.append(row)
    return jax.device_get(state), rows


@cache
def plain(passing=(0,)):
    return after(configured(), 1, passing)


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def assert_close(a, b, tolerance=2e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=tolerance), a, b)


def distance(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(float(np.max(np.abs(x - y))) for x, y in pairs)


@pytest.mark.slow
def test_a_refresh_at_every_step_is_the_moving_average_bit_for_bit():
    average, _ = after(configured(teacher={"ema_rate": 0.25}), 2)
    settings = {"weights": "refreshed", "refresh_steps": 1, "refresh_fraction": 0.25}
    refreshed, rows = after(configured(teacher=settings), 2)
    assert [row["teacher/refreshed"] for row in rows] == [1.0, 1.0]
    assert_equal(refreshed, average)


@pytest.mark.slow
def test_a_teacher_that_is_never_refreshed_is_frozen_bit_for_bit():
    frozen, _ = after(configured(teacher={"weights": "frozen"}), 2)
    never, _ = after(configured(teacher={"weights": "refreshed", "refresh": "never"}), 2)
    assert_equal(never, frozen)


RETURNING: dict[str, Any] = {
    **{"weights": "refreshed", "refresh_steps": 2, "refresh_window": 1, "return_drop": 0.1},
    "refresh_fraction": 1.0,
}


@pytest.mark.slow
def test_a_return_brings_the_weights_before_the_refresh_back_and_resumes_exactly(tmp_path):
    trainer, state = begin(configured(teacher=RETURNING))
    initial = jax.device_get(state.teacher)
    for number in (1, 2):
        state, row = trainer.step(state, number)
    assert row["teacher/refreshed"] == 1.0
    saved, host = jax.device_get(to_saved(state)), json.loads(json.dumps(trainer.host_state()))
    assert distance(saved["teacher"], initial) > 0
    assert_equal(saved["previous"], initial)
    data = trainer.source.get_state()
    again, other = begin(configured(teacher=RETURNING))
    other = jax.device_put(from_saved(saved), again.shardings)
    again.set_host_state(host)
    again.source.set_state(data)
    ends = []
    for one, now in ((trainer, state), (again, other)):
        source: Any = one.source
        source._setup.environment.passing = ()  # no answer passes: reward falls
        now, row = one.step(now, 3)
        assert row["teacher/returned"] == 1.0 and row["teacher/age"] == 0
        ends.append(jax.device_get(now))
    assert_equal(ends[0].teacher, initial)
    assert_equal(*ends)


@pytest.mark.slow
def test_a_mix_is_grpo_at_one_and_its_parts_in_between():
    grpo, _ = after(configured(GrpoConfig()))
    mixed, rows = after(configured(SdpoConfig(grpo_weight=1.0)))
    assert_close(mixed.params, grpo.params)
    assert rows[0]["distilled"] == 0.0 and rows[0]["policy_gradient"] == 1.0


@pytest.mark.slow
def test_the_gradient_of_a_mix_is_the_weighted_sum_of_both():
    # Without Adam's normalisation: its first moment is (1 - b1) times the clipped gradient.
    whole = replace(BASE.optimizer, clip_norm=1e6)
    kinds = (SdpoConfig(), GrpoConfig(), SdpoConfig(grpo_weight=0.25))
    sdpo, grpo, mixed = (
        after(configured(kind, optimizer=whole))[0].optimizer[1][0].mu for kind in kinds
    )
    expected = jax.tree.map(lambda a, b: 0.75 * a + 0.25 * b, sdpo, grpo)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7), mixed, expected)
    assert distance(mixed, sdpo) > 1e-5


@pytest.mark.slow
def test_where_every_rollout_fails_the_route_is_sdpo():
    routed, rows = after(configured(SdpoConfig(route="outcome")), passing=())
    expected, _ = plain(())
    assert_close(routed.params, expected.params)
    assert rows[0]["distilled"] == 1.0 and rows[0]["policy_gradient"] == 0.0


@pytest.mark.slow
def test_where_every_rollout_passes_the_route_has_nothing_to_learn():
    _, rows = after(configured(SdpoConfig(route="outcome")), passing=(0, 1, 2, 3))
    _, rest = after(configured(), passing=(0, 1, 2, 3))
    assert rows[0]["updates"] == 0 and rest[0]["updates"] == 1  # siblings' solutions teach sdpo


@pytest.mark.slow
@pytest.mark.parametrize("objective", [SdpoConfig(), GrpoConfig()], ids=["sdpo", "grpo"])
def test_a_kl_to_the_initial_model_is_nothing_at_first_and_holds_later(objective):
    far = configured(objective, optimizer=replace(BASE.optimizer, learning_rate=1e-2))
    near = replace(far, objective=replace(objective, reference_kl=20.0))
    free, held = after(far, 3), after(near, 3)
    assert held[1][0]["reference_kl"] == pytest.approx(0.0, abs=1e-5)
    assert held[1][-1]["reference_kl"] > 1e-5
    initial = tiny.make_params(ARCHITECTURE, scale=0.5)
    assert_equal(held[0].reference, jax.device_get(initial))
    assert distance(held[0].params, free[0].params) > 1e-4


@pytest.mark.slow
def test_a_frozen_teacher_is_the_reference_without_another_copy():
    objective = SdpoConfig(reference_kl=1.0)
    trainer, state = begin(configured(objective, {"weights": "frozen"}))
    assert state.reference is None
    _, row = trainer.step(state, 1)
    assert row["reference_kl"] == pytest.approx(0.0, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("credit", ["sequence", "modulated", "fixed_negative"])
def test_credits_known_before_the_loss_move_the_model_apart_from_each_other(credit):
    state, rows = after(configured(SdpoConfig(credit=credit, control_probability=0.5)))
    expected, _ = plain()
    assert rows[0]["updates"] == 1 and rows[0]["grad_norm"] > 0
    assert distance(state.params, expected.params) > 1e-4


@pytest.mark.slow
def test_modulation_without_strength_is_grpo():
    grpo, _ = after(configured(GrpoConfig()))
    modulated, _ = after(configured(SdpoConfig(credit="modulated", modulation=0.0)))
    assert_close(modulated.params, grpo.params)


@pytest.mark.slow
def test_weights_of_equal_value_change_nothing():
    # One passing answer in each group: all questions are equally hard.
    equal = SdpoConfig(question_weights="pass_rate", token_weights="teacher_entropy")
    weighted, _ = after(configured(replace(equal, token_weight_beta=0.0)))
    expected, _ = plain()
    assert_close(weighted.params, expected.params)


WEIGHTS: dict[str, Any] = {
    "teacher_entropy": {"token_weights": "teacher_entropy", "token_weight_beta": 2.0},
    "disagreement": {"token_weights": "disagreement", "token_weight_beta": 50.0},
    "skip": {"skip_first_tokens": 2},
    "warmup": {"distillation_warmup_steps": 4, "reference_kl": 0.1},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", WEIGHTS)
def test_each_weight_changes_what_is_learned(name):
    state, rows = after(configured(SdpoConfig(**WEIGHTS[name])))
    expected, others = plain()
    assert rows[0]["updates"] == 1 and distance(state.params, expected.params) > 1e-6
    if name == "skip":
        assert rows[0]["tokens"] < others[0]["tokens"]
    if name == "disagreement":
        assert 0.5 <= rows[0]["weight"] < 1.0


EVERYTHING = SdpoConfig(
    grpo_weight=0.3,
    reference_kl=0.1,
    token_weights="teacher_entropy",
    question_weights="pass_rate",
    skip_first_tokens=1,
    distillation_warmup_steps=3,
)
MESH: dict[str, Any] = {"weights": "trust_region", "success_buffer": 2}


@pytest.mark.slow
@pytest.mark.parametrize("teacher", [MESH, RETURNING], ids=["trust-region", "returning"])
def test_two_devices_give_the_numbers_of_one(teacher, monkeypatch):
    one, rows = after(configured(EVERYTHING, teacher), 3)
    for mesh in ({"data": 2}, {"fsdp": 2}):
        devices = tiny.make_devices(**mesh)
        monkeypatch.setattr(trainer_module, "make_mesh", lambda config, d=devices: d.mesh)
        sampler = Sampler(MODEL, devices, TOKENIZER.stop_ids)
        monkeypatch.setattr(trainer_module, "Sampler", lambda *_, s=sampler, **options: s)
        two, more = after(configured(EVERYTHING, teacher), 3)
        assert_close(two.params, one.params, 1e-4)
        assert more[-1]["reference_kl"] == pytest.approx(rows[-1]["reference_kl"], abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("teacher", [{"weights": "frozen"}, RETURNING], ids=["frozen", "moving"])
def test_adapters_have_their_base_as_the_reference(teacher):
    config = configured(EVERYTHING, teacher, lora=LoraConfig(rank=2))
    state, rows = after(config, 3)
    assert state.reference is None and (state.teacher is None) == (teacher["weights"] == "frozen")
    assert rows[0]["reference_kl"] == pytest.approx(0.0, abs=1e-5)
    assert rows[-1]["reference_kl"] > 0
