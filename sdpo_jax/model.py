"""The interface of a language model: a NamedTuple of pure functions over a pytree of parameters.

Sampling, teacher and training use a `Model` and depend on no model family.
`sdpo_models.transformer.build_model` makes one from an architecture.

Dimension key, one for the project: `B` rows, `T` completion tokens, `S` full sequence, `M` packed
tokens, `V` vocabulary, `K` top-k support, `D` width, `L` layers, `P` prompts in a step, `G`
rollouts per prompt, `N = P·G`, `H` key-value heads, `d` head size.
"""

from typing import Any, NamedTuple, Protocol

import jax

Params = Any
"""A pytree of arrays; those of the layers are stacked, with leading axis `L`."""


class Prefix(NamedTuple):
    """The output of prefill: one row per prompt, shared by the `G` rollouts of the prompt."""

    keys: jax.Array  # [L, P, H, S, d]
    values: jax.Array  # [L, P, H, S, d]
    lengths: jax.Array  # [P] int32, real tokens of each prompt
    last_hidden: jax.Array  # [P, D], final-norm hidden state of each prompt's last real token


class SuffixCache(NamedTuple):
    """Keys and values of the tokens that each rollout has produced so far."""

    keys: jax.Array  # [L, N, H, T, d]
    values: jax.Array  # [L, N, H, T, d]


BLOCK_TOKENS = 64
"""Number of queries in a block, and of keys that it attends to at a time."""


class Blocks(NamedTuple):
    """Sequences laid end to end in bins `[B, S]`; several may continue the same prompt.

    Each row of the table describes one block of up to `BLOCK_TOKENS` queries of one sequence. Its
    five columns are:

    0. the index in the bin of the first query;
    1. the number of queries;
    2. the index of the first token of the shared prompt;
    3. the number of tokens of that prompt (0: none), all of which every query sees;
    4. the index of the sequence's own first token; a query sees its own tokens causally from there.

    Rows are ordered by their first query and cover every token whose hidden state is read.
    """

    table: jax.Array  # [B, K, 5] int32
    filled: jax.Array  # [B] int32, number of rows of the table in use


class InitFn(Protocol):
    """`init(key) -> params`."""

    def __call__(self, key: jax.Array, /) -> Params: ...


class HiddenFn(Protocol):
    """`hidden(params, tokens[B, S], positions[B, S], attention) -> [B, S, D]`.

    Returns the final-norm hidden states. `attention` is either segments `[B, S]` int32 (a token
    attends to itself and to earlier tokens of its own segment; segment 0 is padding), or `Blocks`.
    Values at padding, or at tokens in no block, are undefined but finite.

    With `target_positions: [R, m]` the result is `[R, m, D]`, only `m` positions per shard: entry
    `[r, i]` indexes the flattened tokens of the r-th of `R` equal groups of rows.
    """

    def __call__(
        self,
        params: Params,
        tokens: jax.Array,
        positions: jax.Array,
        attention: jax.Array | Blocks,
        /,
        *,
        target_positions: jax.Array | None = None,
    ) -> jax.Array: ...


class HeadFn(Protocol):
    """`head(params) -> [D, V]`, the matrix from final-norm hidden states to logits."""

    def __call__(self, params: Params, /) -> jax.Array: ...


class PrefillFn(Protocol):
    """`prefill(params, tokens[P, S], lengths[P]) -> Prefix`; prompts are padded on the right."""

    def __call__(self, params: Params, tokens: jax.Array, lengths: jax.Array, /) -> Prefix: ...


class CacheFn(Protocol):
    """`suffix_cache(rows, max_tokens) -> SuffixCache` of zeros."""

    def __call__(self, rows: int, max_tokens: int, /) -> SuffixCache: ...


class DecodeFn(Protocol):
    """`decode(params, prefix, cache, tokens[N], step[N], write_index[], prompts)`.

    Feeds token number `step` of each rollout's response and writes its keys and values to
    `write_index` of the cache. The cache is a ring with one write index for all rollouts: the
    earlier tokens of a rollout are in the `step` positions before it, latest first. Row `n`
    continues prompt `prompts[n]`; if `prompts` is None, it continues prompt `n // G`, where
    `G = N // P`.

    Returns the hidden states `[N, D]` and the cache, which is updated in place if it is donated or
    carried through a loop.
    """

    def __call__(
        self,
        params: Params,
        prefix: Prefix,
        cache: SuffixCache,
        tokens: jax.Array,
        step: jax.Array,
        write_index: jax.Array,
        /,
        *,
        prompts: jax.Array | None = None,
    ) -> tuple[jax.Array, SuffixCache]: ...


class ToDecodeLayoutFn(Protocol):
    """`to_decode_layout(params, prefix, cache)`, called once before the decode loop.

    Converts the three to the layout that the loop over `decode` reads. Only the model's own
    `decode` and `from_decode_layout` depend on that layout.
    """

    def __call__(
        self, params: Params, prefix: Prefix, cache: SuffixCache, /
    ) -> tuple[Any, Any, Any]: ...


class FromDecodeLayoutFn(Protocol):
    """`from_decode_layout(cache) -> SuffixCache`: the inverse of `to_decode_layout` for a cache."""

    def __call__(self, cache: Any, /) -> SuffixCache: ...


def _same_layout(
    params: Params, prefix: Prefix, cache: SuffixCache, /
) -> tuple[Params, Prefix, SuffixCache]:
    return params, prefix, cache


def _same_cache_layout(cache: SuffixCache, /) -> SuffixCache:
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
    to_decode_layout: ToDecodeLayoutFn = _same_layout
    from_decode_layout: FromDecodeLayoutFn = _same_cache_layout
