"""By-products against numpy: each reduction, detached, alone and next to a loss."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from jax.sharding import PartitionSpec as P
from jax_versions import auto_mesh, enable_x64, needs_shard_map

from sdpo_jax.losses.divergences import generalized_jsd
from sdpo_jax.losses.per_token import SdpoSharedInputs, SdpoTokenInputs, sdpo_per_token
from sdpo_jax.losses.token_stats import TokenStats, same_likeliest, token_stats
from sdpo_jax.losses.vocabulary import Vocabulary

N, V = 4, 6


def arrays(dtype):
    student, teacher = reference.log_softmax(np.random.default_rng(0).normal(size=(2, N, V)))
    return jnp.array(student, dtype), jnp.array(teacher, dtype), jnp.array([0, 5, 2, 2])


def expected(student, teacher, targets):
    s, t = (np.float64(x) for x in (student, teacher))
    return TokenStats(
        student_entropy=reference.entropy(s),
        teacher_entropy=reference.entropy(t),
        forward_kl=reference.kl(t, s),
        reverse_kl=reference.kl(s, t),
        jsd=reference.divergence(s, t, 0.5),
        log_prob=reference.pick(s, targets),
        teacher_log_prob=reference.pick(t, targets),
    )


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-6), ("float64", 1e-14)])
def test_each_is_its_formula(dtype, tolerance):
    with enable_x64(dtype == "float64"):
        got = jax.jit(token_stats)(*arrays(dtype))
        want = expected(*arrays(dtype))
        for name, value in got._asdict().items():
            assert value.dtype == jnp.dtype(dtype) and value.shape == (N,)
            np.testing.assert_allclose(
                value, want._asdict()[name], rtol=tolerance, atol=tolerance, err_msg=name
            )


def test_jeffreys_of_the_kls_and_the_bound_of_the_jsd():
    got = token_stats(*arrays("float32"))
    assert np.all(got.jsd <= np.log(2))
    assert np.all(got.jsd <= (got.forward_kl + got.reverse_kl) / 8 + 1e-6)  # Lin 1991: J / 4 · 1/2
    assert np.all(got.student_entropy <= np.log(V) + 1e-6)


def test_all_are_detached_from_student_and_teacher():
    student, teacher, targets = arrays("float32")

    def total(student, teacher):
        return sum(jnp.sum(x) for x in token_stats(student, teacher, targets))

    for gradient in jax.grad(total, argnums=(0, 1))(student, teacher):
        np.testing.assert_array_equal(gradient, 0.0)


def test_impossible_tokens_leave_all_but_their_own_log_prob_finite():
    student = jnp.array([[0.0, -jnp.inf], [-jnp.inf, 0.0]])
    got = token_stats(student, student[::-1], jnp.array([0, 0]))
    for name in set(TokenStats._fields) - {"log_prob", "teacher_log_prob"}:
        assert np.all(np.isfinite(got._asdict()[name])), name
    np.testing.assert_array_equal(got.student_entropy, 0.0)
    np.testing.assert_allclose(got.jsd, np.log(2), rtol=1e-6)
    np.testing.assert_array_equal(got.log_prob, [0.0, -np.inf])


def test_the_likeliest_tokens_are_those_of_numpy():
    student, teacher = np.random.default_rng(0).normal(size=(2, 200, V))
    want = student.argmax(axis=-1) == teacher.argmax(axis=-1)
    assert 0 < want.sum() < 200
    np.testing.assert_array_equal(same_likeliest(jnp.array(student), jnp.array(teacher)), want)


@needs_shard_map
def test_the_likeliest_tokens_are_compared_also_where_the_vocabulary_is_cut_and_several_tie():
    student = jnp.array([[4.0, 1.0, 4.0, 1.0], [4.0, 1.0, 4.0, 1.0], [7.0, 1.0, 1.0, -jnp.inf]])
    teacher = jnp.array([[1.0, 1.0, 7.0, 1.0], [1.0, 7.0, 1.0, 1.0], [2.0, 2.0, 2.0, 2.0]])
    mesh = auto_mesh((4,), ("tensor",))
    cut = jax.shard_map(
        partial(same_likeliest, vocabulary=Vocabulary("tensor")),
        mesh=mesh,
        in_specs=(P(None, "tensor"), P(None, "tensor")),
        out_specs=P(),
    )
    for got in (same_likeliest(student, teacher), jax.jit(cut)(student, teacher)):
        np.testing.assert_array_equal(got, [1.0, 0.0, 1.0])


def test_the_comparison_is_not_computed_where_nobody_reads_it():
    loss = sdpo_per_token(partial(generalized_jsd, alpha=0.5))
    random = np.random.default_rng(0)
    logits, teacher, head = (
        jnp.array(random.normal(size=shape), jnp.float32) for shape in ((N, V), (N, 3), (3, V))
    )
    constants = SdpoSharedInputs(head, jnp.float32(1.0))

    def operations(*names):
        def read(logits, teacher):
            tokens = SdpoTokenInputs(teacher, jnp.zeros(N, jnp.int32))
            value, metrics = loss(logits, tokens, constants)
            return value, [metrics[name] for name in names]

        cost = jax.jit(read).lower(logits, teacher).compile().cost_analysis()
        assert cost is not None
        return cost["flops"]

    assert operations("jsd") < operations("jsd", "same_token")
    assert operations("jsd") == operations()  # the loss is the same divergence
