"""Evaluations of a run: the short one of the training loop, and the full one of `sdpo eval`."""

from sdpo_jax.environments.base import Environment
from sdpo_jax.evaluation.evaluator import Evaluator
from sdpo_jax.evaluation.measures import Measures
from sdpo_jax.evaluation.report import Evaluation, evaluation
from sdpo_jax.run.callbacks import Metrics
from sdpo_jax.training.state import TrainState
from sdpo_jax.training.trainer import Trainer


def make_evaluator(trainer: Trainer, environment: Environment) -> Evaluator:
    """The evaluator of a run; it shares the sampler of training and so its programs."""
    return Evaluator(
        trainer.config,
        trainer.sampler,
        trainer.tokenizer,
        environment,
        trainer.teacher_prompts,
        trainer.contexts,
    )


def evaluate(trainer: Trainer, evaluator: Evaluator, state: TrainState, step: int) -> Metrics:
    """Held-out accuracy of the student, and of the teacher in context.

    If the objective has contexts but no teacher, the student is its own teacher; if it has neither,
    only the student is evaluated.
    """
    models, teacher = trainer.models(state), None
    if trainer.contexts is not None:
        teacher = models.student if trainer.teacher is None else models.teacher
    trainer.source.wait()  # two threads must never use an environment at a time
    return evaluator(models.student, teacher, step, trainer.student_teacher_kl)


def evaluate_fully(
    trainer: Trainer, evaluator: Evaluator, state: TrainState, samples: int
) -> Evaluation:
    """Answers of the student, `samples` to each prompt and one greedy, and of the teacher.

    Without a teacher the student is its own, whatever the objective.
    """
    student = trainer.student(state)
    sampled = evaluator.attempts(student, 0, samples=samples)
    greedy = evaluator.attempts(student, 0, samples=1, temperature=0.0)
    measures: Measures = {}
    if evaluator.asks_teacher:
        teacher = trainer.teacher_params(state, student)
        teacher = student if teacher is None else teacher
        measures = evaluator.teacher_measures(teacher, sampled, 0)
    return evaluation(evaluator.prompts, sampled, evaluator.answers(sampled), greedy, measures)
