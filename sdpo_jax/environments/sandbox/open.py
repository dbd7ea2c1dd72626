"""Opens a sandbox: chooses a tier and tries it once; an error names the remedy."""

import logging
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Literal

from sdpo_jax.environments.sandbox import boxes, selftest, tiers
from sdpo_jax.environments.sandbox.client import LocalSandbox, cores
from sdpo_jax.environments.sandbox.remote import RemoteSandbox
from sdpo_jax.errors import UserError

Tier = Literal["auto", "bubblewrap", "landlock", "unsafe-local", "remote"]
_log = logging.getLogger("sdpo_jax.sandbox")
_RESERVE = 1
"""Cores that are left to the trainer."""
_REFUSAL = """\
sandbox: no tier can hold a program on this machine
  {problems}
mend one of these, name a service (tier `remote`), or, for programs that you trust, type the tier
`unsafe-local`"""
_PLANS: dict[str, Callable[[Sequence[str]], boxes.Plan]] = {
    "bubblewrap": tiers.bubblewrap,
    "landlock": tiers.landlock,
    "unsafe-local": tiers.unsafe_local,
}


def open_sandbox(
    tier: Tier = "auto", *, slots: int = 0, mounts: tuple[str, ...] = (), url: str = ""
) -> LocalSandbox | RemoteSandbox:
    """Opens a sandbox; `close` it at the end.

    `auto` takes bubblewrap, else Landlock, else refuses; it never takes `unsafe-local`, which runs
    programs with this user's rights and has to be typed. `slots` programs run at a time (0: the
    cores less one, at least 1). `mounts` are folders for the programs to import from (a
    site-packages folder for numpy), bound read-only; for `remote`, folders there. `url` is the
    address of a service with SandboxFusion's `/run_code`, for `remote`.

    Raises `UserError` where the tier cannot be had, with what to install or to change, and for a
    mount that is no folder or that programs could not read: never a weaker tier because of it.
    """
    if slots < 0:
        raise UserError(f"sandbox: slots is {slots}; expected 0 (by the cores) or more")
    slots = slots or max(cores() - _RESERVE, 1)
    _check_mounts(mounts, remote=tier == "remote")
    if tier == "remote":
        return RemoteSandbox(url, slots, mounts)
    if sys.platform != "linux":
        raise UserError(f"sandbox: tier {tier} needs Linux; on {sys.platform} use `remote`")
    if tier == "unsafe-local":
        _log.warning(
            "sandbox: tier unsafe-local: model-written programs run with this user's rights, "
            "files and network; use it only for programs that you trust"
        )
    wanted = ("bubblewrap", "landlock") if tier == "auto" else (tier,)
    problems: list[str] = []
    for name in wanted:
        try:
            return _try(name, slots, mounts)
        except tiers.TierError as error:
            problems.append(f"{name}: {error}")
    raise UserError(_REFUSAL.format(problems="\n  ".join(problems)))


def _check_mounts(mounts: Sequence[str], *, remote: bool) -> None:
    """Refuses mounts that are not folders; for a service only the form can be checked."""
    for mount in mounts:
        if remote and not mount.startswith("/"):
            raise UserError(
                f"sandbox: the mount {mount!r} (environment.mounts); expected the absolute path of "
                "a folder at the remote service"
            )
        if not remote and not os.path.isdir(mount):
            raise UserError(
                f"sandbox: the mount {mount!r} (environment.mounts) is no folder here "
                f"({os.path.abspath(mount)}); expected folders for programs to import from, such "
                "as a site-packages folder"
            )


def _try(name: str, slots: int, mounts: tuple[str, ...]) -> LocalSandbox:
    """Starts a tier and attacks it; raises `tiers.TierError` if it does not hold."""
    if name not in _PLANS:
        raise UserError(f"sandbox: tier {name!r}; expected one of auto, remote, {list(_PLANS)}")
    try:
        plan = _PLANS[name](mounts)
    except (OSError, subprocess.SubprocessError) as error:
        raise tiers.TierError(f"its interpreter does not run: {error}") from error
    sandbox = LocalSandbox(plan, slots)
    try:
        sandbox.report = selftest.examine(sandbox, plan.python, platform.release())
    except tiers.TierError:
        sandbox.close()
        raise
    _log.info("%s", sandbox.report)
    return sandbox
