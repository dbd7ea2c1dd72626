"""One update: what it may depend on, what it must not, and that its gradient is the paper's."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from sdpo_jax.config import Config, DataConfig, OptimizerConfig, RolloutConfig
from sdpo_jax.config.objectives import GrpoConfig, SdpoConfig, SftConfig
from sdpo_jax.data.jsonl import Demonstration
from sdpo_jax.data.packing import Pair
from sdpo_jax.data.pipeline import prompt_batches
from sdpo_jax.devices import Devices
from sdpo_jax.environments.base import Outcome, Prompt
from sdpo_jax.losses.distillation import full_vocabulary_loss
from sdpo_jax.losses.per_token import (
    SdpoSharedInputs,
    SdpoTokenInputs,
    SftTokenInputs,
    grpo_per_token,
    sdpo_per_token,
    sft_per_token,
)
from sdpo_jax.model import BLOCK_TOKENS, Blocks
from sdpo_jax.objectives.contexts import Contexts
from sdpo_jax.objectives.sdpo import GrpoUpdates, SdpoUpdates
from sdpo_jax.objectives.sources import DemonstrationSource
from sdpo_jax.rollouts.phase_timer import PhaseTimer
from sdpo_jax.rollouts.rollout_batch import RolloutBatch
from sdpo_jax.run.recipes import default_config
from sdpo_jax.teacher.prompts import TeacherPrompts
from sdpo_jax.training.batch import (
    BatchLayout,
    Reduction,
    make_sequences,
    make_tokens,
    plan,
    reduction_weights,
)
from sdpo_jax.training.lora import full
from sdpo_jax.training.scoring import Scorer
from sdpo_jax.training.state import (
    TrainState,
    create_state,
    make_optimizer,
    make_teacher,
    state_shardings,
)
from sdpo_jax.training.step import (
    Sequences,
    Sums,
    TrainStep,
    follow,
    make_train_step,
    teacher_forward,
    train_step,
)
from sdpo_jax.training.teacher_pass import TeacherPass
from sdpo_jax.training.token_metrics import AGREEMENT, BY_TOKEN, HISTOGRAM
from sdpo_jax.training.updates import MiniBatch, make_update, with_outcomes

TOKENIZER = tiny.ByteTokenizer()
ARCHITECTURE = replace(tiny.ARCHITECTURE, vocabulary=TOKENIZER.vocabulary)
MODEL = tiny.make_model(ARCHITECTURE)
TEMPERATURE, ALPHA, CAP = 0.8, 0.5, 2.0
OBJECTIVES = {"sdpo": SdpoConfig(alpha=ALPHA), "grpo": GrpoConfig(), "sft": SftConfig()}


def sdpo(alpha):
    return sdpo_per_token(partial(full_vocabulary_loss, alpha=alpha), importance_cap=CAP)


PER_TOKEN = {
    "sdpo": sdpo(ALPHA),
    "grpo": grpo_per_token(clip_low=0.2, clip_high=0.28, dual_clip=3.0),
    "sft": sft_per_token(),
}
METRICS = {
    "sdpo": (
        *("divergence", "log_prob", "student_entropy", "teacher_entropy", "ratio", "same_token"),
        *(HISTOGRAM, BY_TOKEN, AGREEMENT),
    ),
    "grpo": ("log_prob", "student_entropy", "ratio", "clipped"),
    "sft": ("log_prob", "student_entropy", "correct"),
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
    step: TrainStep
    forward: Any
    head: Any
    follow: Any
    form: BatchLayout


def programs(name, mesh=(1, 1, 1), alpha=ALPHA, **form):
    """All forms share the programs of a mesh, as jit caches them by shape."""
    run = compiled(name, mesh, alpha)
    return run._replace(form=run.form._replace(**form))


@cache
def compiled(name, mesh, alpha):
    config = default_config(
        objective=OBJECTIVES[name],
        rollout=RolloutConfig(temperature=TEMPERATURE),
        data=DataConfig(max_tokens=64),
        optimizer=OPTIMIZER,
    )
    devices, teacher = tiny.make_devices(*mesh), make_teacher(config)
    optimizer = make_optimizer(config.optimizer, 100)
    shardings = state_shardings(MODEL, devices, optimizer, teacher, full())
    per_token = sdpo(alpha) if name == "sdpo" else PER_TOKEN[name]
    step = make_train_step(MODEL, per_token, METRICS[name], optimizer, full())
    jit = partial(devices.jit, compiler_options=tiny.QUICK)
    whole: Any = devices.replicated
    sums = Sums(shardings.params, dict.fromkeys(METRICS[name], whole), whole, whole)
    return Programs(
        config=config,
        devices=devices,
        optimizer=optimizer,
        teacher=teacher,
        shardings=shardings,
        step=TrainStep(
            jit(step.gradient, out_shardings=sums),
            jit(step.start, out_shardings=sums),
            jit(step.accumulate, out_shardings=sums),
            jit(step.finish, out_shardings=(shardings, whole)),
        ),
        forward=jit(partial(teacher_forward, MODEL), out_shardings=devices.rows),
        head=jit(MODEL.head, out_shardings=whole),
        follow=jit(partial(follow, teacher, full()), out_shardings=shardings) if teacher else None,
        form=BatchLayout(
            True, micro_batch_tokens=1024, head_chunk_tokens=48, shards=devices.row_shards
        ),
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
    return RolloutBatch(
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
    objective = SdpoConfig(alpha=ALPHA, reduction=reduction)
    passes = TeacherPass(run.config, run.devices, run.form, run.forward, run.head)
    contexts = Contexts(run.config, prompts, TOKENIZER)
    scorer = Scorer(MODEL, run.devices, run.config.rollout.temperature)
    return SdpoUpdates(run.config, objective, contexts, passes, scorer, run.devices)


def the_update(name, run, *, teacher=None, prompts=None, reduction: Reduction = "token_mean"):
    """The one update of the fixed experience (or, for sft, of the fixed demonstrations)."""
    if name == "sft":
        return demonstration_update(run, reduction)
    if name == "sdpo":
        maker = sdpo_updates(run, prompts, reduction)
    else:
        objective = GrpoConfig(reduction=reduction)
        maker = GrpoUpdates(run.config, objective, run.devices, run.form)
    teacher = teacher_weights() if teacher is None else teacher
    teacher = jax.device_put(teacher, run.shardings.params)
    updates, _ = maker(experience(), None, teacher, step=0, clock=PhaseTimer())
    assert len(updates) == 1
    return updates[0]


def by_hand(run, part, tokens: Any, constants: Any):
    """An update of given pairs; `tokens(micro_batch, place)` are those of the objective."""

    def placed(micro_batch):
        place = partial(make_tokens, micro_batch=micro_batch, devices=run.devices)
        return tokens(micro_batch, place)

    return make_update(part, placed, constants, run.form, run.devices)


def real_tokens(sequences: Sequences):
    """How many tokens a pass computes, padding aside."""
    if not isinstance(sequences.attention, Blocks):
        return int((np.asarray(sequences.attention) > 0).sum())
    table, filled = (np.asarray(x) for x in sequences.attention)
    return sum(int(rows[:n, 1].sum()) for rows, n in zip(table, filled, strict=True))


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
    return train_step(run.step, state or fresh_state(run), update.batch, update.constants)


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
    state, metrics = apply(run, the_update(name, run))
    assert bool(metrics.finite) and float(metrics.grad_norm) > 1e-3
    return state, metrics


# What the result must not depend on


slow = partial(pytest.param, marks=pytest.mark.slow)
FORMS = [
    ("sdpo", {"micro_batch_tokens": 1}),  # a pair at a time, which cuts siblings apart
    ("sdpo", {"share_prompts": False, "head_chunk_tokens": 7}),
    slow("sdpo", {"head_chunk_tokens": 1000}),
    slow("sdpo", {"share_prompts": False, "micro_batch_tokens": 1, "head_chunk_tokens": 1}),
    slow("sft", {"micro_batch_tokens": 64}),
    ("sft", {"micro_batch_tokens": 64, "share_prompts": False}),
    slow("sft", {"micro_batch_tokens": 128, "head_chunk_tokens": 5}),
    slow("grpo", {"micro_batch_tokens": 1, "share_prompts": False}),
    slow("grpo", {"head_chunk_tokens": 1}),
]


@pytest.mark.parametrize(("name", "form"), FORMS)
def test_the_update_does_not_depend_on_micro_batches_shared_prompts_or_chunks(name, form):
    run = programs(name, **form)
    update = the_update(name, run)
    if "micro_batch_tokens" in form and (name == "sft" or run.form.share_prompts):
        assert len(update.batch.micro_batches) > 1
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

    tokens, positions, attention, take = micro_batch.sequences
    if isinstance(attention, Blocks):
        there = np.arange(attention.table.shape[1])[None, :, None] < attention.filled[:, None, None]
        table = np.where(there, attention.table, 9)
        attention = Blocks(longer(table, 9), attention.filled)
    else:
        attention = longer(attention, 0)
    fills, outcomes = {np.dtype(np.int32): 5, np.dtype(np.float32): np.nan}, micro_batch.outcomes
    return micro_batch._replace(
        sequences=Sequences(longer(tokens, 7), longer(positions, 3), attention, longer(take, 1)),
        weights=longer(micro_batch.weights, 0),
        tokens=jax.tree.map(lambda x: longer(x, fills[x.dtype]), micro_batch.tokens),
        outcomes=None if outcomes is None else longer(outcomes, 1),
    )


@pytest.mark.parametrize("share_prompts", [True, slow(False)])
def test_the_update_does_not_depend_on_padding(share_prompts):
    run = programs("sdpo", share_prompts=share_prompts)
    update = the_update("sdpo", run)
    (micro_batch,) = update.batch.micro_batches
    batch = update.batch._replace(micro_batches=[padded(micro_batch)])
    state, metrics = apply(run, update._replace(batch=batch))
    expected_state, expected = one_device("sdpo")
    assert_close(gradient_of(state), gradient_of(expected_state), atol=1e-6)
    assert_close(metrics, expected, atol=1e-5, rtol=2e-6)


@pytest.mark.parametrize(
    ("name", "form"),
    [*((name, {}) for name in OBJECTIVES), slow("sdpo", {"share_prompts": False})],
)
def test_one_update_on_fsdp_4_tensor_2_equals_one_device(name, form):
    run = programs(name, mesh=(1, 4, 2), **form)
    assert len(run.devices.mesh.devices.ravel()) == 8 and run.form.shards == 4
    state, metrics = apply(run, the_update(name, run))
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
    dropped, _ = apply(run, the_update("sdpo", run, reduction=reduction))
    prompts, metrics = sdpo_updates(run).contexts(data, 0)
    assert [i for i, ids in enumerate(prompts) if ids is not None] == SIGNAL
    assert metrics["teacher_signal"] == 0.5
    shown = [ids or data.prompt_ids[i] for i, ids in enumerate(prompts)]
    pairs = [Pair(*x) for x in zip(data.prompt_ids, data.response_ids, strict=True)]
    taught = [Pair(*x) for x in zip(shown, data.response_ids, strict=True)]
    active = np.isin(np.arange(8), SIGNAL)
    weights, denominator = reduction_weights(data.lengths, active, 16, reduction)
    rows = [row[:size] for row, size in zip(weights, data.lengths, strict=True)]
    part = MiniBatch(list(range(8)), pairs, plan(pairs, run.form), rows, denominator)

    def tokens(micro_batch, place):
        sequences = make_sequences(taught, micro_batch, run.form, run.devices)
        return SdpoTokenInputs(
            run.forward(teacher_weights(), sequences),
            place(data.response_ids, dtype=np.int32),
            place(data.log_probs, dtype=np.float32),
        )

    constants = SdpoSharedInputs(run.head(teacher_weights()), jnp.float32(TEMPERATURE))
    update = by_hand(run, part, tokens, constants)
    kept, _ = apply(run, with_outcomes(update, part, np.zeros(8, np.int32), run.devices))
    assert_close(gradient_of(dropped), gradient_of(kept), atol=1e-6)


def test_rows_without_an_advantage_are_not_computed_but_counted():
    run, data = programs("grpo"), experience()
    batch = the_update("grpo", run).batch
    (micro_batch,) = batch.micro_batches
    assert int((np.asarray(micro_batch.weights) > 0).sum()) == data.lengths[:GROUP].sum()
    computed = len(data.prompt_ids[0]) + data.lengths[:GROUP].sum() - GROUP
    assert real_tokens(micro_batch.sequences) == computed
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
    objective = SftConfig(reduction=reduction)
    rows = prompt_batches(demonstrations(), batch_size=6, seed=0)
    source = DemonstrationSource(run.config, objective, rows, TOKENIZER, run.devices, run.form)
    updates, _ = source(None, None, 0, PhaseTimer())
    assert len(updates) == 1
    return updates[0]


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean"])
def test_packed_demonstrations_equal_one_row_per_demonstration(reduction):
    run = programs("sft", share_prompts=False)
    packed = the_update("sft", run, reduction=reduction)
    (micro_batch,) = packed.batch.micro_batches
    segments = np.asarray(micro_batch.sequences.attention)
    assert segments.max() > 1 and (segments.max(axis=-1) > 0).sum() < 6  # it is packed
    prompts = [TOKENIZER.render(d.messages) for d in demonstrations()]
    responses = [[*TOKENIZER.encode(d.response), TOKENIZER.END] for d in demonstrations()]
    pairs = [Pair(*x) for x in zip(prompts, responses, strict=True)]
    lengths = np.array([len(r) for r in responses], np.int32)
    weights, denominator = reduction_weights(lengths, np.ones(6, np.bool_), 32, reduction)
    rows = [row[:size] for row, size in zip(weights, lengths, strict=True)]
    # Each alone in a micro-batch of one row.
    alone = [plan([pair], run.form)[0]._replace(members=[[i]]) for i, pair in enumerate(pairs)]
    part = MiniBatch(list(range(6)), pairs, alone, rows, denominator)
    update = by_hand(
        run, part, lambda _, place: SftTokenInputs(place(responses, dtype=np.int32)), None
    )
    assert all(np.max(m.sequences.attention) == 1 for m in update.batch.micro_batches)
    packed_state, packed_metrics = apply(run, packed)
    state, metrics = apply(run, update)
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

    state, metrics = apply(run, the_update("sdpo", run, teacher=student(), prompts=same_prompts))
    assert float(metrics.tokens) > 0
    assert abs(float(metrics.loss)) < 1e-7
    # Rounding of the softmax at 1e-7; the real gradient of this batch is four orders larger.
    assert float(metrics.grad_norm) < 1e-6
    assert_close(gradient_of(state), jax.tree.map(np.zeros_like, student()), atol=1e-6)


def test_no_gradient_reaches_the_teacher():
    run = programs("sdpo")
    update = the_update("sdpo", run)
    (micro_batch,) = update.batch.micro_batches
    step = make_train_step(MODEL, PER_TOKEN["sdpo"], METRICS["sdpo"], run.optimizer, full())
    sums = run.step.start(student())

    def total(params):
        hidden = teacher_forward(MODEL, params, micro_batch.sequences)
        tokens = micro_batch.tokens._replace(teacher_hidden=hidden)
        constants = update.constants._replace(teacher_head=MODEL.head(params))
        learned = step.accumulate(
            sums, student(), None, micro_batch._replace(tokens=tokens), constants
        )
        return jnp.sum(hidden) + learned.loss + learned.metrics["teacher_entropy"]

    assert_equal(tiny.quick_jit(jax.grad(total))(student()), jax.tree.map(np.zeros_like, student()))


def teacher_passes(run, prompts=None):
    """What the teacher's forward is called with, for the fixed experience."""
    passes: list[Sequences] = []

    def forward(params, sequences):
        passes.append(sequences)
        return run.forward(params, sequences)

    the_update("sdpo", run._replace(forward=forward), prompts=prompts)
    return passes


def test_the_teacher_runs_a_prompt_that_several_rollouts_share_once():
    run, data = programs("sdpo"), experience()
    prompts, _ = sdpo_updates(run).contexts(data, 0)
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
    form = run.form._replace(micro_batch_tokens=65_536)

    def passes(pairs: Sequence[Pair], form: BatchLayout):
        return [make_sequences(pairs, m, form, run.devices) for m in plan(pairs, form)]

    (together,) = passes(shared, form)
    tokens, pairs = work(together)
    assert real_tokens(together) == 16 * 218 + 64 * 63
    assert pairs == 16 * (1 + 2 + 3 + 4) + 64 * (4 + 1)
    alone = passes(shared, form._replace(micro_batch_tokens=1))  # nothing is shared any more
    assert len(alone) == 64
    apart = [work(x) for x in alone]
    assert pairs <= sum(p for _, p in apart)
    # The plainest form: a sequence to itself, its prompt among its own tokens.
    blocks = -(-(218 + 64) // BLOCK_TOKENS)
    assert 2 * pairs <= 64 * blocks * (blocks + 1) // 2
    assert 2 * tokens <= 64 * (218 + 64)
    (rows,) = passes(shared, form._replace(share_prompts=False))
    assert 2 * tokens <= rows.tokens.size


def test_no_pass_is_empty_and_the_head_reads_no_more_chunks_than_hold_tokens():
    run = programs("sdpo", mesh=(1, 4, 2), micro_batch_tokens=1, head_chunk_tokens=4)
    update = the_update("sdpo", run)
    for micro_batch in update.batch.micro_batches:
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


# Updates that are not finite


def test_a_gradient_that_is_not_finite_is_skipped_and_counted():
    run = programs("sdpo")
    good, start = the_update("sdpo", run), fresh_state(run)
    (micro_batch,) = good.batch.micro_batches
    bad, tokens = good, micro_batch.tokens
    for poison in (np.inf, np.nan):
        hidden = tokens.teacher_hidden.at[0, 0, 0, 0].set(poison)
        poisoned = micro_batch._replace(tokens=tokens._replace(teacher_hidden=hidden))
        bad = good._replace(batch=good.batch._replace(micro_batches=[poisoned]))
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
    prompts, _ = sdpo_updates(run).contexts(data, 0)

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
