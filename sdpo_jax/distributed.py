"""Joins several processes to one run, as environment variables describe it.

    SDPO_COORDINATOR     `host:port` of process 0, or `auto` (TPU VM, GKE, Slurm)
    SDPO_NUM_PROCESSES   number of processes; with `host:port` only
    SDPO_PROCESS_ID      number of this process, from 0; with `host:port` only

Without SDPO_COORDINATOR a pod is recognized by its platform's variables: more than one name in
TPU_WORKER_HOSTNAMES or TPU_PROCESS_ADDRESSES, or more than one slice in MEGASCALE_NUM_SLICES. In an
ssh session on a TPU VM none of these is set; `launch/tpu_vm.sh` sets `auto`.

Call `initialize_from_environment` before the first use of a JAX device.
"""

import os
import sys
from collections.abc import Mapping
from typing import NamedTuple, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils
from numpy.typing import NDArray

from sdpo_jax.errors import UserError

# pyright: reportUnknownMemberType=false

COORDINATOR = "SDPO_COORDINATOR"
NUM_PROCESSES = "SDPO_NUM_PROCESSES"
PROCESS_ID = "SDPO_PROCESS_ID"
_WORKERS = ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES")
_SLICES = "MEGASCALE_NUM_SLICES"


class Cluster(NamedTuple):
    """The arguments of `jax.distributed.initialize`; if all are None, JAX detects the cluster."""

    coordinator: str | None = None  # host:port
    num_processes: int | None = None
    process_id: int | None = None


def cluster_of(environment: Mapping[str, str]) -> Cluster | None:
    """Reads the variables; returns None for a run of one process.

    Raises:
      UserError: a variable is missing or has an impossible value.
    """
    coordinator = environment.get(COORDINATOR, "")
    if coordinator == "auto":
        _refuse(environment, f"{COORDINATOR}=auto asks the cluster")
        return Cluster()
    if coordinator:
        return _explicit(coordinator, environment)
    _refuse(environment, f"{COORDINATOR} is not set")
    workers = max(len(environment.get(name, "").split(",")) for name in _WORKERS)
    slices = _integer(environment, _SLICES, 1) if environment.get(_SLICES) else 1
    return Cluster() if workers > 1 or slices > 1 else None


def initialize_from_environment() -> None:
    """Joins the processes of a run; does nothing in a run of one process.

    Returns when every process has joined. On CPUs they communicate over gloo.

    Raises:
      UserError: see `cluster_of`; or the other processes cannot be found or reached.
    """
    cluster = cluster_of(os.environ)
    if cluster is None:
        return
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(*cluster)
    except (RuntimeError, ValueError) as error:
        where = cluster.coordinator or "the cluster"
        raise UserError(
            f"{COORDINATOR}: cannot join the run at {where}: {error}\nExpected all processes "
            f"within five minutes, each with the same {COORDINATOR} and its own {PROCESS_ID}; "
            f"for a run of one process unset {COORDINATOR}."
        ) from error


def is_leader() -> bool:
    """Whether this process prints and writes the run's files."""
    return jax.process_index() == 0


def any_process(asked: bool) -> bool:
    """Whether `asked` is true on any process; the same answer on all, so that none waits alone."""
    return bool(np.any(multihost_utils.process_allgather(np.asarray(asked))))


def all_processes(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """`[N]`: the logical and of `mask` over all processes, the same on all of them."""
    return np.all(multihost_utils.process_allgather(mask), axis=0)


def of_leader(verdict: int) -> int:
    """The value of the first process, on all processes."""
    return int(multihost_utils.broadcast_one_to_all(np.int32(verdict)))


def leave(code: int) -> NoReturn:
    """Exits; after an error in a run of several processes, without waiting for the others.

    A normal exit waits for the others at a barrier. They do not reach it while they wait for this
    process inside a collective, so the error would appear as a time-out of another process.
    """
    if code and jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _explicit(coordinator: str, environment: Mapping[str, str]) -> Cluster:
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise UserError(
            f"{COORDINATOR}={coordinator}: expected host:port of process 0, as in 10.0.0.2:8476, "
            "or auto"
        )
    count = _integer(environment, NUM_PROCESSES, 1)
    process = _integer(environment, PROCESS_ID, 0)
    if process >= count:
        raise UserError(
            f"{PROCESS_ID}={process}: expected 0 to {count - 1}, because {NUM_PROCESSES}={count}"
        )
    return Cluster(coordinator, count, process)


def _integer(environment: Mapping[str, str], name: str, least: int) -> int:
    text = environment.get(name, "")
    if not text.isdecimal() or int(text) < least:
        given = f"{name}={text}" if name in environment else f"{name} is not set"
        raise UserError(f"{given}: expected a whole number of at least {least}")
    return int(text)


def _refuse(environment: Mapping[str, str], reason: str) -> None:
    """Refuses variables that would be ignored: N processes would train N runs in one folder."""
    for name in (NUM_PROCESSES, PROCESS_ID):
        if environment.get(name):
            raise UserError(
                f"{name}={environment[name]}: expected it together with {COORDINATOR}=host:port, "
                f"but {reason}"
            )
