"""What a compiled program does, read from its optimised HLO text: `compiled.as_text()`.

    report = cost(compiled.as_text())
    report.flops, report.cycles, bytes_by_kind(report.collectives), report.unknown_loops
    assert not any(array.dims == (tokens, vocabulary) for array in shapes(text))

The compiler's own `cost_analysis()` counts the body of a loop once; here a body counts as often as
it runs. How often is `known_trip_count` where the compiler wrote it (CPU) and is otherwise read
from the condition (TPU): counter against constant, with the counter's start and stride. A loop that
ends on anything else is named in `unknown_loops` and counted as often as the caller says; what a
decode loop does per token is the difference of `unknown_trips=1` and `unknown_trips=0`.

FLOPs are those of matrix products (`dot`, or `convolution`, as a TPU has it), two for a
multiply-add; of a convolution only pairs that meet count, so that a batched product written as a
dilated window has its true cost. Cycles are the compiler's estimates, which it does not make for
Pallas kernels, scatters and collectives. All branches of a conditional count. All figures are those
of one device.
"""

import math
import re
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import NamedTuple

COLLECTIVES = {
    *("all-gather", "all-reduce", "all-to-all", "ragged-all-to-all", "reduce-scatter"),
    *("collective-broadcast", "collective-permute"),
}


class Array(NamedTuple):
    """An array's type."""

    dtype: str
    dims: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Without padding."""
        bits = re.search(r"\d+", self.dtype)  # of bf16, s4, f8e4m3fn; pred has none
        return math.prod(self.dims) * int(bits.group() if bits else 8) // 8


class Instruction(NamedTuple):
    """One line of a computation."""

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    arguments: str  # what stands between the opcode's parentheses, such as a constant's value
    attributes: str

    @property
    def arrays(self) -> tuple[Array, ...]:
        """The result's arrays, a tuple's in order."""
        found = re.findall(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,<= ]*)\]", self.type)
        return tuple(Array(dtype, tuple(_integers(dims))) for dtype, dims in found)

    def attribute(self, name: str) -> str | None:
        """`value` of `name=value`, braces included; None where there is no such."""
        found = re.search(rf"(?:^|[ ,]){name}=(\{{[^}}]*\}}|[^ ,]+)", self.attributes)
        return found.group(1) if found else None


class Computation(NamedTuple):
    """Instructions by name, in the order of the text, and the name of the root."""

    instructions: dict[str, Instruction]
    root: str


class Program(NamedTuple):
    """Computations by name, and which is the entry."""

    computations: dict[str, Computation]
    entry: str


class Collective(NamedTuple):
    """A collective operation as often as it runs."""

    kind: str
    arrays: tuple[Array, ...]  # of the result
    bytes: int  # of one run: of operands or results, whichever are larger
    times: int
    groups: tuple[tuple[int, ...], ...]  # partitions that talk to each other; empty: all of them


class Cost(NamedTuple):
    """What one device does from start to end."""

    flops: int
    cycles: int
    collectives: tuple[Collective, ...]
    unknown_loops: tuple[str, ...]


# A collective that is fused with matmuls stands in several; the first has the flag -1.
_STEP = re.compile(r'"async_collective_fusion_config":\{"flag_start":"\d')
_NAME = r"%?([\w.\-]+)"
_HEADER = re.compile(rf"^(ENTRY )?{_NAME} \(.*\) -> .*\{{$")
_INSTRUCTION = re.compile(rf"^\s+(ROOT )?{_NAME} = ")


def parse(text: str) -> Program:
    """Reads the text of a module."""
    computations: dict[str, Computation] = {}
    entry, name, root, lines = "", "", "", list[str]()
    for line in text.splitlines():
        header = _HEADER.match(line)
        if header and not line.startswith(" "):
            name, root, lines = header.group(2), "", []
            entry = name if header.group(1) else entry
        elif line.rstrip() == "}" and name:
            made = {i.name: i for i in map(_instruction, lines)}
            computations[name] = Computation(made, root or next(reversed(made)))
            name = ""
        elif name and (found := _INSTRUCTION.match(line)):
            root = found.group(2) if found.group(1) else root
            lines.append(line)
        elif name and lines:
            lines[-1] += line  # the metadata of a Pallas kernel has line breaks
    if not entry:
        raise ValueError("expected the text of an HLO module, got none with an ENTRY computation")
    return Program(computations, entry)


def _instruction(line: str) -> Instruction:
    start = _INSTRUCTION.match(line)
    assert start is not None
    rest = line[start.end() :]
    end = _closing(rest) if rest.startswith("(") else rest.index(" ")
    kind, rest = rest[:end], rest[end:].lstrip()
    opening = rest.index("(")
    opcode, rest = rest[:opening], rest[opening:]
    closing = _closing(rest)
    arguments = rest[1 : closing - 1]
    operands = tuple(re.findall(r"%([\w.\-]+)", arguments))
    return Instruction(start.group(2), kind, opcode, operands, arguments, rest[closing:])


def _closing(text: str) -> int:
    """Index after the parenthesis that closes the first."""
    depth = 0
    for found in re.finditer(r"[()]", text):
        depth += 1 if found.group() == "(" else -1
        if depth == 0:
            return found.end()
    raise ValueError(f"expected balanced parentheses, got {text[:80]!r}")


def shapes(text: str, *, fused: bool = True) -> Iterator[Array]:
    """Every array type in the program once, largest first; without `fused`, those in memory only.

    What a fusion computes inside never is in memory as a whole.
    """
    computations = parse(text).computations
    everything = [i for c in computations.values() for i in c.instructions.values()]
    fusions = [i.attribute("calls") for i in everything if i.opcode == "fusion"]
    hidden = set() if fused else {name for calls in fusions for name in _names(calls)}
    shown = [c for name, c in computations.items() if name not in hidden]
    found = {a for c in shown for i in c.instructions.values() for a in i.arrays}
    yield from sorted(found, key=lambda a: (-a.bytes, a))


def cost(text: str, *, unknown_trips: int = 1) -> Cost:
    """Sums over the whole program.

    Args:
      text: of the optimised module.
      unknown_trips: how often a loop of unknown length runs.
    """
    program = parse(text)
    flops, cycles, collectives, unknown = 0, 0, list[Collective](), list[str]()
    for computation, i, times, fused in _runs(program, program.entry, 1, False, unknown_trips):
        if i.opcode == "dot":
            flops += times * _dot_flops(computation, i)
        elif i.opcode == "convolution":
            flops += times * _convolution_flops(computation, i)
        elif i.opcode == "while" and trip_count(program, computation, i) is None:
            unknown.append(i.name)
        elif i.opcode.removesuffix("-start") in COLLECTIVES and not _STEP.search(i.attributes):
            collectives.append(_collective(computation, i, times))
        estimate = re.search(r'"estimated_cycles":"(\d+)"', i.attributes)
        if estimate and not fused:  # a fusion's own covers what is fused
            cycles += times * int(estimate.group(1))
    return Cost(flops, cycles, tuple(collectives), tuple(unknown))


def _runs(
    program: Program, name: str, times: int, fused: bool, unknown_trips: int
) -> Iterator[tuple[Computation, Instruction, int, bool]]:
    """All instructions of a computation and what it calls; how often each runs; whether fused."""
    computation = program.computations[name]
    for i in computation.instructions.values():
        yield computation, i, times, fused
        trips = 1
        if i.opcode == "while":
            known = trip_count(program, computation, i)
            trips = unknown_trips if known is None else known
        inside = fused or i.opcode == "fusion"
        for called in _called(i):
            yield from _runs(program, called, times * trips, inside, unknown_trips)


def _names(attribute: str | None) -> list[str]:
    return re.findall(r"[\w.\-]+", attribute or "")


def _called(i: Instruction) -> list[str]:
    """The computations that run with an instruction, a loop's condition among them."""
    if i.opcode.endswith(("-done", "-update")):
        return []
    attributes = ("body", "condition", "calls", "called_computations", "branch_computations")
    attributes += ("true_computation", "false_computation")
    attributes += ("to_apply",) if i.opcode == "call" else ()
    return [n for attribute in attributes for n in _names(i.attribute(attribute))]


def _integers(text: str | None) -> list[int]:
    return [int(n) for n in re.findall(r"-?\d+", text or "")]


def _dot_flops(computation: Computation, i: Instruction) -> int:
    left = computation.instructions[i.operands[0]].arrays[0].dims
    contracted = math.prod(left[d] for d in _integers(i.attribute("lhs_contracting_dims")))
    return 2 * math.prod(i.arrays[0].dims) * contracted


def _convolution_flops(computation: Computation, i: Instruction) -> int:
    """As XLA's `HloCostAnalysis`: products of window positions that meet an element."""
    left, right = (computation.instructions[o].arrays[0].dims for o in i.operands)
    found = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", i.attributes)
    assert found is not None, i.attributes
    labels, kernel, result = found.groups()
    out = i.arrays[0].dims
    window = re.search(r"window=\{([^}]*)\}", i.attributes)
    entries = (e.split("=") for e in window.group(1).split()) if window else ()
    fields = {key: value.split("x") for key, value in entries}
    groups = _integers(i.attribute("batch_group_count"))
    total = 2 * out[result.index("f")] * right[kernel.index("i")]
    total *= left[labels.index("b")] // (groups[0] if groups else 1)
    for axis in range(len(labels) - 2):
        low = fields["pad"][axis].split("_")[0] if "pad" in fields else "0"
        keys = ("size", "stride", "lhs_dilate", "rhs_dilate")
        steps = [int(fields[key][axis]) if key in fields else 1 for key in keys]
        sizes = left[labels.index(str(axis))], out[result.index(str(axis))]
        total *= _meetings(*sizes, *steps, int(low))
    return total


@lru_cache(maxsize=10_000)
def _meetings(n: int, out: int, size: int, stride: int, dilate: int, spread: int, low: int) -> int:
    """Pairs of result and window position that read an element, along one axis."""
    count = 0
    for o in range(out):
        for k in range(size):
            at = o * stride + k * spread - low
            count += 0 <= at <= (n - 1) * dilate and at % dilate == 0
    return count


def _collective(computation: Computation, i: Instruction, times: int) -> Collective:
    """Of an asynchronous form the start counts; its result holds the operands, too."""
    read = sum(a.bytes for o in i.operands for a in computation.instructions[o].arrays)
    results = tuple(a for a in i.arrays if a.dims) or i.arrays
    made = sum(a.bytes for a in results)
    if i.opcode.endswith("-start") and made > read:
        results, made = results[len(i.operands) :], made - read
    kind = i.opcode.removesuffix("-start")
    return Collective(kind, results, max(read, made), times, _groups(i))


def _groups(i: Instruction) -> tuple[tuple[int, ...], ...]:
    """From `{{0,1},{2,3}}`, `[2,4]<=[4,2]T(1,0)` or `mesh['x'=2,'y'=4] {'y'}`."""
    pairs = re.search(r"source_target_pairs=(\{\{.*?\}\})", i.attributes)
    found = re.search(r"replica_groups=(\{\{.*?\}\})", i.attributes) or pairs
    if found:
        return tuple(tuple(_integers(g)) for g in re.findall(r"\{[\d,]+\}", found.group(1)))
    found = re.search(r"replica_groups=(\[[\d,]+\])<=(\[[\d,]+\](?:T\([\d,]+\))?)", i.attributes)
    if found:
        return _split(_iota(found.group(2)), _integers(found.group(1))[1:])
    found = re.search(
        r"replica_groups=\w+\[([^\]]*)\](?:, device_ids=\(([^ ]*)\))? ?\{([^}]*)\}", i.attributes
    )
    return _mesh_groups(*found.groups()) if found else ()


def _mesh_groups(axes: str, ids: str | None, talking: str) -> tuple[tuple[int, ...], ...]:
    """`'x'=4,'y'=2` and `[2,4]T(1,0)` or nothing and `'y'`."""
    if ":(" in talking:
        raise ValueError(f"expected groups of whole mesh axes, got {talking}")
    names = re.findall(r"'([^']+)'", axes)
    sizes = _integers(re.sub(r"'[^']+'", "", axes))
    inner = [names.index(name) for name in re.findall(r"'([^']+)'", talking)]
    order = [n for n in range(len(names)) if n not in inner] + inner
    devices = _iota(ids) if ids else list(range(math.prod(sizes)))
    return _split([devices[n] for n in _transposed(sizes, order)], [sizes[n] for n in inner])


def _split(ids: list[int], inner: Iterable[int]) -> tuple[tuple[int, ...], ...]:
    size = math.prod(inner)
    return tuple(tuple(ids[n : n + size]) for n in range(0, len(ids), size))


def _iota(text: str) -> list[int]:
    """`[2,4]T(1,0)`: counts, laid out in that shape, read in that order of axes."""
    sizes, _, order = text.partition("T")
    dims = _integers(sizes)
    return _transposed(dims, _integers(order) if order else list(range(len(dims))))


def _transposed(sizes: list[int], order: list[int]) -> list[int]:
    strides = [math.prod(sizes[n + 1 :]) for n in range(len(sizes))]
    ids = [0]
    for axis in order:
        ids = [start + step * strides[axis] for start in ids for step in range(sizes[axis])]
    return ids


def bytes_by_kind(collectives: Iterable[Collective]) -> dict[str, tuple[int, int]]:
    """How many of each kind run, and the bytes of all of them."""
    totals: dict[str, tuple[int, int]] = {}
    for c in collectives:
        count, size = totals.get(c.kind, (0, 0))
        totals[c.kind] = (count + c.times, size + c.times * c.bytes)
    return totals


def trip_count(program: Program, computation: Computation, loop: Instruction) -> int | None:
    """How often the body of a `while` runs; None where the text does not tell."""
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes)
    if known:
        return int(known.group(1))
    condition, body = (
        program.computations[_names(loop.attribute(name))[0]] for name in ("condition", "body")
    )
    carried = computation.instructions[loop.operands[0]]
    test, sides = _operation(program, condition, condition.root)
    counter = _carried(condition, sides[0]) if test.opcode == "compare" else None
    if counter is None or carried.opcode != "tuple":
        return None
    start, limit = _constant(_through(computation, carried.operands[counter])), _constant(sides[1])
    stride = _stride(program, body, counter)
    more = {"LT": 0, "NE": 0, "LE": 1}.get(test.attribute("direction") or "")
    if start is None or stride is None or limit is None or more is None:
        return None
    return max(0, -(-(limit + more - start) // stride))


def _through(computation: Computation, name: str) -> Instruction:
    """What a value is a copy of."""
    i = computation.instructions[name]
    while i.opcode in ("copy", "copy-start", "copy-done", "bitcast", "reshape"):
        i = computation.instructions[i.operands[0]]
    return i


def _operation(
    program: Program, computation: Computation, name: str
) -> tuple[Instruction, list[Instruction]]:
    """What makes a value and from what, out of the fusion that it may be wrapped in."""
    i = _through(computation, name)
    if i.opcode != "fusion":
        return i, [_through(computation, o) for o in i.operands]
    inner = program.computations[_names(i.attribute("calls"))[0]]
    root = _through(inner, inner.root)
    sources = [_through(inner, o) for o in root.operands]
    outside = [i.operands[int(s.arguments)] if s.opcode == "parameter" else "" for s in sources]
    return root, [
        _through(computation, o) if o else s for o, s in zip(outside, sources, strict=True)
    ]


def _constant(i: Instruction) -> int | None:
    is_integer = i.opcode == "constant" and re.fullmatch(r"-?\d+", i.arguments)
    return int(i.arguments) if is_integer else None


def _carried(computation: Computation, i: Instruction) -> int | None:
    """The index of a value in what a loop carries."""
    if i.opcode != "get-tuple-element":
        return None
    whole = computation.instructions[i.operands[0]]
    return int(i.attribute("index") or 0) if whole.opcode == "parameter" else None


def _stride(program: Program, body: Computation, counter: int) -> int | None:
    """What a body adds to its counter."""
    root = body.instructions[body.root]
    if root.opcode != "tuple":
        return None
    step, terms = _operation(program, body, root.operands[counter])
    by = [_constant(term) for term in terms if _carried(body, term) != counter]
    return by[0] if step.opcode == "add" and len(by) == 1 and (by[0] or 0) > 0 else None
