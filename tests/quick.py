"""Cheap compilation on one device: for tests of whole trainers, which build their programs anew.

The folder of conftest.py then holds a program that another trainer has compiled already.
"""

import contextlib

import jax
import pytest
import tiny

from sdpo_jax.rollouts.sampler import Sampler
from sdpo_jax.training import trainer


@contextlib.contextmanager
def programs(*modules, sampler_of=None):
    """Inside, what the modules build has one device; by default, trainers.

    Args:
      modules: whose `make_mesh` and `Sampler` are replaced.
      sampler_of: a model and its stop ids: all trainers share one sampler, which keeps nothing but
        its programs. None: each has its own.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "jit", tiny.quick_jit)
        model, stop_ids = sampler_of or (None, None)
        sampler = model and Sampler(model, tiny.make_devices(), stop_ids)
        for module in modules or (trainer,):
            patch.setattr(module, "make_mesh", lambda config: tiny.make_devices().mesh)
            if sampler:
                patch.setattr(module, "Sampler", lambda *_, **options: sampler)
        yield
