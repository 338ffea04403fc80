"""The small networks and their optimizers in numpy, float64, written from the formulas: the independent reference."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from nanogpt_mac.backends.nets import LMSpec, MLPSpec, Spec, positions

Weights = dict[str, np.ndarray]
BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8  # AdamW's, in both frameworks
NORM_EPSILON = 1e-5
CLOSE_TO_ZERO = 3e-5  # of a ReLU's input, which is about 1
UNDECIDED = 1e-6  # the same, of its root mean square: some five times what rounding to float32 moves it by


class Twin:
    """One network, and its training, from the given weights."""

    def __init__(self, spec: Spec, weights: Mapping[str, np.ndarray]) -> None:
        self.spec, self.steps = spec, 0
        self.weights: Weights = {name: values.astype(np.float64) for name, values in weights.items()}
        self.first: Weights = {name: np.zeros_like(values) for name, values in self.weights.items()}
        self.second: Weights = {name: np.zeros_like(values) for name, values in self.weights.items()}

    def logits(self, inputs: np.ndarray) -> np.ndarray:
        return self._run(inputs)[0]

    def _run(self, inputs: np.ndarray) -> tuple[np.ndarray, Any]:
        """The logits, and what the way back needs."""
        if isinstance(self.spec, MLPSpec):
            return _mlp(self.spec, self.weights, inputs)
        return _lm(self.spec, self.weights, inputs)

    def gradients(self, inputs: np.ndarray, targets: np.ndarray) -> tuple[float, Weights]:
        """The mean cross entropy and its gradients by name."""
        value, kept, dy = self._loss(inputs, targets)
        if isinstance(self.spec, MLPSpec):
            return value, _mlp_back(self.spec, self.weights, kept, dy)
        return value, _lm_back(self.spec, self.weights, kept, dy)

    def doubts(self, inputs: np.ndarray, targets: np.ndarray) -> dict[str, float]:
        """How far rounding to float32 may move each gradient, relative to it, by putting ReLU inputs on the other side
        of zero: all that are so near do. An MLP's rows are chosen so that it has none (`clear_epoch`)."""
        if isinstance(self.spec, MLPSpec):
            return dict.fromkeys(self.weights, 0.0)
        _, kept, dy = self._loss(inputs, targets)
        one, other = (_lm_back(self.spec, self.weights, kept, dy, turned) for turned in (False, True))
        return {name: float(np.linalg.norm(other[name] - g) / (np.linalg.norm(g) or 1.0)) for name, g in one.items()}

    def _loss(self, inputs: np.ndarray, targets: np.ndarray) -> tuple[float, Any, np.ndarray]:
        """The mean cross entropy, what the way back needs, and the gradient of the logits."""
        logits, kept = self._run(inputs)
        flat, classes = logits.reshape(-1, logits.shape[-1]), targets.reshape(-1).astype(np.intp)
        shares = np.exp(flat - flat.max(1, keepdims=True))
        shares /= shares.sum(1, keepdims=True)
        rows = np.arange(len(classes))
        value = -float(np.log(shares[rows, classes]).mean())
        shares[rows, classes] -= 1
        return value, kept, (shares / len(classes)).reshape(logits.shape)

    def step(self, inputs: np.ndarray, targets: np.ndarray) -> float:
        value, gradients = self.gradients(inputs, targets)
        self.steps += 1
        for name, g in gradients.items():
            w = self.weights[name]
            if isinstance(self.spec, MLPSpec):
                w -= self.spec.lr * g
                continue
            m, v = self.first[name], self.second[name]
            m += (1 - BETA1) * (g - m)
            v += (1 - BETA2) * (g * g - v)
            w *= 1 - self.spec.lr * self.spec.weight_decay
            w -= self.spec.lr * (m / (1 - BETA1**self.steps)) / (np.sqrt(v / (1 - BETA2**self.steps)) + EPSILON)
        return value

    def epoch(self, inputs: np.ndarray, targets: np.ndarray, order: np.ndarray, batch: int) -> None:
        for start in range(0, len(order), batch):
            rows = order[start : start + batch]
            self.step(inputs[rows], targets[rows])

    def clear_epoch(self, inputs: np.ndarray, targets: np.ndarray, order: np.ndarray, batch: int) -> np.ndarray:
        """As `epoch`, but without the rows that float32 may see otherwise: where a ReLU's input is so close to zero
        that rounding decides. The rows that were taken, in their order: nearly all."""
        taken: list[np.ndarray] = []
        at = 0
        while at < len(order):
            rows = order[at : at + batch]
            at += len(rows)
            rows = rows[self._clear(inputs[rows])]
            while len(rows) < batch and at < len(order):
                more = order[at : at + batch - len(rows)]
                at += len(more)
                rows = np.concatenate([rows, more[self._clear(inputs[more])]])
            if len(rows):
                self.step(inputs[rows], targets[rows])
                taken.append(rows)
        return np.concatenate(taken)

    def _clear(self, inputs: np.ndarray) -> np.ndarray:
        """Which rows are."""
        clear = np.ones(len(inputs), bool)
        if isinstance(self.spec, MLPSpec):
            x = inputs.astype(np.float64)
            for i in range(len(self.spec.widths) - 2):
                x = _linear(self.weights, f"layers.{i}", x)
                clear &= np.abs(x).min(1) > CLOSE_TO_ZERO
                x = np.maximum(x, 0)
        return clear


def _linear(w: Weights, name: str, x: np.ndarray) -> np.ndarray:
    y = x @ w[f"{name}.weight"].T
    return y + w[f"{name}.bias"] if f"{name}.bias" in w else y


def _linear_back(w: Weights, g: Weights, name: str, x: np.ndarray, dy: np.ndarray) -> np.ndarray:
    flat = dy.reshape(-1, dy.shape[-1])
    g[f"{name}.weight"] = flat.T @ x.reshape(-1, x.shape[-1])
    if f"{name}.bias" in w:
        g[f"{name}.bias"] = flat.sum(0)
    return dy @ w[f"{name}.weight"]


def _mlp(spec: MLPSpec, w: Weights, x: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    kept = [x.astype(np.float64)]
    for i in range(len(spec.widths) - 1):
        y = _linear(w, f"layers.{i}", kept[-1])
        kept.append(np.maximum(y, 0) if i < len(spec.widths) - 2 else y)
    return kept.pop(), kept


def _mlp_back(spec: MLPSpec, w: Weights, kept: list[np.ndarray], dy: np.ndarray) -> Weights:
    g: Weights = {}
    for i in reversed(range(len(spec.widths) - 1)):
        dy = _linear_back(w, g, f"layers.{i}", kept[i], dy) * (kept[i] > 0)
    return g


def _norm(w: Weights, name: str, x: np.ndarray) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
    x = x - x.mean(-1, keepdims=True)
    scale = 1 / np.sqrt((x * x).mean(-1, keepdims=True) + NORM_EPSILON)
    return x * scale * w[f"{name}.weight"] + w[f"{name}.bias"], (x * scale, scale)


def _norm_back(w: Weights, g: Weights, name: str, kept: tuple[np.ndarray, np.ndarray], dy: np.ndarray) -> np.ndarray:
    unit, scale = kept
    leading = tuple(range(dy.ndim - 1))
    g[f"{name}.weight"], g[f"{name}.bias"] = (dy * unit).sum(leading), dy.sum(leading)
    d = dy * w[f"{name}.weight"]
    return scale * (d - d.mean(-1, keepdims=True) - unit * (d * unit).mean(-1, keepdims=True))


def _lm(spec: LMSpec, w: Weights, tokens: np.ndarray) -> tuple[np.ndarray, dict[str, Any]]:
    batch, length = tokens.shape
    heads = (batch, length, spec.heads, -1)
    x = w["embedding.weight"][tokens] + positions(spec.context, spec.width)[:length]
    hidden = np.triu(np.ones((length, length), bool), 1)
    kept: dict[str, Any] = {"tokens": tokens}
    for i in range(spec.blocks):
        at = f"blocks.{i}"
        y, norm1 = _norm(w, f"{at}.ln1", x)
        q, k, v = (_linear(w, f"{at}.{n}", y).reshape(heads).swapaxes(1, 2) for n in ("query", "key", "value"))
        scores = q @ k.swapaxes(2, 3) * q.shape[-1] ** -0.5
        shares = np.exp(np.where(hidden, -np.inf, scores) - np.where(hidden, -np.inf, scores).max(-1, keepdims=True))
        shares /= shares.sum(-1, keepdims=True)
        mixed = (shares @ v).swapaxes(1, 2).reshape(batch, length, -1)
        x = x + _linear(w, f"{at}.out", mixed)
        z, norm2 = _norm(w, f"{at}.ln2", x)
        up = _linear(w, f"{at}.linear1", z)
        near = np.abs(up) < UNDECIDED * np.sqrt((up * up).mean())
        up = np.maximum(up, 0)
        x = x + _linear(w, f"{at}.linear2", up)
        kept[at] = (norm1, y, q, k, v, shares, mixed, norm2, z, up, near)
    x, kept["norm"] = _norm(w, "ln", x)
    kept["last"] = x
    return _linear(w, "head", x), kept


def _lm_back(spec: LMSpec, w: Weights, kept: dict[str, Any], dy: np.ndarray, turned: bool = False) -> Weights:
    """`turned`: ReLUs whose input is so near zero that rounding decides are open where they are closed."""
    g: Weights = {}
    dx = _norm_back(w, g, "ln", kept["norm"], _linear_back(w, g, "head", kept["last"], dy))
    for i in reversed(range(spec.blocks)):
        at = f"blocks.{i}"
        norm1, y, q, k, v, shares, mixed, norm2, z, up, near = kept[at]
        du = _linear_back(w, g, f"{at}.linear2", up, dx) * ((up > 0) ^ (near & turned))
        dx = dx + _norm_back(w, g, f"{at}.ln2", norm2, _linear_back(w, g, f"{at}.linear1", z, du))
        do = _linear_back(w, g, f"{at}.out", mixed, dx).reshape(*dx.shape[:2], spec.heads, -1).swapaxes(1, 2)
        ds = do @ v.swapaxes(2, 3)
        ds = shares * (ds - (ds * shares).sum(-1, keepdims=True)) * q.shape[-1] ** -0.5
        parts = {"query": ds @ k, "key": ds.swapaxes(2, 3) @ q, "value": shares.swapaxes(2, 3) @ do}
        dn = sum(_linear_back(w, g, f"{at}.{n}", y, d.swapaxes(1, 2).reshape(dx.shape)) for n, d in parts.items())
        dx = dx + _norm_back(w, g, f"{at}.ln1", norm1, np.asarray(dn))
    g["embedding.weight"] = np.zeros_like(w["embedding.weight"])
    np.add.at(g["embedding.weight"], kept["tokens"], dx)
    return g
