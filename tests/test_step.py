"""One update: what it may depend on, what it must not, and that its gradient is the paper's."""

from dataclasses import replace
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from sdpo_jax.config import (
    Config,
    DataConfig,
    GrpoObjective,
    OptimizerConfig,
    RolloutConfig,
    SdpoObjective,
    SftObjective,
    TrainConfig,
)
from sdpo_jax.data.jsonl import Demonstration
from sdpo_jax.data.pipeline import prompt_batches
from sdpo_jax.devices import Devices
from sdpo_jax.environments.base import Outcome, Prompt
from sdpo_jax.losses.distillation import full_vocabulary_loss
from sdpo_jax.losses.objectives import (
    SdpoConstants,
    SdpoTokens,
    SftTokens,
    grpo_per_token,
    sdpo_per_token,
    sft_per_token,
)
from sdpo_jax.teacher.prompts import TeacherPrompts
from sdpo_jax.training.batch import (
    Reduction,
    cut_rows,
    layout,
    make_rows,
    make_tokens,
    reduction_weights,
)
from sdpo_jax.training.clock import Clock
from sdpo_jax.training.experience import Experience
from sdpo_jax.training.objectives import GrpoUpdates, SdpoUpdates
from sdpo_jax.training.parameters import full
from sdpo_jax.training.sources import DemonstrationSource
from sdpo_jax.training.state import (
    TrainState,
    create_state,
    make_optimizer,
    make_teacher,
    state_shardings,
)
from sdpo_jax.training.step import Batch, follow, make_train_step, teacher_forward

TOKENIZER = tiny.ByteTokenizer()
ARCHITECTURE = replace(tiny.ARCHITECTURE, vocabulary=TOKENIZER.vocabulary)
MODEL = tiny.make_model(ARCHITECTURE)
TEMPERATURE, ALPHA, CAP = 0.8, 0.5, 2.0
OBJECTIVES = {"sdpo": SdpoObjective(alpha=ALPHA), "grpo": GrpoObjective(), "sft": SftObjective()}


def sdpo(alpha):
    return sdpo_per_token(partial(full_vocabulary_loss, alpha=alpha), importance_cap=CAP)


PER_TOKEN = {
    "sdpo": sdpo(ALPHA),
    "grpo": grpo_per_token(clip_low=0.2, clip_high=0.28, dual_clip=3.0),
    "sft": sft_per_token(),
}
PROMPTS, GROUP = 2, 4
# No clipping: the first moment after one update is then (1 - b1) times the gradient.
OPTIMIZER = OptimizerConfig(learning_rate=1e-3, warmup_steps=1, clip_norm=1e9)


class Programs(NamedTuple):
    """A run's programs, compiled as the trainer compiles them, but on any mesh."""

    config: Config
    devices: Devices
    optimizer: optax.GradientTransformation
    teacher: Any
    shardings: TrainState
    train_step: Any
    forward: Any
    follow: Any


@cache
def programs(name, mesh=(1, 1, 1), micro_batch_tokens=1024, alpha=ALPHA):
    config = Config(
        objective=OBJECTIVES[name],
        rollout=RolloutConfig(temperature=TEMPERATURE),
        data=DataConfig(max_tokens=64),
        optimizer=OPTIMIZER,
        train=TrainConfig(micro_batch_rows=micro_batch_rows, head_chunk_tokens=48),
    )
    devices, teacher = tiny.make_devices(*mesh), make_teacher(config)
    optimizer = make_optimizer(config.optimizer, 100)
    shardings = state_shardings(MODEL, devices, optimizer, teacher, full())
    per_token = sdpo(alpha) if name == "sdpo" else PER_TOKEN[name]
    train_step = make_train_step(MODEL, per_token, optimizer, full(), head_chunk_tokens=48)
    jit = tiny.quick_jit
    hidden_and_head = (devices.micro_batches, devices.replicated)
    return Programs(
        config=config,
        devices=devices,
        optimizer=optimizer,
        teacher=teacher,
        shardings=shardings,
        train_step=jit(train_step, out_shardings=(shardings, devices.replicated)),
        forward=jit(partial(teacher_forward, MODEL), out_shardings=hidden_and_head),
        follow=jit(partial(follow, teacher, full()), out_shardings=shardings) if teacher else None,
    )


@cache
def student():
    return jax.device_get(tiny.make_params(ARCHITECTURE))


@cache
def teacher_weights():
    """Other weights than the student's, so that nothing agrees by accident."""
    return jax.device_get(tiny.make_params(ARCHITECTURE, seed=1))


@cache
def experience():
    """Two prompts, four answers each.

    Rows 1, 2, 3 (sibling 0) and 5 (feedback) have a teacher signal; prompt 0 has an advantage.
    """
    random = np.random.default_rng(0)
    lengths = np.array([6, 9, 3, 12, 5, 8, 1, 14], np.int32)
    responses = [
        [*(4 + random.integers(97, 123, size=n - 1)).tolist(), TOKENIZER.END] for n in lengths
    ]
    messages = [({"role": "user", "content": text},) for text in ("one?", "and two?")]
    feedback = ["", "wrong: a", "", "", "", "wrong: b", "", ""]
    return Experience(
        prompts=[Prompt(str(i), m, {}) for i, m in enumerate(messages)],
        group=GROUP,
        prompt_ids=[TOKENIZER.render(m) for m in messages for _ in range(GROUP)],
        response_ids=responses,
        log_probs=[random.normal(-5.0, 1.0, size=n).astype(np.float32) for n in lengths],
        lengths=lengths,
        texts=[TOKENIZER.decode(row) for row in responses],
        outcomes=[Outcome(float(i == 0), i == 0, text, {}) for i, text in enumerate(feedback)],
    )


SIGNAL = [1, 2, 3, 5]


def sdpo_updates(run, prompts=None, reduction: Reduction = "token_mean"):
    prompts = prompts or TeacherPrompts(run.config.teacher, TOKENIZER)
    objective = SdpoObjective(alpha=ALPHA, reduction=reduction)
    return SdpoUpdates(run.config, objective, run.devices, prompts, run.forward)


def make_update(name, run, *, teacher=None, prompts=None, reduction: Reduction = "token_mean"):
    """The one update of the fixed experience (or, for sft, of the fixed demonstrations)."""
    if name == "sft":
        return demonstration_update(run, reduction)
    if name == "sdpo":
        maker = sdpo_updates(run, prompts, reduction)
    else:
        maker = GrpoUpdates(run.config, GrpoObjective(reduction=reduction), run.devices)
    teacher = teacher_weights() if teacher is None else teacher
    teacher = jax.device_put(teacher, run.shardings.params)
    updates, _ = maker(experience(), teacher, step=0, clock=Clock())
    assert len(updates) == 1
    return updates[0]


def fresh_state(run, params=None):
    return create_state(
        student() if params is None else params,
        run.optimizer,
        run.teacher,
        run.shardings,
        full(),
        0,
    )


def apply(run, update, state=None):
    return run.train_step(state or fresh_state(run), update.batch, update.constants)


def gradient_of(state):
    """Of the first update, from AdamW's first moment."""
    moment = optax.tree_utils.tree_get(state.optimizer, "mu")
    return jax.tree.map(lambda m: np.asarray(m) / (1 - OPTIMIZER.b1), moment)


def assert_close(a, b, atol, rtol=0.0):
    for (path, x), y in zip(jax.tree.leaves_with_path(a), jax.tree.leaves(b), strict=True):
        name = jax.tree_util.keystr(path)
        np.testing.assert_allclose(x, y, atol=atol, rtol=rtol, err_msg=name)


def assert_same_step(params, expected):
    """Within 1e-5, but for entries whose gradient is rounding: Adam divides by it."""
    limit = jax.tree.map(
        lambda g: np.where(np.abs(g) > 1e-6, 1e-5, 2 * OPTIMIZER.learning_rate),
        gradient_of(expected),
    )
    error = jax.tree.map(lambda a, b: np.abs(np.asarray(a) - b), params, expected.params)
    assert jax.tree.all(jax.tree.map(lambda e, most: np.all(e <= most), error, limit))


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@cache
def one_device(name):
    """State and metrics after the update on one device, all rows at once."""
    run = programs(name)
    state, metrics = apply(run, make_update(name, run))
    assert bool(metrics.finite) and float(metrics.grad_norm) > 1e-3
    return state, metrics


# What the result must not depend on


@pytest.mark.parametrize(
    "rows", [3, *(pytest.param(rows, marks=pytest.mark.slow) for rows in (1, 2, 4))]
)
def test_the_update_does_not_depend_on_the_micro_batch_size_nor_on_padding_rows(rows):
    run = programs("sdpo", micro_batch_rows=rows)  # 3: nine places for eight rows
    state, metrics = apply(run, make_update("sdpo", run))
    expected_state, expected = one_device("sdpo")
    assert_close(gradient_of(state), gradient_of(expected_state), atol=1e-6)
    assert_close(metrics.loss, expected.loss, atol=1e-6)
    assert_close(metrics.sums, expected.sums, atol=1e-6, rtol=1e-6)
    assert float(metrics.tokens) == float(expected.tokens) == 9 + 3 + 12 + 8


@pytest.mark.parametrize("name", OBJECTIVES)
def test_one_update_on_fsdp_4_tensor_2_equals_one_device(name):
    run = programs(name, mesh=(1, 4, 2), micro_batch_rows=4)
    assert len(run.devices.mesh.devices.ravel()) == 8
    state, metrics = apply(run, make_update(name, run))
    expected_state, expected = one_device(name)
    if run.teacher is not None:
        state = run.follow(state, metrics.finite)
        expected_state = programs(name).follow(expected_state, expected.finite)
        assert_close(state.teacher, expected_state.teacher, atol=1e-5)
    assert not state.params["layers"]["query"].sharding.is_fully_replicated
    assert_close(gradient_of(state), gradient_of(expected_state), atol=1e-6)
    assert_close(state.optimizer, expected_state.optimizer, atol=1e-5)
    assert_same_step(state.params, expected_state)
    assert_close(metrics, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean"])
def test_dropping_rows_without_a_signal_equals_giving_them_weight_zero(reduction):
    run, data = programs("sdpo"), experience()
    dropped, _ = apply(run, make_update("sdpo", run, reduction=reduction))
    prompts, metrics = sdpo_updates(run)._contexts(data, 0)
    assert [i for i, ids in enumerate(prompts) if ids is not None] == SIGNAL
    assert metrics["teacher_signal"] == 0.5
    shape = layout(8, 14, micro_batch_tokens=1024, shards=1)
    shown = [ids or data.prompt_ids[i] for i, ids in enumerate(prompts)]
    hidden, head = run.forward(
        teacher_weights(), make_rows(shown, data.response_ids, shape, run.devices)
    )
    active = np.isin(np.arange(8), SIGNAL)
    weights, denominator = reduction_weights(data.lengths, active, 16, reduction)
    batch = Batch(
        make_rows(data.prompt_ids, data.response_ids, shape, run.devices),
        cut_rows(weights, shape, run.devices),
        SdpoTokens(
            hidden,
            make_tokens(data.response_ids, shape, np.int32, run.devices),
            make_tokens(data.log_probs, shape, np.float32, run.devices),
        ),
        jnp.float32(denominator),
    )
    kept, _ = run.train_step(fresh_state(run), batch, SdpoConstants(head, jnp.float32(TEMPERATURE)))
    assert_close(gradient_of(dropped), gradient_of(kept), atol=1e-6)


def test_rows_without_an_advantage_are_not_computed_but_counted():
    run, data = programs("grpo"), experience()
    batch = make_update("grpo", run).batch
    assert int(batch.rows.filled) == 1 and batch.rows.tokens.shape[0] == 1
    computed = int((np.asarray(batch.weights)[0].sum(axis=-1) > 0).sum())
    assert computed == GROUP
    assert float(batch.denominator) == data.lengths.sum()


# Packed demonstrations


def demonstrations():
    random = np.random.default_rng(1)
    made = []
    for i, size in enumerate((3, 30, 9, 17, 1, 12)):
        text = bytes(random.integers(97, 123, size=size).tolist()).decode()
        made.append(Demonstration(str(i), ({"role": "user", "content": text[::2]},), text))
    return made


def demonstration_update(run, reduction):
    objective = SftObjective(reduction=reduction)
    rows = prompt_batches(demonstrations(), batch_size=6, seed=0)
    source = DemonstrationSource(run.config, objective, rows, TOKENIZER, run.devices)
    updates, _ = source(None, None, 0, Clock())
    assert len(updates) == 1
    return updates[0]


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean"])
def test_packed_demonstrations_equal_one_row_per_demonstration(reduction):
    run = programs("sft")
    packed = make_update("sft", run, reduction=reduction)
    segments = np.asarray(packed.batch.rows.segments)
    assert segments.max() > 1 and (segments.max(axis=-1) > 0).sum() < 6  # it is packed
    prompts = [TOKENIZER.render(d.messages) for d in demonstrations()]
    responses = [[*TOKENIZER.encode(d.response), TOKENIZER.END] for d in demonstrations()]
    lengths = np.array([len(r) for r in responses], np.int32)
    shape = layout(6, 31, micro_batch_tokens=1024, shards=1)
    weights, denominator = reduction_weights(lengths, np.ones(6, np.bool_), 32, reduction)
    batch = Batch(
        make_rows(prompts, responses, shape, run.devices),
        cut_rows(weights, shape, run.devices),
        SftTokens(make_tokens(responses, shape, np.int32, run.devices)),
        jnp.float32(denominator),
    )
    packed_state, packed_metrics = apply(run, packed)
    state, metrics = run.train_step(fresh_state(run), batch, None)
    assert_close(gradient_of(packed_state), gradient_of(state), atol=1e-6)
    assert_close(packed_metrics.loss, metrics.loss, atol=1e-6)
    assert_close(packed_metrics.sums, metrics.sums, atol=1e-5, rtol=1e-6)
    assert float(packed_metrics.tokens) == float(metrics.tokens) == lengths.sum()


# The teacher


@pytest.mark.parametrize(
    "alpha",
    [pytest.param(0.0, marks=pytest.mark.slow), ALPHA, pytest.param(1.0, marks=pytest.mark.slow)],
)
def test_a_teacher_with_the_students_weights_and_prompt_teaches_nothing(alpha):
    run = programs("sdpo", alpha=alpha)

    def same_prompts(questions, contexts):
        del contexts
        return [TOKENIZER.render(q) for q in questions], [True] * len(questions)

    state, metrics = apply(run, make_update("sdpo", run, teacher=student(), prompts=same_prompts))
    assert float(metrics.tokens) > 0
    assert abs(float(metrics.loss)) < 1e-7
    # Rounding of the softmax at 1e-7; the real gradient of this batch is four orders larger.
    assert float(metrics.grad_norm) < 1e-6
    assert_close(gradient_of(state), jax.tree.map(np.zeros_like, student()), atol=1e-6)


def test_no_gradient_reaches_the_teacher():
    run, data = programs("sdpo"), experience()
    shape = layout(8, 14, micro_batch_tokens=1024, shards=1)
    rows = make_rows(data.prompt_ids, data.response_ids, shape, run.devices)

    def total(params):
        hidden, head = teacher_forward(MODEL, params, rows)
        return jnp.sum(hidden) + jnp.sum(head)

    assert_equal(tiny.quick_jit(jax.grad(total))(student()), jax.tree.map(np.zeros_like, student()))


def test_the_teacher_forward_computes_no_more_micro_batches_than_hold_rows():
    run, data = programs("sdpo"), experience()
    shape = layout(8, 14, micro_batch_tokens=1024, shards=1)
    rows = make_rows(data.prompt_ids, data.response_ids, shape, run.devices)
    hidden, _ = run.forward(teacher_weights(), rows)
    nothing, _ = run.forward(teacher_weights(), rows._replace(filled=np.int32(0)))
    assert np.any(hidden) and not np.any(nothing)


def test_the_divergence_to_a_fixed_teacher_falls():
    run = programs("sdpo")
    update, state = make_update("sdpo", run), fresh_state(run)
    divergences = []
    for _ in range(25):
        state, metrics = apply(run, update, state)
        divergences.append(float(metrics.sums["divergence"] / metrics.tokens))
    assert divergences[-1] < 0.7 * divergences[0]
    assert np.all(np.diff(divergences[::4]) < 0)


# Updates that are not finite


def test_a_gradient_that_is_not_finite_is_skipped_and_counted():
    run = programs("sdpo")
    good, start = make_update("sdpo", run), fresh_state(run)
    bad, tokens = good, good.batch.tokens
    for poison in (np.inf, np.nan):
        hidden = tokens.teacher_hidden.at[0, 0, 0, 0].set(poison)
        poisoned = tokens._replace(teacher_hidden=hidden)
        bad = good._replace(batch=good.batch._replace(tokens=poisoned))
        state, metrics = apply(run, bad, start)
        assert not bool(metrics.finite) and int(metrics.skipped) == int(state.skipped) == 1
        assert_equal(state.replace(skipped=start.skipped), start)
        assert_equal(run.follow(state, metrics.finite), state)
    state, metrics = apply(run, bad, state)
    assert int(state.skipped) == 2
    state, metrics = apply(run, good, state)
    assert bool(metrics.finite) and int(state.skipped) == 0
    assert_equal(state, one_device("sdpo")[0])  # as if nothing had happened


def test_the_teacher_follows_once_towards_the_student():
    run = programs("sdpo")
    state, metrics = one_device("sdpo")
    moved = run.follow(state, metrics.finite)
    rate = np.float32(run.config.teacher.ema_rate)
    expected = jax.tree.map(lambda t, s: (1 - rate) * t + rate * s, state.teacher, state.params)
    assert_close(moved.teacher, expected, atol=0.0, rtol=3e-7)  # two roundings
    assert_equal(moved.params, state.params)
    assert_equal(run.follow(state, jnp.asarray(False)).teacher, state.teacher)


# The gradient itself


def reference_loss():
    """`params -> loss` of the SDPO update in float64 numpy, from the paper's equations.

    Teacher and importance weights are computed once, at the student's parameters: constants.
    """
    run, data = programs("sdpo"), experience()
    prompts, _ = sdpo_updates(run)._contexts(data, 0)

    def log_probs(params, prompt, response):
        logits = tiny.reference_logits(ARCHITECTURE, params, [*prompt, *response])
        return tiny.log_softmax(logits[len(prompt) - 1 : -1] / TEMPERATURE)

    rows = []
    for i in SIGNAL:
        response = data.response_ids[i]
        now = log_probs(student(), data.prompt_ids[i], response)
        chosen = now[np.arange(len(response)), response]
        weights = np.minimum(np.exp(chosen - data.log_probs[i]), CAP)
        teacher = log_probs(teacher_weights(), prompts[i], response)
        rows.append((data.prompt_ids[i], response, teacher, weights))

    def loss(params):
        total = 0.0
        for prompt, response, teacher, weights in rows:
            s, t = np.exp(log_probs(params, prompt, response)), np.exp(teacher)
            mixture = (1 - ALPHA) * s + ALPHA * t
            divergence = (1 - ALPHA) * s * np.log(s / mixture) + ALPHA * t * np.log(t / mixture)
            total += np.sum(weights * divergence.sum(axis=-1))
        return total / sum(len(response) for _, response, _, _ in rows)

    return loss


def test_the_gradient_is_that_of_the_papers_equations_by_finite_differences():
    state, metrics = one_device("sdpo")
    loss, gradient = reference_loss(), gradient_of(state)
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), student())
    np.testing.assert_allclose(float(metrics.loss), loss(params), rtol=1e-5)
    flat, tree = jax.tree.flatten(params)
    random, step = np.random.default_rng(0), 1e-5
    for leaf, slope in enumerate(jax.tree.leaves(gradient)):
        # The steepest entry, and one at random: no parameter of the model goes unchecked.
        entries = {int(np.abs(slope).argmax()), int(random.integers(slope.size))}
        for index in (np.unravel_index(entry, slope.shape) for entry in entries):
            moved = []
            for sign in (1, -1):
                changed = [x.copy() for x in flat]
                changed[leaf][index] += sign * step
                moved.append(loss(jax.tree.unflatten(tree, changed)))
            difference = (moved[0] - moved[1]) / (2 * step)
            # The model's gradient is float32: 1e-5 of its size, and of the largest entries'.
            np.testing.assert_allclose(slope[index], difference, rtol=1e-4, atol=2e-7)
