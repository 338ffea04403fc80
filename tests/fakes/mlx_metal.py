"""`mx.fast.metal_kernel` over the shim: signatures as MLX's metal_kernel.cpp writes them, arrays on the CPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from nanogpt_mac.simulator.metal import compiled, run

CONSTANT = 8  # inputs of fewer numbers are passed in the constant address space
TYPES = {mx.float32: "float", mx.uint32: "uint32_t"}
ATTRIBUTES = {"thread_position_in_grid": "uint3", "thread_position_in_threadgroup": "uint3"}
launched: Counter[str] = Counter()


def metal_kernel(
    name: str, input_names: Sequence[str], output_names: Sequence[str], source: str, header: str
) -> Callable[..., list[mx.array]]:
    def call(
        inputs: Sequence[mx.array], output_shapes: Any, output_dtypes: Any, grid: Any, threadgroup: Any
    ) -> list[mx.array]:
        assert len(inputs) == len(input_names)
        parameters = []
        for index, (word, array) in enumerate(zip(input_names, inputs, strict=True)):
            space = "constant" if array.size < CONSTANT else "device"
            kind = f"const {space} {TYPES[array.dtype]}{'*' if array.ndim else '&'}"
            parameters.append(f"{kind} {word} [[buffer({index})]]")
        for index, (word, dtype) in enumerate(zip(output_names, output_dtypes, strict=True), len(inputs)):
            parameters.append(f"device {TYPES[dtype]}* {word} [[buffer({index})]]")
        parameters += [f"{kind} {word} [[{word}]]" for word, kind in ATTRIBUTES.items() if word in source]
        whole = f"{header}\n[[kernel]] void custom_kernel_{name}(\n{', '.join(parameters)}) {{\n{source}\n}}\n"
        kernels, library = compiled(whole)
        kernel = kernels[f"custom_kernel_{name}"]
        given = [np.ascontiguousarray(np.array(array)) for array in inputs]
        made = [np.full(shape, np.nan, np.float32) for shape in output_shapes]
        addresses = [array.ctypes.data for array in (*given, *made)]
        run(kernel, getattr(library, kernel.symbol), addresses, grid, threadgroup)
        launched[name] += 1
        return [mx.array(array) for array in made]

    return call
