"""The programs of a run on abstract arrays: lowered through the engine's own classes, never run.

    begin        prompts through the model, slots and an empty cache: `Sampler`
    advance      the decode loop: `Sampler`
    teacher      the teacher's hidden states at the student's tokens: `forward`
    accumulate   forward and backward of one micro-batch: `make_update_programs`
    finish       the optimiser: `make_update_programs`

Every array is a `jax.ShapeDtypeStruct` with the sharding that the engine gives it, so a mesh may be
of devices that are not there. Beside each program stands what it should cost by pencil.

Matmul FLOPs of one device, two for a multiply-add. `W = 2·D·Q·d + 2·D·H·d + 3·D·F` are the
multiply-adds of a layer's products for one token, `tp` the mesh's tensor axis, `m` tokens and `r`
response tokens on one device of the rows:

    begin        2·m·L·W / tp
    teacher      2·m·L·W / tp
    accumulate   (2·m·L·(4·W - D·F) + 4·2·r·D·V) / tp under remat "full": forward, forward again
                 without the last product of a block, which no gradient needs, and twice that of a
                 forward pass backward; the head's logits, two gradients, and the teacher's logits
    advance      2·n·(L·W + D·V) / tp + 4·n·L·Q·d·(S + T + 1) / tp a token, n slots

Splash attention is a kernel whose products no walk over HLO sees. It computes the blocks on and
below the diagonal, `(1 + b / S) / 2` of the square with blocks of `b`: two products forward, two
again under remat, three for the gradient of queries and four for that of keys and values.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils, topologies
from jax.sharding import AxisType, Mesh

from sdpo_jax.config import OptimizerConfig
from sdpo_jax.devices import AXES, Devices
from sdpo_jax.losses.distillation import top_k_loss
from sdpo_jax.losses.divergences import generalized_jsd
from sdpo_jax.losses.per_token import SdpoSharedInputs, SdpoTokenInputs, sdpo_per_token
from sdpo_jax.rollouts.generate import Plan
from sdpo_jax.rollouts.sampler import Sampler
from sdpo_jax.rollouts.token_sampling import Filters
from sdpo_jax.teacher.weights import ema
from sdpo_jax.training.lora import full
from sdpo_jax.training.state import abstract_state, make_optimizer, state_shardings
from sdpo_jax.training.step import MicroBatch, Sequences, Sums, forward, make_update_programs
from sdpo_models.architecture import Architecture
from sdpo_models.splash import row_and_block
from sdpo_models.transformer import build_model

METRICS = (
    *("divergence", "log_prob", "student_entropy", "teacher_entropy", "forward_kl"),
    *("reverse_kl", "jsd", "teacher_log_prob", "ratio"),
)
"""What the trainer reports of SDPO."""


class Decoding(NamedTuple):
    """Shapes of the sampler."""

    mesh: tuple[int, int, int]
    rollouts: int
    group: int
    prompt_tokens: int
    places: int
    slots: int  # 0: one for every rollout
    weights: str  # dtype in which they lie in memory


class Training(NamedTuple):
    """Shapes of an update."""

    mesh: tuple[int, int, int]
    rows: int  # of a micro-batch, on each shard of the rows
    row_tokens: int
    response_tokens: int  # of a micro-batch, on each shard of the rows
    chunk: int  # tokens of each shard that have logits at a time
    top_k: int  # 0: the whole vocabulary


class Program(NamedTuple):
    """One program, what it should cost on one device, and what it must not do."""

    lower: Callable[[], jax.stages.Lowered]
    flops: float  # of matrix products; of the decode loop, for one token
    pallas_flops: float
    trips: int | None  # of the loop of unknown length: chunks of the head; None: the decode loop
    logits: int  # so many tokens with all their logits on one device are too many; 0: not asked
    cache_bytes: int = 0  # of one device
    token_bytes: int = 0  # that one device must read for one token


def make_devices(topology: str, mesh: tuple[int, int, int]) -> Devices:
    """The engine's mesh over devices that are described, not attached."""
    found = topologies.get_topology_desc(topology, platform="tpu").devices
    if len(found) != math.prod(mesh):
        raise SystemExit(f"mesh {mesh} does not fill the {len(found)} devices of {topology}")
    laid = mesh_utils.create_device_mesh(mesh, found, allow_split_physical_axes=True)
    return Devices(Mesh(laid, AXES, axis_types=(AxisType.Auto,) * 3))


def placed(shapes: Any, shardings: Any) -> Any:
    """Abstract arrays, each with its sharding."""

    def place(x: Any, sharding: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map(place, shapes, shardings)


def layer_products(a: Architecture) -> int:
    """`W`: multiply-adds of one layer's matrices for one token, which is their size."""
    attention = 2 * a.width * a.heads * a.head_size + 2 * a.width * a.kv_heads * a.head_size
    return attention + 3 * a.width * a.mlp_width


def splash_flops(a: Architecture, t: Training, products: int) -> float:
    """Of `products` matrix products of splash's size in each layer, on one device."""
    length, block = row_and_block(t.row_tokens)
    pairs = length * (length + block) / 2
    return 2.0 * products * a.layers * t.rows * a.heads * a.head_size * pairs / t.mesh[2]


def decode_programs(topology: str, a: Architecture, d: Decoding) -> Mapping[str, Program]:
    """`begin` and `advance`."""
    devices = make_devices(topology, d.mesh)
    model = build_model(a, dtype=jnp.bfloat16, attention="splash")
    slots, prompts = d.slots or d.rollouts, d.rollouts // d.group
    sampler = Sampler(model, devices, [a.vocabulary - 1], slots=d.slots)
    weights = jax.eval_shape(model.init, jax.random.key(0))
    where = devices.parameter_shardings(model.logical_axes, weights)
    weights = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.dtype(d.weights)), weights)
    params = placed(weights, where)

    def begin() -> jax.stages.Lowered:
        i32 = partial(jax.ShapeDtypeStruct, dtype=jnp.int32, sharding=devices.rows)
        scalar = np.uint32(0)
        temperature: Any = np.float32(1.0)
        return sampler._begin.lower(
            *(params, i32((prompts, d.prompt_tokens)), i32((prompts,)), np.zeros(1, np.int32)),
            *(Filters(temperature), scalar, scalar, scalar),
            group=d.group,
            slots=slots,
            cache_size=d.places,
            max_tokens=d.places,
        )

    def advance() -> jax.stages.Lowered:
        job, state = begin().out_info
        plan = Plan(d.places, grouped=slots == d.rollouts, refill=slots < d.rollouts)
        return sampler._advance.lower(params, job, state, plan=plan)

    return {
        "begin": Program(begin, *_begin_cost(a, d), trips=1, logits=0),
        "advance": _advance_cost(a, d, advance),
    }


def _begin_cost(a: Architecture, d: Decoding) -> tuple[float, float]:
    shards, tensor = math.prod(d.mesh[:2]), d.mesh[2]
    rows = d.rollouts // d.group // shards
    tokens = rows * d.prompt_tokens
    prompts = Training(d.mesh, rows, d.prompt_tokens, 0, 1, 0)
    return 2.0 * tokens * a.layers * layer_products(a) / tensor, splash_flops(a, prompts, 2)


def _advance_cost(a: Architecture, d: Decoding, lower: Callable[[], jax.stages.Lowered]) -> Program:
    shards, tensor = math.prod(d.mesh[:2]), d.mesh[2]
    slots, prompts = (d.slots or d.rollouts) // shards, d.rollouts // d.group // shards
    weights = a.layers * layer_products(a) + a.width * a.vocabulary
    pair = 2 * 2 * a.layers * a.kv_heads * a.head_size // tensor  # of a token, in bfloat16
    cache = slots * d.places * pair
    prefixes = prompts if slots * shards == d.rollouts else slots
    read = weights // tensor * jnp.dtype(d.weights).itemsize + cache
    read += prefixes * d.prompt_tokens * pair
    seen = d.prompt_tokens + d.places + 1
    flops = 2.0 * slots * weights + 4.0 * slots * a.layers * a.heads * a.head_size * seen
    return Program(lower, flops / tensor, 0.0, None, 0, cache_bytes=cache, token_bytes=read)


def train_programs(topology: str, a: Architecture, t: Training) -> Mapping[str, Program]:
    """`teacher`, `accumulate` and `finish`."""
    devices = make_devices(topology, t.mesh)
    model = build_model(a, dtype=jnp.bfloat16, remat="full", attention="splash")
    optimizer, teacher, parameters = make_optimizer(OptimizerConfig(), 80), ema(0.05), full()
    shardings = state_shardings(model, devices, optimizer, teacher, parameters)
    state = abstract_state(model, optimizer, teacher, shardings, parameters)
    programs = make_update_programs(model, _loss(t), METRICS, optimizer, parameters)
    whole: Any = devices.replicated
    metrics: Any = dict.fromkeys(METRICS, whole)
    sums = Sums(shardings.params, metrics, whole, whole)
    accumulate = devices.jit(programs.accumulate, donate_argnums=0, out_shardings=sums)
    finish = devices.jit(programs.finish, donate_argnums=0, out_shardings=(shardings, whole))
    teacher_pass = devices.jit(partial(forward, model), out_shardings=devices.rows)
    head = devices.jit(model.head, out_shardings=whole)
    zeros = placed(jax.eval_shape(programs.start, state.params), sums)
    batch = micro_batch(devices, a, t)
    scalar: Any = jax.ShapeDtypeStruct((), jnp.float32, sharding=whole)

    def accumulated() -> jax.stages.Lowered:
        shared = SdpoSharedInputs(head.lower(state.teacher).out_info, scalar)
        return accumulate.lower(zeros, state.params, None, batch, shared)

    tokens, layers, tensor = t.rows * t.row_tokens, layer_products(a), t.mesh[2]
    once = 2.0 * tokens * a.layers / tensor
    logits = 2.0 * t.response_tokens * a.width * a.vocabulary / tensor
    again = 4 * layers - a.width * a.mlp_width
    chunks = -(-t.response_tokens // t.chunk)
    return {
        "teacher": Program(
            lambda: teacher_pass.lower(state.teacher, batch.sequences),
            *(once * layers, splash_flops(a, t, 2), 1, t.response_tokens),
        ),
        "accumulate": Program(
            accumulated,
            *(once * again + 4 * logits, splash_flops(a, t, 11), chunks, t.response_tokens),
        ),
        "finish": Program(lambda: finish.lower(state, zeros, scalar), 0.0, 0.0, trips=1, logits=0),
    }


def _loss(t: Training) -> Any:
    """As in configs/qwen3_8b_sdpo.toml."""
    divergence = partial(generalized_jsd, alpha=0.5)
    if t.top_k:
        divergence = partial(top_k_loss, alpha=0.5, k=t.top_k, add_tail=True)
    return sdpo_per_token(divergence, importance_cap=2.0)


def micro_batch(devices: Devices, a: Architecture, t: Training) -> MicroBatch:
    """Packed rows, and the places of their responses in chunks."""
    shards, chunks = devices.row_shards, -(-t.response_tokens // t.chunk)
    rows, places = (shards * t.rows, t.row_tokens), (shards, chunks, t.chunk)

    def array(shape: tuple[int, ...], dtype: Any) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=devices.rows)

    whole: Any = jax.ShapeDtypeStruct((), jnp.int32, sharding=devices.replicated)
    tokens, targets = array(rows, jnp.int32), array(places, jnp.int32)
    sequences = Sequences(tokens, positions=tokens, attention=tokens, target_positions=targets)
    known = SdpoTokenInputs(
        array((*places, a.width), jnp.bfloat16), targets, array(places, jnp.float32)
    )
    return MicroBatch(sequences, targets, array(places, jnp.float32), known, whole)
