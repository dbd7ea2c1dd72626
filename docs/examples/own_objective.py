"""An objective and a teacher context of your own, in one file outside the package.

    python docs/examples/own_objective.py [STEPS]      # 10 steps take a minute on two CPU cores

The objective distills as SDPO does, with another divergence: the total variation distance. The
context shows a failure the shortest correct sibling together with the feedback on it, where SDPO
shows one of the two. `sdpo_jax.load` takes both; the recipe's `[objective]` is replaced. Everything
else (sampling, checkpoints, resuming, evaluation) is as in any other run.
"""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import jax
import jax.numpy as jnp
import numpy as np

import sdpo_jax
from sdpo_jax.config import ObjectiveConfig
from sdpo_jax.losses.per_token import sdpo_per_token
from sdpo_jax.teacher.context import TeacherContext
from sdpo_jax.teacher.contexts import SiblingContexts
from sdpo_jax.training.objective import Objective
from sdpo_jax.training.teacher_pass import shared_inputs, token_inputs

RECIPE = Path(__file__).parents[2] / "configs" / "nano.toml"


@dataclass(frozen=True)
class Settings(ObjectiveConfig):
    """The objective's settings: they are saved with the run, and a resumed run must agree."""

    has_teacher = True

    name: str = "total_variation"
    scale: float = 1.0


def total_variation(scale, student_log_probs, teacher_log_probs):
    """The divergence of each token: scale · 1/2 Σ_v |π(v) - q(v)|, `[M, V], [M, V] -> [M]`."""
    student, teacher = jnp.exp(student_log_probs), jnp.exp(teacher_log_probs)
    return scale * 0.5 * jnp.sum(jnp.abs(student - jax.lax.stop_gradient(teacher)), axis=-1)


def make_updates(engine, rollouts, models, /, *, step, timer):
    """Graded rollouts in, optimizer updates out; rollouts without a context are left out."""
    contexts = engine.teacher_contexts(rollouts, step)
    prompts = engine.teacher_prompts.of_rollouts(rollouts.prompts, rollouts.group, contexts)
    taught = np.array([ids is not None for ids in prompts])
    batches = engine.split(rollouts, active=taught, worth=taught, reduction="token_mean")
    with timer.phase("teacher"):  # all of the teacher's passes run before the first update
        shared = shared_inputs(engine, models)
        inputs = [token_inputs(engine, rollouts, x, prompts, models, timer) for x in batches]
    updates = [
        engine.update(batch, tokens, shared, timer=timer)
        for batch, tokens in zip(batches, inputs, strict=True)
    ]
    return updates, {"teacher_signal": float(taught.mean())}


def objective(settings):
    """The bundle of functions that `load` takes."""
    return Objective(
        settings=settings,
        loss=sdpo_per_token(partial(total_variation, settings.scale)),
        metrics=("divergence", "student_entropy", "teacher_entropy"),
        make_updates=make_updates,
        contexts=SiblingContexts,  # the default, where `load` gets no `context`
    )


def feedback_and_shortest(prompts, group, outcomes, responses, /, *, seed):
    """What the teacher of each rollout sees, `[N]`; rollout n answers prompt n // group."""
    contexts = []
    for n, outcome in enumerate(outcomes):
        siblings = range(n - n % group, n - n % group + group)
        correct = [responses[i] for i in siblings if i != n and outcomes[i].passed]
        shortest, feedback = min(correct, key=len, default=None), outcome.feedback or None
        has_context = outcome.graded and (shortest or feedback)
        contexts.append(TeacherContext(shortest, feedback) if has_context else None)
    return contexts


def make_run(run_dir, **settings):
    """A run of the recipe in `run_dir`, with this objective and this context."""
    return sdpo_jax.load(
        RECIPE,
        objective=objective(Settings(scale=2.0)),
        context=feedback_and_shortest,
        **{"run_dir": str(run_dir), "evaluation.prompts": 0, **settings},
    )


if __name__ == "__main__":
    with TemporaryDirectory() as folder:
        run = make_run(folder, **{"train.steps": int(sys.argv[1]) if sys.argv[1:] else 10})
        for row in run.steps():
            reward, loss = row.metrics["reward"], row.metrics["loss"]
            print(f"step {row.step:2}  reward {reward:.2f}  loss {loss:.4f}", flush=True)
