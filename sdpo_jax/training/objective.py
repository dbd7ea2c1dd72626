"""What a training objective is: one value that bundles its functions.

`sdpo_jax.objectives` makes the four of the papers. A fifth is a file of its own, also outside the
package: it builds an `Objective` and gives it to `sdpo_jax.load(recipe, objective=...)`.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

from sdpo_jax.config import ObjectiveConfig, TeacherConfig
from sdpo_jax.losses.fused_linear import PerTokenLoss, fused_linear_loss
from sdpo_jax.losses.per_token import Divergence
from sdpo_jax.rollouts.phase_timer import PhaseTimer
from sdpo_jax.rollouts.rollout_batch import RolloutBatch
from sdpo_jax.teacher.context import ATTEMPTS, Wording
from sdpo_jax.teacher.contexts import ContextBuilder
from sdpo_jax.training.engine import Engine, Models
from sdpo_jax.training.step import HeadLoss, Update


class MakeUpdates(Protocol):
    """`make_updates(engine, rollouts, models, *, step, timer) -> (updates, metrics)`.

    Turns the rollouts of a step into its optimiser updates, in the order in which they run, and
    reports metrics of its own. Rows that cannot move the parameters are dropped before any compute.
    """

    def __call__(
        self,
        engine: Engine,
        rollouts: RolloutBatch,
        models: Models,
        /,
        *,
        step: int,
        timer: PhaseTimer,
    ) -> tuple[list[Update], dict[str, float]]: ...


class Objective(NamedTuple):
    """A training objective, as pure functions and the settings that they were built from."""

    settings: ObjectiveConfig
    loss: PerTokenLoss
    """The loss of a token; see `sdpo_jax.losses.fused_linear`."""
    metrics: tuple[str, ...]
    """Token metrics of the loss that are reported; others are not computed."""
    make_updates: MakeUpdates
    head_loss: HeadLoss = fused_linear_loss
    """Sums the losses of tokens; another one may weigh whole responses."""
    contexts: Callable[[TeacherConfig], ContextBuilder] | None = None
    """Makes the function that chooses what the teacher sees, in training and in evaluation. None:
    nothing, unless the caller of `load` passes a context."""
    wording: Wording = ATTEMPTS
    """The sentences around the parts of a teacher prompt."""
    divergence: Divergence | None = None
    """For the metric `student_teacher_kl`, which is not computed if this is None."""
    reference_kl: float = 0.0
    """Coefficient of the KL to the initial model; above 0 the run keeps that model's weights."""
    columns: tuple[str, ...] = ("loss", "accuracy", "seconds_rollout", "seconds_train")
    """Metrics that the console shows for each step."""
