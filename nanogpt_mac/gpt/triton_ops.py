"""The kernels of triton_kernels.py as operators that autograd and a compiler know, and an update of AdamW.

Fewer passes over memory than torch's own make: attention reads q, k and v, and writes their gradients, where the packed
product has them; a residual sum, its dropout and the layer norm behind it are one kernel, as are the embedding and the
first norm. The backward pass draws the masks of dropout anew.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
import triton
from torch import Tensor
from torch.library import register_autograd, register_fake
from torch.nn import functional as F

from nanogpt_mac.gpt import triton_kernels as kernels
from nanogpt_mac.gpt.spec import GPTSpec
from nanogpt_mac.gpt.triton_products import TILE, exact, operator, product, transposed

WIDEST_HEAD = 128
WIDEST = 4096  # columns of a row that a program holds
MULTIPROCESSORS = 132  # of an H100
PROGRAMS = 8 * MULTIPROCESSORS  # of the layer norm's backward pass
FEW = 256  # tokens that a program holds sums for
VOCABULARY = 64  # the head's rows are padded to a multiple of it: an odd number has slow kernels
ELEMENTS = 1024  # of a program of GELU or AdamW
EPS = 1e-5


def fault(spec: GPTSpec) -> str | None:
    """Why these kernels cannot compute such a model on this GPU, or None where they can."""
    if torch.cuda.get_device_capability() < (8, 0):
        return "need a GPU of compute capability 8.0 or later"
    if spec.n_embd // spec.n_head > WIDEST_HEAD:
        return f"have heads of at most {WIDEST_HEAD} channels"
    return f"have rows of at most {WIDEST} channels" if spec.n_embd > WIDEST else None


def prepare(spec: GPTSpec, dtype: torch.dtype, device: torch.device) -> Future[None]:
    """Compile the kernels of such a model, or load them from Triton's cache, beside what the caller does, and side by
    side: in turn they take 10 s."""
    (T, C), p = (spec.block_size, spec.n_embd), spec.dropout
    y, qkv, hidden = (torch.zeros(1, T, wide * C, dtype=dtype, device=device) for wide in (1, 3, 4))
    x, lse, drawn = y.float(), y.new_zeros(spec.n_head, T, dtype=torch.float32), y.new_zeros(4, dtype=torch.int64)
    weight = x[0, 0].clone()
    window = y.new_zeros(1, T + 1, dtype=torch.int64)
    bias, idx, targets, mean = weight if spec.bias else None, window[:, :-1], window[:, 1:], x.new_zeros(())
    scores, found_inf = y.new_zeros(1, T, padded(spec.vocab_size)), mean if dtype == torch.float16 else None
    work: list[Callable[[], object]] = [
        lambda: [attention(qkv, spec.n_head, dropout, drawn, 0) for dropout in {p, 0.0}],
        lambda: _attention_backward(qkv, y, y, lse, spec.n_head, p, drawn, 0),
        lambda: [embed_norm(idx, x[0], x[0], weight, bias, dtype, dropout, drawn, 3) for dropout in {p, 0.0}],
        lambda: _norm_backward(x, weight, bias, x, y, torch.float32, False, p, drawn, 3),
        lambda: [add_norm(x, y, weight, bias, dropout, drawn, 1) for dropout in {p, 0.0}],
        lambda: [_norm_backward(x, weight, bias, up, y, dtype, True, p, drawn, 1) for up in (x, None)],
        lambda: _token_sums(idx, x, spec.vocab_size),
        lambda: adamw([x.flatten()] * 4, 0, mean, mean + 1, mean, found_inf, (0.9, 0.99), 0.0, 1.0, 1e-8),
        lambda: cross_entropy(scores, targets, spec.vocab_size),
        lambda: _cross_entropy_backward(scores, targets, x[..., 0].contiguous(), mean, spec.vocab_size),
        *((lambda: gelu(hidden), lambda: _gelu_backward(hidden, hidden)) if spec.gelu == "exact" else ()),
    ]
    if exact(dtype):
        a, ab = x.new_zeros(TILE["ROWS"], C), x.new_zeros(TILE["ROWS"], 3 * C)
        b = x.new_zeros(3 * C, C).T  # as a linear layer's weight lies
        work += [lambda: product(a, b), lambda: product(ab, b.T), lambda: product(ab.T, a)]
    elif dtype == torch.float32:
        work += [lambda: transposed(x[0])]
    gpu = torch.cuda.current_device() if y.is_cuda else -1

    def here(one: Callable[[], object]) -> None:
        with torch.cuda.device(gpu):  # a thread begins on the first
            one()

    def all_of_them() -> None:
        here(lambda: _sum(x[0]))  # alone: for its first, Triton reads all of itself, half a gigabyte
        with ThreadPoolExecutor(len(work)) as pool:
            list(pool.map(here, work))

    return ThreadPoolExecutor(1).submit(all_of_them)


def padded(vocab_size: int) -> int:
    """The rows of the head, a multiple of what products are fast with."""
    return -(-vocab_size // VOCABULARY) * VOCABULARY


def _threshold(dropout: float) -> int:
    """In units of 2^-32, as the signed number that Triton takes."""
    dropped = min(round(dropout * 2**32), 2**32 - 1)
    return dropped - 2**32 if dropped >= 2**31 else dropped


# -- attention --------------------------------------------------------------------------------------------------------


def _head(qkv: Tensor, n_head: int, dropout: float, backward: bool = False) -> tuple[tuple[int, int], dict[str, Any]]:
    """The grid, and what both kernels are given by name; tiles and stages are the fastest seen on an H100."""
    B, T, width = qkv.shape
    hs = width // 3 // n_head
    padded = max(16, triton.next_power_of_2(hs))
    precise = exact(qkv.dtype)
    small = padded * qkv.element_size() > 256 or (backward and precise)  # else registers do not hold it
    block = 32 if small else 64
    sixteen = qkv.element_size() == 2
    short = sixteen and backward and dropout > 0  # masks take the registers of a longer step
    ahead = sixteen and (not backward or (padded <= 64 and not short))
    stages = 3 if ahead else 2 if backward and not sixteen and not precise else 1
    given = {
        "T": T,
        "n_head": n_head,
        "scale": math.log2(math.e) / math.sqrt(hs),
        "threshold": _threshold(dropout),
        "kept": 1 / (1 - dropout),
        "HS": hs,
        "D": padded,
        "BLOCK": block,
        "STEP": 32 if short else block,
        "DROP": dropout > 0,
        "PRECISION": "tf32x3" if precise else "tf32",  # three of TF32 for one; for 16 bits it is of no matter
        "EVEN": hs == padded and T % block == 0,
        "num_warps": 4,
        "num_stages": stages,
    }
    return (triton.cdiv(T, block), B * n_head), given


@operator
def attention(qkv: Tensor, n_head: int, dropout: float, seeds: Tensor, site: int) -> tuple[Tensor, Tensor]:
    """Causal attention (B, T, C) of packed `qkv` (B, T, 3 C), in its dtype, and the log2 of its softmax's sums."""
    B, T, width = qkv.shape
    out, lse = qkv.new_empty(B, T, width // 3), qkv.new_empty(B * n_head, T, dtype=torch.float32)
    grid, given = _head(qkv, n_head, dropout)
    kernels.attention_forward[grid](qkv.contiguous(), out, lse, seeds, site, **given)
    return out, lse


@register_fake(attention)
def _(qkv: Tensor, n_head: int, *_: Any) -> tuple[Tensor, Tensor]:
    B, T, width = qkv.shape
    return qkv.new_empty(B, T, width // 3), qkv.new_empty(B * n_head, T, dtype=torch.float32)


@operator
def _attention_backward(
    qkv: Tensor, out: Tensor, dout: Tensor, lse: Tensor, n_head: int, dropout: float, seeds: Tensor, site: int
) -> Tensor:
    qkv, dout = qkv.contiguous(), dout.contiguous()
    dqkv = torch.empty_like(qkv)
    grid, given = _head(qkv, n_head, dropout, backward=True)
    natural = given["scale"] / math.log2(math.e)
    kernels.attention_backward[grid](qkv, out, dout, lse, seeds, dqkv, site, natural=natural, **given)
    return dqkv


register_fake(_attention_backward)(lambda qkv, *_: qkv.new_empty(qkv.shape))


def _keep_attention(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, ctx.n_head, ctx.dropout, seeds, ctx.site = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(qkv, *output, seeds)


def _attention_gradients(ctx: Any, dout: Tensor, _: Tensor) -> tuple[Tensor, None, None, None, None]:
    qkv, out, lse, seeds = ctx.saved_tensors
    return _attention_backward(qkv, out, dout, lse, ctx.n_head, ctx.dropout, seeds, ctx.site), None, None, None, None


register_autograd(attention, _attention_gradients, setup_context=_keep_attention)


# -- embedding and residual sum, with dropout and layer norm ----------------------------------------------------------


def _rows(x: Tensor, dropout: float, bias: Tensor | None) -> dict[str, Any]:
    C, wide = x.shape[-1], triton.next_power_of_2(x.shape[-1])
    rows = max(1, min(4, 1024 // wide))
    return {
        "M": x.numel() // C,
        "C": C,
        "eps": EPS,
        "threshold": _threshold(dropout),
        "kept": 1 / (1 - dropout),
        "WIDE": wide,
        "ROWS": rows,
        "DROP": dropout > 0,
        "BIAS": bias is not None,
        "num_warps": max(1, min(8, wide * rows // 512)),
    }


def _lines(idx: Tensor) -> tuple[Tensor, dict[str, int]]:
    """Tokens (B, T), which may be a window less one of its own, and how a kernel finds them."""
    idx = idx if idx.stride(1) == 1 else idx.contiguous()
    return idx, {"T": idx.shape[1], "down": idx.stride(0)}


@operator
def embed_norm(
    idx: Tensor,
    wte: Tensor,
    wpe: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    dropout: float,
    seeds: Tensor,
    site: int,
) -> tuple[Tensor, Tensor]:
    """dropout(wte[idx] + wpe), float32 (B, T, C), and its layer norm in `dtype`."""
    if idx.shape[1] > len(wpe):
        raise ValueError(f"{idx.shape[1]} tokens have {len(wpe)} positions")
    total = wte.new_empty(*idx.shape, wte.shape[1])
    normed, given = torch.empty_like(total, dtype=dtype), _rows(total, dropout, bias)
    idx, lines = _lines(idx)
    grid = (triton.cdiv(given["M"], given["ROWS"]),)
    kernels.embed_norm_forward[grid](
        idx, wte, wpe, weight, bias, total, normed, seeds, site, len(wte), **lines, **given
    )
    return total, normed


@register_fake(embed_norm)
def _(
    idx: Tensor, wte: Tensor, wpe: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, *_: Any
) -> tuple[Tensor, Tensor]:
    total = wte.new_empty(*idx.shape, wte.shape[1])
    return total, torch.empty_like(total, dtype=dtype)


@operator
def add_norm(
    x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None, dropout: float, seeds: Tensor, site: int
) -> tuple[Tensor, Tensor]:
    """x + dropout(y), float32 (..., C), and its layer norm in y's dtype."""
    x, y = x.contiguous(), y.contiguous()
    total, normed = torch.empty_like(x), torch.empty_like(y)
    given = _rows(x, dropout, bias)
    grid = (triton.cdiv(given["M"], given["ROWS"]),)
    kernels.add_norm_forward[grid](x, y, weight, bias, total, normed, seeds, site, **given)
    return total, normed


register_fake(add_norm)(lambda x, y, *_: (x.new_empty(x.shape), y.new_empty(y.shape)))


@operator
def _norm_backward(
    total: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dtotal: Tensor | None,
    dnormed: Tensor,
    dtype: torch.dtype,
    added: bool,
    dropout: float,
    seeds: Tensor,
    site: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of the sum, empty unless something was `added` to it, of what was dropped, in `dtype`, of the
    norm's weight and of its bias."""
    dtotal, dnormed = None if dtotal is None else dtotal.contiguous(), dnormed.contiguous()
    dx, dy = total.new_empty(total.shape if added else 0), torch.empty_like(total, dtype=dtype)
    given = _rows(total, dropout, bias)
    programs = min(PROGRAMS, triton.cdiv(given["M"], given["ROWS"]))
    dweight = total.new_empty(programs, given["C"])
    dbias = total.new_empty(programs if bias is not None else 0, given["C"])
    given |= {"LAST": dtotal is None, "ADDED": added, "programs": programs}
    kernels.norm_backward[(programs,)](total, weight, dtotal, dnormed, dx, dy, dweight, dbias, seeds, site, **given)
    return dx, dy, _sum(dweight), _sum(dbias)


def _sum(shares: Tensor) -> Tensor:
    programs, C = shares.shape
    sums = shares.new_empty(C if programs else 0)
    if programs:
        kernels.column_sums[(triton.cdiv(C, 8),)](shares, sums, programs, C, BLOCK=8, STEP=32, num_warps=4)
    return sums


@register_fake(_norm_backward)
def _(
    total: Tensor, weight: Tensor, bias: Tensor | None, dtotal: Tensor | None, dnormed: Tensor, dtype: torch.dtype,
    added: bool, *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    C, biases = total.shape[-1], 0 if bias is None else total.shape[-1]
    dx, dy = total.new_empty(total.shape if added else 0), torch.empty_like(total, dtype=dtype)
    return dx, dy, total.new_empty(C), total.new_empty(biases)


@operator
def _token_sums(idx: Tensor, rows: Tensor, tokens: int) -> Tensor:
    """The sums (tokens, C) of `rows` (B, T, C) by their token, in an order that is always the same."""
    M, C = idx.numel(), rows.shape[-1]
    if tokens > FEW:  # sorted first: five times as long
        return torch.ops.aten.embedding_dense_backward(rows, idx.clamp(0, tokens - 1), tokens, -1, False)
    idx, lines = _lines(idx)
    wide = max(16, triton.next_power_of_2(tokens))
    tile = {"WIDE": wide, "BLOCK": 64, "STEP": 64, "num_warps": 4 if wide <= 128 else 8}
    blocks = triton.cdiv(C, tile["BLOCK"])
    length = triton.cdiv(M * blocks, 2 * MULTIPROCESSORS * tile["STEP"]) * tile["STEP"]
    shares = rows.new_empty(triton.cdiv(M, length), tokens * C)
    kernels.token_sums[blocks, len(shares)](
        idx, rows, shares, tokens, M, C, **lines, length=length, SPLIT=rows.is_cuda, **tile
    )
    return _sum(shares).view(tokens, C)


register_fake(_token_sums)(lambda idx, rows, tokens: rows.new_empty(tokens, rows.shape[-1]))


def _keep_embed_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    idx, wte, wpe, weight, bias, _, ctx.dropout, seeds, ctx.site = inputs
    ctx.tokens, ctx.places = wte.shape[0], wpe.shape[0]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(idx, output[0], weight, bias, seeds)


def _embed_norm_gradients(ctx: Any, dtotal: Tensor | None, dnormed: Tensor | None) -> tuple[Tensor | None, ...]:
    idx, total, weight, bias, seeds = ctx.saved_tensors
    dnormed = torch.zeros_like(total) if dnormed is None else dnormed
    _, dsum, dweight, dbias = _norm_backward(
        total, weight, bias, dtotal, dnormed, torch.float32, False, ctx.dropout, seeds, ctx.site
    )
    dwte = _token_sums(idx, dsum, ctx.tokens)
    dwpe = F.pad(dsum.sum(0), (0, 0, 0, ctx.places - idx.shape[1]))
    return None, dwte, dwpe, dweight, dbias if bias is not None else None, None, None, None, None


register_autograd(embed_norm, _embed_norm_gradients, setup_context=_keep_embed_norm)


def _keep_add_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, y, weight, bias, ctx.dropout, seeds, ctx.site = inputs
    ctx.dtype = y.dtype
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[0], weight, bias, seeds)


def _add_norm_gradients(ctx: Any, dtotal: Tensor | None, dnormed: Tensor | None) -> tuple[Tensor | None, ...]:
    total, weight, bias, seeds = ctx.saved_tensors
    dnormed = torch.zeros_like(total, dtype=ctx.dtype) if dnormed is None else dnormed
    dx, dy, dweight, dbias = _norm_backward(
        total, weight, bias, dtotal, dnormed, ctx.dtype, True, ctx.dropout, seeds, ctx.site
    )
    return dx, dy, dweight, dbias if bias is not None else None, None, None, None


register_autograd(add_norm, _add_norm_gradients, setup_context=_keep_add_norm)


# -- GELU -------------------------------------------------------------------------------------------------------------


@operator
def gelu(x: Tensor) -> Tensor:
    """The exact GELU of `x`, of any shape. Kept for the product behind it."""
    x = x.contiguous()
    y = torch.empty_like(x)
    kernels.gelu_forward[(triton.cdiv(x.numel(), ELEMENTS),)](x, y, x.numel(), BLOCK=ELEMENTS)
    return y


@operator
def _gelu_backward(x: Tensor, dy: Tensor) -> Tensor:
    x, dy = x.contiguous(), dy.contiguous()
    dx = torch.empty_like(x)
    kernels.gelu_backward[(triton.cdiv(x.numel(), ELEMENTS),)](x, dy, dx, x.numel(), BLOCK=ELEMENTS)
    return dx


register_fake(gelu)(lambda x: x.new_empty(x.shape))
register_fake(_gelu_backward)(lambda x, dy: x.new_empty(x.shape))
register_autograd(
    gelu,
    lambda ctx, dy: _gelu_backward(*ctx.saved_tensors, dy),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


# -- cross entropy ----------------------------------------------------------------------------------------------------


def _tiles(width: int) -> dict[str, int]:
    wide = min(4096, triton.next_power_of_2(width))
    return {"WIDE": wide, "ROWS": min(32, 4096 // wide)}


@operator
def cross_entropy(logits: Tensor, targets: Tensor, V: int) -> tuple[Tensor, Tensor]:
    """Mean cross entropy, in nats, float32 (), of `targets` (B, T) by the first V of `logits` (B, T, width); and the
    log of each softmax's sum, float32 (B, T)."""
    logits, (targets, lines) = logits.contiguous(), _lines(targets)
    losses, sums = (logits.new_empty(targets.shape, dtype=torch.float32) for _ in range(2))
    M, width, tiles = targets.numel(), logits.shape[-1], _tiles(V)
    grid = (triton.cdiv(M, tiles["ROWS"]),)
    kernels.cross_entropy_forward[grid](logits, targets, losses, sums, M, V, width, **lines, **tiles)
    return losses.mean(), sums


@operator
def _cross_entropy_backward(logits: Tensor, targets: Tensor, sums: Tensor, dmean: Tensor, V: int) -> Tensor:
    logits, (targets, lines) = logits.contiguous(), _lines(targets)
    dlogits, M, width = torch.empty_like(logits), targets.numel(), logits.shape[-1]
    tiles = _tiles(width)
    grid = (triton.cdiv(M, tiles["ROWS"]), triton.cdiv(width, tiles["WIDE"]))
    kernels.cross_entropy_backward[grid](logits, targets, sums, dmean, dlogits, M, V, width, **lines, **tiles)
    return dlogits


@register_fake(cross_entropy)
def _(logits: Tensor, targets: Tensor, V: int) -> tuple[Tensor, Tensor]:
    return logits.new_empty((), dtype=torch.float32), logits.new_empty(targets.shape, dtype=torch.float32)


register_fake(_cross_entropy_backward)(lambda logits, *_: logits.new_empty(logits.shape))


def _keep_cross_entropy(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, targets, ctx.V = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, targets, output[1])


def _cross_entropy_gradients(ctx: Any, dmean: Tensor, _: Tensor) -> tuple[Tensor, None, None]:
    return _cross_entropy_backward(*ctx.saved_tensors, dmean, ctx.V), None, None


register_autograd(cross_entropy, _cross_entropy_gradients, setup_context=_keep_cross_entropy)


# -- AdamW ------------------------------------------------------------------------------------------------------------


def adamw(
    flat: Sequence[Tensor], decaying: int, lr: Tensor, steps: Tensor, norm: Tensor, found_inf: Tensor | None,
    betas: tuple[float, float], decay: float, limit: float, eps: float,
) -> None:  # fmt: skip
    """One update, in place, of float32 buffers (n,): weights, gradients, and their first and second moments. The first
    `decaying` numbers decay, and gradients of `norm` () are clipped to `limit` unless that is 0; `steps` counts this
    one."""
    size, rest = flat[0].numel(), [1 - beta for beta in betas]
    logs = [math.log2(beta) if beta else -math.inf for beta in betas]
    grid = (triton.cdiv(size, ELEMENTS),)
    kernels.adamw[grid](
        *flat, lr, steps, norm, found_inf, size, decaying, *betas, *rest, *logs, decay, limit, eps,
        CLIP=limit > 0, SCALED=found_inf is not None, BLOCK=ELEMENTS,
    )  # fmt: skip
