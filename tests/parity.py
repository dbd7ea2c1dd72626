"""Our passes over a model folder against what transformers made of the same inputs.

Used on committed fixtures (tests/test_families.py) and on fresh ones (tests/live_transformers.py).
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import tiny
from make_fixtures import KEPT, NEW, PROMPT

from sdpo_jax.rollouts.sampler import Sampler
from sdpo_models.hugging_face import load_architecture, load_params
from sdpo_models.transformer import build_model

TOLERANCE = 2e-4
"""Of the range of the logits. Float32 over three layers leaves about 1e-6; wrong rotary
frequencies, windows or norms cost 1e-2 and more."""


def load(folder):
    architecture = load_architecture(folder)
    model = build_model(architecture)
    return model, jax.tree.map(jnp.asarray, load_params(folder, architecture))


def error(logits, expected):
    """Largest absolute difference, as a share of the range of the expected logits."""
    assert logits.shape == expected.shape and np.isfinite(logits).all()
    return float(np.abs(logits - expected).max() / (expected.max() - expected.min()))


def hidden_errors(model, params, case):
    """Of whole sequences, in one batch, so that each model compiles once.

    `padded`: rows of several lengths, padded on the right. `packed`: segments in one row, each of
    which transformers ran alone. `long`: beyond the sliding window and beyond the length before
    stretching.
    """
    padded, lengths, long = case["padded_tokens"], case["padded_lengths"], case["long_tokens"]
    segments = [case[f"segment_{i}_tokens"] for i in range(3)]
    rows = [[row[:n]] for row, n in zip(padded, lengths, strict=True)]
    rows += [segments, *([row] for row in long)]
    tokens, positions, ids = (np.zeros((len(rows), long.shape[1]), np.int32) for _ in range(3))
    for b, row in enumerate(rows):
        end = sum(map(len, row))
        tokens[b, :end] = np.concatenate(row)
        positions[b, :end] = np.concatenate([np.arange(len(part)) for part in row])
        ids[b, :end] = np.concatenate([np.full(len(part), i + 1) for i, part in enumerate(row)])
    hidden = tiny.quick_jit(model.hidden)(params, *map(jnp.asarray, (tokens, positions, ids)))
    logits = np.asarray(hidden @ model.head(params))
    real = np.arange(padded.shape[1]) < lengths[:, None]
    alone = np.concatenate([case[f"segment_{i}_logits"] for i in range(3)])
    return {
        "padded": error(logits[:3, : padded.shape[1]][real], case["padded_logits"][real]),
        "packed": error(logits[3, : len(alone)], alone),
        "long": error(logits[4:, KEPT], case["long_logits"]),
    }


def decode_error(model, params, case):
    """Prefill of unequal prompts, then decode token by token to the end of the long rows.

    Two rollouts per prompt, the second one step behind, so that siblings see different windows.
    """
    tokens, lengths, group = case["long_tokens"], np.array([100, 90]), 2
    total = tokens.shape[1]
    prefix = tiny.quick_jit(model.prefill)(
        params, jnp.asarray(tokens[:, :100], jnp.int32), jnp.asarray(lengths, jnp.int32)
    )
    head, owner, late = model.head(params), np.repeat(np.arange(2), group), np.array([0, 1, 0, 1])
    limit = total - lengths[owner]

    def advance(cache, call):
        step = jnp.clip(call - late, 0, limit - 1).astype(jnp.int32)
        ids = jnp.asarray(tokens, jnp.int32)[owner, jnp.asarray(lengths)[owner] + step]
        place = (call % cache.keys.shape[3]).astype(jnp.int32)
        hidden, cache = model.decode(params, prefix, cache, ids, step, place)
        return cache, (hidden @ head, step)

    cache = model.suffix_cache(4, int(limit.max()))
    calls = jnp.arange(limit.max() + 1)
    _, (logits, steps) = tiny.quick_jit(partial(jax.lax.scan, advance))(cache, calls)
    kept = range(total)[KEPT]
    ours, theirs = [], []
    for n, p in enumerate(owner):
        for call in range(len(calls)):
            position = int(lengths[p] + steps[call, n])
            if position in kept and 0 <= call - late[n] < limit[n]:
                ours.append(logits[call, n])
                theirs.append(case["long_logits"][p, kept.index(position)])
    return error(np.stack(ours), np.stack(theirs))


def greedy_tokens(model, params, tokens, new):
    """What our sampler makes of prompts `[P, S]` at temperature 0."""
    sampler = Sampler(model, tiny.make_devices(), (-1,))
    prompts = [row.tolist() for row in np.asarray(tokens)]
    how = {"group": 1, "max_tokens": new, "temperature": 0.0, "seed": 0, "step": 0}
    return sampler(params, prompts, **how).tokens


def greedy_matches(model, params, case):
    ours = greedy_tokens(model, params, case["long_tokens"][:, :PROMPT], NEW)
    return np.array_equal(ours, case["greedy_tokens"])
