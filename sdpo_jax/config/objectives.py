"""The settings of each objective: `[objective]` of a recipe, chosen by `name`."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from sdpo_jax.config import (
    POSITIVE_SHARE,
    PROPER_SHARE,
    Config,
    ObjectiveConfig,
    Problem,
    above,
    at_least,
    between,
    setting,
)


@dataclass(frozen=True)
class SdpoConfig(ObjectiveConfig):
    """Self-distillation from feedback and successful siblings (arXiv 2601.20802)."""

    has_teacher = True

    name: Literal["sdpo"] = "sdpo"
    alpha: float = setting(0.5, between(0, 1))
    """0: KL(teacher || student); 1: KL(student || teacher); between: generalised Jensen-Shannon."""
    top_k: int = setting(0, at_least(0))
    """Compare on the student's likeliest tokens, the rest in one bucket (the paper: 100 or 20); 0
    compares the whole vocabulary, which the chunked head affords."""
    importance_cap: float = setting(2.0, above(0))
    """Upper bound of the detached ratio of new to rollout probability, per token."""
    reduction: Literal["token_mean", "sequence_mean"] = "token_mean"
    """Mean over active tokens (the paper) or over rows of token means (its released code)."""
    credit: Literal["logit", "token", "sequence", "modulated", "fixed_negative"] = "logit"
    """Who gets credit (the paper's section 4.2): every candidate of each position, by the
    divergence; the sampled token; the whole rollout, by its tokens' mean advantage. `modulated`:
    the reward's advantage, its size per token by the teacher (RLSD, arXiv 2604.03128).
    `fixed_negative`: a control without the teacher's numbers (OPSA, arXiv 2608.31046), minus 1 at
    a failure's tokens that were less likely than `control_probability`, else 0."""
    control_probability: float = setting(0.1, POSITIVE_SHARE)
    modulation: float = setting(0.5, between(0, 1))
    """Share of `modulated` advantages that the teacher scales; 0 is GRPO."""
    modulation_bound: float = setting(0.2, between(0, 1))
    """How far from 1 its factor may lie."""
    grpo_weight: float = setting(0.0, between(0, 1))
    """lambda of lambda * GRPO + (1 - lambda) * SDPO (equation 3 of the paper, with 0.9), each by
    its own reduction and GRPO with its default clips: 0 is SDPO, 1 is GRPO."""
    route: Literal["none", "outcome", "positive"] = "none"
    """`outcome`: failures with a teacher are distilled, all else goes to GRPO, under one
    denominator (SRPO, arXiv 2604.02288). `positive`: distill only where the advantage is above 0
    (SDPG, arXiv 2606.04036), beside GRPO by `grpo_weight`."""
    distillation_warmup_steps: int = setting(0, at_least(0))
    """Steps over which the distillation's coefficient rises to 1 (SDPG)."""
    distillation_decay_steps: int = setting(0, at_least(0))
    """Last steps over which it falls; the last step has none."""
    token_weights: Literal["none", "teacher_entropy", "disagreement"] = "none"
    """`teacher_entropy`: exp(-beta H(q)) over its mean (SRPO); `disagreement`: less where the two
    distributions are apart (DemoPSD, arXiv 2607.02502)."""
    token_weight_beta: float = setting(1.0, at_least(0))
    """1 in SRPO; as a divergence is at most 0.69, `disagreement` needs 5 or more to say much."""
    disagreement_reduction: float = setting(0.5, between(0, 1))
    """Most that `disagreement` takes off a token's weight."""
    question_weights: Literal["none", "pass_rate"] = "none"
    """`pass_rate`: sqrt(p (1 - p)) of the group over its batch mean (SC-SDPO, arXiv 2605.27765)."""
    question_weight_floor: float = setting(0.1, at_least(0))
    """Of sqrt(p (1 - p)): without it a group that all passed or all failed is not learned from."""
    skip_first_tokens: int = setting(0, at_least(0))
    """Tokens at a response's start that are left out (SDFT, arXiv 2601.19897, leaves out 3)."""
    reference_kl: float = setting(0.0, at_least(0))
    """Coefficient of the KL to the initial model without context, on every token that counts."""

    @property
    def depends_on_steps(self) -> bool:
        """Whether the distillation's coefficient falls over the last steps."""
        return self.distillation_decay_steps > 0

    def check(self, config: Config) -> Iterator[Problem]:
        """Yields what leaves the teacher without a context, and switches that do not combine."""
        yield from self._check_context(config)
        yield from self._check_credit()
        if self.route == "outcome" and self.grpo_weight:
            expected = '0 with route "outcome": each rollout is in one term'
            yield Problem("objective.grpo_weight", expected, ("objective.route",))
        limit = config.rollout.max_response_tokens
        if self.skip_first_tokens >= limit:
            key = "rollout.max_response_tokens"
            yield Problem("objective.skip_first_tokens", f"below {key} ({limit})", (key,))
        has_advantages = self.grpo_weight > 0 or self.route != "none" or self.credit == "modulated"
        if has_advantages and config.rollout.rollouts_per_prompt < 2:
            expected = "at least 2: an advantage compares siblings"
            others = ("objective.grpo_weight", "objective.route")
            yield Problem("rollout.rollouts_per_prompt", expected, others)

    def _check_context(self, config: Config) -> Iterator[Problem]:
        teacher = config.teacher
        if teacher.demonstration == "none" and not teacher.feedback:
            expected = '"first", "shortest" or "random", or teacher.feedback = true: '
            expected += "the teacher would see what the student sees"
            yield Problem("teacher.demonstration", expected, ("teacher.feedback",))
        shows_siblings = teacher.demonstration != "none" and teacher.exclude_own_success
        if shows_siblings and config.rollout.rollouts_per_prompt < 2:
            expected = "at least 2 (a demonstration is a sibling's), "
            expected += 'or teacher.demonstration = "none"'
            others = ("teacher.demonstration", "teacher.exclude_own_success")
            yield Problem("rollout.rollouts_per_prompt", expected, others)

    def _check_credit(self) -> Iterator[Problem]:
        others = ("objective.credit",)
        if self.credit == "token" and self.alpha != 1:
            expected = '1 with credit "token": only it has that form'
            yield Problem("objective.alpha", expected, others)
        if self.credit == "token" and self.top_k:
            yield Problem("objective.top_k", '0 with credit "token": it has no support', others)
        if self.credit not in ("logit", "token") and self.token_weights != "none":
            yield Problem("objective.token_weights", f'"none" with credit "{self.credit}"', others)
        if self.credit != "modulated":
            return
        for name, value in (("route", self.route), ("question_weights", self.question_weights)):
            if value != "none":
                yield Problem(f"objective.{name}", '"none" with credit "modulated"', others)
        if self.grpo_weight:
            expected = '0 with credit "modulated": every rollout has GRPO\'s advantage already'
            yield Problem("objective.grpo_weight", expected, others)


@dataclass(frozen=True)
class GrpoConfig(ObjectiveConfig):
    """Group-relative policy optimisation, with the paper's improvements to its baseline."""

    name: Literal["grpo"] = "grpo"
    clip_low: float = setting(0.2, PROPER_SHARE)
    clip_high: float = setting(0.28, above(0))
    dual_clip: float = setting(3.0, above(1))
    reduction: Literal["token_mean", "sequence_mean"] = "token_mean"
    reference_kl: float = setting(0.0, at_least(0))
    """Coefficient of the KL to the initial model, on every token that counts (arXiv 2402.03300)."""

    def check(self, config: Config) -> Iterator[Problem]:
        """Yields a group of one, which has no advantage."""
        if config.rollout.rollouts_per_prompt < 2:
            expected = "at least 2 with grpo: an advantage compares siblings"
            yield Problem("rollout.rollouts_per_prompt", expected)


@dataclass(frozen=True)
class SftConfig(ObjectiveConfig):
    """Cross-entropy on demonstrations; needs `[data]` and no environment."""

    learns_from = "demonstrations"
    samples = False

    name: Literal["sft"] = "sft"
    reduction: Literal["token_mean", "sequence_mean"] = "token_mean"


@dataclass(frozen=True)
class SdftConfig(ObjectiveConfig):
    """Self-distillation from demonstrations that the teacher is shown (SDFT, arXiv 2601.19897).

    Questions come from `[data]`, `data.rows_per_step` a step; the student answers each
    `rollout.rollouts_per_prompt` times. Nothing is graded, and a response that was cut off is kept,
    as in the authors' code.
    """

    learns_from = "demonstrations"
    has_teacher = True

    name: Literal["sdft"] = "sdft"
    alpha: float = setting(0.0, between(0, 1))
    """0: KL(teacher || student), which the paper's results used (its code's default; so the authors
    in April 2026); 1: KL(student || teacher), which the paper's text says; between:
    generalised Jensen-Shannon."""
    top_k: int = setting(0, at_least(0))
    """Compare on the student's likeliest tokens, the rest in one bucket; 0 compares the whole
    vocabulary, as the paper does."""
    importance_cap: float = setting(2.0, above(0))
    """A response's weight is the mean over its tokens of min(ratio, cap), detached; ratio is new to
    rollout probability."""
    skip_first_tokens: int = setting(3, at_least(0))
    """First tokens of a response, left out of its loss: there a demonstration's opening is
    copied."""
    closing: Literal["own", "correct"] = "own"
    """What the teacher's prompt ends in: a request for an answer of one's own, as in the paper, or
    for a correct one, `sdpo`'s sentence: the only one that the embedded model has learned."""
    reduction: Literal["token_mean", "sequence_mean"] = "sequence_mean"
    """Mean over active tokens or over rows of token means (the authors' code)."""

    def check(self, config: Config) -> Iterator[Problem]:
        """Yields a skipped start that is as long as a response."""
        limit = config.rollout.max_response_tokens
        if self.skip_first_tokens >= limit:
            key = "rollout.max_response_tokens"
            expected = f"below {key} ({limit}): no token would be left to learn from"
            yield Problem("objective.skip_first_tokens", expected, (key,))
