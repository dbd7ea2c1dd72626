"""The decoder agrees with its formulas, and decode = prefill = whole forward."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from sdpo_models import layers, transformer

# Float32 against float64 over two layers, on logits of size about one.
FLOAT32 = 1e-5


def whole(model, params, tokens):
    """Hidden states of `[B, S]` tokens at their natural positions."""
    return tiny.quick_jit(model.hidden)(params, *as_one_segment(tokens))


def as_one_segment(tokens):
    tokens = jnp.asarray(tokens, jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
    return tokens, positions, jnp.ones_like(tokens)


def random_rows(rows, length, seed=1):
    return np.random.default_rng(seed).integers(0, tiny.VOCABULARY, size=(rows, length))


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_decoder_agrees_with_its_formulas_in_numpy(family):
    architecture = tiny.FAMILIES[family]
    model, params = tiny.make_model(architecture), tiny.make_params(architecture)
    tokens = random_rows(2, 12)
    logits = whole(model, params, tokens) @ model.head(params)
    expected = np.stack([tiny.reference_logits(architecture, params, row) for row in tokens])
    np.testing.assert_allclose(logits, expected, atol=FLOAT32, rtol=FLOAT32)


@pytest.mark.parametrize("converted", [False, True])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_prefill_and_decode_equal_the_whole_forward_at_every_position(family, converted):
    architecture = tiny.FAMILIES[family]
    model, params = tiny.make_model(architecture), tiny.make_params(architecture)
    lengths, group, max_tokens = np.array([5, 2, 8]), 2, 4
    prompts, responses = random_rows(3, 8), random_rows(6, max_tokens, seed=2)
    owner = np.repeat(np.arange(3), group)
    joined = np.zeros((6, 8 + max_tokens), np.int32)
    for n, p in enumerate(owner):
        joined[n, : lengths[p]] = prompts[p, : lengths[p]]
        joined[n, lengths[p] : lengths[p] + max_tokens] = responses[n]
    expected = np.stack([tiny.reference_logits(architecture, params, row) for row in joined])
    head = model.head(params)

    prefix = tiny.quick_jit(model.prefill)(
        params, jnp.asarray(prompts, jnp.int32), jnp.asarray(lengths, jnp.int32)
    )
    last = expected[::group][np.arange(3), lengths - 1]
    np.testing.assert_allclose(prefix.last_hidden @ head, last, atol=FLOAT32)
    cache, decode = model.suffix_cache(6, max_tokens), tiny.quick_jit(model.decode)
    before = params, prefix
    if converted:
        params, prefix, cache = model.to_decode_layout(params, prefix, cache)
    # Rows need not march together: half of them start one call later.
    late = np.array([0, 1, 0, 1, 0, 1])
    for call in range(max_tokens + 1):
        step = np.clip(call - late, 0, max_tokens - 1)
        tokens = jnp.asarray(responses[np.arange(6), step], jnp.int32)
        place = jnp.int32(call % max_tokens)
        hidden, cache = decode(params, prefix, cache, tokens, jnp.asarray(step, jnp.int32), place)
        whole_forward = expected[np.arange(6), lengths[owner] + step]
        going = call - late < max_tokens  # the others are done
        logits = np.asarray(hidden @ head)
        np.testing.assert_allclose(logits[going], whole_forward[going], atol=FLOAT32)
    if converted:
        again = model.to_decode_layout(*before, model.from_decode_layout(cache))[2]
        jax.tree.map(np.testing.assert_array_equal, again, cache)


@pytest.mark.parametrize("family", ["qwen3", "olmo3"])
def test_packed_segments_equal_each_sequence_alone_and_padding_changes_nothing(family):
    architecture = tiny.FAMILIES[family]
    model, params = tiny.make_model(architecture), tiny.make_params(architecture)
    first, second, filler = random_rows(1, 6)[0], random_rows(1, 4, seed=2)[0], [7, 3]
    packed = np.stack([[*first, *second, *filler], [*second, *filler, *filler, *filler, *filler]])
    segments = np.array([[1] * 6 + [2] * 4 + [0] * 2, [1] * 4 + [0] * 8])
    positions = np.array([[*range(6), *range(4), 0, 1], range(12)])
    hidden = tiny.quick_jit(model.hidden)(
        params, *(jnp.asarray(x, jnp.int32) for x in (packed, positions, segments))
    )
    logits = np.asarray(hidden @ model.head(params))
    alone = [tiny.reference_logits(architecture, params, row) for row in (first, second)]
    np.testing.assert_allclose(logits[0, :6], alone[0], atol=FLOAT32)
    np.testing.assert_allclose(logits[0, 6:10], alone[1], atol=FLOAT32)
    np.testing.assert_allclose(logits[1, :4], alone[1], atol=FLOAT32)
    assert np.isfinite(logits).all()


def sliding_only(window):
    """The tiny OLMo 3 whose three layers all slide: they see 3 · (window - 1) tokens back."""
    return replace(tiny.FAMILIES["olmo3"], sliding_layers=(True,) * 3, sliding_window=window)


@pytest.mark.parametrize("window", [1, 2, 4])
def test_a_token_beyond_the_windows_of_all_layers_changes_nothing(window):
    architecture, reach = sliding_only(window), 3 * (window - 1)
    model, params = tiny.make_model(architecture), tiny.make_params(architecture)
    tokens = np.repeat(random_rows(1, 16), 2, axis=0)
    tokens[1, 2] = (tokens[1, 2] + 1) % tiny.VOCABULARY
    a, b = whole(model, params, tokens)
    changed = [i for i in range(16) if not np.array_equal(a[i], b[i])]
    assert changed == list(range(2, 2 + reach + 1))


@pytest.mark.parametrize("family", ["qwen3", pytest.param("olmo3", marks=pytest.mark.slow)])
def test_every_pass_takes_its_mlp_from_one_function(family, monkeypatch):
    """The seam for another MLP: the one of zero weights, put in its place, serves all passes."""
    architecture = tiny.FAMILIES[family]
    params = tiny.make_params(architecture)
    without = params["layers"] | {"down": jnp.zeros_like(params["layers"]["down"])}
    tokens, lengths = jnp.asarray(random_rows(2, 6), jnp.int32), jnp.array([6, 6])

    def passes(params):
        model = transformer.build_model(architecture)
        prefix = model.prefill(params, tokens, lengths)
        cache, step = model.suffix_cache(2, 1), jnp.zeros(2, jnp.int32)
        decoded, _ = model.decode(params, prefix, cache, tokens[:, 0], step, jnp.int32(0))
        return [model.hidden(params, *as_one_segment(tokens)), prefix.last_hidden, decoded]

    expected = tiny.quick_jit(passes)(params | {"layers": without})
    monkeypatch.setattr(layers, "mlp", lambda weights, h: jnp.zeros_like(h))
    # A new function: jit would give the old one's program again.
    for a, b in zip(tiny.quick_jit(lambda p: passes(p))(params), expected, strict=True):
        np.testing.assert_allclose(a, b, atol=FLOAT32)


def test_a_window_longer_than_the_row_is_no_window():
    architecture = sliding_only(100)
    unlimited = replace(architecture, sliding_layers=(), rope_scaling=None)
    params, tokens = tiny.make_params(architecture), random_rows(2, 12)
    wide, plain = (whole(tiny.make_model(a), params, tokens) for a in (architecture, unlimited))
    np.testing.assert_allclose(wide, plain, atol=FLOAT32)


def test_the_window_counts_positions_in_the_segment_not_columns_of_the_row():
    """A response that is packed far behind its place: positions jump, and the window with them."""
    architecture = sliding_only(2)
    model, params = tiny.make_model(architecture), tiny.make_params(architecture)
    tokens, positions, segments = as_one_segment(random_rows(1, 6))
    jump = positions + jnp.where(jnp.arange(6)[None] >= 3, 5, 0)
    run = tiny.quick_jit(model.hidden)
    apart = run(params, tokens, jump, segments)
    cut = run(params, tokens, jump, jnp.where(jnp.arange(6)[None] >= 3, 2, 1))
    np.testing.assert_allclose(apart, cut, atol=FLOAT32)
    assert not np.allclose(apart, run(params, tokens, positions, segments), atol=1e-2)


@pytest.mark.parametrize("family", ["qwen3", pytest.param("olmo3", marks=pytest.mark.slow)])
def test_rematerialization_changes_neither_value_nor_gradient(family):
    architecture = tiny.FAMILIES[family]
    params, tokens = tiny.make_params(architecture), random_rows(2, 12)

    def value_and_grad(remat):
        model = tiny.make_model(architecture, remat=remat)
        inputs = as_one_segment(tokens)
        loss = lambda p: jnp.sum(jnp.sin(model.hidden(p, *inputs)))  # noqa: E731
        return tiny.quick_jit(jax.value_and_grad(loss))(params)

    plain, saved = value_and_grad("none"), value_and_grad("full")
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(saved), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_parameter_has_one_logical_axis_per_dimension(family):
    architecture = tiny.FAMILIES[family]
    model = tiny.make_model(architecture)
    params = jax.eval_shape(model.init, jax.random.key(0))
    is_axes = lambda x: isinstance(x, tuple)  # noqa: E731
    assert jax.tree.structure(params) == jax.tree.structure(model.logical_axes, is_leaf=is_axes)
    axes = jax.tree.leaves(model.logical_axes, is_leaf=is_axes)
    for leaf, names in zip(jax.tree.leaves(params), axes, strict=True):
        assert leaf.ndim == len(names) and leaf.dtype == jnp.float32
    assert (
        model.vocabulary == jax.eval_shape(model.head, params).shape[1] == architecture.vocabulary
    )


def test_init_is_a_function_of_the_key_and_starts_near_the_uniform_distribution():
    model = tiny.make_model()
    init = tiny.quick_jit(model.init)
    a, b, c = (init(jax.random.key(seed)) for seed in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, a, b)
    assert not np.array_equal(a["embedding"], c["embedding"])
    logits = whole(model, a, random_rows(2, 12)) @ model.head(a)
    entropy = -np.sum(np.exp(p := tiny.log_softmax(np.asarray(logits))) * p, axis=-1)
    # Logits of variance one cost half a nat: ln 61 - 0.5, and a margin.
    assert entropy.mean() > np.log(tiny.VOCABULARY) - 1.0


def test_bfloat16_compute_returns_bfloat16_close_to_float32():
    params, tokens = tiny.make_params(), random_rows(2, 12)
    model = tiny.make_model(dtype=jnp.bfloat16)
    hidden = whole(model, params, tokens)
    prefix = tiny.quick_jit(model.prefill)(
        params, jnp.asarray(tokens, jnp.int32), jnp.array([9, 4])
    )
    cache = model.suffix_cache(2, 3)
    decoded, cache = tiny.quick_jit(model.decode)(
        params, prefix, cache, jnp.array([1, 2]), jnp.array([0, 0]), jnp.int32(0)
    )
    for array in (hidden, model.head(params), *prefix[:2], prefix.last_hidden, decoded, *cache):
        assert array.dtype == jnp.bfloat16 and np.isfinite(array.astype(jnp.float32)).all()
    exact = whole(tiny.make_model(), params, tokens)
    # Eight bits of mantissa, two layers, hidden states of size one.
    np.testing.assert_allclose(hidden.astype(jnp.float32), exact, atol=0.1)


def test_a_sharded_model_computes_what_one_device_does():
    """OLMo 3's query-key norm is over an axis that `tensor` splits."""
    architecture = replace(tiny.FAMILIES["olmo3"], vocabulary=64)
    model, params = tiny.make_model(architecture), tiny.make_params(architecture)
    devices = tiny.make_devices(data=2, fsdp=2, tensor=2)
    shardings = devices.parameter_shardings(model.logical_axes, params)
    spread = jax.device_put(params, shardings)
    inputs = tuple(devices.put_rows(x) for x in as_one_segment(random_rows(4, 12)))
    logits = tiny.quick_jit(lambda p: model.hidden(p, *inputs) @ model.head(p))(spread)
    expected = [tiny.reference_logits(architecture, params, row) for row in random_rows(4, 12)]
    np.testing.assert_allclose(logits, np.stack(expected), atol=FLOAT32, rtol=FLOAT32)


def test_a_later_token_changes_no_earlier_hidden_state():
    model, params = tiny.make_model(), tiny.make_params()
    tokens = np.repeat(random_rows(1, 12), 2, axis=0)
    tokens[1, 5:] = (tokens[1, 5:] + 1) % tiny.VOCABULARY
    a, b = whole(model, params, tokens)
    np.testing.assert_array_equal(a[:5], b[:5])
    assert not np.allclose(a[5:], b[5:])
