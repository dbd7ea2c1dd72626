"""The decode engine: slots that rollouts pass through, and one compiled loop over their tokens.

    begin     prompts through the model once; the first rollouts take their slots
    advance   one token for every slot at a time, until all are done or the cache is full
    resize    a larger cache, fewer slots

A slot whose rollout has ended takes the next one inside the loop (`refill`); nothing is prefilled
there, since rollouts of a prompt share its keys and values and its last hidden state. Slots write
their tokens' keys and values to one place of a ring that all share, so that the write is one slice,
in place; a slot sees as many of the latest positions as its rollout has tokens.

The draw of a token is a pure function of (seed, step, prompt, sibling, turn, position): keys
are folded, never split, so neither slots, cache sizes nor shards change what is sampled. Everything
here is of one shard of the rows; `sampler.py` spreads it over the mesh, where no shard waits for
another inside the loop.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sdpo_jax.model import Model, Params, Prefix, SuffixCache
from sdpo_jax.rollouts.token_sampling import Filters, sample_tokens


class Rollouts(NamedTuple):
    """`N = P·G` responses, row `n` belongs to prompt `n // G`."""

    tokens: jax.Array  # [N, T] int32, zero after the end
    log_probs: jax.Array  # [N, T] float32, of the sampling distribution, zero after the end
    lengths: jax.Array  # [N] int32, the stop token included
    stopped: jax.Array  # [N] bool, False where the response ran into the limit


class Slots(NamedTuple):
    """What the loop carries: `B` slots, a cache of `C` positions."""

    rollout: jax.Array  # [B] int32, which row of the rollouts; N where the slot is idle
    step: jax.Array  # [B] int32, tokens that the slot's rollout has
    hidden: jax.Array  # [B, D], predicts its next token
    cache: SuffixCache  # [L, B, H, C, d]; inside the loop as `Model.to_decode_layout` leaves it
    written: jax.Array  # [1] int32, positions written so far; the next is `written % C`
    started: jax.Array  # [1] int32, rollouts that have had a slot
    decoded: jax.Array  # [1] int32, passes of the loop
    rollouts: Rollouts


class Job(NamedTuple):
    """What stays the same from the first token to the last."""

    prefix: Prefix
    keys: jax.Array  # [N], see `rollout_keys`
    wanted: jax.Array  # [1] int32, rollouts to make; those from here on only fill up a shard
    stop_ids: jax.Array  # [any] int32
    filters: Filters


class Plan(NamedTuple):
    """The static side of `advance`."""

    max_tokens: int  # `T`
    grouped: bool  # slot n holds a rollout of prompt n // G: a prompt is read once for all
    refill: bool  # a slot that is done takes the next rollout


def rollout_keys(
    seed: jax.Array, step: jax.Array, first_prompt: jax.Array, prompts: int, group: int
) -> jax.Array:
    """`[P·G]` keys: `seed` with step, prompt index, sibling folded in.

    `first_prompt` is the index of the first prompt, or `[P]` the index of each.
    """
    base = jax.random.fold_in(jax.random.key(seed), step)
    n = jnp.arange(prompts * group, dtype=jnp.uint32)

    def one(i: jax.Array) -> jax.Array:
        index = first_prompt + i // group if first_prompt.ndim == 0 else first_prompt[i // group]
        prompt = jax.random.fold_in(base, index)
        return jax.random.fold_in(prompt, i % group)

    return jax.vmap(one)(n)


class Turn(NamedTuple):
    """Which turn of which rollouts is sampled, the first aside; `rollout_keys` has that."""

    prompts: Any  # [N] integer, index of each rollout's prompt
    siblings: Any  # [N] integer
    number: Any  # [] integer, 1 is the second turn


def turn_keys(seed: jax.Array, step: jax.Array, turn: Turn) -> jax.Array:
    """`[N]` keys: those of `rollout_keys` with the turn folded in."""
    base = jax.random.fold_in(jax.random.key(seed), step)

    def one(prompt: jax.Array, sibling: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.fold_in(base, prompt), sibling)
        # Positions are folded in where this is: no response is so long that they meet.
        return jax.random.fold_in(key, turn.number + jnp.uint32(1 << 31))

    return jax.vmap(one)(turn.prompts, turn.siblings)


def begin(model: Model, job: Job, slots: int, cache_size: int, max_tokens: int) -> Slots:
    """The first rollouts in their slots, and an empty cache of `cache_size`."""
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
    """Decodes until every rollout is done, or one has filled the cache or this is as long as it."""
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
    """Writes each slot's token to its rollout; idle slots point behind the last row."""
    out = s.rollouts
    return Rollouts(
        out.tokens.at[s.rollout, s.step].set(tokens, mode="drop"),
        out.log_probs.at[s.rollout, s.step].set(log_probs, mode="drop"),
        out.lengths.at[s.rollout].set(s.step + 1, mode="drop"),
        out.stopped.at[s.rollout].set(stop, mode="drop"),
    )


def _refill(job: Job, s: Slots, ended: jax.Array) -> Slots:
    """Hands the next rollouts, in order, to the slots that have ended."""
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
    """Grows the cache to `cache_size`, and keeps only some slots.

    Args:
      slots: as they are.
      keep: [B'] int32, which slots; -1 makes an idle one. None keeps all.
      cache_size: not fewer than now.
    """
    now = slots.cache.keys.shape[3]
    n = slots.rollouts.lengths.shape[0]

    def ring(x: jax.Array) -> jax.Array:
        # The latest place comes last, so that the ring goes on behind it.
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
