"""Compiles the programs of a run for TPUs that are not there, and checks what came out.

    python benchmarks/compile_tpu.py --topology v5p:2x4x4
    python benchmarks/compile_tpu.py --topology v5e:16x16
    python benchmarks/compile_tpu.py --small
    python benchmarks/compile_tpu.py --programs accumulate \\
        --option xla_tpu_enable_windowed_einsum_for_all_gather=false

needs `jax[tpu]` with the versions that belong together, and no TPU. The shapes are those of
Qwen3-8B: decode of 256 rollouts, 8 to a prompt of 1,024 tokens, with room for 8,192 tokens each;
updates from packed rows of 9,216 tokens. `--small` is a model of two layers on four chips, for CI.

It prints for every program the seconds of compilation; arguments and temporary memory; matmul
FLOPs by `hlo.py` against pencil (`tpu_programs.py` has the formulas) and, apart, those of Pallas
kernels; collectives; the largest arrays in memory. It exits with 1 where a check fails:

    FLOPs        of begin, teacher and accumulate within 3 % of the analytic count
    loops        one of unknown length in advance (tokens) and accumulate (chunks of the head)
    logits       no array of teacher and accumulate has all logits of a device's response tokens
    in place     temporary memory of the decode loop is at most 5 % of its cache
    apart        nothing in those two loops crosses from one shard of the rows to another
    bandwidth    a token of the decode loop takes at most 3 times as long as reading weights,
                 prompts and cache once

The last is by the compiler's own estimate of cycles, which has none for collectives: their time
(two all-reduces a layer over `tensor`, and those of the draw) comes on top. Of `accumulate` and
`teacher` the estimate leaves out Pallas kernels, sorts, scatters and the selection of the top k,
too, and with an effort of -1 it means nothing. All figures are of one device.
"""

import argparse
import math
import os
import sys
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

os.environ.update(
    {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5p-8",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
        "TPU_MIN_LOG_LEVEL": "3",
        "TPU_STDERR_LOG_LEVEL": "3",
        "TPU_LOG_DIR": "disabled",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    | dict(os.environ)
)

import hlo
from tpu_programs import Decoding, Program, Training, decode_programs, train_programs

from sdpo_models.architecture import Architecture

QWEN3_8B = Architecture(
    "qwen3",
    vocabulary=151936,
    width=4096,
    layers=36,
    heads=32,
    kv_heads=8,
    head_size=128,
    mlp_width=12288,
    rope_theta=1e6,
    tied_head=False,
    query_key_norm=True,
)
SMALL = Architecture(
    "qwen3",
    vocabulary=32768,
    width=512,
    layers=2,
    heads=8,
    kv_heads=4,
    head_size=128,
    mlp_width=1024,
    tied_head=False,
    query_key_norm=True,
)
MESHES = {
    "v5p:2x4x4": ((8, 1, 4), (1, 32, 1)),
    "v5e:16x16": ((32, 1, 8), (1, 32, 8)),
    "v5p:2x2x1": ((2, 1, 2), (1, 2, 2)),
}
"""Topology -> data, fsdp and tensor of the sampler and of updates."""
PROGRAMS = ("begin", "advance", "teacher", "accumulate", "finish")


class Chip(NamedTuple):
    """What the manufacturer says: bytes and cycles per second."""

    bandwidth: float
    clock: float


CHIPS = {"v5p": Chip(2765e9, 1.75e9), "v5e": Chip(819e9, 1.5e9)}
MOST_TEMPORARY, MOST_TIMES_ROOFLINE, FLOPS_WITHIN = 0.05, 3.0, 0.03


class Result(NamedTuple):
    """A compiled program, read."""

    seconds: float
    arguments: int  # bytes
    temporary: int
    cost: hlo.Cost  # of the decode loop, that of one token
    trip: hlo.Cost  # of the loop whose length is known at run time: a token, or a chunk of the head
    text: str


def compiled(program: Program, options: dict[str, Any]) -> Result:
    began = time.perf_counter()
    made = program.lower().compile(compiler_options=options)
    seconds = time.perf_counter() - began
    memory, text = made.memory_analysis(), str(made.as_text())
    assert memory is not None
    trip = difference(hlo.cost(text, unknown_trips=1), hlo.cost(text, unknown_trips=0))
    cost = trip if program.trips is None else hlo.cost(text, unknown_trips=program.trips)
    sizes = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    return Result(seconds, *sizes, cost, trip, text)


def difference(with_body: hlo.Cost, without: hlo.Cost) -> hlo.Cost:
    pairs = zip(with_body.collectives, without.collectives, strict=True)
    inside = (c._replace(times=c.times - d.times) for c, d in pairs if c.times > d.times)
    flops, cycles = with_body.flops - without.flops, with_body.cycles - without.cycles
    return hlo.Cost(flops, cycles, tuple(inside), with_body.unknown_loops)


def main() -> None:
    options = arguments()
    a = SMALL if options.small else QWEN3_8B
    a = a if options.layers is None else Architecture(**(vars(a) | {"layers": options.layers}))
    topology = options.topology
    d, t = shapes(options)
    programs = {**decode_programs(topology, a, d), **train_programs(topology, a, t)}
    print(f"{topology}, {a.layers} layers of {a.width}; sampler {d.mesh}, updates {t.mesh}")
    failed = False
    for name in options.programs:
        program = programs[name]
        result = compiled(program, dict(options.option))
        if options.hlo:
            with open(os.path.join(options.hlo, f"{name}.hlo"), "w") as file:
                file.write(result.text)
        show(name, program, result, CHIPS[topology.split(":")[0]])
        for fine, words in checks(name, program, result, a, options):
            print(f"  {'ok  ' if fine else 'FAIL'} {words}", flush=True)
            failed |= not fine
    sys.exit(failed)


def show(name: str, program: Program, r: Result, chip: Chip) -> None:
    per = " a token" if program.trips is None else ""
    print(
        f"{name}: compiled in {r.seconds:.0f} s; arguments {r.arguments / 1e9:.3f} GB, "
        f"temporary {r.temporary / 1e9:.3f} GB"
    )
    print(
        f"  matmuls{per} {r.cost.flops / 1e12:.4f} TFLOP, analytic {program.flops / 1e12:.4f}; "
        f"Pallas kernels {program.pallas_flops / 1e12:.4f} more; "
        f"{r.cost.cycles / chip.clock * 1e3:.2f} ms by the compiler's cycles"
    )
    inside = hlo.bytes_by_kind(r.trip.collectives)
    for kind, (count, size) in sorted(hlo.bytes_by_kind(r.cost.collectives).items()):
        chunk = inside.get(kind, (0, 0))[1] if program.trips else 0
        more = f", of which a chunk of the head {chunk / 1e6:.3f}" if chunk else ""
        print(f"  {kind}{per}: {count}, {size / 1e6:.3f} MB{more}")
    largest = list(hlo.shapes(r.text, fused=False))[:5]
    print("  largest:", ", ".join(f"{x.dtype}{list(x.dims)}" for x in largest))


def checks(
    name: str, program: Program, r: Result, a: Architecture, options: argparse.Namespace
) -> Iterator[tuple[bool, str]]:
    """Whether each is met, and what was found."""
    loops = 1 if name in ("advance", "accumulate") else 0
    found = ", ".join(r.cost.unknown_loops) or "none"
    yield len(r.cost.unknown_loops) == loops, f"loops of unknown length, expected {loops}: {found}"
    if name in ("begin", "teacher", "accumulate"):
        off = r.cost.flops / program.flops - 1.0
        yield abs(off) <= FLOPS_WITHIN, f"FLOPs of matmuls {off:+.1%} from the analytic count"
    if program.logits:
        arrays = with_logits(r.text, program.logits, a, options.train_mesh[2])
        yield not arrays, f"logits of {program.logits} tokens: {', '.join(arrays) or 'none'}"
    if name == "accumulate":
        yield apart(r.trip, options.train_mesh[2], "head")
    if name == "advance":
        yield from decode_checks(program, r, options)


def decode_checks(
    program: Program, r: Result, options: argparse.Namespace
) -> Iterator[tuple[bool, str]]:
    share = r.temporary / program.cache_bytes
    size = f"{program.cache_bytes / 1e9:.3f} GB"
    yield share <= MOST_TEMPORARY, f"temporary memory is {share:.1%} of the cache of {size}"
    yield apart(r.trip, options.mesh[2], "decode")
    if options.effort is None and not options.small:  # of little, most is latency
        chip = CHIPS[options.topology.split(":")[0]]
        least = program.token_bytes / chip.bandwidth
        times = r.trip.cycles / chip.clock / least
        read = f"{program.token_bytes / 1e9:.2f} GB in {least * 1e3:.2f} ms"
        yield times <= MOST_TIMES_ROOFLINE, f"a token takes {times:.2f} times as long as {read}"


def apart(trip: hlo.Cost, tensor: int, what: str) -> tuple[bool, str]:
    """Nothing in a loop may cross from one shard of the rows to another."""
    crossing = [c for c in trip.collectives if not c.groups or any(crosses(c.groups, tensor))]
    size = sum(c.times * c.bytes for c in crossing)
    words = f"{len(crossing)} collectives, {size / 1e6:.3f} MB a trip"
    return not crossing, f"across shards of the rows in the {what}'s loop: {words}"


def crosses(groups: tuple[tuple[int, ...], ...], tensor: int) -> Iterator[bool]:
    """`tensor` is the mesh's last axis: neighbours are of one shard of the rows."""
    return (len({device // tensor for device in group}) > 1 for group in groups)


def with_logits(text: str, tokens: int, a: Architecture, tensor: int) -> list[str]:
    """Arrays of the vocabulary, or a device's share of it, times `tokens` or more."""
    return [
        f"{x.dtype}{list(x.dims)}"
        for x in hlo.shapes(text)
        for size in {a.vocabulary, a.vocabulary // tensor} & set(x.dims)
        if tokens <= math.prod(x.dims) // size != a.width  # that would be the head itself
    ]


def shapes(options: argparse.Namespace) -> tuple[Decoding, Training]:
    decoding = Decoding(
        mesh=options.mesh,
        rollouts=options.rollouts,
        group=options.group,
        prompt_tokens=options.prompt_tokens,
        places=options.places,
        slots=options.slots,
        weights=options.weights,
    )
    training = Training(
        mesh=options.train_mesh,
        rows=options.rows,
        row_tokens=options.row_tokens,
        response_tokens=options.response_tokens,
        chunk=options.chunk,
        top_k=options.top_k,
    )
    return decoding, training


def three(text: str) -> tuple[int, ...]:
    sizes = tuple(map(int, text.split(",")))
    if len(sizes) != 3:
        raise argparse.ArgumentTypeError(f"expected data,fsdp,tensor, got {text}")
    return sizes


def pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"expected flag=value, got {text}")
    return name, value


FULL = {
    "topology": "v5p:2x4x4",
    "rollouts": 256,
    "group": 8,
    "prompt_tokens": 1024,
    "places": 8192,
    "rows": 1,
    "row_tokens": 9216,
    "response_tokens": 8192,
    "chunk": 1024,
    "top_k": 100,
}
LITTLE = {
    "topology": "v5p:2x2x1",
    "rollouts": 16,
    "group": 4,
    "prompt_tokens": 256,
    "places": 8192,
    "rows": 1,
    "row_tokens": 2304,
    "response_tokens": 2048,
    "chunk": 256,
    "top_k": 20,
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--small", action="store_true", help="a little model on four chips")
    parser.add_argument("--programs", nargs="+", default=PROGRAMS, choices=PROGRAMS)
    parser.add_argument("--layers", type=int, help="fewer than the model has")
    parser.add_argument("--effort", type=float, help="of the compiler; -1 is quick")
    parser.add_argument("--option", type=pair, nargs="+", default=[], help="flag=value of XLA")
    parser.add_argument("--mesh", type=three, help="data,fsdp,tensor of the sampler")
    parser.add_argument("--train-mesh", type=three, help="the same of updates")
    parser.add_argument("--slots", type=int, default=0, help="rollouts decoded at a time; 0: all")
    parser.add_argument("--weights", default="bfloat16", help="how they lie while decoding")
    parser.add_argument("--hlo", help="a folder for the programs' text")
    for name, value in FULL.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value))
    options = parser.parse_args()
    for name, value in (LITTLE if options.small else FULL).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    meshes = MESHES.get(options.topology, (None, None))
    if options.effort is not None:
        options.option.append(("exec_time_optimization_effort", options.effort))
    options.mesh, options.train_mesh = options.mesh or meshes[0], options.train_mesh or meshes[1]
    if options.mesh is None or options.train_mesh is None:
        parser.error(f"--mesh and --train-mesh are needed for {options.topology}")
    return options


if __name__ == "__main__":
    main()
