"""Held-out accuracy of the student, and of the teacher with its context.

The student answers each prompt `samples_per_prompt` times (avg@k). Where an attempt has a context
(a sibling's success, feedback), the teacher answers the re-prompt once: teacher accuracy is the
share of those answers that pass, the measure of the paper's figure 10.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from sdpo_jax.config import Config, SdftObjective
from sdpo_jax.environments.base import Environment, HasReferences, Outcome, Prompt
from sdpo_jax.environments.grading import agreed, failed_share, grade_all, refuse_failures
from sdpo_jax.model import Params
from sdpo_jax.sampling.prompts import prompt_ids
from sdpo_jax.sampling.sampler import Sampler
from sdpo_jax.teacher.context import TeacherContext, choose_context
from sdpo_jax.teacher.prompts import TeacherPrompts
from sdpo_jax.tokens import Tokenizer

EVALUATION_STREAM = 1 << 30
"""Added to the step, so that evaluation never draws with the keys of training."""
TEACHER_STREAM = 3 << 29


class Graded(NamedTuple):
    """Responses with what the environment says of them; row `n` belongs to prompt `n // G`."""

    responses: list[str]
    outcomes: list[Outcome]
    lengths: list[int]
    stopped: list[bool]


class Evaluator:
    """Evaluates on the held-out prompts of an environment."""

    def __init__(
        self,
        config: Config,
        sampler: Sampler,
        tokenizer: Tokenizer,
        environment: Environment,
        teacher_prompts: TeacherPrompts,
    ):
        self._config, self._sampler, self._tokenizer = config, sampler, tokenizer
        self._environment, self._teacher_prompts = environment, teacher_prompts
        self._prompts = list(environment.held_out)[: config.evaluation.prompts]
        limit = config.rollout.max_prompt_tokens
        self._ids = [prompt_ids(tokenizer, p, limit) for p in self._prompts]

    @property
    def prompts(self) -> list[Prompt]:
        """The held-out prompts that are evaluated."""
        return self._prompts

    @property
    def asks_teacher(self) -> bool:
        """Whether the recipe wants the teacher's accuracy, too."""
        return self._config.evaluation.teacher

    def __call__(self, params: Params, teacher_params: Params, step: int) -> dict[str, float]:
        """Metrics of the student and, if wanted and there is one, of the teacher in context."""
        if not self._prompts:  # evaluation.prompts = 0
            return {}
        graded = self.attempts(params, step)
        metrics = accuracy_metrics(graded, self._prompts)
        if teacher_params is not None and self.asks_teacher:
            metrics |= self.teacher_metrics(teacher_params, graded, step)
        return metrics

    def attempts(
        self,
        params: Params,
        step: int,
        *,
        temperature: float | None = None,
        samples: int | None = None,
    ) -> Graded:
        """The student's answers to the bare prompts."""
        settings = self._config.evaluation
        group = settings.samples_per_prompt if samples is None else samples
        heat = settings.temperature if temperature is None else temperature
        return self._sample(params, self._ids, group, heat, EVALUATION_STREAM + step)

    def teacher_metrics(self, params: Params, graded: Graded, step: int) -> dict[str, float]:
        """Teacher accuracy over the attempts that have a context, overall and by its kind."""
        group = len(graded.responses) // len(self._prompts)
        contexts = self._contexts(graded, group)
        rows = [i for i, context in enumerate(contexts) if context is not None]
        if not rows:
            return {}
        prompts = [self._prompts[i // group] for i in rows]
        shown: list[TeacherContext] = [c for c in contexts if c is not None]
        ids, _ = self._teacher_prompts([p.messages for p in prompts], shown)
        answers = self._sample_rows(params, prompts, ids, TEACHER_STREAM + step)
        metrics = {"teacher_accuracy": _mean([o.passed for o in answers.outcomes if o.graded])}
        for name, chosen in (
            ("demonstration", [c.demonstration is not None for c in shown]),
            ("feedback", [c.demonstration is None for c in shown]),
        ):
            pairs = zip(answers.outcomes, chosen, strict=True)
            of_kind = [o.passed for o, is_kind in pairs if is_kind and o.graded]
            if of_kind:
                metrics[f"teacher_accuracy/{name}"] = _mean(of_kind)
        return metrics

    def _contexts(self, graded: Graded, group: int) -> Sequence[TeacherContext | None]:
        """What each attempt's teacher sees: under `sdft` a demonstration, the environment's own."""
        if not isinstance(self._config.objective, SdftObjective):
            teacher, seed = self._config.teacher, self._config.seed
            return choose_context(graded.outcomes, graded.responses, group, teacher, seed=seed)
        environment = self._environment
        if not isinstance(environment, HasReferences):
            return []
        return [
            TeacherContext(environment.reference(p), None)
            for p in self._prompts
            for _ in range(group)
        ]

    def _sample_rows(
        self, params: Params, prompts: Sequence[Prompt], ids: Sequence[list[int]], step: int
    ) -> Graded:
        return self._sample(params, ids, 1, self._config.evaluation.temperature, step, prompts)

    def _sample(
        self,
        params: Params,
        ids: Sequence[list[int]],
        group: int,
        temperature: float,
        step: int,
        prompts: Sequence[Prompt] | None = None,
    ) -> Graded:
        """Decodes in batches of a fixed number of prompts, so that one program serves all."""
        prompts = self._prompts if prompts is None else prompts
        size = max(1, self._config.evaluation.batch_prompts * (1 if group > 1 else 2))
        graded = Graded([], [], [], [])
        for start in range(0, len(ids), size):
            batch = [list(x) for x in ids[start : start + size]]
            rollouts = self._sampler(
                params,
                batch,
                group=group,
                max_tokens=self._config.rollout.max_response_tokens,
                temperature=temperature,
                top_p=self._config.evaluation.top_p,
                top_k=self._config.evaluation.top_k,
                min_p=self._config.evaluation.min_p,
                seed=self._config.seed,
                step=step,
                first_prompt=start,
                prompt_rows=size,
            )
            texts = [self._tokenizer.decode(ids) for ids in rollouts.responses()]
            graded.responses.extend(texts)
            asked = prompts[start : start + size]
            truncated = [not stopped for stopped in rollouts.stopped.tolist()]
            outcomes = agreed(grade_all(self._environment, asked, texts, truncated))
            limit = self._config.environment.max_failed_share
            refuse_failures(asked, outcomes, limit, "evaluation")
            graded.outcomes.extend(outcomes)
            graded.lengths.extend(rollouts.lengths.tolist())
            graded.stopped.extend(rollouts.stopped.tolist())
        return graded


def accuracy_metrics(graded: Graded, prompts: Sequence[Prompt]) -> dict[str, float]:
    """Accuracy overall and by family, response length and truncation.

    Responses that could not be graded have no part in accuracy; `environment/failed`, there only
    where there are some, says how many.
    """
    group = len(graded.responses) // len(prompts)
    families: dict[str, list[bool]] = {}
    for i, outcome in enumerate(graded.outcomes):
        family = str(prompts[i // group].data.get("family", ""))
        if outcome.graded:
            families.setdefault(family, []).append(outcome.passed)
    metrics = {
        "accuracy": _mean([outcome.passed for outcome in graded.outcomes if outcome.graded]),
        "response_tokens": _mean(graded.lengths),
        "truncated": 1.0 - _mean(graded.stopped),
    }
    if len(families) > 1:
        metrics |= {f"accuracy/{name}": _mean(v) for name, v in sorted(families.items())}
    if failed := failed_share(graded.outcomes):
        metrics["environment/failed"] = failed
    return metrics


def environment_metrics(outcomes: Sequence[Outcome]) -> Mapping[str, float]:
    """Means of what the environment reports besides reward, of what it could grade."""
    outcomes = [outcome for outcome in outcomes if outcome.graded]
    names = sorted({name for outcome in outcomes for name in outcome.metrics})
    return {
        f"environment/{name}": _mean([o.metrics[name] for o in outcomes if name in o.metrics])
        for name in names
    }


def _mean(values: Sequence[float] | Sequence[bool] | Sequence[int]) -> float:
    return sum(values) / len(values) if values else 0.0
