"""The decode loop: one compiled program from prompts to rollouts.

The draw of a token is a pure function of (seed, step, prompt index, sibling index, position): keys
are folded, never split, so neither batch layout nor a resume changes what is sampled. Temperature
and stop ids are traced.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from sdpo_jax.model import Model, Params, Prefix, SuffixCache


class Rollouts(NamedTuple):
    """`N = P·G` responses, row `n` belongs to prompt `n // G`."""

    tokens: jax.Array  # [N, T] int32, zero after the end
    log_probs: jax.Array  # [N, T] float32, of the sampling distribution, zero after the end
    lengths: jax.Array  # [N] int32, the stop token included
    stopped: jax.Array  # [N] bool, False where the response ran into the limit


class _Loop(NamedTuple):
    position: jax.Array  # [] int32
    hidden: jax.Array  # [N, D], predicts the token at `position`
    cache: SuffixCache
    rollouts: Rollouts


def rollout_keys(
    seed: jax.Array, step: jax.Array, first_prompt: jax.Array, prompts: int, group: int
) -> jax.Array:
    """`[P·G]` keys: `seed` with step, prompt index (from `first_prompt`), sibling folded in."""
    base = jax.random.fold_in(jax.random.key(seed), step)
    n = jnp.arange(prompts * group, dtype=jnp.uint32)

    def one(i: jax.Array) -> jax.Array:
        prompt = jax.random.fold_in(base, first_prompt + i // group)
        return jax.random.fold_in(prompt, i % group)

    return jax.vmap(one)(n)


def draw(
    keys: jax.Array, logits: jax.Array, temperature: jax.Array, top_p: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Draws one token per row; returns ids and log-probs under the sampling distribution.

    Gumbel-max in the form `argmax(logits + temperature · noise)`, so that temperature 0 is greedy
    decoding; greedy log-probs are those at temperature 1.

    Args:
      keys: [N].
      logits: [N, V] float32, unscaled.
      temperature: [] float32, not negative.
      top_p: [] float32 in (0, 1], see `nucleus`; None draws from all tokens, without a sort.
    """
    scaled = logits / jnp.where(temperature > 0, temperature, 1.0)
    if top_p is not None:
        inside = nucleus(scaled, top_p)
        scaled, logits = (jnp.where(inside, x, -jnp.inf) for x in (scaled, logits))
    noise = jax.vmap(lambda k: jax.random.gumbel(k, logits.shape[1:], jnp.float32))(keys)
    tokens = jnp.argmax(logits + temperature * noise, axis=-1).astype(jnp.int32)
    chosen = jnp.take_along_axis(scaled, tokens[:, None], axis=-1)[:, 0]
    return tokens, chosen - jax.nn.logsumexp(scaled, axis=-1)


def nucleus(logits: jax.Array, top_p: jax.Array) -> jax.Array:
    """Marks the likeliest tokens that hold `top_p` together, the one that reaches it included.

    Tokens as likely as the last one are inside, too.

    Args:
      logits: [N, V] float32, at the sampling temperature.
      top_p: [] float32, in (0, 1].

    Returns:
      [N, V] bool.

    Source: Holtzman et al., arXiv 1904.09751.

    >>> nucleus(jnp.log(jnp.array([[0.2, 0.5, 0.3]])), jnp.float32(0.6)).tolist()
    [[False, True, True]]
    """
    ordered = jnp.sort(logits, axis=-1, descending=True)
    chances = jax.nn.softmax(ordered, axis=-1)
    reached = jnp.cumsum(chances, axis=-1) - chances < top_p  # before this token; the first always
    last = jnp.min(jnp.where(reached, ordered, jnp.inf), axis=-1, keepdims=True)
    return logits >= last


def generate(
    model: Model,
    params: Params,
    prefix: Prefix,
    keys: jax.Array,
    active: jax.Array,
    stop_ids: jax.Array,
    temperature: jax.Array,
    top_p: jax.Array | None = None,
    *,
    max_tokens: int,
) -> Rollouts:
    """Decodes until every row has drawn a stop token or `max_tokens` are full.

    Args:
      model: the pure functions.
      params: its parameters.
      prefix: from `model.prefill`, `P` prompts.
      keys: [P·G], see `rollout_keys`.
      active: [P·G] bool; False for rows that only fill up a shard and must not keep the loop alive.
      stop_ids: [any] int32.
      temperature: [] float32.
      top_p: [] float32, or None.
      max_tokens: `T`, static.
    """
    n, group = keys.shape[0], keys.shape[0] // prefix.lengths.shape[0]
    head = model.head(params)

    def unfinished(loop: _Loop) -> jax.Array:
        return (loop.position < max_tokens) & ~jnp.all(loop.rollouts.stopped)

    def advance(loop: _Loop) -> _Loop:
        t, rollouts = loop.position, loop.rollouts
        logits = jnp.matmul(loop.hidden, head, preferred_element_type=jnp.float32)
        position_keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, t)
        tokens, log_probs = draw(position_keys, logits, temperature, top_p)
        rollouts = _record(rollouts, t, tokens, log_probs, stop_ids)
        step = jnp.full((n,), t, jnp.int32)
        hidden, cache = model.decode(params, prefix, loop.cache, tokens, step)
        return _Loop(t + 1, hidden, cache, rollouts)

    start = _Loop(
        jnp.zeros((), jnp.int32),
        jnp.repeat(prefix.last_hidden, group, axis=0),
        model.suffix_cache(n, max_tokens),
        Rollouts(
            jnp.zeros((n, max_tokens), jnp.int32),
            jnp.zeros((n, max_tokens), jnp.float32),
            jnp.zeros((n,), jnp.int32),
            ~active,
        ),
    )
    return jax.lax.while_loop(unfinished, advance, start).rollouts


def _record(
    rollouts: Rollouts, t: jax.Array, tokens: jax.Array, log_probs: jax.Array, stop_ids: jax.Array
) -> Rollouts:
    """Writes position `t` of the rows that have not stopped."""
    live = ~rollouts.stopped
    return Rollouts(
        rollouts.tokens.at[:, t].set(jnp.where(live, tokens, 0)),
        rollouts.log_probs.at[:, t].set(jnp.where(live, log_probs, 0.0)),
        rollouts.lengths + live.astype(jnp.int32),
        rollouts.stopped | jnp.any(tokens[:, None] == stop_ids[None], axis=-1),
    )
