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
    compares the whole vocabulary, which the fused linear loss affords."""
    importance_cap: float = 2.0
    """Upper bound of the detached ratio of new to rollout probability, per token."""
    reduction: Literal["token_mean", "sequence_mean"] = "token_mean"
    """Mean over active tokens (the paper) or over rows of token means (its released code)."""
    credit: Literal["logit", "token", "sequence", "modulated", "fixed_negative"] = "logit"
    """Who gets credit (the paper's section 4.2): every candidate of each position, by the
    divergence; the sampled token; the whole rollout, by its tokens' mean advantage. `modulated`:
    the reward's advantage, its size per token by the teacher (RLSD, arXiv 2604.03128).
    `fixed_negative`: a control without the teacher's numbers (OPSA, arXiv 2608.31046), minus 1 at
    a failure's tokens that were less likely than `control_probability`, else 0."""
    control_probability: float = 0.1
    modulation: float = 0.5
    """Share of `modulated` advantages that the teacher scales; 0 is GRPO."""
    modulation_bound: float = 0.2
    """How far from 1 its factor may lie."""
    grpo_weight: float = 0.0
    """lambda of lambda * GRPO + (1 - lambda) * SDPO (equation 3 of the paper, with 0.9), each by
    its own reduction and GRPO with its default clips: 0 is SDPO, 1 is GRPO."""
    route: Literal["none", "outcome", "positive"] = "none"
    """`outcome`: failures with a teacher are distilled, all else goes to GRPO, under one
    denominator (SRPO, arXiv 2604.02288). `positive`: distill only where the advantage is above 0
    (SDPG, arXiv 2606.04036), beside GRPO by `grpo_weight`."""
    distillation_warmup_steps: int = 0
    """Steps over which the distillation's coefficient rises to 1 (SDPG)."""
    distillation_decay_steps: int = 0
    """Last steps over which it falls; the last step has none."""
    token_weights: Literal["none", "teacher_entropy", "disagreement"] = "none"
    """`teacher_entropy`: exp(-beta H(q)) over its mean (SRPO); `disagreement`: less where the two
    distributions are apart (DemoPSD, arXiv 2607.02502)."""
    token_weight_beta: float = 1.0
    """1 in SRPO; as a divergence is at most 0.69, `disagreement` needs 5 or more to say much."""
    disagreement_reduction: float = 0.5
    """Most that `disagreement` takes off a token's weight."""
    question_weights: Literal["none", "pass_rate"] = "none"
    """`pass_rate`: sqrt(p (1 - p)) of the group over its batch mean (SC-SDPO, arXiv 2605.27765)."""
    question_weight_floor: float = 0.1
    """Of sqrt(p (1 - p)): without it a group that all passed or all failed is not learned from."""
    skip_first_tokens: int = 0
    """Tokens at a response's start that are left out (SDFT, arXiv 2601.19897, leaves out 3)."""
    reference_kl: float = 0.0
    """Coefficient of the KL to the initial model without context, on every token that counts."""


@dataclass(frozen=True)
class GrpoObjective:
    """Group-relative policy optimisation, with the paper's improvements to its baseline."""

    name: Literal["grpo"] = "grpo"
    clip_low: float = 0.2
    clip_high: float = 0.28
    dual_clip: float = 3.0
    reduction: Literal["token_mean", "sequence_mean"] = "token_mean"
    reference_kl: float = 0.0
    """Coefficient of the KL to the initial model, on every token that counts (arXiv 2402.03300)."""


@dataclass(frozen=True)
class SftObjective:
    """Cross-entropy on demonstrations; needs `[data]` and no environment."""

    name: Literal["sft"] = "sft"
    reduction: Literal["token_mean", "sequence_mean"] = "token_mean"


@dataclass(frozen=True)
class SdftObjective:
    """Self-distillation from demonstrations that the teacher is shown (SDFT, arXiv 2601.19897).

    Questions come from `[data]`, `data.rows_per_step` a step; the student answers each
    `rollout.rollouts_per_prompt` times. Nothing is graded, and a response that was cut off is kept,
    as in the authors' code.
    """

    name: Literal["sdft"] = "sdft"
    alpha: float = 0.0
    """0: KL(teacher || student), which the paper's results used (its code's default; so the authors
    in April 2026); 1: KL(student || teacher), which the paper's text says; between:
    generalised Jensen-Shannon."""
    top_k: int = 0
    """Compare on the student's likeliest tokens, the rest in one bucket; 0 compares the whole
    vocabulary, as the paper does."""
    importance_cap: float = 2.0
    """A response's weight is the mean over its tokens of min(ratio, cap), detached; ratio is new to
    rollout probability."""
    skip_first_tokens: int = 3
    """First tokens of a response, left out of its loss: there a demonstration's opening is
    copied."""
    closing: Literal["own", "correct"] = "own"
    """What the teacher's prompt ends in: a request for an answer of one's own, as in the paper, or
    for a correct one, `sdpo`'s sentence: the only one that the embedded model has learned."""
    reduction: Literal["token_mean", "sequence_mean"] = "sequence_mean"
    """Mean over active tokens or over rows of token means (the authors' code)."""


Demonstrated = SftObjective | SdftObjective
"""What learns from the demonstrations of `[data]`."""

Objective = SdpoObjective | GrpoObjective | SftObjective | SdftObjective
