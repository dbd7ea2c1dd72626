"""Log-probabilities of student and teacher for every token of a batch of responses.

A record has, for each response token, log p (the student after the question), log q (the teacher
after its prompt, if there is one) and the most likely tokens of both, each with its log-probability
under both. log q / p of the sampled token is SDPO's advantage of that token: figures 4, 9 and 22 of
arXiv 2601.20802 colour tokens by it.

The forward passes are those of training (`step.forward`, the same packing); logits exist for one
chunk of `train.head_chunk_tokens` tokens of each shard at a time. Validated against log-softmaxes
of whole logits in numpy (tests/test_token_records.py).
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from sdpo_jax.devices import Devices
from sdpo_jax.losses.fused_linear import head_logits
from sdpo_jax.losses.vocabulary import log_softmax, scale_logits, trust_region_logits
from sdpo_jax.model import Model, Params
from sdpo_jax.training.batch import (
    BatchLayout,
    PackedBatch,
    Pair,
    make_sequences,
    place_tokens,
    repack,
    split_micro_batches,
)
from sdpo_jax.training.step import forward


class Responses(NamedTuple):
    """Token ids of `N` responses and of their prompts."""

    prompts: Sequence[Sequence[int]]  # [N], the student's
    teacher_prompts: Sequence[Sequence[int] | None]  # [N], None where no context is shown
    responses: Sequence[Sequence[int]]  # [N]


class TokenRecord(NamedTuple):
    """One response of `T` tokens: column 0 is the sampled token, the others are candidates.

    Candidates are the `K` most likely tokens of the student, then those of the teacher; a token may
    occur twice.
    """

    ids: NDArray[np.int32]  # [T, 1 + 2K], or [T, 1 + K] without a teacher
    log_p: NDArray[np.float32]  # same shape, the student's
    log_q: NDArray[np.float32] | None = None  # same shape, the teacher's; None without a context


class Programs(NamedTuple):
    """The compiled functions of a comparison."""

    forward: Callable[..., jax.Array]
    head: Callable[[Params], jax.Array]
    compare: Callable[..., Any]


def token_records(
    model: Model,
    student: Params,
    teacher: Params,
    responses: Responses,
    *,
    layout: BatchLayout,
    devices: Devices,
    temperature: float,
    top: int,
    coefficient: float | None = None,
) -> list[TokenRecord]:
    """Runs student and teacher on the same responses.

    Args:
      model: pure functions.
      student: its weights.
      teacher: weights of the teacher.
      responses: ids of prompts, re-prompts and responses.
      layout: how sequences are packed, as in training.
      devices: the mesh.
      temperature: of the rollouts, so that log-probabilities are those of the sampler.
      top: K, at most the size of the vocabulary.
      coefficient: `Teacher.coefficient`, the student's share in a trust region.

    Returns:
      One record per response, in order.
    """
    candidates = partial(compare, top=min(top, model.vocabulary), coefficient=coefficient)
    programs = Programs(
        devices.jit(partial(forward, model), out_shardings=devices.rows),
        devices.jit(model.head, out_shardings=devices.head),
        devices.jit(candidates, out_shardings=devices.replicated),
    )
    # In a trust region the student reads the teacher's prompt, too.
    taught = [student, teacher] if coefficient is None else [student, teacher, student]
    records: dict[int, TokenRecord] = {}
    for weights, has_teacher in ((taught, True), ([student], False)):
        prompts = enumerate(responses.teacher_prompts)
        rows = [i for i, ids in prompts if (ids is not None) == has_teacher]
        found = _records_of(programs, weights, responses, rows, layout, devices, temperature)
        records |= zip(rows, found, strict=True)
    return [records[i] for i in range(len(records))]


def compare(
    hidden: Sequence[jax.Array],
    heads: Sequence[jax.Array],
    targets: jax.Array,
    temperature: jax.Array,
    *,
    top: int,
    coefficient: float | None = None,
) -> list[jax.Array]:
    """Candidates of one chunk of `C` tokens, with log-probabilities under student and teacher.

    Args:
      hidden: final hidden states, [..., D] each: the student's; the teacher's, one or, with
        `coefficient`, two. Leading axes multiply to C.
      heads: [D, V] each, in the same order.
      targets: [...] int32, the sampled tokens.
      temperature: [] float32.
      top: K.
      coefficient: see `token_records`.

    Returns:
      ids [C, 1 + K · number of models] int32, then log p and, if there is a teacher, log q, of the
      same shape.
    """
    logits = [
        scale_logits(head_logits(h.reshape(-1, h.shape[-1]), w), temperature=temperature)
        for h, w in zip(hidden, heads, strict=True)
    ]
    if coefficient is not None and len(logits) > 1:
        own, teacher, live = logits
        logits = [own, trust_region_logits(teacher, live, coefficient)]
    log_probs = [log_softmax(z) for z in logits]
    likeliest = [jax.lax.top_k(x, top)[1] for x in log_probs]
    ids = jnp.concatenate([targets.reshape(-1, 1), *likeliest], axis=1)  # [C, 1 + K · models]
    return [ids, *(jnp.take_along_axis(x, ids, axis=1) for x in log_probs)]


def _records_of(
    programs: Programs,
    weights: Sequence[Params],
    responses: Responses,
    rows: Sequence[int],
    layout: BatchLayout,
    devices: Devices,
    temperature: float,
) -> list[TokenRecord]:
    """Records of the given rows; `weights` are the student's, then those that the teacher needs."""
    if not rows:
        return []
    pairs = [Pair(responses.prompts[i], responses.responses[i]) for i in rows]
    reprompted = [Pair(responses.teacher_prompts[i] or (), responses.responses[i]) for i in rows]
    heads = [programs.head(x) for x in weights]
    records: dict[int, TokenRecord] = {}
    for packed in split_micro_batches(pairs, layout):
        read = [make_sequences(packed, devices)]
        if len(weights) > 1:
            shown = make_sequences(repack(reprompted, packed, layout), devices)
            read += [shown] * (len(weights) - 1)
        hidden = [programs.forward(x, own) for x, own in zip(weights, read, strict=True)]
        targets = place_tokens([p.response for p in pairs], packed, np.int32, devices)
        chunks = [
            devices.fetch(
                programs.compare(
                    [h[:, i] for h in hidden], heads, targets[:, i], jnp.float32(temperature)
                )
            )
            for i in range(packed.filled)
        ]
        records |= _cut(chunks, [len(p.response) for p in pairs], packed)
    return [records[i] for i in range(len(pairs))]


def _cut(
    chunks: Sequence[Any], lengths: Sequence[int], packed: PackedBatch
) -> dict[int, TokenRecord]:
    """Splits the chunks of all shards into records; a shard holds its pairs end to end."""
    whole = [np.stack(parts) for parts in zip(*chunks, strict=True)]  # each [n, D · c, ...]
    size = packed.chunk_tokens
    records: dict[int, TokenRecord] = {}
    for shard, members in enumerate(packed.members):
        own = [x[:, shard * size : (shard + 1) * size] for x in whole]
        columns = [x.reshape(-1, x.shape[-1]) for x in own]
        start = 0
        for pair in members:
            end = start + lengths[pair]
            records[pair] = TokenRecord(*(x[start:end] for x in columns))
            start = end
    return records
