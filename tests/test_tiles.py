"""Laws of losses computed a few rows at a time."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax_versions import needs_newer_compiler

from sdpo_jax.losses import tiles
from sdpo_jax.losses.tiles import by_rows

V = 96


def _loss(logits, rows, constants):
    log_probs = jax.nn.log_softmax(logits * constants)
    target, weights = rows
    value = -weights * jnp.sum(target * log_probs, axis=-1)
    return value, {"top": log_probs.max(axis=-1)}


def _arguments(count):
    key, other = jax.random.split(jax.random.key(count))
    target = jax.nn.softmax(jax.random.normal(other, (count, V)))
    return (
        jax.random.normal(key, (count, V)),
        (target, jnp.linspace(0.0, 1.0, count)),
        jnp.float32(1.5),
    )


def _summed(function, logits, rows, constants):
    value, metrics = function(logits, rows, constants)
    return jnp.sum(jnp.sin(value)), (value, metrics)  # not linear: the cotangents differ by row


@pytest.mark.parametrize("count", [1, 3, 8, 12, 64])
@pytest.mark.parametrize("entries", [1, 4 * V, 1 << 20])
def test_rows_together_are_the_rows_alone(monkeypatch, count, entries):
    monkeypatch.setattr(tiles, "ENTRIES", entries)
    arguments = _arguments(count)
    pair = [
        jax.jit(jax.value_and_grad(partial(_summed, f), has_aux=True))(*arguments)
        for f in (partial(by_rows, _loss), _loss)
    ]
    for ours, plain in zip(*map(jax.tree.leaves, pair), strict=True):
        np.testing.assert_allclose(ours, plain, rtol=2e-6, atol=2e-6)


def test_only_the_logits_get_a_gradient():
    logits, rows, constants = _arguments(4)

    def total(rows, constants):
        return jnp.sum(by_rows(_loss, logits, rows, constants)[0])

    for gradient in jax.tree.leaves(jax.grad(total, argnums=(0, 1))(rows, constants)):
        assert not np.any(gradient)


def test_metrics_are_detached():
    _, rows, constants = _arguments(4)
    gradient = jax.grad(lambda z: by_rows(_loss, z, rows, constants)[1]["top"].sum())
    assert not np.any(gradient(_arguments(4)[0]))


@needs_newer_compiler
def test_tiles_keep_the_memory_of_a_chunk_small():
    arguments = jax.tree.map(lambda x: jnp.tile(x, (64,) + (1,) * (x.ndim - 1)), _arguments(64)[:2])

    def memory(function):
        gradient = jax.jit(jax.grad(partial(_summed, function), has_aux=True))
        analysis = gradient.lower(*arguments, jnp.float32(1)).compile().memory_analysis()
        assert analysis is not None
        return analysis.temp_size_in_bytes

    tiled, plain = memory(partial(by_rows, _loss)), memory(_loss)
    assert tiled < 0.8 * plain
