"""Every setting of a run, as frozen dataclasses; `config.recipe` reads and writes the TOML.

A name carries its unit (`prompts_per_step`, `max_response_tokens`). Objective and environment are
tagged unions: each has its own settings, and a setting of another one is a problem.
"""

from dataclasses import dataclass, field
from typing import Literal

from sdpo_jax.config.environments import EnvironmentConfig, ToolCallsEnvironment
from sdpo_jax.config.objectives import Demonstrated as Demonstrated
from sdpo_jax.config.objectives import GrpoObjective as GrpoObjective
from sdpo_jax.config.objectives import Objective as Objective
from sdpo_jax.config.objectives import SdftObjective as SdftObjective
from sdpo_jax.config.objectives import SdpoObjective as SdpoObjective
from sdpo_jax.config.objectives import SftObjective as SftObjective


@dataclass(frozen=True)
class ModelConfig:
    """Where the weights come from."""

    path: str = "nano"
    """`nano` (the embedded model), a folder in Hugging Face layout, the folder of a run (its last
    checkpoint, or `RUN@best`, `RUN@STEP`: a second stage), or `package:NAME`: an installed Python
    package that holds one GGUF file, which is converted once into `~/.cache/sdpo-jax`."""
    thinking: Literal["template", "on", "off"] = "template"
    """What the chat template is told as `enable_thinking`; `template` leaves it to its default."""
    random_init: bool = False
    """Take only config and tokenizer from `path` and draw fresh weights from the run's seed."""
    remat: Literal["none", "dots", "full", "offload"] = "dots"
    """What the backward pass makes again to save memory: nothing; all but the outputs of matrix
    products; each layer (one more forward); each layer, with their inputs in the host's memory."""
    attention: Literal["auto", "xla", "splash"] = "auto"
    """Form over whole sequences: `splash` is a TPU kernel, `auto` takes it on a TPU."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What the model computes in; weights and optimiser stay float32."""


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters beside frozen weights (LoRA), added in on `sdpo convert`."""

    rank: int = 0
    """Of each adapter; 0 trains all parameters instead."""
    alpha: float = 32.0
    """Adapters count alpha / rank."""
    targets: tuple[str, ...] = ("query", "key", "value", "output", "gate", "up", "down")
    """Which matrices of each layer get one."""


@dataclass(frozen=True)
class RolloutConfig:
    """How the model answers."""

    prompts_per_step: int = 16
    rollouts_per_prompt: int = 8
    max_prompt_tokens: int = 128
    """A longer prompt stops the run with its id: questions are never cut silently."""
    max_response_tokens: int = 48
    """Of each turn."""
    max_turns: int = 1
    """Above 1 a failed attempt is answered in text, by the environment's own episodes or else by
    its feedback (at most `teacher.max_feedback_tokens`), and the model goes on."""
    temperature: float = 1.0
    slots: int = 0
    """Rollouts decoded at a time, evaluation's too; one that is done hands its slot to the next. 0
    decodes all at once. The result does not depend on it, memory does."""
    ahead: bool = False
    """Draw the next step's responses before this step's update and grade them while it runs, for
    environments that are slow to judge. They are one update old: the ratio to the old probability,
    capped or clipped by the objective, makes up for it."""


@dataclass(frozen=True)
class TeacherConfig:
    """What the teacher sees and how its weights follow the student."""

    weights: Literal["ema", "frozen", "live", "trust_region", "refreshed"] = "ema"
    """`ema`: follows the student once a step; `frozen`: the initial model; `live`: the student;
    `trust_region`: the initial model's logits mixed with the student's, a second forward pass;
    `refreshed`: stands still, and moves by `refresh_fraction` when `refresh` says so."""
    ema_rate: float = 0.05
    """Teacher <- (1 - rate) * teacher + rate * student, in float32, once per generation batch."""
    trust_region: float = 0.01
    """Share of the student's logits under `trust_region`, the rest are the initial model's."""
    refresh: Literal["every", "gated", "never"] = "every"
    """When a `refreshed` teacher moves: `refresh_steps` after the last move; no sooner than that
    and not before the student is better and its answers no longer (CGTR, arXiv 2606.03532)."""
    refresh_steps: int = 10
    """Steps between two moves, or the fewest under `gated`."""
    refresh_fraction: float = 0.4
    """Teacher <- (1 - fraction) * teacher + fraction * student at a refresh (StableSDPO, arXiv
    2607.01763); 1 copies the student."""
    refresh_window: int = 5
    """Steps whose means of reward, 95th percentile of length and share of cut-off answers are
    compared with those at the last refresh."""
    refresh_gain: float = 0.02
    """Reward above that at the last refresh that the gate wants; 0 wants any gain."""
    refresh_length: float = 0.2
    """How much longer, as a share, the 95th percentile of length may be for the gate to open."""
    return_drop: float = 0.0
    """Reward below that at the last refresh at which the teacher before it comes back, once for
    each refresh; 0 never returns and keeps no second copy. The student goes on as it is."""
    demonstration: Literal["first", "shortest", "random", "none"] = "first"
    """Which successful sibling is shown: first in batch order, shortest, a seeded choice, none."""
    exclude_own_success: bool = True
    """Never show a rollout its own success."""
    feedback: bool = True
    """Show the environment's feedback on the rollout."""
    feedback_only_without_demonstration: bool = True
    """Show feedback only where no demonstration is available."""
    own_attempt: bool = False
    """Show the rollout's own text before its feedback (the paper's table 6, where it is worse)."""
    success_buffer: int = 0
    """Successes of earlier steps that are kept for each prompt, newest first, and shown where none
    of its rollouts passes (DRIFT, arXiv 2606.30345, keeps 4); 0 keeps none."""
    control: Literal["none", "shuffled"] = "none"
    """`shuffled` shows the context of another question of the batch: what it still gains is not
    information about the question (OP2SD, arXiv 2608.09228)."""
    remove_thinking: bool = True
    """Cut `<think>...</think>` from demonstrations."""
    success_threshold: float = 1.0
    """A rollout whose reward reaches this may serve as a demonstration."""
    max_prompt_tokens: int = 512
    """Cap of the re-prompt; cut are demonstration, then feedback, then the question's start."""
    max_feedback_tokens: int = 256


@dataclass(frozen=True)
class DataConfig:
    """Demonstrations for `sft` and `sdft`, which see the same rows in the same order."""

    source: str = "tool_call_corpus"
    """`tool_call_corpus` (generated; the nano model's own pre-training text),
    `tool_call_corpus_with_preamble` (the same, where a model without a context first talks),
    `environment` (an accepted answer to each training prompt, where the environment knows one:
    `tool_calls`, `bfcl`) or a JSONL file with `prompt` and `response` in each row."""
    rows_per_step: int = 64
    max_tokens: int = 256
    """`sft`: prompt and response together, and the width of the rows into which demonstrations are
    packed; a longer one stops the run with its id."""
    on_error: Literal["stop", "skip"] = "stop"
    """What a bad row does; skipped rows are counted and named."""


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW."""

    learning_rate: float = 3e-4
    warmup_steps: int = 5
    """Updates over which the rate rises; with `mini_batches` above 1 a step has several."""
    schedule: Literal["constant", "cosine"] = "constant"
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    """Global gradient norm above which the gradient is scaled down."""
    b1: float = 0.9
    b2: float = 0.999
    max_skipped_updates: int = 3
    """Consecutive non-finite updates that are skipped before the run stops."""


@dataclass(frozen=True)
class TrainConfig:
    """How many steps, cut how."""

    steps: int = 60
    mini_batches: int = 1
    """Optimiser updates per generation batch; above 1 the later ones are off-policy."""
    micro_batch_tokens: int = 8192
    """Tokens per forward and backward pass on each shard of the rows, about; the result does not
    depend on it."""
    share_prompts: Literal["auto", "on", "off"] = "auto"
    """Whether teacher and student run a prompt once for all its siblings; `auto`: on a CPU. The
    result does not depend on it."""
    head_chunk_tokens: int = 256
    """Tokens of each shard of the rows whose logits exist at a time; a TPU wants 1,024 or more."""


@dataclass(frozen=True)
class MeshConfig:
    """Devices per axis. `data = -1` takes what is left."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1


@dataclass(frozen=True)
class EvaluationConfig:
    """Held-out accuracy during training."""

    every_steps: int = 10
    """0 evaluates only before and after training."""
    prompts: int = 256
    samples_per_prompt: int = 2
    temperature: float = 1.0
    top_p: float = 1.0
    """Draw from the likeliest tokens that hold this much probability together."""
    top_k: int = 0
    """Draw from this many of the likeliest tokens; 0 draws from all."""
    min_p: float = 0.0
    """Draw from tokens of at least this share of the likeliest one's probability."""
    teacher: bool = True
    """Whether the teacher answers, too: once more for each attempt that has a context."""
    batch_prompts: int = 64
    """Prompts decoded at a time."""


@dataclass(frozen=True)
class CheckpointConfig:
    """Orbax checkpoints in the run directory."""

    every_steps: int = 10
    keep: int = 2
    keep_best: bool = True
    """Save a step whose evaluation has the highest held-out accuracy so far, the start's included,
    and keep it beside the last `keep`, until there is a better one: `sdpo eval RUN@best`."""


@dataclass(frozen=True)
class Config:
    """A run."""

    run_dir: str = ""
    """Where metrics, checkpoints and results go; empty means `runs/RECIPE`."""
    seed: int = 0
    objective: Objective = field(default_factory=SdpoObjective)
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    environment: EnvironmentConfig = field(default_factory=ToolCallsEnvironment)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
