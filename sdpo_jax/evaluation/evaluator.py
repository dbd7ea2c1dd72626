"""Held-out accuracy of the student, and of the teacher with its context.

The student answers each prompt `samples_per_prompt` times (avg@k). Where an attempt has a context
(a sibling's success, feedback), the teacher answers the re-prompt once: teacher accuracy is the
share of those answers that pass, the measure of the paper's figure 10. What is reported, and from
what it is computed, stands in `measures`.
"""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from sdpo_jax.config import Config
from sdpo_jax.environments.base import Environment, HasReferences, Prompt
from sdpo_jax.environments.grading import OpenEpisodes, answers_of, refuse_failures
from sdpo_jax.environments.retries import with_episodes
from sdpo_jax.evaluation.measures import (
    Graded,
    Measures,
    plain_numbers,
    student_measures,
    teacher_measures,
    values,
)
from sdpo_jax.model import Params
from sdpo_jax.rollouts.diagnostics import repeated_share
from sdpo_jax.rollouts.episodes import Episode, Limits, run_episodes
from sdpo_jax.rollouts.prompts import prompt_ids
from sdpo_jax.rollouts.sampler import Sampler
from sdpo_jax.teacher.context import TeacherContext
from sdpo_jax.teacher.contexts import ContextBuilder, SiblingContexts
from sdpo_jax.teacher.prompts import TeacherPrompts
from sdpo_jax.tokens import Tokenizer

EVALUATION_STREAM = 1 << 30
"""Added to the step, so that evaluation never draws with the keys of training."""
TEACHER_STREAM = 3 << 29


Compare = Callable[[Params, Params, Sequence[list[int]], Sequence[Sequence[int]]], dict[str, float]]
"""`(student, teacher, prompt_ids[N], response_ids[N]) -> metrics` of both weights."""


class Evaluator:
    """Evaluates on the held-out prompts of an environment."""

    def __init__(
        self,
        config: Config,
        sampler: Sampler,
        tokenizer: Tokenizer,
        environment: Environment,
        teacher_prompts: TeacherPrompts,
        contexts: ContextBuilder | None,
    ):
        """`contexts` chooses what the teacher sees, as in training; None: SDPO's contexts.

        Where a builder wants demonstrations, held-out prompts carry the environment's own answers.
        """
        self._contexts = contexts or SiblingContexts(config.teacher)
        self._config, self._sampler, self._tokenizer = config, sampler, tokenizer
        self._environment, self._teacher_prompts = environment, teacher_prompts
        self.prompts: list[Prompt] = list(environment.held_out)[: config.evaluation.prompts]
        """The held-out prompts that are evaluated."""
        self.asks_teacher = config.evaluation.teacher
        """Whether the recipe wants the teacher's accuracy, too."""
        limit = config.rollout.max_prompt_tokens
        self._ids = [prompt_ids(tokenizer, p, limit) for p in self.prompts]

    def __call__(
        self, params: Params, teacher_params: Params, step: int, compare: Compare | None = None
    ) -> dict[str, float]:
        """Metrics of the student and, if wanted and there is one, of the teacher in context.

        `compare` sees the answers to the first `evaluation.batch_prompts` prompts.
        """
        if not self.prompts:  # evaluation.prompts = 0
            return {}
        graded = self.attempts(params, step)
        metrics = accuracy_metrics(graded, self.prompts, self.answers(graded))
        if teacher_params is not None and self.asks_teacher:
            metrics |= values(self.teacher_measures(teacher_params, graded, step))
            if compare is not None and graded.ids:
                asked = self._ids[: self._config.evaluation.batch_prompts]
                group = len(graded.ids) // len(self.prompts)
                rows = [list(ids) for ids in asked for _ in range(group)]
                metrics |= compare(params, teacher_params, rows, graded.ids[: len(rows)])
        return metrics

    def attempts(
        self,
        params: Params,
        step: int,
        *,
        temperature: float | None = None,
        samples: int | None = None,
    ) -> Graded:
        """The student's answers to the bare prompts, in episodes of up to `rollout.max_turns`."""
        settings = self._config.evaluation
        group = settings.samples_per_prompt if samples is None else samples
        temperature = settings.temperature if temperature is None else temperature
        turns, step = self._config.rollout.max_turns, EVALUATION_STREAM + step
        return self._sample(params, self._ids, group, temperature, step, self.prompts, turns)

    def answers(self, graded: Graded) -> list[str | None] | None:
        """What each response votes for; None where the environment knows no answers."""
        return answers_of(self._environment, self.prompts, graded.responses)

    def teacher_measures(self, params: Params, graded: Graded, step: int) -> Measures:
        """Asks the teacher once for each attempt that has a context; overall and by its kind."""
        group = len(graded.responses) // len(self.prompts)
        asked, seed = self._with_demonstrations(), self._config.seed
        contexts = self._contexts(asked, group, graded.outcomes, graded.responses, seed=seed)
        rows = [i for i, context in enumerate(contexts) if context is not None]
        if not rows:
            return {}
        prompts = [self.prompts[i // group] for i in rows]
        shown: list[TeacherContext] = [c for c in contexts if c is not None]
        ids, _ = self._teacher_prompts([p.messages for p in prompts], shown)
        # One response to each, however many turns the student has.
        temperature, step = self._config.evaluation.temperature, TEACHER_STREAM + step
        answers = self._sample(params, ids, 1, temperature, step, prompts, 1)
        kinds = [context.kind for context in shown]
        return teacher_measures(graded, answers, rows, kinds, len(self.prompts))

    def _with_demonstrations(self) -> list[Prompt]:
        """Held-out prompts as a context builder sees those of training."""
        environment = self._environment
        learns_from_them = self._config.objective.learns_from == "demonstrations"
        if not learns_from_them or not isinstance(environment, HasReferences):
            return self.prompts
        return [
            prompt._replace(data={**prompt.data, "demonstration": environment.reference(prompt)})
            for prompt in self.prompts
        ]

    def _sample(
        self,
        params: Params,
        ids: Sequence[list[int]],
        group: int,
        temperature: float,
        step: int,
        prompts: Sequence[Prompt],
        turns: int,
    ) -> Graded:
        """Decodes in batches of a fixed number of prompts, so that one program serves all."""
        size = max(1, self._config.evaluation.batch_prompts * (1 if group > 1 else 2))
        limits = Limits(turns, self._config.teacher.max_feedback_tokens, self._config.rollout.slots)
        environment, played = with_episodes(self._environment, turns), list[Episode]()
        for start in range(0, len(ids), size):
            batch = [list(x) for x in ids[start : start + size]]
            asked = prompts[start : start + size]
            episodes = OpenEpisodes(environment, [p for p in asked for _ in range(group)])
            sample = partial(
                self._sampler,
                params,
                max_tokens=self._config.rollout.max_response_tokens,
                temperature=temperature,
                top_p=self._config.evaluation.top_p,
                top_k=self._config.evaluation.top_k,
                min_p=self._config.evaluation.min_p,
                seed=self._config.seed,
                step=step,
            )
            rows = run_episodes(
                sample,
                episodes,
                self._tokenizer,
                limits,
                asked,
                batch,
                group=group,
                first_prompt=start,
                prompt_rows=size,
            )
            limit = self._config.environment.max_failed_share
            refuse_failures(asked, [row.outcome for row in rows], limit, "evaluation")
            played += rows
        return _graded(played, several_turns=turns > 1, greedy=not temperature)


def _graded(rows: Sequence[Episode], *, several_turns: bool, greedy: bool) -> Graded:
    return Graded(
        [row.response for row in rows],
        [row.outcome for row in rows],
        [row.sampled_tokens for row in rows],
        [row.stopped for row in rows],
        () if greedy else [float(np.sum(row.log_probs, dtype=np.float64)) for row in rows],
        [repeated_share(row.sampled_ids) for row in rows],
        [row.steps[0].outcome for row in rows] if several_turns else (),
        [row.turns for row in rows] if several_turns else (),
        () if several_turns else [row.sampled_ids for row in rows],
    )


def accuracy_metrics(
    graded: Graded, prompts: Sequence[Prompt], answers: Sequence[str | None] | None = None
) -> dict[str, float]:
    """Values of `student_measures` for `k` = samples per prompt, and quantiles of the length.

    Responses that could not be graded have no part in it; `environment/failed`, there only where
    there are some, says how many.
    """
    group = len(graded.responses) // len(prompts)
    measures = student_measures(graded, prompts, answers, ks=(group,) if group > 1 else ())
    return values(measures) | plain_numbers(graded)
