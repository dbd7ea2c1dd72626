"""Sampling is a function of (seed, step, prompt, sibling, position) and of the training forward."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from sdpo_jax.model import Model, Prefix, SuffixCache
from sdpo_jax.rollouts.generate import rollout_keys
from sdpo_jax.rollouts.sampler import Sampler
from sdpo_jax.rollouts.token_sampling import Filters, nucleus, sample_tokens

STOP = (7, 11, 13, 17, 19)
ARCHITECTURE = replace(tiny.ARCHITECTURE, vocabulary=64)
MODEL = tiny.make_model(ARCHITECTURE)
LIMIT = 12
RANDOM = np.random.default_rng(0)
PROMPTS = [tiny.random_ids(RANDOM, n) for n in (5, 3, 9)]
DEFAULTS: dict[str, Any] = {
    "group": 4,
    "max_tokens": LIMIT,
    "temperature": 1.0,
    "seed": 3,
    "step": 5,
}


@pytest.fixture(scope="module")
def params():
    return tiny.make_params(ARCHITECTURE)


@pytest.fixture(scope="module")
def sampler():
    return Sampler(MODEL, tiny.make_devices(), STOP)


@pytest.fixture(scope="module")
def rollouts(sampler, params):
    return sampler(params, PROMPTS, **DEFAULTS)


def full_forward_log_probs(params, prompt, response, temperature=1.0):
    """`[T, V]` log-probs at each response position, in float64 numpy."""
    logits = tiny.reference_logits(ARCHITECTURE, params, [*prompt, *response])
    return tiny.log_softmax(logits[len(prompt) - 1 : -1] / temperature)


def assert_same(a, b):
    assert a.responses() == b.responses()
    np.testing.assert_array_equal(a.stopped, b.stopped)
    np.testing.assert_allclose(a.log_probs, b.log_probs, atol=1e-5)


def take(rollouts, rows):
    return type(rollouts)(*(np.asarray(x)[rows] for x in rollouts[:4]))


def test_a_draw_does_not_depend_on_what_else_is_in_the_batch(sampler, params, rollouts):
    alone = sampler(params, PROMPTS[1:2], first_prompt=1, **DEFAULTS)
    assert_same(alone, take(rollouts, slice(4, 8)))


def test_a_draw_does_not_depend_on_padding_or_bucket(sampler, params, rollouts):
    long = tiny.random_ids(np.random.default_rng(1), 40)  # moves every prompt to the next bucket
    padded = sampler(params, [*PROMPTS, long], prompt_rows=6, **DEFAULTS)
    assert len(padded.tokens) == 16
    assert_same(take(padded, slice(0, 12)), rollouts)


def test_fewer_siblings_and_a_lower_limit_give_a_part_of_the_same(sampler, params, rollouts):
    fewer = sampler(params, PROMPTS, **dict(DEFAULTS, group=2, max_tokens=5))
    responses = rollouts.responses()
    assert fewer.responses() == [responses[n][:5] for n in (0, 1, 4, 5, 8, 9)]


@pytest.mark.parametrize("change", [{"seed": 4}, {"step": 6}, {"first_prompt": 1}])
def test_another_seed_step_or_prompt_index_draws_other_tokens(sampler, params, rollouts, change):
    other = sampler(params, PROMPTS, **dict(DEFAULTS, **change))
    same = [a == b for a, b in zip(other.responses(), rollouts.responses(), strict=True)]
    assert sum(same) <= 1  # a response of one token may come twice


def test_siblings_differ_and_the_same_call_draws_the_same(sampler, params, rollouts):
    responses = [tuple(row) for row in rollouts.responses()]
    for p in range(3):
        assert len(set(responses[4 * p : 4 * p + 4])) == 4
    assert_same(sampler(params, PROMPTS, **DEFAULTS), rollouts)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_are_those_of_a_full_forward(sampler, params, temperature):
    rollouts = sampler(params, PROMPTS, **dict(DEFAULTS, temperature=temperature))
    for n, response in enumerate(rollouts.responses()):
        expected = full_forward_log_probs(params, PROMPTS[n // 4], response, temperature)
        chosen = expected[np.arange(len(response)), response]
        np.testing.assert_allclose(rollouts.log_probs[n, : len(response)], chosen, atol=1e-4)


def test_temperature_zero_is_greedy_with_log_probs_at_temperature_one(sampler, params):
    rollouts = sampler(params, PROMPTS, **dict(DEFAULTS, temperature=0.0))
    for n, response in enumerate(rollouts.responses()):
        expected = full_forward_log_probs(params, PROMPTS[n // 4], response)
        assert response == expected.argmax(axis=-1).tolist()
        chosen = expected.max(axis=-1)
        np.testing.assert_allclose(rollouts.log_probs[n, : len(response)], chosen, atol=1e-4)


def test_the_stop_token_belongs_to_the_response_and_nothing_follows_it(rollouts):
    assert 0 < rollouts.stopped.sum() < len(rollouts.stopped)  # both kinds are here
    for tokens, log_probs, length, stopped in zip(*rollouts[:4], strict=True):
        response = tokens[:length]
        assert not np.isin(response[:-1], STOP).any()
        assert stopped == np.isin(response[-1], STOP)
        assert stopped or length == LIMIT
        assert (tokens[length:] == 0).all() and (log_probs[length:] == 0).all()
        assert (log_probs[:length] < 0).all()


def test_decoding_ends_with_the_last_row_and_padding_rows_do_not_delay_it(params):
    calls = []

    def counting(*args, **options):
        jax.debug.callback(lambda: calls.append(1))
        return MODEL.decode(*args, **options)

    def greedy(prompt):
        logits = tiny.reference_logits(ARCHITECTURE, params, prompt)
        return int(logits[-1].argmax())

    first = [greedy(prompt) for prompt in PROMPTS]
    assert greedy([0]) not in first  # what fills up would go on
    sampler = Sampler(MODEL._replace(decode=counting), tiny.make_devices(), first)
    rollouts = sampler(params, PROMPTS, prompt_rows=4, **dict(DEFAULTS, temperature=0.0))
    jax.effects_barrier()
    assert rollouts.lengths.tolist() == [1] * 12 and rollouts.stopped.all()
    assert len(calls) == rollouts.decoded == 1


def test_every_position_draws_anew(params):
    def same_distribution_again(params, prefix, cache, tokens, step, place, *, prompts):
        del params, tokens, step, place, prompts
        return jnp.repeat(prefix.last_hidden, DEFAULTS["group"], axis=0), cache

    model = MODEL._replace(decode=same_distribution_again)
    rollouts = Sampler(model, tiny.make_devices(), ())(params, PROMPTS, **DEFAULTS)
    assert rollouts.lengths.tolist() == [LIMIT] * 12
    assert all(len(set(row)) > LIMIT // 3 for row in rollouts.responses())


def test_draws_follow_the_softmax():
    logits = jnp.array([1.0, 0.0, -1.0, 0.5, -3.0])
    n = 20_000
    for temperature in (1.0, 0.5):
        keys = rollout_keys(jnp.uint32(0), jnp.uint32(1), jnp.uint32(0), n // 4, 4)
        rows = jnp.broadcast_to(logits[None], (n, 5))
        tokens, log_probs = jax.jit(sample_tokens)(keys, rows, Filters(jnp.float32(temperature)))
        expected = np.exp(tiny.log_softmax(np.asarray(logits, np.float64) / temperature))
        counts = np.bincount(tokens, minlength=5)
        chi_square = np.sum((counts - n * expected) ** 2 / (n * expected))
        assert chi_square < 18.5, counts  # the 99.9 % point with four degrees of freedom
        np.testing.assert_allclose(np.exp(log_probs), expected[np.asarray(tokens)], rtol=1e-5)


def test_draws_with_top_p_follow_the_renormalized_nucleus():
    logits = np.array([1.0, 0.0, -1.0, 0.5, -3.0])
    n = 20_000
    keys = rollout_keys(jnp.uint32(0), jnp.uint32(1), jnp.uint32(0), n // 4, 4)
    rows = jnp.broadcast_to(jnp.asarray(logits, jnp.float32)[None], (n, 5))
    for temperature, top_p in ((1.0, 0.8), (0.5, 0.95), (2.0, 0.1), (1.0, 1.0)):
        chances = np.exp(tiny.log_softmax(logits / temperature))
        order = np.argsort(-chances)
        size = 1 + int(np.searchsorted(np.cumsum(chances[order]), top_p))
        expected = np.zeros(5)
        expected[order[:size]] = chances[order[:size]] / chances[order[:size]].sum()
        tokens, log_probs = jax.jit(sample_tokens)(
            keys, rows, Filters(jnp.float32(temperature), jnp.float32(top_p))
        )
        counts = np.bincount(tokens, minlength=5)
        assert set(np.flatnonzero(counts)) == set(np.flatnonzero(expected))
        inside = expected > 0
        chi_square = np.sum((counts - n * expected)[inside] ** 2 / (n * expected[inside]))
        assert chi_square < 18.5, counts
        np.testing.assert_allclose(np.exp(log_probs), expected[np.asarray(tokens)], rtol=1e-5)


def test_the_nucleus_holds_the_likeliest_token_and_those_as_likely_as_its_last():
    inside = nucleus(jnp.array([[0.0, 5.0, 0.0, -9.0], [1.0, 1.0, 0.0, 0.0]]), jnp.float32(1e-6))
    assert inside.tolist() == [[False, True, False, False], [True, True, False, False]]


def test_greedy_decoding_does_not_see_top_p(sampler, params):
    greedy = dict(DEFAULTS, temperature=0.0)
    plain, cut = sampler(params, PROMPTS, **greedy), sampler(params, PROMPTS, top_p=0.5, **greedy)
    np.testing.assert_array_equal(plain.tokens, cut.tokens)


def test_neither_temperature_nor_stop_ids_nor_seed_recompile(
    sampler, params, rollouts, monkeypatch
):
    del rollouts  # compiled for it
    before = sampler._advance.compiled._cache_size()
    monkeypatch.setattr(sampler, "_stop_ids", np.arange(len(STOP), dtype=np.int32))
    for change in ({"temperature": 0.0}, {"seed": 9, "step": 1}, {"first_prompt": 8}):
        sampler(params, PROMPTS, **dict(DEFAULTS, **change))
    sampler(params, [row[:-1] for row in PROMPTS], **DEFAULTS)  # other lengths, the same bucket
    assert sampler._advance.compiled._cache_size() == before


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [(2, 2, 2), (8, 1, 1)])
def test_sampling_on_eight_devices_equals_one_device_token_for_token(params, rollouts, mesh):
    devices = tiny.make_devices(*mesh)
    spread = jax.device_put(params, devices.parameter_shardings(MODEL.logical_axes, params))
    assert_same(Sampler(MODEL, devices, STOP)(spread, PROMPTS, **DEFAULTS), rollouts)


# The engine: slots, caches that grow, shards

LONG = 200  # caches of 100 and 200 places
LATE_STOP = (7,)


def generate_long(params, *, slots=0, mesh=(1, 1, 1), prompts=PROMPTS, stop=LATE_STOP, **change):
    told = []
    devices = tiny.make_devices(*mesh)
    spread = jax.device_put(params, devices.parameter_shardings(MODEL.logical_axes, params))
    rollouts = Sampler(MODEL, devices, stop, slots=slots)(
        spread,
        prompts,
        on_done=lambda rows, now: told.extend((i, now.tokens[i].tolist()) for i in rows),
        **dict(DEFAULTS, max_tokens=LONG, **change),
    )
    assert sorted(i for i, _ in told) == list(range(len(rollouts.lengths)))  # each once
    assert all(tokens == rollouts.tokens[i].tolist() for i, tokens in told)  # and complete
    return rollouts


@pytest.fixture(scope="module")
def long_rollouts(params):
    rollouts = generate_long(params)
    assert rollouts.lengths.min() < 50 and rollouts.lengths.max() == LONG
    assert not rollouts.stopped.all() and rollouts.stopped.any()
    return rollouts


@pytest.mark.slow
@pytest.mark.parametrize("slots", [1, 3, 7])
def test_tokens_do_not_depend_on_the_number_of_slots(params, long_rollouts, slots):
    refilled = generate_long(params, slots=slots)
    assert_same(refilled, long_rollouts)
    busiest = -(-long_rollouts.lengths.sum() // slots)
    assert busiest <= refilled.decoded <= busiest + LONG


def test_log_probs_past_a_grown_cache_are_those_of_a_full_forward(params, long_rollouts):
    row = int(long_rollouts.lengths.argmax())
    response = long_rollouts.responses()[row]
    expected = full_forward_log_probs(params, PROMPTS[row // 4], response)
    chosen = expected[np.arange(len(response)), response]
    np.testing.assert_allclose(long_rollouts.log_probs[row, : len(response)], chosen, atol=1e-4)


@pytest.mark.slow
def test_rows_that_are_done_leave_their_slots_and_change_nothing(params, long_rollouts):
    # 48 rollouts of which few are long: the last ones go on in a quarter of the slots or fewer.
    prompts = [PROMPTS[i % 3] for i in range(12)]
    many = generate_long(params, prompts=prompts, stop=STOP)
    alone = generate_long(params, prompts=prompts[4:5], first_prompt=4, stop=STOP)
    assert_same(take(many, slice(16, 20)), alone)
    del long_rollouts


@pytest.mark.slow
@pytest.mark.parametrize("slots", [8, 0])
def test_the_engine_on_eight_devices_equals_one_device(params, slots):
    prompts = [PROMPTS[i % 3] for i in range(8)]
    one = generate_long(params, prompts=prompts, stop=STOP)
    assert_same(generate_long(params, prompts=prompts, stop=STOP, mesh=(2, 2, 2), slots=slots), one)


def test_sliding_layers_see_their_window_in_the_ring():
    architecture = replace(tiny.FAMILIES["olmo3"], vocabulary=64)
    assert any(architecture.sliding_layers)
    model, params = tiny.make_model(architecture), tiny.make_params(architecture)
    sampler = Sampler(model, tiny.make_devices(), STOP, slots=2)
    rollouts = sampler(params, PROMPTS, **dict(DEFAULTS, max_tokens=LIMIT))
    for n, response in enumerate(rollouts.responses()):
        logits = tiny.reference_logits(architecture, params, [*PROMPTS[n // 4], *response])
        expected = tiny.log_softmax(logits[len(PROMPTS[n // 4]) - 1 : -1])
        chosen = expected[np.arange(len(response)), response]
        np.testing.assert_allclose(rollouts.log_probs[n, : len(response)], chosen, atol=1e-4)


def counting_model(lengths):
    """Rollout `n` (of prompt `n`, one each) stops after `lengths[n]` tokens; nothing to compute."""
    wanted = jnp.asarray(lengths, jnp.float32)

    def prefill(params, tokens, counts):
        del params
        n = len(counts)
        cache = jnp.zeros((1, n, 1, tokens.shape[1], 1))
        left = wanted[tokens[:, 0]][:, None]
        return Prefix(cache, cache, counts, jnp.concatenate([left, jnp.ones_like(left)], axis=1))

    def decode(params, prefix, cache, tokens, step, place, *, prompts):
        del params, tokens, place
        left = prefix.last_hidden[:, :1] if prompts is None else prefix.last_hidden[prompts, :1]
        left = left - step[:, None].astype(jnp.float32) - 1
        return jnp.concatenate([left, jnp.ones_like(left)], axis=1), cache

    def empty(rows, places):
        return SuffixCache(*(jnp.zeros((1, rows, 1, places, 1)),) * 2)

    # Token 0, the stop, is the likelier one once a single token is left.
    head = jnp.array([[-1.0, 0.0], [1.5, 0.0]])
    return Model(
        MODEL.init, MODEL.logical_axes, MODEL.hidden, lambda params: head, prefill, empty, decode, 2
    )


@pytest.mark.slow
def test_refilled_slots_need_at_most_six_tenths_of_the_steps_of_static_batches():
    random = np.random.default_rng(0)
    n, slots, limit = 256, 64, 256
    draws = np.exp(random.normal(size=n))
    lengths = np.clip(draws * limit / 8 / draws.mean(), 1, limit).astype(int)
    sampler = Sampler(counting_model(lengths), tiny.make_devices(), (0,), slots=slots)
    rollouts = sampler(
        None, [[i] for i in range(n)], **dict(DEFAULTS, group=1, max_tokens=limit, temperature=0.0)
    )
    assert rollouts.lengths.tolist() == lengths.tolist()
    static = sum(lengths[i : i + slots].max() for i in range(0, n, slots))
    assert rollouts.decoded <= 0.6 * static


@pytest.mark.parametrize(
    ("filters", "allowed"),
    [
        ({"top_k": jnp.int32(2)}, [0, 3]),
        ({"top_k": jnp.int32(99)}, [0, 1, 2, 3, 4]),
        ({"min_p": jnp.float32(0.3)}, [0, 1, 3]),
        ({"min_p": jnp.float32(1.0)}, [0]),
        ({"top_k": jnp.int32(3), "top_p": jnp.float32(0.6)}, [0, 3]),
    ],
)
def test_draws_through_filters_follow_the_renormalized_rest(filters, allowed):
    logits = np.array([1.0, 0.0, -1.0, 0.5, -3.0])
    n = 8_000
    keys = rollout_keys(jnp.uint32(0), jnp.uint32(1), jnp.uint32(0), n // 4, 4)
    rows = jnp.broadcast_to(jnp.asarray(logits, jnp.float32)[None], (n, 5))
    expected = np.zeros(5)
    expected[allowed] = np.exp(logits[allowed]) / np.exp(logits[allowed]).sum()
    tokens, log_probs = jax.jit(sample_tokens)(keys, rows, Filters(jnp.float32(1.0), **filters))
    counts = np.bincount(tokens, minlength=5)
    assert set(np.flatnonzero(counts)) == set(allowed)
    inside = expected > 0
    chi_square = np.sum((counts - n * expected)[inside] ** 2 / (n * expected[inside]))
    assert chi_square < 18.5, counts
    np.testing.assert_allclose(np.exp(log_probs), expected[np.asarray(tokens)], rtol=1e-5)


def test_draws_over_many_blocks_follow_the_softmax():
    random = np.random.default_rng(0)
    logits = random.normal(size=512)  # 128 blocks of 4
    n = 100_000
    keys = jax.random.split(jax.random.key(1), n)
    rows = jnp.broadcast_to(jnp.asarray(logits, jnp.float32)[None], (n, 512))
    tokens, _ = jax.jit(sample_tokens)(keys, rows, Filters(jnp.float32(1.0)))
    expected = n * np.exp(tiny.log_softmax(logits))
    chi_square = np.sum((np.bincount(tokens, minlength=512) - expected) ** 2 / expected)
    assert chi_square < 616  # the 99.9 % point with 511 degrees of freedom


def test_a_token_without_probability_is_never_drawn():
    logits = jnp.where(jnp.arange(512) % 2 == 0, -jnp.inf, 0.0)[None]
    keys = jax.random.split(jax.random.key(0), 4096)
    tokens, _ = jax.jit(sample_tokens)(keys, jnp.tile(logits, (4096, 1)), Filters(jnp.float32(1.0)))
    assert np.all(np.asarray(tokens) % 2 == 1)
