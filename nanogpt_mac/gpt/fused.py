"""torch_gpt's forward pass on an NVIDIA GPU with the kernels of triton_kernels.py, as operators that autograd knows.

Same arithmetic, in fewer passes over memory: attention reads q, k and v, and writes their gradients, where the packed
product has them; a residual sum, its dropout and the layer norm behind it are one kernel. The backward pass draws the
masks of dropout anew.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from nanogpt_mac.gpt import triton_kernels as kernels
from nanogpt_mac.gpt.spec import GPTSpec
from nanogpt_mac.gpt.torch_gpt import GPT, Block, LayerNorm, mean_nats

WIDEST_HEAD = 128
WIDEST = 4096  # columns of a row that a program holds
PROGRAMS = 528  # of the layer norm's backward pass: four for each multiprocessor of an H100
VOCABULARY = 64  # the head's rows are padded to a multiple of it: an odd number has slow kernels
ELEMENTS = 1024  # of a program of GELU
TILE = {"ROWS": 128, "COLUMNS": 64, "STEP": 32, "BAND": 8, "num_warps": 8, "num_stages": 3}  # of a product of float32
WIDER = {**TILE, "COLUMNS": 256, "STEP": 64}  # of 16 bits
SHARES, BUSY = 16, 1200  # into how many a product's terms are split at most, and programs that are enough
EPS = 1e-5


def fault(spec: GPTSpec) -> str | None:
    """Why these kernels cannot compute such a model on this GPU, or None where they can."""
    if torch.cuda.get_device_capability() < (8, 0):
        return "need a GPU of compute capability 8.0 or later"
    if spec.n_embd // spec.n_head > WIDEST_HEAD:
        return f"have heads of at most {WIDEST_HEAD} channels"
    return f"have rows of at most {WIDEST} channels" if spec.n_embd > WIDEST else None


def prepare(spec: GPTSpec, dtype: torch.dtype, device: torch.device) -> None:
    """Compile the kernels of such a model, or load them from Triton's cache, side by side: in turn they take 10 s."""
    (T, C), p = (spec.block_size, spec.n_embd), spec.dropout
    y, qkv, hidden = (torch.zeros(1, T, wide * C, dtype=dtype, device=device) for wide in (1, 3, 4))
    x, lse, drawn = y.float(), y.new_zeros(spec.n_head, T, dtype=torch.float32), y.new_zeros(4, dtype=torch.int64)
    weight = x[0, 0].clone()
    bias = weight if spec.bias else None
    work: list[Callable[[], object]] = [
        lambda: [attention(qkv, spec.n_head, dropout, drawn, 0) for dropout in {p, 0.0}],
        lambda: _attention_backward(qkv, y, y, lse, spec.n_head, p, drawn, 0),
        lambda: [add_norm(x, y, weight, bias, dropout, drawn, 1) for dropout in {p, 0.0}],
        lambda: _add_norm_backward(x, weight, bias, x, y, p, drawn, 1),
        *((lambda: gelu(hidden), lambda: _gelu_backward(hidden, hidden)) if spec.gelu == "exact" else ()),
    ]
    if exact(dtype):
        a, ab = x.new_zeros(TILE["ROWS"], C), x.new_zeros(TILE["ROWS"], 3 * C)
        b = x.new_zeros(3 * C, C).T  # as a linear layer's weight lies
        work += [lambda: product(a, b), lambda: product(ab, b.T), lambda: product(ab.T, a)]
    with ThreadPoolExecutor(len(work)) as pool:
        for done in [pool.submit(one) for one in work]:
            done.result()


def _threshold(dropout: float) -> int:
    """In units of 2^-32, as the signed number that Triton takes."""
    dropped = min(round(dropout * 2**32), 2**32 - 1)
    return dropped - 2**32 if dropped >= 2**31 else dropped


@torch.compiler.assume_constant_result  # else a graph ends here; a change of the precision fails its guards
def exact(dtype: torch.dtype) -> bool:
    """Whether products are to keep what float32 holds: where torch was asked for that."""
    return dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"


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
        "num_stages": 3 if ahead else 1,
    }
    return (triton.cdiv(T, block), B * n_head), given


@torch.library.custom_op("nanogpt_mac::attention", mutates_args=())
def attention(qkv: Tensor, n_head: int, dropout: float, seeds: Tensor, site: int) -> tuple[Tensor, Tensor]:
    """Causal attention (B, T, C) of packed `qkv` (B, T, 3 C), in its dtype, and the log2 of its softmax's sums."""
    B, T, width = qkv.shape
    out, lse = qkv.new_empty(B, T, width // 3), qkv.new_empty(B * n_head, T, dtype=torch.float32)
    grid, given = _head(qkv, n_head, dropout)
    kernels.attention_forward[grid](qkv.contiguous(), out, lse, seeds, site, **given)
    return out, lse


@attention.register_fake
def _(qkv: Tensor, n_head: int, *_: Any) -> tuple[Tensor, Tensor]:
    B, T, width = qkv.shape
    return qkv.new_empty(B, T, width // 3), qkv.new_empty(B * n_head, T, dtype=torch.float32)


@torch.library.custom_op("nanogpt_mac::attention_backward", mutates_args=())
def _attention_backward(
    qkv: Tensor, out: Tensor, dout: Tensor, lse: Tensor, n_head: int, dropout: float, seeds: Tensor, site: int
) -> Tensor:
    qkv, dout = qkv.contiguous(), dout.contiguous()
    dqkv = torch.empty_like(qkv)
    grid, given = _head(qkv, n_head, dropout, backward=True)
    natural = given["scale"] / math.log2(math.e)
    kernels.attention_backward[grid](qkv, out, dout, lse, seeds, dqkv, site, natural=natural, **given)
    return dqkv


_attention_backward.register_fake(lambda qkv, *_: qkv.new_empty(qkv.shape))


def _keep_attention(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, ctx.n_head, ctx.dropout, seeds, ctx.site = inputs
    ctx.save_for_backward(qkv, *output, seeds)


def _attention_gradients(ctx: Any, dout: Tensor, _: Tensor) -> tuple[Tensor, None, None, None, None]:
    qkv, out, lse, seeds = ctx.saved_tensors
    return _attention_backward(qkv, out, dout, lse, ctx.n_head, ctx.dropout, seeds, ctx.site), None, None, None, None


attention.register_autograd(_attention_gradients, setup_context=_keep_attention)


# -- residual sum, dropout and layer norm -----------------------------------------------------------------------------


def _rows(x: Tensor, dropout: float, bias: Tensor | None) -> dict[str, Any]:
    C, wide = x.shape[-1], triton.next_power_of_2(x.shape[-1])
    rows = max(1, min(4, 2048 // wide))
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
        "num_warps": 4 if wide * rows <= 2048 else 8,
    }


@torch.library.custom_op("nanogpt_mac::add_norm", mutates_args=())
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


add_norm.register_fake(lambda x, y, *_: (x.new_empty(x.shape), y.new_empty(y.shape)))


@torch.library.custom_op("nanogpt_mac::add_norm_backward", mutates_args=())
def _add_norm_backward(
    total: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dtotal: Tensor,
    dnormed: Tensor,
    dropout: float,
    seeds: Tensor,
    site: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtotal, dnormed = dtotal.contiguous(), dnormed.contiguous()
    dx, dy = torch.empty_like(total), torch.empty_like(dnormed)
    given = _rows(total, dropout, bias)
    programs = min(PROGRAMS, triton.cdiv(given["M"], given["ROWS"]))
    dweight = total.new_empty(programs, given["C"])
    dbias = total.new_empty(programs if bias is not None else 0, given["C"])
    kernels.add_norm_backward[(programs,)](
        total, weight, dtotal, dnormed, dx, dy, dweight, dbias, seeds, site, programs=programs, **given
    )
    return dx, dy, _sum(dweight), _sum(dbias)


def _sum(shares: Tensor) -> Tensor:
    programs, C = shares.shape
    sums = shares.new_empty(C if programs else 0)
    if programs:
        kernels.column_sums[(triton.cdiv(C, 8),)](shares, sums, programs, C, BLOCK=8, STEP=32, num_warps=4)
    return sums


@_add_norm_backward.register_fake
def _(
    total: Tensor, weight: Tensor, bias: Tensor | None, dtotal: Tensor, dnormed: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    C, biases = total.shape[-1], 0 if bias is None else total.shape[-1]
    return total.new_empty(total.shape), dnormed.new_empty(dnormed.shape), total.new_empty(C), total.new_empty(biases)


def _keep_add_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, _, weight, bias, ctx.dropout, seeds, ctx.site = inputs
    ctx.biased = bias is not None
    ctx.save_for_backward(output[0], weight, bias, seeds)


def _add_norm_gradients(ctx: Any, dtotal: Tensor, dnormed: Tensor) -> tuple[Tensor | None, ...]:
    total, weight, bias, seeds = ctx.saved_tensors
    dx, dy, dweight, dbias = _add_norm_backward(total, weight, bias, dtotal, dnormed, ctx.dropout, seeds, ctx.site)
    return dx, dy, dweight, dbias if ctx.biased else None, None, None, None


add_norm.register_autograd(_add_norm_gradients, setup_context=_keep_add_norm)


# -- GELU -------------------------------------------------------------------------------------------------------------


@torch.library.custom_op("nanogpt_mac::gelu", mutates_args=())
def gelu(x: Tensor) -> Tensor:
    """The exact GELU of `x`, of any shape. Kept for the product behind it, where Inductor computes it again."""
    x = x.contiguous()
    y = torch.empty_like(x)
    kernels.gelu_forward[(triton.cdiv(x.numel(), ELEMENTS),)](x, y, x.numel(), BLOCK=ELEMENTS)
    return y


@torch.library.custom_op("nanogpt_mac::gelu_backward", mutates_args=())
def _gelu_backward(x: Tensor, dy: Tensor) -> Tensor:
    x, dy = x.contiguous(), dy.contiguous()
    dx = torch.empty_like(x)
    kernels.gelu_backward[(triton.cdiv(x.numel(), ELEMENTS),)](x, dy, dx, x.numel(), BLOCK=ELEMENTS)
    return dx


gelu.register_fake(lambda x: x.new_empty(x.shape))
_gelu_backward.register_fake(lambda x, dy: x.new_empty(x.shape))
gelu.register_autograd(
    lambda ctx, dy: _gelu_backward(*ctx.saved_tensors, dy),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


# -- a product of matrices --------------------------------------------------------------------------------------------


@torch.library.custom_op("nanogpt_mac::product", mutates_args=())
def product(a: Tensor, b: Tensor) -> Tensor:
    """`a` (M, K) times `b` (K, N), in their dtype with sums in float32. No step takes it in 16 bits; suite=gemm does.

    Each number of float32 is split into three of bfloat16, which hold it to the last bit, and six of the nine products
    are summed: the other three are below float32's rounding. A quarter of cuBLAS's error, in less time.
    """
    (M, K), N, single = a.shape, b.shape[1], a.dtype == torch.float32
    tile = TILE if single else WIDER
    tiles = triton.cdiv(M, tile["ROWS"]) * triton.cdiv(N, tile["COLUMNS"])
    count = min(SHARES, BUSY // tiles, K // 512) if single else 1  # a weight's gradient has few tiles and many terms
    length = triton.cdiv(K, max(1, count) * tile["STEP"]) * tile["STEP"]
    shares = a.new_empty(triton.cdiv(K, length), M, N)
    even = M % tile["ROWS"] == N % tile["COLUMNS"] == K % length == 0
    precision = "bf16x6" if single and a.is_cuda else "ieee"  # all that Triton's interpreter has
    kernels.product[tiles, len(shares)](
        a, b, shares, M, N, K, *a.stride(), *b.stride(), length, PRECISION=precision, EVEN=even, **tile
    )  # fmt: skip
    return shares[0] if len(shares) == 1 else shares.sum(0)


product.register_fake(lambda a, b: a.new_empty(a.shape[0], b.shape[1]))


def _product_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    a, b = ctx.saved_tensors
    return product(grad, b.T), product(grad.T, a).T


product.register_autograd(_product_gradients, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))


class LinearTF32(torch.autograd.Function):
    """x W^T of float32 by cuBLAS, whose TF32 is up to a third slower where terms do not lie side by side."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        wide = weight.shape[0] > weight.shape[1]  # the longer side as columns: a quarter faster
        return grad @ weight.T.contiguous().T, (x.T @ grad).T if wide else grad.T @ x


# -- the model --------------------------------------------------------------------------------------------------------


def logits(model: GPT, idx: Tensor, last: bool = False) -> Tensor:
    """Logits (B, T, V) in float32 of tokens `idx` (B, T): what `model` computes by itself, dropout included.

    `last`: of the last token alone, (B, 1, V).
    """
    y = _stream(model, idx, Pieces())
    return head(model, y[:, -1:] if last else y)


def loss(model: GPT, pieces: Pieces, idx: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy, in nats, of `targets` (B, T) after tokens `idx` (B, T)."""
    return pieces.nats(model, _stream(model, idx, pieces), targets)


def _stream(model: GPT, idx: Tensor, pieces: Pieces) -> Tensor:
    t: Any = model.transformer
    drawn, dropped, after = seeds(model, idx), dropout(model), norms(model)[2::2]
    x, y = pieces.enter(model, idx)
    for layer, block in enumerate(t["h"]):
        given = block, after[layer], x, y, drawn[layer], dropped
        again = model.checkpointing and model.training
        x, y = checkpoint(pieces.block, *given, use_reentrant=False) if again else pieces.block(*given)
    return y


def norms(model: GPT) -> list[LayerNorm]:
    """In the order in which they are computed: the first alone, the others behind a residual sum each."""
    t: Any = model.transformer
    return [norm for block in t["h"] for norm in (block.ln_1, block.ln_2)] + [t["ln_f"]]


def seeds(model: GPT, idx: Tensor) -> Tensor:
    """A row a layer, int64, of its masks' seeds, wide enough to be aligned; any numbers where nothing is dropped."""
    layers = model.spec.n_layer
    return torch.randint(2**32, (layers, 4), device=idx.device) if dropout(model) else idx[:1].expand(layers, -1)


def dropout(model: GPT) -> float:
    """The share that is dropped now."""
    return model.spec.dropout if model.training else 0.0


def enter(model: GPT, idx: Tensor) -> tuple[Tensor, Tensor]:
    """The residual stream's beginning and its layer norm, (B, T, C) both, in the dtypes that a block returns."""
    t: Any = model.transformer
    x = model.embed(idx, t["wpe"].weight[: idx.shape[1]])
    y, device = norms(model)[0](x), idx.device.type
    return x, y.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else y


def block(
    of: Block, following: LayerNorm, x: Tensor, y: Tensor, drawn: Tensor, dropout: float
) -> tuple[Tensor, Tensor]:
    """The residual stream x and the norm y of it, (B, T, C), after a block; `following` is the norm behind it."""
    x, y = add(of.ln_2, x, attend(of, y, drawn, dropout), drawn, 1, dropout)
    return add(following, x, mlp(of, y), drawn, 2, dropout)


def attend(of: Block, y: Tensor, drawn: Tensor, dropout: float) -> Tensor:
    """A block's attention with both projections, (B, T, C)."""
    y, _ = attention(linear(of.attn.c_attn, y), of.attn.n_head, dropout, drawn, 0)
    return linear(of.attn.c_proj, y)


def linear(of: nn.Linear, x: Tensor) -> Tensor:
    """What `of` makes of `x` (..., C)."""
    if x.dtype != torch.float32:
        return of(x)
    rows = x.flatten(0, -2)
    y = product(rows, of.weight.T) if exact(x.dtype) else LinearTF32.apply(rows, of.weight)
    y = y.unflatten(0, x.shape[:-1])
    return y if of.bias is None else y + of.bias


def mlp(of: Block, y: Tensor) -> Tensor:
    """A block's MLP, (B, T, C)."""
    hidden = linear(of.mlp.c_fc, y)
    return linear(of.mlp.c_proj, gelu(hidden) if of.mlp.gelu.approximate == "none" else of.mlp.gelu(hidden))


def add(norm: LayerNorm, x: Tensor, y: Tensor, drawn: Tensor, place: int, dropout: float) -> tuple[Tensor, Tensor]:
    """The residual sum behind a block's attention (`place` 1) or MLP (2), with dropout, and the norm behind it."""
    return add_norm(x, y, norm.weight, norm.bias, dropout, drawn, place)


def head(model: GPT, y: Tensor) -> Tensor:
    """Logits (B, T, V) of the last layer norm's output: the embedding's rows, padded."""
    t: Any = model.transformer
    rows = F.pad(t["wte"].weight, (0, 0, 0, -model.spec.vocab_size % VOCABULARY))
    return F.linear(y, rows)[..., : model.spec.vocab_size].float()


def nats(model: GPT, y: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy, in nats, of `targets` (B, T) after the last layer norm's output (B, T, C)."""
    return mean_nats(head(model, y), targets)


class Pieces(NamedTuple):
    """What a forward pass calls: compiled each on its own, the blocks share one, which takes a sixth of the time."""

    enter: Callable[[GPT, Tensor], tuple[Tensor, Tensor]] = enter
    block: Callable[..., tuple[Tensor, Tensor]] = block
    nats: Callable[[GPT, Tensor, Tensor], Tensor] = nats
