"""Functions over the vocabulary, whole and cut over a mesh axis."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jax_versions import auto_mesh, needs_shard_map
from jax_versions import quick_jit as jit

from sdpo_jax.losses.distillation import top_k_loss
from sdpo_jax.losses.divergences import generalized_jsd
from sdpo_jax.losses.fused_linear import fused_linear_loss
from sdpo_jax.losses.per_token import (
    GrpoSharedInputs,
    GrpoTokenInputs,
    MixedSharedInputs,
    MixedTokenInputs,
    SdpoSharedInputs,
    SdpoTokenInputs,
    SftTokenInputs,
    grpo_per_token,
    mixed_per_token,
    sampled_token_sdpo,
    sdpo_per_token,
    sft_per_token,
)
from sdpo_jax.losses.vocabulary import (
    WHOLE,
    Vocabulary,
    log_softmax,
    select_targets,
    take_entries,
    top_k_indices,
    trust_region_logits,
)

M, D, V = 16, 5, 24
AXIS = "tensor"
CUT = Vocabulary(AXIS)
CLIPS = {"clip_low": 0.2, "clip_high": 0.28, "dual_clip": 3.0}


def mesh():
    return auto_mesh((2, 4), ("data", AXIS))


def cut(function, *arrays, specs, out):
    """The function on the mesh; what leaves it is known to be equal on all shards of V."""
    return jit(jax.shard_map(function, mesh=mesh(), in_specs=specs, out_specs=out))(*arrays)


def logits_with_ties():
    """Equal entries within a shard of six and across shards."""
    z = np.random.default_rng(0).integers(0, 4, size=(M, V)).astype(np.float32)
    z[0] = 1.0
    return jnp.array(z)


@needs_shard_map
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("k", [1, 5, 7, 24])
def test_ties_go_to_the_smaller_id_also_across_shards(k, dtype):
    z = logits_with_ties().astype(dtype)
    z = jnp.where((z == 0) & (jnp.arange(V)[None] % 2 == 0), jnp.asarray(-0.0, dtype), z)
    want = np.argsort(-np.asarray(z), axis=-1, kind="stable")[:, :k]
    np.testing.assert_array_equal(top_k_indices(z, k=k), want)
    got = cut(partial(top_k_indices, k=k, vocabulary=CUT), z, specs=(P(None, AXIS),), out=P())
    np.testing.assert_array_equal(got, want)


@needs_shard_map
def test_a_cut_vocabulary_gives_the_same_values():
    z, ids = logits_with_ties() * 0.7, jnp.arange(M) % V
    several = jnp.stack([ids, (ids + 9) % V], axis=1)

    def both(z, ids, several, vocabulary=WHOLE):
        log_probs = log_softmax(z, vocabulary=vocabulary)
        return (
            log_probs,
            select_targets(log_probs, ids, vocabulary=vocabulary),
            take_entries(z, several, vocabulary=vocabulary),
        )

    specs = (P(None, AXIS), P(), P())
    out = (P(None, AXIS), P(), P())
    got = cut(partial(both, vocabulary=CUT), z, ids, several, specs=specs, out=out)
    for g, w in zip(got, both(z, ids, several), strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(got[0], jax.nn.log_softmax(z), rtol=1e-6, atol=1e-6)


@needs_shard_map
def test_ids_may_be_narrower_than_the_vocabulary():
    """A counter of bytes would come back to 5 at 261."""
    z, ids = jnp.arange(512.0)[None], jnp.array([5], jnp.uint8)

    def both(z, ids, vocabulary=WHOLE):
        return (
            select_targets(z, ids, vocabulary=vocabulary),
            take_entries(z, ids[:, None], vocabulary=vocabulary)[:, 0],
        )

    specs = (P(None, AXIS), P())
    on_mesh = cut(partial(both, vocabulary=CUT), z, ids, specs=specs, out=(P(), P()))
    np.testing.assert_array_equal([*both(z, ids), *on_mesh], [[5.0]] * 4)


def objectives(vocabulary):
    full = partial(generalized_jsd, alpha=0.5, vocabulary=vocabulary)
    few = partial(top_k_loss, alpha=1.0, k=7, add_tail=True, vocabulary=vocabulary)
    distill = sdpo_per_token(few, importance_cap=2.0, vocabulary=vocabulary)
    reinforce = grpo_per_token(**CLIPS, vocabulary=vocabulary)
    return {
        "sdpo": sdpo_per_token(full, importance_cap=2.0, vocabulary=vocabulary),
        "top_k": distill,
        "sampled": sampled_token_sdpo(importance_cap=2.0, vocabulary=vocabulary),
        "grpo": reinforce,
        "mixed": mixed_per_token(distill, reinforce),
        "sft": sft_per_token(label_smoothing=0.1, vocabulary=vocabulary),
    }


def problem(name, dtype):
    random = np.random.default_rng(1)
    hidden, teacher = (jnp.array(random.normal(size=(M, D)), dtype) for _ in range(2))
    head, teacher_head = (jnp.array(random.normal(size=(D, V)), dtype) for _ in range(2))
    targets = jnp.array(random.integers(0, V, size=M), jnp.int32)
    old, advantages = (jnp.array(random.normal(size=M) - c, dtype) for c in (3.0, 0.0))
    temperature = jnp.asarray(1.3, dtype)
    aux, constants, axes = SftTokenInputs(targets), None, None
    if name == "grpo":
        aux, constants = GrpoTokenInputs(targets, old, advantages), GrpoSharedInputs(temperature)
        axes = GrpoSharedInputs(P())
    elif name != "sft":
        aux = SdpoTokenInputs(teacher, targets, old)
        constants = SdpoSharedInputs(teacher_head, temperature)
        axes = SdpoSharedInputs(P(None, AXIS), P())
    if name == "mixed":
        share = jnp.array(random.uniform(size=M), dtype)
        aux = MixedTokenInputs(aux, GrpoTokenInputs(targets, old, advantages), share, 1.0 - share)
        constants = MixedSharedInputs(constants, GrpoSharedInputs(temperature))
        axes = MixedSharedInputs(axes, GrpoSharedInputs(P()))
    return hidden, head, aux, jnp.array(random.integers(0, 3, size=M), dtype), constants, axes


def check(name, dtype, tolerance, automatic):
    hidden, head, aux, weights, constants, axes = problem(name, dtype)

    def loss(vocabulary, chunk, hidden, head, aux, weights, constants):
        return fused_linear_loss(
            objectives(vocabulary)[name],
            hidden,
            head,
            aux,
            weights,
            chunk=chunk,
            constants=constants,
        )

    def sharded(hidden, head, aux, weights, constants):
        total, metrics = loss(CUT, 4, hidden, head, aux, weights, constants)
        return jax.lax.psum(total, "data"), metrics

    specs = (P("data"), P(None, AXIS), P("data"), P("data"), axes)
    on_mesh = jax.shard_map(sharded, mesh=mesh(), in_specs=specs, out_specs=(P(), P("data")))

    def run(function, *arrays):
        gradient = jax.value_and_grad(function, argnums=(0, 1), has_aux=True)
        return jit(gradient)(*arrays)

    got = run(on_mesh, hidden, head, aux, weights, constants)
    whole = partial(loss, WHOLE, 4)
    want = run(whole, hidden, head, aux, weights, constants)
    assert_close(got, want, tolerance)
    if automatic:
        places = jax.tree.map(partial(NamedSharding, mesh()), specs, is_leaf=is_spec)
        arrays = [hidden, head, aux, weights, constants]
        arrays = [
            jax.tree.map(jax.device_put, x, spread_specs(x, place))
            for x, place in zip(arrays, places, strict=True)
        ]
        assert_close(run(whole, *arrays), want, tolerance)


def is_spec(x):
    return isinstance(x, P)


def spread_specs(tree, place):
    """One place for all leaves of a tree, or the tree of places as it is."""
    if isinstance(place, NamedSharding):
        return jax.tree.map(lambda _: place, tree)
    return place


def assert_close(got, want, tolerance):
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        scale = max(1.0, float(jnp.max(jnp.abs(w))))
        np.testing.assert_allclose(g, w, rtol=0, atol=tolerance * scale)


@needs_shard_map
@pytest.mark.parametrize(
    "name",
    # The others are cut in float64 below.
    [pytest.param(n, marks=() if n == "sdpo" else pytest.mark.slow) for n in objectives(WHOLE)],
)
def test_the_head_cut_over_the_vocabulary_and_rows_is_the_whole_head(name):
    """By hand, and by the compiler for arrays that lie cut."""
    check(name, jnp.float32, 3e-6, automatic=True)


@needs_shard_map
@pytest.mark.parametrize("name", objectives(WHOLE))
def test_the_head_cut_over_the_vocabulary_is_exact_in_float64(x64, name):
    check(name, jnp.float64, 1e-12, automatic=False)


def test_the_ends_of_the_trust_region_hold_for_impossible_tokens():
    reference, live = jnp.array([0.0, -jnp.inf]), jnp.array([-jnp.inf, 1.0])
    np.testing.assert_array_equal(trust_region_logits(reference, live, 0.0), reference)
    np.testing.assert_array_equal(trust_region_logits(reference, live, 1.0), live)
