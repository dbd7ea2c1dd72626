"""The programs and batches of one update on a tiny model, for the tests of the training step."""

from dataclasses import replace
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
import tiny

from sdpo_jax.config import Config, DataConfig, OptimizerConfig, RolloutConfig
from sdpo_jax.data.jsonl import Demonstration
from sdpo_jax.devices import Devices
from sdpo_jax.environments.base import Outcome, Prompt
from sdpo_jax.losses.divergences import generalized_jsd
from sdpo_jax.losses.per_token import grpo_per_token, sdpo_per_token, sft_per_token
from sdpo_jax.model import Blocks
from sdpo_jax.objectives import GrpoConfig, SdpoConfig, SftConfig, make_objective
from sdpo_jax.rollouts.phase_timer import PhaseTimer
from sdpo_jax.rollouts.rollout_batch import RolloutBatch
from sdpo_jax.rollouts.sources import Demonstrations
from sdpo_jax.run.recipes import default_config
from sdpo_jax.teacher.contexts import SiblingContexts
from sdpo_jax.teacher.prompts import TeacherPrompts
from sdpo_jax.training.batch import BatchLayout, Reduction
from sdpo_jax.training.engine import Engine, Models
from sdpo_jax.training.lora import full
from sdpo_jax.training.state import (
    TrainState,
    make_optimizer,
    make_teacher,
    state_maker,
    state_shardings,
)
from sdpo_jax.training.step import (
    Sequences,
    Sums,
    UpdatePrograms,
    forward,
    make_update_programs,
    run_update,
    update_teacher,
)
from sdpo_jax.training.token_metrics import AGREEMENT, BY_TOKEN, HISTOGRAM

TOKENIZER = tiny.ByteTokenizer()
ARCHITECTURE = replace(tiny.ARCHITECTURE, vocabulary=TOKENIZER.vocabulary)
MODEL = tiny.make_model(ARCHITECTURE)
TEMPERATURE, ALPHA, CAP = 0.8, 0.5, 2.0
OBJECTIVES = {"sdpo": SdpoConfig(alpha=ALPHA), "grpo": GrpoConfig(), "sft": SftConfig()}


def sdpo(alpha):
    return sdpo_per_token(partial(generalized_jsd, alpha=alpha), importance_cap=CAP)


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
    step: UpdatePrograms
    forward: Any
    head: Any
    update_teacher: Any
    layout: BatchLayout


def programs(name, mesh=(1, 1, 1), alpha=ALPHA, **layout):
    """All layouts share the programs of a mesh, as jit caches them by shape."""
    run = compiled(name, mesh, alpha)
    return run._replace(layout=run.layout._replace(**layout))


@cache
def compiled(name, mesh, alpha):
    config = default_config(
        objective=OBJECTIVES[name],
        rollout=RolloutConfig(temperature=TEMPERATURE),
        data=DataConfig(max_tokens=64, rows_per_step=6),
        optimizer=OPTIMIZER,
    )
    devices, teacher = tiny.make_devices(*mesh), make_teacher(config)
    optimizer = make_optimizer(config.optimizer, 100)
    shardings = state_shardings(MODEL, devices, optimizer, teacher, full())
    per_token = sdpo(alpha) if name == "sdpo" else PER_TOKEN[name]
    step = make_update_programs(MODEL, per_token, METRICS[name], optimizer, full())
    jit = partial(devices.jit, compiler_options=tiny.QUICK)
    whole: Any = devices.replicated
    sums = Sums(shardings.params, dict.fromkeys(METRICS[name], whole), whole, whole)
    return Programs(
        config=config,
        devices=devices,
        optimizer=optimizer,
        teacher=teacher,
        shardings=shardings,
        step=UpdatePrograms(
            jit(step.gradient, out_shardings=sums),
            jit(step.start, out_shardings=sums),
            jit(step.accumulate, out_shardings=sums),
            jit(step.finish, out_shardings=(shardings, whole)),
        ),
        forward=jit(partial(forward, MODEL), out_shardings=devices.rows),
        head=jit(MODEL.head, out_shardings=whole),
        update_teacher=jit(partial(update_teacher, teacher, full()), out_shardings=shardings)
        if teacher
        else None,
        layout=BatchLayout(
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
def rollouts():
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


def engine_of(run, prompts=None):
    """The run's engine, with the forward passes that the run has compiled."""
    config = run.config
    prompts = prompts or TeacherPrompts(config.teacher, TOKENIZER)
    contexts = SiblingContexts(config.teacher)
    engine = Engine(config, MODEL, run.devices, run.layout, TOKENIZER, prompts, contexts)
    engine.forward, engine.head = run.forward, run.head
    return engine


def teacher_prompts(run):
    """What the teacher of each rollout of the fixed batch reads; None: nothing."""
    engine, data = engine_of(run), rollouts()
    contexts = engine.teacher_contexts(data, 0)
    return engine.teacher_prompts.of_rollouts(data.prompts, data.group, contexts)


def updates_of(name, run, *, teacher=None, prompts=None, reduction: Reduction = "token_mean"):
    """Updates of the fixed rollouts (or, for sft, of the fixed demonstrations), and metrics."""
    objective = make_objective(replace(OBJECTIVES[name], reduction=reduction))
    engine, data = engine_of(run, prompts), rollouts()
    if name == "sft":
        data, _ = Demonstrations(run.config, demonstrations(), TOKENIZER)(None, 1, PhaseTimer())
    teacher = teacher_weights() if teacher is None else teacher
    models = Models(None, jax.device_put(teacher, run.shardings.params), None)
    return objective.make_updates(engine, data, models, step=0, timer=PhaseTimer())


def the_update(name, run, **given):
    """The one update of `updates_of`."""
    updates, _ = updates_of(name, run, **given)
    assert len(updates) == 1
    return updates[0]


def by_hand(run, mini_batch, inputs: Any, shared: Any, **given):
    """An update of given pairs; `inputs(packed, place)` are those of the objective."""
    engine = engine_of(run)
    tokens = [inputs(x, partial(engine.place, packed=x)) for x in mini_batch.micro_batches]
    return engine.update(mini_batch, tokens, shared, timer=PhaseTimer(), **given)


def real_tokens(sequences: Sequences):
    """How many tokens a pass computes, padding aside."""
    if not isinstance(sequences.attention, Blocks):
        return int((np.asarray(sequences.attention) > 0).sum())
    table, filled = (np.asarray(x) for x in sequences.attention)
    return sum(int(rows[:n, 1].sum()) for rows, n in zip(table, filled, strict=True))


def fresh_state(run, params=None):
    make = state_maker(run.optimizer, run.teacher, run.shardings, full())
    return make(student() if params is None else params, 0)


def apply(run, update, state=None):
    return run_update(run.step, state or fresh_state(run), update)


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


def demonstrations():
    random = np.random.default_rng(1)
    made = []
    for i, size in enumerate((3, 30, 9, 17, 1, 12)):
        text = bytes(random.integers(97, 123, size=size).tolist()).decode()
        made.append(Demonstration(str(i), ({"role": "user", "content": text[::2]},), text))
    return made
