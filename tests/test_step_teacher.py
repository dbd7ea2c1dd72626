"""The teacher in one update: how often it runs, on which tokens, and how it follows the student."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from one_update import (
    ALPHA,
    METRICS,
    MODEL,
    PER_TOKEN,
    SIGNAL,
    TOKENIZER,
    apply,
    assert_close,
    assert_equal,
    fresh_state,
    gradient_of,
    one_device,
    programs,
    real_tokens,
    rollouts,
    student,
    teacher_prompts,
    the_update,
)

from sdpo_jax.data.packing import Pair
from sdpo_jax.model import BLOCK_TOKENS
from sdpo_jax.teacher.prompts import TeacherPrompts
from sdpo_jax.training.batch import BatchLayout, make_sequences, split_micro_batches
from sdpo_jax.training.lora import full
from sdpo_jax.training.step import Sequences, forward, make_update_programs


@pytest.mark.parametrize(
    "alpha",
    [pytest.param(0.0, marks=pytest.mark.slow), ALPHA, pytest.param(1.0, marks=pytest.mark.slow)],
)
def test_a_teacher_with_the_students_weights_and_prompt_teaches_nothing(alpha):
    run = programs("sdpo", alpha=alpha)

    class SamePrompts(TeacherPrompts):
        def __call__(self, questions, contexts):
            del contexts
            return [TOKENIZER.render(q) for q in questions], [True] * len(questions)

    prompts = SamePrompts(run.config.teacher, TOKENIZER)
    state, metrics = apply(run, the_update("sdpo", run, teacher=student(), prompts=prompts))
    assert float(metrics.tokens) > 0
    assert abs(float(metrics.loss)) < 1e-7
    # Rounding of the softmax at 1e-7; the real gradient of this batch is four orders larger.
    assert float(metrics.grad_norm) < 1e-6
    assert_close(gradient_of(state), jax.tree.map(np.zeros_like, student()), atol=1e-6)


def test_no_gradient_reaches_the_teacher():
    run = programs("sdpo")
    update = the_update("sdpo", run)
    (micro_batch,) = update.micro_batches
    step = make_update_programs(MODEL, PER_TOKEN["sdpo"], METRICS["sdpo"], run.optimizer, full())
    sums = run.step.start(student())

    def total(params):
        hidden = forward(MODEL, params, micro_batch.sequences)
        inputs = micro_batch.inputs._replace(teacher_hidden=hidden)
        shared = update.shared._replace(teacher_head=MODEL.head(params))
        learned = step.accumulate(
            sums, student(), None, micro_batch._replace(inputs=inputs), shared
        )
        return jnp.sum(hidden) + learned.loss + learned.metrics["teacher_entropy"]

    assert_equal(tiny.quick_jit(jax.grad(total))(student()), jax.tree.map(np.zeros_like, student()))


def teacher_passes(run, prompts=None):
    """What the teacher's forward is called with, for the fixed experience."""
    passes: list[Sequences] = []

    def recorded(params, sequences):
        passes.append(sequences)
        return run.forward(params, sequences)

    the_update("sdpo", run._replace(forward=recorded), prompts=prompts)
    return passes


def test_the_teacher_runs_a_prompt_that_several_rollouts_share_once():
    run, data = programs("sdpo"), rollouts()
    prompts = teacher_prompts(run)
    shown = [tuple(prompts[i] or ()) for i in SIGNAL]
    assert len(set(shown)) == 2  # prompt 0's are shown the same demonstration, row 5 feedback
    responses = int(data.lengths[SIGNAL].sum())
    (sequences,) = teacher_passes(run)
    assert real_tokens(sequences) == sum(map(len, set(shown))) + responses - len(SIGNAL)
    (unshared,) = teacher_passes(programs("sdpo", share_prompts=False))
    assert real_tokens(unshared) == sum(map(len, shown)) + responses
    one_by_one = teacher_passes(programs("sdpo", micro_batch_tokens=1))
    assert len(one_by_one) == len(SIGNAL)
    assert sum(map(real_tokens, one_by_one)) == sum(map(len, shown)) + responses - len(SIGNAL)


def work(sequences: Sequences):
    """Tokens through the linear layers, padding included, and pairs of blocks that meet."""
    pairs = 0
    for rows, filled in zip(*(np.asarray(x) for x in sequences.attention), strict=True):
        for first, count, _, shared_count, own in rows[:filled]:
            pairs += -(-shared_count // BLOCK_TOKENS) - (-(first + count - own) // BLOCK_TOKENS)
    return sequences.tokens.size, int(pairs)


def test_shared_prompts_halve_the_teachers_work():
    """Eight questions with eight rollouts of 64 tokens; a question is asked in two ways."""
    random, run = np.random.default_rng(0), programs("sdpo")
    prompts = [tiny.random_ids(random, 218) for _ in range(16)]
    shared = [Pair(prompts[i // 4], tiny.random_ids(random, 64)) for i in range(64)]
    layout = run.layout._replace(micro_batch_tokens=65_536)

    def passes(pairs: Sequence[Pair], layout: BatchLayout):
        return [make_sequences(x, run.devices) for x in split_micro_batches(pairs, layout)]

    (together,) = passes(shared, layout)
    tokens, pairs = work(together)
    assert real_tokens(together) == 16 * 218 + 64 * 63
    assert pairs == 16 * (1 + 2 + 3 + 4) + 64 * (4 + 1)
    alone = passes(shared, layout._replace(micro_batch_tokens=1))  # nothing is shared any more
    assert len(alone) == 64
    apart = [work(x) for x in alone]
    assert pairs <= sum(p for _, p in apart)
    # The plainest form: a sequence to itself, its prompt among its own tokens.
    blocks = -(-(218 + 64) // BLOCK_TOKENS)
    assert 2 * pairs <= 64 * blocks * (blocks + 1) // 2
    assert 2 * tokens <= 64 * (218 + 64)
    (rows,) = passes(shared, layout._replace(share_prompts=False))
    assert 2 * tokens <= rows.tokens.size


def test_no_pass_is_empty_and_the_head_reads_no_more_chunks_than_hold_tokens():
    run = programs("sdpo", mesh=(1, 4, 2), micro_batch_tokens=1, head_chunk_tokens=4)
    update = the_update("sdpo", run)
    for micro_batch in update.micro_batches:
        weights = np.asarray(micro_batch.weights)
        held = (weights > 0).any(axis=(0, 2))
        assert held.any() and held.tolist() == (np.arange(len(held)) < micro_batch.chunks).tolist()
        assert real_tokens(micro_batch.sequences) > 0


def test_the_divergence_to_a_fixed_teacher_falls():
    run = programs("sdpo")
    update, state = the_update("sdpo", run), fresh_state(run)
    divergences = []
    for _ in range(25):
        state, metrics = apply(run, update, state)
        divergences.append(float(metrics.sums["divergence"] / metrics.tokens))
    assert divergences[-1] < 0.7 * divergences[0]
    assert np.all(np.diff(divergences[::4]) < 0)


def test_the_teacher_follows_once_towards_the_student():
    run = programs("sdpo")
    state, metrics = one_device("sdpo")
    moved = run.update_teacher(state, metrics.finite)
    rate = np.float32(run.config.teacher.ema_rate)
    expected = jax.tree.map(lambda t, s: (1 - rate) * t + rate * s, state.teacher, state.params)
    assert_close(moved.teacher, expected, atol=0.0, rtol=3e-7)  # two roundings
    assert_equal(moved.params, state.params)
    assert_equal(run.update_teacher(state, jnp.asarray(False)).teacher, state.teacher)
