"""What a run carries from step to step, and the optimiser that moves it."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from sdpo_jax.config import Config, OptimizerConfig, SdpoObjective
from sdpo_jax.devices import Devices
from sdpo_jax.model import Model, Params
from sdpo_jax.teacher.weights import Teacher, ema, frozen, live


class TrainState(struct.PyTreeNode):
    """Everything that a checkpoint must hold of the arrays."""

    params: Params  # float32 master weights
    optimizer: Any  # optax state, float32
    teacher: Params  # float32 copy for `ema` and `frozen`; None for `live` and without a teacher
    skipped: Any  # [] int32, consecutive updates that were not finite


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
    """The teacher's weights as the recipe wants them; None for objectives without a teacher."""
    if not isinstance(config.objective, SdpoObjective):
        return None
    kinds = {"ema": ema(config.teacher.ema_rate), "frozen": frozen(), "live": live()}
    return kinds[config.teacher.weights]


def state_shardings(
    model: Model, devices: Devices, optimizer: optax.GradientTransformation, teacher: Teacher | None
) -> TrainState:
    """A `NamedSharding` for every array of the state; moments lie like their parameters."""
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    params = devices.parameter_shardings(model.logical_axes, shapes)
    moments = optax.tree_utils.tree_map_params(
        optimizer,
        lambda _, sharding: sharding,
        jax.eval_shape(optimizer.init, shapes),
        params,
        transform_non_params=lambda _: devices.replicated,
    )
    keeps_weights = teacher is not None and jax.eval_shape(teacher.init, shapes) is not None
    return TrainState(params, moments, params if keeps_weights else None, devices.replicated)


def create_state(
    params: Params,
    optimizer: optax.GradientTransformation,
    teacher: Teacher | None,
    shardings: TrainState,
) -> TrainState:
    """The state at step 0, each array where it belongs."""

    def create(params: Params) -> TrainState:
        params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
        return TrainState(
            params,
            optimizer.init(params),
            None if teacher is None else teacher.init(params),
            jnp.zeros((), jnp.int32),
        )

    return jax.jit(create, out_shardings=shardings)(params)
