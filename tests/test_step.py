"""One update: what it must not depend on, and that its gradient is the paper's."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from one_update import (
    ALPHA,
    ARCHITECTURE,
    CAP,
    GROUP,
    SIGNAL,
    TEMPERATURE,
    TOKENIZER,
    apply,
    assert_close,
    assert_equal,
    assert_same_step,
    by_hand,
    demonstrations,
    fresh_state,
    gradient_of,
    one_device,
    programs,
    real_tokens,
    rollouts,
    student,
    teacher_prompts,
    teacher_weights,
    the_update,
    updates_of,
)

from sdpo_jax.data.packing import Pair
from sdpo_jax.losses.per_token import SdpoSharedInputs, SdpoTokenInputs, SftTokenInputs
from sdpo_jax.model import Blocks
from sdpo_jax.training.batch import (
    MiniBatch,
    make_sequences,
    reduction_weights,
    repack,
    split_micro_batches,
)
from sdpo_jax.training.step import Sequences

# What the result must not depend on


slow = partial(pytest.param, marks=pytest.mark.slow)
FORMS = [
    ("sdpo", {"micro_batch_tokens": 1}),  # a pair at a time, which cuts siblings apart
    ("sdpo", {"share_prompts": False, "head_chunk_tokens": 7}),
    slow("sdpo", {"head_chunk_tokens": 1000}),
    slow("sdpo", {"share_prompts": False, "micro_batch_tokens": 1, "head_chunk_tokens": 1}),
    slow("sft", {"micro_batch_tokens": 64}),
    slow("sft", {"micro_batch_tokens": 64, "share_prompts": False}),
    slow("sft", {"micro_batch_tokens": 128, "head_chunk_tokens": 5}),
    slow("grpo", {"micro_batch_tokens": 1, "share_prompts": False}),
    slow("grpo", {"head_chunk_tokens": 1}),
]


@pytest.mark.parametrize(("name", "layout"), FORMS)
def test_the_update_does_not_depend_on_micro_batches_shared_prompts_or_chunks(name, layout):
    run = programs(name, **layout)
    update = the_update(name, run)
    if "micro_batch_tokens" in layout and (name == "sft" or run.layout.share_prompts):
        assert len(update.micro_batches) > 1
    state, metrics = apply(run, update)
    expected_state, expected = one_device(name)
    assert_close(gradient_of(state), gradient_of(expected_state), atol=1e-6)
    assert_close(metrics.loss, expected.loss, atol=1e-6)
    assert_close(metrics.sums, expected.sums, atol=1e-5, rtol=2e-6)
    assert float(metrics.tokens) == float(expected.tokens)
    if name == "sdpo":
        assert float(metrics.tokens) == 9 + 3 + 12 + 8


def padded(micro_batch):
    """With twice the room for tokens, blocks and chunks, and anything in it."""

    def longer(x, fill):
        return np.concatenate([np.asarray(x), np.full_like(x, fill)], axis=1)

    tokens, positions, attention, places = micro_batch.sequences
    if isinstance(attention, Blocks):
        there = np.arange(attention.table.shape[1])[None, :, None] < attention.filled[:, None, None]
        table = np.where(there, attention.table, 9)
        attention = Blocks(longer(table, 9), attention.filled)
    else:
        attention = longer(attention, 0)
    fills, outcomes = {np.dtype(np.int32): 5, np.dtype(np.float32): np.nan}, micro_batch.outcomes
    return micro_batch._replace(
        sequences=Sequences(longer(tokens, 7), longer(positions, 3), attention, longer(places, 1)),
        weights=longer(micro_batch.weights, 0),
        targets=longer(micro_batch.targets, 5),
        inputs=jax.tree.map(lambda x: longer(x, fills[x.dtype]), micro_batch.inputs),
        outcomes=None if outcomes is None else longer(outcomes, 1),
    )


@pytest.mark.parametrize("share_prompts", [True, slow(False)])
def test_the_update_does_not_depend_on_padding(share_prompts):
    run = programs("sdpo", share_prompts=share_prompts)
    update = the_update("sdpo", run)
    (micro_batch,) = update.micro_batches
    state, metrics = apply(run, update._replace(micro_batches=[padded(micro_batch)]))
    expected_state, expected = one_device("sdpo")
    assert_close(gradient_of(state), gradient_of(expected_state), atol=1e-6)
    assert_close(metrics, expected, atol=1e-5, rtol=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "layout"),
    [("sdpo", {}), ("grpo", {}), ("sft", {}), ("sdpo", {"share_prompts": False})],
)
def test_one_update_on_fsdp_4_tensor_2_equals_one_device(name, layout):
    run = programs(name, mesh=(1, 4, 2), **layout)
    assert len(run.devices.mesh.devices.ravel()) == 8 and run.layout.shards == 4
    state, metrics = apply(run, the_update(name, run))
    expected_state, expected = one_device(name)
    if run.teacher is not None:
        state = run.update_teacher(state, metrics.finite)
        expected_state = programs(name).update_teacher(expected_state, expected.finite)
        assert_close(state.teacher, expected_state.teacher, atol=1e-5)
    assert not state.params["layers"]["query"].sharding.is_fully_replicated
    assert_close(gradient_of(state), gradient_of(expected_state), atol=1e-6)
    assert_close(state.optimizer, expected_state.optimizer, atol=1e-5)
    assert_same_step(state.params, expected_state)
    assert_close(metrics, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean"])
def test_dropping_rows_without_a_signal_equals_giving_them_weight_zero(reduction):
    run, data = programs("sdpo"), rollouts()
    dropped, _ = apply(run, the_update("sdpo", run, reduction=reduction))
    prompts = teacher_prompts(run)
    assert [i for i, ids in enumerate(prompts) if ids is not None] == SIGNAL
    assert updates_of("sdpo", run)[1]["teacher_signal"] == 0.5
    shown = [ids or data.prompt_ids[i] for i, ids in enumerate(prompts)]
    pairs = [Pair(*x) for x in zip(data.prompt_ids, data.response_ids, strict=True)]
    taught = [Pair(*x) for x in zip(shown, data.response_ids, strict=True)]
    active = np.isin(np.arange(8), SIGNAL)
    weights, denominator = reduction_weights(data.lengths, active, 16, reduction)
    rows = [row[:size] for row, size in zip(weights, data.lengths, strict=True)]
    packed, every = split_micro_batches(pairs, run.layout), np.arange(8)
    mini_batch = MiniBatch(list(range(8)), pairs, packed, rows, denominator, every)

    def inputs(packed, place):
        sequences = make_sequences(repack(taught, packed, run.layout), run.devices)
        return SdpoTokenInputs(
            run.forward(teacher_weights(), sequences),
            place(data.response_ids, dtype=np.int32),
            place(data.log_probs),
        )

    shared = SdpoSharedInputs(run.head(teacher_weights()), jnp.float32(TEMPERATURE))
    update = by_hand(run, mini_batch, inputs, shared, outcomes=np.zeros(8, np.int32))
    kept, _ = apply(run, update)
    assert_close(gradient_of(dropped), gradient_of(kept), atol=1e-6)


def test_rows_without_an_advantage_are_not_computed_but_counted():
    run, data = programs("grpo"), rollouts()
    update = the_update("grpo", run)
    (micro_batch,) = update.micro_batches
    assert int((np.asarray(micro_batch.weights) > 0).sum()) == data.lengths[:GROUP].sum()
    computed = len(data.prompt_ids[0]) + data.lengths[:GROUP].sum() - GROUP
    assert real_tokens(micro_batch.sequences) == computed
    assert float(update.denominator) == data.lengths.sum()


# Packed demonstrations


@pytest.mark.slow
@pytest.mark.parametrize("reduction", ["sequence_mean", "token_mean"])
def test_packed_demonstrations_equal_one_row_per_demonstration(reduction):
    run = programs("sft", share_prompts=False)
    packed = the_update("sft", run, reduction=reduction)
    (micro_batch,) = packed.micro_batches
    segments = np.asarray(micro_batch.sequences.attention)
    assert segments.max() > 1 and (segments.max(axis=-1) > 0).sum() < 6  # it is packed
    prompts = [TOKENIZER.render(d.messages) for d in demonstrations()]
    responses = [[*TOKENIZER.encode(d.response), TOKENIZER.END] for d in demonstrations()]
    pairs = [Pair(*x) for x in zip(prompts, responses, strict=True)]
    lengths = np.array([len(r) for r in responses], np.int32)
    weights, denominator = reduction_weights(lengths, np.ones(6, np.bool_), 32, reduction)
    rows = [row[:size] for row, size in zip(weights, lengths, strict=True)]
    # Each alone in a micro-batch of one row.
    alone = [split_micro_batches([pair], run.layout)[0] for pair in pairs]
    alone = [packed._replace(members=[[i]]) for i, packed in enumerate(alone)]
    mini_batch = MiniBatch(list(range(6)), pairs, alone, rows, denominator, np.arange(6))
    update = by_hand(
        run, mini_batch, lambda _, place: SftTokenInputs(place(responses, dtype=np.int32)), None
    )
    assert all(np.max(m.sequences.attention) == 1 for m in update.micro_batches)
    packed_state, packed_metrics = apply(run, packed)
    state, metrics = apply(run, update)
    assert_close(gradient_of(packed_state), gradient_of(state), atol=1e-6)
    assert_close(packed_metrics.loss, metrics.loss, atol=1e-6)
    assert_close(packed_metrics.sums, metrics.sums, atol=1e-5, rtol=1e-6)
    assert float(packed_metrics.tokens) == float(metrics.tokens) == lengths.sum()


# Updates that are not finite


def test_a_gradient_that_is_not_finite_is_skipped_and_counted():
    run = programs("sdpo")
    good, start = the_update("sdpo", run), fresh_state(run)
    (micro_batch,) = good.micro_batches
    bad, inputs = good, micro_batch.inputs
    for poison in (np.inf, np.nan):
        hidden = inputs.teacher_hidden.at[0, 0, 0, 0].set(poison)
        poisoned = micro_batch._replace(inputs=inputs._replace(teacher_hidden=hidden))
        bad = good._replace(micro_batches=[poisoned])
        state, metrics = apply(run, bad, start)
        assert not bool(metrics.finite) and int(metrics.skipped) == int(state.skipped) == 1
        assert_equal(state.replace(skipped=start.skipped), start)
        assert_equal(run.update_teacher(state, metrics.finite), state)
    state, metrics = apply(run, bad, state)
    assert int(state.skipped) == 2
    state, metrics = apply(run, good, state)
    assert bool(metrics.finite) and int(state.skipped) == 0
    assert_equal(state, one_device("sdpo")[0])  # as if nothing had happened


# The gradient itself


def reference_loss():
    """`params -> loss` of the SDPO update in float64 numpy, from the paper's equations.

    Teacher and importance weights are computed once, at the student's parameters: constants.
    """
    run, data = programs("sdpo"), rollouts()
    prompts = teacher_prompts(run)

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
