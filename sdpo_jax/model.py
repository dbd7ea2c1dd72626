"""What the engine asks of a language model: pure functions over a pytree of parameters.

The engine (sampling, teacher, training) knows no model family. It receives a `Model`, a NamedTuple
of functions; `sdpo_models.transformer.build_model` makes one from a `config.json`.

Dimension key, one for the project: `B` rows, `T` completion tokens, `S` full sequence, `M` packed
tokens, `V` vocabulary, `K` top-k support, `D` width, `L` layers, `P` prompts in a step, `G`
rollouts per prompt, `N = P·G`, `H` key-value heads, `d` head size.
"""

from typing import Any, NamedTuple, Protocol

import jax

Params = Any
"""A pytree of arrays; leaves of the layer stack carry a leading `L`."""


class Prefix(NamedTuple):
    """What prefill leaves behind, once per prompt, shared by its `G` rollouts."""

    keys: jax.Array  # [L, P, H, S, d]
    values: jax.Array  # [L, P, H, S, d]
    lengths: jax.Array  # [P] int32, real tokens of each prompt
    last_hidden: jax.Array  # [P, D], final-norm hidden state of each prompt's last real token


class SuffixCache(NamedTuple):
    """Keys and values of the tokens that a rollout has produced so far."""

    keys: jax.Array  # [L, N, H, T, d]
    values: jax.Array  # [L, N, H, T, d]


BLOCK_TOKENS = 64
"""Queries of one block, and keys that it looks at in one go."""


class Blocks(NamedTuple):
    """Sequences laid end to end in bins `[B, S]`; several may continue the same prompt.

    A row of the table is one block of up to `BLOCK_TOKENS` queries of one sequence: place of the
    first query in its bin; number of queries; place and number of the tokens before the sequence
    that it continues, all of which it sees (0: it continues nothing); place of the sequence's own
    first token, from which on the block sees what is not after each query. Rows are in the order of
    their first query, and cover every token that is to be read.
    """

    table: jax.Array  # [B, K, 5] int32
    filled: jax.Array  # [B] int32, rows of the table that are there


class InitFn(Protocol):
    """`init(key) -> params`."""

    def __call__(self, key: jax.Array, /) -> Params: ...


class HiddenFn(Protocol):
    """`hidden(params, tokens[B, S], positions[B, S], attention, take=None) -> [B, S, D]`.

    Final-norm hidden states. `attention` is either segments `[B, S]` int32, where a token attends
    to the tokens of its own segment that are not after it and segment 0 is padding; or `Blocks`.
    What is padding, or in no block, is undefined but finite. `take: [R, m]` asks for some places
    alone, each among the tokens of one of `R` equal parts of the rows, row after row: `[R, m, D]`.
    """

    def __call__(
        self,
        params: Params,
        tokens: jax.Array,
        positions: jax.Array,
        attention: jax.Array | Blocks,
        /,
        *,
        take: jax.Array | None = None,
    ) -> jax.Array: ...


class HeadFn(Protocol):
    """`head(params) -> [D, V]`, the matrix from final-norm hidden states to logits."""

    def __call__(self, params: Params, /) -> jax.Array: ...


class PrefillFn(Protocol):
    """`prefill(params, tokens[P, S], lengths[P]) -> Prefix`; prompts padded on the right."""

    def __call__(self, params: Params, tokens: jax.Array, lengths: jax.Array, /) -> Prefix: ...


class CacheFn(Protocol):
    """`suffix_cache(rows, max_tokens) -> SuffixCache` of zeros."""

    def __call__(self, rows: int, max_tokens: int, /) -> SuffixCache: ...


class DecodeFn(Protocol):
    """`decode(params, prefix, cache, tokens[N], step[N], place[], prompts) -> (hidden, cache)`.

    Feeds token number `step` of each rollout's response and keeps it at `place` of the cache, a
    ring that all rollouts share: a rollout's earlier tokens lie in the `step` places before, latest
    first. Row `n` continues prompt `prompts[n]`, or where that is None prompt `n // G`, with
    `G = N // P`. Returns `[N, D]` and the cache, updated in place when donated or carried through a
    loop.
    """

    def __call__(
        self,
        params: Params,
        prefix: Prefix,
        cache: SuffixCache,
        tokens: jax.Array,
        step: jax.Array,
        place: jax.Array,
        /,
        *,
        prompts: jax.Array | None = None,
    ) -> tuple[jax.Array, SuffixCache]: ...


class EnterFn(Protocol):
    """`enter(params, prefix, cache)`: the three as a loop over `decode` is to read them.

    Called once before the loop, so that each token finds what it needs where it lies. The form is a
    matter between the model's `enter`, `decode` and `leave`.
    """

    def __call__(
        self, params: Params, prefix: Prefix, cache: SuffixCache, /
    ) -> tuple[Any, Any, Any]: ...


class LeaveFn(Protocol):
    """`leave(cache) -> SuffixCache`: what `enter` made of a cache, back in the common form."""

    def __call__(self, cache: Any, /) -> SuffixCache: ...


def _as_they_are(
    params: Params, prefix: Prefix, cache: SuffixCache, /
) -> tuple[Params, Prefix, SuffixCache]:
    return params, prefix, cache


def _as_it_is(cache: SuffixCache, /) -> SuffixCache:
    return cache


class Model(NamedTuple):
    """A decoder-only language model as pure functions."""

    init: InitFn
    logical_axes: Params  # the params pytree with a tuple of logical axis names (or None) per leaf
    hidden: HiddenFn
    head: HeadFn
    prefill: PrefillFn
    suffix_cache: CacheFn
    decode: DecodeFn
    vocabulary: int
    enter: EnterFn = _as_they_are
    leave: LeaveFn = _as_it_is
