"""The best matmul rate that a back end reaches here: the denominator of `mfu_measured`."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import psutil

from nanogpt_mac.errors import InputError

DTYPES = {"float32": 4, "bfloat16": 2, "float16": 2}  # bytes an element
SQUARES = (128, 256, 512, 1024, 2048, 4096, 8192, 16384)
BATCHES = 4  # timings of one shape; the first also warms up
BATCH_S = 0.02  # matmuls are queued until a timing takes about this long, so that launching them does not count
MAX_QUEUED = 200

Shape = tuple[int, int, int]


@dataclass(frozen=True)
class GemmPeak:
    """`flops_per_s`: the best rate, at `shape` = (M, K, N) of (M x K) @ (K x N). `trials`: every shape's best rate."""

    flops_per_s: float
    shape: Shape
    dtype: str
    trials: tuple[tuple[Shape, float], ...]


def measure(framework: str, device: str, dtype: str, shapes: Sequence[Shape], budget_s: float = 1.0) -> GemmPeak:
    """Tries squares of growing size and the given shapes (M, K, N), as far as `budget_s` seconds allow.

    `framework` is "torch" (`device`: "cpu", "mps", "cuda", "cuda:1") or "mlx" ("cpu" or "gpu"). Normal random numbers
    from a generator of its own; completion is timed; each shape's rate is the best of a few timings, each of several
    matmuls in a row. The process's matmul precision (torch.set_float32_matmul_precision, MLX_ENABLE_TF32) is obeyed
    and left alone. Shapes too large for the budget or for a quarter of the free memory are not tried. The clock
    starts once the device has done its first matmul. Memory is given back, but the framework's peak memory has
    changed: the caller resets it.
    """
    if dtype not in DTYPES:
        raise InputError(f"dtype={dtype}: no matmul peak is measured for it; use one of {', '.join(DTYPES)}")
    if framework == "torch":
        bench: _Torch | _Mlx = _Torch(device, dtype)
    elif framework == "mlx":
        bench = _Mlx(device, dtype)
    else:
        raise InputError(f"framework={framework}: use torch or mlx")
    for shape in shapes:
        if len(shape) != 3 or min(shape) < 1:
            raise InputError(f"shapes={shape}: use three positive sizes (M, K, N)")
    try:
        return _search(bench, dtype, shapes, budget_s)
    finally:
        bench.free()


def _flops(shape: Shape) -> int:
    return 2 * math.prod(shape)


def _search(bench: _Torch | _Mlx, dtype: str, shapes: Sequence[Shape], budget_s: float) -> GemmPeak:
    first, *squares = [(n, n, n) for n in SQUARES]
    bench.prepare(first)(1)
    deadline = time.perf_counter() + budget_s
    trials: dict[Shape, float] = {first: _best_rate(bench.prepare(first), _flops(first), deadline)}
    for shape in sorted({*squares, *shapes} - {first}, key=_flops):
        m, k, n = shape
        # From the best rate so far one matmul's time follows. Two must fit, and drawing the numbers; a shape that turns
        # out three times slower still ends soon after the deadline.
        expected = _flops(shape) / max(trials.values())
        affordable = expected < 0.4 * (deadline - time.perf_counter())
        if affordable and (m * k + k * n + m * n) * DTYPES[dtype] <= bench.free_bytes() / 4:
            trials[shape] = _best_rate(bench.prepare(shape), _flops(shape), deadline)
    best = max(trials, key=trials.__getitem__)
    return GemmPeak(trials[best], best, dtype, tuple(trials.items()))


def _best_rate(matmuls: Callable[[int], None], flops: int, deadline: float) -> float:
    best = math.inf
    queued = 1
    for _ in range(BATCHES):
        start = time.perf_counter()
        matmuls(queued)
        now = time.perf_counter()
        best = min(best, (now - start) / queued)
        queued = min(max(round(BATCH_S / best), 1), MAX_QUEUED)
        if now + queued * best > deadline:
            break
    return flops / best


class _Torch:
    def __init__(self, device: str, dtype: str) -> None:
        import torch

        self.torch = torch
        self.device = torch.device(device)
        self.dtype: torch.dtype = getattr(torch, dtype)
        self.random = torch.Generator(self.device).manual_seed(0)  # the global one belongs to the training run

    def prepare(self, shape: Shape) -> Callable[[int], None]:
        """A function that does `queued` matmuls of this shape and returns when they are done."""
        torch = self.torch
        m, k, n = shape

        a, b = (
            torch.randn(size, generator=self.random, device=self.device, dtype=self.dtype) for size in ((m, k), (k, n))
        )
        out = torch.empty(m, n, device=self.device, dtype=self.dtype)
        self._wait()

        def matmuls(queued: int) -> None:
            for _ in range(queued):
                torch.mm(a, b, out=out)
            self._wait()

        return matmuls

    def _wait(self) -> None:
        if self.device.type == "cuda":
            self.torch.cuda.synchronize(self.device)
        elif self.device.type == "mps":
            self.torch.mps.synchronize()

    def free_bytes(self) -> int:
        if self.device.type == "cuda":
            return int(self.torch.cuda.mem_get_info(self.device)[0])
        return int(psutil.virtual_memory().available)

    def free(self) -> None:
        if self.device.type == "cuda":
            self.torch.cuda.empty_cache()
        elif self.device.type == "mps":
            self.torch.mps.empty_cache()


class _Mlx:
    def __init__(self, device: str, dtype: str) -> None:
        import mlx.core as mx

        if device not in ("cpu", "gpu"):
            raise InputError(f"device={device}: mlx has cpu and gpu")
        self.mx = mx
        self.device = mx.Device(mx.gpu if device == "gpu" else mx.cpu, 0)
        self.stream = mx.default_stream(self.device)
        self.dtype: mx.Dtype = getattr(mx, dtype)

    def prepare(self, shape: Shape) -> Callable[[int], None]:
        mx = self.mx
        m, k, n = shape
        seeds = mx.random.split(mx.random.key(0), stream=self.stream)
        a = mx.random.normal((m, k), dtype=self.dtype, key=seeds[0], stream=self.stream)
        b = mx.random.normal((k, n), dtype=self.dtype, key=seeds[1], stream=self.stream)
        mx.eval(a, b)

        def matmuls(queued: int) -> None:
            for _ in range(queued):
                mx.async_eval(mx.matmul(a, b, stream=self.stream))
            mx.synchronize(self.stream)

        return matmuls

    def free_bytes(self) -> int:
        info = self.mx.device_info(self.device)  # "free_memory" is there on CUDA alone
        return int(info.get("free_memory", psutil.virtual_memory().available))

    def free(self) -> None:
        self.mx.clear_cache()
