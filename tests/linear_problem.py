"""A problem for every objective, and the fused linear loss a second time by plain autodiff."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sdpo_jax.losses.divergences import generalized_jsd
from sdpo_jax.losses.fused_linear import head_logits
from sdpo_jax.losses.per_token import (
    GrpoSharedInputs,
    GrpoTokenInputs,
    SdpoSharedInputs,
    SdpoTokenInputs,
    SftTokenInputs,
    grpo_per_token,
    sdpo_per_token,
    sft_per_token,
)
from sdpo_jax.losses.vocabulary import log_softmax, select_targets

M, D, V = 48, 6, 23
# Rounding of log-ratios around 10; the float64 test allows 1e-12.
FLOAT32 = 3e-6
CLIPS = {"clip_low": 0.2, "clip_high": 0.28, "dual_clip": 3.0}


def sdpo(alpha):
    return sdpo_per_token(partial(generalized_jsd, alpha=alpha), importance_cap=2.0)


OBJECTIVES = {
    "sdpo_forward": sdpo(0.0),
    "sdpo_jsd": sdpo(0.5),
    "sdpo_reverse": sdpo(1.0),
    "grpo": grpo_per_token(**CLIPS),
    "sft": sft_per_token(),
}


def problem(name, tokens=M, dtype: Any = np.float32, width=D, vocabulary=V) -> Any:
    random = np.random.default_rng(0)

    def normal(*shape):
        return jnp.array(random.normal(size=shape), dtype)

    hidden, head = normal(tokens, width), normal(width, vocabulary)
    weights = jnp.array(random.integers(0, 3, size=tokens), dtype)
    targets = jnp.array(random.integers(0, vocabulary, size=tokens))
    log_probs = select_targets(log_softmax(hidden @ head / 1.3), targets).astype(dtype)
    old = log_probs + 0.4 * normal(tokens)
    temperature = jnp.asarray(1.3, jnp.float64 if dtype == np.float64 else jnp.float32)
    if name.startswith("sdpo"):
        constants = SdpoSharedInputs(normal(width, vocabulary), temperature)
        aux = SdpoTokenInputs(normal(tokens, width), targets, old)
    elif name == "grpo":
        aux, constants = (
            GrpoTokenInputs(targets, old, normal(tokens)),
            GrpoSharedInputs(temperature),
        )
    else:
        aux, constants = SftTokenInputs(targets), None
    return hidden, head, aux, weights, constants


def all_logits_at_once(per_token_loss, hidden, head, aux, weights, *, chunk, constants=None):
    """What `fused_linear_loss` returns, by plain autodiff."""
    del chunk
    aux, weights, constants = jax.lax.stop_gradient((aux, weights, constants))
    loss, metrics = per_token_loss(head_logits(hidden, head), aux, constants)
    total = jnp.sum(jnp.where(weights != 0, weights.astype(loss.dtype) * loss, 0.0))
    metrics = {k: jax.lax.stop_gradient(v).astype(loss.dtype) for k, v in metrics.items()}
    return total, {"loss": jax.lax.stop_gradient(loss), **metrics}


def run(function, name, hidden, head, aux, weights, constants, *, chunk, scale=0.37, **more):
    def loss(hidden, head):
        total, metrics = function(
            OBJECTIVES[name], hidden, head, aux, weights, chunk=chunk, constants=constants, **more
        )
        return scale * total, metrics

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(hidden, head)


def assert_close(got, want, tolerance):
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert g.shape == w.shape and g.dtype == w.dtype
        scale = max(1.0, float(jnp.max(jnp.abs(w))))
        np.testing.assert_allclose(np.asarray(g), np.asarray(w), rtol=0, atol=tolerance * scale)


def in_first_chunks(filled, *, chunk, block, tokens=M):
    """Which tokens the first chunks hold: of each n blocks that follow each other, the first."""
    chunks = -(-tokens // chunk)
    return (np.arange(tokens) // block) % chunks < filled
