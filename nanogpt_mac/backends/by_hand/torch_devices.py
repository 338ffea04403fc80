"""The same launches where torch has the queue: the Metal kernels on MPS, and those in Triton on CUDA.

On MPS torch puts kernels into command buffers of its own; recording an event commits what there is. On CUDA what
v3 submits is a graph: recorded when the same launches come a second time, replayed from then on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nanogpt_mac.backends.base import Kind
from nanogpt_mac.backends.by_hand import launches
from nanogpt_mac.backends.by_hand.launches import Launch, Version
from nanogpt_mac.backends.by_hand.net import Submitting
from nanogpt_mac.backends.torch_arrays import TorchArrays


class TorchSubmitting(Submitting, TorchArrays):
    def __init__(self, version: Version, kind: Kind, device: str) -> None:
        TorchArrays.__init__(self, kind, device, False)
        self.version = version

    def put(self, array: np.ndarray, dtype: str | None = None) -> Tensor:
        return torch.from_numpy(np.array(array, dtype, order="C")).to(self.device)

    def overwrite(self, array: Tensor, values: np.ndarray) -> None:
        array.view(-1)[: values.size].copy_(torch.from_numpy(np.ascontiguousarray(values)).view(-1))

    def seen(self, array: Tensor) -> np.ndarray:
        return self.get(array)  # torch waits


class ShaderArrays(TorchSubmitting):
    """`torch.mps.compile_shader`."""

    def __init__(self, version: Version, kind: Kind, device: str) -> None:
        super().__init__(version, kind, device)
        self.kernels: Any = torch.mps.compile_shader(launches.source(version.name))

    def launch(self, launch: Launch, arrays: Sequence[Tensor]) -> None:
        rate = () if launch.rate is None else (launch.rate,)
        size, at = list(launch.size), len(arrays)
        kernel, grid, group = getattr(self.kernels, launch.kernel), list(launch.threads), list(launch.group)
        kernel(*arrays, size, *rate, threads=grid, group_size=group, arg_casts={at: "int32"})

    def submit(self) -> None:
        if self.version.wait == "epoch":
            torch.mps.Event().record()


class TritonArrays(TorchSubmitting):
    """CUDA; in Triton's interpreter a CPU, which has no graphs."""

    def __init__(self, version: Version, kind: Kind, device: str) -> None:
        from nanogpt_mac.backends.by_hand import triton_kernels

        super().__init__(version, kind, device)
        self.run = triton_kernels.run
        self.graphed = version.wait == "epoch" and self.device.type == "cuda"
        self.graphs: dict[Any, torch.cuda.CUDAGraph | None] = {}  # None: seen once
        self.waiting: list[tuple[Launch, tuple[Tensor, ...]]] = []
        self.kept: list[Any] = []  # arrays that graphs write: a graph knows their addresses alone

    def launch(self, launch: Launch, arrays: Sequence[Tensor]) -> None:
        if self.graphed:
            self.waiting.append((launch, tuple(arrays)))
        else:
            self.run(launch, arrays)

    def submit(self) -> None:
        work, self.waiting = self.waiting, []
        if not work:
            return
        key = tuple((launch, *map(id, arrays)) for launch, arrays in work)
        graph = self.graphs.get(key)
        if graph is None and key in self.graphs:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._enqueue(work)
            self.graphs[key] = graph
        if graph is not None:
            return graph.replay()
        self._enqueue(work)  # which also compiles what is to be recorded
        self.graphs[key] = None
        self.kept.append(work)

    def _enqueue(self, work: Sequence[tuple[Launch, tuple[Tensor, ...]]]) -> None:
        for launch, arrays in work:
            self.run(launch, arrays)

    def wait(self, outputs: Sequence[Any]) -> None:
        self.submit()
        super().wait(outputs)

    def get(self, array: Tensor) -> np.ndarray:
        self.submit()
        return super().get(array)
