"""The kernels of backends/by_hand in numpy, float64: what each must give, and the sum of its absolute terms."""

from __future__ import annotations

from typing import Any

import numpy as np

from nanogpt_mac.backends.by_hand.launches import Launch

Arrays = dict[str, np.ndarray]
Expected = dict[int, tuple[np.ndarray, Any]]  # number of the parameter -> its values, and what errors are relative to


def drawn(launch: Launch, widths: tuple[int, ...], rows: int, seed: int) -> list[np.ndarray]:
    """Arrays for a launch of a step of `rows` rows, by their names' meaning."""
    rng = np.random.default_rng(seed)
    images = 40

    def one(name: str) -> np.ndarray:
        kind, number = name.rstrip("0123456789"), name[len(name.rstrip("0123456789")) :]
        i = int(number or 0)
        shapes = {
            "x": (rows, widths[i]), "d": (rows, widths[i]), "loss": (rows,), "shares": (rows, widths[-1]),
            "images": (images, widths[0]), "w": widths[i : i + 2][::-1], "gw": widths[i : i + 2][::-1],
            "b": widths[i + 1 : i + 2], "gb": widths[i + 1 : i + 2],
        }  # fmt: skip
        if kind == "y":
            return rng.integers(0, widths[-1], rows).astype(np.int32)
        if kind == "classes":
            return rng.integers(0, widths[-1], images).astype(np.int32)
        if kind == "order":
            return rng.integers(0, images, rows + 5).astype(np.int32)
        if kind == "behind":
            return np.array([3], np.int32)
        made = rng.standard_normal(shapes[kind]).astype(np.float32)
        if kind == "shares":
            made = np.exp(made) / np.exp(made).sum(1, keepdims=True)
        return made

    return [one(name) for name in launch.arrays]


def expected(launch: Launch, arrays: list[np.ndarray]) -> Expected:
    """What a launch must have made of `arrays`."""
    given = [a.astype(np.float64) if a.dtype == np.float32 else a for a in arrays]
    kernel, (m, n, _), rate = launch.kernel, launch.size, launch.rate or 0.0
    if kernel.startswith("matmul"):
        a, b = given[:2]
        a, b = (a.T if kernel.endswith("tn") else a), (b.T if kernel.endswith("nt") else b)
        return {2: (a @ b, abs(a) @ abs(b))}
    if kernel in ("linear", "linear_relu"):
        x, w, b = given[:3]
        y = x @ w.T + b
        return {3: (np.maximum(y, 0) if kernel == "linear_relu" else y, abs(x) @ abs(w).T + abs(b))}
    if kernel == "linear_backward_input":
        dy, w, x = given[:3]
        return {3: (np.where(x > 0, dy @ w, 0), abs(dy) @ abs(w))}
    if kernel == "linear_backward_weight":
        dy, x, w, b = given
        return {
            2: (w - rate * dy.T @ x, abs(w) + abs(rate) * abs(dy).T @ abs(x)),
            3: (b - rate * dy.sum(0), abs(b) + abs(rate) * abs(dy).sum(0)),
        }
    if kernel == "add_bias":
        return {0: (given[0] + given[1], abs(given[0]) + abs(given[1]))}
    if kernel == "relu":
        return {0: (np.maximum(given[0], 0), 1)}
    if kernel == "relu_backward":
        return {0: (np.where(given[1] > 0, given[0], 0), 1)}
    if kernel == "column_sum":
        return {1: (given[0].sum(0), abs(given[0]).sum(0))}
    if kernel == "sgd":
        return {0: (given[0] - rate * given[1], abs(given[0]) + abs(rate * given[1]))}
    if kernel == "advance":
        return {0: (given[0] + m, 1)}
    if kernel == "gather_batch":
        images, classes, order = given[:3]
        begin = int(given[3][0]) if len(given) == 6 else 0
        rows = order[begin : begin + m]
        return {len(given) - 2: (images[rows], 1), len(given) - 1: (classes[rows], 1)}
    logits, classes = given[0], given[1]
    if kernel == "softmax":
        shares = np.exp(logits - logits.max(1, keepdims=True))
        return {1: (shares / shares.sum(1, keepdims=True), 1)}
    right = np.eye(n)[classes[:m]]
    if kernel == "cross_entropy":
        losses = -np.log((logits * right).sum(1)) / m
        return {2: (losses, abs(losses) + 1 / m)}
    if kernel == "softmax_cross_entropy_backward":
        return {2: ((logits - right) / m, 1 / m)}
    assert kernel == "cross_entropy_grad", kernel
    shifted = logits - logits.max(1, keepdims=True)
    sums = np.exp(shifted).sum(1, keepdims=True)
    losses = (np.log(sums) - (shifted * right).sum(1, keepdims=True))[:, 0] / m
    found: Expected = {2: ((np.exp(shifted) / sums - right) / m, 1 / m), 3: (losses, abs(losses) + 1 / m)}
    if len(given) == 5:  # v3's adds up
        found |= {3: (given[3] + losses, abs(given[3]) + abs(losses) + 1 / m), 4: (given[4] + m, 1)}
    return found
