"""The settings of a run, as frozen dataclasses.

A name carries its unit (`prompts_per_step`, `max_response_tokens`). Each objective and each kind of
environment has a settings class of its own, a subclass of `ObjectiveConfig` or `EnvironmentConfig`
beside its implementation; this package does not know them. `config.recipe` reads a recipe,
`config.checks` finds what is wrong with its values, `config.resolved` writes and compares.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from sdpo_jax.config.fields import FINITE as FINITE
from sdpo_jax.config.fields import POSITIVE as POSITIVE
from sdpo_jax.config.fields import POSITIVE_SHARE as POSITIVE_SHARE
from sdpo_jax.config.fields import PROPER_SHARE as PROPER_SHARE
from sdpo_jax.config.fields import SEED as SEED
from sdpo_jax.config.fields import Problem as Problem
from sdpo_jax.config.fields import Range as Range
from sdpo_jax.config.fields import above as above
from sdpo_jax.config.fields import at_least as at_least
from sdpo_jax.config.fields import between as between
from sdpo_jax.config.fields import setting as setting

_BELOW_ONE = Range(lambda value: 0 <= value < 1, "from 0 to below 1")
_DEVICES = Range(lambda value: value >= 1 or value == -1, "at least 1, or -1 for what is left")


@dataclass(frozen=True)
class ObjectiveConfig:
    """Base of every objective's settings; `objective.name` of a recipe picks the subclass.

    A subclass gives `name` its own default, and every field of its own has one.
    """

    learns_from: ClassVar[Literal["rollouts", "demonstrations"]] = "rollouts"
    """`rollouts`: prompts of the environment, whose answers are graded. `demonstrations`: the rows
    of `[data]`; nothing is graded."""
    samples: ClassVar[bool] = True
    """Whether the model answers the prompts of a step, as `[rollout]` describes."""
    has_teacher: ClassVar[bool] = False
    """Whether a teacher that sees more than the student scores its responses, as `[teacher]`
    describes."""

    name: str = ""

    @property
    def depends_on_steps(self) -> bool:
        """Whether a schedule of the objective ends with `train.steps`.

        A run with such a schedule cannot be given more steps.
        """
        return False

    def check(self, config: "Config") -> Iterator[Problem]:
        """Yields the problems of these settings with one another and with the rest of a config."""
        del config
        yield from ()

    def check_vocabulary(self, size: int) -> Iterator[Problem]:
        """Yields the problems of these settings with a model of this vocabulary."""
        del size
        yield from ()


@dataclass(frozen=True)
class EnvironmentConfig:
    """Base of every environment's settings; `environment.kind` of a recipe picks the subclass.

    A subclass gives `kind` its own default, and every field of its own has one.
    """

    kind: str = ""
    max_failed_share: float = setting(0.2, between(0, 1), may_change=True)
    """Share of a batch that the environment may fail to grade before the run stops."""

    def check(self, config: "Config") -> Iterator[Problem]:
        """Yields the problems of these settings with one another and with the rest of a config."""
        del config
        yield from ()


@dataclass(frozen=True)
class ModelConfig:
    """Where the weights come from, and how the model computes."""

    path: str = "nano"
    """`nano` (the embedded model), a folder in Hugging Face layout, the folder of a run (its last
    checkpoint, or `RUN@best`, `RUN@STEP`: a second stage), or `package:NAME`: an installed Python
    package that holds one GGUF file, which is converted once into `~/.cache/sdpo-jax`."""
    thinking: Literal["template", "on", "off"] = "template"
    """Value of `enable_thinking` in the chat template; `template` leaves it to the template."""
    random_init: bool = False
    """Take only config and tokenizer from `path` and draw fresh weights from the run's seed."""
    remat: Literal["none", "dots", "full", "offload"] = setting("dots", may_change=True)
    """Rematerialization policy: `none`; `dots` recomputes all but the outputs of matrix products;
    `full` recomputes each layer (one more forward pass); `offload` does so, with the layers' inputs
    in the host's memory."""
    attention: Literal["auto", "xla", "splash"] = setting("auto", may_change=True)
    """Attention over whole sequences: `splash` is a TPU kernel, `auto` uses it on a TPU."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the model's activations; weights and optimizer state stay float32."""


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters beside frozen weights (LoRA); `sdpo convert` merges them."""

    rank: int = setting(0, at_least(0))
    """Rank of each adapter; 0 trains all parameters instead."""
    alpha: float = setting(32.0, POSITIVE)
    """The adapters' output is scaled by alpha / rank."""
    targets: tuple[str, ...] = ("query", "key", "value", "output", "gate", "up", "down")
    """The matrices of each layer that get an adapter."""


@dataclass(frozen=True)
class RolloutConfig:
    """How the model answers."""

    prompts_per_step: int = setting(16, at_least(1))
    rollouts_per_prompt: int = setting(8, at_least(1))
    max_prompt_tokens: int = setting(128, at_least(1))
    """A longer prompt stops the run with its id: questions are never cut silently."""
    max_response_tokens: int = setting(48, at_least(1))
    """Limit of each turn."""
    max_turns: int = setting(1, at_least(1))
    """Above 1 the environment answers a failed attempt in text, by its own episodes or else by its
    feedback (at most `teacher.max_feedback_tokens`), and the model tries again."""
    temperature: float = setting(1.0, POSITIVE)
    slots: int = setting(0, at_least(0), may_change=True)
    """Rollouts that are decoded at a time, in evaluation too; a finished rollout hands its slot to
    the next one. 0 decodes all at once. Memory depends on it, the result does not."""
    one_step_off_policy: bool = False
    """Sample the next step's responses before this step's update and grade them while it runs, for
    environments that grade slowly. The responses are one update old; the ratio to the old
    probability, capped or clipped by the objective, corrects for it."""


@dataclass(frozen=True)
class TeacherConfig:
    """What the teacher sees and how its weights follow the student."""

    weights: Literal["ema", "frozen", "live", "trust_region", "refreshed"] = "ema"
    """`ema`: follows the student once a step; `frozen`: the initial model; `live`: the student;
    `trust_region`: the initial model's logits mixed with the student's, a second forward pass;
    `refreshed`: constant between refreshes, each of which moves it by `refresh_fraction`."""
    ema_rate: float = setting(0.05, between(0, 1))
    """Teacher <- (1 - rate) * teacher + rate * student, in float32, once per generation batch."""
    trust_region: float = setting(0.01, between(0, 1))
    """Share of the student's logits under `trust_region`, the rest are the initial model's."""
    refresh: Literal["every", "gated", "never"] = "every"
    """When a `refreshed` teacher moves: `every`: `refresh_steps` after its last move; `gated`: no
    sooner than that, and only once the student is better and its answers are no longer than
    `refresh_length` allows (CGTR, arXiv 2606.03532)."""
    refresh_steps: int = setting(10, at_least(1))
    """Steps between two moves, or the fewest under `gated`."""
    refresh_fraction: float = setting(0.4, POSITIVE_SHARE)
    """Teacher <- (1 - fraction) * teacher + fraction * student at a refresh (StableSDPO, arXiv
    2607.01763); 1 copies the student."""
    refresh_window: int = setting(5, at_least(1))
    """Steps whose means of reward, 95th percentile of length and share of cut-off answers are
    compared with those at the last refresh."""
    refresh_gain: float = setting(0.02, at_least(0))
    """Gain in reward since the last refresh that the gate requires; 0 requires any gain."""
    refresh_length: float = setting(0.2, at_least(0))
    """How much longer, as a share, the 95th percentile of length may be for the gate to open."""
    return_drop: float = setting(0.0, at_least(0))
    """Fall in reward since the last refresh that restores the teacher before it, at most once for
    each refresh. 0 never restores it and keeps no second copy. The student is not restored."""
    demonstration: Literal["first", "shortest", "random", "none"] = "first"
    """Which successful sibling the teacher sees: the first in batch order, the shortest, a seeded
    choice, or none."""
    exclude_own_success: bool = True
    """Never show a rollout its own success."""
    feedback: bool = True
    """Show the environment's feedback on the rollout."""
    feedback_only_without_demonstration: bool = True
    """Show feedback only where no demonstration is available."""
    own_attempt: bool = False
    """Show the rollout's own text before its feedback (the paper's table 6, where it is worse)."""
    success_buffer: int = setting(0, at_least(0))
    """Successes of earlier steps that are kept for each prompt, newest first, and shown where none
    of its rollouts passes (DRIFT, arXiv 2606.30345, keeps 4); 0 keeps none."""
    control: Literal["none", "shuffled"] = "none"
    """`shuffled` shows the context of another question of the batch, as a control: a gain that
    remains does not come from information about the question (OP2SD, arXiv 2608.09228)."""
    remove_thinking: bool = True
    """Cut `<think>...</think>` from demonstrations."""
    success_threshold: float = setting(1.0, FINITE)
    """A rollout whose reward reaches this may serve as a demonstration."""
    max_prompt_tokens: int = setting(512, at_least(1))
    """Limit of the teacher's prompt. What is too long is cut from the demonstration, then from
    the feedback, then from the question's start."""
    max_feedback_tokens: int = setting(256, at_least(1))


@dataclass(frozen=True)
class DataConfig:
    """Demonstrations for `sft` and `sdft`, which see the same rows in the same order."""

    source: str = "tool_call_corpus"
    """`tool_call_corpus` (generated; the nano model's own pre-training text),
    `tool_call_corpus_with_preamble` (the same, where a model without a context first talks),
    `environment` (an accepted answer to each training prompt, where the environment has one:
    `tool_calls`, `bfcl`) or a JSONL file with `prompt` and `response` in each row."""
    rows_per_step: int = setting(64, at_least(1))
    max_tokens: int = setting(256, at_least(1))
    """`sft`: prompt and response together, and the width of the rows into which demonstrations are
    packed; a longer one stops the run with its id."""
    on_error: Literal["stop", "skip"] = "stop"
    """What a bad row does; skipped rows are counted and named."""


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW."""

    learning_rate: float = setting(3e-4, POSITIVE)
    warmup_steps: int = setting(5, at_least(0))
    """Updates over which the rate rises; with `mini_batches` above 1 a step has several."""
    schedule: Literal["constant", "cosine"] = "constant"
    weight_decay: float = setting(0.01, at_least(0))
    clip_norm: float = setting(1.0, above(0))
    """Global gradient norm above which the gradient is scaled down."""
    b1: float = setting(0.9, _BELOW_ONE)
    b2: float = setting(0.999, _BELOW_ONE)
    max_skipped_updates: int = setting(3, at_least(1), may_change=True)
    """Consecutive non-finite updates that are skipped before the run stops."""


@dataclass(frozen=True)
class TrainConfig:
    """How many steps the run takes, and how a step is split."""

    steps: int = setting(60, at_least(1))
    mini_batches: int = setting(1, at_least(1))
    """Optimizer updates per generation batch; above 1 the later ones are off-policy."""
    micro_batch_tokens: int = setting(8192, at_least(1), may_change=True)
    """Approximate number of tokens per forward and backward pass on each shard of the rows. The
    result does not depend on it."""
    share_prompts: Literal["auto", "on", "off"] = setting("auto", may_change=True)
    """Whether teacher and student run a prompt once for all its siblings; `auto`: on a CPU. The
    result does not depend on it."""
    head_chunk_tokens: int = setting(256, at_least(1), may_change=True)
    """Tokens of each shard of the rows whose logits exist at a time; a TPU wants 1,024 or more."""


@dataclass(frozen=True)
class MeshConfig:
    """Devices per axis. `data = -1` takes what is left."""

    data: int = setting(-1, _DEVICES, may_change=True)
    fsdp: int = setting(1, at_least(1), may_change=True)
    tensor: int = setting(1, at_least(1), may_change=True)


@dataclass(frozen=True)
class EvaluationConfig:
    """Held-out accuracy during training."""

    every_steps: int = setting(10, at_least(0))
    """0 evaluates only before and after training."""
    prompts: int = setting(256, at_least(0))
    samples_per_prompt: int = setting(2, at_least(1))
    temperature: float = setting(1.0, at_least(0))
    top_p: float = setting(1.0, POSITIVE_SHARE)
    """Draw from the likeliest tokens that hold this much probability together."""
    top_k: int = setting(0, at_least(0))
    """Draw from this many of the likeliest tokens; 0 draws from all."""
    min_p: float = setting(0.0, between(0, 1))
    """Draw from tokens of at least this share of the likeliest one's probability."""
    teacher: bool = True
    """Whether the teacher answers, too: once more for each attempt that has a context."""
    batch_prompts: int = setting(64, at_least(1), may_change=True)
    """Prompts decoded at a time."""


@dataclass(frozen=True)
class CheckpointConfig:
    """Orbax checkpoints in the run directory."""

    every_steps: int = setting(10, at_least(1), may_change=True)
    keep: int = setting(2, at_least(1), may_change=True)
    keep_best: bool = setting(True, may_change=True)
    """Save a step whose evaluation has the highest held-out accuracy so far, the start's included,
    and keep it beside the last `keep`, until there is a better one: `sdpo eval RUN@best`."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """A run. `run.recipes.default_config` fills in the default objective and environment."""

    run_dir: str = setting("", may_change=True)
    """Where metrics, checkpoints and results go; empty means `runs/RECIPE`."""
    seed: int = setting(0, SEED)
    objective: ObjectiveConfig
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    environment: EnvironmentConfig
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
