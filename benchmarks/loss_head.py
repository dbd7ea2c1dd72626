"""The vocabulary head of the SDPO loss in three forms: memory, time and matmuls.

    python benchmarks/loss_head.py                         # on this CPU
    python benchmarks/loss_head.py --topology v5p:2x2x1    # compiled for TPUs that are not there

The loss is the full-vocabulary JSD of student and teacher, each with a head of its own, and its
gradient by the student's hidden states and head:

    naive          all logits [M, V] at once, plain autodiff
    checkpointed   `checkpointed_linear_loss`: logits a chunk at a time, recomputed for the gradient
    chunked        `fused_linear_loss`: gradients of a chunk while its logits are there

Memory is the compiler's temporary memory, beyond inputs and outputs. One matmul is one
tokens x width x vocabulary product; their number is that of the FLOPs of the compiled loop's body,
which the compiler counts once, over those of one product of a chunk. The second command needs
`jax[tpu]` and no TPU; the vocabulary lies over four devices.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
for name, value in {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_LOG_DIR": "disabled",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}.items():
    os.environ.setdefault(name, value)

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sdpo_jax.losses import (
    SdpoSharedInputs,
    SdpoTokenInputs,
    Vocabulary,
    checkpointed_linear_loss,
    fused_linear_loss,
    generalized_jsd,
    sdpo_per_token,
)
from sdpo_jax.losses.fused_linear import head_logits

AXIS = "tensor"


def naive(loss: Any, hidden: Any, head: Any, aux: Any, weights: Any, *, chunk: int, constants: Any):
    del chunk
    return jnp.sum(weights * loss(head_logits(hidden, head), aux, constants)[0])


def checkpointed(loss: Any, hidden: Any, head: Any, aux: Any, weights: Any, **options: Any):
    return jnp.sum(weights * checkpointed_linear_loss(loss, hidden, head, aux, **options)[0])


def chunked(loss: Any, hidden: Any, head: Any, aux: Any, weights: Any, **options: Any):
    return fused_linear_loss(loss, hidden, head, aux, weights, **options)[0]


FORMS: dict[str, Callable[..., Any]] = {
    "naive": naive,
    "checkpointed": checkpointed,
    "chunked": chunked,
}


def loss_of(form: str, chunk: int, axis: str | None = None) -> Callable[..., Any]:
    """`(hidden, head, teacher_hidden, teacher_head, targets, weights) -> weighted sum`."""
    vocabulary = Vocabulary(axis)
    divergence = partial(generalized_jsd, alpha=0.5, vocabulary=vocabulary)
    per_token = sdpo_per_token(divergence, vocabulary=vocabulary)

    def loss(hidden: Any, head: Any, teacher: Any, teacher_head: Any, targets: Any, weights: Any):
        tokens, constants = (
            SdpoTokenInputs(teacher, targets),
            SdpoSharedInputs(teacher_head, jnp.array(1.0)),
        )
        arguments = per_token, hidden, head, tokens, weights
        return FORMS[form](*arguments, chunk=chunk, constants=constants)

    return loss


def shapes(tokens: int, width: int, vocabulary: int, dtype: Any) -> list[jax.ShapeDtypeStruct]:
    sizes = [(tokens, width), (width, vocabulary)] * 2
    return [jax.ShapeDtypeStruct(s, dtype) for s in sizes] + [
        jax.ShapeDtypeStruct((tokens,), jnp.int32),
        jax.ShapeDtypeStruct((tokens,), jnp.float32),
    ]


def temporary_gigabytes(compiled: Any) -> float:
    return compiled.memory_analysis().temp_size_in_bytes / 1e9


def measure(compiled: Any, arguments: list[jax.ShapeDtypeStruct], chunk: int, shards: int = 1):
    """Temporary gigabytes, and matmuls."""
    (tokens, width), (_, vocabulary) = arguments[0].shape, arguments[1].shape
    body = tokens / -(-tokens // chunk)
    product = 2.0 * body * width * vocabulary / shards
    return temporary_gigabytes(compiled), compiled.cost_analysis()["flops"] / product


def arrays_like(arguments: list[jax.ShapeDtypeStruct]) -> list[jax.Array]:
    random = np.random.default_rng(0)
    made = [jnp.asarray(0.1 * random.normal(size=a.shape), a.dtype) for a in arguments[:4]]
    return [*made, jnp.zeros(arguments[4].shape, jnp.int32), jnp.ones(arguments[5].shape)]


def seconds_of(programs: dict[str, Any], arrays: list[jax.Array], repeats: int) -> dict[str, float]:
    """Medians; the forms take turns, so that a busy machine slows all of them alike."""
    times: dict[str, list[float]] = {form: [] for form in programs}
    for _ in range(repeats + 1):
        for form, program in programs.items():
            began = time.perf_counter()
            jax.block_until_ready(program(*arrays))
            times[form].append(time.perf_counter() - began)
    return {form: statistics.median(t[1:]) for form, t in times.items()}


def on_cpu(chunk: int, repeats: int, width: int = 256, vocabulary: int = 32768) -> None:
    print(f"width {width}, vocabulary {vocabulary}, float32, chunks of {chunk} tokens")
    print(f"{'form':<14}{'tokens':>8}{'temp GB':>10}{'seconds':>10}")
    temp: dict[tuple[str, int], float] = {}
    seconds: dict[str, float] = {}
    for tokens in (4096, 8192, 16384, 32768):
        arguments = shapes(tokens, width, vocabulary, jnp.float32)
        forms = list(FORMS) if tokens == 4096 else ["checkpointed", "chunked"]
        gradient = {f: jax.value_and_grad(loss_of(f, chunk), argnums=(0, 1)) for f in forms}
        programs = {f: jax.jit(g).lower(*arguments).compile() for f, g in gradient.items()}
        if tokens == 4096:
            seconds = seconds_of(programs, arrays_like(arguments), repeats)
        for form in forms:
            temp[form, tokens] = temporary_gigabytes(programs[form])
            shown = f"{seconds[form]:10.2f}" if tokens == 4096 else ""
            print(f"{form:<14}{tokens:>8}{temp[form, tokens]:>10.3f}{shown}")
    growth = temp["chunked", 32768] / temp["chunked", 4096] - 1.0
    print(f"chunked, 4k to 32k tokens: temp {growth:+.1%}")
    print(
        f"chunked / naive at 4k: temp {temp['chunked', 4096] / temp['naive', 4096]:.3f}, ", end=""
    )
    print(f"time {seconds['chunked'] / seconds['naive']:.2f}")


def for_tpu(topology: str, chunk: int, tokens: int, width: int, vocabulary: int) -> None:
    devices = topologies.get_topology_desc(topology, platform="tpu").devices
    mesh = Mesh(np.array(devices).reshape(-1), (AXIS,), axis_types=(AxisType.Auto,))
    shards = len(devices)
    print(f"compiled for {topology}: {tokens} tokens, width {width}, vocabulary {vocabulary} over ")
    print(f"{shards} devices, bfloat16, chunks of {chunk} tokens; per device:")
    print(f"{'form':<14}{'by':<12}{'temp GB':>10}{'matmuls':>10}")
    arguments = shapes(tokens, width, vocabulary, jnp.bfloat16)
    specs = (P(), P(None, AXIS), P(), P(None, AXIS), P(), P())
    placed = [
        jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh, spec))
        for a, spec in zip(arguments, specs, strict=True)
    ]
    for form in ("checkpointed", "chunked"):
        for by in ("jit", "shard_map"):
            loss = loss_of(form, chunk, AXIS if by == "shard_map" else None)
            if by == "shard_map":
                loss = jax.shard_map(loss, mesh=mesh, in_specs=specs, out_specs=P())
            out = (NamedSharding(mesh, P()), tuple(NamedSharding(mesh, s) for s in specs[:2]))
            program = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)), out_shardings=out)
            memory, matmuls = measure(program.lower(*placed).compile(), arguments, chunk, shards)
            print(f"{form:<14}{by:<12}{memory:>10.2f}{matmuls:>10.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--topology", help="a TPU topology to compile for, such as v5p:2x2x1")
    parser.add_argument("--chunk", type=int, help="tokens that have logits at a time")
    parser.add_argument("--tokens", type=int, default=32768, help="with --topology")
    parser.add_argument("--width", type=int, default=4096, help="with --topology")
    parser.add_argument("--vocabulary", type=int, default=151936, help="with --topology")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs on the CPU")
    a = parser.parse_args()
    if a.topology:
        for_tpu(a.topology, a.chunk or 1024, a.tokens, a.width, a.vocabulary)
    else:
        on_cpu(a.chunk or 512, a.repeats)


if __name__ == "__main__":
    main()
