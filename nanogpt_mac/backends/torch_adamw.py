"""torch's AdamW without `torch.optim.Optimizer`, whose constructor imports Dynamo: half of an eager run's imports."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw


class AdamW:
    """AdamW with nanoGPT's two groups: matrices and embeddings decay, vectors do not.

    The arithmetic is torch's own functional AdamW. Moments and steps lie open: float32, on the parameters' device
    (steps on the host unless `fused`; None takes torch's default). GradScaler takes it for an optimizer and asks by
    `_step_supports_amp_scaling` whether `step` itself heeds the `found_inf` that it sets: its contract with optimizers
    that are not torch's, as grad_scaler.py says.
    """

    def __init__(
        self, parameters: Iterable[Tensor], betas: tuple[float, float], weight_decay: float, fused: bool | None
    ) -> None:
        parameters = list(parameters)
        self.param_groups: list[dict[str, Any]] = [
            {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
        ]
        self.betas, self.fused = betas, fused
        self._step_supports_amp_scaling = bool(fused)
        self.exp_avg = {p: torch.zeros_like(p) for p in parameters}
        self.exp_avg_sq = {p: torch.zeros_like(p) for p in parameters}
        self.steps = {p: torch.zeros((), device=p.device if fused else None) for p in parameters}

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Update every parameter that has a gradient. RuntimeError where torch has no fused AdamW for the device."""
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            adamw(
                parameters,
                [p.grad for p in parameters],
                [self.exp_avg[p] for p in parameters],
                [self.exp_avg_sq[p] for p in parameters],
                [],
                [self.steps[p] for p in parameters],
                fused=self.fused,
                grad_scale=getattr(self, "grad_scale", None),
                found_inf=getattr(self, "found_inf", None),
                amsgrad=False,
                beta1=self.betas[0],
                beta2=self.betas[1],
                lr=lr,
                weight_decay=group["weight_decay"],
                eps=1e-8,
                maximize=False,
            )

    def zero_grad(self) -> None:
        """Free all gradients."""
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None
