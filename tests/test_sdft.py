"""SDFT against its formulas in float64, and the laws of its source.

Loss and gradient at the logits by closed forms in numpy; the whole way from demonstrations to the
gradient of the parameters by the numpy decoder of `tiny` and differences along a direction. How its
runs resume stands in `test_loop.py`, beside the other objectives.
"""

from dataclasses import replace
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import quick
import tiny

from sdpo_jax.config import (
    DataConfig,
    EvaluationConfig,
    OptimizerConfig,
    RolloutConfig,
    TeacherConfig,
    TrainConfig,
)
from sdpo_jax.data.jsonl import Demonstration
from sdpo_jax.environments.base import Outcome, Prompt
from sdpo_jax.evaluation.evaluator import Evaluator
from sdpo_jax.losses.divergences import generalized_jsd
from sdpo_jax.losses.per_token import SdpoSharedInputs, SdpoTokenInputs, sdpo_per_token
from sdpo_jax.losses.sequence_importance import SdftTokenInputs, sequence_weighted_head
from sdpo_jax.objectives import SdftConfig, SftConfig, make_objective
from sdpo_jax.rollouts.phase_timer import PhaseTimer
from sdpo_jax.rollouts.sampler import Sampler
from sdpo_jax.run.recipes import default_config
from sdpo_jax.teacher.context import EXAMPLE, TeacherContext, fit_reprompt
from sdpo_jax.teacher.contexts import demonstration_contexts
from sdpo_jax.teacher.prompts import TeacherPrompts
from sdpo_jax.training.batch import reduction_weights
from sdpo_jax.training.engine import Models
from sdpo_jax.training.step import run_update
from sdpo_jax.training.trainer import Trainer

TOKENIZER = tiny.ByteTokenizer()
ARCHITECTURE = replace(tiny.ARCHITECTURE, vocabulary=TOKENIZER.vocabulary)
MODEL = tiny.make_model(ARCHITECTURE)
CAP, SKIP, TEMPERATURE = 2.0, 3, 0.8
DEMONSTRATIONS = [
    Demonstration(str(i), ({"role": "user", "content": f"q{i}?"},), "abc"[: 1 + i % 3] * 2)
    for i in range(6)
]


class Environment:
    """Two held-out questions with references; nothing here is ever learned from."""

    train = ()
    held_out = tuple(Prompt(x, ({"role": "user", "content": f"{x}?"},), {}) for x in "ab")

    def __init__(self):
        self.graded = 0

    def reference(self, prompt):
        return f"ref {prompt.id}"

    def grade(self, prompt, response):
        del prompt, response
        self.graded += 1
        return Outcome(0.0, False, "", {})


@pytest.fixture(scope="module", autouse=True)
def quick_programs():
    """One device and cheap compilation."""
    with quick.programs():
        yield


# At the logits


LENGTHS = np.array([9, 5, 2, 4])  # the third is shorter than what is skipped


@cache
def at_the_logits():
    """Student and teacher logits and tokens of four responses, end to end; float64."""
    random, count = np.random.default_rng(0), int(LENGTHS.sum())
    student, teacher = random.normal(0.0, 1.5, size=(2, count, 7))
    targets = random.integers(0, 7, size=count)
    log_probs = tiny.log_softmax(student / TEMPERATURE)[np.arange(count), targets]
    return student, teacher, targets, log_probs + random.normal(0.0, 0.8, size=count)


def rows():
    """Where each response's tokens stand."""
    ends = np.cumsum(LENGTHS)
    return [slice(end - n, end) for end, n in zip(ends, LENGTHS, strict=True)]


def by_formula(alpha):
    """Loss and its gradient by the student's logits: mean over responses of token means."""
    student, teacher, targets, old = at_the_logits()
    s, t = (tiny.log_softmax(x / TEMPERATURE) for x in (student, teacher))
    p, q = np.exp(s), np.exp(t)
    if alpha == 0.0:
        value, gradient = (q * (t - s)).sum(axis=-1), p - q
    else:
        value = (p * (s - t)).sum(axis=-1)
        gradient = p * (s - t - value[:, None])
    ratio = np.minimum(np.exp(s[np.arange(len(s)), targets] - old), CAP)
    loss, by_logits = 0.0, np.zeros_like(student)
    for row in rows():
        kept = slice(min(row.start + SKIP, row.stop), row.stop)
        if kept.start == kept.stop:
            continue
        scale = ratio[row].mean() / (kept.stop - kept.start) / len(LENGTHS)
        loss += scale * value[kept].sum()
        by_logits[kept] = scale * gradient[kept] / TEMPERATURE
    return loss, by_logits


def by_ours(alpha, hidden, teacher_hidden, chunk=8, importance=CAP):
    """The same through the head: an identity for a head makes hidden states logits."""
    _, _, targets, old = at_the_logits()
    weights, denominator = reduction_weights(
        LENGTHS.astype(np.int32), np.ones(4, np.bool_), 9, "sequence_mean", skip=SKIP
    )
    flat = np.concatenate([row[:n] for row, n in zip(weights, LENGTHS, strict=True)])
    count = -len(flat) % chunk
    pad = lambda x: jnp.pad(jnp.asarray(x), [(0, count)] + [(0, 0)] * (np.ndim(x) - 1))  # noqa: E731
    identity = jnp.eye(7)
    tokens = SdpoTokenInputs(pad(teacher_hidden), pad(targets), pad(np.float32(old)))
    total, metrics = sequence_weighted_head(
        importance,
        sdpo_per_token(partial(generalized_jsd, alpha=alpha)),
        pad(hidden),
        identity,
        SdftTokenInputs(tokens, pad(np.repeat(np.arange(1, 5), LENGTHS).astype(np.int32))),
        pad(flat),
        chunk=chunk,
        constants=SdpoSharedInputs(identity, jnp.float32(TEMPERATURE)),
        block=chunk,
    )
    return total / denominator, metrics


@pytest.mark.slow
@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_loss_and_gradient_at_the_logits_are_the_formula_in_float64(alpha):
    student, teacher, _, _ = (jnp.float32(x) for x in at_the_logits())
    ours = jax.value_and_grad(by_ours, argnums=1, has_aux=True)
    for chunk in (8, 20, 3):
        (loss, _), gradient = ours(alpha, student, teacher, chunk)
        expected, by_logits = by_formula(alpha)
        np.testing.assert_allclose(loss, expected, rtol=1e-5)
        np.testing.assert_allclose(gradient, by_logits, atol=1e-6)


@pytest.mark.slow
def test_the_importance_of_a_response_is_one_number_and_takes_no_gradient():
    student, teacher, targets, old = at_the_logits()
    ratio = np.exp(tiny.log_softmax(student / TEMPERATURE)[np.arange(20), targets] - old)
    expected = [np.minimum(ratio[row], CAP).mean() for row in rows()]
    assert len(set(np.round(expected, 6))) == 4 and (ratio > CAP).any()
    _, metrics = by_ours(0.0, jnp.float32(student), jnp.float32(teacher))
    np.testing.assert_allclose(metrics["importance"][:20], np.repeat(expected, LENGTHS), rtol=1e-5)
    # Were it differentiated, equal distributions would still move the student; they do not.
    gradient = jax.grad(lambda x: by_ours(0.0, x, jnp.float32(student))[0])(jnp.float32(student))
    np.testing.assert_allclose(gradient, np.zeros((20, 7)), atol=1e-7)


def test_skipped_tokens_and_the_teacher_receive_exactly_no_gradient():
    student, teacher, _, _ = (jnp.float32(x) for x in at_the_logits())
    by_student, by_teacher = jax.grad(lambda s, t: by_ours(1.0, s, t)[0], argnums=(0, 1))(
        student, teacher
    )
    skipped = np.concatenate([np.arange(n) < SKIP for n in LENGTHS])
    assert not np.any(np.asarray(by_student)[skipped]) and np.all(
        np.any(np.asarray(by_student)[~skipped], axis=1)
    )
    assert not np.any(by_teacher)


# From demonstrations to the parameters


def config_of(objective, **settings: Any):
    """Four demonstrations a step, two answers each."""
    return default_config(
        objective=objective,
        rollout=RolloutConfig(
            rollouts_per_prompt=2,
            max_prompt_tokens=32,
            max_response_tokens=8,
            temperature=TEMPERATURE,
        ),
        teacher=TeacherConfig(max_prompt_tokens=160, **settings.get("teacher", {})),
        data=DataConfig(rows_per_step=4, max_tokens=32),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=1, clip_norm=1e9),
        train=TrainConfig(
            **{"micro_batch_tokens": 1024, "head_chunk_tokens": 48} | settings.get("train", {})
        ),
        evaluation=EvaluationConfig(prompts=2, samples_per_prompt=1, batch_prompts=1),
    )


ENVIRONMENT = Environment()


def make_trainer(config, environment, demonstrations=DEMONSTRATIONS) -> Any:
    """A trainer, into whose source a test may look."""
    objective = make_objective(config.objective)
    return Trainer(config, MODEL, TOKENIZER, environment, demonstrations, objective=objective)


@cache
def trainer_of(alpha=0.0, **train):
    return make_trainer(config_of(SdftConfig(alpha=alpha), train=train), ENVIRONMENT)


@cache
def weights(seed):
    return jax.device_get(tiny.make_params(ARCHITECTURE, seed=seed, scale=0.5))


def updates_of(trainer, student=None, teacher=None, seed=1):
    """The updates of the first step, the student's weights moved since it sampled."""
    position = trainer.source.get_state()
    student = weights(0) if student is None else student
    teacher = weights(seed) if teacher is None else teacher
    timer = PhaseTimer()
    rollouts, row = trainer.source(student, 1, timer)
    trainer.source.set_state(position)
    models = Models(student, teacher, None)
    updates, more = trainer.objective.make_updates(
        trainer.engine, rollouts, models, step=1, timer=timer
    )
    return updates, row | more


def draw_with(trainer, sampler):
    trainer.source._setup = trainer.source._setup._replace(sampler=sampler)


def gradient_after(trainer, update, params):
    """Gradient and metrics of an update, by AdamW's first moment."""
    state, metrics = run_update(trainer._programs, trainer.initial_state(params), update)
    moment = optax.tree_utils.tree_get(state.optimizer, "mu")
    return jax.tree.map(lambda m: np.asarray(m) / 0.1, moment), metrics


class Spy(Sampler):
    """A sampler that keeps what it drew."""

    def __call__(self, *arguments: Any, **settings: Any):
        self.last = super().__call__(*arguments, **settings)
        return self.last


def reference_loss(alpha, drawn, demonstrations, student, teacher):
    """The whole objective in float64: prompts, decoder, importance, skipping, means."""
    total = 0.0
    for i, response in enumerate(drawn.responses()):
        d = demonstrations[i // 2]
        question = TOKENIZER.render(d.messages)
        content = d.messages[0]["content"]
        shown = (
            f"{content}\nCorrect solution:\n\n{d.response}\n\nSolve the question above yourself."
        )
        s, t = (
            tiny.log_softmax(
                tiny.reference_logits(ARCHITECTURE, params, [*prompt, *response])[
                    len(prompt) - 1 : -1
                ]
                / TEMPERATURE
            )
            for params, prompt in (
                (student, question),
                (teacher, TOKENIZER.render([{"role": "user", "content": shown}])),
            )
        )
        # The importance weight is detached: that of the weights at which the gradient is taken.
        new = tiny.log_softmax(
            tiny.reference_logits(ARCHITECTURE, weights(2), [*question, *response])[
                len(question) - 1 : -1
            ]
            / TEMPERATURE
        )[np.arange(len(response)), response]
        weight = np.minimum(np.exp(new - drawn.log_probs[i][: len(response)]), CAP).mean()
        p, q = np.exp(s), np.exp(t)
        value = (q * (t - s) if alpha == 0.0 else p * (s - t)).sum(axis=-1)[SKIP:]
        total += weight * (value.mean() if len(value) else 0.0)
    return total / len(drawn.lengths)


@pytest.mark.parametrize("alpha", [0.0, pytest.param(1.0, marks=pytest.mark.slow)])
def test_an_update_is_the_objective_of_the_sampled_responses_in_float64(alpha):
    trainer = trainer_of(alpha)
    plain = trainer.sampler
    spy = Spy(MODEL, trainer.devices, TOKENIZER.stop_ids)
    draw_with(trainer, spy)
    position = trainer.source.get_state()
    demonstrations = next(trainer.source._demonstrations)
    trainer.source.set_state(position)
    ((update,), _) = updates_of(trainer)
    draw_with(trainer, plain)
    gradient, metrics = gradient_after(trainer, update, weights(2))  # off-policy: ratios differ
    reference = partial(reference_loss, alpha, spy.last, demonstrations, teacher=weights(1))
    np.testing.assert_allclose(metrics.loss, reference(student=weights(2)), rtol=2e-5)
    importance = float(metrics.sums["importance"]) / float(metrics.tokens)
    assert abs(importance - 1.0) > 0.05
    random, size = np.random.default_rng(0), 1e-4
    direction = jax.tree.map(lambda x: random.normal(size=x.shape), weights(2))

    def moved(sign):
        shift = lambda x, d: np.asarray(x, np.float64) + sign * size * d  # noqa: E731
        return reference(student=jax.tree.map(shift, weights(2), direction))

    slope = (moved(1) - moved(-1)) / (2 * size)
    ours = sum(
        float(np.sum(g * d))
        for g, d in zip(jax.tree.leaves(gradient), jax.tree.leaves(direction), strict=True)
    )
    np.testing.assert_allclose(ours, slope, rtol=1e-3)


@pytest.mark.parametrize("alpha", [0.0, pytest.param(1.0, marks=pytest.mark.slow)])
def test_a_teacher_with_the_students_weights_and_prompt_teaches_nothing(alpha):
    trainer = trainer_of(alpha)

    class QuestionAlone(TeacherPrompts):
        def __call__(self, questions, contexts):
            del contexts
            return [TOKENIZER.render(q) for q in questions], [True] * len(questions)

    shown = trainer.engine.teacher_prompts
    trainer.engine.teacher_prompts = QuestionAlone(trainer.config.teacher, TOKENIZER)
    ((update,), row) = updates_of(trainer, teacher=weights(0))
    trainer.engine.teacher_prompts = shown
    gradient, metrics = gradient_after(trainer, update, weights(0))
    assert row["teacher_signal"] == 1.0 and float(metrics.tokens) > 0
    assert abs(float(metrics.loss)) < 1e-7
    assert float(metrics.sums["importance"]) == pytest.approx(float(metrics.tokens), rel=1e-4)
    jax.tree.map(lambda g: np.testing.assert_allclose(g, 0.0, atol=1e-6), gradient)


@pytest.mark.slow
@pytest.mark.parametrize(
    "form",
    [
        {"micro_batch_tokens": 64, "head_chunk_tokens": 5},
        {"micro_batch_tokens": 1},
        {"share_prompts": "off", "micro_batch_tokens": 64},
    ],
)
def test_the_result_does_not_depend_on_how_responses_are_cut_into_micro_batches(form):
    results = []
    for trainer in (trainer_of(), trainer_of(**form)):
        ((update,), _) = updates_of(trainer)
        results.append((len(update.micro_batches), *gradient_after(trainer, update, weights(2))))
    (one, gradient, metrics), (several, other_gradient, other) = results
    assert one == 1 < several
    np.testing.assert_allclose(other.loss, metrics.loss, rtol=1e-5)
    np.testing.assert_allclose(other.sums["importance"], metrics.sums["importance"], rtol=1e-5)
    jax.tree.map(partial(np.testing.assert_allclose, atol=2e-6), other_gradient, gradient)


def test_nothing_is_graded_and_responses_that_were_cut_off_are_kept():
    trainer = trainer_of()
    ((update,), row) = updates_of(trainer)
    assert trainer.source._setup.sampler is trainer.sampler and row["generations"] == 8
    assert ENVIRONMENT.graded == 0
    assert row["truncated"] > 0
    counted = sum(float(jnp.sum(m.weights > 0)) for m in update.micro_batches)
    # All tokens of all eight responses but the first three.
    assert counted == 8 * row["response_tokens"] - 8 * SKIP


class Asked(list):
    """A list that remembers which of its rows were asked for."""

    def __init__(self, items):
        super().__init__(items)
        self.order = []

    def __getitem__(self, index):
        item = super().__getitem__(index)
        self.order.append(item.id)
        return item


def test_sft_and_sdft_see_the_same_demonstrations_in_the_same_order():
    orders = []
    for objective in (SftConfig(), SdftConfig()):
        asked = Asked(DEMONSTRATIONS)
        trainer = make_trainer(config_of(objective), Environment(), asked)
        asked.order.clear()
        if isinstance(objective, SdftConfig):  # nothing is compiled twice
            draw_with(trainer, trainer_of().sampler)
        for step in range(1, 3):
            trainer.source(weights(0), step, PhaseTimer())
        orders.append(asked.order)
    assert orders[0] == orders[1] and len(orders[0]) == 8
    assert orders[0][:6] != sorted(orders[0][:6])


# What the teacher is shown


CODEC = TOKENIZER


def shown(question, demonstration, limit=200):
    messages = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": question})
    fitted = fit_reprompt(
        messages,
        TeacherContext(demonstration, None),
        CODEC,
        max_prompt_tokens=limit,
        max_feedback_tokens=8,
        wording=EXAMPLE,
    )
    assert len(TOKENIZER.render(fitted.messages)) <= limit and fitted.messages[0] == messages[0]
    return fitted.messages[-1]["content"]


def test_the_teacher_reads_question_demonstration_and_a_request_for_an_own_answer():
    assert shown("What is {2+2}?", "It is <b>4</b>.") == (
        "What is {2+2}?\nCorrect solution:\n\nIt is <b>4</b>.\n\nSolve the question above yourself."
    )


def test_a_long_demonstration_loses_its_end_and_the_closing_line_stays():
    assert shown("Why?", "because " * 40, limit=100) == (
        "Why?\nCorrect solution:\n\nbecause because because be"
        "\n\nSolve the question above yourself."
    )


def test_a_demonstration_of_thoughts_alone_is_no_signal_unless_thoughts_are_shown():
    thoughtful = [d._replace(response="<think>hm</think>") for d in DEMONSTRATIONS]
    counts = []
    for remove in (True, False):
        config = config_of(SdftConfig(), teacher={"remove_thinking": remove})
        trainer, compiled = make_trainer(config, Environment(), thoughtful), trainer_of()
        draw_with(trainer, compiled.sampler)
        trainer.engine.forward, trainer.engine.head = compiled.engine.forward, compiled.engine.head
        updates, row = updates_of(trainer)
        counts.append((len(updates), row["teacher_signal"]))
    assert counts == [(0, 0.0), (1, 1.0)]


@pytest.mark.slow
def test_evaluation_shows_the_teacher_the_environments_references():
    config = config_of(SdftConfig())
    seen = []

    class Prompts(TeacherPrompts):
        def __call__(self, questions, contexts):
            seen.extend(context.demonstration for context in contexts)
            return super().__call__(questions, contexts)

    trainer = trainer_of()
    prompts = Prompts(config.teacher, TOKENIZER, EXAMPLE)
    contexts = demonstration_contexts(config.teacher)
    evaluator = Evaluator(config, trainer.sampler, TOKENIZER, Environment(), prompts, contexts)
    metrics = evaluator(weights(0), weights(1), 0)
    assert seen == ["ref a", "ref b"]
    assert metrics["accuracy"] == metrics["teacher_accuracy"] == 0.0
