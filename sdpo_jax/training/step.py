"""One update, compiled: the algorithm on arrays.

    teacher_forward   h_t = the teacher's hidden states at the student's tokens, after the re-prompt
    train_step        student forward, chunked head (divergence and gradient), one AdamW update
    follow            the teacher moves towards the student, once per generation batch

Rows come in micro-batches `[A, R, ...]` of which the first `filled` hold rows; `filled` is traced,
so one program serves every number of rows and pays only for those that are there. Loss and metrics
are sums with weights, divided once: the result does not depend on how rows were cut into
micro-batches, nor on the mesh.

Departures from the paper: none in the objective. The old log-probs are the sampler's own; the
sampler and the trainer run the same model code on the same weights, so the paper's correction
between two engines has nothing to correct.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sdpo_jax.losses.chunked_head import PerTokenLoss, chunked_head
from sdpo_jax.model import Model, Params
from sdpo_jax.teacher.weights import Teacher
from sdpo_jax.training.parameters import Parameters
from sdpo_jax.training.state import TrainState


class Rows(NamedTuple):
    """Sequences in micro-batches, and where their response tokens are predicted."""

    tokens: jax.Array  # [A, R, S] int32
    positions: jax.Array  # [A, R, S] int32
    segments: jax.Array  # [A, R, S] int32, 0 is padding
    take: jax.Array  # [A, R, T] int32, column whose hidden state predicts response token t
    filled: jax.Array  # [] int32, micro-batches that hold rows


class Batch(NamedTuple):
    """What one update learns from."""

    rows: Rows
    weights: jax.Array  # [A, R, T] float32, 0 where there is no token
    tokens: Any  # a NamedTuple of sdpo_jax.losses.objectives with leading [A, R, T]
    denominator: jax.Array  # [] float32, of the reduction, over the whole batch


class Metrics(NamedTuple):
    """Sums over active tokens with their number, and scalars of the update."""

    sums: dict[str, jax.Array]
    tokens: jax.Array  # [] float32, active tokens
    loss: jax.Array  # [] float32
    grad_norm: jax.Array  # [] float32, before clipping
    finite: jax.Array  # [] bool, False where the update was skipped
    skipped: jax.Array  # [] int32, consecutive skipped updates


def _at_responses(model: Model, params: Params, rows: Rows, index: jax.Array) -> jax.Array:
    """Hidden states `[R, T, D]` that predict the response tokens of micro-batch `index`."""
    tokens, positions, segments, take = (x[index] for x in rows[:4])
    hidden = model.hidden(params, tokens, positions, segments)
    return jnp.take_along_axis(hidden, take[..., None], axis=1)


def teacher_forward(model: Model, params: Params, rows: Rows) -> tuple[jax.Array, jax.Array]:
    """The teacher's hidden states at the student's tokens `[A, R, T, D]`, and its head `[D, V]`.

    Forward only, no logits: they are made a chunk at a time inside the loss. Run once per
    generation batch, however many updates follow.
    """
    params = jax.lax.stop_gradient(params)
    shape = jax.eval_shape(partial(_at_responses, model), params, rows, jnp.zeros((), jnp.int32))
    out = jnp.zeros((rows.tokens.shape[0], *shape.shape), shape.dtype)

    def one(index: jax.Array, out: jax.Array) -> jax.Array:
        return out.at[index].set(_at_responses(model, params, rows, index))

    return jax.lax.fori_loop(0, rows.filled, one, out), model.head(params)


def make_train_step(
    model: Model,
    per_token_loss: PerTokenLoss,
    optimizer: optax.GradientTransformation,
    parameters: Parameters,
    *,
    head_chunk_tokens: int,
) -> Callable[[TrainState, Batch, Any], tuple[TrainState, Metrics]]:
    """Returns `train_step(state, batch, constants) -> (state, metrics)`, see `chunked_head`."""

    def loss_of(
        trained: Params, base: Params, batch: Batch, constants: Any, index: jax.Array
    ) -> Any:
        params = parameters.forward(base, trained)
        hidden = _at_responses(model, params, batch.rows, index)
        flat = partial(jax.tree.map, lambda x: x.reshape(-1, *x.shape[2:]))
        tokens, weights = jax.tree.map(lambda x: x[index], (batch.tokens, batch.weights))
        total, metrics = chunked_head(
            per_token_loss,
            flat(hidden),
            model.head(params),
            flat(tokens),
            flat(weights),
            chunk=head_chunk_tokens,
            constants=constants,
        )
        active = flat(weights) > 0
        sums = {k: jnp.sum(jnp.where(active, v, 0.0)) for k, v in metrics.items()}
        return total, (sums, jnp.sum(active.astype(jnp.float32)))

    def train_step(state: TrainState, batch: Batch, constants: Any) -> tuple[TrainState, Metrics]:
        gradient_of = jax.value_and_grad(loss_of, has_aux=True)
        first = jnp.zeros((), jnp.int32)
        arguments = state.params, state.base, batch, constants
        shapes = jax.eval_shape(gradient_of, *arguments, first)
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

        def accumulate(index: jax.Array, sums: Any) -> Any:
            return jax.tree.map(jnp.add, sums, gradient_of(*arguments, index))

        (total, (sums, tokens)), gradient = jax.lax.fori_loop(
            0, batch.rows.filled, accumulate, zeros
        )
        denominator = jnp.maximum(batch.denominator, 1.0)
        gradient = jax.tree.map(lambda g: g / denominator, gradient)
        state, norm, finite = _update(optimizer, state, gradient, total)
        return state, Metrics(sums, tokens, total / denominator, norm, finite, state.skipped)

    return train_step


def _update(
    optimizer: optax.GradientTransformation, state: TrainState, gradient: Params, total: jax.Array
) -> tuple[TrainState, jax.Array, jax.Array]:
    """Applies a finite gradient; skips any other and counts it."""
    norm = optax.tree.norm(gradient)
    finite = jnp.isfinite(norm) & jnp.isfinite(total)
    with jax.numpy_dtype_promotion("standard"):  # optax raises a float to an int32 count
        updates, optimizer_state = optimizer.update(gradient, state.optimizer, state.params)
    params = optax.apply_updates(state.params, updates)

    def keep(new: Any, old: Any) -> Any:
        return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)

    skipped = jnp.where(finite, 0, state.skipped + 1)
    state = state.replace(
        params=keep(params, state.params),
        optimizer=keep(optimizer_state, state.optimizer),
        skipped=skipped,
    )
    return state, norm, finite


def follow(
    teacher: Teacher, parameters: Parameters, state: TrainState, any_finite: jax.Array
) -> TrainState:
    """Moves the teacher once; not after a batch in which no update was finite."""
    moved = teacher.update(state.teacher, parameters.merged(state.base, state.params))
    kept = jax.tree.map(lambda new, old: jnp.where(any_finite, new, old), moved, state.teacher)
    return state.replace(teacher=kept)
