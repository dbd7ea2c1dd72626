"""Restores the state of a run, or its student alone, from a checkpoint."""

from pathlib import Path

import jax

from sdpo_jax.devices import Devices, make_mesh
from sdpo_jax.errors import UserError
from sdpo_jax.model import Model, Params
from sdpo_jax.run.checkpoint import Checkpoints, Restored
from sdpo_jax.run.run_ref import RunRef
from sdpo_jax.training.lora import refuse_another_base
from sdpo_jax.training.state import from_saved, make_parameters, to_saved
from sdpo_jax.training.trainer import LoadParams, Trainer


def restore(
    trainer: Trainer, checkpoints: Checkpoints, load_params: LoadParams, step: int | None = None
) -> Restored | None:
    """The run's last intact checkpoint, or that of `step`; None if nothing was ever saved.

    The initial weights are loaded only where adapters need them as their base.

    Raises:
      UserError: no checkpoint is intact, or adapters and base do not belong together.
    """
    restored = checkpoints.restore(to_saved(trainer.abstract_state()), step)
    if restored is None:
        return None
    restored = restored._replace(state=from_saved(restored.state))
    if trainer.config.lora.rank == 0:
        return restored
    find_base = jax.jit(trainer.parameters.base, out_shardings=trainer.shardings.base)
    base = find_base(load_params())
    refuse_another_base(base, restored.extra["base"], trainer.config.model.path)
    return restored._replace(state=restored.state.replace(base=base))


def restore_run(trainer: Trainer, run: RunRef, load_params: LoadParams) -> Restored:
    """The checkpoint that `run` names.

    Raises:
      UserError: as `restore`; or the run has no checkpoint yet.
    """
    with Checkpoints(run.folder / "checkpoints") as checkpoints:
        return _require(run.folder, restore(trainer, checkpoints, load_params, run.step))


def restore_student(run: RunRef, model: Model, load_params: LoadParams) -> tuple[int, Params]:
    """Step and weights of a run's student; reads neither optimizer nor teacher.

    Args:
      run: the run, and which of its checkpoints.
      model: the run's model.
      load_params: loads the initial weights; called only where adapters need their base.

    Raises:
      UserError: the run has no such checkpoint, or adapters and base do not belong together.
    """
    config = run.config
    parameters, devices = make_parameters(config), Devices(make_mesh(config.mesh))
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    trained = jax.eval_shape(parameters.trainable, shapes, jax.random.key(0))
    template = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        trained,
        devices.parameter_shardings(parameters.logical_axes(model.logical_axes), trained),
    )
    with Checkpoints(run.folder / "checkpoints") as checkpoints:
        restored = _require(run.folder, checkpoints.restore(template, run.step, part="params"))
    if config.lora.rank == 0:
        return restored.step, restored.state
    base = load_params()
    refuse_another_base(base, restored.extra["base"], config.model.path)
    return restored.step, jax.jit(parameters.merged)(base, restored.state)


def _require(run_dir: Path, restored: Restored | None) -> Restored:
    if restored is None:
        raise UserError(
            f"{run_dir} has no checkpoint yet; expected at least one (checkpoint.every_steps)"
        )
    return restored
