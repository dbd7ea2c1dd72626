"""Attention in blocks equals a softmax over each sequence: values, gradients, on any mesh."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from sdpo_jax.data.packing import Pair, pack_rows, pack_shared_prompts
from sdpo_jax.model import BLOCK_TOKENS, Blocks
from sdpo_models.attention import blocks_attention

# Float32 sums of up to 330 terms of size one, against float64.
FLOAT32 = 1e-5
HEADS, KV_HEADS, SIZE, WIDTH, ROWS = 4, 2, 8, 640, 64
WINDOW = 70  # longer than a block, shorter than a prompt and than a response

# Of each bin: prompts with the lengths of what continues them. They reach over several blocks, fill
# blocks exactly, are of one token, share a prompt or have one of their own.
BINS = [[(200, [130, 1, 64, 65])], [(1, [3, 200]), (64, [1]), (63, []), (129, [2])], [], [(5, [])]]


def sequences(prompts):
    """Places of (what it continues, its own tokens) of each sequence of a bin, in order."""
    start = 0
    for prompt, others in prompts:
        shared = np.arange(start, start + prompt)
        yield np.arange(0), shared
        start += prompt
        for own in others:
            yield shared, np.arange(start, start + own)
            start += own


@cache
def blocks():
    """The table of BINS, with room to spare."""
    random = np.random.default_rng(0)
    bins = [
        [
            Pair(ids, tiny.random_ids(random, own + 1))
            for prompt, others in prompts
            for ids in [tiny.random_ids(random, prompt)]
            # A response's last token is not packed: a response of one token continues nothing.
            for own in others or [0]
        ]
        for prompts in BINS
    ]
    pairs = [pair for members in bins for pair in members]
    numbers = iter(range(len(pairs)))
    packed = pack_shared_prompts(pairs, [[next(numbers) for _ in members] for members in bins])
    assert packed.table is not None and packed.tokens.shape[1] <= WIDTH
    table = np.zeros((len(BINS), ROWS, 5), np.int32)
    table[:, : packed.table.shape[1]] = packed.table
    return Blocks(table, packed.blocks)


@cache
def arrays():
    """Queries, keys, values and the cotangent, in numpy; large enough for an uneven softmax."""
    random = np.random.default_rng(1)
    shapes = [(len(BINS), WIDTH, n, SIZE) for n in (HEADS, KV_HEADS, KV_HEADS, HEADS)]
    return [np.float32(1.5 * random.normal(size=shape)) for shape in shapes]


@cache
def in_sequences():
    """`[B, S]`, where tokens stand; nothing else is ever read."""
    there = np.zeros((len(BINS), WIDTH), bool)
    for row, prompts in zip(there, BINS, strict=True):
        for _, own in sequences(prompts):
            row[own] = True
    return there


def reference(q, k, v, slope, window=None):
    """Output and gradients, in float64, from the formula: one sequence, one head at a time."""
    q, k, v, slope = (np.asarray(x, np.float64) for x in (q, k, v, slope))
    out, dq, dk, dv = (np.zeros_like(x) for x in (q, q, k, v))
    for b, prompts in enumerate(BINS):
        for shared, own in sequences(prompts):
            keys = np.concatenate([shared, own])
            distance = (len(shared) + np.arange(len(own)))[:, None] - np.arange(len(keys))
            seen = (distance >= 0) & (distance < (window or np.inf))
            for head in range(HEADS):
                mine = b, own, head
                theirs = b, keys, head // (HEADS // KV_HEADS)
                scores = np.where(seen, q[mine] @ k[theirs].T / np.sqrt(SIZE), -np.inf)
                weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
                weights /= weights.sum(axis=-1, keepdims=True)
                out[mine] = weights @ v[theirs]
                dw = slope[mine] @ v[theirs].T
                ds = weights * (dw - (dw * weights).sum(axis=-1, keepdims=True)) / np.sqrt(SIZE)
                dq[mine] = ds @ k[theirs]
                dk[theirs] += ds.T @ q[mine]
                dv[theirs] += weights.T @ slope[mine]
    return out, dq, dk, dv


def run(q, k, v, slope, blocks, slides=None, window=None):
    """Output and gradients of what is in a sequence, as every loss reads it."""
    there = jnp.asarray(in_sequences())[:, : q.shape[1], None, None]

    def attend(q, k, v):
        out = blocks_attention(q, k, v, blocks, window=window, slides=slides)
        return jnp.where(there, out, jnp.zeros((), out.dtype))

    out, pull = jax.vjp(attend, q, k, v)
    return out, *pull(slope)


@cache
def compiled(window=None):
    return tiny.quick_jit(lambda *args: run(*args, window=window))


def assert_close(got, expected, atol=FLOAT32):
    for name, a, b in zip(["out", "dq", "dk", "dv"], got, expected, strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float64), b, atol=atol, rtol=atol, err_msg=name)


def test_values_and_gradients_are_those_of_a_softmax_over_each_whole_sequence():
    assert_close(compiled()(*arrays(), blocks()), reference(*arrays()))


def test_a_bin_may_end_with_its_last_token():
    """A block that would reach over the end begins earlier, and leaves what it finds there."""
    end = max(np.flatnonzero(there).max(initial=0) for there in in_sequences()) + 1
    assert end % BLOCK_TOKENS
    short = [x[:, :end] for x in arrays()]
    expected = [x[:, :end] for x in reference(*arrays())]
    assert_close(compiled()(*short, blocks()), expected)


def test_a_bin_of_less_than_a_block_is_refused_with_both_values():
    q, k, v, _ = (x[:, :40] for x in arrays())
    with pytest.raises(ValueError, match="at least 64 tokens, got 40"):
        blocks_attention(q, k, v, blocks())


@pytest.mark.parametrize("window", [WINDOW, pytest.param(3, marks=pytest.mark.slow)])
def test_a_traced_flag_says_whether_the_layer_slides_along_prompt_and_response(window):
    for slides in (True, False):
        got = compiled(window)(*arrays(), blocks(), jnp.array(slides))
        assert_close(got, reference(*arrays(), window=window if slides else None))


def test_rows_of_the_table_beyond_its_count_are_ignored():
    table, filled = blocks()
    spoilt = np.where(np.arange(ROWS)[None, :, None] < filled[:, None, None], table, 77)
    assert not np.array_equal(spoilt, table)
    got, expected = (compiled()(*arrays(), Blocks(t, filled)) for t in (spoilt, table))
    jax.tree.map(np.testing.assert_array_equal, got, expected)


def test_tokens_outside_all_sequences_change_nothing():
    away = ~in_sequences()[:, :, None, None]
    spoilt = [np.where(away, np.float32(1e3), x) for x in arrays()]
    got, expected = (compiled()(*x, blocks()) for x in (spoilt, arrays()))
    jax.tree.map(np.testing.assert_array_equal, got, expected)
    for gradient in got[1:]:
        assert not np.asarray(gradient)[np.broadcast_to(away, gradient.shape)].any()


def test_a_sibling_or_another_sequence_changes_nothing():
    """Of the first bin, the prompt's second and third continuation; the fourth is not read."""
    q, k, v, slope = (x.copy() for x in arrays())
    *_, (shared, fourth) = sequences(BINS[0])
    for x in (q, k, v):
        x[0, fourth] += 1.0
    out = compiled()(q, k, v, slope, blocks())[0]
    expected = compiled()(*arrays(), blocks())[0]
    rest = np.setdiff1d(np.arange(WIDTH), fourth)
    np.testing.assert_array_equal(out[0, rest], expected[0, rest])
    np.testing.assert_array_equal(out[1:], expected[1:])
    assert len(shared) == 200 and not np.allclose(out[0, fourth], expected[0, fourth])


def test_bfloat16_stays_bfloat16_and_close():
    low = [jnp.asarray(x, jnp.bfloat16) for x in arrays()]
    got = compiled()(*low, blocks())
    assert [x.dtype for x in got] == [jnp.bfloat16] * 4
    expected = reference(*low)
    for a, b in zip(got, expected, strict=True):
        error = np.abs(np.asarray(a, np.float64) - b)
        # Eight bits of mantissa: in the queries' scale, the weights and the result.
        assert error.max() < 0.03 * np.abs(b).max()
        assert np.sqrt(np.mean(error**2)) < 0.01 * np.sqrt(np.mean(b**2))


# Four devices for two key-value heads: each computes all heads.
@pytest.mark.parametrize("shape", [(2, 2, 2), pytest.param((2, 1, 4), marks=pytest.mark.slow)])
def test_a_mesh_of_rows_and_heads_changes_nothing(shape):
    devices = tiny.make_devices(*shape)
    across = devices.jit(lambda *args: run(*args, window=WINDOW), compiler_options=tiny.QUICK)
    placed = jax.tree.map(devices.put_rows, (*arrays(), blocks()))
    slides = jnp.array(True)
    got = across(*placed, jax.device_put(slides, devices.replicated))
    expected = compiled(WINDOW)(*arrays(), blocks(), slides)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=FLOAT32)


# The whole model


def two_forms(seed=0):
    """The same pairs end to end and in rows, `(tokens, positions, attention, targets)` each."""
    random = np.random.default_rng(seed)
    first, second = tiny.random_ids(random, BLOCK_TOKENS + 6), tiny.random_ids(random, 3)
    sizes = [(first, 4), (first, BLOCK_TOKENS + 9), (second, 1), (second, 6)]
    pairs = [Pair(prompt, tiny.random_ids(random, n)) for prompt, n in sizes]
    members = [list(range(len(pairs)))]
    end_to_end, rows = pack_shared_prompts(pairs, members), pack_rows(pairs, members)
    assert end_to_end.blocks is not None and rows.segments is not None
    blocks = Blocks(end_to_end.table, end_to_end.blocks)
    return [
        jax.tree.map(jnp.asarray, (p.tokens, p.positions, attention, p.target_positions[0]))
        for p, attention in ((end_to_end, blocks), (rows, rows.segments))
    ]


def gradients_and_values(model, inputs):
    """`params -> (gradients, predictions)`; every prediction counts, each differently."""
    tokens, positions, attention, targets = inputs

    def loss(params):
        hidden = model.hidden(params, tokens, positions, attention)
        taken = hidden.reshape(-1, hidden.shape[-1])[targets]
        return jnp.sum(jnp.sin(taken + jnp.arange(len(targets), dtype=jnp.float32)[:, None])), taken

    return jax.grad(loss, has_aux=True)


def assert_same(got, expected, atol):
    for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(expected), strict=True):
        scale = max(1.0, float(np.abs(b).max()))
        np.testing.assert_allclose(a, b, atol=atol * scale, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize(
    "family",
    # Olmo 3 has full and sliding layers; the others differ in rotations and biases.
    [pytest.param(f, marks=[] if f == "olmo3" else pytest.mark.slow) for f in tiny.FAMILIES],
)
def test_the_model_in_blocks_is_the_model_in_packed_segments(family):
    model = tiny.make_model(tiny.FAMILIES[family])
    params = tiny.make_params(tiny.FAMILIES[family])
    forms = two_forms()
    both = tiny.quick_jit(lambda p: [gradients_and_values(model, form)(p) for form in forms])
    got, expected = both(params)
    # Float32 over up to three layers and 140 tokens, forwards and backwards.
    assert_same(got, expected, atol=2e-5)


@pytest.mark.parametrize("form", ["blocks", "segments"])
@pytest.mark.parametrize("remat", ["dots", pytest.param("full", marks=pytest.mark.slow)])
def test_target_positions_have_the_values_and_gradients_of_all_positions(form, remat):
    """In blocks the last layer then ends with these tokens; olmo3 has norms after its products."""
    architecture = tiny.FAMILIES["olmo3"]
    model, params = tiny.make_model(architecture, remat=remat), tiny.make_params(architecture)
    tokens, positions, attention, targets = two_forms()[form == "segments"]

    def loss(params, early):
        if early:
            select = {"target_positions": targets[None]}
            taken = model.hidden(params, tokens, positions, attention, **select)[0]
        else:
            hidden = model.hidden(params, tokens, positions, attention)
            taken = hidden.reshape(-1, hidden.shape[-1])[targets]
        return jnp.sum(jnp.sin(taken + jnp.arange(len(targets), dtype=jnp.float32)[:, None])), taken

    assert targets.size < tokens.size
    both = tiny.quick_jit(lambda p: [jax.grad(loss, has_aux=True)(p, x) for x in (True, False)])
    got, expected = both(params)
    assert_same(got, expected, atol=1e-5)


POLICIES = ["dots", "full", "offload"]


@pytest.mark.slow
@pytest.mark.parametrize("form", ["blocks", "segments"])
def test_rematerialization_changes_neither_value_nor_gradient(form):
    architecture = tiny.FAMILIES["olmo3"]
    params, inputs = tiny.make_params(architecture), two_forms()[form == "segments"]

    def compute(remat):
        model = tiny.make_model(architecture, remat=remat)
        return tiny.quick_jit(gradients_and_values(model, inputs))

    expected = compute("none")(params)
    for remat in POLICIES:
        assert_same(compute(remat)(params), expected, atol=1e-5)


def test_offloading_keeps_the_layers_inputs_in_the_hosts_memory():
    """What is computed on a CPU cannot tell: there it is one memory."""
    params, inputs = tiny.make_params(), two_forms()[0]
    for remat in ("full", "offload"):
        model = tiny.make_model(remat=remat)
        program = str(jax.make_jaxpr(gradients_and_values(model, inputs))(params))
        moved = f"f32<host>[{inputs[0].size},{tiny.ARCHITECTURE.width}]" in program
        assert moved == (remat == "offload")
