"""What every operation and every gradient must give: numpy in float64, without a framework."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from nanogpt_mac.suites.ops.checked import (
    Array,
    Expected,
    Piece,
    Pieces,
    Product,
    Terms,
    added,
    blocks,
    by_first,
    exactly,
    side_by_side,
    total,
    whole,
)
from nanogpt_mac.suites.ops.rows import SLOPE, Row


def expected(row: Row, inputs: Sequence[Array], cotangent: Array | None = None) -> list[Expected]:
    """Of every output and, with a cotangent, of every gradient after it."""
    outputs, gradients = OPERATIONS[row.op](row, *inputs)
    if cotangent is None:
        return list(outputs)
    found = gradients(cotangent)
    return [*outputs, *(found[i] for i in row.of)]


Gradients = Callable[[Array], dict[int, Expected]]  # of the cotangent, by the numbers of the inputs
Both = tuple[Sequence[Expected], Gradients]


def _none(g: Array) -> dict[int, Expected]:
    return {}


def _map(function: Callable[[Array], Array], slope: Callable[[Array], Array], scale: Callable[[Array], Array]) -> Any:
    """An operation on each number by itself, its derivative, and what it is a sum of."""

    def both(row: Row, x: Array) -> Both:
        out = by_first(x.shape, lambda x: (function(x), scale(x)), x)
        return [out], lambda g: {0: by_first(x.shape, lambda x, g: (g * slope(x), g * (1 + np.abs(x))), x, g)}

    return both


def _sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def _one(x: Array) -> Array:
    return 1 + np.abs(x)


ALPHA, LAMBDA = 1.6732632423543772, 1.0507009873554805  # Klambauer et al. 2017, "Self-Normalizing Neural Networks"


def _gelu(row: Row, x: Array) -> Both:
    from scipy.special import erf

    def tanh(x: Array) -> tuple[Array, Array]:
        inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
        t = np.tanh(inner)
        slope = math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * x**2)
        return 0.5 * x * (1 + t), 0.5 * (1 + t) + 0.5 * x * (1 - t**2) * slope

    def exact(x: Array) -> tuple[Array, Array]:
        phi = 0.5 * (1 + erf(x / math.sqrt(2)))
        return x * phi, phi + x * np.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)

    f = tanh if row.settings["tanh"] else exact
    both: Both = _map(lambda x: f(x)[0], lambda x: f(x)[1], _one)(row, x)
    return both


def _prelu(row: Row, x: Array, a: Array) -> Both:
    slope = float(a[0])

    def gradients(g: Array) -> dict[int, Expected]:
        dx = by_first(x.shape, lambda x, g: (g * np.where(x > 0, 1, slope), np.abs(g) * max(1, abs(slope))), x, g)
        terms = added(lambda rows: (np.minimum(x[rows], 0).astype(np.float64) * g[rows]).sum(), len(x), x[0].size)
        return {0: dx, 1: total(terms.reshape(1), x.size)}

    out = by_first(x.shape, lambda x: (np.where(x > 0, x, slope * x), np.abs(x) * max(1, abs(slope))), x)
    return [out], gradients


def _softmax(row: Row, x: Array) -> Both:
    assert row.settings["axis"] == -1

    def forward(x: Array) -> tuple[Array, Array]:
        low = x - x.max(-1, keepdims=True)
        y = np.exp(low)
        y /= y.sum(-1, keepdims=True)
        return y, y * (1 - low)

    def backward(x: Array, g: Array) -> tuple[Array, Array]:
        y, scale = forward(x)
        mean = (g * y).sum(-1, keepdims=True)
        return y * (g - mean), scale * (np.abs(g) + np.abs(mean))

    depth = x.shape[-1]
    out = by_first(x.shape, forward, x, depth=depth)
    return [out], lambda g: {0: by_first(x.shape, backward, x, g, depth=depth)}


def _sum(row: Row, x: Array) -> Both:
    axis = row.settings["axis"]
    if axis in (None, 0):
        sums = added(lambda rows: x[rows].sum(axis, dtype=np.float64), len(x), x[0].size)
    else:
        sums = _along(lambda part: part.sum(axis, dtype=np.float64), axis, x, joined=0)

    def gradients(g: Array) -> dict[int, Expected]:
        spread = np.broadcast_to(g if axis is None else np.expand_dims(g, axis), x.shape)
        return {0: exactly(x.shape, lambda rows: spread[rows])}

    return [total(sums, x.size / sums.size)], gradients


def _along(function: Callable[..., Array], axis: int, *arrays: Array, joined: int | None = None) -> Array:
    """`function` of stretches of another axis than `axis`, put together again along `joined`, by default that one."""
    other = int(axis in (0, -arrays[0].ndim))
    size = arrays[0].shape[other]
    cuts = [(slice(None),) * other + (rows,) for rows in blocks(size, arrays[0].size // size)]
    parts = list(side_by_side(lambda cut: function(*(array[cut] for array in arrays)), cuts))
    return np.concatenate(parts, other if joined is None else joined)


def _argmax(row: Row, x: Array) -> Both:
    axis = row.settings["axis"]
    return [whole(_along(lambda part: part.argmax(axis), axis, x, joined=0))], _none


def _sort(row: Row, x: Array) -> Both:
    axis = row.settings["axis"]
    if row.op == "sort" and not row.backward:
        return [whole(_along(lambda part: np.sort(part, axis), axis, x))], _none
    order = _along(lambda part: part.argsort(axis), axis, x)
    values = whole(_along(lambda part, by: np.take_along_axis(part, by, axis), axis, x, order))

    def back(order: Array, g: Array) -> Array:
        dx = np.zeros_like(g)
        np.put_along_axis(dx, order, g, axis)
        return dx

    return [values, whole(order)][: 1 + row.further_outputs], lambda g: {0: whole(_along(back, axis, order, g))}


def _bce(row: Row, p: Array, t: Array) -> Both:
    def lost(rows: slice) -> Array:
        a = p[rows].astype(np.float64)
        return np.where(t[rows] > 0, np.log(a), np.log1p(-a)).sum()

    def gradients(g: Array) -> dict[int, Expected]:
        each = float(g) / p.size

        def slope(p: Array, t: Array) -> tuple[Array, Array]:
            d = each * (p - t) / (p * (1 - p))
            return d, np.abs(d) / np.minimum(p, 1 - p)

        return {0: by_first(p.shape, slope, p, t)}

    return [total(-added(lost, len(p), p.size // len(p)) / p.size, p.size)], gradients


def _cross_entropy(row: Row, x: Array, targets: Array) -> Both:
    x64 = x.astype(np.float64)
    low = x64 - x64.max(-1, keepdims=True)
    sums = np.exp(low).sum(-1, keepdims=True)
    each = np.log(sums)[:, 0] - low[np.arange(len(x)), targets]

    def gradients(g: Array) -> dict[int, Expected]:
        p = np.exp(low) / sums
        hot = np.zeros_like(p)
        hot[np.arange(len(x)), targets] = 1
        share = float(g) / len(x)
        return {0: whole((p - hot) * share, (p * (1 - low) + hot) * share, x.shape[-1])}

    return [whole(np.asarray(each.mean()), (1 + np.abs(x64).max(-1)).mean(), len(x))], gradients


def _concat(row: Row, a: Array, b: Array) -> Both:
    axis = row.settings["axis"]
    cut = a.shape[axis]
    left, right = ((slice(None),) * axis + (part,) for part in (slice(None, cut), slice(cut, None)))
    pieces: list[Piece] = []
    for x, start in ((a, 0), (b, cut)):
        for rows in blocks(len(x), x[0].size):
            at = (rows, *(slice(None),) * (axis - 1), slice(start, start + x.shape[axis]))
            at = at if axis else (slice(start + rows.start, start + rows.stop),)
            pieces.append((at, partial(lambda x, rows: (x[rows], 0.0), x, rows)))
    return [Pieces(row.output, pieces)], lambda g: {0: whole(g[left]), 1: whole(g[right])}


# -- by index ---------------------------------------------------------------------------------------------------------


def _added(index: Array, rows: int, values: Array) -> Array:
    """float64 (rows, columns): the sums of the rows of `values` that have the same index."""
    from scipy.sparse import csr_array

    def sums(at: slice) -> Array:
        some, count = index[at], at.stop - at.start
        ones = csr_array((np.ones(count), (some, np.arange(count))), (rows, count))
        return np.asarray(ones @ values[at].astype(np.float64))

    return added(sums, len(index), values.shape[1])


def _gather(row: Row, table: Array, index: Array) -> Both:
    out = exactly(row.output, lambda rows: table[index[rows]])
    return [out], lambda g: {0: total(_added(index, len(table), g), _most(index))}


def _most(index: Array) -> int:
    return int(np.bincount(index).max())


def _scatter(row: Row, into: Array, index: Array, values: Array) -> Both:
    out = into.copy()
    out[index] = values

    def gradients(g: Array) -> dict[int, Expected]:
        kept = g.copy()
        kept[index] = 0
        return {0: whole(kept), 2: whole(g[index])}

    return [whole(out)], gradients


def _scatter_sum(row: Row, into: Array, index: Array, values: Array) -> Both:
    scale = np.abs(into) + _added(index, len(into), np.abs(values))
    out = whole(into + _added(index, len(into), values), scale, 1 + _most(index))
    return [out], lambda g: {0: whole(g), 2: exactly(values.shape, lambda rows: g[index[rows]])}


def _scatter_max(row: Row, into: Array, index: Array, values: Array) -> Both:
    order = np.argsort(index, kind="stable")
    starts = np.flatnonzero(np.diff(index[order], prepend=-1))
    out = into.copy()
    touched = index[order][starts]
    out[touched] = np.maximum(into[touched], np.maximum.reduceat(values[order], starts, axis=0))

    def gradients(g: Array) -> dict[int, Expected]:
        won = exactly(values.shape, lambda rows: np.where(values[rows] == out[index[rows]], g[index[rows]], 0))
        return {0: whole(np.where(into == out, g, 0)), 2: won}

    return [whole(out)], gradients


# -- products ---------------------------------------------------------------------------------------------------------


def _matmul(row: Row, a: Array, b: Array) -> Both:
    flat = (lambda x: x.reshape(-1, x.shape[-1])) if b.ndim == 2 else (lambda x: x)
    return [Product(a, b)], lambda g: {
        0: Product(g, b.swapaxes(-1, -2)),
        1: Product(flat(a).swapaxes(-1, -2), flat(g)),
    }


def _linear(row: Row, x: Array, w: Array, b: Array | float = 0.0) -> Both:
    def gradients(g: Array) -> dict[int, Expected]:
        x2, g2 = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
        db = g2.sum(0, dtype=np.float64)
        return {0: Product(g, w), 1: Product(g2.T, x2), 2: total(db, len(g2))}

    return [Product(x, w.T, b)], gradients


def _windows(x: Array, lengths: tuple[int, ...]) -> Array:
    """(batch, places..., channels) to (batch, places..., all that a kernel of these lengths sees), a view."""
    axes = tuple(range(1, 1 + len(lengths)))
    seen = np.lib.stride_tricks.sliding_window_view(x, lengths, axis=axes)
    return np.moveaxis(seen, x.ndim - 1, -1)


def _conv(row: Row, x: Array, w: Array) -> Both:
    lengths = w.shape[1:-1]
    depth = math.prod(w.shape[1:])

    def through(x: Array, w: Array, shape: tuple[int, ...]) -> Pieces:
        flat = w.reshape(len(w), -1).astype(np.float64)
        norms = np.sqrt((flat**2).sum(-1))

        def terms(rows: slice) -> Terms:
            seen = _windows(x[rows].astype(np.float64), w.shape[1:-1])
            seen = seen.reshape(*seen.shape[: x.ndim - 1], -1)
            return seen @ flat.T, np.sqrt((seen**2).sum(-1))[..., None] * norms

        rows = blocks(len(x), math.prod(shape[1:-1]) * flat.shape[1])
        return Pieces(shape, [(at, partial(terms, at)) for at in rows], flat.shape[1])

    def gradients(g: Array) -> dict[int, Expected]:
        around = np.pad(g, [(0, 0), *((k - 1, k - 1) for k in lengths), (0, 0)])
        turned = np.moveaxis(np.flip(w, tuple(range(1, w.ndim - 1))), 0, -1)  # (length..., channels, outputs)
        dx = through(around, np.moveaxis(turned, -2, 0), x.shape)

        def kernels(rows: slice) -> Array:
            """The kernels' gradients, and the squares of what they are products of."""
            seen = _windows(x[rows].astype(np.float64), lengths).reshape(-1, depth)
            g2 = g[rows].reshape(-1, len(w)).astype(np.float64)
            found = np.empty((len(w) + 1, depth + 1))
            found[:-1, :-1] = g2.T @ seen
            found[:-1, -1], found[-1, :-1], found[-1, -1] = (g2**2).sum(0), (seen**2).sum(0), 0
            return found

        found = added(kernels, len(x), math.prod(row.output[1:-1]) * depth)
        dw, scale = found[:-1, :-1], np.sqrt(found[:-1, -1:]) * np.sqrt(found[-1:, :-1])
        return {0: dx, 1: whole(dw.reshape(w.shape), scale.reshape(w.shape), g.size / len(w))}

    return [through(x, w, row.output)], gradients


# -- of a Transformer -------------------------------------------------------------------------------------------------


def _layer_norm(row: Row, x: Array, w: Array, b: Array | float = 0.0) -> Both:
    b = np.asarray(b, np.float64)
    w64, depth = w.astype(np.float64), x.shape[-1]

    def z_of(x: Array) -> tuple[Array, Array]:
        one = 1 / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return (x - x.mean(-1, keepdims=True)) * one, one

    def forward(x: Array) -> tuple[Array, Array]:
        z, _ = z_of(x)
        return z * w64 + b, (1 + np.abs(z)) * np.abs(w64) + np.abs(b)

    def backward(x: Array, g: Array) -> tuple[Array, Array]:
        (z, one), d = z_of(x), g * w64
        mean, along = d.mean(-1, keepdims=True), (d * z).mean(-1, keepdims=True)
        sizes = np.abs(d) + np.abs(d).mean(-1, keepdims=True) + np.abs(z) * np.abs(d * z).mean(-1, keepdims=True)
        return (d - mean - z * along) * one, sizes * one * (1 + np.abs(z))

    def gradients(g: Array) -> dict[int, Expected]:
        columns, g2 = x.reshape(-1, depth), g.reshape(-1, depth)

        def sums(rows: slice) -> Array:
            terms = g2[rows] * z_of(columns[rows].astype(np.float64))[0]
            return np.stack([terms.sum(0), np.abs(terms).sum(0), g2[rows].sum(0, dtype=np.float64)])

        (dw, of_w, db), count = added(sums, len(columns), depth), len(columns)
        dx = by_first(x.shape, backward, x, g, depth=depth)
        return {0: dx, 1: whole(dw, of_w, count), 2: total(db, count)}

    return [by_first(x.shape, forward, x, depth=depth)], gradients


def _sdpa(row: Row, q: Array, k: Array, v: Array) -> Both:
    root, depth = math.sqrt(q.shape[-1]), q.shape[-1] + k.shape[-2]
    hidden = np.triu(np.ones((q.shape[2], k.shape[2]), bool), 1) if row.settings["causal"] else None

    def weights(q: Array, k: Array) -> tuple[Array, float]:
        """And how much more than 1 a float32 score may be wrong."""
        scores = q @ k.swapaxes(-1, -2) / root
        if hidden is not None:
            scores = np.where(hidden, -np.inf, scores)
        p = np.exp(scores - scores.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        most = float(np.sqrt((q**2).sum(-1).max() * (k**2).sum(-1).max())) / root
        return p, 1 + most

    def forward(q: Array, k: Array, v: Array) -> tuple[Array, Array]:
        p, more = weights(q, k)
        return p @ v, p @ np.abs(v) * more

    def backward(which: int) -> Callable[..., tuple[Array, Array]]:
        def of(q: Array, k: Array, v: Array, g: Array) -> tuple[Array, Array]:
            p, more = weights(q, k)
            if which == 2:
                return p.swapaxes(-1, -2) @ g, p.swapaxes(-1, -2) @ np.abs(g) * more
            dp, size = g @ v.swapaxes(-1, -2), np.abs(g) @ np.abs(v).swapaxes(-1, -2)
            ds = p * (dp - (dp * p).sum(-1, keepdims=True))
            sizes = p * (size + (size * p).sum(-1, keepdims=True))
            if which == 0:
                return ds @ k / root, sizes @ np.abs(k) * more / root
            return ds.swapaxes(-1, -2) @ q / root, sizes.swapaxes(-1, -2) @ np.abs(q) * more / root

        return of

    def by_head(shape: tuple[int, ...], function: Callable[..., Terms], *arrays: Array) -> Pieces:
        def terms(at: tuple[int, int]) -> Terms:
            return function(*(a[at].astype(np.float64) for a in arrays))

        return Pieces(shape, [(at, partial(terms, at)) for at in np.ndindex(*shape[:2])], depth)

    out = by_head(q.shape, forward, q, k, v)
    return [out], lambda g: {i: by_head(x.shape, backward(i), q, k, v, g) for i, x in enumerate((q, k, v))}


ADAMW = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.99, "decay": 0.1, "epsilon": 1e-8, "step": 10}


def _adamw(row: Row, p: Array, g: Array, m: Array, v: Array) -> Both:
    o = ADAMW

    def moment(g: Array, m: Array) -> tuple[Array, Array]:
        return o["beta1"] * m + (1 - o["beta1"]) * g, np.abs(m) + np.abs(g)

    def square(g: Array, v: Array) -> tuple[Array, Array]:
        return o["beta2"] * v + (1 - o["beta2"]) * g**2, v + g**2

    def weight(p: Array, g: Array, m: Array, v: Array) -> tuple[Array, Array]:
        first = moment(g, m)[0] / (1 - o["beta1"] ** o["step"])
        second = square(g, v)[0] / (1 - o["beta2"] ** o["step"])
        update = first / (np.sqrt(second) + o["epsilon"])
        return p * (1 - o["lr"] * o["decay"]) - o["lr"] * update, np.abs(p) + o["lr"] * (1 + np.abs(m) + np.abs(g))

    new = by_first(p.shape, weight, p, g, m, v)
    return [new, by_first(p.shape, moment, g, m), by_first(p.shape, square, g, v)], _none


OPERATIONS: dict[str, Callable[..., Both]] = {
    "adamw": _adamw,
    "argmax": _argmax,
    "bce": _bce,
    "concat": _concat,
    "conv1d": _conv,
    "conv2d": _conv,
    "cross_entropy": _cross_entropy,
    "gather": _gather,
    "gelu": _gelu,
    "layer_norm": _layer_norm,
    "leaky_relu": _map(lambda x: np.where(x > 0, x, SLOPE * x), lambda x: np.where(x > 0, 1, SLOPE), np.abs),
    "linear": _linear,
    "matmul": _matmul,
    "prelu": _prelu,
    "relu": _map(lambda x: np.maximum(x, 0), lambda x: (x > 0) * 1.0, np.abs),
    "scatter": _scatter,
    "scatter_max": _scatter_max,
    "scatter_sum": _scatter_sum,
    "sdpa": _sdpa,
    "selu": _map(
        lambda x: LAMBDA * np.where(x > 0, x, ALPHA * np.expm1(np.minimum(x, 0))),
        lambda x: LAMBDA * np.where(x > 0, 1, ALPHA * np.exp(np.minimum(x, 0))),
        _one,
    ),
    "sigmoid": _map(_sigmoid, lambda x: _sigmoid(x) * (1 - _sigmoid(x)), _one),
    "softmax": _softmax,
    "softplus": _map(lambda x: np.logaddexp(x, 0), _sigmoid, _one),
    "sort": _sort,
    "sort_with_indices": _sort,
    "sum": _sum,
}
