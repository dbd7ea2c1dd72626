"""Checkpoints that are complete or absent, and verified before they are restored.

Orbax writes the arrays in the background and commits a step by renaming its directory. That alone
is not enough: Orbax restores flipped bits and other dtypes silently, and takes any directory whose
name is a number for a step. Here a step counts only with a manifest, which is written last: shape
and dtype of every array, size and BLAKE2b hash of every file.

    N/                          a step: `state` (arrays), `extra` (JSON), `sdpo_manifest.json`
    N.corrupt/                  a step whose files disagree with its manifest, renamed on restore
    N.incomplete/               a directory without a manifest, renamed when step N was saved
    *.orbax-checkpoint-tmp*/    left by a killed save; the next save removes it

Every process of a run calls every method. Process 0 alone writes manifests, verifies and deletes;
the others follow its decision. All of them must see the directory's file system.
"""

# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false

import contextlib
import itertools
import os
import shutil
import sys
import threading
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from sdpo_jax.distributed import is_leader, of_leader
from sdpo_jax.errors import UserError
from sdpo_jax.run import manifest

_NOTHING_SAVED, _ALL_DAMAGED, _NOT_INTACT = -1, -2, -3  # answers of process 0 in place of a step
_DISK_ERRORS = (
    "No space left",
    "File too large",
    "quota exceeded",
    "Permission denied",
    "Read-only file system",
)


class Restored(NamedTuple):
    """A restored step; the state has the template's shapes, dtypes and shardings."""

    step: int
    state: Any
    extra: dict[str, Any]


class Checkpoints(contextlib.AbstractContextManager["Checkpoints"]):
    """The checkpoints of one run directory.

    with Checkpoints("runs/x/checkpoints", keep=2) as checkpoints:
        restored = checkpoints.restore(state)
        ...
        checkpoints.save(step, state, {"seed": 0})
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        keep: int = 2,
        warn: Callable[[str], None] | None = None,
    ):
        """Opens a directory; changes nothing in it before the first `save` or `restore`.

        Args:
            directory: created if it does not exist.
            keep: complete steps to keep, at least 1; older ones are deleted after a newer save.
            warn: called with a line about damaged or unfinished steps; by default it is printed
                on standard error.
        """
        if "://" in str(directory):
            raise UserError(
                f"checkpoint directory {directory}: expected a path on a mounted file system: a "
                "step is committed by renaming. Mount the bucket and give the mount's path."
            )
        if keep < 1:
            raise UserError(f"checkpoint.keep = {keep}: expected at least 1.")
        self._directory = Path(directory).absolute()
        self._keep = keep
        self._warn = warn if warn is not None else _print_to_stderr
        self._manager: Any = None  # an ocp.CheckpointManager, made at the first save or restore
        self._completion: threading.Thread | None = None
        self._saving: int | None = None
        self._error: BaseException | None = None

    def __exit__(self, *_: object) -> None:
        self.close()

    def steps(self) -> list[int]:
        """Complete steps, ascending; their files are verified by `restore` alone."""
        return manifest.complete(self._directory)

    def save(
        self, step: int, state: Any, extra: Mapping[str, Any], *, also: int | None = None
    ) -> None:
        """Copies the state to the host and writes it in the background.

        Returns when the arrays may be donated. Raises the error of the previous save, if any. A
        step that is already complete is not written again: its number determines its state.

        Args:
            step: its number, 0 or more.
            state: a pytree of `jax.Array`.
            extra: JSON-serialisable; tuples come back as lists.
            also: a step to keep beside the last ones, however old.
        """
        self.finish()
        if of_leader(step if step in self.steps() else -1) == step:
            return
        if is_leader():
            self._make_room(step)
        multihost_utils.sync_global_devices("sdpo_checkpoint_room")
        manager = self._open()
        arrays = _describe(state)
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state),  # pyright: ignore[reportCallIssue]
            extra=ocp.args.JsonSave(dict(extra)),  # pyright: ignore[reportCallIssue]
        )
        self._saving = step
        try:
            manager.save(step, args=items, force=True)  # else it refuses steps before a stray 99/
        except Exception as error:
            self._raise_failed_save(error)
        self._completion = threading.Thread(
            target=self._complete, args=(step, arrays, also), name=f"checkpoint-{step}"
        )
        self._completion.start()

    def finish(self) -> None:
        """Waits until the last save is complete and raises its error, if any."""
        if self._completion is not None:
            self._completion.join()
            self._completion = None
        error, self._error = self._error, None
        if error is not None:
            self._raise_failed_save(error)
        self._saving = None

    def poll(self) -> None:
        """Raises the error of a save that has failed by now; never waits."""
        if self._completion is not None and not self._completion.is_alive():
            self.finish()

    def close(self) -> None:
        """Finishes the last save and releases Orbax's threads."""
        self.finish()
        if self._manager is not None:
            self._manager.close()
            self._manager = None

    def restore(
        self, template: Any, step: int | None = None, *, part: str | None = None
    ) -> Restored | None:
        """Restores the latest intact step; None if no step was ever completed.

        A damaged step is reported and renamed to `N.corrupt`, and the one before it is tried;
        unless `step` is given.

        Args:
            template: a pytree like the saved one, of `jax.Array` or `jax.ShapeDtypeStruct` with a
                sharding; it determines structure, shapes, dtypes and shardings.
            step: restores this step or raises.
            part: one field of the state, such as `params`; `template` and `Restored.state` are
                those of the field, and nothing else is read into memory.

        Raises:
            UserError: every step is damaged, `step` is damaged or missing, or the template has
                other arrays than the checkpoint.
        """
        step = self._find(step)
        if step is None:
            return None
        folder, wanted = self._folder(step), jax.tree.map(_abstract, template)
        saved = manifest.read(folder)["arrays"]
        if part is not None:
            wanted = {part: wanted}
            saved = {name: array for name, array in saved.items() if name.startswith(f"{part}.")}
        _refuse_other_arrays(saved, _describe(wanted), folder)
        items = ocp.args.PyTreeRestore(  # pyright: ignore[reportCallIssue]
            item=wanted,
            restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
            partial_restore=part is not None,
        )
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            state = reader.restore(folder / "state", args=items)
        rest = self._open().restore(step, args=ocp.args.Composite(extra=ocp.args.JsonRestore()))
        return Restored(step, state if part is None else state[part], dict(rest["extra"]))

    def _find(self, wanted: int | None) -> int | None:
        """The step to restore, equal on every process; None if no step was ever completed."""
        self.finish()
        search = self._newest_intact if wanted is None else partial(self._intact, wanted)
        step = of_leader(search() if is_leader() else _NOTHING_SAVED)
        if step == _NOT_INTACT:
            raise UserError(
                f"{self._directory}: step {wanted} is damaged or not there. Expected another one: "
                f"{[step for step in self.steps() if step != wanted] or 'there is none'}. Move a "
                "damaged one away, and RUN@best is the best of the others."
            )
        if step == _ALL_DAMAGED:
            raise UserError(
                f"{self._directory}: no intact checkpoint is left; the damaged ones are kept as "
                "N.corrupt. Restore the directory from a copy, or delete it to start from scratch."
            )
        return None if step == _NOTHING_SAVED else step

    def _open(self) -> Any:
        """Orbax's manager, as of what is in the directory now."""
        if self._manager is None:
            self._directory.mkdir(parents=True, exist_ok=True)
            options = ocp.CheckpointManagerOptions(
                max_to_keep=None,  # Orbax would drop the old step before the new manifest exists
                enable_async_checkpointing=True,
            )
            self._manager = ocp.CheckpointManager(
                self._directory, options=options, item_names=("state", "extra")
            )
        self._manager.reload()
        return self._manager

    def _folder(self, step: int) -> Path:
        return self._directory / str(step)

    def _make_room(self, step: int) -> None:
        """Removes the remains of killed saves and renames an unfinished directory of this step."""
        for pattern in ("*.orbax-checkpoint-tmp*", "*.deleted"):
            for path in self._directory.glob(pattern):
                shutil.rmtree(path, ignore_errors=True)
        if self._folder(step).exists():
            aside = self._directory / f"{step}.incomplete"
            shutil.rmtree(aside, ignore_errors=True)
            self._folder(step).rename(aside)

    def _complete(self, step: int, arrays: dict[str, Any], also: int | None) -> None:
        """Background: waits for Orbax's commit, writes the manifest, drops old steps."""
        try:
            self._manager.wait_until_finished()
            if is_leader():
                manifest.write(self._folder(step), step, arrays)
                self._drop_old(also)
        except BaseException as error:
            self._error = error

    def _drop_old(self, also: int | None) -> None:
        for step in self.steps()[: -self._keep]:
            if step == also:
                continue
            doomed = self._directory / f"{step}.deleted"
            shutil.rmtree(doomed, ignore_errors=True)
            self._folder(step).rename(doomed)  # first, so that no half step is visible
            shutil.rmtree(doomed, ignore_errors=True)

    def _raise_failed_save(self, error: BaseException) -> None:
        """Raises with the number of the step; a full or read-only disk is a `UserError`."""
        step, manager, said = self._saving, self._manager, str(error)
        self._saving = self._manager = None
        with contextlib.suppress(Exception):  # the manager would raise its error again
            manager.close()
        if isinstance(error, OSError) or any(reason in said for reason in _DISK_ERRORS):
            raise UserError(
                f"{self._directory}: step {step} was not saved ({said.splitlines()[0]}). Earlier "
                f"complete steps: {self.steps() or 'none'}. Free space or mend permissions, resume."
            ) from error
        raise error

    def _intact(self, step: int) -> int:
        """The step, if its files agree with its manifest; renames nothing."""
        try:
            manifest.verify(self._folder(step))
        except manifest.Damaged as error:
            self._warn(f"checkpoint {self._folder(step)}: {error}")
            return _NOT_INTACT
        return step

    def _newest_intact(self) -> int:
        damaged = any(self._directory.glob("*.corrupt*"))
        for step in reversed(manifest.numbered(self._directory)):
            path = self._folder(step)
            if not (path / manifest.MANIFEST).exists():
                self._warn(f"checkpoint {path}: no manifest, never completed; skipped")
                continue
            try:
                manifest.verify(path)
            except manifest.Damaged as error:
                damaged = True
                aside = _free_name(self._directory / f"{step}.corrupt")
                path.rename(aside)
                self._warn(
                    f"checkpoint {path}: {error}; moved to {aside.name}, trying an older one"
                )
            else:
                return step
        return _ALL_DAMAGED if damaged else _NOTHING_SAVED


def _print_to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _free_name(path: Path) -> Path:
    """`path`, or `path.2`, `path.3`, ...: the first name that does not exist."""
    others = (path.with_name(f"{path.name}.{number}") for number in itertools.count(2))
    return next(name for name in itertools.chain([path], others) if not name.exists())


def _describe(tree: Any) -> dict[str, Any]:
    """Maps the name of every array of a pytree to [dtype, shape]."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): [str(leaf.dtype), list(leaf.shape)]
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def _refuse_other_arrays(saved: dict[str, Any], wanted: dict[str, Any], where: Path) -> None:
    """Raises one error with every difference; Orbax would cast dtypes silently."""
    differences = [f"{name}: saved, but not part of this run" for name in saved.keys() - wanted]
    differences += [f"{name}: not in the checkpoint" for name in wanted.keys() - saved]
    differences += [
        f"{name}: saved as {_spell(saved[name])}, this run has {_spell(wanted[name])}"
        for name in saved.keys() & wanted
        if saved[name] != wanted[name]
    ]
    if differences:
        shown = "\n  ".join(sorted(differences)[:20])
        raise UserError(
            f"checkpoint {where} holds other arrays than this run ({len(differences)} differ):\n  "
            + shown
            + "\nResume with the model and optimizer it was saved with, or use another run_dir."
        )


def _spell(array: list[Any]) -> str:
    dtype, shape = array
    return f"{dtype}[{', '.join(map(str, shape))}]"
