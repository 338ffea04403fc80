"""AdamW with nanoGPT's two groups on flat buffers: weights, gradients and moments of a model lie in one each.

An iteration then clips and updates with a handful of kernels, where one a tensor costs more than their work on a GPU.
`torch.optim.Optimizer` is not used: its constructor imports Dynamo, which is half of an eager run's imports.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

TAIL = 2  # floats behind the gradients, which go from rank to rank with them
PIECE = 1 << 16  # floats
PINNED = 1 << 30  # bytes; torch keeps pinned memory for the next time, which must not be all that a host has
EPS = 1e-8
ALIGNED = 16  # floats; vector instructions and the matrix product of a GPU want tensors to begin at 64 bytes


class AdamW:
    """Matrices and embeddings decay, vectors do not; the arithmetic is torch's own.

    `parameters` become views of the flat float32 `weights`; `moments` holds views, first and second, by name; `shared`
    is the gradients with room for the loss and a further number, so that ranks need one sum an iteration. Steps lie
    on the host unless the update is fused or capturable. GradScaler takes it for an optimizer and asks by
    `_step_supports_amp_scaling` whether `step` itself heeds the `found_inf` that it sets: its contract with optimizers
    that are not torch's, as grad_scaler.py says. `own`, of triton_ops.py, takes the place of torch's fused update.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        betas: tuple[float, float],
        weight_decay: float,
        fused: bool,
        capturable: bool = False,
        own: Callable[..., None] | None = None,
    ) -> None:
        self.betas, self.fused, self.capturable, self.own = betas, fused, capturable, own
        self._step_supports_amp_scaling = fused
        ordered = sorted(parameters, key=lambda name: parameters[name].dim() < 2)  # stable: matrices first
        ends = [0]
        for name in ordered:
            ends.append(ends[-1] + -(-parameters[name].numel() // ALIGNED) * ALIGNED)
        device = parameters[ordered[0]].device
        flat = [torch.zeros(ends[-1], device=device) for _ in range(4)]
        self.shared = torch.zeros(ends[-1] + TAIL, device=device)
        flat[1] = self.shared[: ends[-1]]
        self.weights, self.gradients, moment, square = flat
        self._flat = flat
        self.moments: dict[str, tuple[Tensor, Tensor]] = {}
        for name, start in zip(ordered, ends, strict=False):
            p = parameters[name]
            view, *moments = (b[start : start + p.numel()].view_as(p) for b in (self.weights, moment, square))
            p.data, self.moments[name] = view.copy_(p.data), (moments[0], moments[1])
        self.names, self.ordered, self._ends = ordered, [parameters[name] for name in ordered], ends
        self._places = {name: (ends[ordered.index(name)], p) for name, p in parameters.items()}
        self._gaps = [
            torch.zeros(end - start - p.numel(), device=device)
            for p, start, end in zip(self.ordered, ends, ends[1:], strict=False)
        ]
        self._matrices = sum(p.dim() >= 2 for p in self.ordered)
        split = ends[self._matrices]
        decay, no_decay = ([part[:split] for part in flat], [part[split:] for part in flat])
        self._groups = ((decay, weight_decay), (no_decay, 0.0))
        first, second = (torch.zeros((), device=device if fused or capturable else None) for _ in range(2))
        self.steps = (first, first) if fused else (first, second)  # torch's own function counts for each group
        self._clip = (first, 0.0)  # the norm of the gradients, and its limit
        self.param_groups = [{"params": [weights]} for (weights, *_), _ in self._groups]  # as GradScaler reads them
        for (weights, gradients, *_), _ in self._groups:
            weights.grad = gradients

    def copies(self) -> list[dict[str, np.ndarray]]:
        """Weights, first and second moments by name, on the host: views of one copy of each buffer."""
        kept = self.weights, *self._flat[2:]
        hosts = [torch.empty(b.shape, pin_memory=b.is_cuda and b.nbytes <= PINNED).copy_(b) for b in kept]
        return [
            {name: host[start : start + p.numel()].view_as(p).numpy() for name, (start, p) in self._places.items()}
            for host in hosts
        ]

    def parts(self, most: float) -> list[range]:
        """Numbers in `ordered`, at most so many bytes of gradients each unless of one tensor, as a backward pass ends
        with them: the last layer first. Vectors, which are small and of all layers, come before the embeddings."""
        cuts = [self._matrices]
        for number in reversed(range(self._matrices)):
            if 4 * (self._ends[cuts[-1]] - self._ends[number]) > most and number + 1 < cuts[-1]:
                cuts.append(number + 1)
        found = [range(start, end) for end, start in pairwise([*cuts, 0])]
        vectors = range(self._matrices, len(self.ordered))
        return [*found[:-1], vectors, found[-1]] if len(found) > 1 else [range(len(self.ordered))]

    def take(self, gradients: Sequence[Tensor], add: bool = False, part: range | None = None) -> Tensor:
        """Take, or add to those taken, the gradients of `ordered`, or of a `part` of them; where they lie in `shared`,
        with what goes behind the last."""
        first, last = (part.start, part.stop) if part else (0, len(self.ordered))
        into, gaps = self.gradients[self._ends[first] : self._ends[last]], self._gaps[first:last]
        pieces = [t for g, gap in zip(gradients, gaps, strict=True) for t in (g.reshape(-1), gap) if t.numel()]
        if add:
            into.add_(torch.cat(pieces))
        else:
            torch.cat(pieces, out=into)
        return self.shared[self._ends[first] : self._ends[last] if last < len(self.ordered) else None]

    def clip(self, limit: float) -> Tensor:
        """Scale the gradients to a global norm of at most `limit` (0: leave them); the norm before, (). `own` scales
        them as it reads them."""
        self._clip = norm, limit = _norm(self.gradients), limit
        if limit and self.own is None:
            self.gradients.mul_(torch.clamp(limit / (norm + 1e-6), max=1.0))  # as torch.nn.utils.clip_grad_norm_
        return norm

    @torch.no_grad()
    def step(self, lr: float | Tensor) -> None:
        """Update the weights. RuntimeError where torch has no fused AdamW for the device."""
        found_inf = getattr(self, "found_inf", None)
        if self.fused:
            self.steps[0].add_(1.0)
        if self.own is not None:
            rate = lr if isinstance(lr, Tensor) else torch.full((), lr, device=self.weights.device)
            decaying, (norm, limit) = self._ends[self._matrices], self._clip
            decay = self._groups[0][1]
            self.own(self._flat, decaying, rate, self.steps[0], norm, found_inf, self.betas, decay, limit, EPS)
        else:
            self._update(lr, found_inf)
        if self.fused and found_inf is not None:
            self.steps[0].sub_(found_inf)  # a step that the kernel left out

    def _update(self, lr: float | Tensor, found_inf: Tensor | None) -> None:
        beta1, beta2 = self.betas
        given: dict[str, Any] = {
            "amsgrad": False,
            "maximize": False,
            "lr": lr,
            "beta1": beta1,
            "beta2": beta2,
            "eps": EPS,
        } | ({"found_inf": found_inf} if self.fused else {"capturable": self.capturable})
        update: Any = torch._fused_adamw_ if self.fused else adamw
        for (buffers, weight_decay), steps in zip(self._groups, self.steps, strict=True):
            update(*([buffer] for buffer in buffers), [], [steps], weight_decay=weight_decay, **given)


def _norm(numbers: Tensor) -> Tensor:
    """Of a whole buffer, (). On a CPU by pieces, which threads share: torch adds squares one after the other, in
    float32, which is 4e-4 off for 10 million of them, and 1 % for 124 million."""
    if not numbers.is_cpu:
        return torch.linalg.vector_norm(numbers)
    whole = numbers[: len(numbers) // PIECE * PIECE].view(-1, PIECE)
    of_pieces, of_rest = torch.linalg.vector_norm(whole, dim=1), torch.linalg.vector_norm(numbers[whole.numel() :])
    return torch.linalg.vector_norm(torch.cat((of_pieces, of_rest.view(1))))
