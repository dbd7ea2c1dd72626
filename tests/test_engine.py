"""The passes of an engine that no loss sees: how often they run, and what they give."""

from dataclasses import replace

import jax
import numpy as np
import pytest
import tiny
from one_update import (
    ARCHITECTURE,
    TEMPERATURE,
    engine_of,
    programs,
    rollouts,
    student,
    teacher_weights,
)

from sdpo_jax.losses.kl_penalty import ReferenceKlTokenInputs
from sdpo_jax.objectives import GrpoConfig, SdpoConfig, make_objective
from sdpo_jax.rollouts.phase_timer import PhaseTimer
from sdpo_jax.training import engine as engine_module
from sdpo_jax.training.engine import Models

WITH_REFERENCE = {
    "grpo": GrpoConfig(reference_kl=0.1),
    "sdpo": SdpoConfig(reference_kl=0.1),
    "mixed": SdpoConfig(reference_kl=0.1, grpo_weight=0.5),
    "by_advantages": SdpoConfig(reference_kl=0.1, credit="sequence"),
}


def counted(function, calls):
    """The function, whose arguments are noted."""

    def call(*arguments):
        calls.append(arguments)
        return function(*arguments)

    return call


@pytest.mark.parametrize("name", WITH_REFERENCE)
@pytest.mark.parametrize("micro_batch_tokens", [1024, 1], ids=["one", "several"])
def test_a_reference_scores_each_micro_batch_once(name, micro_batch_tokens, monkeypatch):
    """A pass of the reference costs as much as the teacher's: none may run a second time."""
    settings = WITH_REFERENCE[name]
    run = programs("sdpo", micro_batch_tokens=micro_batch_tokens)
    engine, built, passes, heads = engine_of(run), [], [], []
    make_sequences = counted(engine_module.make_sequences, built)
    monkeypatch.setattr(engine_module, "make_sequences", make_sequences)
    engine.forward, engine.head = counted(run.forward, passes), counted(run.head, heads)
    here, teacher, reference = (
        jax.device_put(x, run.shardings.params)
        for x in (student(), teacher_weights(), tiny.make_params(ARCHITECTURE, seed=2))
    )
    (update,), _ = make_objective(settings).make_updates(
        engine, rollouts(), Models(here, teacher, reference), step=1, timer=PhaseTimer()
    )
    count = len(update.micro_batches)
    assert (count == 1) == (micro_batch_tokens == 1024)
    assert len(built) == count  # the student's rows, beside the teacher's own
    assert sum(params is reference for params, _ in passes) == count
    assert sum(params is reference for (params,) in heads) == 1
    assert not any(params is here for params, _ in passes)


@pytest.mark.parametrize("share_prompts", [True, False], ids=["shared", "rows"])
def test_the_log_probs_of_a_reference_are_those_of_the_decoder_in_float64(share_prompts):
    run = programs("sdpo", share_prompts=share_prompts)
    params = tiny.make_params(ARCHITECTURE, seed=2)
    reference = jax.device_put(params, run.shardings.params)
    objective = make_objective(replace(WITH_REFERENCE["grpo"], reduction="sequence_mean"))
    engine, data = engine_of(run), rollouts()
    (update,), _ = objective.make_updates(
        engine, data, Models(None, None, reference), step=1, timer=PhaseTimer()
    )
    (micro_batch,) = update.micro_batches
    assert isinstance(micro_batch.inputs, ReferenceKlTokenInputs)
    there = np.asarray(micro_batch.weights) > 0
    log_probs, targets = (
        np.asarray(x)[there] for x in (micro_batch.inputs.reference_log_probs, micro_batch.targets)
    )
    expected = {}
    for prompt, response in zip(data.prompt_ids, data.response_ids, strict=True):
        logits = tiny.reference_logits(ARCHITECTURE, params, [*prompt, *response])
        found = tiny.log_softmax(logits[len(prompt) - 1 : -1] / TEMPERATURE)
        expected[tuple(response)] = found[np.arange(len(response)), response]
    # A KL holds every rollout, also those without an advantage; each is found by its tokens.
    assert len(targets) == sum(len(ids) for ids in data.response_ids)
    left, place = dict(expected), 0
    while left:
        ids = next(ids for ids in left if tuple(targets[place : place + len(ids)]) == ids)
        np.testing.assert_allclose(log_probs[place : place + len(ids)], left.pop(ids), atol=2e-5)
        place += len(ids)


def test_contexts_of_an_objective_without_a_teacher_are_refused():
    engine = engine_of(programs("sdpo"))
    engine.contexts = None
    with pytest.raises(ValueError, match=r"no context builder, expected Objective\.contexts"):
        engine.teacher_contexts(rollouts(), 1)
