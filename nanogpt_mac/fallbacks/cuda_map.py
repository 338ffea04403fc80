"""`map=cuda:mps`: a program that asks for "cuda" gets MPS, and the report says where it asked.

Devices in calls of torch's interface are mapped by the function mode (program.py); what is no such call is replaced
here: the functions of torch.cuda, autocast, the gradient scaler, generators.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch

_CUDA = re.compile(r"cuda(:\d+)?$")
_IS_CUDA, _IS_MPS = torch.Tensor.is_cuda.__get__, torch.Tensor.is_mps.__get__  # type: ignore[attr-defined]


class CudaMap:
    """Maps devices, and knows what has asked for CUDA."""

    def __init__(self) -> None:
        self.names: dict[str, None] = {}

    def used(self) -> list[str]:
        return list(self.names)

    def device(self, value: Any) -> Any:
        """`value` with "cuda" read as "mps"; anything but a device as it is."""
        if isinstance(value, torch.device):
            return torch.device("mps") if value.type == "cuda" else value
        return "mps" if isinstance(value, str) and _CUDA.match(value) else value

    def mapped(self, func: Any, args: Any, kwargs: Any) -> tuple[Any, Any, Any]:
        """A call as it is made for MPS."""
        if func is torch.Tensor.cuda:
            self.names["Tensor.cuda"] = None
            asynchronous = kwargs.get("non_blocking", args[2] if len(args) > 2 else False)
            return torch.Tensor.to, (args[0], "mps"), {"non_blocking": asynchronous}
        if func is torch.Tensor.pin_memory:
            self.names["Tensor.pin_memory"] = None
            return _same, args[:1], {}
        if func == _IS_CUDA:
            return _IS_MPS, args, kwargs
        changed = tuple(self.device(value) if isinstance(value, str | torch.device) else value for value in args)
        named = {key: self.device(value) if key == "device" else value for key, value in kwargs.items()}
        if any(new is not old for new, old in zip(changed, args, strict=True)) or named != kwargs:
            self.names['device "cuda"'] = None
        return func, changed, named

    def install(self) -> None:
        """Replaces what is no call of the interface."""
        cuda: Any = torch.cuda
        answers: dict[str, Callable[..., Any]] = {
            "is_available": lambda: True,
            "is_initialized": lambda: True,
            "init": lambda: None,
            "device_count": lambda: 1,
            "current_device": lambda: 0,
            "set_device": lambda device: None,
            "get_device_name": lambda device=None: "MPS",
            "get_device_capability": lambda device=None: (8, 0),
            "is_bf16_supported": lambda *_: True,
            "is_current_stream_capturing": lambda: False,
            "synchronize": lambda device=None: torch.mps.synchronize(),
            "empty_cache": torch.mps.empty_cache,
            "manual_seed": torch.mps.manual_seed,
            "manual_seed_all": torch.mps.manual_seed,
            "seed": torch.mps.seed,
            "memory_allocated": lambda device=None: torch.mps.current_allocated_memory(),
            "max_memory_allocated": lambda device=None: torch.mps.current_allocated_memory(),
            "memory_reserved": lambda device=None: torch.mps.driver_allocated_memory(),
            "reset_peak_memory_stats": lambda device=None: None,
        }
        for name, answer in answers.items():
            setattr(cuda, name, self._noted(f"torch.cuda.{name}", answer))
        cuda.Event = lambda enable_timing=False, **_: torch.mps.Event(enable_timing)
        for owner in (torch.amp.autocast_mode.autocast, torch.amp.grad_scaler.GradScaler):
            owner.__init__ = self._at(1, owner.__init__)  # type: ignore[method-assign]
        module: Any = torch
        module.load, module.set_default_device = self._at(1, torch.load), self._at(0, torch.set_default_device)

    def _noted(self, name: str, answer: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.names[name] = None
            return answer(*args, **kwargs)

        return call

    def _at(self, position: int, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function whose argument at `position`, or one of these names, is a device."""
        names = ("device", "device_type", "map_location")

        def call(*args: Any, **kwargs: Any) -> Any:
            args = tuple(self.device(a) if i == position else a for i, a in enumerate(args))
            return function(*args, **{k: self.device(v) if k in names else v for k, v in kwargs.items()})

        return call


def _same(tensor: Any) -> Any:
    return tensor
