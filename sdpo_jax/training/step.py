"""One optimizer update, compiled: the algorithm on arrays.

    forward           hidden states at the response tokens, without a gradient (the teacher's)
    gradient          student forward, fused head (loss and gradient) of a micro-batch;
                      `accumulate` adds it to those before
    finish            one optimizer update with what has been accumulated
    update_teacher    the teacher moves towards the student, once per generation batch

Tokens of a micro-batch lie in rows `[B, S]` (`sdpo_jax.data.packing`); response tokens in
`[D, n, c]`: shards of the rows, chunks of the head, tokens of a chunk. The first `chunks` of the
`n` chunks are filled; that number is traced, so the head is paid for the tokens that are there.
Loss and metrics are sums with weights, divided once: the result does not depend on how rows were
cut into micro-batches, nor on the mesh.

Departures from the paper: none in the objective. The old log-probs are the sampler's own; the
sampler and the trainer run the same model code on the same weights, so the paper's correction
between two engines has nothing to correct.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P

from sdpo_jax.devices import ROWS
from sdpo_jax.losses.fused_linear import PerTokenLoss, fused_linear_loss
from sdpo_jax.model import Blocks, Model, Params
from sdpo_jax.teacher.weights import Teacher
from sdpo_jax.training.lora import Parameters
from sdpo_jax.training.state import TrainState
from sdpo_jax.training.token_metrics import Tokens, add_up, condense, zeros


class Sequences(NamedTuple):
    """The tokens of a pass, and where those of the responses are predicted."""

    tokens: jax.Array  # [B, S] int32
    positions: jax.Array  # [B, S] int32
    attention: jax.Array | Blocks  # segments [B, S] int32, 0 is padding; or shared prompts
    target_positions: jax.Array  # [D, n, c] int32, place in the shard's rows, one after the other


class MicroBatch(NamedTuple):
    """What one pass forward and backward learns from."""

    sequences: Sequences
    targets: jax.Array  # [D, n, c] int32, the response tokens
    weights: jax.Array  # [D, n, c] float32, 0 where there is no token
    inputs: Any  # the loss's inputs for each token, a NamedTuple of arrays that lead with [D, n, c]
    chunks: jax.Array  # [] int32, how many of the n hold tokens
    outcomes: jax.Array | None = None
    """[D, n, c] int32, the number of a token's rollout in its shard, from 1 on; negative where the
    rollout failed, 0 where there is no rollout or none that is distilled. For metrics alone."""


class Update(NamedTuple):
    """What one optimiser update learns from."""

    micro_batches: list[MicroBatch]
    denominator: jax.Array  # [] float32, of the reduction, over all micro-batches
    shared: Any  # the loss's inputs that all tokens share
    token_count: int
    """Tokens of prompts and responses, without padding."""


class Sums(NamedTuple):
    """Sums over the tokens of micro-batches."""

    gradient: Params
    metrics: dict[str, jax.Array]  # over active tokens, [] but for those of `token_sums`
    tokens: jax.Array  # [] float32, active tokens
    loss: jax.Array  # [] float32


class Metrics(NamedTuple):
    """Sums over active tokens with their number, and scalars of the update."""

    sums: dict[str, jax.Array]
    tokens: jax.Array  # [] float32, active tokens
    loss: jax.Array  # [] float32
    grad_norm: jax.Array  # [] float32, before clipping
    finite: jax.Array  # [] bool, False where the update was skipped
    skipped: jax.Array  # [] int32, consecutive skipped updates


def hidden_at_targets(model: Model, params: Params, sequences: Sequences) -> jax.Array:
    """Hidden states `[D, n, c, width]` that predict the response tokens."""
    tokens, positions, attention, targets = sequences
    places = targets.reshape(targets.shape[0], -1)
    hidden = model.hidden(params, tokens, positions, attention, target_positions=places)
    return hidden.reshape(*targets.shape, -1)


HeadLoss: TypeAlias = Callable[..., tuple[jax.Array, Any]]
"""`fused_linear_loss`, or a function with its arguments: sums the losses of tokens."""


def head_on_shards(
    head_loss: HeadLoss, rows: Any, head: jax.Array, replicated: Any
) -> tuple[jax.Array, Any]:
    """`head_loss` on each shard of the rows alone, with the head `[D, V]` gathered once.

    Left to XLA, every chunk would gather the head anew, twice, and sum its gradient over the
    shards. `rows` are its hidden states, inputs and weights; `replicated` the shared inputs and the
    number of filled chunks.
    """

    def local(rows: Any, head: jax.Array, replicated: Any) -> tuple[jax.Array, Any]:
        (hidden, aux, weights), (constants, filled) = rows, replicated
        return head_loss(hidden, head, aux, weights, constants=constants, filled=filled)

    def on_shard(*arguments: Any) -> tuple[jax.Array, Any]:
        total, metrics = local(*arguments)
        return jax.lax.psum(total, ("data", "fsdp")), metrics

    mesh = jax.sharding.get_abstract_mesh()
    if not {"data", "fsdp"} <= set(mesh.axis_names) - set(mesh.manual_axes):
        return local(rows, head, replicated)
    return jax.shard_map(
        on_shard, in_specs=(ROWS, P(), P()), out_specs=(P(), ROWS), axis_names={"data", "fsdp"}
    )(rows, jax.lax.with_sharding_constraint(head, P(None, "tensor")), replicated)


def token_values(
    loss: PerTokenLoss, hidden: jax.Array, head: jax.Array, inputs: Any, shared: Any, chunks: Any
) -> dict[str, jax.Array]:
    """Metrics of a loss at every response token, `[D, n, c]` each, without a gradient.

    A chunk of the head at a time; 0 beyond the filled chunks.
    """
    shape = hidden.shape[:3]
    flat = partial(jax.tree.map, lambda x: x.reshape(-1, *x.shape[3:]))
    weights = jnp.zeros(math.prod(shape), jnp.float32)
    _, metrics = head_on_shards(
        partial(fused_linear_loss, loss, chunk=shape[2], block=shape[2]),
        (flat(hidden), flat(inputs), weights),
        head,
        (shared, chunks),
    )
    return {name: x.reshape(shape) for name, x in metrics.items()}


def forward(model: Model, params: Params, sequences: Sequences) -> jax.Array:
    """Hidden states at the response tokens, `[D, n, c, width]`, without a gradient.

    No logits: they are made a chunk at a time inside the loss. The teacher's forward runs once per
    generation batch, however many updates follow.
    """
    return jax.lax.stop_gradient(hidden_at_targets(model, params, sequences))


class UpdatePrograms(NamedTuple):
    """The compiled programs of an update; `run_update` calls them."""

    gradient: Callable[[Params, Params, MicroBatch, Any], Sums]
    """`gradient(params, base, micro_batch, shared) -> sums` of the only micro-batch."""
    start: Callable[[Params], Sums]
    """`start(params) -> sums` of zeros."""
    accumulate: Callable[[Sums, Params, Params, MicroBatch, Any], Sums]
    """`accumulate(sums (donated), params, base, micro_batch, shared) -> sums`."""
    finish: Callable[[TrainState, Sums, jax.Array], tuple[TrainState, Metrics]]
    """`finish(state (donated), sums (donated), denominator) -> (state, metrics)`."""


def run_update(
    programs: UpdatePrograms, state: TrainState, update: Update
) -> tuple[TrainState, Metrics]:
    """One update: the gradient of all micro-batches, then the optimiser. `state` is used up."""
    params, shared = (state.params, state.base), update.shared
    if len(update.micro_batches) == 1:  # spares two passes over an array the size of the weights
        sums = programs.gradient(*params, update.micro_batches[0], shared)
        return programs.finish(state, sums, update.denominator)
    sums = programs.start(state.params)
    for micro_batch in update.micro_batches:
        sums = programs.accumulate(sums, *params, micro_batch, shared)
    return programs.finish(state, sums, update.denominator)


def make_update_programs(
    model: Model,
    per_token_loss: PerTokenLoss,
    metric_names: Sequence[str],
    optimizer: optax.GradientTransformation,
    parameters: Parameters,
    *,
    head_loss: HeadLoss = fused_linear_loss,
) -> UpdatePrograms:
    """The functions of an update, not yet compiled; see `fused_linear_loss` for the loss."""

    def loss_of(
        trained: Params, base: Params, micro_batch: MicroBatch, shared: Any
    ) -> tuple[jax.Array, Any]:
        params = parameters.forward(base, trained)
        hidden = hidden_at_targets(model, params, micro_batch.sequences)
        piece = micro_batch.weights.shape[2]
        flat = partial(jax.tree.map, lambda x: x.reshape(-1, *x.shape[3:]))
        weights = flat(micro_batch.weights)
        total, metrics = head_on_shards(
            partial(head_loss, per_token_loss, chunk=piece, block=piece),
            (flat(hidden), flat(micro_batch.inputs), weights),
            model.head(params),
            (shared, micro_batch.chunks),
        )
        active, metrics = weights > 0, jax.lax.stop_gradient(metrics)
        targets = flat(micro_batch.targets)
        tokens = Tokens(metrics, active, targets, micro_batch.outcomes, model.vocabulary)
        sums = add_up(metric_names, tokens)
        return total, (sums, jnp.sum(active.astype(jnp.float32)))

    def start(trained: Params) -> Sums:
        zero = jnp.zeros((), jnp.float32)
        metrics = zeros(metric_names, model.vocabulary)
        return Sums(jax.tree.map(jnp.zeros_like, trained), metrics, zero, zero)

    def gradient(trained: Params, base: Params, micro_batch: MicroBatch, shared: Any) -> Sums:
        gradient_of = jax.value_and_grad(loss_of, has_aux=True)
        (loss, (metrics, tokens)), found = gradient_of(trained, base, micro_batch, shared)
        return Sums(found, metrics, tokens, loss)

    def accumulate(
        sums: Sums, trained: Params, base: Params, micro_batch: MicroBatch, shared: Any
    ) -> Sums:
        return jax.tree.map(jnp.add, sums, gradient(trained, base, micro_batch, shared))

    def finish(state: TrainState, sums: Sums, denominator: jax.Array) -> Any:
        denominator = jnp.maximum(denominator, 1.0)
        mean = jax.tree.map(lambda g: g / denominator, sums.gradient)
        state, norm, finite = _update(optimizer, state, mean, sums.loss)
        loss = sums.loss / denominator
        return state, Metrics(
            condense(sums.metrics), sums.tokens, loss, norm, finite, state.skipped
        )

    return UpdatePrograms(gradient, start, accumulate, finish)


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


def update_teacher(
    teacher: Teacher, parameters: Parameters, state: TrainState, any_finite: jax.Array
) -> TrainState:
    """Moves the teacher once; not after a batch in which no update was finite."""
    moved = teacher.update(state.teacher, parameters.merged(state.base, state.params))
    kept = jax.tree.map(lambda new, old: jnp.where(any_finite, new, old), moved, state.teacher)
    return state.replace(teacher=kept)
