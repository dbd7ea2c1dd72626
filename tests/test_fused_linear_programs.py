"""What the compiled fused linear loss holds in memory, multiplies, and sends between devices."""

import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jax_versions import auto_mesh, needs_newer_compiler, needs_shard_map
from linear_problem import (
    OBJECTIVES,
    D,
    V,
    all_logits_at_once,
    assert_close,
    in_first_chunks,
    problem,
    run,
)

from sdpo_jax.losses.fused_linear import fused_linear_loss
from sdpo_jax.losses.per_token import SdpoSharedInputs


def loop_collectives(text):
    """Lines of a compiled program with a collective that stems from the body of a loop."""
    return [x for x in text.splitlines() if "all-reduce(" in x and "while/body" in x]


def sharded_problem(name):
    return problem(name, tokens=256, width=8, vocabulary=1024)


def mesh():
    return auto_mesh((4, 2), ("fsdp", "tensor"))


def put_on_mesh(arrays):
    """Tokens over `fsdp`, heads over `tensor` by vocabulary."""
    place = mesh()

    def put(spec, tree):
        return jax.tree.map(lambda x: jax.device_put(x, NamedSharding(place, spec)), tree)

    hidden, head, aux, weights, constants = arrays
    if isinstance(constants, SdpoSharedInputs):
        constants = SdpoSharedInputs(
            put(P(None, "tensor"), constants.teacher_head), put(P(), constants.temperature)
        )
    tokens = put(P("fsdp"), (hidden, aux, weights))
    return tokens[0], put(P(None, "tensor"), head), tokens[1], tokens[2], constants


def sizes_moved(text):
    """Number of elements of each array that a collective of a compiled program returns."""
    kinds = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    for result in re.findall(rf"= (.*?) (?:{kinds})(?:-start)?\(", text):
        for shape in re.findall(r"\[([\d,]*)\]", result):
            yield int(np.prod([int(n) for n in shape.split(",") if n]))


@pytest.mark.parametrize("name", ["sdpo_jsd", "grpo", "sft"])
def test_sharded_equals_unsharded_and_no_token_and_no_logits_move(name):
    arrays = sharded_problem(name)
    compute = jax.jit(partial(run, fused_linear_loss, name, chunk=64))
    sharded = put_on_mesh(arrays)
    compiled = compute.lower(*sharded).compile()
    assert_close(compiled(*sharded), run(all_logits_at_once, name, *arrays, chunk=64), 2e-6)
    # Per chunk: sums and maxima over the vocabulary, one gradient of 16 local hidden states, and
    # this device's half of the head's gradient. No hidden state of the batch, no logits.
    sizes = sorted(set(sizes_moved(str(compiled.as_text()))))
    assert sizes[-1] == 8 * 512 and all(size <= 16 * 8 for size in sizes[:-1])


@needs_shard_map
def test_under_shard_map_the_head_gradient_crosses_devices_once():
    name, arrays = "sdpo_jsd", sharded_problem("sdpo_jsd")
    hidden, head, aux, weights, constants = put_on_mesh(arrays)

    @partial(
        jax.shard_map,
        mesh=mesh(),
        in_specs=(P("fsdp"), P(), P("fsdp"), P("fsdp"), P()),
        out_specs=(P(), P("fsdp")),
        axis_names={"fsdp"},
    )
    def local(hidden, head, aux, weights, constants):
        total, metrics = fused_linear_loss(
            OBJECTIVES[name], hidden, head, aux, weights, chunk=16, constants=constants
        )
        return jax.lax.psum(total, "fsdp"), metrics

    def loss(hidden, head):
        total, metrics = local(hidden, head, aux, weights, constants)
        return 0.37 * total, metrics

    compute = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    compiled = compute.lower(hidden, head).compile()
    got = compiled(hidden, head)
    assert_close(got, run(all_logits_at_once, name, *arrays, chunk=64), 2e-6)
    assert list(sizes_moved(str(compiled.as_text()))).count(8 * 512) == 1
    assert not any("[8,512]" in line for line in loop_collectives(str(compiled.as_text())))


def test_a_block_for_each_shard_and_filled_chunks_move_no_token_either():
    """Four shards of 64 tokens, chunks of 16 from each: the form of a training step."""
    name, filled = "sdpo_jsd", 2
    hidden, head, aux, weights, constants = sharded_problem(name)
    read = in_first_chunks(filled, chunk=64, block=16, tokens=256)
    assert read.reshape(4, -1).sum(axis=1).tolist() == [32] * 4 and read[:32].all()
    arrays = hidden, head, aux, jnp.where(read, weights, 0.0), constants
    sharded = put_on_mesh(arrays)
    compute = jax.jit(partial(run, fused_linear_loss, name, chunk=64, block=16))
    compiled = compute.lower(*sharded, filled=jnp.int32(filled)).compile()
    got = compiled(*sharded, filled=jnp.int32(filled))
    (value, metrics), gradients = run(all_logits_at_once, name, *arrays, chunk=64)
    metrics = {k: jnp.where(read, v, 0) for k, v in metrics.items()}
    assert_close(got, ((value, metrics), gradients), 2e-6)
    sizes = sorted(set(sizes_moved(str(compiled.as_text()))))
    assert sizes[-1] == 8 * 512 and all(size <= 16 * 8 for size in sizes[:-1])


def test_all_logits_never_exist():
    tokens, chunk, width, vocabulary = 4096, 64, 8, 1024
    arrays = problem("sdpo_jsd", tokens=tokens, width=width, vocabulary=vocabulary)
    bytes_of = {}
    for function in (fused_linear_loss, all_logits_at_once):
        compute = jax.jit(partial(run, function, "sdpo_jsd", chunk=chunk))
        compiled = compute.lower(*arrays).compile()
        memory: Any = compiled.memory_analysis()
        bytes_of[function] = memory.temp_size_in_bytes
        exists = re.search(
            rf"\[({tokens},{vocabulary}|{tokens // chunk},{chunk},{vocabulary})\]",
            str(compiled.as_text()),
        )
        assert bool(exists) == (function is all_logits_at_once)
    assert bytes_of[fused_linear_loss] < 4 * tokens * vocabulary / 4 < bytes_of[all_logits_at_once]


@needs_newer_compiler
def test_four_head_matmuls_for_student_and_teacher_and_two_without_gradient():
    hidden, head, aux, weights, constants = problem("sdpo_jsd")
    # Lowered, not traced: of the forms for each platform one is left.
    whole = partial(run, fused_linear_loss, "sdpo_jsd", chunk=16)
    text = jax.jit(whole).lower(hidden, head, aux, weights, constants).as_text()
    assert text.count("stablehlo.dot_general") == 4
    value = partial(fused_linear_loss, OBJECTIVES["sdpo_jsd"], chunk=16, constants=constants)
    compiled = jax.jit(value).lower(hidden, head, aux, weights).compile()
    text = str(compiled.as_text())
    assert f"[{D},{V}]" in text and len(re.findall(r" dot\(|custom-call\(", text)) <= 2
