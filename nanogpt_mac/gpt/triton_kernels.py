"""Triton kernels for an NVIDIA GPU: all of a step but the products of 16 bits and TF32, which are cuBLAS's.

triton_ops.py wraps them as operators. Matrices are row-major. A dropout mask is not stored: whether an element is kept
is a hash of a seed, its row and its column, computed again in the backward pass. `threshold` is the share that is
dropped in units of 2^-32, and what is kept is multiplied by `kept`; `site` is the place of the seed in `seeds`, int64.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import globaltimer


@triton.jit
def _mix(x):
    """A bijection of 32 bits; each changes half of the others (lowbias32, github.com/skeeto/hash-prospector)."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _row_keys(seeds, site, rows):
    """A random number a row: those of two seeds share none but by chance."""
    seed = tl.load(seeds + site).to(tl.uint32)
    return _mix(_mix(rows.to(tl.uint32)) ^ seed)


@triton.jit
def _keep(keys, columns, threshold):
    """Whether each element is kept, of rows with `keys` (rows, 1) and `columns` (1, columns).

    A column is an odd factor; a product of it alone would make columns at equal distances depend on each other.
    """
    x = keys * (2 * columns.to(tl.uint32) + 0x9E3779B9)
    return (x ^ (x >> 15)) * 0x846CA68B >= threshold.to(tl.uint32)


# -- attention --------------------------------------------------------------------------------------------------------


@triton.jit
def _tile(matrix, rows, columns, width, T, HS: tl.constexpr, EVEN: tl.constexpr):
    """Rows and columns of a head, (T, HS) in a matrix of `width` columns; zero beyond them, where it is not EVEN."""
    places = matrix + rows[:, None] * width + columns[None, :]
    if EVEN:
        return tl.load(places)
    return tl.load(places, mask=(rows < T)[:, None] & (columns < HS)[None, :], other=0.0)


@triton.jit
def _put(matrix, rows, columns, width, T, HS: tl.constexpr, EVEN: tl.constexpr, tile):
    places = matrix + rows[:, None] * width + columns[None, :]
    if EVEN:
        tl.store(places, tile.to(matrix.dtype.element_ty))
    else:
        tl.store(places, tile.to(matrix.dtype.element_ty), mask=(rows < T)[:, None] & (columns < HS)[None, :])


@triton.jit(do_not_specialize=["site"])
def attention_forward(
    qkv, out, lse, seeds, site, T, n_head, scale, threshold, kept,
    HS: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr, DROP: tl.constexpr,
    PRECISION: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """One block of queries of one head, STEP keys at a time.

    `out` is (B, T, C), `lse` (B nh, T) the log2 of its softmax's sums; `qkv` is (B, T, 3 C), a head HS columns of each
    third, padded to D. `scale` is log2(e) / sqrt(HS).
    """
    start, head = tl.program_id(0) * BLOCK, tl.program_id(1)
    C = n_head * HS
    batch, column = (head // n_head).to(tl.int64), (head % n_head) * HS
    base = qkv + batch * T * 3 * C + column
    rows, columns = start + tl.arange(0, BLOCK), tl.arange(0, D)
    q = _tile(base, rows, columns, 3 * C, T, HS, EVEN)
    largest = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    y = tl.zeros((BLOCK, D), tl.float32)
    if DROP:
        keys = _row_keys(seeds, site, head * T + rows)
    for begin in range(0, tl.minimum(start + BLOCK, T), STEP):
        others = begin + tl.arange(0, STEP)
        k = _tile(base + C, others, columns, 3 * C, T, HS, EVEN)
        v = _tile(base + 2 * C, others, columns, 3 * C, T, HS, EVEN)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        scores = tl.where(rows[:, None] >= others[None, :], scores, float("-inf"))
        now = tl.maximum(largest, tl.max(scores, 1))
        weights = tl.exp2(scores - now[:, None])
        shrink = tl.exp2(largest - now)
        total = total * shrink + tl.sum(weights, 1)
        if DROP:
            weights = tl.where(_keep(keys[:, None], others[None, :], threshold), weights, 0.0)
        y = y * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
        largest = now
    y = y * (kept / total)[:, None]
    _put(out + batch * T * C + column, rows, columns, C, T, HS, EVEN, y)
    tl.store(lse + head.to(tl.int64) * T + rows, largest + tl.log2(total), mask=rows < T)


@triton.jit
def _weights(scores, dweights, rows, others, keys, sums, mean, threshold, kept, DROP: tl.constexpr):
    """The weights after dropout, and the gradient of the scores; what is given of rows and keys lies along its axis."""
    weights = tl.where(rows >= others, tl.exp2(scores - sums), 0.0)
    dropped = weights
    if DROP:
        keep = _keep(keys, others, threshold)
        dropped = tl.where(keep, weights * kept, 0.0)
        dweights = tl.where(keep, dweights * kept, 0.0)
    return dropped, weights * (dweights - mean)


@triton.jit(do_not_specialize=["site"])
def attention_backward(
    qkv, out, dout, lse, seeds, dqkv, site, T, n_head, scale, natural, threshold, kept,
    HS: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr, DROP: tl.constexpr,
    PRECISION: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """The gradients of one block of keys and values, then of one of queries, of a head; `natural` is 1 / sqrt(HS).

    The first part has the scores transposed, keys by rows, so that no tile must be turned before its product.
    """
    start, head = tl.program_id(0) * BLOCK, tl.program_id(1)
    C = n_head * HS
    batch, column = (head // n_head).to(tl.int64), (head % n_head) * HS
    base, grad = qkv + batch * T * 3 * C + column, dqkv + batch * T * 3 * C + column
    y_base, dy_base = out + batch * T * C + column, dout + batch * T * C + column
    lse += head.to(tl.int64) * T
    own, columns = start + tl.arange(0, BLOCK), tl.arange(0, D)

    k = _tile(base + C, own, columns, 3 * C, T, HS, EVEN)
    v = _tile(base + 2 * C, own, columns, 3 * C, T, HS, EVEN)
    dk = tl.zeros((BLOCK, D), tl.float32)
    dv = tl.zeros((BLOCK, D), tl.float32)
    for begin in range(start // STEP * STEP, T, STEP):
        rows = begin + tl.arange(0, STEP)
        keys = _row_keys(seeds, site, head * T + rows) if DROP else rows
        q = _tile(base, rows, columns, 3 * C, T, HS, EVEN)
        y = _tile(y_base, rows, columns, C, T, HS, EVEN)
        dy = _tile(dy_base, rows, columns, C, T, HS, EVEN)
        sums = tl.load(lse + rows, mask=rows < T, other=float("inf"))  # a row past the end has weights of zero
        mean = tl.sum(y.to(tl.float32) * dy.to(tl.float32), 1)  # of dweights, weighted by the weights
        scores = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale
        dweights = tl.dot(v, tl.trans(dy), input_precision=PRECISION)
        dropped, dscores = _weights(
            scores, dweights, rows[None, :], own[:, None], keys[None, :], sums[None, :], mean[None, :],
            threshold, kept, DROP,
        )  # fmt: skip
        dv += tl.dot(dropped.to(dy.dtype), dy, input_precision=PRECISION)
        dk += tl.dot(dscores.to(q.dtype), q, input_precision=PRECISION)
    _put(grad + C, own, columns, 3 * C, T, HS, EVEN, dk * natural)
    _put(grad + 2 * C, own, columns, 3 * C, T, HS, EVEN, dv)

    own_q = _tile(base, own, columns, 3 * C, T, HS, EVEN)
    own_y = _tile(y_base, own, columns, C, T, HS, EVEN)
    own_dy = _tile(dy_base, own, columns, C, T, HS, EVEN)
    own_sums = tl.load(lse + own, mask=own < T, other=float("inf"))
    own_mean = tl.sum(own_y.to(tl.float32) * own_dy.to(tl.float32), 1)
    own_keys = _row_keys(seeds, site, head * T + own) if DROP else own
    dq = tl.zeros((BLOCK, D), tl.float32)
    for begin in range(0, tl.minimum(start + BLOCK, T), STEP):
        others = begin + tl.arange(0, STEP)
        some_k = _tile(base + C, others, columns, 3 * C, T, HS, EVEN)
        some_v = _tile(base + 2 * C, others, columns, 3 * C, T, HS, EVEN)
        scores = tl.dot(own_q, tl.trans(some_k), input_precision=PRECISION) * scale
        dweights = tl.dot(own_dy, tl.trans(some_v), input_precision=PRECISION)
        _, dscores = _weights(
            scores, dweights, own[:, None], others[None, :], own_keys[:, None], own_sums[:, None], own_mean[:, None],
            threshold, kept, DROP,
        )  # fmt: skip
        dq += tl.dot(dscores.to(some_k.dtype), some_k, input_precision=PRECISION)
    _put(grad, own, columns, 3 * C, T, HS, EVEN, dq * natural)


# -- embedding and residual sum, with dropout and layer norm ----------------------------------------------------------


@triton.jit
def _norm(sums, inside, columns, weight, bias, C, eps, BIAS: tl.constexpr):
    """The layer norm of each row of `sums`, which are zero outside."""
    centred = tl.where(inside, sums - (tl.sum(sums, 1) / C)[:, None], 0.0)
    result = centred * tl.rsqrt(tl.sum(centred * centred, 1) / C + eps)[:, None]
    result *= tl.load(weight + columns, mask=columns < C, other=0.0)[None, :]
    if BIAS:
        result += tl.load(bias + columns, mask=columns < C, other=0.0)[None, :]
    return result


@triton.jit(do_not_specialize=["site", "V", "down"])
def embed_norm_forward(
    idx, wte, wpe, weight, bias, total, normed, seeds, site, V, M, C, T, down, eps, threshold, kept,
    WIDE: tl.constexpr, ROWS: tl.constexpr, DROP: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """`total` = dropout(wte[idx] + wpe), float32 (M, C), and `normed`, its layer norm; `idx` has T tokens every `down`.

    What is no token of the V has an embedding that is not a number, and so has the loss.
    """
    rows, columns = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, WIDE)
    inside = (rows < M)[:, None] & (columns < C)[None, :]
    tokens = tl.load(idx + rows // T * down + rows % T, mask=rows < M, other=0)[:, None]
    known = (tokens >= 0) & (tokens < V)
    sums = tl.load(wte + tokens * C + columns[None, :], mask=inside & known, other=0.0)
    sums += tl.load(wpe + (rows % T)[:, None] * C + columns[None, :], mask=inside, other=0.0)
    if DROP:
        keys = _row_keys(seeds, site, rows)
        sums = tl.where(_keep(keys[:, None], columns[None, :], threshold), sums * kept, 0.0)
    sums = tl.where(known, sums, float("nan"))
    places = rows.to(tl.int64)[:, None] * C + columns[None, :]
    tl.store(total + places, sums, mask=inside)
    result = _norm(sums, inside, columns, weight, bias, C, eps, BIAS)
    tl.store(normed + places, result.to(normed.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["site"])
def add_norm_forward(
    x, y, weight, bias, total, normed, seeds, site, M, C, eps, threshold, kept,
    WIDE: tl.constexpr, ROWS: tl.constexpr, DROP: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """`total` = x + dropout(y), float32 (M, C), and `normed`, its layer norm, in y's dtype."""
    rows, columns = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, WIDE)
    inside = (rows < M)[:, None] & (columns < C)[None, :]
    places = rows.to(tl.int64)[:, None] * C + columns[None, :]
    branch = tl.load(y + places, mask=inside, other=0.0).to(tl.float32)
    if DROP:
        keys = _row_keys(seeds, site, rows)
        branch = tl.where(_keep(keys[:, None], columns[None, :], threshold), branch * kept, 0.0)
    sums = tl.load(x + places, mask=inside, other=0.0) + branch
    tl.store(total + places, sums, mask=inside)
    result = _norm(sums, inside, columns, weight, bias, C, eps, BIAS)
    tl.store(normed + places, result.to(normed.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["site", "programs"])
def norm_backward(
    total, weight, dtotal, dnormed, dx, dy, dweight, dbias, seeds, site, M, C, eps, threshold, kept, programs,
    WIDE: tl.constexpr, ROWS: tl.constexpr, DROP: tl.constexpr, BIAS: tl.constexpr, LAST: tl.constexpr,
    ADDED: tl.constexpr,
):  # fmt: skip
    """Of both above: `dx`, float32, and `dy`, what dropout leaves of it, in its dtype, (M, C); each program's share of
    `dweight` and `dbias`, (programs, C).

    LAST: nothing but the norm was used, so that there is no `dtotal`. ADDED: `dx` is wanted.
    """
    program, columns = tl.program_id(0), tl.arange(0, WIDE)
    scale = tl.load(weight + columns, mask=columns < C, other=0.0)
    of_weight = tl.zeros((ROWS, WIDE), tl.float32)
    of_bias = tl.zeros((ROWS, WIDE), tl.float32)
    for begin in range(program * ROWS, M, programs * ROWS):
        rows = begin + tl.arange(0, ROWS)
        inside = (rows < M)[:, None] & (columns < C)[None, :]
        places = rows.to(tl.int64)[:, None] * C + columns[None, :]
        sums = tl.load(total + places, mask=inside, other=0.0)
        centred = tl.where(inside, sums - (tl.sum(sums, 1) / C)[:, None], 0.0)
        inverse = tl.rsqrt(tl.sum(centred * centred, 1) / C + eps)[:, None]
        normal = centred * inverse
        grad = tl.load(dnormed + places, mask=inside, other=0.0).to(tl.float32)
        of_weight += grad * normal
        if BIAS:
            of_bias += grad
        grad *= scale[None, :]
        along = (tl.sum(grad * normal, 1) / C)[:, None]
        grad = (grad - normal * along - (tl.sum(grad, 1) / C)[:, None]) * inverse
        if not LAST:
            grad += tl.load(dtotal + places, mask=inside, other=0.0)
        if ADDED:
            tl.store(dx + places, grad, mask=inside)
        if DROP:
            keys = _row_keys(seeds, site, rows)
            grad = tl.where(_keep(keys[:, None], columns[None, :], threshold), grad * kept, 0.0)
        tl.store(dy + places, grad.to(dy.dtype.element_ty), mask=inside)
    tl.store(dweight + program * C + columns, tl.sum(of_weight, 0), mask=columns < C)
    if BIAS:
        tl.store(dbias + program * C + columns, tl.sum(of_bias, 0), mask=columns < C)


@triton.jit(do_not_specialize=["programs"])
def column_sums(shares, sums, programs, C, BLOCK: tl.constexpr, STEP: tl.constexpr):
    """The sums (C,) of `shares` (programs, C)."""
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((STEP, BLOCK), tl.float32)
    for begin in range(0, programs, STEP):
        rows = begin + tl.arange(0, STEP)
        inside = (rows < programs)[:, None] & (columns < C)[None, :]
        total += tl.load(shares + rows[:, None] * C + columns[None, :], mask=inside, other=0.0)
    tl.store(sums + columns, tl.sum(total, 0), mask=columns < C)


@triton.jit(do_not_specialize=["V", "down", "length"])
def token_sums(
    idx, rows, shares, V, M, C, T, down, length,
    WIDE: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Each program's share (V, C) of the sums of `rows` (M, C) by their token, over `length` of them: what an embedding
    is given back. A product with ones and zeros, of float32 in three parts of bfloat16 if SPLIT, none of them rounded;
    what is not finite reaches the sums of all tokens.
    """
    columns, tokens = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, WIDE)
    begin = tl.program_id(1) * length
    end = tl.minimum(begin + length, M)
    total = tl.zeros((WIDE, BLOCK), tl.float32)
    for start in range(begin, end, STEP):
        lines = start + tl.arange(0, STEP)
        found = tl.load(idx + lines // T * down + lines % T, mask=lines < end, other=-1)
        found = tl.minimum(tl.maximum(found, 0), V - 1)  # what is none must not end the process before its loss is read
        inside = (lines < end)[:, None] & (columns < C)[None, :]
        rest = tl.load(rows + lines.to(tl.int64)[:, None] * C + columns[None, :], mask=inside, other=0.0)
        same = tokens[:, None] == found[None, :]
        if SPLIT:
            for _ in tl.static_range(3):
                part = rest.to(tl.bfloat16)
                total = tl.dot(same.to(tl.bfloat16), part, total)
                rest -= part.to(tl.float32)
        else:
            total = tl.dot(same.to(tl.float32), rest, total, input_precision="ieee")
    places = (tl.program_id(1) * V + tokens)[:, None] * C + columns[None, :]
    tl.store(shares + places, total, mask=(tokens < V)[:, None] & (columns < C)[None, :])


@triton.jit
def transpose(x, y, M, N, BLOCK: tl.constexpr):
    """`y` (N, M) of `x` (M, N)."""
    rows, columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (rows < M)[:, None] & (columns < N)[None, :]
    tile = tl.load(x + rows[:, None] * N + columns[None, :], mask=inside)
    tl.store(y + columns[:, None] * M + rows[None, :], tl.trans(tile), mask=tl.trans(inside))


# -- GELU -------------------------------------------------------------------------------------------------------------


@triton.jit
def _normal(x):
    """The normal distribution up to x, to 1e-7 (Abramowitz and Stegun 7.1.26), and its density times sqrt(2 pi)."""
    t = 1 / (1 + 0.2316418882 * tl.abs(x))  # 0.3275911 / sqrt(2)
    density = tl.exp2(-0.72134752044 * x * x)  # exp(-x^2 / 2)
    tail = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
    tail = 0.5 * tail * density
    return tl.where(x < 0, tail, 1 - tail), density


@triton.jit
def gelu_forward(x, y, size, BLOCK: tl.constexpr):
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + places, mask=places < size).to(tl.float32)
    below, _ = _normal(value)
    tl.store(y + places, (value * below).to(y.dtype.element_ty), mask=places < size)


@triton.jit
def gelu_backward(x, dy, dx, size, BLOCK: tl.constexpr):
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + places, mask=places < size).to(tl.float32)
    below, density = _normal(value)
    grad = tl.load(dy + places, mask=places < size).to(tl.float32) * (below + 0.39894228040 * value * density)
    tl.store(dx + places, grad.to(dx.dtype.element_ty), mask=places < size)


# -- a product of matrices --------------------------------------------------------------------------------------------


@triton.jit
def product(
    a, b, shares, M, N, K, a_down, a_across, b_down, b_across, length,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr, BAND: tl.constexpr, PRECISION: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """A tile of `a` (M, K) times `b` (K, N), of `length` of their K terms: `shares` (K / length, M, N) holds each sum.

    Tiles go down BAND at a time before they go across, so that what they read is still in the cache.
    """
    down, across = tl.cdiv(M, ROWS), tl.cdiv(N, COLUMNS)
    number, share = tl.program_id(0), tl.program_id(1)
    band, within = number // (BAND * across), number % (BAND * across)
    height = tl.minimum(down - band * BAND, BAND)
    rows = ((band * BAND + within % height) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    columns = ((within // height) * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)
    terms = share * length + tl.arange(0, STEP)
    left = a + rows[:, None] * a_down + terms[None, :] * a_across
    right = b + terms[:, None] * b_down + columns[None, :] * b_across
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for begin in range(0, length, STEP):
        if EVEN:
            x, y = tl.load(left), tl.load(right)
        else:
            inside = begin + tl.arange(0, STEP) < tl.minimum(length, K - share * length)
            x = tl.load(left, mask=(rows < M)[:, None] & inside[None, :], other=0.0)
            y = tl.load(right, mask=inside[:, None] & (columns < N)[None, :], other=0.0)
        sums = tl.dot(x, y, sums, input_precision=PRECISION)
        left += STEP * a_across
        right += STEP * b_down
    places = shares + share.to(tl.int64) * M * N + rows[:, None] * N + columns[None, :]
    if EVEN:
        tl.store(places, sums.to(shares.dtype.element_ty))
    else:
        tl.store(places, sums.to(shares.dtype.element_ty), mask=(rows < M)[:, None] & (columns < N)[None, :])


# -- cross entropy ----------------------------------------------------------------------------------------------------


@triton.jit
def _targets(targets, M, T, down, ROWS: tl.constexpr):
    """The rows of a program, the last again where there are no more, and what follows each."""
    rows = tl.minimum(tl.program_id(0) * ROWS + tl.arange(0, ROWS), M - 1).to(tl.int64)
    return rows, tl.load(targets + rows // T * down + rows % T)


@triton.jit(do_not_specialize=["V", "down"])
def cross_entropy_forward(
    logits, targets, losses, sums, M, V, width, T, down, WIDE: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """Of V logits a row, of `width`: `losses`, nats, and `sums`, the log of the softmax's sums, float32 (M,).

    `targets` has T every `down`; what is no token has a loss that is not a number.
    """
    rows, targets = _targets(targets, M, T, down, ROWS)
    logits += rows[:, None] * width
    largest = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    for begin in range(0, V, WIDE):
        columns = (begin + tl.arange(0, WIDE))[None, :]
        x = tl.load(logits + columns, mask=columns < V, other=float("-inf")).to(tl.float32)
        now = tl.maximum(tl.maximum(largest, tl.max(x, 1)), -3e38)  # also where all are minus infinity
        total = total * tl.exp(largest - now) + tl.sum(tl.exp(x - now[:, None]), 1)
        largest = now
    total = largest + tl.log(total)
    known = ((targets >= 0) & (targets < V))[:, None]
    of_target = tl.load(logits + targets[:, None], mask=known, other=float("nan")).to(tl.float32)
    tl.store(sums + rows, total)
    tl.store(losses + rows, total - tl.sum(of_target, 1))


@triton.jit(do_not_specialize=["V", "down"])
def cross_entropy_backward(
    logits, targets, sums, dmean, dlogits, M, V, width, T, down, WIDE: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """`dlogits`, (M, width) in their dtype, of the mean of `losses`, whose own gradient is `dmean`."""
    rows, targets = _targets(targets, M, T, down, ROWS)
    columns = (tl.program_id(1) * WIDE + tl.arange(0, WIDE))[None, :]
    places = rows[:, None] * width + columns
    x = tl.load(logits + places, mask=columns < V, other=float("-inf")).to(tl.float32)
    grad = tl.exp(x - tl.load(sums + rows)[:, None]) - tl.where(columns == targets[:, None], 1.0, 0.0)
    grad *= tl.load(dmean) / M
    tl.store(dlogits + places, grad.to(dlogits.dtype.element_ty), mask=columns < width)


# -- time -------------------------------------------------------------------------------------------------------------


@triton.jit
def now(out):
    """The GPU's own clock, ns, into `out`, int64 (1,): once all that was sent before it is done."""
    tl.store(out, globaltimer())


# -- AdamW ------------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["decaying"])
def adamw(
    weights, gradients, exp_avg, exp_avg_sq, lr, steps, norm, found_inf, size, decaying,
    beta1, beta2, rest1, rest2, log_beta1, log_beta2, decay, limit, eps,
    CLIP: tl.constexpr, SCALED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """torch's fused AdamW (Loshchilov and Hutter), of whose numbers the first `decaying` decay, with gradients that are
    clipped on their way from their `norm` to `limit`. SCALED: a gradient scaler's `found_inf` leaves all as it is.
    `rest1` is 1 - beta1, which float32 would round away, and `log_beta1` the base-2 logarithm of beta1.
    """
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    if SCALED:
        size = tl.where(tl.load(found_inf) > 0, 0, size)
    inside = places < size
    rate, step = tl.load(lr), tl.load(steps).to(tl.float64)
    grad = tl.load(gradients + places, mask=inside, other=0.0)
    if CLIP:
        clip = limit / (tl.load(norm) + 1e-6)
        grad *= tl.where(clip > 1, 1.0, clip)
    first = tl.load(exp_avg + places, mask=inside, other=0.0) * beta1 + grad * rest1
    second = tl.load(exp_avg_sq + places, mask=inside, other=0.0) * beta2 + grad * grad * rest2
    correction1 = (1 - tl.exp2(step * log_beta1)).to(tl.float32)
    correction2 = (1 - tl.exp2(step * log_beta2)).to(tl.float32)
    weight = tl.load(weights + places, mask=inside, other=0.0)
    weight -= tl.where(places < decaying, rate * decay, 0.0) * weight
    weight -= rate / correction1 * first / (tl.sqrt(second) / tl.sqrt(correction2) + eps)
    tl.store(exp_avg + places, first, mask=inside)
    tl.store(exp_avg_sq + places, second, mask=inside)
    tl.store(weights + places, weight, mask=inside)
