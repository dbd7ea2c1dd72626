"""What an update learns from episodes of several turns: the model's own tokens and nothing else."""

import io
import zlib
from copy import copy
from dataclasses import replace
from functools import cache
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from test_episodes import ARCHITECTURE, MODEL, PROMPTS, Tokenizer

from sdpo_jax.api import load_components
from sdpo_jax.config import (
    CheckpointConfig,
    EvaluationConfig,
    OptimizerConfig,
    RolloutConfig,
    TeacherConfig,
    TrainConfig,
)
from sdpo_jax.environments.base import Outcome
from sdpo_jax.objectives import GrpoConfig, SdpoConfig, make_objective
from sdpo_jax.rollouts.phase_timer import PhaseTimer, is_time
from sdpo_jax.rollouts.rollout_batch import RolloutSetup, sample_rollouts
from sdpo_jax.run.components import RunComponents
from sdpo_jax.run.console import Console
from sdpo_jax.run.loop import Run
from sdpo_jax.run.metrics import METRICS_FILE, read_metrics
from sdpo_jax.run.recipes import default_config, load_recipe
from sdpo_jax.training import trainer as trainer_module
from sdpo_jax.training.batch import reduction_weights, split_mini_batches
from sdpo_jax.training.engine import Models
from sdpo_jax.training.step import run_update
from sdpo_jax.training.trainer import Trainer

OBJECTIVES = {"sdpo": SdpoConfig(), "grpo": GrpoConfig()}


class Checksum:
    """A third of all answers passes, the others hear why not."""

    train, held_out = tuple(PROMPTS), ()

    def grade(self, prompt, response):
        mark = zlib.crc32(f"{prompt.id} {response!r}".encode())
        passed = mark % 3 == 0
        return Outcome(float(passed), passed, "" if passed else f"mark {mark % 100}", {})


@cache
def trainer_of(name):
    config = default_config(
        objective=OBJECTIVES[name],
        rollout=RolloutConfig(
            prompts_per_step=2,
            rollouts_per_prompt=6,
            max_prompt_tokens=32,
            max_response_tokens=8,
            max_turns=2,
        ),
        teacher=TeacherConfig(max_prompt_tokens=160, max_feedback_tokens=64),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=1),
        train=TrainConfig(micro_batch_tokens=4096, head_chunk_tokens=256),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer_module, "make_mesh", lambda config: tiny.make_devices().mesh)
        patch.setattr(jax, "jit", tiny.quick_jit)
        objective = make_objective(config.objective)
        return Trainer(config, MODEL, Tokenizer(), Checksum(), objective=objective)


def params():
    return tiny.make_params(ARCHITECTURE, scale=0.5)


@cache
def collected():
    trainer = trainer_of("grpo")
    rollout, tokenizer = trainer.config.rollout, trainer.tokenizer
    setup = RolloutSetup(rollout, tokenizer, Checksum(), 64, trainer.sampler, seed=1)
    return sample_rollouts(setup, params(), PROMPTS[:2], step=1, timer=PhaseTimer())


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


@pytest.mark.slow
def test_a_batch_holds_episodes_and_metrics_count_the_models_own_tokens():
    rollouts, metrics = collected()
    assert rollouts.response_mask is not None
    own = [int(row.sum()) for row in rollouts.response_mask]
    assert metrics["response_tokens"] == np.mean(own) < np.mean(rollouts.lengths)
    assert 1 < metrics["turns"] <= 2
    assert metrics["success_first_turn"] <= metrics["success"]
    for ids, written, log_probs in zip(
        rollouts.response_ids, rollouts.response_mask, rollouts.log_probs, strict=True
    ):
        assert len(ids) == len(written) == len(log_probs)


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean"])
def test_weights_are_above_0_at_own_tokens_and_nowhere_else(reduction):
    rollouts, _ = collected()
    trainer, own = trainer_of("grpo"), rollouts.response_mask
    assert own is not None
    rows = np.ones(len(own), np.bool_)
    (part,) = split_mini_batches(
        rollouts, 1, trainer.layout, active=rows, worth=rows, reduction=reduction
    )
    for row, weights in zip(part.rows, part.weights, strict=True):
        np.testing.assert_array_equal(weights > 0, own[row])
        total = own[row].sum() if reduction == "token_mean" else 1.0
        np.testing.assert_allclose(weights.sum(), total, rtol=1e-6)
    tokens = sum(int(x.sum()) for x in own)
    assert part.denominator == (tokens if reduction == "token_mean" else len(own))


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean"])
def test_a_mask_of_all_tokens_is_no_mask(reduction):
    lengths, active = np.array([3, 1, 4], np.int32), np.array([True, False, True])
    masked = [np.ones(n, np.bool_) for n in lengths]
    plain = reduction_weights(lengths, active, 4, reduction)
    assert_equal(reduction_weights(lengths, active, 4, reduction, masked), plain)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sdpo", "grpo"])
def test_the_update_does_not_depend_on_what_is_said_of_the_environments_tokens(name):
    trainer = trainer_of(name)
    random = np.random.default_rng(0)

    def scrambled(micro_batch):
        """Other targets, log-probs and advantages wherever the model did not write."""
        foreign = np.asarray(micro_batch.weights) == 0
        inputs, changed = micro_batch.inputs, {}

        def elsewhere(values):
            old = np.asarray(values)
            new = random.integers(0, 200, size=old.shape).astype(old.dtype)
            return trainer.devices.put_rows(np.where(foreign, new, old))

        for field in ("targets", "old_log_probs", "advantages"):
            if field in inputs._fields:
                changed[field] = elsewhere(getattr(inputs, field))
        inputs = inputs._replace(**changed)
        return micro_batch._replace(targets=elsewhere(micro_batch.targets), inputs=inputs)

    def updated(change):
        (update,) = updates
        changed = update._replace(micro_batches=[change(m) for m in update.micro_batches])
        state = trainer.initial_state(params())
        state, metrics = run_update(trainer._programs, state, changed)
        return state.params, metrics

    state = trainer.initial_state(params())
    timer = PhaseTimer()
    rollouts, _ = trainer.source(trainer.student(state), 1, timer)
    updates, _ = trainer.objective.make_updates(
        trainer.engine, rollouts, trainer.models(state), step=1, timer=timer
    )
    responses = sum(np.sum(np.asarray(m.weights) > 0) for u in updates for m in u.micro_batches)
    assert responses > 0
    plain, other = updated(lambda m: m), updated(scrambled)
    assert_equal(plain, other)
    assert float(plain[1].tokens) == responses


@pytest.mark.slow
def test_the_update_does_not_depend_on_micro_batches():
    rollouts, _ = collected()
    trainer = trainer_of("grpo")
    results = []
    for tokens in (4096, 300):
        engine = copy(trainer.engine)
        engine.layout = trainer.layout._replace(micro_batch_tokens=tokens)
        (update,), _ = trainer.objective.make_updates(
            engine, rollouts, Models(None, None, None), step=1, timer=PhaseTimer()
        )
        _, metrics = run_update(trainer._programs, trainer.initial_state(params()), update)
        results.append((len(update.micro_batches), metrics))
    (one, whole), (several, cut) = results
    assert one == 1 < several
    np.testing.assert_allclose(cut.grad_norm, whole.grad_norm, rtol=1e-5)
    np.testing.assert_allclose(cut.loss, whole.loss, atol=1e-6)
    assert float(cut.tokens) == float(whole.tokens)


class Crash(Exception):
    """Not one of the trainer's own."""


def run(config, model, weights, tokenizer, environment):
    """Rows of the run's log without times; one device, compiled cheaply."""
    console = Console(["reward"], steps=2, stream=io.StringIO(), live=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer_module, "make_mesh", lambda config: tiny.make_devices().mesh)
        patch.setattr(jax, "jit", tiny.quick_jit)
        components = RunComponents(model, weights, tokenizer, environment)
        Run(config, components, console=console).train()
    rows = read_metrics(Path(config.run_dir) / METRICS_FILE)
    return [{k: v for k, v in row.items() if not is_time(k)} for row in rows]


@pytest.mark.slow
def test_a_run_with_episodes_resumes_exactly(tmp_path, monkeypatch):
    config = replace(
        trainer_of("grpo").config,
        train=TrainConfig(steps=2, micro_batch_tokens=4096, head_chunk_tokens=256),
        evaluation=EvaluationConfig(every_steps=0, prompts=0),
        checkpoint=CheckpointConfig(every_steps=1),
        run_dir=str(tmp_path / "whole"),
    )
    parts = MODEL, params, Tokenizer(), Checksum()
    whole = run(config, *parts)
    plain = Trainer.step

    def step(self, state, number, on_rollouts=None):
        if number == 2:
            raise Crash
        return plain(self, state, number, on_rollouts)

    broken = replace(config, run_dir=str(tmp_path / "broken"))
    with monkeypatch.context() as patch, pytest.raises(Crash):
        patch.setattr(Trainer, "step", step)
        run(broken, *parts)
    assert run(broken, *parts) == whole
    assert [row["step"] for row in whole if row["kind"] == "train"] == [1, 2]


@pytest.mark.slow
def test_the_embedded_model_trains_on_retries_and_feedback_helps_it(tmp_path):
    options = """--rollout.max-turns 2 --train.steps 2 --rollout.prompts-per-step 4
        --evaluation.prompts 8 --evaluation.every-steps 0"""
    config = load_recipe("configs/nano.toml", options.split())
    parts = load_components(config)
    weights = lambda: jax.device_get(parts.params())  # noqa: E731, from all devices to the one
    config = replace(config, run_dir=str(tmp_path))
    rows = run(config, parts.model, weights, parts.tokenizer, parts.environment)
    assert [(row["kind"], row["step"]) for row in rows] == [
        ("eval", 0),
        ("train", 1),
        ("train", 2),
        ("eval", 2),
    ]
    for row in rows:
        assert 1 < row["turns"] < 2
        name = "success" if row["kind"] == "train" else "accuracy"
        assert row[f"{name}_first_turn"] < row[name]
