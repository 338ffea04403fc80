"""tinygrad's operations for the suites: on Metal, CUDA or the CPU. Compiled is what TinyJit replays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from tinygrad import Device, Tensor, TinyJit, dtypes
from tinygrad.dtype import strong_dtype, to_dtype

from nanogpt_mac.backends.arrays import Arrays, Function, Op
from nanogpt_mac.backends.base import Kind
from nanogpt_mac.gpt.tinygrad_gpt import tensor

NAMES = (
    *("bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"),
    *("float16", "bfloat16", "float32", "float64"),
)
NAME_OF = {getattr(dtypes, name): name for name in NAMES}  # tinygrad calls float32 "float"


def _all(outputs: Any) -> tuple[Tensor, ...]:
    return tuple(outputs) if isinstance(outputs, tuple | list) else (outputs,)


class TinygradArrays(Arrays):
    def __init__(self, kind: Kind, device: str, compiled: bool) -> None:
        self.device, self.compiled = device, compiled
        self.outputs_last = not compiled

    def put(self, array: np.ndarray, dtype: str | None = None) -> Tensor:
        # A scalar would become a constant, which is no input of anything that is captured.
        made = tensor(np.ascontiguousarray(array).reshape(-1)).cast(to_dtype(dtype or str(array.dtype)))
        made = made.contiguous().realize().reshape(array.shape)
        self.wait((made,))
        return made

    def get(self, array: Tensor) -> np.ndarray:
        return np.array(array.numpy())

    def dtype(self, array: Tensor) -> str:
        return NAME_OF[strong_dtype(array.dtype)]  # of a weak one, as numbers of Python's are, what it is read as

    def start(self, outputs: Sequence[Any]) -> None:
        Tensor.realize(*outputs)

    def wait(self, outputs: Sequence[Any]) -> None:
        Tensor.realize(*outputs)
        Device.default.synchronize()

    def peek(self, array: Tensor) -> float:
        """Of its buffer the first: an index would be scheduled as a kernel of its own, in milliseconds."""
        buffer: Any = array.uop.base.buffer
        first = buffer.view(1, array.dtype, 0).ensure_allocated()
        if array.dtype == dtypes.bfloat16:
            return float((np.frombuffer(first.as_memoryview(), np.uint16).astype(np.uint32) << 16).view(np.float32)[0])
        return float(first.numpy()[0])

    def op(self, name: str) -> Op | None:
        return OPS.get(name)

    def ready(self, function: Function) -> Function:
        """Captured at its first call; what it returns lies in the same buffers after every call."""

        def realized(*inputs: Tensor) -> Any:
            made = function(*inputs)
            contiguous = tuple(output.contiguous() for output in _all(made))
            Tensor.realize(*contiguous)
            return contiguous if isinstance(made, tuple | list) else contiguous[0]

        if not self.compiled:
            return function
        jit = TinyJit(realized)
        jit.cnt = 1
        return jit

    def ready_with_gradient(self, function: Function, of: Sequence[int]) -> Function:
        def both(cotangent: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
            output = function(*inputs)
            return output, *output.gradient(*(inputs[i] for i in of), gradient=cotangent)

        return self.ready(both)

    def library(self, dtype: str) -> str:
        return "tinygrad's own"


# -- the operations: as tinygrad's users call them; sort and scatter, in quadratic work there, are left out -----------


def _channels_first(array: Tensor) -> Tensor:
    return array.permute(0, array.ndim - 1, *range(1, array.ndim - 1)).contiguous().realize()


def _channels_last(array: Tensor) -> Tensor:
    return array.permute(0, *range(2, array.ndim), 1)


def _layer_norm(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    y = x.layernorm(eps=1e-5) * w
    return y if b is None else y + b


def _adamw(p: Tensor, g: Tensor, m: Tensor, v: Tensor, *, lr: float, beta1: float, beta2: float, decay: float,
           epsilon: float, step: int) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g.square()
    update = (m / (1 - beta1**step)) / ((v / (1 - beta2**step)).sqrt() + epsilon)
    return p * (1 - lr * decay) - lr * update, m, v


OPS: dict[str, Op] = {
    "adamw": Op(_adamw),
    "argmax": Op(lambda x, *, axis: x.argmax(axis)),
    "bce": Op(lambda p, t: p.binary_crossentropy(t)),
    "concat": Op(lambda a, b, *, axis: a.cat(b, dim=axis)),
    "conv1d": Op(lambda x, w: x.conv2d(w), _channels_first, _channels_last),
    "conv2d": Op(lambda x, w: x.conv2d(w), _channels_first, _channels_last),
    "cross_entropy": Op(lambda x, targets: x.sparse_categorical_crossentropy(targets)),
    "gather": Op(lambda table, index: table[index]),
    "gelu": Op(lambda x, *, tanh: x.gelu("tanh" if tanh else "none")),
    "layer_norm": Op(_layer_norm),
    "leaky_relu": Op(lambda x: x.leaky_relu()),
    "linear": Op(lambda x, w, b=None: x.linear(w.transpose(), b)),
    "matmul": Op(lambda a, b: a @ b),
    "prelu": Op(lambda x, a: (x > 0).where(x, a * x)),
    "relu": Op(lambda x: x.relu()),
    "sdpa": Op(lambda q, k, v, *, causal: q.scaled_dot_product_attention(k, v, is_causal=causal)),
    "selu": Op(lambda x: x.selu(1.6732632423543772, 1.0507009873554805)),  # its own have five decimals
    "sigmoid": Op(lambda x: x.sigmoid()),
    "softmax": Op(lambda x, *, axis: x.softmax(axis)),
    "softplus": Op(lambda x: x.softplus()),
    "sum": Op(lambda x, *, axis: x.sum(axis)),
}
