"""One training step: rollouts, the objective's updates, the optimizer, the teacher.

`Trainer.step` is where a step begins; docs/architecture.md lists the files that it passes. Nothing
here prints, saves or evaluates.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sdpo_jax.config import Config
from sdpo_jax.data.jsonl import Demonstration
from sdpo_jax.devices import Devices, make_mesh
from sdpo_jax.environments.base import Environment
from sdpo_jax.model import Model, Params
from sdpo_jax.rollouts.phase_timer import PhaseTimer
from sdpo_jax.rollouts.rollout_batch import RolloutBatch
from sdpo_jax.rollouts.sampler import Sampler
from sdpo_jax.rollouts.sources import Demonstrations, GradedRollouts, SampledDemonstrations, Source
from sdpo_jax.rollouts.turns import ids_between
from sdpo_jax.teacher.contexts import ContextBuilder, Remembers
from sdpo_jax.teacher.prompts import TeacherPrompts
from sdpo_jax.tokens import Tokenizer
from sdpo_jax.training.batch import BatchLayout
from sdpo_jax.training.engine import Engine, Models
from sdpo_jax.training.objective import Objective
from sdpo_jax.training.state import (
    TrainState,
    abstract_state,
    base_is_teacher,
    make_extra_weights,
    make_optimizer,
    make_parameters,
    make_teacher,
    reference_params,
    state_maker,
    state_shardings,
)
from sdpo_jax.training.step import (
    Metrics,
    Sums,
    UpdatePrograms,
    make_update_programs,
    run_update,
    update_teacher,
)
from sdpo_jax.training.student_teacher_kl import StudentTeacherKl
from sdpo_jax.training.teacher_refresh import TeacherRefresh
from sdpo_jax.training.token_metrics import is_mean, means, read

LoadParams: TypeAlias = Callable[[], Params]
"""Loads a run's initial weights."""

OnRollouts: TypeAlias = Callable[[int, RolloutBatch], None]
"""`on_rollouts(step, rollouts)`, called before the updates of the step."""


class Trainer:
    """The compiled programs of a run, and the source of its rollouts."""

    def __init__(
        self,
        config: Config,
        model: Model,
        tokenizer: Tokenizer,
        environment: Environment,
        demonstrations: Sequence[Demonstration] = (),
        *,
        objective: Objective,
        optimizer: optax.GradientTransformation | None = None,
        context: ContextBuilder | None = None,
    ):
        """Builds the programs; nothing is compiled yet.

        Args:
          config: the recipe.
          model: pure functions, see `sdpo_jax.model`.
          tokenizer: see `sdpo_jax.tokens`.
          environment: prompts and grader.
          demonstrations: for objectives that learn from them.
          objective: what is learned; its settings are `config.objective`.
          optimizer: None: the AdamW of `[optimizer]`.
          context: chooses what the teacher sees; None: the objective's own rule.
        """
        self.config, self.tokenizer, self._model = config, tokenizer, model
        self.objective = objective
        self.devices = Devices(make_mesh(config.mesh))
        self.teacher = make_teacher(config)
        self.parameters = make_parameters(config)
        self.layout = BatchLayout(
            share_prompts=shares_prompts(config),
            micro_batch_tokens=config.train.micro_batch_tokens,
            head_chunk_tokens=config.train.head_chunk_tokens,
            shards=self.devices.row_shards,
        )
        updates = config.train.steps * config.train.mini_batches
        self.optimizer = optimizer or make_optimizer(config.optimizer, updates)
        self.shardings = state_shardings(
            model,
            self.devices,
            self.optimizer,
            self.teacher,
            self.parameters,
            make_extra_weights(config, objective.reference_kl),
        )
        self._new_state = state_maker(self.optimizer, self.teacher, self.shardings, self.parameters)
        self._merged = self.devices.jit(self.parameters.merged)
        self.sampler = Sampler(model, self.devices, tokenizer.stop_ids, slots=config.rollout.slots)
        self.teacher_prompts = TeacherPrompts(config.teacher, tokenizer, objective.wording)
        make_contexts = objective.contexts
        self.contexts = context or (make_contexts and make_contexts(config.teacher))
        if config.rollout.max_turns > 1 and environment.train:
            # Else a template that cannot go on would stop the run at its first second turn.
            ids_between(tokenizer, environment.train[0].messages, ["Once more."])
        self._programs = self._update_programs()
        self._update_teacher = self._teacher_program()
        self._refresh = self._teacher_refresh()
        self.engine = Engine(
            config, model, self.devices, self.layout, tokenizer, self.teacher_prompts, self.contexts
        )
        self.student_teacher_kl = self._student_teacher_kl()
        self.source = self._source(environment, demonstrations)

    def step(
        self, state: TrainState, step: int, on_rollouts: OnRollouts | None = None
    ) -> tuple[TrainState, dict[str, Any]]:
        """One generation batch: rollouts, feedback, teacher, updates; the teacher follows once.

        Args:
          state: used up.
          step: its number, from 1 on; with the seed it determines every draw.
          on_rollouts: called with the rollouts before the updates.

        Returns:
          The new state, and the metrics of the step.
        """
        timer = PhaseTimer()
        rollouts, row = self.source(self.student(state), step, timer)
        if on_rollouts is not None:
            on_rollouts(step, rollouts)
        state, more = self.learn(state, rollouts, step, timer, observed=row)
        return state, row | more

    def learn(
        self,
        state: TrainState,
        rollouts: RolloutBatch,
        step: int,
        timer: PhaseTimer,
        *,
        observed: Mapping[str, float],
    ) -> tuple[TrainState, dict[str, Any]]:
        """The updates of a rollout batch, then one move of the teacher.

        Args:
          state: used up.
          rollouts: what is learned from.
          step: its number.
          timer: of the step; it is read here.
          observed: metrics of the rollouts, for a `refreshed` teacher's schedule.

        Returns:
          The new state, and metrics of the updates.
        """
        updates, row = self.objective.make_updates(
            self.engine, rollouts, self.models(state), step=step, timer=timer
        )
        with timer.phase("train"):
            measured: list[Metrics] = []
            for update in updates:
                state, metrics = run_update(self._programs, state, update)
                timer.count("train", update.token_count)
                measured.append(metrics)
            if self._update_teacher is not None and measured:
                any_finite = jnp.any(jnp.stack([m.finite for m in measured]))
                state = self._update_teacher(state, any_finite)
            fetched: list[Metrics] = self.devices.fetch(measured)
            row = {**row, **_summarise(fetched)}
            if self._refresh is not None:
                moved = any(bool(m.finite) for m in fetched)
                state, decided = self._refresh(state, observed, moved=moved)
                row |= decided
        return state, row | timer.read()

    def initial_state(self, params: Params, seed: int | None = None) -> TrainState:
        """Step 0: the given weights, an empty optimizer, the teacher equal to the student.

        `seed` is that of fresh adapters, the run's by default.
        """
        return self._new_state(params, self.config.seed if seed is None else seed)

    def abstract_state(self) -> TrainState:
        """Shapes, dtypes and shardings of what a checkpoint holds."""
        return abstract_state(
            self._model, self.optimizer, self.teacher, self.shardings, self.parameters
        )

    @property
    def size(self) -> int:
        """Number of the model's parameters."""
        shapes = jax.eval_shape(self._model.init, jax.random.key(0))
        return sum(x.size for x in jax.tree.leaves(shapes))

    def models(self, state: TrainState) -> Models:
        """The weights that a step works with."""
        student = self.student(state)
        reference = None
        if self.objective.reference_kl > 0:
            reference = reference_params(self.config, state)
        return Models(student, self.teacher_params(state, student), reference)

    def student(self, state: TrainState) -> Params:
        """The model's weights as they are now, adapters added in."""
        return state.params if state.base is None else self._merged(state.base, state.params)

    def teacher_params(self, state: TrainState, student: Params) -> Params:
        """The weights that the teacher runs with; None without a teacher."""
        if self.teacher is None:
            return None
        student = state.base if base_is_teacher(self.config) else student
        return self.teacher.params(state.teacher, student)

    def host_state(self) -> dict[str, Any]:
        """What a run remembers beside its arrays and its position in the data; for a checkpoint."""
        kept: dict[str, Any] = {}
        if self._refresh is not None:
            kept["teacher"] = self._refresh.schedule.get_state()
        if isinstance(self.contexts, Remembers):
            kept["successes"] = self.contexts.get_state()
        return kept

    def set_host_state(self, saved: Mapping[str, Any]) -> None:
        """Restores what `host_state` gave."""
        if self._refresh is not None and "teacher" in saved:
            self._refresh.schedule.set_state(saved["teacher"])
        if isinstance(self.contexts, Remembers):
            self.contexts.set_state(saved.get("successes", {}))

    def _update_programs(self) -> UpdatePrograms:
        objective, devices = self.objective, self.devices
        programs = make_update_programs(
            self._model,
            objective.loss,
            objective.metrics,
            self.optimizer,
            self.parameters,
            head_loss=objective.head_loss,
        )
        whole: Any = devices.replicated
        metrics = {name: whole for name in objective.metrics}
        sums = Sums(self.shardings.params, metrics, whole, whole)
        done = (self.shardings, devices.replicated)
        return UpdatePrograms(
            devices.jit(programs.gradient, out_shardings=sums),
            devices.jit(programs.start, out_shardings=sums),
            devices.jit(programs.accumulate, donate_argnums=0, out_shardings=sums),
            devices.jit(programs.finish, donate_argnums=0, out_shardings=done),
        )

    def _teacher_program(self) -> Callable[[TrainState, jax.Array], TrainState] | None:
        if self.teacher is None or self.config.teacher.weights == "refreshed":
            return None
        return self.devices.jit(
            partial(update_teacher, self.teacher, self.parameters),
            donate_argnums=0,
            out_shardings=self.shardings,
        )

    def _teacher_refresh(self) -> TeacherRefresh | None:
        teacher, config = self.teacher, self.config.teacher
        if teacher is None or config.weights != "refreshed":
            return None
        return TeacherRefresh(config, teacher, self.parameters, self.devices, self.shardings)

    def _student_teacher_kl(self) -> StudentTeacherKl | None:
        divergence = self.objective.divergence
        if self.teacher is None or divergence is None or self.config.teacher.weights == "live":
            return None
        return StudentTeacherKl(self.engine, divergence)

    def _source(self, environment: Environment, demonstrations: Sequence[Demonstration]) -> Source:
        config, settings = self.config, self.objective.settings
        if settings.learns_from == "rollouts":
            return GradedRollouts(config, environment, self.tokenizer, self.sampler)
        if settings.samples:
            return SampledDemonstrations(config, demonstrations, self.tokenizer, self.sampler)
        return Demonstrations(config, demonstrations, self.tokenizer)


def shares_prompts(config: Config) -> bool:
    """Whether siblings share their prompt in the passes over whole sequences.

    On a CPU that is the faster form. Packed rows are what the TPU's attention kernel reads.
    """
    if config.train.share_prompts == "auto":
        return jax.default_backend() == "cpu" and config.model.attention != "splash"
    return config.train.share_prompts == "on"


def _summarise(measured: list[Metrics]) -> dict[str, Any]:
    """Means over active tokens of all updates of a step."""
    if not measured:  # nothing in this batch could move the parameters
        return {"updates": 0, "skipped": 0}
    tokens = max(1.0, sum(float(m.tokens) for m in measured))
    sums = {k: sum(np.asarray(m.sums[k], np.float64) for m in measured) for k in measured[0].sums}
    row: dict[str, Any] = {
        **means({k: float(x) for k, x in sums.items() if is_mean(k)}, tokens),
        **read(sums),
    }
    if "correct" in row:
        row["token_accuracy"] = row.pop("correct")
    return row | {
        "loss": sum(float(m.loss) for m in measured) / len(measured),
        "grad_norm": sum(float(m.grad_norm) for m in measured) / len(measured),
        "tokens": tokens,
        "updates": len(measured),
        "skipped": int(measured[-1].skipped),
    }
