"""Settings that several kinds of environment share, as bases of their settings classes."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from sdpo_jax.config import POSITIVE, EnvironmentConfig, at_least, setting
from sdpo_jax.environments.sandbox import Sandbox, Tier, open_sandbox
from sdpo_jax.errors import UserError


@dataclass(frozen=True)
class WorkerConfig(EnvironmentConfig):
    """Settings of a kind whose grader may hang."""

    workers: int = setting(1, at_least(0), may_change=True)
    """Worker processes that grade, at least 1: comparing or scoring an answer may not terminate."""
    deadline_seconds: float = setting(10.0, POSITIVE, may_change=True)
    """Time limit of a worker for one response; a worker that takes longer is replaced."""


@dataclass(frozen=True)
class SandboxConfig(EnvironmentConfig):
    """Settings of a kind that runs programs in a sandbox."""

    sandbox: Tier = setting("auto", may_change=True)
    """How programs are isolated; `auto` takes the strongest tier that works here, or refuses."""
    sandbox_url: str = setting("", may_change=True)
    """URL of a `remote` sandbox."""
    mounts: tuple[str, ...] = ()
    """Folders that programs can import from, read-only, such as a site-packages folder."""
    slots: int = setting(0, at_least(0), may_change=True)
    """Programs that run at a time; 0: all cores but one."""


@dataclass(frozen=True)
class FilesConfig(EnvironmentConfig):
    """Settings of a kind that reads its prompts from two JSONL files."""

    train: str = ""
    """JSONL file to train on."""
    held_out: str = ""
    """JSONL file to evaluate on."""
    on_error: Literal["stop", "skip"] = "stop"
    """What a bad row of a file does; skipped rows are counted and named."""


def sandbox_of(config: SandboxConfig) -> Sandbox:
    """Opens the sandbox of a recipe.

    Raises:
      UserError: the tier does not work on this machine, or a mount cannot be used.
    """
    return open_sandbox(
        config.sandbox, slots=config.slots, mounts=config.mounts, url=config.sandbox_url
    )


def require_files(config: FilesConfig) -> None:
    """Checks that both files are set.

    Raises:
      UserError: one of them is empty.
    """
    for key, value in {"train": config.train, "held_out": config.held_out}.items():
        if not value:
            raise UserError(
                f'environment.{key} = "": expected a path with environment.kind = "{config.kind}"'
            )


def print_skipped(problems: Sequence[str]) -> None:
    """Names the rows that were skipped on standard error."""
    for problem in problems:
        print(f"skipped {problem}", file=sys.stderr)
