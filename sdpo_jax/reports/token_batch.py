"""The next generation batch of a run as rows of JSON: contexts, and log-probabilities by token.

`token_batch.jsonl` holds one object per line: first the batch (`"kind": "batch"`), then one line
per response (`"kind": "response"`) with its tokens. The heat-map is drawn from these rows. The
batch is the one that the run would train on next, with the same prompts and samples. Nothing is
trained and the run is not changed.

`grpo` and `sft` have no teacher: the student's weights take its place, with the contexts that
SDPO's teacher would see. Under `sft` the student answers the first prompts of the environment.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from sdpo_jax.environments.base import Environment, not_graded
from sdpo_jax.model import Params
from sdpo_jax.objectives.loss_weights import graded_advantages
from sdpo_jax.reports.token_records import Responses, TokenRecord, token_records
from sdpo_jax.rollouts.phase_timer import PhaseTimer
from sdpo_jax.rollouts.rollout_batch import RolloutBatch
from sdpo_jax.rollouts.sources import GradedRollouts
from sdpo_jax.run.checkpoint import Restored
from sdpo_jax.run.components import RunComponents, make_trainer
from sdpo_jax.run.restore import restore_run
from sdpo_jax.run.run_directory import write_atomically
from sdpo_jax.run.run_ref import RunRef
from sdpo_jax.teacher.context import TeacherContext
from sdpo_jax.teacher.contexts import SiblingContexts, context_seed
from sdpo_jax.tokens import Tokenizer
from sdpo_jax.training.trainer import Trainer

TOKEN_BATCH = "token_batch.jsonl"
_BROKEN_CHARACTER = "\ufffd"


class Shown(NamedTuple):
    """Contexts and teacher prompts of `N` responses."""

    contexts: list[TeacherContext | None]
    prompt_ids: list[list[int] | None]  # None where no context is left


def token_batch(
    run: RunRef, components: RunComponents, *, prompts: int, top: int
) -> list[dict[str, Any]]:
    """Samples the next batch of a run and compares student and teacher on it.

    Args:
      run: and which of its checkpoints.
      components: of the run.
      prompts: at most so many of the batch's prompts, the first ones.
      top: alternatives per token of student and of teacher.

    Returns:
      Rows as in the file.

    Raises:
      UserError: the run has no such checkpoint, or its environment fails too often.
    """
    trainer = make_trainer(run.config, components)
    restored = restore_run(trainer, run, components.params)
    return batch_of(trainer, restored, components, run=str(run.folder), prompts=prompts, top=top)


def batch_of(
    trainer: Trainer,
    restored: Restored,
    components: RunComponents,
    *,
    run: str,
    prompts: int,
    top: int,
) -> list[dict[str, Any]]:
    """`token_batch` of a state that is there.

    Raises:
      UserError: the environment fails too often.
    """
    config, tokenizer, step = trainer.config, trainer.tokenizer, restored.step + 1
    student = trainer.student(restored.state)
    teacher = trainer.teacher_params(restored.state, student)
    batch = _rollouts(trainer, restored, components.environment, student, prompts)
    shown = _shown(trainer, restored, batch, step)
    records = token_records(
        components.model,
        student,
        student if teacher is None else teacher,
        Responses(batch.prompt_ids, shown.prompt_ids, batch.response_ids),
        layout=trainer.layout,
        devices=trainer.devices,
        temperature=config.rollout.temperature,
        top=top,
        coefficient=None if trainer.teacher is None else trainer.teacher.coefficient,
    )
    head = {
        "kind": "batch",
        "run": run,
        "step": restored.step,
        "objective": config.objective.name,
        "teacher": "student" if trainer.teacher is None else config.teacher.weights,
        "temperature": config.rollout.temperature,
        "stop_ids": list(tokenizer.stop_ids),
    }
    return [head, *response_rows(batch, shown, records, tokenizer)]


def _rollouts(
    trainer: Trainer, restored: Restored, environment: Environment, student: Params, prompts: int
) -> RolloutBatch:
    """The rollouts of the next step; under `sft`, of the environment's first prompts."""
    source = trainer.source
    if trainer.config.objective.samples:
        source.set_state(restored.extra["data"])
    else:
        source = GradedRollouts(trainer.config, environment, trainer.tokenizer, trainer.sampler)
    return source(student, restored.step + 1, PhaseTimer(), first=prompts)[0]


def _shown(trainer: Trainer, restored: Restored, batch: RolloutBatch, step: int) -> Shown:
    """Contexts and teacher prompts by the rule of training; without a teacher, by SDPO's."""
    trainer.set_host_state(restored.extra.get("host", {}))
    build = trainer.contexts or SiblingContexts(trainer.config.teacher)
    seed = context_seed(trainer.config.seed, step)
    contexts = build(batch.prompts, batch.group, batch.outcomes, batch.texts, seed=seed)
    prompts = trainer.teacher_prompts.of_rollouts(batch.prompts, batch.group, contexts)
    return Shown(contexts, prompts)


def response_rows(
    batch: RolloutBatch, shown: Shown, records: Sequence[TokenRecord], tokenizer: Tokenizer
) -> list[dict[str, Any]]:
    """One row per response, in the order of the batch.

    `advantage` of a token is SDPO's, log q / p, null without a context; `grpo_advantage` of a row
    is GRPO's, reward minus the mean of its siblings. Where nothing is graded (`sdft`), it is 0.
    """
    if not batch.outcomes:
        nothing = not_graded("nothing grades the answers to demonstrations")
        batch = batch._replace(outcomes=[nothing] * len(batch.texts))
    grpo, decoded = graded_advantages(batch), cache(lambda token: tokenizer.decode([token]))
    rows: list[dict[str, Any]] = []
    for i, (outcome, record) in enumerate(zip(batch.outcomes, records, strict=True)):
        prompt, context = batch.prompts[i // batch.group], shown.contexts[i]
        ids = shown.prompt_ids[i]
        rows.append(
            {
                "kind": "response",
                "row": i,
                "prompt_id": prompt.id,
                "prompt": [dict(message) for message in prompt.messages],
                "response": batch.texts[i],
                "reward": float(outcome.reward),
                "passed": bool(outcome.passed),
                "graded": outcome.graded,
                "feedback": outcome.feedback,
                "shown": context._asdict() if context is not None and ids is not None else None,
                "teacher_prompt": None if ids is None else tokenizer.decode(ids),
                "grpo_advantage": float(grpo[i]),
                "tokens": token_rows(record, tokenizer, decoded),
            }
        )
    return rows


def token_rows(
    record: TokenRecord, tokenizer: Tokenizer, decoded: Callable[[int], str]
) -> list[dict[str, Any]]:
    """Text, log p, log q, advantage and candidates of each token, likeliest candidate first.

    The text is what the token adds to the response. It is empty for control tokens and for a token
    that begins a character that a later token completes. `decoded` is the text of a candidate.
    """
    texts = token_texts(record.ids[:, 0].tolist(), tokenizer)
    rows: list[dict[str, Any]] = []
    for t, text in enumerate(texts):
        ids, log_p = record.ids[t].tolist(), record.log_p[t].tolist()
        log_q = [None] * len(log_p) if record.log_q is None else record.log_q[t].tolist()
        others = zip(ids[1:], log_p[1:], log_q[1:], strict=True)
        seen = {i: {"id": i, "text": decoded(i), "log_p": p, "log_q": q} for i, p, q in others}
        rows.append(
            {
                "id": ids[0],
                "text": text,
                "log_p": log_p[0],
                "log_q": log_q[0],
                "advantage": None if log_q[0] is None else log_q[0] - log_p[0],
                "alternatives": sorted(seen.values(), key=_likeliest),
            }
        )
    return rows


def _likeliest(candidate: Mapping[str, Any]) -> float:
    return -max(x for x in (candidate["log_p"], candidate["log_q"]) if x is not None)


def token_texts(ids: Sequence[int], tokenizer: Tokenizer) -> list[str]:
    """The part of the text that each token adds; joined, they are the text.

    A window of the last complete tokens is decoded with each new one: alone, a token may lack the
    space before it, or hold half a character.
    """
    texts: list[str] = []
    begin = read = 0  # the window of complete tokens
    for i in range(len(ids)):
        before = tokenizer.decode(ids[begin:read])
        after = tokenizer.decode(ids[begin : i + 1])
        # A character of several tokens is the text of the last one, or of the response's end.
        if after.endswith(_BROKEN_CHARACTER) and i + 1 < len(ids) and i + 1 - read < 4:
            texts.append("")
            continue
        texts.append(after[len(before) :])
        begin, read = read, i + 1
    return texts


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes the file atomically."""
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows))
