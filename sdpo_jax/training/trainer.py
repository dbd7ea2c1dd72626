"""The compiled programs of a run, and one step of it: rollouts, feedback, teacher, update."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from sdpo_jax.config import Config
from sdpo_jax.config.objectives import GrpoConfig, SdftConfig, SdpoConfig, SftConfig
from sdpo_jax.data.jsonl import Demonstration
from sdpo_jax.data.pipeline import prompt_batches
from sdpo_jax.devices import Devices, make_mesh
from sdpo_jax.environments.base import Environment
from sdpo_jax.evaluation.evaluator import Evaluator
from sdpo_jax.losses.fused_linear import fused_linear_loss
from sdpo_jax.losses.per_token import sft_per_token
from sdpo_jax.losses.sequence_importance import sequence_weighted_head
from sdpo_jax.model import Model, Params
from sdpo_jax.objectives.contexts import Contexts
from sdpo_jax.objectives.per_token import (
    SAMPLED,
    Loss,
    grpo_loss_of,
    means,
    sdft_loss_of,
    sdpo_loss_of,
)
from sdpo_jax.objectives.sdft import SdftSource
from sdpo_jax.objectives.sdpo import GrpoUpdates, SdpoUpdates
from sdpo_jax.objectives.sources import DemonstrationSource, RolloutSource, Source
from sdpo_jax.rollouts.phase_timer import PhaseTimer
from sdpo_jax.rollouts.sampler import Sampler
from sdpo_jax.rollouts.turns import ids_between
from sdpo_jax.run.checkpoint import Checkpoints, Restored
from sdpo_jax.teacher.context import ATTEMPTS, EXAMPLE, Wording
from sdpo_jax.teacher.prompts import TeacherPrompts
from sdpo_jax.tokens import Tokenizer
from sdpo_jax.training.batch import BatchLayout
from sdpo_jax.training.lora import refuse_another_base
from sdpo_jax.training.scoring import Scorer
from sdpo_jax.training.state import (
    TrainState,
    abstract_state,
    base_is_teacher,
    from_saved,
    make_copies,
    make_optimizer,
    make_parameters,
    make_teacher,
    reference_params,
    state_maker,
    state_shardings,
    to_saved,
)
from sdpo_jax.training.step import (
    Metrics,
    Sums,
    TrainStep,
    follow,
    make_train_step,
    teacher_forward,
    train_step,
)
from sdpo_jax.training.student_teacher_kl import StudentTeacherKl
from sdpo_jax.training.teacher_pass import TeacherPass
from sdpo_jax.training.teacher_refresh import Refreshes
from sdpo_jax.training.token_metrics import is_mean, read
from sdpo_jax.training.updates import Update

LoadParams: TypeAlias = Callable[[], Params]
"""Loads a run's initial weights."""


class Trainer:
    """The compiled programs of a run and what feeds them."""

    def __init__(
        self,
        config: Config,
        model: Model,
        tokenizer: Tokenizer,
        environment: Environment,
        demonstrations: Sequence[Demonstration] = (),
    ):
        self.config, self.tokenizer, self._model = config, tokenizer, model
        self.devices = Devices(make_mesh(config.mesh))
        self.teacher, self.parameters = make_teacher(config), make_parameters(config)
        self.form = BatchLayout(
            share_prompts=shares_prompts(config),
            micro_batch_tokens=config.train.micro_batch_tokens,
            head_chunk_tokens=config.train.head_chunk_tokens,
            shards=self.devices.row_shards,
        )
        updates = config.train.steps * config.train.mini_batches
        self.optimizer = make_optimizer(config.optimizer, updates)
        self.shardings = state_shardings(
            model, self.devices, self.optimizer, self.teacher, self.parameters, make_copies(config)
        )
        self._new_state = state_maker(self.optimizer, self.teacher, self.shardings, self.parameters)
        self._merged = self.devices.jit(self.parameters.merged)
        self.sampler = Sampler(model, self.devices, tokenizer.stop_ids, slots=config.rollout.slots)
        teacher_prompts = TeacherPrompts(config.teacher, tokenizer, _wording(config))
        self.evaluator = Evaluator(config, self.sampler, tokenizer, environment, teacher_prompts)
        if config.rollout.max_turns > 1 and environment.train:
            # Else a template that cannot go on would stop the run at its first second turn.
            ids_between(tokenizer, environment.train[0].messages, ["Once more."])
        self._train_step = self._compiled_train_step()
        if self.teacher is not None:
            self._follow = self.devices.jit(
                partial(follow, self.teacher, self.parameters),
                donate_argnums=0,
                out_shardings=self.shardings,
            )
        self._refreshes, self._weight_lag = self._make_refreshes(), self._make_weight_lag()
        self._contexts: Contexts | None = None
        self._scorer = Scorer(model, self.devices, config.rollout.temperature)
        self.source = self._source(model, environment, demonstrations, teacher_prompts)

    def _make_refreshes(self) -> Refreshes | None:
        teacher, config = self.teacher, self.config.teacher
        if teacher is None or config.weights != "refreshed":
            return None
        return Refreshes(config, teacher, self.parameters, self.devices, self.shardings)

    def _make_weight_lag(self) -> StudentTeacherKl | None:
        objective = self.config.objective
        taught = isinstance(objective, SdpoConfig | SdftConfig)
        if not taught or self.config.teacher.weights == "live":
            return None
        return StudentTeacherKl(self.config, objective, self._model, self.devices, self.form)

    def _compiled_train_step(self) -> TrainStep:
        config, devices = self.config, self.devices
        loss, metrics = _per_token_loss(config)
        step = make_train_step(
            self._model,
            loss,
            metrics,
            self.optimizer,
            self.parameters,
            head_loss_fn=_head_loss_fn(config),
        )
        whole: Any = devices.replicated
        sums = Sums(self.shardings.params, {name: whole for name in metrics}, whole, whole)
        return TrainStep(
            devices.jit(step.gradient, out_shardings=sums),
            devices.jit(step.start, out_shardings=sums),
            devices.jit(step.accumulate, donate_argnums=0, out_shardings=sums),
            devices.jit(
                step.finish,
                donate_argnums=0,
                out_shardings=(self.shardings, devices.replicated),
            ),
        )

    def _source(
        self,
        model: Model,
        environment: Environment,
        demonstrations: Sequence[Demonstration],
        teacher_prompts: TeacherPrompts,
    ) -> Source:
        config, objective, devices = self.config, self.config.objective, self.devices
        forward = devices.jit(partial(teacher_forward, model), out_shardings=devices.rows)
        head = devices.jit(model.head, out_shardings=devices.head)
        if objective.learns_from == "demonstrations":
            batches = prompt_batches(
                demonstrations, batch_size=config.data.rows_per_step, seed=config.seed
            )
            if isinstance(objective, SftConfig):
                return DemonstrationSource(
                    config, objective, batches, self.tokenizer, devices, self.form
                )
            passes = TeacherPass(config, devices, self.form, forward, head, number_rollouts=True)
            return SdftSource(
                config, objective, batches, self.tokenizer, self.sampler, teacher_prompts, passes
            )
        if isinstance(objective, SdpoConfig):
            teacher_pass = TeacherPass(config, devices, self.form, forward, head)
            self._contexts = Contexts(config, teacher_prompts, self.tokenizer)
            updates = SdpoUpdates(
                config, objective, self._contexts, teacher_pass, self._scorer, devices
            )
        else:
            updates = GrpoUpdates(config, objective, devices, self.form)
        prompts = prompt_batches(
            environment.train, batch_size=config.rollout.prompts_per_step, seed=config.seed
        )
        return RolloutSource(config, prompts, environment, self.tokenizer, self.sampler, updates)

    def initial_state(self, params: Params, seed: int | None = None) -> TrainState:
        """Step 0: the given weights, an empty optimiser, the teacher equal to the student.

        `seed` is that of fresh adapters, the run's by default.
        """
        return self._new_state(params, self.config.seed if seed is None else seed)

    def restore(
        self, checkpoints: Checkpoints, load_params: LoadParams, step: int | None = None
    ) -> Restored | None:
        """The run's last intact checkpoint, None if there is none; or that of `step`, or an error.

        The initial weights are loaded only where adapters need them as their base.
        """
        template = abstract_state(
            self._model, self.optimizer, self.teacher, self.shardings, self.parameters
        )
        restored = checkpoints.restore(to_saved(template), step)
        if restored is None:
            return None
        restored = restored._replace(state=from_saved(restored.state))
        if self.config.lora.rank == 0:
            return restored
        base = jax.jit(self.parameters.base, out_shardings=self.shardings.base)(load_params())
        refuse_another_base(base, restored.extra["base"], self.config.model.path)
        return restored._replace(state=restored.state.replace(base=base))

    @property
    def size(self) -> int:
        """Number of the model's parameters."""
        shapes = jax.eval_shape(self._model.init, jax.random.key(0))
        return sum(x.size for x in jax.tree.leaves(shapes))

    def student(self, state: TrainState) -> Params:
        """The model's weights as they are now, adapters added in."""
        return state.params if state.base is None else self._merged(state.base, state.params)

    def teacher_params(self, state: TrainState, student: Params) -> Params:
        """The weights that the teacher runs with; None without a teacher."""
        if self.teacher is None:
            return None
        student = state.base if base_is_teacher(self.config) else student
        return self.teacher.params(state.teacher, student)

    def step(self, state: TrainState, step: int) -> tuple[TrainState, dict[str, Any]]:
        """One generation batch: rollouts, feedback, teacher, updates; the teacher follows once."""
        clock = PhaseTimer()
        student = self.student(state)
        updates, row = self.source(student, self.teacher_params(state, student), step, clock)
        updates = self._anchored(updates, state, clock)
        with clock.phase("train"):
            measured: list[Metrics] = []
            for update in updates:
                state, metrics = train_step(self._train_step, state, update.batch, update.constants)
                clock.count("train", update.tokens)
                measured.append(metrics)
            if self.teacher is not None and self._refreshes is None and measured:
                any_finite = jnp.any(jnp.stack([m.finite for m in measured]))
                state = self._follow(state, any_finite)
            fetched: list[Metrics] = self.devices.fetch(measured)
            row |= _summarise(fetched)
            if self._refreshes is not None:
                moved = any(bool(m.finite) for m in fetched)
                state, told = self._refreshes(state, row, moved=moved)
                row |= told
        return state, row | clock.read()

    def _anchored(
        self, updates: list[Update], state: TrainState, clock: PhaseTimer
    ) -> list[Update]:
        """With a KL to the initial model: updates that know its log-probabilities."""
        objective = self.config.objective
        anchored = isinstance(objective, SdpoConfig | GrpoConfig)
        if not anchored or objective.reference_kl == 0:
            return updates
        with clock.phase("reference"):
            updates = self._scorer.anchored(updates, reference_params(self.config, state))
            return jax.block_until_ready(updates)

    def host_state(self) -> dict[str, Any]:
        """What a run remembers beside its arrays and its position in the data; for a checkpoint."""
        kept: dict[str, Any] = {}
        if self._refreshes is not None:
            kept["teacher"] = self._refreshes.schedule.get_state()
        if self._contexts is not None:
            kept["successes"] = self._contexts.get_state()
        return kept

    def set_host_state(self, saved: Mapping[str, Any]) -> None:
        """Goes to what `host_state` gave."""
        if self._refreshes is not None:
            self._refreshes.schedule.set_state(saved["teacher"])
        if self._contexts is not None:
            self._contexts.set_state(saved.get("successes", {}))

    def evaluate(self, state: TrainState, step: int) -> dict[str, float]:
        """Held-out accuracy of the student, and of the teacher in context.

        Under `sft` there is no teacher; the model itself, shown a context, stands in for one.
        """
        is_sft = isinstance(self.config.objective, SftConfig)
        student = self.student(state)
        teacher = student if is_sft else self.teacher_params(state, student)
        self.source.wait()  # an environment is never asked by two threads at a time
        return self.evaluator(student, teacher, step, self._weight_lag)


def shares_prompts(config: Config) -> bool:
    """Whether siblings share their prompt in the passes over whole sequences.

    On a CPU that is the faster form. Packed rows are what the TPU's attention kernel reads.
    """
    if config.train.share_prompts == "auto":
        return jax.default_backend() == "cpu" and config.model.attention != "splash"
    return config.train.share_prompts == "on"


def _per_token_loss(config: Config) -> Loss:
    """The loss, and which of its by-products are reported; others are not computed."""
    objective = config.objective
    if isinstance(objective, SdpoConfig):
        return sdpo_loss_of(objective)
    if isinstance(objective, SdftConfig):
        return sdft_loss_of(objective)
    if isinstance(objective, GrpoConfig):
        return grpo_loss_of(objective)
    return sft_per_token(), (*SAMPLED, "correct")


def _wording(config: Config) -> Wording:
    """What stands around the parts of a re-prompt."""
    objective = config.objective
    asks_own = isinstance(objective, SdftConfig) and objective.closing == "own"
    return EXAMPLE if asks_own else ATTEMPTS


def _head_loss_fn(config: Config) -> Any:
    """How losses of tokens become their sum; SDFT weighs whole responses."""
    if isinstance(config.objective, SdftConfig):
        return partial(sequence_weighted_head, config.objective.importance_cap)
    return fused_linear_loss


def _summarise(measured: list[Metrics]) -> dict[str, Any]:
    """Means over active tokens of all updates of a step."""
    if not measured:  # Nothing in this batch could move the parameters.
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
