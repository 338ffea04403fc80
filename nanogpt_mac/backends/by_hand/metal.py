"""The classifier on Metal itself, by PyObjC: here command buffers, commits and waits are the program's own.

Off a Mac the same program drives the simulated Metal objects (simulator/pyobjc_metal.py), where it has counts and no
times. Shared storage is mapped into numpy, so what the host writes is there at once, whether the GPU has read or not.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np

from nanogpt_mac import simulator
from nanogpt_mac.backends.by_hand import launches
from nanogpt_mac.backends.by_hand.launches import Launch, Version
from nanogpt_mac.backends.by_hand.net import Submitting


def missing() -> str | None:
    """Why Metal cannot be driven here, or None."""
    if sys.platform == "darwin":
        return None if find_spec("Metal") else "PyObjC's Metal is not installed: pip install 'nanogpt-mac[metal]'"
    if sys.platform == "linux" and simulator.asked():
        return None
    return f"it needs a Mac ({simulator.VARIABLE}=1 simulates Metal on Linux)"


@dataclass(frozen=True)
class MetalArray:
    """A buffer and what the host sees of it."""

    buffer: Any
    view: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        return self.view.shape

    def __len__(self) -> int:
        return len(self.view)

    def __getitem__(self, rows: slice) -> MetalArray:
        """The first rows: the same buffer."""
        if rows.start or rows.step:
            raise IndexError(f"{rows}: rows of a Metal array begin with its first")
        return MetalArray(self.buffer, self.view[rows])


class MetalArrays(Submitting):
    """The default device, and a queue of `version.depth` command buffers. A RuntimeError has Metal's own words."""

    def __init__(self, version: Version) -> None:
        self.version = version
        if sys.platform == "darwin":
            import Metal
            import objc

            self.metal, self.pool, self.simulated = Metal, objc.autorelease_pool, False
        else:
            from nanogpt_mac.simulator import pyobjc_metal

            self.metal, self.pool, self.simulated = pyobjc_metal, pyobjc_metal.autorelease_pool, True
        self.device = self.metal.MTLCreateSystemDefaultDevice()
        if self.device is None:
            raise RuntimeError("Metal finds no device")
        self.shared = self.metal.MTLResourceStorageModeShared
        self.queue = self.device.newCommandQueueWithMaxCommandBufferCount_(version.depth)
        self.made, self.pipelines = self._compiled(launches.source(version.name)), dict[str, Any]()
        self.command: Any = None  # what is being encoded
        self.encoder: Any = None
        self.flying = deque[Any]()  # committed, and not known to be complete
        self.busy_s = 0.0
        self.sizes: dict[Launch, tuple[bytes, bytes, Any, Any]] = {}  # as the calls take them

    def _compiled(self, source: str) -> Any:
        options = self.metal.MTLCompileOptions.alloc().init()
        options.setFastMathEnabled_(False)  # the numbers of all versions are to be the same
        library, error = self.device.newLibraryWithSource_options_error_(source, options, None)
        if library is None:
            raise RuntimeError(f"Metal does not compile the kernels of {self.version.name}: {error}")
        return library

    def _pipeline(self, kernel: str) -> Any:
        if kernel not in self.pipelines:
            function = self.made.newFunctionWithName_(kernel)
            pipeline, error = self.device.newComputePipelineStateWithFunction_error_(function, None)
            if pipeline is None:
                raise RuntimeError(f"Metal makes no pipeline of {kernel}: {error}")
            self.pipelines[kernel] = pipeline
        return self.pipelines[kernel]

    # -- submitting -------------------------------------------------------------------------------------------------

    def launch(self, launch: Launch, arrays: Sequence[MetalArray]) -> None:
        if self.encoder is None:
            self.command = self.queue.commandBuffer()  # waits where as many are in flight as the queue holds
            self.encoder = self.command.computeCommandEncoder()  # serial: a dispatch sees what the one before wrote
        encoder, kept = self.encoder, self.sizes.get(launch)
        if kept is None:
            size, rate = np.array(launch.size, np.uint32).tobytes(), b""
            if launch.rate is not None:
                rate = np.float32(launch.rate).tobytes()
            kept = self.sizes[launch] = (size, rate, self._size(launch.threads), self._size(launch.group))
        size, rate, threads, group = kept
        encoder.setComputePipelineState_(self._pipeline(launch.kernel))
        set_buffer, count = encoder.setBuffer_offset_atIndex_, len(arrays)
        for index, array in enumerate(arrays):
            set_buffer(array.buffer, 0, index)
        encoder.setBytes_length_atIndex_(size, len(size), count)
        if rate:
            encoder.setBytes_length_atIndex_(rate, len(rate), count + 1)
        encoder.dispatchThreads_threadsPerThreadgroup_(threads, group)

    def _size(self, across: tuple[int, int]) -> Any:
        return self.metal.MTLSize(*across, 1)

    def submit(self) -> None:
        if self.encoder is None:
            return
        self.encoder.endEncoding()
        self.command.commit()
        self.flying.append(self.command)
        self.command = self.encoder = None
        if len(self.flying) > self.version.depth:  # the queue let it in, so the oldest is complete
            self._completed(self.flying.popleft())

    def wait(self, outputs: Sequence[Any]) -> None:
        """The queue is serial: what was committed last is complete last."""
        self.submit()
        if self.flying:
            self.flying[-1].waitUntilCompleted()
        while self.flying:
            self._completed(self.flying.popleft())

    def _completed(self, command: Any) -> None:
        if command.status() != self.metal.MTLCommandBufferStatusCompleted:
            self.flying.clear()
            raise RuntimeError(f"Metal: {command.error()}")
        self.busy_s += command.GPUEndTime() - command.GPUStartTime()

    def gpu_seconds(self) -> float | None:
        found, self.busy_s = self.busy_s, 0.0
        return found

    def batch(self) -> AbstractContextManager[Any]:
        pool: AbstractContextManager[Any] = self.pool()
        return pool

    # -- arrays -----------------------------------------------------------------------------------------------------

    def put(self, array: np.ndarray, dtype: str | None = None) -> MetalArray:
        given = np.ascontiguousarray(array, dtype)
        buffer = self.device.newBufferWithBytes_length_options_(given.tobytes(), given.nbytes, self.shared)
        view = np.frombuffer(buffer.contents().as_buffer(given.nbytes), given.dtype)
        return MetalArray(buffer, view.reshape(array.shape))

    def overwrite(self, array: MetalArray, values: np.ndarray) -> None:
        array.view.reshape(-1)[: values.size] = values.reshape(-1)

    def seen(self, array: MetalArray) -> np.ndarray:
        return array.view

    def get(self, array: MetalArray) -> np.ndarray:
        self.wait(())
        return array.view.copy()

    def dtype(self, array: MetalArray) -> str:
        return str(array.view.dtype)

    def start(self, outputs: Sequence[Any]) -> None:
        self.submit()

    def peek(self, array: MetalArray) -> float:
        self.wait(())
        return float(array.view.flat[0])

    def counted(self) -> Mapping[str, int] | None:
        if not self.simulated:
            return None
        found: Mapping[str, int] = self.metal.counts()
        return found
