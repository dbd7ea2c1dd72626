"""The training loop: rollouts, feedback, teacher, update; evaluation, metrics, checkpoints.

`train(config, model, params, tokenizer, environment)` is the whole program; the command line is a
thin shell over it.
"""

import contextlib
import dataclasses
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from sdpo_jax.config import Config, GrpoObjective, SdpoObjective, SftObjective
from sdpo_jax.data.jsonl import Demonstration
from sdpo_jax.data.pipeline import prompt_batches
from sdpo_jax.devices import Devices, make_mesh
from sdpo_jax.environments.base import Environment
from sdpo_jax.errors import UserError
from sdpo_jax.evaluation.accuracy import Evaluator
from sdpo_jax.losses.distillation import full_vocabulary_loss, top_k_loss
from sdpo_jax.losses.objectives import grpo_per_token, sdpo_per_token, sft_per_token
from sdpo_jax.model import Model, Params
from sdpo_jax.sampling.sampler import Sampler
from sdpo_jax.teacher.prompts import TeacherPrompts
from sdpo_jax.tokens import Tokenizer
from sdpo_jax.training import run_directory
from sdpo_jax.training.checkpoint import Checkpoints, Restored
from sdpo_jax.training.clock import Clock
from sdpo_jax.training.console import Console, batch_arithmetic
from sdpo_jax.training.distributed import any_process
from sdpo_jax.training.metrics import MetricsLog
from sdpo_jax.training.objectives import GrpoUpdates, SdpoUpdates
from sdpo_jax.training.parameters import checksum, refuse_another_base
from sdpo_jax.training.sources import DemonstrationSource, RolloutSource, Source
from sdpo_jax.training.state import (
    TrainState,
    abstract_state,
    base_is_teacher,
    create_state,
    make_optimizer,
    make_parameters,
    make_teacher,
    state_shardings,
)
from sdpo_jax.training.step import Metrics, follow, make_train_step, teacher_forward

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
        updates = config.train.steps * config.train.mini_batches
        self.optimizer = make_optimizer(config.optimizer, updates)
        self.shardings = state_shardings(
            model, self.devices, self.optimizer, self.teacher, self.parameters
        )
        self._merged = jax.jit(self.parameters.merged)
        self.sampler = Sampler(model, self.devices, tokenizer.stop_ids)
        teacher_prompts = TeacherPrompts(config.teacher, tokenizer)
        self.evaluator = Evaluator(config, self.sampler, tokenizer, environment, teacher_prompts)
        self._train_step = jax.jit(
            make_train_step(
                model,
                _per_token_loss(config),
                self.optimizer,
                self.parameters,
                head_chunk_tokens=config.train.head_chunk_tokens,
            ),
            donate_argnums=0,
            out_shardings=(self.shardings, self.devices.replicated),
        )
        if self.teacher is not None:
            self._follow = jax.jit(
                partial(follow, self.teacher, self.parameters),
                donate_argnums=0,
                out_shardings=self.shardings,
            )
        self.source = self._source(model, environment, demonstrations, teacher_prompts)

    def _source(
        self,
        model: Model,
        environment: Environment,
        demonstrations: Sequence[Demonstration],
        teacher_prompts: TeacherPrompts,
    ) -> Source:
        config, objective, devices = self.config, self.config.objective, self.devices
        if isinstance(objective, SftObjective):
            batches = prompt_batches(
                demonstrations, batch_size=config.data.rows_per_step, seed=config.seed
            )
            return DemonstrationSource(config, objective, batches, self.tokenizer, devices)
        if isinstance(objective, SdpoObjective):
            forward = jax.jit(
                partial(teacher_forward, model),
                out_shardings=(devices.micro_batches, devices.replicated),
            )
            updates = SdpoUpdates(config, objective, devices, teacher_prompts, forward)
        else:
            updates = GrpoUpdates(config, objective, devices)
        prompts = prompt_batches(
            environment.train, batch_size=config.rollout.prompts_per_step, seed=config.seed
        )
        return RolloutSource(config, prompts, environment, self.tokenizer, self.sampler, updates)

    def initial_state(self, params: Params) -> TrainState:
        """Step 0: the given weights, an empty optimiser, the teacher equal to the student."""
        return create_state(
            params, self.optimizer, self.teacher, self.shardings, self.parameters, self.config.seed
        )

    def restore(self, checkpoints: Checkpoints, load_params: LoadParams) -> Restored | None:
        """The run's last intact checkpoint; None if there is none.

        The initial weights are loaded only where adapters need them as their base.
        """
        template = abstract_state(
            self._model, self.optimizer, self.teacher, self.shardings, self.parameters
        )
        restored = checkpoints.restore(template)
        if restored is None or self.config.lora.rank == 0:
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
        clock = Clock()
        student = self.student(state)
        updates, row = self.source(student, self.teacher_params(state, student), step, clock)
        with clock.phase("train"):
            measured: list[Metrics] = []
            for update in updates:
                state, metrics = self._train_step(state, update.batch, update.constants)
                clock.count("train", update.tokens)
                measured.append(metrics)
            if self.teacher is not None and measured:
                any_finite = jnp.any(jnp.stack([m.finite for m in measured]))
                state = self._follow(state, any_finite)
            row |= _summarise(self.devices.fetch(measured))
        return state, row | clock.read()

    def evaluate(self, state: TrainState, step: int) -> dict[str, float]:
        """Held-out accuracy of the student, and of the teacher in context.

        Under `sft` there is no teacher; the model itself, shown a context, stands in for one.
        """
        is_sft = isinstance(self.config.objective, SftObjective)
        student = self.student(state)
        teacher = student if is_sft else self.teacher_params(state, student)
        return self.evaluator(student, teacher, step)


def _per_token_loss(config: Config) -> Any:
    objective = config.objective
    if isinstance(objective, SdpoObjective):
        divergence = partial(full_vocabulary_loss, alpha=objective.alpha)
        if objective.top_k:
            divergence = partial(
                top_k_loss, alpha=objective.alpha, k=objective.top_k, add_tail=True
            )
        return sdpo_per_token(divergence, importance_cap=objective.importance_cap)
    if isinstance(objective, GrpoObjective):
        return grpo_per_token(
            clip_low=objective.clip_low,
            clip_high=objective.clip_high,
            dual_clip=objective.dual_clip,
        )
    return sft_per_token()


def _summarise(measured: list[Metrics]) -> dict[str, Any]:
    """Means over active tokens of all updates of a step."""
    if not measured:  # Nothing in this batch could move the parameters.
        return {"updates": 0, "skipped": 0}
    tokens = max(1.0, sum(float(m.tokens) for m in measured))
    row: dict[str, Any] = {
        name: sum(float(m.sums[name]) for m in measured) / tokens for name in measured[0].sums
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


def train(
    config: Config,
    model: Model,
    params: Params | LoadParams,
    tokenizer: Tokenizer,
    environment: Environment,
    *,
    demonstrations: Sequence[Demonstration] = (),
    console: Console | None = None,
) -> dict[str, Any]:
    """Runs a recipe in `config.run_dir`, from the folder's last checkpoint if there is one.

    Args:
      config: the recipe; `run_dir` must be set.
      model: pure functions, see `sdpo_jax.model`.
      params: initial weights, or a function that loads them: it is called only where they are
        needed, and the run holds no second copy of what it returns.
      tokenizer: see `sdpo_jax.tokens`.
      environment: prompts and grader.
      demonstrations: for `sft`.
      console: where to report; plain lines on standard output by default.

    Returns:
      The summary: evaluation `before` and `after`, `steps`, `generations`, `seconds`, `complete`.

    Raises:
      UserError: bad input, a folder with another recipe, or updates that stay non-finite.
    """
    run_dir = Path(config.run_dir)
    console = console or Console(config.objective.name, steps=config.train.steps, live=False)
    with ExitStack() as stack:
        stack.enter_context(console)
        if jax.process_index() == 0:
            run_directory.check(run_dir, config)  # before a lock is left in a stranger's folder
            stack.enter_context(run_directory.locked(run_dir))
            run_directory.claim(run_dir, config)
            run_directory.reopen(run_dir)
        trainer = Trainer(config, model, tokenizer, environment, demonstrations)
        checkpoints = stack.enter_context(
            Checkpoints(run_dir / "checkpoints", keep=config.checkpoint.keep, warn=console.note)
        )
        load_params = params if callable(params) else lambda: params
        return _run(config, trainer, load_params, checkpoints, console, run_dir)


def _run(
    config: Config,
    trainer: Trainer,
    load_params: LoadParams,
    checkpoints: Checkpoints,
    console: Console,
    run_dir: Path,
) -> dict[str, Any]:
    began = time.perf_counter()
    is_sft = isinstance(config.objective, SftObjective)
    task = config.data.source if is_sft else config.environment.kind
    console.header(
        training=f"{config.objective.name} on {task}, model {config.model.path} "
        f"with {trainer.size / 1e6:.2f} M parameters",
        devices=f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        run_dir=str(run_dir),
        batch=batch_arithmetic(config),
    )
    restored = trainer.restore(checkpoints, load_params)
    first, before, spent = 0, None, 0.0
    if restored is None:
        state = trainer.initial_state(load_params())
        _refuse_weights_that_are_not_finite(trainer.student(state), config.model.path)
    else:
        first, state = restored.step, restored.state
        before, spent = restored.extra["before"], restored.extra["seconds"]
        trainer.source.set_state(restored.extra["data"])
        console.note(f"resumed   from step {first}")
    base = None if state.base is None else checksum(state.base)
    with _open_log(run_dir, first) as log, _stop_signals() as stop_asked:
        report = _Reporter(log, console)
        if before is None:
            before = trainer.evaluate(state, 0)
            report.evaluation(0, before)
        after, step, stopping = before, first, False
        while step < config.train.steps and not stopping:
            step += 1
            state, row = trainer.step(state, step)
            report.step(step, row)
            _stop_if_not_finite(config, row, step)
            last = step == config.train.steps
            every = config.evaluation.every_steps
            if last or (every and step % every == 0):
                after = trainer.evaluate(state, step)
                report.evaluation(step, after)
            stopping = any_process(stop_asked())
            if last or stopping or step % config.checkpoint.every_steps == 0:
                seconds = spent + time.perf_counter() - began
                extra = {"data": trainer.source.get_state(), "before": before, "seconds": seconds}
                checkpoints.save(step, state.replace(base=None), extra | {"base": base})
            checkpoints.poll()
    checkpoints.finish()
    if first == config.train.steps:
        after = trainer.evaluate(state, first)
    summary = _summary(config, step, before, after, spent + time.perf_counter() - began)
    _finish(config, summary, console, run_dir)
    return summary


def _refuse_weights_that_are_not_finite(params: Params, path: str) -> None:
    """A model of NaN may stop at its first token for ever: no signal, no update, no skip."""
    finite = jax.jit(partial(jax.tree.map, lambda x: jnp.all(jnp.isfinite(x))))(params)
    bad = [jax.tree_util.keystr(key) for key, ok in jax.tree.leaves_with_path(finite) if not ok]
    if bad:
        raise UserError(
            f"model.path = {path!r}: weights hold values that are not finite, in "
            f"{', '.join(bad[:5])}{', ...' if len(bad) > 5 else ''}. "
            "Expected numbers: convert or copy them again."
        )


def _summary(
    config: Config, step: int, before: dict[str, float], after: dict[str, float], seconds: float
) -> dict[str, Any]:
    per_step = config.rollout.prompts_per_step * config.rollout.rollouts_per_prompt
    return {
        "objective": config.objective.name,
        "complete": step == config.train.steps,
        "steps": step,
        "generations": 0 if isinstance(config.objective, SftObjective) else step * per_step,
        "seconds": seconds,
        "before": before,
        "after": after,
        "config": dataclasses.asdict(config),
    }


def _finish(config: Config, summary: dict[str, Any], console: Console, run_dir: Path) -> None:
    if not summary["complete"]:
        console.note(f"stopped   after step {summary['steps']}; saved. The same command goes on.")
        return
    if jax.process_index() == 0:
        run_directory.write_summary(run_dir, summary)
    show_summary(config, summary, console, run_dir)


def show_summary(config: Config, summary: dict[str, Any], console: Console, run_dir: Path) -> None:
    """Prints before and after, where the run lies, and what to try next."""
    console.summary(summary["before"], summary["after"], str(run_dir), next_steps(config, run_dir))


def next_steps(config: Config, run_dir: Path) -> list[str]:
    """Commands that make sense after this run."""
    steps = [f"sdpo eval {run_dir}", f"tensorboard --logdir {run_dir}/tensorboard"]
    if config.objective.name == "sdpo" and config.model.path == "nano":
        steps.insert(0, "sdpo train configs/nano_grpo.toml   # the baseline on the same budget")
    if config.objective.name == "sft":
        steps.append(f"sdpo train RECIPE --model.path {run_dir}   # a second stage from here")
    return [*steps, f"sdpo convert {run_dir} OUT   # weights in Hugging Face layout"]


def _open_log(run_dir: Path, first: int) -> Any:
    if jax.process_index() == 0:
        return MetricsLog(run_dir, first)
    return _NoLog()


class _NoLog:
    """The log of every process but the first."""

    def __enter__(self) -> "_NoLog":
        return self

    def __exit__(self, *error: object) -> None:
        del error

    def write(self, kind: str, step: int, values: Any) -> None:
        """Writes nothing."""
        del kind, step, values


class _Reporter:
    """Rows to the log and to the console."""

    def __init__(self, log: Any, console: Console):
        self._log, self._console = log, console

    def step(self, step: int, row: dict[str, Any]) -> None:
        self._log.write("train", step, row)
        self._console.step({"step": step, **row})

    def evaluation(self, step: int, row: dict[str, Any]) -> None:
        self._log.write("eval", step, row)
        self._console.evaluation({"step": step, **row})


def _stop_if_not_finite(config: Config, row: dict[str, Any], step: int) -> None:
    if row["skipped"] >= config.optimizer.max_skipped_updates:
        raise UserError(
            f"step {step}: {row['skipped']} updates in a row were not finite and were skipped "
            f"(optimizer.max_skipped_updates = {config.optimizer.max_skipped_updates}). Lower "
            f"optimizer.learning_rate = {config.optimizer.learning_rate}; checkpoints are kept."
        )


@contextlib.contextmanager
def _stop_signals() -> Iterator[Callable[[], bool]]:
    """The first SIGINT or SIGTERM asks for a stop after the step; the second ends at once."""
    asked: list[int] = []

    def handle(number: int, frame: object) -> None:
        del frame
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    try:
        old = {s: signal.signal(s, handle) for s in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # Not the main thread: signals are somebody else's.
        yield lambda: False
        return
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
