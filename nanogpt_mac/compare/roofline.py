"""The floor of an iteration: what this model costs on a chip that does nothing but its arithmetic and its traffic.

    compute = FLOPs / peak        memory = bytes / bandwidth        floor = max of the two: they overlap

FLOPs are nanoGPT's `6N + 12LHQT` a token (gpt/spec.py). It counts the whole attention matrix, so a kernel that leaves
out the masked half may go below its share: 5 % of the whole at shakespeare_char's sizes.

Bytes are the least that must cross memory, as if every element-wise operation, softmax and the attention matrix were
fused away and recomputed for nothing, but no matrix product were computed twice and nothing outlived its phase in a
cache. With P parameters (all of them, 4 bytes each in every dtype), G accumulated batches, n tokens a batch, L layers
C wide, V symbols and e bytes an element of `dtype`:

    weights    4P (2G)            read in each forward and each backward
    gradients  4P (G + G-1 + 1)   written by each backward, added to by all but the first, read by AdamW, which also
                                  clips: the norm can be summed while they are written
    AdamW      4P (6)             weights and both moments read and written
    activations  2nG (L (8C e + 2C 4) + C 4 + V e)
                                  written by the forward, read by the backward: queries, keys and values (3C), the
                                  attention's output (C) and the MLP's hidden layer (4C) in `dtype`; the residual
                                  stream, twice a layer and at the end, in float32; the logits
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nanogpt_mac.config import Config, model_spec
from nanogpt_mac.errors import InputError
from nanogpt_mac.gpt.spec import GPTSpec
from nanogpt_mac.machine import chips
from nanogpt_mac.machine.gemm import DTYPES
from nanogpt_mac.records.comparison import Roofline, Work
from nanogpt_mac.report import show as kit
from nanogpt_mac.report.table import Report, Row, Section, Table
from nanogpt_mac.report.words import DASH, count, seconds

MASTER_BYTES = 4  # weights, gradients, moments and the residual stream are float32 in every dtype


def bytes_per_iter(spec: GPTSpec, batch_size: int, accumulation: int, dtype: str) -> dict[str, int]:
    """The module's count: weights, gradients, adamw, activations, and their sum as total."""
    if dtype not in DTYPES:
        raise InputError(f"dtype={dtype}: use one of {', '.join(DTYPES)}")
    L, C, V, e = spec.n_layer, spec.n_embd, spec.vocab_size, DTYPES[dtype]
    master = MASTER_BYTES * (spec.n_params() + spec.block_size * C)
    tokens = batch_size * spec.block_size * accumulation
    parts = {
        "weights": 2 * accumulation * master,
        "gradients": 2 * accumulation * master,
        "adamw": 6 * master,
        "activations": 2 * tokens * (L * (8 * C * e + 2 * C * MASTER_BYTES) + C * MASTER_BYTES + V * e),
    }
    return parts | {"total": sum(parts.values())}


def floor(
    flops: float,
    traffic: float,
    peak: float | None,
    peak_source: str | None,
    bandwidth: float | None,
    bandwidth_source: str | None,
) -> Roofline | None:
    """The floor of an iteration of `flops` FLOPs and `traffic` bytes; None where neither rate is known.

    `peak` in FLOP/s, `bandwidth` in bytes/s. A rate that is not known leaves its part out, and the floor is that of
    the other.
    """
    compute = None if not peak else flops / peak * 1e3
    memory = None if not bandwidth else traffic / bandwidth * 1e3
    known = {name: value for name, value in (("compute", compute), ("memory", memory)) if value is not None}
    if not known:
        return None
    bound = max(known, key=known.__getitem__)
    return Roofline(
        floor_ms=known[bound],
        compute_ms=compute,
        memory_ms=memory,
        bound=bound,
        flops=flops,
        bytes=traffic,
        peak=peak,
        peak_source=peak_source if peak else None,
        bandwidth=bandwidth,
        bandwidth_source=bandwidth_source if bandwidth else None,
    )


def of_run(work: Work, chip: chips.Chip | None, on_gpu: bool, measured_peak: float | None) -> Roofline | None:
    """The floor of recorded work where it ran; None where nothing is known of it.

    `chip`: the machine's accelerator where it is known. A back end on the CPU is held against the matmul measured on
    it, and on an Apple chip against the bandwidth of the memory, which CPU and GPU share.
    """
    if work.model is None or not work.batch_size or not work.tokens_per_iter or work.dtype is None:
        return None
    try:
        spec = GPTSpec(**work.model.model_dump())
        accumulation = work.gradient_accumulation_steps or 1
        traffic = bytes_per_iter(spec, work.batch_size, accumulation, work.dtype)["total"]
    except (TypeError, InputError):  # another version's model
        return None
    peak = chips.peak(chip, work.dtype, work.matmul_precision or "highest") if on_gpu else None
    source = (
        f"{chip.name}'s peak{', disputed' if chip.disputed else ''}" if chip and peak else "best matmul measured here"
    )
    shares_memory = chip is not None and (on_gpu or chip.name.startswith("Apple"))
    bandwidth = chip.bandwidth if chip is not None and shares_memory else None
    flops = work.flops_per_iter or float(spec.flops_per_token() * work.tokens_per_iter)
    return floor(flops, traffic, peak or measured_peak, source, bandwidth, chip.name if chip else None)


# -- a chip that is not there -----------------------------------------------------------------------------------------


def _slug(name: str) -> str:
    return name.lower().removeprefix("apple ").removeprefix("nvidia ").replace(" ", "-")


NAMES = {_slug(name): name for name in (*chips.APPLE, *chips.NVIDIA)}  # m4-max -> Apple M4 Max


def find_chip(name: str) -> chips.Chip:
    """The chip called `m4-max` (its largest bin), `m4-max-32` (that many GPU cores) or `h200`; InputError otherwise."""
    key, _, cores = name.strip().lower().rpartition("-")
    asked = int(cores) if key in NAMES and cores.isdigit() else None
    full = NAMES.get(key if asked is not None else name.strip().lower())
    if full is None or (asked is not None and full not in chips.APPLE):
        raise InputError(f"chip={name}: use one of {', '.join(NAMES)}, all, or a number of GPU cores as in m4-max-32")
    most = chips.APPLE[full].cores if full in chips.APPLE else None
    chip = chips.find(full, asked if asked is not None else most)
    if chip is None:
        raise InputError(f"chip={name}: {full} has at most {most} GPU cores; use {key}-1 to {key}-{most}")
    return chip


@dataclass(frozen=True)
class Prediction:
    """The floor of one iteration on a chip: arithmetic, nothing is run.

    `floor` is None, with the reason in `note`, where the chip's peak is not known for the dtype. `range_ms`: the floor
    at the highest and at the lowest peak that a source claims. `recipe_seconds`: max_iters iterations at the floor,
    without evaluations.
    """

    chip: chips.Chip
    floor: Roofline | None
    range_ms: tuple[float, float] | None
    recipe_seconds: float | None
    note: str | None


def predict(config: Config, chip_name: str) -> Prediction:
    chip, spec = find_chip(chip_name), model_spec(config)
    accumulation = config.gradient_accumulation_steps
    flops = float(spec.flops_per_token() * _tokens(config))
    traffic = bytes_per_iter(spec, config.batch_size, accumulation, config.dtype)["total"]
    peak = chips.peak(chip, config.dtype, config.matmul_precision)

    def at(rate: float) -> Roofline | None:
        return floor(flops, traffic, rate, "; ".join(chip.sources[:1]), chip.bandwidth, f"{chip.name}'s memory")

    found = at(peak) if peak else None
    if found is None:
        return Prediction(chip, None, None, None, f"no trustworthy {config.dtype} peak of this chip is known")
    claimed = reversed(chip.float32_range) if chip.float32_range and config.dtype == "float32" else ()
    bounds = [bound.floor_ms for rate in claimed if (bound := at(rate))]
    span = (bounds[0], bounds[1]) if bounds else None
    return Prediction(chip, found, span, found.floor_ms / 1e3 * config.max_iters, chip.note)


def _tokens(config: Config) -> int:
    return config.batch_size * config.gradient_accumulation_steps * model_spec(config).block_size


def show(config: Config, names: Sequence[str] = ("all",)) -> None:
    """Print the floor of `config` on the named chips, or on every known one, as a table."""
    chosen = [predict(config, name) for name in (NAMES if "all" in names else names)]
    spec, tokens = model_spec(config), _tokens(config)
    columns = ["chip", "GPU cores", "floor ms", "range ms", "compute ms", "memory ms", "bound by", "TFLOP/s", "GB/s",
               "full recipe"]  # fmt: skip
    work = (
        f"{spec.n_layer} layers x {spec.n_head} heads x {spec.n_embd}, block {spec.block_size}, {spec.vocab_size} "
        f"symbols, batch {config.batch_size} x {config.gradient_accumulation_steps}, {config.dtype}: {tokens} tokens, "
        f"{spec.flops_per_token() * tokens / 1e9:.1f} GFLOP an iteration"
    )
    notes = [
        "Floor: FLOPs over peak or bytes over bandwidth, whichever takes longer. Range: by the highest and lowest peak "
        "that a source claims.",
        f"Full recipe: {config.max_iters} iterations at the floor, without evaluations.",
    ]
    notes += [f"{p.chip.name}: {p.note}" for p in chosen if p.floor is None]
    section = Section("floor", "Floor", notes, [Table(work, columns, [Row(_cells(p)) for p in chosen])])
    sentence = "ARITHMETIC, not a measurement: nothing was run, and no program reaches 100 % of a peak."
    kit.show(Report("Roofline", "Roofline", sentence, [section]))


def _cells(prediction: Prediction) -> list[str]:
    chip, found, bounds = prediction.chip, prediction.floor, prediction.range_ms
    first = [f"{chip.name}{' (disputed)' if chip.disputed else ''}", count(chip.gpu_cores)]
    if found is None:
        return [*first, *[DASH] * 8]
    return [
        *first,
        f"{found.floor_ms:.4g}",
        f"{bounds[0]:.3g} to {bounds[1]:.3g}" if bounds else DASH,
        f"{found.compute_ms:.4g}",
        f"{found.memory_ms:.3g}" if found.memory_ms is not None else DASH,
        found.bound,
        f"{(found.peak or 0) / 1e12:.4g}",
        f"{found.bandwidth / 1e9:.4g}" if found.bandwidth else DASH,
        seconds(prediction.recipe_seconds),
    ]
