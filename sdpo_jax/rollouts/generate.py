"""The decode engine: continuous batching with a fixed number of slots, in one compiled loop.

    begin     assigns the first rollouts to slots, with an empty cache
    advance   decodes one token per slot and iteration, until all are done or the cache is full
    resize    enlarges the cache, or drops idle slots

When a rollout ends, its slot takes the next rollout inside the loop (`refill`). No prefill is
needed there, because all rollouts of a prompt share its keys, values and last hidden state. The
cache is a ring with one write index for all slots, so that a write is one slice in place; a slot
attends to as many of the latest positions as its rollout has tokens.

A sampled token is a pure function of (seed, step, prompt, sibling, turn, position): keys are made
with `fold_in`, never split, so that the number of slots, cache sizes and shards do not change what
is sampled. The functions here work on one shard of the rows; `sampler.py` maps them over the mesh,
where shards do not communicate inside the loop.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sdpo_jax.model import Model, Params, Prefix, SuffixCache
from sdpo_jax.rollouts.token_sampling import Filters, sample_tokens


class Rollouts(NamedTuple):
    """`N = P·G` responses; row `n` belongs to prompt `n // G`."""

    tokens: jax.Array  # [N, T] int32, zero after the response
    log_probs: jax.Array  # [N, T] float32, under the sampling distribution, zero after the response
    lengths: jax.Array  # [N] int32, including the stop token
    stopped: jax.Array  # [N] bool, False if the response reached the limit


class Slots(NamedTuple):
    """The state of the decode loop: `B` slots and a cache of `C` positions."""

    rollout: jax.Array  # [B] int32, row of the slot's rollout; N if the slot is idle
    step: jax.Array  # [B] int32, number of tokens sampled for the slot's rollout
    hidden: jax.Array  # [B, D], final hidden state, which predicts the next token
    cache: SuffixCache  # [L, B, H, C, d]; in the model's decode layout inside the loop
    written: jax.Array  # [1] int32, number of writes so far; the next index is `written % C`
    started: jax.Array  # [1] int32, number of rollouts that have been given a slot
    decoded: jax.Array  # [1] int32, number of iterations of the loop
    rollouts: Rollouts


class Job(NamedTuple):
    """The inputs of the decode loop, constant for all calls."""

    prefix: Prefix
    keys: jax.Array  # [N], see `rollout_keys`
    wanted: jax.Array  # [1] int32, number of rollouts to decode; later rows are padding
    stop_ids: jax.Array  # [any] int32
    filters: Filters


class Plan(NamedTuple):
    """The static settings of `advance`."""

    max_tokens: int  # `T`
    grouped: bool  # slot n holds a rollout of prompt n // G, so that each prompt is read once
    refill: bool  # a slot whose rollout has ended takes the next one


def rollout_keys(
    seed: jax.Array, step: jax.Array, first_prompt: jax.Array, prompts: int, group: int
) -> jax.Array:
    """`[P·G]` keys: `seed` with step, prompt index and sibling index folded in.

    `first_prompt` is the index of the first prompt, or `[P]` the index of every prompt.
    """
    base = jax.random.fold_in(jax.random.key(seed), step)
    n = jnp.arange(prompts * group, dtype=jnp.uint32)

    def one(i: jax.Array) -> jax.Array:
        index = first_prompt + i // group if first_prompt.ndim == 0 else first_prompt[i // group]
        prompt = jax.random.fold_in(base, index)
        return jax.random.fold_in(prompt, i % group)

    return jax.vmap(one)(n)


class Turn(NamedTuple):
    """A turn after the first, for `turn_keys`; `rollout_keys` makes the keys of the first turn."""

    prompts: Any  # [N] integer, prompt index of each rollout
    siblings: Any  # [N] integer, sibling index of each rollout
    number: Any  # [] integer, 1 is the second turn


def turn_keys(seed: jax.Array, step: jax.Array, turn: Turn) -> jax.Array:
    """`[N]` keys: the keys of `rollout_keys` with the turn folded in."""
    base = jax.random.fold_in(jax.random.key(seed), step)

    def one(prompt: jax.Array, sibling: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.fold_in(base, prompt), sibling)
        # Positions are folded into keys of the first turn, too: 2^31 keeps turns apart from them.
        return jax.random.fold_in(key, turn.number + jnp.uint32(1 << 31))

    return jax.vmap(one)(turn.prompts, turn.siblings)


def begin(model: Model, job: Job, slots: int, cache_size: int, max_tokens: int) -> Slots:
    """Assigns the first rollouts to slots, with an empty cache of `cache_size` positions."""
    n = job.keys.shape[0]
    first = jnp.arange(slots, dtype=jnp.int32)
    rollout = jnp.where(first < job.wanted, first, n)
    group = n // job.prefix.lengths.shape[0]
    one = jnp.zeros((1,), jnp.int32)
    return Slots(
        rollout,
        jnp.zeros((slots,), jnp.int32),
        job.prefix.last_hidden[first // group],
        model.suffix_cache(slots, cache_size),
        written=one,
        started=jnp.minimum(one + slots, job.wanted),
        decoded=one,
        rollouts=Rollouts(
            jnp.zeros((n, max_tokens), jnp.int32),
            jnp.zeros((n, max_tokens), jnp.float32),
            jnp.zeros((n,), jnp.int32),
            jnp.zeros((n,), bool),
        ),
    )


def advance(model: Model, params: Params, job: Job, slots: Slots, plan: Plan) -> Slots:
    """Decodes until all rollouts are done or one has filled the cache.

    It returns after at most `cache_size` iterations, so that the host can act in between.
    """
    n, cache_size = job.keys.shape[0], slots.cache.keys.shape[3]
    head, pause = model.head(params), slots.decoded + cache_size
    params, prefix, cache = model.to_decode_layout(params, job.prefix, slots.cache)

    def unfinished(s: Slots) -> jax.Array:
        live = s.rollout < n
        full = jnp.any(live & (s.step >= cache_size))
        return jnp.any(live) & ~full & (s.decoded < pause)[0]

    def one_token(s: Slots) -> Slots:
        row = jnp.minimum(s.rollout, n - 1)
        logits = jnp.matmul(s.hidden, head, preferred_element_type=jnp.float32)
        keys = jax.vmap(jax.random.fold_in)(job.keys[row], s.step)
        tokens, log_probs = sample_tokens(keys, logits, job.filters)
        stop = jnp.any(tokens[:, None] == job.stop_ids[None], axis=-1)
        rollouts = _record(s, tokens, log_probs, stop)
        write_index = (s.written % cache_size)[0]
        prompts = None if plan.grouped else row // (n // job.prefix.lengths.shape[0])
        hidden, cache = model.decode(
            params, prefix, s.cache, tokens, s.step, write_index, prompts=prompts
        )
        s = s._replace(hidden=hidden, cache=cache, rollouts=rollouts, step=s.step + 1)
        s = s._replace(written=s.written + 1, decoded=s.decoded + 1)
        ended = (s.rollout < n) & (stop | (s.step >= plan.max_tokens))
        if plan.refill:
            return _refill(job, s, ended)
        return s._replace(rollout=jnp.where(ended, n, s.rollout))

    slots = jax.lax.while_loop(unfinished, one_token, slots._replace(cache=cache))
    return slots._replace(cache=model.from_decode_layout(slots.cache))


def _record(s: Slots, tokens: jax.Array, log_probs: jax.Array, stop: jax.Array) -> Rollouts:
    """Writes each slot's token to its rollout; idle slots index past the last row: no write."""
    out = s.rollouts
    return Rollouts(
        out.tokens.at[s.rollout, s.step].set(tokens, mode="drop"),
        out.log_probs.at[s.rollout, s.step].set(log_probs, mode="drop"),
        out.lengths.at[s.rollout].set(s.step + 1, mode="drop"),
        out.stopped.at[s.rollout].set(stop, mode="drop"),
    )


def _refill(job: Job, s: Slots, ended: jax.Array) -> Slots:
    """Assigns the next rollouts, in order, to the slots whose rollout has ended."""
    n, prompts = job.keys.shape[0], job.prefix.lengths.shape[0]
    new = s.started + jnp.cumsum(ended.astype(jnp.int32)) - 1
    new = jnp.where(new < job.wanted, new, n)
    first = job.prefix.last_hidden[jnp.minimum(new, n - 1) // (n // prompts)]
    return s._replace(
        rollout=jnp.where(ended, new, s.rollout),
        step=jnp.where(ended, 0, s.step),
        hidden=jnp.where(ended[:, None], first, s.hidden),
        started=jnp.minimum(s.started + jnp.sum(ended.astype(jnp.int32)), job.wanted),
    )


def resize(slots: Slots, keep: jax.Array | None, cache_size: int) -> Slots:
    """Enlarges the cache to `cache_size`, and keeps only some slots.

    Args:
      slots: the current state.
      keep: [B'] int32, indices of slots to keep; -1 makes an idle slot. None keeps all.
      cache_size: at least the current size.
    """
    now = slots.cache.keys.shape[3]
    n = slots.rollouts.lengths.shape[0]

    def ring(x: jax.Array) -> jax.Array:
        # Roll the latest position to the end, so that writing continues in the new space after it.
        x = jnp.roll(x, -(slots.written % now)[0], axis=3)
        x = x if keep is None else x[:, keep]
        return jnp.pad(x, [(0, 0)] * 3 + [(0, cache_size - now), (0, 0)])

    cache = SuffixCache(ring(slots.cache.keys), ring(slots.cache.values))
    slots = slots._replace(cache=cache, written=jnp.full_like(slots.written, now))
    if keep is None:
        return slots
    return slots._replace(
        rollout=jnp.where(keep < 0, n, slots.rollout[keep]),
        step=jnp.where(keep < 0, 0, slots.step[keep]),
        hidden=slots.hidden[keep],
    )
