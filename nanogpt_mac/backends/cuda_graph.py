"""A function as one CUDA graph: a single submission, whatever it launches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from nanogpt_mac.garbage import uncollected

T = TypeVar("T")


class Recorded(Generic[T]):
    """A function without arguments, recorded as a CUDA graph after `warmup` calls and replayed from then on.

    A replay reads the random generator as it is then, so a seed set before decides the dropout masks. The result is
    overwritten by the next replay.
    """

    def __init__(self, function: Callable[[], T], warmup: int = 3) -> None:
        self.function, self.left = function, warmup
        self.graph: torch.cuda.CUDAGraph | None = None
        self.result: T
        # Of its own, and the same for all calls, as memory is kept for each: what libraries prepare once a stream
        # cannot be recorded.
        self.stream = torch.cuda.Stream()

    def __call__(self) -> T:
        if self.graph is not None:
            self.graph.replay()
            return self.result
        self.stream.wait_stream(torch.cuda.current_stream())
        if self.left > 0:
            self.left -= 1
            with torch.cuda.stream(self.stream):
                result = self.function()
            torch.cuda.current_stream().wait_stream(self.stream)
            return result
        graph = torch.cuda.CUDAGraph()
        # NCCL has a thread of its own, whose calls must not end what this one records.
        mode = "thread_local" if dist.is_available() and dist.is_initialized() else "global"
        # And an earlier graph that is collected meanwhile would end it too.
        with uncollected(), torch.cuda.graph(graph, stream=self.stream, capture_error_mode=mode):
            self.result = self.function()
        self.graph = graph
        return self()


class Graphed:
    """A function of one CUDA tensor as `Recorded`; an argument of another shape than the recorded is not replayed."""

    def __init__(self, function: Callable[[Tensor], Tensor], warmup: int = 3) -> None:
        self.function = function
        self.argument = argument = [torch.empty(0)]  # not `self` below: a graph must end with its last user
        self.recorded = Recorded(lambda: function(argument[0]), warmup)

    def __call__(self, argument: Tensor) -> Tensor:
        if self.recorded.graph is None:
            self.argument[0] = argument.clone()
        elif argument.shape != self.argument[0].shape:
            return self.function(argument)
        else:
            self.argument[0].copy_(argument)
        return self.recorded()
