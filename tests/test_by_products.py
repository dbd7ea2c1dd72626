"""By-products against numpy: each reduction, detached, alone and next to a loss."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from sdpo_jax.losses.by_products import ByProducts, by_products

N, V = 4, 6


def arrays(dtype):
    student, teacher = reference.log_softmax(np.random.default_rng(0).normal(size=(2, N, V)))
    teacher[0] = np.sort(teacher[0])[student[0].argsort().argsort()]  # one order: they agree once
    return jnp.array(student, dtype), jnp.array(teacher, dtype), jnp.array([0, 5, 2, 2])


def expected(student, teacher, targets):
    s, t = (np.float64(x) for x in (student, teacher))
    return ByProducts(
        student_entropy=reference.entropy(s),
        teacher_entropy=reference.entropy(t),
        forward_kl=reference.kl(t, s),
        reverse_kl=reference.kl(s, t),
        jsd=reference.divergence(s, t, 0.5),
        log_prob=reference.pick(s, targets),
        teacher_log_prob=reference.pick(t, targets),
        same_token=np.float64(s.argmax(axis=-1) == t.argmax(axis=-1)),
    )


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-6), ("float64", 1e-14)])
def test_each_is_its_formula(dtype, tolerance):
    with jax.enable_x64(dtype == "float64"):
        got = jax.jit(by_products)(*arrays(dtype))
        want = expected(*arrays(dtype))
        for name, value in got._asdict().items():
            assert value.dtype == jnp.dtype(dtype) and value.shape == (N,)
            np.testing.assert_allclose(
                value, want._asdict()[name], rtol=tolerance, atol=tolerance, err_msg=name
            )


def test_jeffreys_of_the_kls_and_the_bound_of_the_jsd():
    got = by_products(*arrays("float32"))
    assert np.all(got.jsd <= np.log(2))
    assert np.all(got.jsd <= (got.forward_kl + got.reverse_kl) / 8 + 1e-6)  # Lin 1991: J / 4 · 1/2
    assert np.all(got.student_entropy <= np.log(V) + 1e-6)


def test_all_are_detached_from_student_and_teacher():
    student, teacher, targets = arrays("float32")

    def total(student, teacher):
        return sum(jnp.sum(x) for x in by_products(student, teacher, targets))

    for gradient in jax.grad(total, argnums=(0, 1))(student, teacher):
        np.testing.assert_array_equal(gradient, 0.0)


def test_impossible_tokens_leave_all_but_their_own_log_prob_finite():
    student = jnp.array([[0.0, -jnp.inf], [-jnp.inf, 0.0]])
    got = by_products(student, student[::-1], jnp.array([0, 0]))
    for name in set(ByProducts._fields) - {"log_prob", "teacher_log_prob"}:
        assert np.all(np.isfinite(got._asdict()[name])), name
    np.testing.assert_array_equal(got.student_entropy, 0.0)
    np.testing.assert_allclose(got.jsd, np.log(2), rtol=1e-6)
    np.testing.assert_array_equal(got.log_prob, [0.0, -np.inf])


def test_the_likeliest_tokens_are_compared_also_where_the_vocabulary_is_cut_and_several_tie():
    student = np.log([[0.4, 0.1, 0.4, 0.1], [0.4, 0.1, 0.4, 0.1], [0.7, 0.1, 0.1, 0.1]])
    teacher = np.log([[0.1, 0.1, 0.7, 0.1], [0.1, 0.7, 0.1, 0.1], [0.25] * 4])
    pair = jnp.array(student), jnp.array(teacher)
    targets = jnp.zeros(3, jnp.int32)
    mesh = jax.make_mesh((4,), ("tensor",), axis_types=(AxisType.Auto,))
    cut = jax.shard_map(
        partial(by_products, vocabulary_axis="tensor"),
        mesh=mesh,
        in_specs=(P(None, "tensor"), P(None, "tensor"), P()),
        out_specs=P(),
    )
    for got in (by_products(*pair, targets), jax.jit(cut)(*pair, targets)):
        np.testing.assert_array_equal(got.same_token, [1.0, 0.0, 1.0])


def test_what_nobody_reads_is_not_computed():
    student, teacher, targets = arrays("float32")

    def compiled(*names):
        def read(student, teacher):
            found = by_products(jax.nn.log_softmax(student), jax.nn.log_softmax(teacher), targets)
            return [getattr(found, name) for name in names]

        cost = jax.jit(read).lower(student, teacher).compile().cost_analysis()
        assert cost is not None
        return cost["flops"]

    assert compiled("jsd", "same_token") > compiled("jsd")
    assert compiled("same_token") < compiled("jsd", "same_token")
