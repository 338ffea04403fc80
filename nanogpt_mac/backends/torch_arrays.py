"""torch's operations for the suites, on any of its devices."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nanogpt_mac import simulator
from nanogpt_mac.backends import torch_vml
from nanogpt_mac.backends.arrays import Arrays, Function, Op
from nanogpt_mac.backends.base import Kind


class TorchArrays(Arrays):
    def __init__(self, kind: Kind, device: str, compiled: bool) -> None:
        self.device = torch.device("mps" if device == simulator.DEVICE_NAME else device)
        self.simulated, self.compiled = device == simulator.DEVICE_NAME, compiled
        accelerators: dict[str, Any] = {"mps": torch.mps, "cuda": torch.cuda}
        self.accelerator: Any = accelerators.get(self.device.type)
        torch_vml.settle()
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False  # of convolutions, where torch allows it unasked

    def put(self, array: np.ndarray, dtype: str | None = None) -> Tensor:
        tensor = torch.from_numpy(np.array(array, order="C")).to(self.device)
        if dtype is not None:
            tensor = tensor.to(getattr(torch, dtype))
        self.wait(())
        return tensor

    def get(self, array: Tensor) -> np.ndarray:
        tensor = array.detach()
        tensor = tensor.float() if tensor.dtype == torch.bfloat16 else tensor
        return tensor.numpy().copy() if tensor.device.type == "cpu" else tensor.cpu().numpy()

    def dtype(self, array: Tensor) -> str:
        return str(array.dtype).removeprefix("torch.")

    def start(self, outputs: Sequence[Any]) -> None:
        """torch has enqueued them, or has them already."""

    def wait(self, outputs: Sequence[Any]) -> None:
        if self.accelerator is not None:
            self.accelerator.synchronize()

    def peek(self, array: Tensor) -> float:
        return float(array.detach()[(0,) * array.ndim].item())

    def op(self, name: str) -> Op | None:
        return OPS.get(name)

    def ready(self, function: Function) -> Function:
        return torch.no_grad()(self._compiled(function))

    def ready_with_gradient(self, function: Function, of: Sequence[int]) -> Function:
        forward = self._compiled(function)

        def both(cotangent: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
            leaves = [x.detach().requires_grad_(i in of) for i, x in enumerate(inputs)]
            output = forward(*leaves)
            return output.detach(), *torch.autograd.grad(output, [leaves[i] for i in of], cotangent)

        return both

    def _compiled(self, function: Function) -> Function:
        return torch.compile(function, dynamic=False) if self.compiled else function

    def library(self, dtype: str) -> str:
        if self.device.type != "cpu":
            return {"cuda": "cuBLAS", "mps": "MPS"}.get(self.device.type, "")
        known = re.search(r"BLAS_INFO=(\w+)", torch.__config__.show())
        return known.group(1) if known and dtype == "float32" else ""

    def limit_threads(self, threads: int) -> None:
        torch.set_num_threads(threads)

    def watched(self, call: Callable[[], Any]) -> tuple[Any, int]:
        if self.device.type != "mps":
            return super().watched(call)
        torch.set_warn_always(True)  # or the second operation that falls back would do so in silence
        self.counted()
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            made, _ = super().watched(call)
        told = sum("fall back to run on the CPU" in str(warning.message) for warning in seen)
        return made, max(told, (self.counted() or {}).get("fallbacks", 0))

    def free_memory(self) -> int:
        return int(torch.cuda.mem_get_info()[0]) if self.device.type == "cuda" else super().free_memory()

    def release(self) -> None:
        if self.compiled:
            torch.compiler.reset()  # or the ninth shape of a function would run eagerly, without a word
        if self.accelerator is not None and not self.simulated:  # which keeps nothing
            self.accelerator.empty_cache()

    def counted(self) -> Mapping[str, int] | None:
        if not self.simulated:
            return None
        found = simulator.counts()
        fallbacks = sum(simulator.operators("fallback").values())
        simulator.reset_counts()
        return {"kernels": found.kernels, "waits": found.waits, "fallbacks": fallbacks}


# -- the operations: as torch's users call them -----------------------------------------------------------------------


def _index(array: Tensor) -> Tensor:
    """Indices are int64 here."""
    return array.long() if array.dtype == torch.int32 else array


def _channels_first(array: Tensor) -> Tensor:
    return array.movedim(-1, 1).contiguous()


def _channels_last(array: Tensor) -> Tensor:
    return array.movedim(1, -1)


def _scatter_max(into: Tensor, index: Tensor, values: Tensor) -> Tensor:
    return into.scatter_reduce(0, index[:, None].expand_as(values), values, "amax")


def _adamw(p: Tensor, g: Tensor, m: Tensor, v: Tensor, *, lr: float, beta1: float, beta2: float, decay: float,
           epsilon: float, step: int) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    m, v = m.lerp(g, 1 - beta1), beta2 * v + (1 - beta2) * g * g
    update = (m / (1 - beta1**step)) / ((v / (1 - beta2**step)).sqrt() + epsilon)
    return p * (1 - lr * decay) - lr * update, m, v


OPS: dict[str, Op] = {
    "adamw": Op(_adamw),
    "argmax": Op(lambda x, *, axis: x.argmax(axis)),
    "bce": Op(F.binary_cross_entropy),
    "concat": Op(lambda a, b, *, axis: torch.cat((a, b), axis)),
    "conv1d": Op(F.conv1d, _channels_first, _channels_last),
    "conv2d": Op(F.conv2d, _channels_first, _channels_last),
    "cross_entropy": Op(F.cross_entropy, _index),
    "gather": Op(lambda table, index: table[index], _index),
    "gelu": Op(lambda x, *, tanh: F.gelu(x, approximate="tanh" if tanh else "none")),
    "layer_norm": Op(lambda x, w, b=None: F.layer_norm(x, w.shape, w, b, 1e-5)),
    "leaky_relu": Op(F.leaky_relu),
    "linear": Op(F.linear),
    "matmul": Op(torch.matmul),
    "prelu": Op(F.prelu),
    "relu": Op(F.relu),
    "scatter": Op(lambda into, index, values: into.index_put((index,), values), _index),
    "scatter_max": Op(_scatter_max, _index),
    "scatter_sum": Op(lambda into, index, values: into.index_add(0, index, values), _index),
    "sdpa": Op(lambda q, k, v, *, causal: F.scaled_dot_product_attention(q, k, v, is_causal=causal)),
    "selu": Op(F.selu),
    "sigmoid": Op(torch.sigmoid),
    "softmax": Op(lambda x, *, axis: x.softmax(axis)),
    "softplus": Op(F.softplus),
    "sort": Op(lambda x, *, axis: x.sort(axis)[0]),
    "sort_with_indices": Op(lambda x, *, axis: tuple(x.sort(axis))),
    "sum": Op(lambda x, *, axis: x.sum() if axis is None else x.sum(axis)),
}
