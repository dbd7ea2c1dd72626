"""The walker counts what runs, as often as it runs."""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

PATH = Path(__file__).parent.parent / "benchmarks" / "hlo.py"
M, K, N = 4, 8, 6


@pytest.fixture(scope="module")
def hlo():
    spec = importlib.util.spec_from_file_location("hlo", PATH)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def text_of(function, *shapes):
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    text = jax.jit(function).lower(*arguments).compile().as_text()
    assert text is not None
    return text


def layers(x, weights):
    return jax.lax.scan(lambda y, w: (jnp.tanh(y @ w), None), x, weights)[0]


def test_a_product_has_its_flops(hlo):
    report = hlo.cost(text_of(lambda a, b: jnp.tanh(a @ b), (M, K), (K, N)))
    assert report == (2 * M * K * N, 0, (), ())


def test_a_batched_product_counts_its_batch_once(hlo):
    text = text_of(lambda a, b: jnp.einsum("gmk,gkn->gmn", a, b), (5, M, K), (5, K, N))
    assert hlo.cost(text).flops == 2 * 5 * M * K * N


def test_a_scan_counts_as_often_as_it_runs(hlo):
    report = hlo.cost(text_of(layers, (M, K), (7, K, K)))
    assert (report.flops, report.unknown_loops) == (7 * 2 * M * K * K, ())


def test_nested_scans_multiply(hlo):
    def outer(x, weights):
        return jax.lax.scan(lambda y, _: (layers(y, weights), None), x, None, length=5)[0]

    assert hlo.cost(text_of(outer, (M, K), (3, K, K))).flops == 5 * 3 * 2 * M * K * K


def test_the_condition_tells_what_the_compiler_did_not_write_down(hlo):
    text = text_of(layers, (M, K), (7, K, K))
    hidden = text.replace("known_trip_count", "unknown")
    assert hidden != text
    assert hlo.cost(hidden) == hlo.cost(text)


def test_a_loop_of_unknown_length_is_named_and_counted_as_told(hlo):
    def decode(x, weights):
        return jax.lax.while_loop(lambda y: jnp.sum(y) < 9.0, lambda y: layers(y, weights), x)

    text = text_of(decode, (M, K), (3, K, K))
    once = hlo.cost(text)
    assert len(once.unknown_loops) == 1
    assert once.flops == 3 * 2 * M * K * K
    assert hlo.cost(text, unknown_trips=10).flops == 10 * once.flops
    assert hlo.cost(text, unknown_trips=0).flops == 0


def test_shapes_are_those_of_the_program(hlo):
    text = text_of(lambda a, b: jnp.sum(jnp.tanh(a @ b)), (M, K), (K, N))
    dims = [array.dims for array in hlo.shapes(text)]
    assert (M, N) in dims and (M, K) in dims
    assert (K, M) not in dims
    assert len(set(hlo.shapes(text))) == len(dims)


def test_what_a_fusion_makes_inside_is_not_in_memory(hlo):
    text = text_of(lambda a: jnp.sum(jnp.exp(a[:, None] * a[None])), (64,))
    assert (64, 64) in [array.dims for array in hlo.shapes(text)]
    assert (64, 64) not in [array.dims for array in hlo.shapes(text, fused=False)]


def test_collectives_count_bytes_and_groups_in_a_loop(hlo):
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)

    def body(x):
        def step(y, _):
            return jax.lax.psum(jnp.tanh(y), "tensor"), None

        return jax.lax.scan(step, x, None, length=3)[0]

    mapped = jax.shard_map(
        body, mesh=mesh, in_specs=P("data"), out_specs=P("data"), check_vma=False
    )
    report = hlo.cost(text_of(mapped, (2 * M, K)))
    (reduce,) = report.collectives
    assert (reduce.kind, reduce.times, reduce.bytes) == ("all-reduce", 3, 4 * M * K)
    assert reduce.groups == ((0, 1, 2, 3), (4, 5, 6, 7))
    assert hlo.bytes_by_kind(report.collectives) == {"all-reduce": (3, 3 * 4 * M * K)}


TPU = """\
HloModule decode, is_scheduled=true

%fused (a: bf16[32,2,4,128], b: bf16[32,2,7168,128]) -> f32[32,2,4,7168] {
  %a = bf16[32,2,4,128]{3,2,1,0:T(4,128)(2,1)} parameter(0)
  %b = bf16[32,2,7168,128]{3,2,1,0:T(8,128)(2,1)} parameter(1)
  ROOT %product = f32[32,2,4,7168]{3,2,1,0:T(4,128)} convolution(%a, %b), \
window={size=32x2 stride=31x1 lhs_dilate=32x2}, dim_labels=01bf_01oi->01bf, \
backend_config={"window_config":{"estimated_cycles":"999"}}
}

%body (state: (s32[], f32[256])) -> (s32[], f32[256]) {
  %state = (s32[]{:T(128)}, /*index=1*/f32[256]{0:T(256)}) parameter(0)
  %count = s32[]{:T(128)} get-tuple-element(%state), index=0
  %value = f32[256]{0:T(256)} get-tuple-element(%state), index=1
  %two = s32[]{:T(128)} constant(2)
  %next = s32[]{:T(128)} add(%count, %two)
  %a.1 = bf16[32,2,4,128]{3,2,1,0:T(4,128)(2,1)} constant({...})
  %b.1 = bf16[32,2,7168,128]{3,2,1,0:T(8,128)(2,1)} constant({...})
  %fusion = f32[32,2,4,7168]{3,2,1,0:T(4,128)} fusion(%a.1, %b.1), kind=kOutput, calls=%fused, \
backend_config={"window_config":{"estimated_cycles":"100"},"lists":[{"indices":["0","1"]}]}
  %kernel = f32[256]{0:T(256)} custom-call(%value), custom_call_target="tpu_custom_call", \
frontend_attributes={kernel_metadata={
  {}
}}
  %start = (f32[256]{0}, f32[1024]{0}, u32[]{:S(2)}) all-gather-start(%kernel), \
replica_groups=mesh['x'=2,'y'=2], device_ids=([2,2]T(1,0)) {'y'}, dimensions={0}
  %done = f32[1024]{0} all-gather-done(%start)
  %part = f32[256]{0} slice(%done), slice={[0:256]}
  %step = f32[1024]{0} all-gather(%part), replica_groups={{0,1},{2,3}}, dimensions={0}, \
backend_config={"async_collective_fusion_config":{"flag_start":"2","flag_end":"8"}}
  %moved = f32[256]{0} collective-permute(%part), source_target_pairs={{0,1},{1,0}}
  %sum = f32[256]{0} all-reduce(%moved), replica_groups=[2,2]<=[2,2]T(1,0), to_apply=%add
  ROOT %out = (s32[]{:T(128)}, f32[256]{0:T(256)}) tuple(%next, %sum)
}

%condition (state.1: (s32[], f32[256])) -> pred[] {
  %limit = s32[]{:T(128)} constant(12)
  %state.1 = (s32[]{:T(128)}, f32[256]{0:T(256)}) parameter(0)
  %count.1 = s32[]{:T(128)} get-tuple-element(%state.1), index=0
  ROOT %less = pred[]{:T(512)} compare(%count.1, %limit), direction=LT
}

ENTRY %main (x: f32[256]) -> f32[256] {
  %x = f32[256]{0:T(256)} parameter(0)
  %first = s32[]{:T(128)} constant(3)
  %begin = s32[]{:T(128)} copy(%first)
  %tuple = (s32[]{:T(128)}, f32[256]{0:T(256)}) tuple(%begin, %x)
  %while = (s32[]{:T(128)}, f32[256]{0:T(256)}) while(%tuple), condition=%condition, body=%body
  ROOT %result = f32[256]{0:T(256)} get-tuple-element(%while), index=1
}
"""


def test_the_text_of_a_tpu_is_read(hlo):
    report = hlo.cost(TPU)
    trips = 5  # 3, 5, 7, 9, 11
    assert report.unknown_loops == ()
    assert report.flops == trips * 2 * 32 * 2 * 4 * 7168 * 128
    assert report.cycles == trips * 100
    gather, permute, reduce = report.collectives
    assert (gather.times, gather.bytes, gather.groups) == (trips, 4096, ((0, 2), (1, 3)))
    assert gather.arrays == (("f32", (1024,)),)
    assert permute.groups == ((0, 1), (1, 0))
    assert reduce.groups == ((0, 2), (1, 3))


def test_text_without_an_entry_is_an_error(hlo):
    with pytest.raises(ValueError, match="ENTRY"):
        hlo.parse("module @jit_f {}")
