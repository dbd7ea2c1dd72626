"""How the teacher's weights follow the student."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdpo_jax.losses.vocabulary import trust_region_logits
from sdpo_jax.teacher.weights import ema, ema_update, frozen, live


def params(seed, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(seed), 2)
    shapes = {"layers": (2, 3, 4), "head": (4, 5)}
    return {
        name: jax.random.normal(key, shape, dtype)
        for (name, shape), key in zip(shapes.items(), keys, strict=True)
    }


def assert_equal(got, want):
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_ema_is_the_formula_and_exact_at_both_ends():
    teacher, student = params(0), params(1)
    got = ema_update(teacher, student, 0.05)
    for name in teacher:
        want = 0.95 * np.float64(teacher[name]) + 0.05 * np.float64(student[name])
        np.testing.assert_allclose(got[name], want, rtol=1e-5, atol=1e-7)
    assert_equal(ema_update(teacher, student, 0.0), teacher)
    assert_equal(ema_update(teacher, student, 1.0), student)


def test_ema_converges_geometrically():
    teacher, student = params(0), params(1)
    moved = teacher
    for _ in range(20):
        moved = ema_update(moved, student, 0.1)
    for name in teacher:
        distance = np.float64(moved[name]) - np.float64(student[name])
        start = np.float64(teacher[name]) - np.float64(student[name])
        np.testing.assert_allclose(distance, 0.9**20 * start, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_ema_is_float32_whatever_the_student_is(dtype):
    got = ema_update(params(0, dtype), params(1, dtype), 0.05)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(got))


def test_a_slow_ema_of_a_bfloat16_student_moves():
    """In bfloat16, 1 + 0.01 · 0.1 rounds back to 1 and the teacher never moves."""
    teacher = {"w": jnp.ones(3)}
    student = {"w": jnp.full(3, 1.1, jnp.bfloat16)}
    for _ in range(200):
        teacher = ema_update(teacher, student, 0.01)
    target = np.float64(student["w"].astype(jnp.float32))
    np.testing.assert_allclose(teacher["w"], target + 0.99**200 * (1 - target), rtol=1e-5)


def test_rate_may_be_traced():
    teacher, student = params(0), params(1)
    got = jax.jit(ema_update)(teacher, student, jnp.float32(0.3))
    jax.tree.map(
        lambda g, w: np.testing.assert_allclose(g, w, atol=1e-6),
        got,
        ema_update(teacher, student, 0.3),
    )


@pytest.mark.parametrize("under_jit", [False, True])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("teacher", [frozen(), ema(0.05)], ids=["frozen", "ema"])
def test_the_teacher_survives_the_donation_of_the_student(teacher, dtype, under_jit):
    student = params(0, dtype)
    want = jax.tree.map(lambda x: np.asarray(x.astype(jnp.float32)), student)
    state = (jax.jit(teacher.init) if under_jit else teacher.init)(student)
    for leaf in jax.tree.leaves(student):
        leaf.delete()
    assert_equal(state, want)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(state))


def test_frozen_stays_ema_moves_live_is_the_student():
    first, later = params(0), params(1)
    for teacher, want in [
        (frozen(), first),
        (ema(0.25), ema_update(first, later, 0.25)),
        (live(), later),
    ]:
        state = jax.jit(teacher.update)(teacher.init(first), later)
        for got, expected in zip(
            jax.tree.leaves(teacher.params(state, later)), jax.tree.leaves(want), strict=True
        ):
            np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-7)
    assert not jax.tree.leaves(live().init(first))


def test_trust_region_is_the_normalised_geometric_mixture(x64):
    random = np.random.default_rng(0)
    reference, student = random.normal(size=(3, 7)), random.normal(size=(3, 7))

    def log_softmax(x):
        return x - np.log(np.sum(np.exp(x), axis=-1, keepdims=True))

    got = trust_region_logits(jnp.float32(reference), jnp.float32(student), 0.3)
    want = log_softmax(0.7 * log_softmax(reference) + 0.3 * log_softmax(student))
    np.testing.assert_allclose(log_softmax(np.float64(got)), want, atol=1e-6)


def test_trust_region_ends_are_reference_and_student():
    reference, student = params(0)["head"], params(1)["head"]
    assert_equal(trust_region_logits(reference, student, 0.0), reference)
    assert_equal(jax.jit(trust_region_logits)(reference, student, jnp.float32(1.0)), student)


def test_bad_arguments_name_what_came():
    with pytest.raises(ValueError, match=r"\[0, 1\], got 1\.5"):
        ema(1.5)
    with pytest.raises(ValueError, match=r"\[3\] and \[1\]"):
        ema_update({"w": jnp.ones(3)}, {"w": jnp.ones(1)}, 0.1)
