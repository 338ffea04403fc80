"""JAX's operations for the suites: on CUDA, a plugin for Metal or the CPU, also on the CPU of a machine with a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nanogpt_mac.backends.arrays import Arrays, Function, Op
from nanogpt_mac.backends.base import Kind
from nanogpt_mac.gpt.jax_gpt import layer_norm, mean_nats


def complete(outputs: Any, device: str) -> None:
    """Wait for all arrays in `outputs`."""
    jax.block_until_ready(outputs)
    if device not in ("cpu", "cuda"):  # on one of the plugins that returns at once, and only reading waits
        for array in jax.tree.leaves(outputs):
            first(array)


def first(arrays: Any) -> float:
    """One number, on the host."""
    array = jax.tree.leaves(arrays)[0]
    return float(array[(0,) * array.ndim])


class JaxArrays(Arrays):
    def __init__(self, kind: Kind, device: str, compiled: bool) -> None:
        self.device, self.compiled = device, compiled
        self.place = jax.devices("cpu" if device == "cpu" else None)[0]
        jax.config.update("jax_default_device", self.place)
        jax.config.update("jax_default_matmul_precision", "highest")

    def put(self, array: np.ndarray, dtype: str | None = None) -> jax.Array:
        if dtype and jnp.dtype(dtype).itemsize == 8:
            raise TypeError(f"{dtype}: JAX has 64 bits only where jax_enable_x64 is set, for the whole process")
        made = jax.device_put(array if dtype is None else array.astype(jnp.dtype(dtype)), self.place)
        self.wait((made,))
        return made

    def get(self, array: jax.Array) -> np.ndarray:
        return np.array(array.astype(jnp.float32) if array.dtype == jnp.bfloat16 else array)

    def dtype(self, array: jax.Array) -> str:
        return str(array.dtype)

    def start(self, outputs: Sequence[Any]) -> None:
        """JAX has started them when it gives them."""

    def wait(self, outputs: Sequence[Any]) -> None:
        complete(outputs, self.device)

    def peek(self, array: jax.Array) -> float:
        return first(array)

    def op(self, name: str) -> Op | None:
        return OPS.get(name)

    def ready(self, function: Function) -> Function:
        return jax.jit(function) if self.compiled else function

    def ready_with_gradient(self, function: Function, of: Sequence[int]) -> Function:
        def both(cotangent: jax.Array, *inputs: jax.Array) -> tuple[jax.Array, ...]:
            def forward(*wanted: jax.Array) -> jax.Array:
                given = list(inputs)
                for i, x in zip(of, wanted, strict=True):
                    given[i] = x
                made: jax.Array = function(*given)
                return made

            output, backward = jax.vjp(forward, *(inputs[i] for i in of))
            return output, *backward(cotangent)

        return self.ready(both)

    def library(self, dtype: str) -> str:
        return {"cpu": "XLA's own", "cuda": "cuBLAS"}.get(self.device, "MLX's, of the plugin")

    def free_memory(self) -> int:
        held = self.place.memory_stats() or {}
        return held["bytes_limit"] - held["bytes_in_use"] if "bytes_limit" in held else super().free_memory()

    def release(self) -> None:
        jax.clear_caches()


# -- the operations: as JAX's users call them -------------------------------------------------------------------------


def _heads_last(array: jax.Array) -> jax.Array:
    """(B, nh, T, hs) as JAX's attention has it, (B, T, nh, hs), and back."""
    return array.swapaxes(1, 2)


def _bce(p: jax.Array, t: jax.Array) -> jax.Array:
    return -jnp.mean(t * jnp.log(p) + (1 - t) * jnp.log1p(-p))


def _conv(layout: str) -> Function:
    sides = (f"N{layout}C", f"O{layout}I", f"N{layout}C")
    return lambda x, w: jax.lax.conv_general_dilated(x, w, (1,) * len(layout), "VALID", dimension_numbers=sides)


def _linear(x: jax.Array, w: jax.Array, b: jax.Array | None = None) -> jax.Array:
    return x @ w.T if b is None else x @ w.T + b


def _scatter_max(into: jax.Array, index: jax.Array, values: jax.Array) -> jax.Array:
    """Not into.at[index].max(values), whose gradient is 6e-8 where it should be 0."""
    return jnp.maximum(into, jax.ops.segment_max(values, index, len(into)))


def _sort_with_indices(x: jax.Array, *, axis: int) -> tuple[jax.Array, jax.Array]:
    places = jax.lax.broadcasted_iota(jnp.int32, x.shape, axis % x.ndim)
    ordered, order = jax.lax.sort_key_val(x, places, dimension=axis)
    return ordered, order


def _adamw(p: jax.Array, g: jax.Array, m: jax.Array, v: jax.Array, *, lr: float, beta1: float, beta2: float,
           decay: float, epsilon: float, step: int) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
    m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * jnp.square(g)
    update = (m / (1 - beta1**step)) / (jnp.sqrt(v / (1 - beta2**step)) + epsilon)
    return p * (1 - lr * decay) - lr * update, m, v


OPS: dict[str, Op] = {
    "adamw": Op(_adamw),
    "argmax": Op(lambda x, *, axis: jnp.argmax(x, axis)),
    "bce": Op(_bce),
    "concat": Op(lambda a, b, *, axis: jnp.concatenate([a, b], axis)),
    "conv1d": Op(_conv("W")),
    "conv2d": Op(_conv("HW")),
    "cross_entropy": Op(mean_nats),
    "gather": Op(lambda table, index: table[index]),
    "gelu": Op(lambda x, *, tanh: jax.nn.gelu(x, approximate=tanh)),
    "layer_norm": Op(lambda x, w, b=None: layer_norm(x, w, b)),
    "leaky_relu": Op(jax.nn.leaky_relu),
    "linear": Op(_linear),
    "matmul": Op(jnp.matmul),
    "prelu": Op(lambda x, a: jnp.where(x > 0, x, a * x)),
    "relu": Op(jax.nn.relu),
    "scatter": Op(lambda into, index, values: into.at[index].set(values)),
    "scatter_max": Op(_scatter_max),
    "scatter_sum": Op(lambda into, index, values: into.at[index].add(values)),
    "sdpa": Op(
        lambda q, k, v, *, causal: jax.nn.dot_product_attention(q, k, v, is_causal=causal), _heads_last, _heads_last
    ),
    "selu": Op(jax.nn.selu),
    "sigmoid": Op(jax.nn.sigmoid),
    "softmax": Op(lambda x, *, axis: jax.nn.softmax(x, axis)),
    "softplus": Op(jax.nn.softplus),
    "sort": Op(lambda x, *, axis: jnp.sort(x, axis)),
    "sort_with_indices": Op(_sort_with_indices),
    "sum": Op(lambda x, *, axis: jnp.sum(x, axis)),
}
