"""Cheap compilation on one device, for tests of whole trainers.

Trainers whose recipes agree in what is compiled share their programs: tracing a tiny model again
takes longer than running it. The folder of conftest.py shares compiled code alone.
"""

import contextlib
from functools import partial

import jax
import pytest
import tiny

from sdpo_jax.rollouts.sampler import Sampler
from sdpo_jax.run import components
from sdpo_jax.training import engine, student_teacher_kl, trainer


def key_of(value):
    """Equal for trees of equal leaves, and for partial functions of equal parts."""
    if isinstance(value, partial):
        return partial, key_of((value.func, value.args, value.keywords))
    leaves, structure = jax.tree.flatten(value)
    parts = tuple(key_of(x) if isinstance(x, partial) else x for x in leaves)
    return parts, structure


KNOWN = []


def shared(function, key=lambda *given: given):
    """`function`, called once for arguments whose `key` is equal, until `KNOWN` is cleared."""
    known = {}
    KNOWN.append(known)

    def call(*given, **options):
        at = key_of((key(*given), options))
        try:
            hash(at)
        except TypeError:  # an array among them
            return function(*given, **options)
        if at not in known:
            known[at] = function(*given, **options)
        return known[at]

    return call


SHARED = [
    (jax, "jit", shared(tiny.quick_jit)),
    (components, "make_objective", shared(components.make_objective)),
    (engine, "score_per_token", shared(engine.score_per_token)),
    (student_teacher_kl, "sdpo_per_token", shared(student_teacher_kl.sdpo_per_token)),
    *(
        (trainer, name, shared(getattr(trainer, name)))
        for name in ("make_optimizer", "make_update_programs")
    ),
    (trainer, "make_parameters", shared(trainer.make_parameters, lambda config: config.lora)),
    (
        trainer,
        "make_teacher",
        shared(
            trainer.make_teacher, lambda config: (config.objective, config.teacher, config.lora)
        ),
    ),
]


@contextlib.contextmanager
def programs(*modules, sampler_of=None):
    """Inside, what the modules build has one device; by default, trainers.

    Args:
      modules: whose `make_mesh` and `Sampler` are replaced.
      sampler_of: a model and its stop ids: all trainers share one sampler, which keeps nothing but
        its programs. None: each has its own.
    """
    with pytest.MonkeyPatch.context() as patch:
        for place, name, function in SHARED:
            patch.setattr(place, name, function)
        model, stop_ids = sampler_of or (None, None)
        sampler = model and Sampler(model, tiny.make_devices(), stop_ids)
        for module in modules or (trainer,):
            patch.setattr(module, "make_mesh", lambda config: tiny.make_devices().mesh)
            if sampler:
                patch.setattr(module, "Sampler", lambda *_, **options: sampler)
        yield
    for known in KNOWN:
        known.clear()  # a process that keeps all programs runs out of memory mappings
