"""The parity gate's reference: GPT-2, its loss, clipping and AdamW from their formulas, in float64 on the CPU.

It shares nothing with the back ends but parameter names and the token windows: no module, fused kernel, autocast or
optimizer of torch's, so an error that both twins share would show. Only differentiation is torch's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nanogpt_mac.gpt.spec import GPTSpec

Tensors = dict[str, Tensor]
SLICE_TOKENS, SLICE_LOGITS = 2048, 6e7  # computed at once: 2 GB or less at nanoGPT's sizes


@dataclass(frozen=True)
class Recipe:
    """Settings of AdamW and of the clip."""

    weight_decay: float
    beta1: float
    beta2: float
    clip: float | None  # in norms of the first gradient; None: no clipping


@dataclass
class Trained:
    """What the optimizer steps from given weights did."""

    losses: list[float]
    norms: list[float]  # of each step's gradient before clipping
    grad_clip: float  # the norm that gradients were clipped to; 0: none
    gradients: Tensors  # the first step's, before clipping
    weights: Tensors
    exp_avg_sq: Tensors  # without bias correction


def tensors(weights: Mapping[str, np.ndarray]) -> Tensors:
    """Float64 copies that can be differentiated by."""
    return {name: torch.from_numpy(w.astype(np.float64)).requires_grad_() for name, w in weights.items()}


def logits(w: Tensors, spec: GPTSpec, idx: Tensor) -> Tensor:
    """Float64 (B, T, vocab_size) of int64 tokens (B, T)."""

    def linear(x: Tensor, name: str) -> Tensor:
        y = x @ w[f"{name}.weight"].T
        return y + w[f"{name}.bias"] if spec.bias else y

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        y = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w[f"{name}.weight"]
        return y + w[f"{name}.bias"] if spec.bias else y

    def gelu(x: Tensor) -> Tensor:
        if spec.gelu == "exact":
            return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    def attention(x: Tensor, name: str) -> Tensor:
        q, k, v = (t.unflatten(-1, (spec.n_head, -1)).movedim(2, 1) for t in linear(x, f"{name}.c_attn").chunk(3, -1))
        scores = q @ k.mT / math.sqrt(spec.n_embd / spec.n_head)
        scores = scores.masked_fill(later, -math.inf)
        mixed = (scores - scores.logsumexp(-1, keepdim=True)).exp() @ v
        return linear(mixed.movedim(1, 2).flatten(2), f"{name}.c_proj")

    T = idx.shape[1]
    later = torch.arange(T)[None, :] > torch.arange(T)[:, None]
    x = w["transformer.wte.weight"][idx] + w["transformer.wpe.weight"][:T]
    for i in range(spec.n_layer):
        block = f"transformer.h.{i}"
        x = x + attention(norm(x, f"{block}.ln_1"), f"{block}.attn")
        x = x + linear(gelu(linear(norm(x, f"{block}.ln_2"), f"{block}.mlp.c_fc")), f"{block}.mlp.c_proj")
    return norm(x, "transformer.ln_f") @ w["transformer.wte.weight"].T


def cross_entropies(scores: Tensor, targets: Tensor) -> Tensor:
    """-log softmax at each target, in nats."""
    return scores.logsumexp(-1) - scores.gather(-1, targets[..., None])[..., 0]


def logits_of(w: Tensors, spec: GPTSpec, idx: np.ndarray) -> np.ndarray:
    """Float32 logits (B, T, vocab_size) of tokens (B, T), in slices, so that memory stays bounded."""
    with torch.no_grad():
        slices = torch.from_numpy(idx.astype(np.int64)).split(_rows(spec, idx))
        return torch.cat([logits(w, spec, some).float() for some in slices]).numpy()


def loss_of(w: Tensors, spec: GPTSpec, window: np.ndarray) -> float:
    """The loss of token windows (B, T + 1)."""
    with torch.no_grad():
        return sum(share * loss.item() for share, loss in _losses(w, spec, window[:, :-1], window[:, 1:]))


def gradients(w: Tensors, spec: GPTSpec, idx: np.ndarray, targets: np.ndarray) -> tuple[float, Tensors]:
    """The loss of `targets` (B, T) after tokens `idx` (B, T), and its gradients, in the weights' own type."""
    total, names = 0.0, list(w)
    grads = {name: torch.zeros_like(p) for name, p in w.items()}
    for share, loss in _losses(w, spec, idx, targets):
        total += share * loss.item()
        for name, g in zip(names, torch.autograd.grad(loss, list(w.values())), strict=True):
            grads[name].add_(g, alpha=share)
    return total, grads


def _losses(w: Tensors, spec: GPTSpec, idx: np.ndarray, targets: np.ndarray) -> Iterator[tuple[float, Tensor]]:
    """The mean loss of one slice after another with its share of the whole; a row that is there twice counts twice."""
    both = np.concatenate([idx, targets], axis=1).astype(np.int64)
    rows, counts = np.unique(both, axis=0, return_counts=True)
    size = _rows(spec, idx)
    for some, often in zip(torch.from_numpy(rows).split(size), torch.from_numpy(counts).split(size), strict=True):
        each = cross_entropies(logits(w, spec, some[:, : idx.shape[1]]), some[:, idx.shape[1] :]).mean(-1)
        yield often.sum().item() / len(idx), (each * often).sum() / often.sum()


def _rows(spec: GPTSpec, idx: np.ndarray) -> int:
    return max(1, min(SLICE_TOKENS // idx.shape[1], int(SLICE_LOGITS / (idx.shape[1] * spec.vocab_size))))


def train(start: Tensors, spec: GPTSpec, recipe: Recipe, batches: list[np.ndarray], rates: list[float]) -> Trained:
    """One step for each of `batches` (accumulation, B, T + 1): gradients, clip by global norm, AdamW."""
    w = {name: p.detach().clone().requires_grad_() for name, p in start.items()}
    m = {name: torch.zeros_like(p) for name, p in w.items()}
    v = {name: torch.zeros_like(p) for name, p in w.items()}
    trained = Trained([], [], 0.0, {}, w, v)
    for step, (windows, lr) in enumerate(zip(batches, rates, strict=True), 1):
        parts = [gradients(w, spec, window[:, :-1], window[:, 1:]) for window in windows]
        trained.losses.append(sum(loss for loss, _ in parts) / len(parts))
        grads = {name: sum((g[name] for _, g in parts), torch.zeros(())) / len(parts) for name in w}
        trained.norms.append(math.sqrt(sum(g.square().sum().item() for g in grads.values())))
        if step == 1:
            trained.gradients, trained.grad_clip = grads, (recipe.clip or 0.0) * trained.norms[0]
        clip = min(1.0, trained.grad_clip / (trained.norms[-1] + 1e-6)) if recipe.clip else 1.0
        with torch.no_grad():
            for name, p in w.items():
                g = grads[name] * clip
                m[name] = recipe.beta1 * m[name] + (1 - recipe.beta1) * g
                v[name] = recipe.beta2 * v[name] + (1 - recipe.beta2) * g.square()
                m_hat, v_hat = m[name] / (1 - recipe.beta1**step), v[name] / (1 - recipe.beta2**step)
                decay = recipe.weight_decay if p.dim() >= 2 else 0.0  # matrices alone
                p -= lr * (decay * p + m_hat / (v_hat.sqrt() + 1e-8))
    return trained
