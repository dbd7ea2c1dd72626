"""Carries out the decisions of a `refreshed` teacher's schedule on the train state."""

from collections.abc import Mapping
from functools import partial

import jax.numpy as jnp

from sdpo_jax.config import TeacherConfig
from sdpo_jax.devices import Devices
from sdpo_jax.teacher.schedule import Observed, RefreshSchedule
from sdpo_jax.teacher.weights import Teacher
from sdpo_jax.training.lora import Parameters
from sdpo_jax.training.state import TrainState
from sdpo_jax.training.step import update_teacher


class TeacherRefresh:
    """Applies refresh and rollback decisions to the train state."""

    def __init__(
        self,
        config: TeacherConfig,
        teacher: Teacher,
        parameters: Parameters,
        devices: Devices,
        shardings: TrainState,
    ):
        self.schedule = RefreshSchedule(config)
        # The program of a moving average: a refresh at every step is one, bit for bit.
        move = partial(refresh, teacher, parameters)
        self._programs = {
            "refresh": devices.jit(move, donate_argnums=0, out_shardings=shardings),
            "return": devices.jit(go_back, donate_argnums=0, out_shardings=shardings),
        }

    def __call__(
        self, state: TrainState, row: Mapping[str, float], *, moved: bool
    ) -> tuple[TrainState, dict[str, float]]:
        """After a step with metrics `row`: the state, and what was decided."""
        observed = None
        if "reward" in row:
            observed = Observed(row["reward"], row["response_tokens_p95"], row["truncated"])
        decision = self.schedule(observed, moved=moved)
        if decision != "stay":
            state = self._programs[decision](state)
        return state, {
            "teacher/refreshed": float(decision == "refresh"),
            "teacher/returned": float(decision == "return"),
            "teacher/age": float(self.schedule.since),
        }


def refresh(teacher: Teacher, parameters: Parameters, state: TrainState) -> TrainState:
    """The teacher moves towards the student; the old one is kept where there is room for it."""
    moved = update_teacher(teacher, parameters, state, jnp.array(True))
    return moved if state.previous is None else moved.replace(previous=state.teacher)


def go_back(state: TrainState) -> TrainState:
    """The teacher before the last refresh, again."""
    return state.replace(teacher=state.previous)
