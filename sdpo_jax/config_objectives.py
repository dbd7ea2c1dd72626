"""The objectives of a recipe: `objective.name` picks one, with settings of its own."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class SdpoObjective:
    """Self-distillation from feedback and successful siblings (arXiv 2601.20802)."""

    name: Literal["sdpo"] = "sdpo"
    alpha: float = 0.5
    """0: KL(teacher || student); 1: KL(student || teacher); between: generalised Jensen-Shannon."""
    top_k: int = 0
    """Compare on the student's likeliest tokens, the rest in one bucket (the paper: 100 or 20); 0
    compares the whole vocabulary, which the chunked head affords."""
    importance_cap: float = 2.0
    """Upper bound of the detached ratio of new to rollout probability, per token."""
    reduction: Literal["token_mean", "sequence_mean"] = "token_mean"
    """Mean over active tokens (the paper) or over rows of token means (its released code)."""


@dataclass(frozen=True)
class GrpoObjective:
    """Group-relative policy optimisation, with the paper's improvements to its baseline."""

    name: Literal["grpo"] = "grpo"
    clip_low: float = 0.2
    clip_high: float = 0.28
    dual_clip: float = 3.0
    reduction: Literal["token_mean", "sequence_mean"] = "token_mean"


@dataclass(frozen=True)
class SftObjective:
    """Cross-entropy on demonstrations; needs `[data]` and no environment."""

    name: Literal["sft"] = "sft"
    reduction: Literal["token_mean", "sequence_mean"] = "token_mean"


Objective = SdpoObjective | GrpoObjective | SftObjective
