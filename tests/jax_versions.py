"""What the tests of the losses need of jax, under every version that the losses support."""

from functools import partial

import jax
import jax.experimental
import pytest

from sdpo_jax.losses.vocabulary import log_softmax

HAS_SHARD_MAP = hasattr(jax, "shard_map")
"""jax before 0.6 has no `jax.shard_map`, and marks no array as varying over a mesh axis."""

needs_shard_map = pytest.mark.skipif(not HAS_SHARD_MAP, reason="this jax has no jax.shard_map")

needs_newer_compiler = pytest.mark.skipif(
    not HAS_SHARD_MAP, reason="jax before 0.6 lowers to another program"
)

quick_jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
"""For what is compiled once and run once: the compiler's time counts."""


def enable_x64(enabled):
    """A context in which arrays may be float64."""
    if hasattr(jax, "enable_x64"):
        return jax.enable_x64(enabled)
    return vars(jax.experimental)["enable_x64"](enabled)


def auto_mesh(sizes, names):
    """A mesh whose axes the compiler handles, `jax.make_mesh` of every version."""
    if hasattr(jax.sharding, "AxisType"):
        return jax.make_mesh(sizes, names, axis_types=(jax.sharding.AxisType.Auto,) * len(names))
    return jax.make_mesh(sizes, names)


def from_logits(divergence, student_logits, teacher_logits, **arguments):
    """A divergence of log-probabilities, from logits."""
    return divergence(log_softmax(student_logits), log_softmax(teacher_logits), **arguments)
