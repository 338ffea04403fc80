"""Readings: how far what a variant computed, or float32 on the CPU, is from the reference's float64."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from nanogpt_mac.backends import base
from nanogpt_mac.backends.base import Backend
from nanogpt_mac.gpt.spec import TrainState
from nanogpt_mac.parity.cases import Case, changed
from nanogpt_mac.records.base import Record

LEAST_LOSS = 0.1  # nats: one nearer to 0 is a difference of logits, and as uncertain as they are
LEAST_SHARE = 1e-6  # of the whole gradient: a tensor that has less of it has rounding alone
VARIES = 10.0  # times what the same call varies by: a difference below is no leak
ROUNDOFF = 6e-8  # of float32


class Figures(Record):
    """What the reference knows of one case besides arrays; losses and norms (before clipping) of each step."""

    losses: tuple[float, ...]
    norms: tuple[float, ...]
    grad_clip: float  # 0: not clipped
    val_loss: float
    val_starts: tuple[tuple[int, ...], ...]  # (2, batch) windows of the evaluation
    probe_loss: float | None
    single: dict[str, float]  # quantity -> what the formulas are off by in float32 on the CPU, at most
    rounded: dict[str, float]  # the same with weights rounded to bfloat16; empty where that would take long


@dataclass
class Reading:
    """One figure of one case; `worst` names the tensor. `of`: the numbers that it is a mean of, where they may be few.

    `least`: a limit that its own rounding needs.
    """

    quantity: str
    value: float
    worst: str | None = None
    of: int | None = None
    least: float = 0.0


def logits_off(logits: np.ndarray, exact: np.ndarray, which: Iterable[int]) -> Iterator[Reading]:
    """Logits (B, T, V) against `exact` ones, of which row b of the batch is which[b]; a row at a time, for memory."""
    which = list(which)
    off = [np.abs(row - exact[i]).max() for row, i in zip(logits, which, strict=True)]
    yield Reading("logits", float(np.max(off)) / float(np.abs(exact).max() or 1.0))
    product = sum(dot(row, exact[i]) for row, i in zip(logits, which, strict=True))
    square = sum(dot(exact[i], exact[i]) for i in which)
    yield Reading("logits, factor", abs(product / square - 1.0) if square else 0.0, of=exact.size)


def losses_of(backend: Backend, tokens: np.ndarray) -> np.ndarray:
    """The mean loss of each window, tokens (B, T + 1), made of the logits that the back end gives a few at a time."""
    logits = backend.logits(tokens[:, :-1]).astype(np.float64)
    logits -= logits.max(-1, keepdims=True)
    chosen = np.take_along_axis(logits, tokens[:, 1:, None].astype(np.int64), -1)[..., 0]
    return (np.log(np.exp(logits).sum(-1)) - chosen).mean(1)


def evaluated(loss: float, exact: Figures) -> Reading:
    return Reading("loss", relative(loss, exact.val_loss, LEAST_LOSS), "evaluation")


def figures_off(case: Case, exact: Figures, losses: Sequence[float], norms: Sequence[float]) -> Iterator[Reading]:
    for step, (loss, norm) in enumerate(zip(losses, norms, strict=True)):
        yield Reading("loss", relative(loss, exact.losses[step], LEAST_LOSS), f"step {step + 1}")
        off = relative(norm, exact.norms[step])
        if step > 0 and case.name == "full":
            yield Reading("gradient norm, later steps", off, f"step {step + 1}")
        if step == 0 and case.name != "own":  # trained weights may magnify rounding
            yield Reading("gradient norm", off)


def gradients_off(
    case: Case, ours: Mapping[str, np.ndarray], arrays: Mapping[str, np.ndarray], kind: str, place: str = ""
) -> Iterator[Reading]:
    """Gradients against those of the reference: of the very step that is timed, or of the probe."""
    factors: dict[str, list[float]] = {}
    counts: dict[str, int] = {}
    least = LEAST_SHARE * norm_of(arrays[f"{kind}/{name}"] for name in ours)
    for name, gradient in ours.items():
        exact = arrays[f"{kind}/{name}"]
        yield Reading("gradients", difference(gradient, exact, least)[0], name + place)
        each = re.sub(r"\.h\.\d+\.", ".h.*.", name)
        # Queries' and keys' gradients are small in a fresh model: apart, or what is wrong drowns in the values'.
        parts = ("q", "k", "v") if each.endswith("c_attn.weight") else ("",)
        for part, a, b in zip(parts, np.split(gradient, len(parts)), np.split(exact, len(parts)), strict=True):
            key = f"{each} {part}".rstrip()
            factors.setdefault(key, []).append(difference(a, b, least)[1])
            counts[key] = counts.get(key, 0) + a.size
    if case.name != "full" or kind == "probe":  # elsewhere the factor itself is noise in 16 bits
        return
    for key, off in factors.items():  # an operator that is off is off in every layer; rounding averages out
        yield Reading("gradients, factor", abs(sum(off) / len(off)), key, of=counts[key])


def probed(
    case: Case, exact: Figures, loss: float, gradients: Mapping[str, np.ndarray], arrays: Mapping[str, np.ndarray]
) -> Iterator[Reading]:
    yield Reading("loss", relative(loss, exact.probe_loss or 0.0, LEAST_LOSS), "probe")
    yield from gradients_off(case, gradients, arrays, "probe", ", probe")


def changes(ours: Mapping[str, np.ndarray], arrays: Mapping[str, np.ndarray]) -> Iterator[Reading]:
    exact = {name: arrays[f"change/{name}"] * arrays[f"size/{name}"] for name in ours}  # tolerances.py says why
    least = LEAST_SHARE * norm_of(exact.values())
    for name, change in ours.items():
        off = difference(change * arrays[f"size/{name}"], exact[name], least)[0]
        yield Reading("weights after 3 steps", off, name)


def causality(looking: Backend, idx: np.ndarray, logits: np.ndarray, at: np.ndarray) -> Reading:
    """The largest change of a logit before token at[b] of row b when that token changes."""

    def differences(other: np.ndarray) -> np.ndarray:
        return np.array([np.abs(a[:t] - b[:t]).max() for a, b, t in zip(other, logits, at, strict=True)])

    found = differences(looking.logits(changed(idx, at)))
    if found.max() > 0 and found.max() <= VARIES * differences(looking.logits(idx)).max():
        found[:] = 0.0  # the same tokens give other logits by as much
    worst = int(np.argmax(found))
    return Reading("causality", float(found[worst]), f"before token {at[worst]}")


def varying(one: tuple[float, float, TrainState], other: tuple[float, float, TrainState]) -> str | None:
    """What of a step, done twice, differs in its bits: the tensors' gradients in the first moments, or the figures."""
    kept, again = one[2].exp_avg, other[2].exp_avg
    off = [name for name in kept if not np.array_equal(kept[name], again[name], equal_nan=True)]
    off += [what for what, a, b in zip(("loss", "gradient norm"), one, other, strict=False) if a != b and a == a]
    return f"{off[0]}, and {len(off) - 1} more" if len(off) > 1 else off[0] if off else None


def update_rule(
    options: base.BackendOptions, before: TrainState, after: TrainState, lr: float, step: int
) -> Iterator[Reading]:
    """Each update against AdamW in float64 from the variant's own moments: the same in every dtype."""
    for name, w in before.weights.items():
        w64, m, v = (a.astype(np.float64) for a in (w, after.exp_avg[name], after.exp_avg_sq[name]))
        m, v = m / (1 - options.beta1**step), v / (1 - options.beta2**step)
        decay = options.weight_decay if w.ndim >= 2 else 0.0
        exact = -lr * (decay * w64 + m / (np.sqrt(v) + 1e-8))
        rounding = 2 * ROUNDOFF * float(np.linalg.norm(w64)) / (float(np.linalg.norm(exact)) or 1.0)
        off = difference(after.weights[name] - w64, exact)[0]
        yield Reading("update rule", off, f"{name}, step {step}", least=rounding)


def relative(ours: float, exact: float, least: float = 0.0) -> float:
    return abs(ours - exact) / (max(abs(exact), least) or 1.0)


def difference(ours: np.ndarray, exact: np.ndarray, least: float = 0.0) -> tuple[float, float]:
    """Relative 2-norm of the difference, and the least-squares factor between the two less 1.

    `least`: the 2-norm that the reference counts as having, at least.
    """
    a, b = ours.astype(np.float64).ravel(), exact.astype(np.float64).ravel()
    norm = max(float(np.linalg.norm(b)), least)
    if norm == 0.0:
        return float(np.linalg.norm(a)), 0.0
    return float(np.linalg.norm(a - b)) / norm, float((a - b) @ b) / norm**2


def dot(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.dot(a.astype(np.float64).ravel(), b.astype(np.float64).ravel()))


def norm_of(arrays: Iterable[np.ndarray]) -> float:
    """The 2-norm of them all together."""
    return math.sqrt(sum(dot(a, a) for a in arrays))
