"""What a setting's value must be, alone and beside others; `recipe.py` reports what is not."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from typing import Any

from sdpo_jax.config import (
    Config,
    Demonstrated,
    EnvironmentConfig,
    GrpoObjective,
    SdftObjective,
    SdpoObjective,
    TeacherConfig,
)

_COUNTS = """environment.train_prompts environment.held_out_prompts rollout.prompts_per_step
    rollout.rollouts_per_prompt rollout.max_prompt_tokens rollout.max_response_tokens
    teacher.max_prompt_tokens teacher.max_feedback_tokens data.rows_per_step data.max_tokens
    teacher.refresh_steps teacher.refresh_window optimizer.max_skipped_updates train.steps
    train.mini_batches train.micro_batch_tokens
    train.head_chunk_tokens mesh.fsdp mesh.tensor evaluation.samples_per_prompt
    evaluation.batch_prompts checkpoint.every_steps checkpoint.keep rollout.max_turns"""
_SHARE = "above 0, at most 1"
_CAPS = "objective.importance_cap objective.clip_high optimizer.clip_norm"

# Keys, test, expectation in words. Every number of the config stands here once; nan fails all.
_RANGES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    (_COUNTS, lambda v: v >= 1, "at least 1"),
    ("mesh.data", lambda v: v >= 1 or v == -1, "at least 1, or -1 for what is left"),
    (
        "optimizer.warmup_steps evaluation.every_steps evaluation.prompts "
        "environment.max_prompt_characters lora.rank objective.top_k rollout.slots "
        "evaluation.top_k environment.slots environment.workers teacher.success_buffer "
        "objective.skip_first_tokens objective.distillation_warmup_steps "
        "objective.distillation_decay_steps",
        lambda v: v >= 0,
        "0 or more",
    ),
    ("seed environment.seed", lambda v: 0 <= v < 2**32, "from 0 to 4294967295"),
    (
        "objective.alpha teacher.ema_rate teacher.trust_region evaluation.min_p "
        "environment.max_failed_share objective.grpo_weight objective.modulation "
        "objective.modulation_bound objective.disagreement_reduction",
        lambda v: 0 <= v <= 1,
        "from 0 to 1",
    ),
    ("optimizer.b1 optimizer.b2", lambda v: 0 <= v < 1, "from 0 to below 1"),
    ("objective.control_probability teacher.refresh_fraction", lambda v: 0 < v <= 1, _SHARE),
    ("evaluation.top_p environment.public_share", lambda v: 0 < v <= 1, _SHARE),
    (
        "objective.clip_low environment.held_out_share",
        lambda v: 0 < v < 1,
        "above 0 and below 1",
    ),
    (_CAPS, lambda v: v > 0, "above 0"),
    ("objective.dual_clip", lambda v: v > 1, "above 1"),
    (
        "rollout.temperature optimizer.learning_rate lora.alpha environment.deadline_seconds",
        lambda v: 0 < v < math.inf,
        "above 0, finite",
    ),
    (
        "evaluation.temperature optimizer.weight_decay teacher.refresh_gain teacher.refresh_length "
        "teacher.return_drop objective.token_weight_beta objective.question_weight_floor "
        "objective.reference_kl",
        lambda v: 0 <= v < math.inf,
        "0 or more",
    ),
    ("teacher.success_threshold", math.isfinite, "a finite number"),
)


def out_of_range(leaves: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yields the keys whose value is none of its kind, with what is expected."""
    for keys, holds, expectation in _RANGES:
        for key in keys.split():
            if key in leaves and not holds(leaves[key]):
                yield key, expectation


def contradictions(c: Config) -> Iterator[tuple[str, str, str]]:
    """Yields key, the other keys that take part, expectation."""
    prompts, (total, held_out) = c.rollout.prompts_per_step, _prompt_counts(c.environment)
    rows, rows_key = prompts, "rollout.prompts_per_step"
    if isinstance(c.objective, Demonstrated):
        rows, rows_key = c.data.rows_per_step, "data.rows_per_step"
    elif prompts > total:
        yield rows_key, "environment.train_prompts", f"at most environment.train_prompts ({total})"
    if c.train.mini_batches > 0 and rows % c.train.mini_batches:
        yield "train.mini_batches", rows_key, f"a divisor of {rows_key} ({rows})"
    if c.evaluation.prompts > held_out:
        others = "environment.held_out_prompts"
        yield "evaluation.prompts", others, f"at most {others} ({held_out})"
    updates = c.train.steps * c.train.mini_batches
    if c.optimizer.schedule == "cosine" and c.optimizer.warmup_steps >= updates:
        text = f"below the run's {updates} updates with the cosine schedule"
        others = "train.steps train.mini_batches optimizer.schedule"
        yield "optimizer.warmup_steps", others, text
    if isinstance(c.objective, GrpoObjective) and c.rollout.rollouts_per_prompt < 2:
        text = "at least 2 with grpo: an advantage compares siblings"
        yield "rollout.rollouts_per_prompt", "", text
    if isinstance(c.objective, Demonstrated) and (c.rollout.ahead or c.rollout.max_turns > 1):
        key = "rollout.ahead" if c.rollout.ahead else "rollout.max_turns"
        text = f"{'false' if c.rollout.ahead else 1} with {c.objective.name}: nothing is graded"
        yield key, "objective.name", text
    elif c.rollout.ahead and c.rollout.max_turns > 1:
        text = "1 with rollout.ahead: a later turn waits for what the environment says"
        yield "rollout.max_turns", "rollout.ahead", text
    if isinstance(c.objective, SdpoObjective):
        yield from _teacher_checks(c)
    if isinstance(c.objective, SdpoObjective | SdftObjective):
        yield from _reprompt_checks(c)
    if isinstance(c.objective, SdpoObjective):
        yield from _switch_checks(c, c.objective)
    if isinstance(c.objective, SdftObjective):
        limit = c.rollout.max_response_tokens
        if c.objective.skip_first_tokens >= limit:
            others = "rollout.max_response_tokens"
            text = f"below {others} ({limit}): no token would be left to learn from"
            yield "objective.skip_first_tokens", others, text


def _prompt_counts(environment: EnvironmentConfig) -> tuple[float, float]:
    """Prompts to learn from and to evaluate on; those of a file are not known before it is read."""
    own = {f.name: getattr(environment, f.name) for f in fields(environment)}
    return own.get("train_prompts", math.inf), own.get("held_out_prompts", math.inf)


def _teacher_checks(c: Config) -> Iterator[tuple[str, str, str]]:
    shown = c.teacher.demonstration != "none"
    if not shown and not c.teacher.feedback:
        text = '"first", "shortest" or "random", or teacher.feedback = true: '
        text += "the teacher would see what the student sees"
        yield "teacher.demonstration", "teacher.feedback", text
    if shown and c.teacher.exclude_own_success and c.rollout.rollouts_per_prompt < 2:
        others = "teacher.demonstration teacher.exclude_own_success"
        text = 'at least 2 (a demonstration is a sibling\'s), or teacher.demonstration = "none"'
        yield "rollout.rollouts_per_prompt", others, text


def _reprompt_checks(c: Config) -> Iterator[tuple[str, str, str]]:
    question = c.rollout.max_prompt_tokens
    if c.teacher.max_prompt_tokens < question:
        others = "rollout.max_prompt_tokens"
        text = f"at least {others} ({question}): the re-prompt repeats the question"
        yield "teacher.max_prompt_tokens", others, text
    if c.teacher.control == "shuffled" and c.rollout.prompts_per_step < 2:
        others = "teacher.control"
        yield "rollout.prompts_per_step", others, "at least 2: another question's context is shown"
    if c.teacher.weights == "refreshed":
        yield from _return_checks(c.teacher)


def _return_checks(teacher: TeacherConfig) -> Iterator[tuple[str, str, str]]:
    """A return is judged on a whole window of steps after a refresh, so there must be both."""
    if teacher.return_drop > 0 and teacher.refresh == "never":
        text = '0 with teacher.refresh = "never": no teacher comes before the first'
        yield "teacher.return_drop", "teacher.refresh", text
    elif teacher.return_drop > 0 and teacher.refresh_window > teacher.refresh_steps:
        text = f"at most teacher.refresh_steps ({teacher.refresh_steps}), or no return is ever seen"
        yield "teacher.refresh_window", "teacher.refresh_steps teacher.return_drop", text


def _switch_checks(c: Config, o: SdpoObjective) -> Iterator[tuple[str, str, str]]:
    """Switches that say nothing together."""
    by_advantage = o.credit not in ("logit", "token")
    if o.credit == "token" and o.alpha != 1:
        yield "objective.alpha", "objective.credit", '1 with credit "token": only it has that form'
    if o.credit == "token" and o.top_k:
        yield "objective.top_k", "objective.credit", '0 with credit "token": it has no support'
    if by_advantage and o.token_weights != "none":
        text = f'"none" with credit "{o.credit}"'
        yield "objective.token_weights", "objective.credit", text
    if o.credit == "modulated":
        for key in ("route", "question_weights"):
            if getattr(o, key) != "none":
                text = '"none" with credit "modulated"'
                yield f"objective.{key}", "objective.credit", text
        if o.grpo_weight:
            text = '0 with credit "modulated": every rollout has GRPO\'s advantage already'
            yield "objective.grpo_weight", "objective.credit", text
    if o.route == "outcome" and o.grpo_weight:
        text = '0 with route "outcome": each rollout is in one term'
        yield "objective.grpo_weight", "objective.route", text
    if o.skip_first_tokens >= c.rollout.max_response_tokens:
        others = "rollout.max_response_tokens"
        text = f"below {others} ({c.rollout.max_response_tokens})"
        yield "objective.skip_first_tokens", others, text
    reinforced = o.grpo_weight > 0 or o.route != "none" or o.credit == "modulated"
    if reinforced and c.rollout.rollouts_per_prompt < 2:
        text = "at least 2: an advantage compares siblings"
        yield "rollout.rollouts_per_prompt", "objective.grpo_weight objective.route", text
