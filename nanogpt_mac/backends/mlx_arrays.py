"""MLX's operations for the suites: on Metal, CUDA or the CPU, also on the CPU of a machine that has a GPU."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from nanogpt_mac.backends import blas
from nanogpt_mac.backends.arrays import Arrays, Function, Op
from nanogpt_mac.backends.base import Kind


def first_number(array: mx.array) -> float:
    """The first number of `array`, as an array of its own: on CUDA reading a part of one moves it whole to the host."""
    one = array[(0,) * array.ndim] if array.ndim else array
    return float(mx.stack([one, one])[0].item())  # type: ignore[arg-type]


class MLXArrays(Arrays):
    def __init__(self, kind: Kind, device: str, compiled: bool) -> None:
        self.device, self.compiled = device, compiled
        mx.set_default_device(mx.Device(mx.cpu if device == "cpu" else mx.gpu))

    def put(self, array: np.ndarray, dtype: str | None = None) -> mx.array:
        wanted = None if dtype is None else mx.bool_ if dtype == "bool" else getattr(mx, dtype)
        made = mx.array(array, wanted)  # which alone keeps float64: without a dtype it would become float32
        if self.device == "cuda":  # a kernel writes a copy: what the host has written crosses when it is first used
            self.wait((made,))
            made = mx.where(True, made, made)
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
        return first_number(array)

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

    def library(self, dtype: str) -> str:
        if self.device != "cpu":
            return {"cuda": "cuBLAS"}.get(self.device, "MLX's own")
        if sys.platform == "darwin" and dtype == "float32":
            return "Accelerate"
        lent = blas.taken()
        return f"{lent}'s BLAS" if dtype == "float32" and lent != "own" else "MLX's own"

    def free_memory(self) -> int:
        return int(mx.device_info().get("free_memory", super().free_memory()))  # there on CUDA alone

    def release(self) -> None:
        mx.clear_cache()


# -- the operations: as MLX's users call them -------------------------------------------------------------------------


def _scatter(into: mx.array, index: mx.array, values: mx.array) -> mx.array:
    made = mx.array(into)  # assigning changes what a name stands for: this one's alone
    made[index] = values
    return made


def _linear(x: mx.array, w: mx.array, b: mx.array | None = None) -> mx.array:
    return x @ w.T if b is None else mx.addmm(b, x, w.T)


def _sort_with_indices(x: mx.array, *, axis: int) -> tuple[mx.array, mx.array]:
    order = mx.argsort(x, axis)
    return mx.take_along_axis(x, order, axis), order


@partial(mx.compile, shapeless=True)  # as nn.selu is, whose constants have five decimals
def _selu(x: mx.array) -> mx.array:
    return nn.elu(x, 1.6732632423543772) * 1.0507009873554805


def _sdpa(q: mx.array, k: mx.array, v: mx.array, *, causal: bool) -> mx.array:
    mask = "causal" if causal else None
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=q.shape[-1] ** -0.5, mask=mask)


def _adamw(p: mx.array, g: mx.array, m: mx.array, v: mx.array, *, lr: float, beta1: float, beta2: float, decay: float,
           epsilon: float, step: int) -> tuple[mx.array, mx.array, mx.array]:  # fmt: skip
    m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * mx.square(g)
    update = (m / (1 - beta1**step)) / (mx.sqrt(v / (1 - beta2**step)) + epsilon)
    return p * (1 - lr * decay) - lr * update, m, v


OPS: dict[str, Op] = {
    "adamw": Op(_adamw),
    "argmax": Op(lambda x, *, axis: mx.argmax(x, axis)),
    "bce": Op(lambda p, t: nn.losses.binary_cross_entropy(p, t, with_logits=False)),
    "concat": Op(lambda a, b, *, axis: mx.concatenate([a, b], axis)),
    "conv1d": Op(mx.conv1d),
    "conv2d": Op(mx.conv2d),
    "cross_entropy": Op(lambda x, targets: nn.losses.cross_entropy(x, targets, reduction="mean")),
    "gather": Op(lambda table, index: table[index]),
    "gelu": Op(lambda x, *, tanh: nn.gelu_approx(x) if tanh else nn.gelu(x)),
    "layer_norm": Op(lambda x, w, b=None: mx.fast.layer_norm(x, w, b, 1e-5)),
    "leaky_relu": Op(nn.leaky_relu),
    "linear": Op(_linear),
    "matmul": Op(mx.matmul),
    "prelu": Op(nn.prelu),
    "relu": Op(nn.relu),
    "scatter": Op(_scatter),
    "scatter_max": Op(lambda into, index, values: into.at[index].maximum(values)),
    "scatter_sum": Op(lambda into, index, values: into.at[index].add(values)),
    "sdpa": Op(_sdpa),
    "selu": Op(_selu),
    "sigmoid": Op(mx.sigmoid),
    "softmax": Op(lambda x, *, axis: mx.softmax(x, axis)),
    "softplus": Op(nn.softplus),
    "sort": Op(lambda x, *, axis: mx.sort(x, axis)),
    "sort_with_indices": Op(_sort_with_indices),
    "sum": Op(lambda x, *, axis: mx.sum(x, axis)),
}
