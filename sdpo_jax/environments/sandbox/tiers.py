"""The requirements of each tier on this machine, and the remedy if one is missing.

If this process is root, a box runs under a uid of its own, so its interpreter and its mounts must
be readable by every user. An interpreter below a closed home directory is not; then the system's
`/usr/bin/python3` runs the programs, and the report names it.
"""

import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from sdpo_jax.environments.sandbox import boot, boxes, cgroups, confine, seccomp
from sdpo_jax.errors import UserError

USER_NAMESPACES_REMEDY = (
    "allow user namespaces: `sysctl -w user.max_user_namespaces=15000`, on Debian also "
    "`sysctl -w kernel.unprivileged_userns_clone=1`, on Ubuntu 24.04 "
    "`sysctl -w kernel.apparmor_restrict_unprivileged_userns=0`; in a pod, a securityContext "
    "with `procMount: Unmasked` and `seccompProfile: {type: Unconfined}`"
)
"""The remedy if bwrap may not create a user namespace."""
_SYSTEM = ("/usr/bin/python3", "/usr/local/bin/python3")


class TierError(Exception):
    """A tier does not work on this machine; the message names what is missing and the remedy."""


class Interpreter(NamedTuple):
    """The Python that runs the programs."""

    path: str
    prefix: str


def bubblewrap(mounts: Sequence[str]) -> boxes.Plan:
    """The tier with namespaces (bwrap), seccomp and Landlock.

    Raises `TierError` where the tier cannot be had, `UserError` for a mount that it cannot hold.
    """
    bwrap = shutil.which("bwrap")
    if not bwrap:
        raise TierError("bwrap is not installed; `apt install bubblewrap` (or dnf) gives it")
    found = interpreter()
    needed = _readable_by_all(mounts)
    # A wrong mount is an error in the recipe, for which `auto` must not take a weaker tier.
    for path, error in (*((path, UserError) for path in needed), (found.prefix, TierError)):
        if _beneath(path, "/tmp"):
            raise error(
                f"{path} lies below /tmp, which each box has for itself; take a folder elsewhere"
            )
    if not _beneath(found.prefix, "/usr"):
        needed = (found.prefix, *needed)
    known = subprocess.run([bwrap, "--help"], capture_output=True, text=True, check=False).stdout
    return _plan("bubblewrap", found, needed, mounts)._replace(
        bwrap=bwrap, disable_userns="--disable-userns" in known, landlock=True
    )


def landlock(mounts: Sequence[str]) -> boxes.Plan:
    """The tier with Landlock, seccomp and a separate uid; raises `TierError`."""
    abi = confine.landlock_abi()
    if not abi:
        raise TierError("the kernel has no Landlock; it needs Linux 5.13 with lsm=landlock")
    if not seccomp.supported():
        raise TierError("the system-call filter knows x86_64 and aarch64 only")
    found = interpreter()
    needed = (found.prefix, *_readable_by_all(mounts))
    # Without signal scopes a program that shares the trainer's uid could end the trainer.
    return _plan("landlock", found, needed, mounts)._replace(
        landlock=True, deny_signals=abi < 6, work_root=_work_root()
    )


def unsafe_local(mounts: Sequence[str]) -> boxes.Plan:
    """The tier without protection: this user's rights, limits and fresh directories only."""
    found = _probe(sys.executable)
    if found is None:
        raise TierError(f"the interpreter {sys.executable} does not run")
    return _plan("unsafe-local", found, (), mounts)._replace(work_root=_work_root())


def interpreter() -> Interpreter:
    """This interpreter's base if the uid of a box can read it, else the system's Python."""
    for path in (getattr(sys, "_base_executable", "") or sys.executable, *_SYSTEM):
        found = _probe(os.path.realpath(path))
        if found and _open_to_all(found.path) and _open_to_all(found.prefix):
            return found
    raise TierError(
        f"no interpreter is readable by an unprivileged user: {sys.base_prefix} is closed to it "
        "and there is no /usr/bin/python3; `apt install python3`, or chmod o+x its folders"
    )


def _plan(
    tier: str, found: Interpreter, needed: Sequence[str], mounts: Sequence[str]
) -> boxes.Plan:
    runner, code = boot.compiled(found.path, boot.RUNNER)
    return boxes.Plan(
        tier=tier,
        python=found.path,
        mounts=tuple(needed),
        paths=tuple(os.path.abspath(mount) for mount in mounts),
        runner=runner,
        code=code,
        cgroup=cgroups.prepared(),
    )


def _probe(path: str) -> Interpreter | None:
    """Reads the prefix of an interpreter; None if it does not run or does not exist."""
    try:
        answer = subprocess.run(
            [path, "-I", "-S", "-c", "import sys; print(sys.base_prefix)"],
            env={},
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    (prefix,) = answer.stdout.splitlines()
    return Interpreter(path, prefix)


def _readable_by_all(mounts: Sequence[str]) -> tuple[str, ...]:
    for mount in mounts:
        if not _open_to_all(mount):
            raise UserError(
                f"sandbox: the mount {mount} is not readable by other users, and programs run as "
                "another user; copy it to an open place, or chmod o+rx it and the folders above"
            )
    return tuple(os.path.abspath(mount) for mount in mounts)


def _open_to_all(path: str) -> bool:
    """Whether the box's user reaches a path: all do where this process has no other uid to take."""
    if os.getuid() != 0:
        return os.access(path, os.R_OK)
    real = Path(path).resolve()
    return bool(real.stat().st_mode & stat.S_IROTH) and all(
        parent.stat().st_mode & stat.S_IXOTH for parent in real.parents
    )


def _beneath(path: str, folder: str) -> bool:
    return os.path.commonpath([os.path.realpath(path), folder]) == folder


def _work_root() -> str:
    """A folder for the tests' directories: passable for the slots' uids, listable by none."""
    path = tempfile.mkdtemp(prefix="sdpo-sandbox-")
    os.chmod(path, 0o711)
    return path
