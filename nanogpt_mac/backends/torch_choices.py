"""How torch runs a model where settings leave that open: by which kernels, as a CUDA graph, with which optimizer.

Each choice is made by asking this torch and this device what they can do; its lever makes the other choice.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch

from nanogpt_mac.backends.base import BackendOptions, Lever
from nanogpt_mac.backends.torch_adamw import AdamW
from nanogpt_mac.backends.torch_entry import TorchSettings
from nanogpt_mac.errors import InputError
from nanogpt_mac.gpt.spec import GPTSpec
from nanogpt_mac.gpt.torch_gpt import FewKernels


def products_round() -> bool:
    """Whether the CPU's products change at all at lower precision: asked by computing one."""
    matrix = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    before, exact = torch.get_float32_matmul_precision(), matrix @ matrix
    try:
        torch.set_float32_matmul_precision("medium")
        return not torch.equal(matrix @ matrix, exact)
    finally:
        torch.set_float32_matmul_precision(before)


LEVERS = (
    Lever(
        "backend.fused_adamw",
        False,
        "AdamW as torch's own loop over tensors, not one fused kernel",
        lambda _, config: config.backend.fused_adamw is not False,
    ),
    Lever(
        "matmul_precision",
        "medium",
        "float32 products rounded to bfloat16 inside",
        lambda here, config: (
            (here.device, config.dtype, config.matmul_precision) == ("cpu", "float32", "highest") and products_round()
        ),
    ),
    Lever(
        "backend.cuda_graph",
        False,
        "every kernel of an iteration sent by the host, as torch.compile calls them",
        lambda here, config: here.device == "cuda" and config.compile and config.backend.cuda_graph is not False,
    ),
    Lever(
        "backend.own_kernels",
        False,
        "torch.compile's and torch's kernels, not ours",
        lambda here, config: (
            here.device == "cuda" and (config.compile if (o := config.backend.own_kernels) is None else o)
        ),
    ),
    Lever("backend.compile_mode", "reduce-overhead", "the loss as CUDA graphs", lambda here, _: here.device == "cuda"),
)


class Choices:
    """Of one back end, each made when it is asked for. InputError for a setting that cannot be had here."""

    def __init__(self, spec: GPTSpec, options: BackendOptions, device: torch.device) -> None:
        self.spec, self.options, self.device = spec, options, device
        self.settings = TorchSettings(**options.settings)

    @property
    def few_kernels(self) -> FewKernels:
        """On MPS, where launches cost more than work; on a CPU where flash attention does not help: in 16 bits, with
        dropout, and compiled for short sequences."""
        if self.device.type == "cpu" and self.options.dtype != "float32":
            return "always"
        short = self.options.compile and self.spec.block_size <= 128  # at 256 tokens it is as fast
        helped = self.device.type == "cpu" and (self.spec.dropout > 0 or short)
        return "training" if helped or self.device.type == "mps" else "never"  # both have a fused one in evaluation

    @property
    def joint_graph(self) -> bool:
        """Whether a compiled forward and backward pass are one graph, with nothing computed twice between them: on a
        CPU. What `checkpointing` forgets would be kept there."""
        return self.device.type == "cpu" and self.options.compile and not self.options.checkpointing

    @property
    def cuda_graph(self) -> bool:
        """Whether an iteration is one CUDA graph: with compile=true, unless told otherwise."""
        asked, mode = self.settings.cuda_graph, self.settings.compile_mode
        own = self.options.compile and mode in ("reduce-overhead", "max-autotune")  # torch.compile makes graphs itself
        if asked and (self.device.type != "cuda" or own):
            why = f"backend.compile_mode={mode} makes graphs of its own" if own else f"{self.options.name} has none"
            raise InputError(f"backend.cuda_graph=true: {why}; use null or false")
        return self.device.type == "cuda" and not own and (self.options.compile if asked is None else asked)

    @property
    def token_graph(self) -> bool:
        """Whether a sampled token is one; eager too: sending its kernels takes the host three times their own time."""
        return self.device.type == "cuda" and self.settings.cuda_graph is not False

    @property
    def own_kernels(self) -> Any:
        """The module of our Triton kernels where the model takes them, else None.

        Unless told otherwise it does in a step that is compiled or one CUDA graph: eager, the host takes longer to send
        them than torch's own.
        """
        asked = self.settings.own_kernels
        wanted = self.options.compile or self.cuda_graph if asked is None else asked
        why_not = f"{self.options.name} has none" if self.device.type != "cuda" else None
        if why_not is None and wanted:
            if find_spec("triton") is None:
                why_not = "the package triton is not installed"
            else:
                from nanogpt_mac.gpt import fused, triton_ops

                why_not = triton_ops.fault(self.spec)
        if asked and why_not:
            raise InputError(f"backend.own_kernels=true: {why_not}; use null or false")
        return fused if why_not is None and wanted else None

    @property
    def fused_adamw(self) -> bool:
        """Whether AdamW is one kernel: wherever torch has it for this device, unless told otherwise."""
        asked = self.settings.fused_adamw
        why_not = "was asked for" if asked is False else self._fused_adamw_fault()
        if why_not and asked:
            raise InputError(f"backend.fused_adamw=true: torch {torch.__version__} {why_not}; use null or false")
        return not why_not

    def _fused_adamw_fault(self) -> str | None:
        """What is wrong with torch's fused AdamW on this device, asked by trying it."""
        p = torch.nn.Parameter(torch.ones(1, device=self.device))
        optimizer: Any = AdamW({"p": p}, (0.9, 0.999), weight_decay=0.0, fused=True)
        optimizer.take([torch.ones_like(p)])
        optimizer.found_inf = torch.ones((), device=self.device)  # what GradScaler sets after an overflow
        try:
            optimizer.step(lr=1.0)
        except RuntimeError:  # torch's own answer where a device has none
            return f"has no fused AdamW on {self.device.type}"
        if self.options.dtype == "float16" and p.item() != 1.0:  # MPS until pytorch PR 186360
            return f"updates weights after a float16 overflow in its fused AdamW on {self.device.type}"
        return None
