"""The train state, its optimizer and its placement on the devices."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from sdpo_jax.config import Config, OptimizerConfig
from sdpo_jax.devices import Devices
from sdpo_jax.model import Model, Params
from sdpo_jax.teacher.weights import Teacher, ema, float32_copy, frozen, live, trust_region
from sdpo_jax.training.lora import Parameters, full, lora


class TrainState(struct.PyTreeNode):
    """Everything that a checkpoint must hold of the arrays."""

    params: Params  # what is trained: float32 master weights, or adapters
    optimizer: Any  # optax state, float32
    teacher: Params  # float32 copy for `ema` and `frozen`; None for `live` and without a teacher
    skipped: Any  # [] int32, consecutive updates that were not finite
    base: Params = None  # with adapters: the model's weights, which stay; not in checkpoints
    previous: Params = None  # the teacher before its last refresh, where it may come back
    reference: Params = None  # the initial model, where a KL to it needs a copy of its own


def to_saved(state: TrainState) -> dict[str, Any]:
    """What a checkpoint holds: all but `base`; further copies only where a run keeps them.

    So checkpoints of runs without them stay as they were before there were any.
    """
    kept = {f.name: getattr(state, f.name) for f in dataclasses.fields(state)}
    absent = [name for name in ("previous", "reference") if kept[name] is None]
    return {name: x for name, x in kept.items() if name not in absent} | {"base": None}


def from_saved(saved: Mapping[str, Any]) -> TrainState:
    """Undoes `to_saved`, but for `base`."""
    return TrainState(**saved)


class ExtraWeights(NamedTuple):
    """Which further copies of the model's weights a run keeps, in float32."""

    previous: bool = False
    reference: bool = False


NO_EXTRA_WEIGHTS = ExtraWeights()


def make_parameters(config: Config) -> Parameters:
    """All parameters, or adapters if the recipe gives them a rank."""
    adapters = config.lora
    if adapters.rank == 0:
        return full()
    return lora(adapters.rank, adapters.alpha, adapters.targets)


def make_optimizer(config: OptimizerConfig, total_updates: int) -> optax.GradientTransformation:
    """AdamW behind a global-norm clip, with linear warm-up and a constant or cosine rate.

    The schedule counts optimiser updates. The first update already moves: its rate is 1 / warm-up
    of the full one, not zero.
    """

    def rate(count: Any) -> jax.Array:
        done = jnp.asarray(count, jnp.float32)
        warm = jnp.minimum(1.0, (done + 1) / max(1, config.warmup_steps))
        if config.schedule == "constant":
            return config.learning_rate * warm
        rest = max(1, total_updates - config.warmup_steps)
        progress = jnp.clip((done - config.warmup_steps) / rest, 0.0, 1.0)
        return config.learning_rate * warm * 0.5 * (1.0 + jnp.cos(jnp.pi * progress))

    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(rate, b1=config.b1, b2=config.b2, weight_decay=config.weight_decay),
    )


def make_teacher(config: Config) -> Teacher | None:
    """How the teacher's weights follow the student's; None for objectives without a teacher."""
    if not config.objective.has_teacher:
        return None
    if base_is_teacher(config):
        return live()
    kinds = {
        "ema": ema(config.teacher.ema_rate),
        "frozen": frozen(),
        "live": live(),
        "trust_region": trust_region(config.teacher.trust_region),
        "refreshed": ema(config.teacher.refresh_fraction),
    }
    return kinds[config.teacher.weights]


def make_extra_weights(config: Config, reference_kl: float) -> ExtraWeights:
    """The previous teacher for a rollback, the initial model for a KL to it.

    A frozen teacher, and the base of adapters, are the initial model already.
    """
    teacher, settings = config.teacher, config.objective
    is_graded = settings.learns_from == "rollouts" and settings.has_teacher
    returns = is_graded and teacher.weights == "refreshed" and teacher.return_drop > 0
    is_there = config.lora.rank > 0 or (
        settings.has_teacher and teacher.weights in ("frozen", "trust_region")
    )
    return ExtraWeights(returns, reference_kl > 0 and not is_there)


def reference_params(config: Config, state: TrainState) -> Params:
    """The initial model's weights, wherever they lie; None where nothing keeps them."""
    if state.reference is not None:
        return state.reference
    if state.base is not None:
        return state.base
    is_initial = config.teacher.weights in ("frozen", "trust_region")
    return state.teacher if is_initial else None


def base_is_teacher(config: Config) -> bool:
    """Adapters start at nothing: a frozen teacher is then the base itself, without a copy."""
    return config.lora.rank > 0 and config.teacher.weights in ("frozen", "trust_region")


def state_shardings(
    model: Model,
    devices: Devices,
    optimizer: optax.GradientTransformation,
    teacher: Teacher | None,
    parameters: Parameters,
    extra: ExtraWeights = NO_EXTRA_WEIGHTS,
) -> TrainState:
    """A `NamedSharding` for every array of the state; moments lie like their parameters."""
    key = jax.random.key(0)
    shapes = jax.eval_shape(model.init, key)
    whole = devices.parameter_shardings(model.logical_axes, shapes)
    trained = jax.eval_shape(parameters.trainable, shapes, key)
    params = devices.parameter_shardings(parameters.logical_axes(model.logical_axes), trained)
    moments = optax.tree_utils.tree_map_params(
        optimizer,
        lambda _, sharding: sharding,
        jax.eval_shape(optimizer.init, trained),
        params,
        transform_non_params=lambda _: devices.replicated,
    )
    keeps_weights = teacher is not None and jax.eval_shape(teacher.init, shapes) is not None
    return TrainState(
        params,
        moments,
        whole if keeps_weights else None,
        devices.replicated,
        base=None if jax.eval_shape(parameters.base, shapes) is None else whole,
        previous=whole if extra.previous else None,
        reference=whole if extra.reference else None,
    )


def state_maker(
    optimizer: optax.GradientTransformation,
    teacher: Teacher | None,
    shardings: TrainState,
    parameters: Parameters,
) -> Callable[[Params, int], TrainState]:
    """`(params, seed) -> state` at step 0, for many starts: compiled once.

    Each array lies where it belongs. `params` stay the caller's.
    """
    create = jax.jit(
        partial(_create, optimizer, teacher, shardings, parameters), out_shardings=shardings
    )
    return lambda params, seed: create(np.uint32(seed), params)


def abstract_state(
    model: Model,
    optimizer: optax.GradientTransformation,
    teacher: Teacher | None,
    shardings: TrainState,
    parameters: Parameters,
) -> TrainState:
    """Shapes, dtypes and shardings of what a checkpoint holds: all but `base`. No array exists."""
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    create = partial(_create, optimizer, teacher, shardings, parameters, np.uint32(0))
    state = jax.eval_shape(create, shapes)

    def place(leaf: Any, sharding: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(place, state.replace(base=None), shardings.replace(base=None))


def _create(
    optimizer: optax.GradientTransformation,
    teacher: Teacher | None,
    shardings: TrainState,
    parameters: Parameters,
    seed: Any,
    params: Params,
) -> TrainState:
    trained = parameters.trainable(params, jax.random.key(seed))
    base = parameters.base(params)
    return TrainState(
        trained,
        optimizer.init(trained),
        None if teacher is None else teacher.init(parameters.merged(base, trained)),
        jnp.zeros((), jnp.int32),
        base,
        None if shardings.previous is None else float32_copy(params),
        None if shardings.reference is None else float32_copy(params),
    )
