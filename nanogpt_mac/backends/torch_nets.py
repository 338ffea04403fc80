"""The small networks in torch, on any of its devices. mlx_nets.py has their twins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanogpt_mac.backends.nets import LMSpec, MLPSpec, Net, positions
from nanogpt_mac.backends.torch_arrays import TorchArrays


class MLP(nn.Module):
    def __init__(self, spec: MLPSpec) -> None:
        super().__init__()
        widths = zip(spec.widths, spec.widths[1:], strict=False)
        self.layers = nn.ModuleList([nn.Linear(inner, outer) for inner, outer in widths])

    def forward(self, x: Tensor) -> Tensor:
        *hidden, last = self.layers
        for layer in hidden:
            x = F.relu(layer(x))
        return last(x)


class Block(nn.Module):
    def __init__(self, spec: LMSpec) -> None:
        super().__init__()
        w, self.heads = spec.width, spec.heads
        self.ln1, self.ln2 = nn.LayerNorm(w), nn.LayerNorm(w)
        self.query, self.key, self.value, self.out = (nn.Linear(w, w, bias=False) for _ in range(4))
        self.linear1, self.linear2 = nn.Linear(w, 4 * w), nn.Linear(4 * w, w)

    def forward(self, x: Tensor) -> Tensor:
        y = self.ln1(x)
        q, k, v = (self._split(projection(y)) for projection in (self.query, self.key, self.value))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.linear2(F.relu(self.linear1(self.ln2(x))))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class LM(nn.Module):
    def __init__(self, spec: LMSpec) -> None:
        super().__init__()
        self.embedding = nn.Embedding(spec.vocab, spec.width)
        self.positions = nn.Buffer(torch.from_numpy(positions(spec.context, spec.width)), persistent=False)
        self.blocks = nn.ModuleList([Block(spec) for _ in range(spec.blocks)])
        self.ln, self.head = nn.LayerNorm(spec.width), nn.Linear(spec.width, spec.vocab)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.positions[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.ln(x))


class TorchNet(Net):
    arrays: TorchArrays

    def build(self) -> None:
        spec = self.spec
        made = MLP(spec) if isinstance(spec, MLPSpec) else LM(spec)
        self.model = made.to(self.arrays.device)
        self._start_afresh()

        def loss(inputs: Tensor, targets: Tensor) -> Tensor:
            return F.cross_entropy(self.model(inputs).flatten(0, -2), targets.flatten())

        compiled = self.arrays.compiled
        self.loss = torch.compile(loss, dynamic=False) if compiled else loss
        self.infer = self.arrays.ready(self.model)  # type: ignore[method-assign]

    def _start_afresh(self) -> None:
        spec, parameters = self.spec, self.model.parameters()
        self.optimizer: torch.optim.Optimizer = (
            torch.optim.SGD(parameters, lr=spec.lr)
            if isinstance(spec, MLPSpec)
            else torch.optim.AdamW(parameters, lr=spec.lr, weight_decay=spec.weight_decay)
        )

    def put(self, rows: np.ndarray) -> Tensor:
        given = torch.from_numpy(np.ascontiguousarray(rows))
        whole = given if given.dtype.is_floating_point else given.long()  # classes, tokens and indices are int64 here
        return whole.to(self.arrays.device)

    def named(self) -> Sequence[tuple[str, Tensor]]:
        return list(self.model.named_parameters())

    def load(self, weights: Mapping[str, np.ndarray]) -> None:
        self.model.load_state_dict({name: torch.from_numpy(values) for name, values in weights.items()})
        self._start_afresh()

    def step(self, inputs: Tensor, targets: Tensor) -> Tensor:
        self.optimizer.zero_grad()
        loss = self.loss(inputs, targets)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def infer(self, inputs: Tensor) -> Tensor:
        raise AssertionError("build() puts the model here")

    def gradients(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        names, parameters = zip(*self.named(), strict=True)
        loss = self.loss(inputs, targets)
        return loss.detach(), dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))
