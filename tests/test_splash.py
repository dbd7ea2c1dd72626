"""The splash kernel, interpreted, equals dense softmax attention in values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from sdpo_jax.errors import UserError
from sdpo_models.splash import row_and_block, splash_attention

# Float32 sums in another order, on values and gradients of size about one.
FLOAT32 = 2e-5


def dense(q, k, v, segments, *, window=None, slides=False):
    """Attention from its formula, heads repeated and every score written out."""
    s, d = q.shape[1], q.shape[3]
    k, v = (jnp.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v))
    distance = np.arange(s)[:, None] - np.arange(s)[None, :]
    seen = distance >= 0
    if slides:
        seen &= distance < window
    seen = jnp.asarray(seen)[None] & (segments[:, :, None] == segments[:, None, :])
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, precision="highest") / np.sqrt(d)
    weights = jax.nn.softmax(jnp.where(seen[:, None], scores, -jnp.inf), axis=-1)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v, precision="highest")


def arrays(b, s, heads, kv_heads, d, seed=0):
    """Queries, keys, values, a cotangent and segments."""
    random = np.random.default_rng(seed)
    q, k, v, weights = (
        jnp.asarray(random.normal(size=(b, s, n, d)), jnp.float32)
        for n in (heads, kv_heads, kv_heads, heads)
    )
    # Row by row: three segments and padding behind, or one segment that fills the row.
    cuts = np.array([s // 5, s // 2, s - s // 8])
    packed = np.where(np.arange(s) < cuts[2], 1 + (np.arange(s)[:, None] >= cuts).sum(axis=1), 0)
    segments = np.stack([packed if i % 2 == 0 else np.ones(s) for i in range(b)])
    return q, k, v, weights, jnp.asarray(segments, jnp.int32)


def value_and_gradients(attention, weights, segments):
    """`(q, k, v, slides) -> (output, (dq, dk, dv))`; padding has no weight, as in every loss."""

    @tiny.quick_jit
    def run(q, k, v, slides):
        def weighted(q, k, v):
            out = attention(q, k, v, segments, slides)
            return jnp.sum(jnp.where(segments[:, :, None, None] > 0, out * weights, 0.0)), out

        (_, out), gradients = jax.value_and_grad(weighted, argnums=(0, 1, 2), has_aux=True)(q, k, v)
        return out, gradients

    return run


def interpreted(window=None):
    """The kernel, with `slides` where there is a window."""
    return lambda q, k, v, segments, slides: splash_attention(
        q, k, v, segments, window=window, slides=slides, interpret=True
    )


def assert_close(got, expected, segments):
    real = np.asarray(segments)[:, :, None, None] > 0
    assert np.isfinite(got[0]).all()
    np.testing.assert_allclose(
        np.where(real, got[0], 0.0), np.where(real, expected[0], 0.0), atol=FLOAT32
    )
    for a, b in zip(got[1], expected[1], strict=True):
        np.testing.assert_allclose(a, b, atol=FLOAT32)


@pytest.mark.parametrize(
    ("b", "s", "heads", "kv_heads", "d"),
    [
        *((2, 200, 2, 2, 128), (2, 100, 4, 1, 32), (1, 530, 2, 1, 80)),
        pytest.param(2, 640, 4, 2, 64, marks=pytest.mark.slow),
    ],
)
def test_values_and_gradients_are_those_of_a_dense_softmax(b, s, heads, kv_heads, d):
    q, k, v, weights, segments = arrays(b, s, heads, kv_heads, d)
    plain = lambda q, k, v, segments, slides: dense(q, k, v, segments)  # noqa: E731
    expected = value_and_gradients(plain, weights, segments)(q, k, v, None)
    got = value_and_gradients(interpreted(), weights, segments)(q, k, v, None)
    assert_close(got, expected, segments)


@pytest.mark.parametrize(
    ("s", "window"), [(150, 1), pytest.param(640, 100, marks=pytest.mark.slow)]
)
def test_a_traced_flag_says_whether_the_layer_slides(s, window):
    q, k, v, weights, segments = arrays(2, s, 4, 2, 32)
    run = value_and_gradients(interpreted(window), weights, segments)
    for slides in (True, False):
        plain = lambda q, k, v, segments, _: dense(  # noqa: E731
            q,
            k,
            v,
            segments,
            window=window,
            slides=slides,  # noqa: B023
        )
        expected = value_and_gradients(plain, weights, segments)(q, k, v, None)
        assert_close(run(q, k, v, jnp.array(slides)), expected, segments)


def test_a_window_as_long_as_the_row_is_no_window():
    q, k, v, _, segments = arrays(1, 96, 2, 2, 32)
    run = lambda **how: splash_attention(q, k, v, segments, interpret=True, **how)  # noqa: E731
    unlimited = run(window=None, slides=None)
    np.testing.assert_array_equal(run(window=96, slides=jnp.array(True)), unlimited)
    with pytest.raises(ValueError, match="window is None"):
        run(window=None, slides=jnp.array(True))


def test_output_and_gradients_keep_the_dtype():
    q, k, v, weights, segments = arrays(1, 96, 4, 2, 64)
    low = [x.astype(jnp.bfloat16) for x in (q, k, v)]
    run = lambda *a: interpreted()(*a).astype(jnp.float32)  # noqa: E731
    out, gradients = value_and_gradients(run, weights, segments)(*low, None)
    expected = dense(q, k, v, segments)
    assert [g.dtype for g in gradients] == [jnp.bfloat16] * 3
    assert jax.eval_shape(interpreted(), *low, segments, None).dtype == jnp.bfloat16
    # Eight bits of mantissa, in queries, keys and values of size up to four.
    np.testing.assert_allclose(out, expected, atol=0.05)


# Two key-value heads over two devices, in a layer that may slide; and one head that both need.
@pytest.mark.parametrize(
    ("kv_heads", "window", "flags"),
    [pytest.param(2, 50, (True, False), marks=pytest.mark.slow), (1, None, ())],
)
def test_a_mesh_of_rows_and_heads_changes_nothing(kv_heads, window, flags):
    q, k, v, weights, segments = arrays(4, 120, 4, kv_heads, 32)
    alone, across = (value_and_gradients(interpreted(window), weights, segments) for _ in range(2))
    devices = tiny.make_devices(data=2, fsdp=2, tensor=2)
    for slides in [jnp.array(flag) for flag in flags] or [None]:
        expected = alone(q, k, v, slides)
        with jax.set_mesh(devices.mesh):
            placed = [devices.put_rows(x) for x in (q, k, v)]
            got = across(*placed, jax.device_put(slides, devices.replicated))
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.parametrize(
    ("b", "heads", "message"),
    [(3, 4, "does not divide 3 rows"), (4, 3, "does not divide 3 query heads")],
)
def test_rows_and_heads_that_the_mesh_does_not_divide_are_refused(b, heads, message):
    q, k, v, _, segments = arrays(b, 96, heads, heads, 32)
    with jax.set_mesh(tiny.make_devices(2, 2, 2).mesh), pytest.raises(UserError, match=message):
        splash_attention(q, k, v, segments, window=None, slides=None, interpret=True)


def test_rows_are_padded_by_less_than_two_lanes_to_whole_blocks():
    for s in range(1, 9000):
        padded, block = row_and_block(s)
        assert s <= padded < s + 256
        assert padded % block == 0
        assert block % 128 == 0
        assert block == padded if s <= 512 else 256 <= block <= 512
    assert row_and_block(4096) == (4096, 512)
