"""Metal kernels through torch.mps.compile_shader: results, barriers, SIMD groups, the calling convention, refusals."""

from __future__ import annotations

import pytest
import torch

from nanogpt_mac import simulator

simulator.install()

LIBRARY = torch.mps.compile_shader(r"""
#include <metal_stdlib>
#include <c10/metal/reduction_utils.h>
#include <c10/metal/atomic.h>
#include <c10/metal/error.h>
using namespace metal;

kernel void full(device float* out, constant float& value, uint i [[thread_position_in_grid]]) { out[i] = value; }

// Every lane reads its mirror image, across the whole threadgroup.
kernel void reverse(device int* out, device const int* in, uint i [[thread_position_in_grid]],
                    uint lane [[thread_position_in_threadgroup]], uint size [[threads_per_threadgroup]]) {
  threadgroup int shared[1024];
  shared[lane] = in[i];
  threadgroup_barrier(mem_flags::mem_threadgroup);
  out[i] = shared[size - 1 - lane];
}

kernel void scan(device int* out [[buffer(1)]], constant int* in [[buffer(0)]],
                 uint lane [[thread_position_in_threadgroup]], uint size [[threads_per_threadgroup]]) {
  threadgroup int shared[1024];
  shared[lane] = in[lane];
  for (uint by = 1; by < size; by *= 2) { // a barrier in a loop, twice a round
    threadgroup_barrier(mem_flags::mem_threadgroup);
    int other = lane >= by ? shared[lane - by] : 0;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    shared[lane] += other;
  }
  out[lane] = shared[lane];
}

kernel void simd(device float* out, constant float* in, uint i [[thread_position_in_grid]],
                 uint lane [[thread_index_in_simdgroup]], uint group [[simdgroup_index_in_threadgroup]]) {
  device float* o = out + i * 12;
  float v = in[i];
  o[0] = simd_sum(v); o[1] = simd_max(v); o[2] = simd_min(v); o[3] = simd_product(v);
  o[4] = simd_broadcast(v, 3); o[5] = simd_shuffle_xor(v, 1); o[6] = simd_shuffle_down(v, 2);
  o[7] = simd_shuffle_and_fill_down(v, -1.0f, 2); o[8] = simd_prefix_exclusive_sum(v);
  o[9] = float(ulong(simd_ballot(v > 16)) >> 16 & 0xff); o[10] = lane; o[11] = group;
}

kernel void row_sums(device float* out, device long* counts, device float* largest, constant float* in,
                     constant long& width, uint2 at [[thread_position_in_grid]],
                     uint2 in_group [[thread_position_in_threadgroup]], uint2 size [[threads_per_threadgroup]]) {
  threadgroup float sums[32];
  threadgroup long longs[32];
  threadgroup float maxima[32];
  float v = at.y < width ? in[at.x * width + at.y] : 0;
  float sum = c10::metal::threadgroup_sum(sums, v, in_group.y, size.y);
  long count = c10::metal::threadgroup_sum(longs, long(v > 0), in_group.y, size.y);
  float top = c10::metal::threadgroup_max(maxima, v, in_group.y, size.y);
  if (in_group.y == 0) { out[at.x] = sum; counts[at.x] = count; largest[at.x] = top; }
}

kernel void histogram(device atomic_uint* bins, constant long* in, uint i [[thread_position_in_grid]]) {
  atomic_fetch_add_explicit(&bins[in[i]], 1, memory_order_relaxed);
}

kernel void scatter_add(device c10::metal::AtomicType_t<float>* out, constant long* at, constant float* in,
                        uint i [[thread_position_in_grid]]) {
  c10::metal::AtomicType<float>::atomic_add(out, at[i], in[i]);
}

kernel void positions(device uint* out, uint3 at [[thread_position_in_grid]], uint3 grid [[threads_per_grid]],
                      uint3 group [[threadgroup_position_in_grid]], uint3 size [[threads_per_threadgroup]],
                      uint index [[thread_index_in_threadgroup]]) {
  device uint* o = out + 5 * (at.x + grid.x * (at.y + grid.y * at.z));
  o[0] = group.x; o[1] = group.y; o[2] = size.x; o[3] = index; o[4] = at.y;
}

template <typename T>
kernel void twice(device T* out, constant T* in, uint i [[thread_position_in_grid]]) { out[i] = in[i] + in[i]; }
template [[host_name("twice_half")]] kernel void twice<half>(device half*, constant half*, uint);
template [[host_name("twice_bfloat")]] kernel void twice<bfloat>(device bfloat* out, constant bfloat* in, uint i);

kernel void types(device char* a, constant char& b, device uchar* c, constant half* d, constant int* e) {
  a[0] = b; c[0] = uchar(float(d[0]) * 2); c[1] = e[0] + e[1];
}

kernel void diverging(device float* out, uint i [[thread_position_in_grid]]) {
  if (i % 2) out[i] = simd_sum(1.0f);
  else out[i] = simd_max(2.0f);
}

[[max_total_threads_per_threadgroup(64)]]
kernel void checked(device float* out, constant long* at, device c10::metal::ErrorMessages* errors,
                    uint i [[thread_position_in_grid]]) {
  if (at[i] >= 4) { TORCH_REPORT_ERROR(errors, "Index ", at[i], " out of range [0, ", 4, ")"); return; }
  out[i] = at[i];
}
""")


def arange(n: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.arange(n, dtype=dtype, device="mps")


def test_a_plain_kernel_and_its_record() -> None:
    out = torch.zeros(3, 5, device="mps")
    simulator.clear_launches()
    LIBRARY.full(out, 2.5)
    assert out.tolist() == [[2.5] * 5] * 3
    LIBRARY.full(out[1:], -1.0, threads=[7], group_size=[4])  # an offset into the storage; an uneven last group
    assert out.flatten().tolist() == [2.5] * 5 + [-1.0] * 7 + [2.5] * 3
    first, second = simulator.launches()
    library = first.library
    assert first == simulator.Launch("full", library, (15, 1, 1), (15, 1, 1), ((3, 5),), ("float32",), 60)
    assert second == simulator.Launch("full", library, (7, 1, 1), (4, 1, 1), ((2, 5),), ("float32",), 40)
    assert simulator.launch_counts() == {(library, "full"): 2}
    simulator.clear_launches()
    torch.mps.compile_shader("kernel void idle(device float* out) { out[0] = 1; }")
    assert [(name, n) for (_, name), n in simulator.launch_counts().items()] == [("idle", 0)]


@pytest.mark.parametrize("size", [1, 31, 32, 33, 100, 1024])
def test_barriers(size: int) -> None:
    x = arange(3 * size, torch.int32)
    out = torch.empty_like(x)
    LIBRARY.reverse(out, x, threads=3 * size, group_size=size)
    assert torch.equal(out.view(3, size), x.view(3, size).flip(1))
    LIBRARY.scan(x, out, threads=size, group_size=size)
    assert torch.equal(out[:size], x[:size].cumsum(0).int())


def test_simd_groups() -> None:
    """80 lanes: two full SIMD groups and one of 16."""
    x = arange(80) + 1
    out = torch.empty(80, 12, device="mps")
    LIBRARY.simd(out, x, threads=80, group_size=80)
    for group, values in enumerate(x.cpu().split(32)):
        o = out[32 * group : 32 * group + len(values)].cpu()
        assert torch.equal(o[:, 0], values.sum().expand(len(values)))
        assert o[0, 1:3].tolist() == [values.max(), values.min()]
        torch.testing.assert_close(o[0, 3], values.prod())
        assert o[:, 4].unique().tolist() == [values[3]]
        assert torch.equal(o[:, 5], values.view(-1, 2).flip(1).flatten())
        assert torch.equal(o[:-2, 6], values[2:])
        assert torch.equal(o[:-2, 7], values[2:])
        assert o[-2:, 7].tolist() == ([-1, -1] if len(values) == 32 else [0, 0])  # beyond 32; an inactive lane
        assert torch.equal(o[:, 8], values.cumsum(0) - values)
        assert o[0, 9] == (0xFF if len(values) == 32 else 0)
        assert o[:, 10].tolist() == list(range(len(values)))
        assert o[:, 11].unique().tolist() == [group]
    assert out[:, 6][30:32].isnan().all()  # a lane beyond the SIMD group: garbage on a Mac, never a plausible value


@pytest.mark.parametrize(("rows", "width"), [(5, 7), (3, 64), (2, 1000)])
def test_the_wheels_reductions(rows: int, width: int) -> None:
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(0)).to("mps")
    sums, largest = torch.empty(rows, device="mps"), torch.empty(rows, device="mps")
    counts = torch.empty(rows, dtype=torch.long, device="mps")
    LIBRARY.row_sums(sums, counts, largest, x, width, threads=[rows, width], group_size=[1, width])
    torch.testing.assert_close(sums, x.sum(1), rtol=1e-5, atol=1e-4)
    assert torch.equal(largest, x.amax(1))
    assert torch.equal(counts, (x > 0).sum(1))


def test_atomics() -> None:
    at = torch.randint(7, (5000,), generator=torch.Generator().manual_seed(0)).to("mps")
    bins = torch.zeros(7, dtype=torch.int32, device="mps")
    LIBRARY.histogram(bins, at, threads=5000)
    assert torch.equal(bins.long(), at.bincount(minlength=7))
    out = torch.zeros(7, device="mps")
    LIBRARY.scatter_add(out, at, torch.ones(5000, device="mps"), threads=5000)
    assert torch.equal(out, bins.float())


def test_positions_in_an_uneven_grid() -> None:
    out = torch.zeros(3, 5, 5, dtype=torch.int32, device="mps")  # y, x, values
    LIBRARY.positions(out, threads=[5, 3, 1], group_size=[4, 2, 1])
    expected = [
        [[x // 4, y // 2, 4 if x < 4 else 1, x % 4 + (y % 2) * (4 if x < 4 else 1), y] for x in range(5)]
        for y in range(3)
    ]
    assert out.tolist() == expected


def test_templates_with_host_names() -> None:
    assert {"twice_half", "twice_bfloat", "full"} <= set(dir(LIBRARY))
    assert "twice" not in dir(LIBRARY)
    for name, dtype in (("twice_half", torch.float16), ("twice_bfloat", torch.bfloat16)):
        x = torch.tensor([0.1, 1.5, 3.0], dtype=dtype, device="mps")
        out = torch.empty_like(x)
        getattr(LIBRARY, name)(out, x)
        assert torch.equal(out, x + x)


def test_argument_types() -> None:
    a, c = torch.zeros(1, dtype=torch.int8, device="mps"), torch.zeros(2, dtype=torch.uint8, device="mps")
    LIBRARY.types(a, -5, c, [1.5, 2.5], [20, 30], threads=1, arg_casts={1: "int8", 3: "fp16", 4: "int32"})
    assert a.tolist() == [-5]
    assert c.tolist() == [3, 50]


def test_errors_reported_by_a_kernel() -> None:
    at = torch.tensor([1, 2, 9], device="mps")
    with pytest.raises(RuntimeError, match=r"Index 9 out of range \[0, 4\)"):
        LIBRARY.checked(torch.empty(3, device="mps"), at, threads=3, error_buf_idx=2)
    LIBRARY.checked(torch.empty(2, device="mps"), at[:2], threads=2, error_buf_idx=2)


def test_divergence_is_an_error_that_names_the_kernel() -> None:
    with pytest.raises(RuntimeError, match="Metal kernel diverging: lanes of a SIMD group meet different SIMD"):
        LIBRARY.diverging(torch.empty(32, device="mps"))
    LIBRARY.full(torch.empty(4, device="mps"), 1.0)  # and the next kernel runs


def test_limits_and_wrong_calls() -> None:
    assert LIBRARY.full.max_threads_per_threadgroup == 1024
    assert LIBRARY.checked.max_threads_per_threadgroup == 64
    assert LIBRARY.full.thread_execution_width == 32
    x = torch.empty(2048, device="mps")
    with pytest.raises(ValueError, match="Threadgroup size exceeds 1024 limit"):
        LIBRARY.full(x, 1.0, group_size=2048, threads=2048)
    with pytest.raises(RuntimeError, match="Number of threads is undefined"):
        LIBRARY.full(1.0)
    with pytest.raises(ValueError, match="kernel full: no argument for buffer 1"):
        LIBRARY.full(x)
    with pytest.raises(AttributeError, match="no_such_kernel"):
        LIBRARY.no_such_kernel  # noqa: B018
    with pytest.raises(RuntimeError, match="Placeholder storage has not been allocated on MPS device"):
        LIBRARY.full(torch.empty(3), 1.0)


@pytest.mark.parametrize(
    ("body", "error"),
    [
        ("out[i] = no_such_function(1.0);", "no_such_function"),
        ("out[i] = quad_sum(1.0f);", "quad_sum"),  # Metal has it, the shim does not
        ("out[i] = 1", "expected"),
    ],
)
def test_what_cannot_be_compiled_is_an_error_that_names_the_kernel(body: str, error: str) -> None:
    source = f"""#include <metal_stdlib>
kernel void good(device float* out, uint i [[thread_position_in_grid]]) {{ out[i] = 1; }}
kernel void broken(device float* out, uint i [[thread_position_in_grid]]) {{
  {body}
}}"""
    with pytest.raises(SyntaxError, match=f"cannot compile the Metal kernel broken: .*{error}"):
        torch.mps.compile_shader(source)


def test_unknown_parameters_are_refused() -> None:
    source = "kernel void odd(device float* out, uint i [[amplification_id]]) { out[i] = 1; }"
    with pytest.raises(SyntaxError, match=r"kernel odd: parameter 'uint i \[\[amplification_id\]\]'"):
        torch.mps.compile_shader(source)


def test_what_torch_has_no_values_for_is_refused() -> None:
    source = "constant bool FAST [[function_constant(0)]];\nkernel void k(device float* out) { out[0] = FAST; }"
    with pytest.raises(SyntaxError, match="function constants without values: FAST"):
        torch.mps.compile_shader(source)
    shared = torch.mps.compile_shader("kernel void k(device float* o, threadgroup float* s [[threadgroup(0)]]) {}")
    with pytest.raises(ValueError, match="kernel k: torch cannot say how large its threadgroup arguments are"):
        shared.k(torch.empty(1, device="mps"))


def test_launches_take_planned_time() -> None:
    x = torch.empty(250_000, device="mps")
    simulator.reset_counts()
    with simulator.plan(us_per_megabyte=5000):
        LIBRARY.full(x, 1.0)
    assert simulator.counts().device_ms == pytest.approx(5)
    assert simulator.counts().kernels == 1
