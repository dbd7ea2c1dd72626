"""The teacher's weights without a context, against numpy; and where there is nothing to compare."""

from dataclasses import replace

import jax
import numpy as np
import pytest
import tiny

from sdpo_jax.config import RolloutConfig, TeacherConfig
from sdpo_jax.environments.base import Outcome, Prompt
from sdpo_jax.evaluation.evaluator import Evaluator
from sdpo_jax.objectives import GrpoConfig, SdpoConfig, make_objective
from sdpo_jax.rollouts.sampler import Sampler
from sdpo_jax.run.recipes import default_config
from sdpo_jax.teacher.contexts import SiblingContexts
from sdpo_jax.teacher.prompts import TeacherPrompts
from sdpo_jax.training.batch import BatchLayout
from sdpo_jax.training.engine import Engine
from sdpo_jax.training.student_teacher_kl import StudentTeacherKl
from sdpo_jax.training.trainer import Trainer

TOKENIZER = tiny.ByteTokenizer()
ARCHITECTURE = replace(tiny.ARCHITECTURE, vocabulary=TOKENIZER.vocabulary)
MODEL = tiny.make_model(ARCHITECTURE)
ALPHA, TEMPERATURE = 0.25, 0.8
RANDOM = np.random.default_rng(0)
PROMPTS = [tiny.random_ids(RANDOM, n) for n in (5, 9) for _ in range(2)]
RESPONSES = [tiny.random_ids(RANDOM, n) for n in (3, 1, 7, 4)]


@pytest.fixture(autouse=True)
def quick_programs(monkeypatch):
    monkeypatch.setattr(jax, "jit", tiny.quick_jit)


def kl_of(student, teacher, mesh=(1, 1, 1), tokens=1024, shared=True, **settings):
    config = default_config(
        rollout=RolloutConfig(temperature=TEMPERATURE), teacher=TeacherConfig(**settings)
    )
    devices = tiny.make_devices(*mesh)
    layout = BatchLayout(
        shared, micro_batch_tokens=tokens, head_chunk_tokens=48, shards=devices.row_shards
    )
    prompts = TeacherPrompts(config.teacher, TOKENIZER)
    engine = Engine(config, MODEL, devices, layout, TOKENIZER, prompts, None)
    divergence = make_objective(SdpoConfig(alpha=ALPHA)).divergence
    assert divergence is not None
    compare = StudentTeacherKl(engine, divergence)
    return compare(student, teacher, PROMPTS, RESPONSES)["student_teacher_kl"]


def weights():
    return tiny.make_params(ARCHITECTURE), tiny.make_params(ARCHITECTURE, seed=1)


def by_numpy(student, teacher, share=0.0):
    """Mean over all tokens; `share` of the student in the teacher's logits."""
    found = []
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        logits = [
            tiny.reference_logits(ARCHITECTURE, x, [*prompt, *response])[len(prompt) - 1 : -1]
            for x in (student, teacher)
        ]
        mixed = share * logits[0] + (1 - share) * logits[1]
        p, q = (tiny.log_softmax(x / TEMPERATURE) for x in (logits[0], mixed))
        mixture = np.log((1 - ALPHA) * np.exp(p) + ALPHA * np.exp(q))
        parts = (1 - ALPHA) * np.exp(p) * (p - mixture) + ALPHA * np.exp(q) * (q - mixture)
        found.append(parts.sum(axis=-1))
    return np.mean(np.concatenate(found))


def test_it_is_the_divergence_after_the_plain_question_however_it_is_cut():
    student, teacher = weights()
    want = by_numpy(student, teacher)
    assert want > 1e-3
    assert kl_of(student, teacher) == pytest.approx(want, rel=1e-5)
    assert kl_of(student, teacher, tokens=1, shared=False) == pytest.approx(want, rel=1e-5)


def test_it_is_the_same_on_a_mesh():
    student, teacher = weights()
    assert kl_of(student, teacher, (1, 2, 2)) == pytest.approx(by_numpy(student, teacher), 1e-5)


def test_it_is_zero_where_both_weights_are_the_same():
    student, _ = weights()
    assert kl_of(student, student) == pytest.approx(0.0, abs=1e-7)


def test_the_teacher_of_a_trust_region_is_the_mixture():
    student, reference = weights()
    found = kl_of(student, reference, weights="trust_region", trust_region=0.3)
    assert found == pytest.approx(by_numpy(student, reference, 0.3), rel=1e-5)


class Questions:
    """One question to learn from, three to be asked; every answer passes."""

    train = (Prompt("t", ({"role": "user", "content": "t?"},), {}),)
    held_out = tuple(Prompt(n, ({"role": "user", "content": f"{n}?"},), {}) for n in "abc")

    def grade(self, prompt, response):
        del prompt, response
        return Outcome(1.0, True, "", {})


def evaluator(**settings):
    config = default_config(rollout=RolloutConfig(max_prompt_tokens=32, max_response_tokens=4))
    evaluation = replace(config.evaluation, samples_per_prompt=2, **settings)
    config = replace(config, evaluation=evaluation)
    sampler = Sampler(MODEL, tiny.make_devices(), TOKENIZER.stop_ids)
    prompts, contexts = TeacherPrompts(config.teacher, TOKENIZER), SiblingContexts(config.teacher)
    return Evaluator(config, sampler, TOKENIZER, Questions(), prompts, contexts)


@pytest.mark.slow
def test_an_evaluation_compares_the_first_prompts_answers_and_only_where_the_teacher_is_asked():
    student, teacher = weights()
    seen = []

    def compare(*given):
        seen.append(given)
        return {"student_teacher_kl": 7.0}

    row = evaluator(batch_prompts=2)(student, teacher, 0, compare)
    ((one, other, prompts, responses),) = seen
    assert row["student_teacher_kl"] == 7.0 and one is student and other is teacher
    rendered = [TOKENIZER.render(p.messages) for p in Questions.held_out[:2]]
    assert prompts == [ids for ids in rendered for _ in range(2)]
    assert len(responses) == 4 and all(1 <= len(ids) <= 4 for ids in responses)
    row = evaluator(batch_prompts=2, teacher=False)(student, teacher, 0, compare)
    assert "student_teacher_kl" not in row and len(seen) == 1


def test_where_the_teacher_is_the_student_or_nobody_there_is_nothing_to_compare():
    for config, made in (
        (default_config(objective=SdpoConfig()), True),
        (default_config(objective=SdpoConfig(), teacher=TeacherConfig(weights="live")), False),
        (default_config(objective=GrpoConfig()), False),
    ):
        objective = make_objective(config.objective)
        trainer = Trainer(config, MODEL, TOKENIZER, Questions(), objective=objective)
        assert (trainer.student_teacher_kl is not None) == made
