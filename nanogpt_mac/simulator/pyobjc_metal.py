"""Metal's objects as PyObjC gives them, over the shim: a whole Metal program in Python runs on a CPU, and is counted.

As strict as a Mac where a Mac is: no command buffer runs before somebody waits for it, or before the queue is full and
asks for one more; an encoder that is not ended, a second commit, a dispatch without a pipeline and all limits are
errors (MetalError), which a Mac would report by ending the process. It is stricter in two things: a library whose
source has function constants gives no function without values for them, and a kernel that writes beyond a buffer's ends
is an error, where a Mac may write into whatever lies there. Neither torch nor MLX is needed.
"""

from __future__ import annotations

import ctypes
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from nanogpt_mac.simulator.metal import compiled, run
from nanogpt_mac.simulator.metal_source import FUNCTION_CONSTANT, Kernel, UnsupportedKernelError

MTLResourceStorageModeShared = 0
MTLCommandBufferStatusCompleted = 4
GUARD = b"\xa5\xa5\xa5\x7f" * 1024  # a signalling NaN, which any arithmetic changes
MTLDataTypeFloat, MTLDataTypeInt, MTLDataTypeUInt, MTLDataTypeBool = 3, 29, 33, 53


def MTLSize(width: int, height: int, depth: int) -> tuple[int, int, int]:
    return width, height, depth


MOST_BYTES = 4096  # of setBytes
MOST_SHARED = 32 * 1024  # bytes of threadgroup memory
MOST_INDEX = 30  # of a buffer
DEPTH = 64  # command buffers of a queue that are not completed, unless it is asked for another number

_NUMPY = {MTLDataTypeFloat: np.float32, MTLDataTypeInt: np.int32, MTLDataTypeUInt: np.uint32, MTLDataTypeBool: np.bool_}
_counts: Counter[str] = Counter()


class MetalError(Exception):
    """What ends the process on a Mac, or hangs it."""


def counts() -> dict[str, int]:
    """Launches, command buffers that were committed, and waits since the last call; then they begin anew."""
    found = {name: _counts[name] for name in ("launches", "buffers", "waits")}
    _counts.clear()
    return found


@contextmanager
def autorelease_pool() -> Iterator[None]:
    """`objc.autorelease_pool`: Python's own objects need none."""
    yield


def MTLCreateSystemDefaultDevice() -> Device:
    return Device()


class Buffer:
    """Before and behind its bytes lies a GUARD: whoever reads there gets NaN, whoever writes there is found."""

    def __init__(self, length: int) -> None:
        if length < 1:
            raise MetalError("a buffer of no bytes")
        self.around = np.zeros(length + 2 * len(GUARD), np.uint8)
        self.around[: len(GUARD)] = self.around[-len(GUARD) :] = np.frombuffer(GUARD, np.uint8)
        self.bytes = self.around[len(GUARD) : -len(GUARD)]

    def whole(self) -> bool:
        return self.around[: len(GUARD)].tobytes() == self.around[-len(GUARD) :].tobytes() == GUARD

    def length(self) -> int:
        return self.bytes.nbytes

    def contents(self) -> Buffer:
        return self

    def as_buffer(self, length: int) -> memoryview:
        return self.bytes.data[:length]


class CompileOptions:
    def setFastMathEnabled_(self, _on: bool) -> None:
        """The shim has no fast math."""


class FunctionConstantValues:
    def __init__(self) -> None:
        self.values: dict[int, Any] = {}

    def setConstantValue_type_atIndex_(self, value: Any, kind: int, index: int) -> None:
        self.values[index] = np.frombuffer(bytes(value), _NUMPY[kind])[0].item()


class _New:
    """`Class.alloc().init()`."""

    def __init__(self, made: Callable[[], Any]) -> None:
        self.made = made

    def alloc(self) -> _New:
        return self

    def init(self) -> Any:
        return self.made()


MTLCompileOptions = _New(CompileOptions)
MTLFunctionConstantValues = _New(FunctionConstantValues)


class Function:
    def __init__(self, kernel: Kernel, library: ctypes.CDLL | None) -> None:
        self.kernel, self.library = kernel, library


class Library:
    def __init__(self, source: str) -> None:
        self.source = source
        self.open = bool(FUNCTION_CONSTANT.search(source))  # it wants values, and is compiled when it gets them
        self.kernels: dict[str, Kernel] = {}
        self.library: ctypes.CDLL | None = None
        if not self.open:
            self.kernels, self.library = compiled(source)

    def newFunctionWithName_(self, name: str) -> Function | None:
        if self.open:
            raise MetalError(f"function {name}: its library has function constants, and no values were given")
        return Function(self.kernels[name], self.library) if name in self.kernels else None

    def newFunctionWithName_constantValues_error_(
        self, name: str, values: FunctionConstantValues, _error: None
    ) -> tuple[Function | None, Any]:
        try:
            kernels, library = compiled(self.source, values.values)
        except (SyntaxError, UnsupportedKernelError) as error:
            return None, str(error)
        return (Function(kernels[name], library), None) if name in kernels else (None, f"there is no {name}")


class Pipeline:
    def __init__(self, function: Function) -> None:
        self.kernel, self.function = function.kernel, getattr(function.library, function.kernel.symbol)

    def maxTotalThreadsPerThreadgroup(self) -> int:
        return self.kernel.max_threads

    def threadExecutionWidth(self) -> int:
        return 32


Given = Mapping[int, tuple[Buffer, int]]


class Launch:
    """One dispatch, with what it was given."""

    def __init__(
        self, pipeline: Pipeline, given: Given, shared: Mapping[int, int], grid: Sequence[int], group: Sequence[int]
    ) -> None:
        self.pipeline, self.given, self.shared = pipeline, dict(given), dict(shared)
        self.grid, self.group = tuple(grid), tuple(group)

    def run(self) -> None:
        kernel = self.pipeline.kernel
        pieces = [np.zeros(self.shared[i], np.uint8) for i in range(kernel.shared)]
        addresses = [buffer.bytes.ctypes.data + offset for buffer, offset in map(self.given.get, range(kernel.buffers))]  # type: ignore[misc]
        run(kernel, self.pipeline.function, [*addresses, *(p.ctypes.data for p in pieces)], self.grid, self.group)
        for index in range(kernel.buffers):
            if not self.given[index][0].whole():
                raise MetalError(f"kernel {kernel.name}: it writes beyond the ends of the buffer at index {index}")


class Encoder:
    def __init__(self, buffer: CommandBuffer) -> None:
        self.buffer, self.ended = buffer, False
        self.pipeline: Pipeline | None = None
        self.given: dict[int, tuple[Buffer, int]] = {}
        self.shared: dict[int, int] = {}

    def _live(self) -> None:
        if self.ended:
            raise MetalError("the encoder has ended")

    def setComputePipelineState_(self, pipeline: Pipeline) -> None:
        self._live()
        self.pipeline = pipeline

    def setBuffer_offset_atIndex_(self, buffer: Buffer, offset: int, index: int) -> None:
        self._live()
        if not 0 <= index <= MOST_INDEX:
            raise MetalError(f"buffer index {index}: at most {MOST_INDEX}")
        if not 0 <= offset < buffer.length():
            raise MetalError(f"offset {offset} lies beyond a buffer of {buffer.length()} bytes")
        self.given[index] = (buffer, offset)

    def setBytes_length_atIndex_(self, values: Any, length: int, index: int) -> None:
        if not 0 < length <= MOST_BYTES:
            raise MetalError(f"setBytes of {length}: at most {MOST_BYTES}")
        copy = Buffer(length)
        copy.bytes[:] = np.frombuffer(bytes(values), np.uint8, length)
        self.setBuffer_offset_atIndex_(copy, 0, index)

    def setThreadgroupMemoryLength_atIndex_(self, length: int, index: int) -> None:
        self._live()
        if length % 16 or not 0 < length <= MOST_SHARED:
            raise MetalError(f"{length} bytes of threadgroup memory: multiples of 16, at most {MOST_SHARED}")
        self.shared[index] = length

    def dispatchThreads_threadsPerThreadgroup_(self, grid: Sequence[int], group: Sequence[int]) -> None:
        self._live()
        if self.pipeline is None:
            raise MetalError("a dispatch without a pipeline")
        kernel = self.pipeline.kernel
        if min(*grid, *group) < 1:
            raise MetalError(f"kernel {kernel.name}: a grid of {tuple(grid)} in groups of {tuple(group)}")
        if int(np.prod(group)) > kernel.max_threads:
            raise MetalError(
                f"kernel {kernel.name}: a threadgroup of {tuple(group)}; at most {kernel.max_threads} threads"
            )
        for what, count, given in (
            ("buffer", kernel.buffers, self.given),
            ("threadgroup memory", kernel.shared, self.shared),
        ):
            if absent := [index for index in range(count) if index not in given]:
                raise MetalError(f"kernel {kernel.name}: no {what} at index {absent[0]}")
        self.buffer.launches.append(Launch(self.pipeline, self.given, self.shared, grid, group))

    def dispatchThreadgroups_threadsPerThreadgroup_(self, groups: Sequence[int], group: Sequence[int]) -> None:
        grid = [a * b for a, b in zip(groups, group, strict=True)]
        self.dispatchThreads_threadsPerThreadgroup_(grid, group)

    def endEncoding(self) -> None:
        self._live()
        self.ended, self.buffer.open = True, None


class CommandBuffer:
    """`status` is Apple's: 0 not enqueued, 2 committed, 4 completed."""

    def __init__(self, queue: Queue) -> None:
        self.queue, self.state, self.launches = queue, 0, list[Launch]()
        self.open: Encoder | None = None
        self.span = (0.0, 0.0)  # of a clock, in seconds

    def computeCommandEncoder(self) -> Encoder:
        if self.open is not None:
            raise MetalError("the encoder before was not ended: endEncoding is missing")
        if self.state:
            raise MetalError("it is committed, nothing more can be encoded")
        self.open = Encoder(self)
        return self.open

    def commit(self) -> None:
        if self.state:
            raise MetalError("a command buffer is committed twice")
        if self.open is not None:
            raise MetalError("commit with an open encoder: endEncoding is missing")
        self.state = 2
        _counts["buffers"] += 1

    def waitUntilCompleted(self) -> None:
        if not self.state:
            raise MetalError("waiting for a command buffer that was never committed: it would wait for ever")
        _counts["waits"] += 1
        while self.state != MTLCommandBufferStatusCompleted:
            self.queue.complete()

    def status(self) -> int:
        return self.state

    def error(self) -> None:
        return None

    def GPUStartTime(self) -> float:
        return self.span[0]

    def GPUEndTime(self) -> float:
        return self.span[1]


class Queue:
    def __init__(self, depth: int = DEPTH) -> None:
        if depth < 1:
            raise MetalError(f"a queue of {depth} command buffers")
        self.depth, self.flying = depth, deque[CommandBuffer]()

    def commandBuffer(self) -> CommandBuffer:
        """Waits where as many as the queue holds are in flight, one that was only made among them."""
        if len(self.flying) == self.depth:
            self.complete()
        self.flying.append(CommandBuffer(self))
        return self.flying[-1]

    def complete(self) -> None:
        """Run the oldest."""
        oldest = self.flying[0]
        if not oldest.state:
            raise MetalError("the queue is full of command buffers that were never committed: it would wait for ever")
        began = time.monotonic()
        for launch in oldest.launches:
            launch.run()
            _counts["launches"] += 1
        oldest.span = (began, time.monotonic())
        oldest.state = MTLCommandBufferStatusCompleted
        self.flying.popleft()


class Device:
    def name(self) -> str:
        return "simulated Metal"

    def newCommandQueue(self) -> Queue:
        return Queue()

    def newCommandQueueWithMaxCommandBufferCount_(self, count: int) -> Queue:
        return Queue(count)

    def newBufferWithLength_options_(self, length: int, _options: int) -> Buffer:
        return Buffer(length)

    def newBufferWithBytes_length_options_(self, values: Any, length: int, _options: int) -> Buffer:
        made = Buffer(length)
        made.bytes[:] = np.frombuffer(bytes(values), np.uint8, length)
        return made

    def newLibraryWithSource_options_error_(
        self, source: str, _options: Any, _error: None
    ) -> tuple[Library | None, Any]:
        try:
            return Library(source), None
        except (SyntaxError, UnsupportedKernelError) as error:
            return None, str(error)

    def newComputePipelineStateWithFunction_error_(self, function: Function, _error: None) -> tuple[Pipeline, None]:
        return Pipeline(function), None
