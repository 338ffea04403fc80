"""The tiled Metal kernels inside a compiled MLX step: `mx.fast.metal_kernel` makes them nodes of MLX's own graph.

MLX writes a kernel's signature, decides about command buffers, and never writes an array in place: new parameters are
new arrays. It gathers a batch's rows itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from nanogpt_mac.backends.arrays import AbsentError
from nanogpt_mac.backends.by_hand import launches
from nanogpt_mac.backends.by_hand.launches import LANES, SIDE
from nanogpt_mac.backends.mlx_nets import MLXNet
from nanogpt_mac.backends.nets import MLPSpec

SMALLEST = 8  # MLX puts arrays of fewer numbers into another address space than weights and biases have here
_TILE = "thread_position_in_grid.xy, thread_position_in_threadgroup.xy, lefts, rights);"
_SHARED = "threadgroup float lefts[SIDE * SIDE]; threadgroup float rights[SIDE * SIDE];\n"
BODIES = {  # name -> inputs before `size`, outputs, what calls the function of tiles.metal
    "linear_relu": ("x w b", "y", f"{_SHARED}forward_tile<true>(x, w, b, y, size, {_TILE}"),
    "linear": ("x w b", "y", f"{_SHARED}forward_tile<false>(x, w, b, y, size, {_TILE}"),
    "linear_backward_input": ("dy w x", "dx", f"{_SHARED}backward_input_tile(dy, w, x, dx, size, {_TILE}"),
    "linear_backward_weight": (
        "dy x w b rate",
        "to to_b",
        f"{_SHARED}backward_weight_tile(dy, x, w, b, to, to_b, size, rate, {_TILE}",
    ),
    "cross_entropy_grad": (
        "logits classes",
        "d loss",
        "const float found = cross_entropy_row(logits, classes, d, size, thread_position_in_grid.xy);\n"
        "if (thread_position_in_grid.x == 0) loss[thread_position_in_grid.y] = found;",
    ),
}


class MLXKernelNet(MLXNet):
    """MLX's network with its step made of our kernels; what is asked of it is asked of the same."""

    def build(self) -> None:
        if not isinstance(self.spec, MLPSpec):
            raise AbsentError("these kernels are for suite=mlp")
        if min(self.spec.widths) < SMALLEST:
            raise AbsentError(f"widths below {SMALLEST}: MLX passes such small arrays in another way")
        header = launches.source("tiles")
        self.kernels: dict[str, Any] = {
            name: mx.fast.metal_kernel(f"mlp_{name}", [*inputs.split(), "size"], outputs.split(), body, header)
            for name, (inputs, outputs, body) in BODIES.items()
        }
        super().build()

    def _call(self, name: str, given: Sequence[mx.array], size: tuple[int, int, int], *shapes: tuple[int, ...]) -> Any:
        m, n, _ = size
        tile = name != "cross_entropy_grad"
        grid = (-(-n // SIDE) * SIDE, -(-m // SIDE) * SIDE, 1) if tile else (LANES, m, 1)
        return self.kernels[name](
            inputs=[*given, mx.array(np.array(size, np.uint32))],
            output_shapes=list(shapes),
            output_dtypes=[mx.float32] * len(shapes),
            grid=grid,
            threadgroup=(SIDE, SIDE, 1) if tile else (LANES, 1, 1),
        )

    def _forward(self, x: mx.array) -> list[mx.array]:
        """The input and every layer's result."""
        found, layers = [x], self.model.layers
        for i, layer in enumerate(layers):
            outer, inner = layer.weight.shape
            kernel = "linear" if i == len(layers) - 1 else "linear_relu"
            shape = (len(x), outer)
            found += self._call(kernel, [found[-1], layer.weight, layer.bias], (*shape, inner), shape)
        return found

    def _backward(self, inputs: mx.array, targets: mx.array, rate: float, zero: bool = False) -> Any:
        """The mean loss, and for each layer its weights and bias (or zeros) less `rate` times their gradients."""
        x, layers = self._forward(inputs), self.model.layers
        rows, classes = x[-1].shape
        d, loss = self._call("cross_entropy_grad", [x[-1], targets], (rows, classes, 0), (rows, classes), (rows,))
        made: list[Any] = [None] * len(layers)
        for i in reversed(range(len(layers))):
            w, b = layers[i].weight, layers[i].bias
            outer, inner = w.shape
            old = [mx.zeros_like(w), mx.zeros_like(b)] if zero else [w, b]
            size, given = (outer, inner, rows), [d, x[i], *old, mx.array(rate, mx.float32)]
            made[i] = self._call("linear_backward_weight", given, size, (outer, inner), (outer,))
            if i:
                (d,) = self._call("linear_backward_input", [d, w, x[i]], (rows, inner, outer), (rows, inner))
        return loss.sum(), made

    def _start_afresh(self) -> None:
        assert isinstance(self.spec, MLPSpec)
        model, rate, compiled = self.model, self.spec.lr, self.arrays.compiled

        def step(inputs: mx.array, targets: mx.array) -> mx.array:
            loss, made = self._backward(inputs, targets, rate)
            model.update({"layers": [{"weight": w, "bias": b} for w, b in made]})
            return loss

        self.training = mx.compile(step, inputs=[model.state], outputs=[model.state]) if compiled else step
        infer = lambda inputs: self._forward(inputs)[-1]  # noqa: E731
        self.inference = mx.compile(infer, inputs=[model.state]) if compiled else infer

    def put(self, rows: np.ndarray) -> mx.array:
        return mx.array(rows if rows.dtype == np.float32 else rows.astype(np.uint32))

    def gradients(self, inputs: mx.array, targets: mx.array) -> tuple[mx.array, dict[str, mx.array]]:
        loss, made = self._backward(inputs, targets, -1.0, zero=True)
        named = [
            (f"layers.{i}.{kind}", of[n]) for i, of in enumerate(made) for n, kind in enumerate(("weight", "bias"))
        ]
        return loss, dict(named)
