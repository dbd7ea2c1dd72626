"""From ragged rollouts to the fixed shapes of the compiled step. Host-side numpy.

A row is a prompt followed by a response. The teacher's rows are the same responses after other
prompts, in the same order, so that student and teacher meet at `[a, r, t]`.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sdpo_jax.data.packing import bucket
from sdpo_jax.devices import Devices
from sdpo_jax.losses.reductions import sequence_mean_weights, token_mean_weights
from sdpo_jax.training.step import Rows

SEQUENCE_MULTIPLE = 32
RESPONSE_MULTIPLE = 16

Reduction = Literal["token_mean", "sequence_mean"]


class Layout(NamedTuple):
    """`micro_batches` of `rows` each, responses padded to `response_tokens`."""

    micro_batches: int
    rows: int
    response_tokens: int


def layout(capacity: int, longest_response: int, *, micro_batch_rows: int, shards: int) -> Layout:
    """Shapes for up to `capacity` rows; rows of a micro-batch divide over the shards."""
    rows = bucket(min(micro_batch_rows, capacity), shards)
    return Layout(-(-capacity // rows), rows, bucket(longest_response, RESPONSE_MULTIPLE))


def reduction_weights(
    lengths: NDArray[np.int32], active: NDArray[np.bool_], max_tokens: int, reduction: Reduction
) -> tuple[NDArray[np.float32], float]:
    """Weight of each token `[N, T]` and the denominator, over all rows of an update.

    Inactive rows (no teacher signal) have weight 0; `sequence_mean` still counts them in the
    denominator.
    """
    mask = (np.arange(max_tokens)[None] < lengths[:, None]) & active[:, None]
    reduce = token_mean_weights if reduction == "token_mean" else sequence_mean_weights
    weights, denominator = reduce(mask)  # pyright: ignore[reportArgumentType]
    return np.asarray(weights), float(denominator)


def make_rows(
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    shape: Layout,
    devices: Devices,
) -> Rows:
    """Places prompt and response of each row into micro-batches, padded to the capacity."""
    longest = max((len(p) + len(r) for p, r in zip(prompts, responses, strict=True)), default=1)
    capacity, width = shape.micro_batches * shape.rows, bucket(longest, SEQUENCE_MULTIPLE)
    if len(prompts) > capacity:
        raise ValueError(f"expected at most {capacity} rows, got {len(prompts)}")
    tokens = np.zeros((capacity, width), np.int32)
    segments = np.zeros((capacity, width), np.int32)
    take = np.zeros((capacity, shape.response_tokens), np.int32)
    for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        end = len(prompt) + len(response)
        tokens[i, :end] = [*prompt, *response]
        segments[i, :end] = 1
        take[i, : len(response)] = np.arange(len(prompt) - 1, end - 1)
    positions = np.broadcast_to(np.arange(width, dtype=np.int32), tokens.shape)
    cut = [cut_rows(x, shape, devices) for x in (tokens, positions, segments, take)]
    return Rows(*cut, filled=np.int32(-(-len(prompts) // shape.rows)))  # pyright: ignore[reportArgumentType]


def make_tokens(per_row: Sequence[Any], shape: Layout, dtype: Any, devices: Devices) -> Any:
    """Ragged per-token values of each row to `[A, R, T]`, zero beyond the data."""
    out = np.zeros((shape.micro_batches * shape.rows, shape.response_tokens), dtype)
    for i, values in enumerate(per_row):
        out[i, : len(values)] = values
    return cut_rows(out, shape, devices)


def cut_rows(array: Any, shape: Layout, devices: Devices) -> Any:
    """`[A·R, ...] -> [A, R, ...]` on the devices, each micro-batch's rows split over the shards."""
    return devices.put_micro_batches(
        array.reshape(shape.micro_batches, shape.rows, *array.shape[1:])
    )
