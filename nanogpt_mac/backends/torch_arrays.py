"""torch's operations for the suites, on any of its devices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nanogpt_mac import simulator
from nanogpt_mac.backends.arrays import Arrays, Function, Op
from nanogpt_mac.backends.base import Kind


class TorchArrays(Arrays):
    def __init__(self, kind: Kind, device: str, compiled: bool) -> None:
        self.device = torch.device("mps" if device == simulator.DEVICE_NAME else device)
        self.simulated, self.compiled = device == simulator.DEVICE_NAME, compiled
        accelerators: dict[str, Any] = {"mps": torch.mps, "cuda": torch.cuda}
        self.accelerator: Any = accelerators.get(self.device.type)
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False  # of convolutions, where torch allows it unasked

    def put(self, array: np.ndarray, dtype: str | None = None) -> Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(array)).to(self.device, copy=True)
        if dtype is not None:
            tensor = tensor.to(getattr(torch, dtype))
        self.wait(())
        return tensor

    def get(self, array: Tensor) -> np.ndarray:
        tensor = array.detach()
        tensor = tensor.float() if tensor.dtype == torch.bfloat16 else tensor
        return tensor.cpu().numpy().copy()

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

    def free_memory(self) -> int:
        return int(torch.cuda.mem_get_info()[0]) if self.device.type == "cuda" else super().free_memory()

    def release(self) -> None:
        if self.compiled:
            torch.compiler.reset()  # or the ninth shape of a function would run eagerly, without a word
        if self.accelerator is not None:
            self.accelerator.empty_cache()

    def counted(self) -> Mapping[str, int] | None:
        if not self.simulated:
            return None
        found = simulator.counts()
        fallbacks = sum(simulator.operators("fallback").values())
        simulator.reset_counts()
        return {"kernels": found.kernels, "waits": found.waits, "fallbacks": fallbacks}


OPS: dict[str, Op] = {
    "relu": Op(F.relu),
    "matmul": Op(torch.matmul),
}
