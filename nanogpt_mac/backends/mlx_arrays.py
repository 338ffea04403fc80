"""MLX's operations for the suites: on Metal, CUDA or the CPU, also on the CPU of a machine that has a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from nanogpt_mac.backends.arrays import Arrays, Function, Op
from nanogpt_mac.backends.base import Kind


class MLXArrays(Arrays):
    def __init__(self, kind: Kind, device: str, compiled: bool) -> None:
        self.device, self.compiled = device, compiled
        mx.set_default_device(mx.Device(mx.cpu if device == "cpu" else mx.gpu))

    def put(self, array: np.ndarray, dtype: str | None = None) -> mx.array:
        made = mx.array(array)
        if dtype is not None:
            made = made.astype(mx.bool_ if dtype == "bool" else getattr(mx, dtype))
        self.wait((made,))
        return made

    def get(self, array: mx.array) -> np.ndarray:
        return np.array(array.astype(mx.float32) if array.dtype == mx.bfloat16 else array)

    def dtype(self, array: mx.array) -> str:
        return str(array.dtype).removeprefix("mlx.core.").rstrip("_")

    def start(self, outputs: Sequence[Any]) -> None:
        mx.async_eval(*outputs)

    def wait(self, outputs: Sequence[Any]) -> None:
        mx.eval(*outputs)
        mx.synchronize()

    def peek(self, array: mx.array) -> float:
        return float(array[(0,) * array.ndim].item() if array.ndim else array.item())  # type: ignore[arg-type]

    def op(self, name: str) -> Op | None:
        return OPS.get(name)

    def ready(self, function: Function) -> Function:
        return mx.compile(function) if self.compiled else function

    def ready_with_gradient(self, function: Function, of: Sequence[int]) -> Function:
        def both(cotangent: mx.array, *inputs: mx.array) -> tuple[mx.array, ...]:
            def forward(*wanted: mx.array) -> mx.array:
                given = list(inputs)
                for i, x in zip(of, wanted, strict=True):
                    given[i] = x
                return function(*given)

            (output,), gradients = mx.vjp(forward, [inputs[i] for i in of], [cotangent])
            return output, *gradients

        return self.ready(both)

    def free_memory(self) -> int:
        return int(mx.device_info().get("free_memory", super().free_memory()))  # there on CUDA alone

    def release(self) -> None:
        mx.clear_cache()


OPS: dict[str, Op] = {
    "relu": Op(nn.relu),
    "matmul": Op(mx.matmul),
}
