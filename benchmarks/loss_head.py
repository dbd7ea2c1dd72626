"""The vocabulary head of the SDPO loss in three forms: memory, time, matmuls and collectives.

    python benchmarks/loss_head.py                         # on this CPU
    python benchmarks/loss_head.py --topology v5p:2x2x1    # compiled for TPUs that are not there

The loss is the full-vocabulary JSD of student and teacher, each with a head of its own, and its
gradient by the student's hidden states and head:

    naive          all logits [M, V] at once, plain autodiff
    checkpointed   `checkpointed_head`: logits a chunk at a time, made again in the backward pass
    chunked        `chunked_head`: gradients of a chunk while its logits are there

The second form needs `jax[tpu]` and no TPU: memory, matmuls and collectives are the compiler's
answers for the real chip, cycles are its own estimates without the collectives. One matmul is one
tokens × width × vocabulary product, counted in the optimised program.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sdpo_jax.losses.chunked_head import head_logits
from sdpo_jax.losses.objectives import SdpoConstants, SdpoTokens

# A chunk reads and writes the head's accumulated gradient once, 2 · D · V numbers, and its logits
# about ten times, so smaller chunks than D / 5 are bound by the accumulator. On the CPU 2 · D is
# the fastest whose memory stays below 1/8 of naive. On a TPU every multiple of 128 above D / 10
# keeps the matmuls busy, and memory decides.
CPU_CHUNK, TPU_CHUNK = 512, 1024

Arrays = tuple[jax.Array, jax.Array, SdpoTokens, jax.Array, SdpoConstants]
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


class Size(NamedTuple):
    """How large the problem is."""

    tokens: int
    width: int
    vocabulary: int
    dtype: Any


@dataclass
class Program:
    """Sums over a compiled program; what a loop holds counts once per turn."""

    flops: float = 0.0  # of its matmuls
    cycles: float = 0.0  # the compiler's estimate; TPU only
    collectives: dict[str, list[float]] = field(default_factory=dict)  # [number, bytes]

    def add(self, other: "Program", times: float) -> None:
        self.flops += times * other.flops
        self.cycles += times * other.cycles
        for name, (number, size) in other.collectives.items():
            mine = self.collectives.setdefault(name, [0.0, 0.0])
            mine[0] += times * number
            mine[1] += times * size


@dataclass
class Row:
    """One line of the table."""

    form: str
    tokens: int
    chunk: int | None
    temp_gb: float
    matmuls: float
    seconds: float | None = None
    cpu_seconds: float | None = None
    mega_cycles: float | None = None
    collectives: str = ""


def naive(loss, hidden, head, aux, weights, *, chunk, constants):
    """`chunked_head` with all logits at once."""
    del chunk
    values, metrics = loss(head_logits(hidden, head), aux, constants)
    return jnp.sum(weights * values), metrics
