"""Checks of a config's values: each against its range, and against the other settings."""

import math
from collections.abc import Iterator

from sdpo_jax.config import Config, Problem, TeacherConfig
from sdpo_jax.config.resolved import flatten, toml_value, walk


def problems(config: Config) -> list[str]:
    """Lists what is wrong with a config's values, each as `key: value, expected ...`."""
    found, values = [*out_of_range(config), *contradictions(config)], flatten(config)
    return [f"{p.key}: {toml_value(values[p.key])}, expected {p.expected}" for p in found]


def out_of_range(config: Config) -> Iterator[Problem]:
    """Yields the numbers that are outside their field's range."""
    for key, own, value in walk(config):
        permitted = own.metadata.get("range")
        if permitted is not None and not permitted.holds(value):
            yield Problem(key, permitted.words)


def contradictions(config: Config) -> Iterator[Problem]:
    """Yields the settings that do not fit others; the ranges are not checked again."""
    yield from _batch_checks(config)
    yield from _schedule_checks(config)
    yield from _rollout_checks(config)
    if config.objective.has_teacher:
        yield from _teacher_checks(config)
    yield from config.objective.check(config)
    yield from config.environment.check(config)


def _batch_checks(c: Config) -> Iterator[Problem]:
    # How many prompts a file holds is not known before it is read.
    values = flatten(c)
    train_prompts = values.get("environment.train_prompts", math.inf)
    held_out_prompts = values.get("environment.held_out_prompts", math.inf)
    rows, rows_key = c.rollout.prompts_per_step, "rollout.prompts_per_step"
    if c.objective.learns_from == "demonstrations":
        rows, rows_key = c.data.rows_per_step, "data.rows_per_step"
    elif rows > train_prompts:
        other = "environment.train_prompts"
        yield Problem(rows_key, f"at most {other} ({train_prompts})", (other,))
    if c.train.mini_batches > 0 and rows % c.train.mini_batches:
        yield Problem("train.mini_batches", f"a divisor of {rows_key} ({rows})", (rows_key,))
    if c.evaluation.prompts > held_out_prompts:
        other = "environment.held_out_prompts"
        yield Problem("evaluation.prompts", f"at most {other} ({held_out_prompts})", (other,))


def _schedule_checks(c: Config) -> Iterator[Problem]:
    updates = c.train.steps * c.train.mini_batches
    if c.optimizer.schedule == "cosine" and c.optimizer.warmup_steps >= updates:
        expected = f"below the run's {updates} updates with the cosine schedule"
        others = ("train.steps", "train.mini_batches", "optimizer.schedule")
        yield Problem("optimizer.warmup_steps", expected, others)


def _rollout_checks(c: Config) -> Iterator[Problem]:
    off_policy, several_turns = c.rollout.one_step_off_policy, c.rollout.max_turns > 1
    if c.objective.learns_from == "demonstrations" and (off_policy or several_turns):
        key = "rollout.one_step_off_policy" if off_policy else "rollout.max_turns"
        value = "false" if off_policy else "1"
        expected = f"{value} with {c.objective.name}: nothing is graded"
        yield Problem(key, expected, ("objective.name",))
    elif off_policy and several_turns:
        other = "rollout.one_step_off_policy"
        expected = f"1 with {other}: a later turn waits for the environment's answer"
        yield Problem("rollout.max_turns", expected, (other,))


def _teacher_checks(c: Config) -> Iterator[Problem]:
    question = c.rollout.max_prompt_tokens
    if c.teacher.max_prompt_tokens < question:
        other = "rollout.max_prompt_tokens"
        expected = f"at least {other} ({question}): the teacher's prompt repeats the question"
        yield Problem("teacher.max_prompt_tokens", expected, (other,))
    if c.teacher.control == "shuffled" and c.rollout.prompts_per_step < 2:
        expected = "at least 2: another question's context is shown"
        yield Problem("rollout.prompts_per_step", expected, ("teacher.control",))
    if c.teacher.weights == "refreshed" and c.teacher.return_drop > 0:
        yield from _rollback_checks(c.teacher)


def _rollback_checks(teacher: TeacherConfig) -> Iterator[Problem]:
    """A rollback needs a refresh and a full window of steps after it."""
    if teacher.refresh == "never":
        expected = '0 with teacher.refresh = "never": no teacher comes before the first'
        yield Problem("teacher.return_drop", expected, ("teacher.refresh",))
    elif teacher.refresh_window > teacher.refresh_steps:
        expected = f"at most teacher.refresh_steps ({teacher.refresh_steps}), "
        expected += "or the last teacher would never be restored"
        others = ("teacher.refresh_steps", "teacher.return_drop")
        yield Problem("teacher.refresh_window", expected, others)
