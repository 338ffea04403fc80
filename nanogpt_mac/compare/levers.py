"""The levers: settings of each back end, changed one at a time, to see what each is worth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from nanogpt_mac.backends.base import DTYPES
from nanogpt_mac.compare.variants import Machine, known
from nanogpt_mac.config import Config
from nanogpt_mac.overrides import merged, slug
from nanogpt_mac.records.plan import Lever, Variant


def variants(machine: Machine, backends: Sequence[str], compose: Callable[[Variant], Config]) -> list[Variant]:
    """For each back end its default variant, its other compilation, and one variant for each lever that has an effect on it."""
    chosen: list[Variant] = []
    for backend in backends:
        eager, compiled = (known(name, machine) for name in _names(backend))
        base, other = (compiled, eager) if backend in ("mlx", "cuda") else (eager, compiled)  # what compile=auto takes
        value = base is eager
        what = "torch.compile" if backend != "mlx" else "mx.compile"
        chosen.append(base)
        chosen.append(_changed(base, other.overrides, "compile", value, f"{'' if value else 'no '}{what}", other))
        chosen += [
            _changed(base, [f"{key}={_spelt(value)}"], key, value, what)
            for key, value, what in _settings(machine, backend, compose(base))
        ]
        if backend == "cuda":
            chosen += [
                _changed(base, [f"backend.compile_mode={mode}"], "backend.compile_mode", mode, what)
                for mode, what in (
                    ("reduce-overhead", "the loss as CUDA graphs"),
                    ("max-autotune-no-cudagraphs", "kernels chosen by timing them"),
                )
            ]
    return chosen


def _names(backend: str) -> tuple[str, str]:
    """Names of the eager and the compiled variant."""
    return ("mlx-eager", "mlx") if backend == "mlx" else (backend, f"{backend}-compile")


def _settings(machine: Machine, backend: str, base: Config) -> list[tuple[str, Any, str]]:
    """(key, value, what it means) of every lever that changes what this back end does.

    Left out because they change nothing: sync on a CPU, which does not run behind the host; fused AdamW in MLX, which
    has one step anyway; TF32 where there is none. Half precision on MLX's Linux CPU build has no fast product.
    """
    ahead, accelerated = machine.runs_ahead(backend), backend in ("mps", "cuda") or machine.mlx_gpu
    settings: list[tuple[str, Any, str]] = []
    if backend != "mlx" and base.backend.fused_adamw is not False:
        settings.append(("backend.fused_adamw", False, "AdamW as torch's own loop over tensors, not one fused kernel"))
    if ahead:
        waits = {
            "completion": "waits one iteration behind",
            "iteration": "waits for each iteration before the next",
            "interval": f"waits once every {base.log_interval} iterations",
        }
        settings += [("sync", policy, f"the host {how}") for policy, how in waits.items() if policy != base.sync]
    dtypes = {dtype: f"{dtype} matrix products" for dtype in DTYPES} | {
        "float16": "float16 products, with loss scaling"
    }
    if backend == "cpu":
        dtypes.pop("float16")
    if backend != "mlx" or accelerated:
        settings += [("dtype", dtype, what) for dtype, what in dtypes.items() if dtype != base.dtype]
    if base.dtype == "float32":
        settings += _precision(machine, backend, base)
    if base.model.dropout > 0:
        gain = "; MLX then takes its fused attention" if backend == "mlx" else ""
        settings.append(("model.dropout", 0.0, f"no dropout, which learns something else{gain}"))
    else:
        cost = "; MLX's fused attention cannot have it" if backend == "mlx" else ""
        settings.append(("model.dropout", 0.2, f"dropout of 0.2, which learns something else{cost}"))
    if base.backend.blas == "torch":
        settings.append(("backend.blas", "own", "the reference BLAS of MLX's Linux wheel"))
    return settings


def _precision(machine: Machine, backend: str, base: Config) -> list[tuple[str, Any, str]]:
    """Less exact float32 products, where this machine has them."""
    if base.matmul_precision != "highest":
        return [("matmul_precision", "highest", "float32 products in full")]
    if backend == "cuda" or (backend == "mlx" and machine.mlx_gpu):
        return [("matmul_precision", "high", "TF32 matrix products, where the GPU has them")]
    if backend == "cpu" and _cpu_rounds():
        return [("matmul_precision", "medium", "float32 products rounded to bfloat16 inside")]
    return []


def _cpu_rounds() -> bool:
    """Whether torch's CPU products change at all at lower precision: asked by computing one."""
    import torch

    matrix = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    before, exact = torch.get_float32_matmul_precision(), matrix @ matrix
    try:
        torch.set_float32_matmul_precision("medium")
        return not torch.equal(matrix @ matrix, exact)
    finally:
        torch.set_float32_matmul_precision(before)


def _changed(
    base: Variant, overrides: Sequence[str], key: str, value: Any, what: str, named: Variant | None = None
) -> Variant:
    short = f"{key.rpartition('.')[2]}={_spelt(value)}"
    name = named.name if named else slug(f"{base.name}-{short}")
    before = base.label.replace(", torch's BLAS", "") if key == "backend.blas" else base.label
    label = named.label if named else f"{before}, {short}"
    lever = Lever(base=base.name, key=key, value=value, what=what)
    return Variant(name=name, label=label, overrides=tuple(merged(base.overrides, overrides)), lever=lever)


def _spelt(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
