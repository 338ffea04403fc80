"""The simulated Metal objects: what a Mac refuses is refused, nothing runs early, and what the shim has since then."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest

from nanogpt_mac.simulator import pyobjc_metal as Metal
from nanogpt_mac.simulator.pyobjc_metal import MetalError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the shim needs Linux and g++")

HEAD = "#include <metal_stdlib>\nusing namespace metal;\n"
ADD = """
kernel void add(device float* out [[buffer(0)]], constant float& v [[buffer(1)]], uint i [[thread_position_in_grid]]) {
  out[i] += v;
}
"""
LIMITED = "[[max_total_threads_per_threadgroup(64)]] kernel void few(device float* out [[buffer(0)]]) { out[0] = 1; }\n"


class Program:
    """A device, a queue of `depth`, and the kernels of `source` as pipelines."""

    def __init__(self, source: str, depth: int = 64) -> None:
        self.device = Metal.MTLCreateSystemDefaultDevice()
        self.queue = self.device.newCommandQueueWithMaxCommandBufferCount_(depth)
        self.library, error = self.device.newLibraryWithSource_options_error_(HEAD + source, None, None)
        assert self.library is not None, error
        Metal.counts()

    def pipeline(self, name: str) -> Any:
        function = self.library.newFunctionWithName_(name)
        return self.device.newComputePipelineStateWithFunction_error_(function, None)[0]

    def array(self, values: np.ndarray) -> tuple[Any, np.ndarray]:
        """A buffer, and its contents as the host sees them."""
        made = self.device.newBufferWithBytes_length_options_(values.tobytes(), values.nbytes, 0)
        return made, np.frombuffer(made.contents().as_buffer(values.nbytes), values.dtype).reshape(values.shape)

    def encoded(self, name: str, buffers: list[Any], grid: Any, group: Any, *values: Any, shared: Any = ()) -> Any:
        """A command buffer with one launch, not yet committed."""
        command = self.queue.commandBuffer()
        encoder = command.computeCommandEncoder()
        encoder.setComputePipelineState_(self.pipeline(name))
        for index, buffer in enumerate(buffers):
            encoder.setBuffer_offset_atIndex_(buffer, 0, index)
        for index, value in enumerate(values, len(buffers)):
            encoder.setBytes_length_atIndex_(value.tobytes(), value.nbytes, index)
        for index, length in enumerate(shared):
            encoder.setThreadgroupMemoryLength_atIndex_(length, index)
        encoder.dispatchThreads_threadsPerThreadgroup_(grid, group)
        encoder.endEncoding()
        return command

    def run(self, *given: Any, **named: Any) -> None:
        command = self.encoded(*given, **named)
        command.commit()
        command.waitUntilCompleted()


def test_nothing_runs_before_it_is_waited_for() -> None:
    program = Program(ADD)
    buffer, seen = program.array(np.zeros(5, np.float32))
    commands = [program.encoded("add", [buffer], (5, 1, 1), (5, 1, 1), np.float32(i)) for i in (1, 2)]
    for command in commands:
        command.commit()
    assert seen.tolist() == [0] * 5
    assert [command.status() for command in commands] == [2, 2]
    commands[0].waitUntilCompleted()
    assert seen.tolist() == [1] * 5
    commands[1].waitUntilCompleted()
    assert seen.tolist() == [3] * 5
    assert [command.status() for command in commands] == [4, 4]
    assert Metal.counts() == {"launches": 2, "buffers": 2, "waits": 2}
    assert Metal.counts() == {"launches": 0, "buffers": 0, "waits": 0}


@pytest.mark.parametrize("index", ["i + 5", "int(i) - 5"])
def test_a_write_beyond_a_buffer_is_found_and_a_read_is_not_a_number(index: str) -> None:
    program = Program(ADD.replace("[i]", f"[{index}]"))
    buffer, seen = program.array(np.zeros(5, np.float32))
    with pytest.raises(MetalError, match="kernel add: it writes beyond the ends of the buffer at index 0"):
        program.run("add", [buffer], (5, 1, 1), (5, 1, 1), np.float32(1))
    program = Program(ADD.replace("[i] +=", f"[i] += out[{index}] +"))
    buffer, seen = program.array(np.zeros(5, np.float32))
    program.run("add", [buffer], (5, 1, 1), (5, 1, 1), np.float32(1))
    assert np.isnan(seen).all()


@pytest.mark.parametrize("depth", [1, 3, 64])
def test_a_full_queue_runs_its_oldest(depth: int) -> None:
    program = Program(ADD, depth)
    buffer, seen = program.array(np.zeros(1, np.float32))
    for i in range(depth + 2):
        program.encoded("add", [buffer], (1, 1, 1), (1, 1, 1), np.float32(1)).commit()
        assert seen[0] == max(0, i + 1 - depth)
    for _ in range(depth):
        program.queue.commandBuffer()
    with pytest.raises(MetalError, match="never committed: it would wait for ever"):
        program.queue.commandBuffer()


def test_what_a_mac_would_end_the_process_for() -> None:
    program = Program(ADD + LIMITED)
    buffer, _ = program.array(np.zeros(2000, np.float32))
    one, value = (1, 1, 1), np.float32(1)
    command = program.encoded("add", [buffer], one, one, value)
    with pytest.raises(MetalError, match="never committed"):
        command.waitUntilCompleted()
    command.commit()
    with pytest.raises(MetalError, match="committed twice"):
        command.commit()
    with pytest.raises(MetalError, match="nothing more can be encoded"):
        command.computeCommandEncoder()

    command = program.queue.commandBuffer()
    encoder = command.computeCommandEncoder()
    with pytest.raises(MetalError, match="endEncoding is missing"):
        command.commit()
    with pytest.raises(MetalError, match="endEncoding is missing"):
        command.computeCommandEncoder()
    with pytest.raises(MetalError, match="without a pipeline"):
        encoder.dispatchThreads_threadsPerThreadgroup_(one, one)
    encoder.setComputePipelineState_(program.pipeline("add"))
    with pytest.raises(MetalError, match="no buffer at index 0"):
        encoder.dispatchThreads_threadsPerThreadgroup_(one, one)
    with pytest.raises(MetalError, match="buffer index 31: at most 30"):
        encoder.setBuffer_offset_atIndex_(buffer, 0, 31)
    with pytest.raises(MetalError, match="offset 8000 lies beyond"):
        encoder.setBuffer_offset_atIndex_(buffer, 8000, 0)
    with pytest.raises(MetalError, match="setBytes of 4097: at most 4096"):
        encoder.setBytes_length_atIndex_(bytes(4097), 4097, 1)
    encoder.setBytes_length_atIndex_(bytes(4096), 4096, 1)
    encoder.setBuffer_offset_atIndex_(buffer, 0, 0)
    with pytest.raises(MetalError, match=r"a threadgroup of \(1025, 1, 1\); at most 1024"):
        encoder.dispatchThreads_threadsPerThreadgroup_((2000, 1, 1), (1025, 1, 1))
    with pytest.raises(MetalError, match=r"a grid of \(0, 1, 1\)"):
        encoder.dispatchThreads_threadsPerThreadgroup_((0, 1, 1), one)
    encoder.setComputePipelineState_(program.pipeline("few"))
    with pytest.raises(MetalError, match=r"kernel few: .*at most 64"):
        encoder.dispatchThreads_threadsPerThreadgroup_((65, 1, 1), (65, 1, 1))
    with pytest.raises(MetalError, match="24 bytes of threadgroup memory: multiples of 16"):
        encoder.setThreadgroupMemoryLength_atIndex_(24, 0)
    encoder.endEncoding()
    for late in (encoder.endEncoding, lambda: encoder.setComputePipelineState_(program.pipeline("add"))):
        with pytest.raises(MetalError, match="the encoder has ended"):
            late()
    with pytest.raises(MetalError, match="a buffer of no bytes"):
        program.device.newBufferWithLength_options_(0, 0)


def test_source_that_does_not_compile_is_the_second_result() -> None:
    library, error = Program(ADD).device.newLibraryWithSource_options_error_("kernel void broken() { x; }", None, None)
    assert library is None
    assert "broken" in error
    assert Program(ADD).library.newFunctionWithName_("absent") is None


SHARED = """
kernel void mirror(device int* out [[buffer(0)]], threadgroup int* first [[threadgroup(0)]],
                   threadgroup float2* second [[threadgroup(1)]], uint i [[thread_position_in_grid]],
                   uint at [[thread_position_in_threadgroup]], uint size [[threads_per_threadgroup]]) {
  first[at] = out[i];
  second[at] = float2(out[i], at);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  out[i] = 1000 * first[size - 1 - at] + int(second[size - 1 - at].y);
}
"""


def test_threadgroup_memory_that_the_host_sizes() -> None:
    program = Program(SHARED)
    buffer, seen = program.array(np.arange(40, dtype=np.int32))
    program.run("mirror", [buffer], (40, 1, 1), (20, 1, 1), shared=(80, 160))
    mirrored = np.arange(40).reshape(2, 20)[:, ::-1]
    np.testing.assert_array_equal(seen, (1000 * mirrored + mirrored % 20).ravel())
    with pytest.raises(MetalError, match="no threadgroup memory at index 1"):
        program.run("mirror", [buffer], (40, 1, 1), (20, 1, 1), shared=(80,))


CONSTANTS = """
constant bool NEGATIVE [[function_constant(0)]];
constant float FACTOR [[function_constant(1)]];
constant int TIMES = is_function_constant_defined(FACTOR) ? 2 : 1;
kernel void scaled(device float* out [[buffer(0)]], uint i [[thread_position_in_grid]]) {
  for (int t = 0; t < TIMES; t++) out[i] = NEGATIVE ? -out[i] * 3 : out[i] * 3;
}
"""


def test_function_constants() -> None:
    program = Program(CONSTANTS)
    with pytest.raises(MetalError, match="function scaled: its library has function constants"):
        program.library.newFunctionWithName_("scaled")
    for negative, factor, expected in ((True, None, -3), (False, None, 3), (True, 2.5, 9)):
        values = Metal.MTLFunctionConstantValues.alloc().init()
        values.setConstantValue_type_atIndex_(np.bool_(negative).tobytes(), Metal.MTLDataTypeBool, 0)
        if factor is not None:
            values.setConstantValue_type_atIndex_(np.float32(factor).tobytes(), Metal.MTLDataTypeFloat, 1)
        function, error = program.library.newFunctionWithName_constantValues_error_("scaled", values, None)
        assert function is not None, error
        pipeline, _ = program.device.newComputePipelineStateWithFunction_error_(function, None)
        program.pipeline = lambda name, pipeline=pipeline: pipeline  # type: ignore[method-assign,misc]
        buffer, seen = program.array(np.array([1, 2], np.float32))
        program.run("scaled", [buffer], (2, 1, 1), (2, 1, 1))
        assert seen.tolist() == [expected, 2 * expected]
    values = Metal.MTLFunctionConstantValues.alloc().init()
    function, error = program.library.newFunctionWithName_constantValues_error_("scaled", values, None)
    assert function is None
    assert "NEGATIVE" in error  # which the kernel uses, and has no value


MACROS = """
#define SCALE 2
#ifdef SCALE
#define UNARY(NAME, EXPRESSION)                                                                \\
  kernel void NAME##_all(device float* out [[buffer(0)]], uint i [[thread_position_in_grid]]) { \\
    const float x = out[i];                                                                    \\
    out[i] = EXPRESSION;                                                                       \\
  }
#endif
UNARY(twice, x * SCALE)
UNARY(root, sqrt(x))
kernel void plain(device float* out [[buffer(0)]], uint i [[thread_position_in_grid]]) { out[i] = SCALE; }
"""


def test_kernels_that_macros_make() -> None:
    program = Program(MACROS)
    buffer, seen = program.array(np.array([1, 4, 9], np.float32))
    for name, expected in (("twice_all", [2, 8, 18]), ("root_all", np.sqrt([2, 8, 18])), ("plain", [2, 2, 2])):
        program.run(name, [buffer], (3, 1, 1), (3, 1, 1))
        np.testing.assert_allclose(seen, expected, rtol=1e-6)


def test_a_macros_kernel_that_does_not_compile_is_named_and_hidden_conditions_are_refused() -> None:
    device = Program(ADD).device
    source = HEAD + MACROS.replace("SCALE)\nUNARY", "NO_SUCH_THING)\nUNARY")
    _, error = device.newLibraryWithSource_options_error_(source, None, None)
    assert "Metal kernel twice_all" in error
    assert "NO_SUCH_THING" in error
    source = (
        HEAD + "#if defined(FROM_A_HEADER)\n#define K(N) kernel void N(device float* o) { o[0] = 1; }\n#endif\nK(a)"
    )
    _, error = device.newLibraryWithSource_options_error_(source, None, None)
    assert "under a condition on FROM_A_HEADER" in error


MATRICES = """
#include <metal_simdgroup_matrix>
kernel void product(device const float* a [[buffer(0)]], device const float* b [[buffer(1)]],
                    device float* c [[buffer(2)]], device half* h [[buffer(3)]],
                    uint lane [[thread_index_in_simdgroup]]) {
  simdgroup_float8x8 left, right, sum = make_filled_simdgroup_matrix<float, 8, 8>(0.5f);
  for (uint k = 0; k < 16; k += 8) {
    simdgroup_load(left, a, 16, ulong2(k, 8));              // rows 8 to 15, columns k to k + 7
    simdgroup_load(right, b + k, 16, ulong2(0, 0), true);   // b lies transposed
    simdgroup_multiply_accumulate(sum, left, right, sum);
  }
  simdgroup_store(sum, c, 8);
  simdgroup_half8x8 x, y(half(2)), z;                       // y: 2 on its diagonal
  simdgroup_load(x, h);
  simdgroup_multiply(z, x, y);
  simdgroup_store(z, h, 8, ulong2(0, 0), true);
  c[64 + 2 * lane] = sum.thread_elements()[0];
  c[65 + 2 * lane] = sum.thread_elements()[1];
}
"""


def test_matrices_of_a_simd_group() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((16, 16), np.float32), rng.standard_normal((8, 16), np.float32)
    h = np.arange(64, dtype=np.float16).reshape(8, 8)
    program = Program(MATRICES)
    (left, _), (right, _), (out, c), (halves, x) = map(program.array, (a, b, np.zeros(128, np.float32), h))
    program.run("product", [left, right, out, halves], (32, 1, 1), (32, 1, 1))
    expected = a[8:].astype(np.float64) @ b.T + 0.5
    np.testing.assert_allclose(c[:64].reshape(8, 8), expected, atol=1e-5)
    np.testing.assert_array_equal(x, 2 * h.T)
    for lane, pair in enumerate(c[64:].reshape(32, 2)):  # where metal-flash-attention and MLX say that a lane's are
        quad = lane // 4
        row, column = (quad & 4) + lane // 2 % 4, (quad & 2) * 2 + lane % 2 * 2
        np.testing.assert_allclose(pair, expected[row, column : column + 2], atol=1e-5)


def test_matrices_need_a_whole_simd_group() -> None:
    program = Program(MATRICES)
    buffers = [program.array(np.zeros(256, np.float32))[0] for _ in range(4)]
    with pytest.raises(RuntimeError, match="Metal kernel product: an operation on SIMD-group matrices without all 32"):
        program.run("product", buffers, (16, 1, 1), (16, 1, 1))
