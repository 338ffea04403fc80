"""The child processes of the parity gate: one computes the reference, each other holds one variant against it.

python -m nanogpt_mac.parity.check < task.json    (a `Task`; the answer is a `Made` or a `Checked`)
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from nanogpt_mac import child
from nanogpt_mac.backends import base, kinds
from nanogpt_mac.backends.base import Backend, Tokens
from nanogpt_mac.config import Config, backend_options
from nanogpt_mac.corpus import Corpus, prepare, starts
from nanogpt_mac.files import plain, write_json
from nanogpt_mac.gpt.spec import GPTSpec, TrainState
from nanogpt_mac.parity import tolerances
from nanogpt_mac.records.base import Record
from nanogpt_mac.records.plan import CaseShape, Check
from nanogpt_mac.train.source import open_source

RATES = [1e-3, 2e-3, 1.5e-3]  # of the three optimizer steps
FULL_TOKENS, FULL_FLOPS = 2048, 4e9  # what a step of case `full` is at most, unless one window is more
ODD_BATCH, ODD_LENGTH = 9, 11  # above 8 and no multiple of anything, where kernels have their special cases
NO_DROPOUT = 1e-12  # takes the code path of dropout and drops nothing: 1 - p is 1 in float32
LOSS_SCALE = 1024.0  # of float16: GradScaler's own first one may overflow, which skips the step by design


class Task(Record):
    """What a child is asked: to make the reference in `folder`, or to hold a variant against the one there."""

    role: Literal["reference", "variant"]
    config: Config
    folder: Path


class Made(Record):
    """What the reference computed: the shape of each case."""

    shape: dict[str, CaseShape]


class Checked(Record):
    """How a variant compares with the reference: the worst of all cases, one check for each quantity."""

    device: str
    checks: tuple[Check, ...]


class Figures(Record):
    """What the reference knows of one case besides arrays; losses and norms (before clipping) of each step."""

    losses: tuple[float, ...]
    norms: tuple[float, ...]
    grad_clip: float  # 0: not clipped
    val_loss: float


@dataclass(frozen=True)
class Case:
    """Weights and batches on which everything is compared."""

    name: str
    spec: GPTSpec
    batch: int
    accumulation: int
    clip: float | None  # in norms of the first gradient: 0.5 binds, 4 does not; None: switched off
    steps: int = 3  # optimizer steps

    def shape(self) -> CaseShape:
        return CaseShape(batch=self.batch, block_size=self.spec.block_size, accumulation=self.accumulation)


def cases(config: Config, spec: GPTSpec) -> list[Case]:
    """What is compared.

    `full`: a fresh model and the run's own shape, as far as the limits above allow. `odd`: weights under which every
    operation leaves its mark, in a shape that no kernel likes, and where the run has dropout, in its code path. `own`:
    the weights that the run starts from, where that is not a fresh model.
    """
    clips = config.grad_clip > 0
    exact = dataclasses.replace(spec, dropout=0.0)
    most = min(FULL_TOKENS // spec.block_size, int(FULL_FLOPS / (spec.flops_per_token() * spec.block_size)))
    dropping = NO_DROPOUT if spec.dropout else 0.0
    short = dataclasses.replace(exact, block_size=min(ODD_LENGTH, spec.block_size), dropout=dropping)
    compared = [
        Case("full", exact, max(1, min(config.batch_size, most)), 1, 0.5 if clips else None),
        Case("odd", short, ODD_BATCH, 2, 4.0 if clips else None),
    ]
    if config.init_from != "scratch":
        compared.append(dataclasses.replace(compared[0], name="own", steps=1))
    return compared


def drawn_weights(spec: GPTSpec, seed: int) -> dict[str, np.ndarray]:
    """Float32 weights under which every operation leaves its mark, as those of a fresh model do not.

    Attention far from uniform, GELU in its bend, biases and norms other than 0 and 1.
    """
    rng = np.random.Generator(np.random.Philox(key=seed))
    weights = {}
    for name, shape in spec.shapes().items():
        drawn = rng.standard_normal(shape, np.float32)
        if len(shape) == 1:
            weights[name] = 0.3 * drawn + np.float32(name.endswith(".weight"))
        else:
            weights[name] = drawn * np.float32((2.0 if "transformer.w" in name else 1.5) / np.sqrt(shape[1]))
    return weights


def windows(corpus: Corpus, case: Case, config: Config, step: int) -> np.ndarray:
    """Starts (accumulation, batch) of optimizer step `step`."""
    count = case.accumulation * case.batch
    drawn = starts(config.seed, step, f"parity-{case.name}", count, len(corpus.train), case.spec.block_size)
    return drawn.reshape(case.accumulation, case.batch)


def val_windows(corpus: Corpus, case: Case, config: Config) -> np.ndarray:
    """Starts (2, batch) of an evaluation."""
    drawn = starts(config.seed, 0, "parity-val", 2 * case.batch, len(corpus.val), case.spec.block_size)
    return drawn.reshape(2, case.batch)


def tokens_of(corpus: Corpus, case: Case) -> Tokens:
    return Tokens({"train": corpus.train, "val": corpus.val}, case.spec.block_size)


# -- the reference --------------------------------------------------------------------------------------------------


def make_reference(config: Config, folder: Path) -> Made:
    """Compute every case in float64 and store it in `folder`; what was computed."""
    corpus = prepare(config.data)
    source = open_source(config, corpus)
    compared = cases(config, source.spec)
    write_json(folder / "spec.json", dataclasses.asdict(source.spec))
    for case in compared:
        draw = {"full": GPTSpec.init_weights, "own": lambda *_: source.state.weights}.get(case.name, drawn_weights)
        arrays, figures = _reference(config, corpus, case, draw(case.spec, config.seed))
        np.savez(folder / f"{case.name}.npz", **arrays)  # type: ignore[arg-type]
        write_json(folder / f"{case.name}.json", figures.model_dump())
    return Made(shape={case.name: case.shape() for case in compared})


def _reference(
    config: Config, corpus: Corpus, case: Case, weights: Mapping[str, np.ndarray]
) -> tuple[dict[str, np.ndarray], Figures]:
    """Arrays in float32, whose rounding (6e-8) is far below every limit, and figures."""
    import torch

    from nanogpt_mac.parity import reference

    tokens, spec, start = tokens_of(corpus, case), case.spec, reference.tensors(weights)
    starts_of = [windows(corpus, case, config, step) for step in range(case.steps)]
    batches = [np.stack([tokens.windows("train", micro) for micro in step]) for step in starts_of]
    recipe = reference.Recipe(config.weight_decay, config.beta1, config.beta2, case.clip)
    trained = reference.train(start, spec, recipe, batches, RATES[: case.steps])
    with torch.no_grad():
        first = torch.from_numpy(batches[0][0].astype(np.int64))
        logits = reference.logits(start, spec, first[:, :-1])
        val = [tokens.windows("val", each).astype(np.int64) for each in val_windows(corpus, case, config)]
        pairs = [(torch.from_numpy(tokens[:, :-1]), torch.from_numpy(tokens[:, 1:])) for tokens in val]
        w = reference.tensors(drawn_weights(spec, config.seed))
        losses = [reference.cross_entropy(reference.logits(w, spec, idx), targets).item() for idx, targets in pairs]
        arrays = {"logits": logits.numpy()} | {f"weights/{n}": w for n, w in weights.items()}
        arrays |= {f"gradients/{n}": g.numpy() for n, g in trained.gradients.items()}
        arrays |= {f"change/{n}": (w - start[n]).numpy() for n, w in trained.weights.items()}
        arrays |= {f"size/{n}": v.sqrt().numpy() for n, v in trained.exp_avg_sq.items()}
    figures = Figures(
        losses=tuple(trained.losses),
        norms=tuple(trained.norms),
        grad_clip=trained.grad_clip,
        val_loss=float(np.mean(losses)),
    )
    return {name: array.astype(np.float32) for name, array in arrays.items()}, figures


# -- a variant ------------------------------------------------------------------------------------------------------


@dataclass
class Reading:
    """One figure of one case; `worst` names the tensor."""

    quantity: str
    value: float
    worst: str | None = None


def check_variant(config: Config, folder: Path) -> Checked:
    """Hold one variant against the reference in `folder`."""
    name = kinds.resolve(config.backend.name)
    options = backend_options(config, name, kinds.resolve_compile(config.compile, name))
    corpus = prepare(config.data)
    spec = GPTSpec(**json.loads((folder / "spec.json").read_text()))
    limits = tolerances.limits(config.dtype, config.matmul_precision)
    worst: dict[str, Check] = {}
    device = ""
    for case in cases(config, dataclasses.replace(spec, dropout=config.model.dropout)):
        figures = Figures.model_validate_json((folder / f"{case.name}.json").read_bytes())
        own = dataclasses.replace(options, grad_clip=figures.grad_clip)
        backend = looking = kinds.create(case.spec, own, tokens_of(corpus, case))
        if config.model.dropout:  # logits and evaluations as the run makes them: its dropout must be off there
            as_run = dataclasses.replace(case.spec, dropout=config.model.dropout)
            looking = kinds.create(as_run, own, tokens_of(corpus, case))
        device = backend.device_name
        with np.load(folder / f"{case.name}.npz") as arrays:
            for reading in _readings(config, corpus, case, backend, looking, arrays, figures):
                before = worst.get(reading.quantity)
                if before is None or not (reading.value <= before.value or math.isnan(before.value)):  # nan is worst
                    worst[reading.quantity] = Check(
                        quantity=reading.quantity,
                        value=reading.value,
                        limit=limits[reading.quantity],
                        passed=reading.value <= limits[reading.quantity],  # false for nan
                        worst=f"{reading.worst} ({case.name})" if reading.worst else f"({case.name})",
                    )
    return Checked(device=device, checks=tuple(worst[quantity] for quantity in limits if quantity in worst))


def _readings(
    config: Config,
    corpus: Corpus,
    case: Case,
    backend: Backend,
    looking: Backend,
    arrays: Mapping[str, np.ndarray],
    figures: Figures,
) -> Iterator[Reading]:
    """`backend` takes the steps, `looking` (the same one, where there is no dropout) does what changes nothing."""
    before = TrainState.fresh({name: arrays[f"weights/{name}"] for name in case.spec.shapes()})
    start, before.loss_scale = before.weights, LOSS_SCALE
    looking.restore(before)
    yield from _forward(config, corpus, case, looking, arrays, figures)
    backend.restore(before)
    for step in range(case.steps):
        loss, norm = backend.wait(backend.step(windows(corpus, case, config, step), RATES[step]))
        yield Reading("loss", _relative(loss, figures.losses[step]), f"step {step + 1}")
        after = backend.state()
        if step > 0 and case.name == "full":
            yield Reading("gradient norm, later steps", _relative(norm, figures.norms[step]), f"step {step + 1}")
        if step == 0:
            if case.name != "own":  # trained weights may magnify rounding
                yield Reading("gradient norm", _relative(norm, figures.norms[0]))
            yield from _gradients(case, backend.options, after, arrays, norm)
        yield from _update_rule(backend.options, before, after, RATES[step], step + 1)
        before = after
    for name, first in start.items():
        ours, exact = before.weights[name].astype(np.float64) - first, arrays[f"change/{name}"]
        size = arrays[f"size/{name}"]  # tolerances.py says why
        yield Reading("weights after 3 steps", _difference(ours * size, exact * size)[0], name)


def _forward(
    config: Config, corpus: Corpus, case: Case, backend: Backend, arrays: Mapping[str, np.ndarray], figures: Figures
) -> Iterator[Reading]:
    idx = tokens_of(corpus, case).windows("train", windows(corpus, case, config, 0)[0])[:, :-1]
    logits, exact = backend.logits(idx), arrays["logits"]
    yield Reading("logits", float(np.abs(logits - exact).max() / np.abs(exact).max()))
    yield Reading("logits, factor", abs(_difference(logits, exact)[1]))
    T = case.spec.block_size
    for t in sorted(({T // 2} if case.name == "full" else {1, T // 2, T - 1}) & set(range(1, T))):
        yield Reading("causality", _causality(backend, idx, logits, t), f"before token {t}")
    if case.name == "full":  # one graph for torch.compile less elsewhere; a fresh model's loss hides what is wrong
        backend.load(drawn_weights(case.spec, config.seed))
        evaluated = backend.evaluate("val", val_windows(corpus, case, config))
        yield Reading("loss", _relative(evaluated, figures.val_loss), "evaluation")


def _gradients(
    case: Case, options: base.BackendOptions, after: TrainState, arrays: Mapping[str, np.ndarray], norm: float
) -> Iterator[Reading]:
    """The gradients of the very step that is timed: what its clip left of them is in the first moments.

    The clip is undone by the `norm` that the step reports, which is compared on its own.
    """
    clip = min(1.0, options.grad_clip / (norm + 1e-6)) if options.grad_clip else 1.0
    factors: dict[str, list[float]] = {}
    for name, moment in after.exp_avg.items():
        ours, exact = moment / ((1 - options.beta1) * clip), arrays[f"gradients/{name}"]
        yield Reading("gradients", _difference(ours, exact)[0], name)
        kind = re.sub(r"\.h\.\d+\.", ".h.*.", name)
        # Queries and keys have small gradients in a fresh model: apart, or what is wrong with them drowns in values.
        parts = ("q", "k", "v") if kind.endswith("c_attn.weight") else ("",)
        for part, a, b in zip(parts, np.split(ours, len(parts)), np.split(exact, len(parts)), strict=True):
            factors.setdefault(f"{kind} {part}".rstrip(), []).append(_difference(a, b)[1])
    if case.name != "full":  # elsewhere the factor itself is noise in 16 bits
        return
    for kind, each in factors.items():  # an operator that is off is off in every layer; rounding averages out
        yield Reading("gradients, factor", abs(sum(each) / len(each)), kind)


def _causality(backend: Backend, idx: np.ndarray, logits: np.ndarray, t: int) -> float:
    """The largest change of an earlier logit when token t changes."""
    changed = idx.copy()
    changed[:, t] = np.where(changed[:, t] > 0, changed[:, t] - 1, 1)
    return float(np.abs(backend.logits(changed)[:, :t] - logits[:, :t]).max())


def _update_rule(
    options: base.BackendOptions, before: TrainState, after: TrainState, lr: float, step: int
) -> Iterator[Reading]:
    """Each update against AdamW in float64 from the variant's own moments: the same in every dtype."""
    for name, w in before.weights.items():
        w64, m, v = (a.astype(np.float64) for a in (w, after.exp_avg[name], after.exp_avg_sq[name]))
        m, v = m / (1 - options.beta1**step), v / (1 - options.beta2**step)
        decay = options.weight_decay if w.ndim >= 2 else 0.0
        exact = -lr * (decay * w64 + m / (np.sqrt(v) + 1e-8))
        yield Reading("update rule", _difference(after.weights[name] - w64, exact)[0], f"{name}, step {step}")


def _relative(ours: float, exact: float) -> float:
    return abs(ours - exact) / abs(exact)


def _difference(ours: np.ndarray, exact: np.ndarray) -> tuple[float, float]:
    """Relative 2-norm of the difference, and the least-squares factor between the two less 1."""
    a, b = ours.astype(np.float64).ravel(), exact.astype(np.float64).ravel()
    square = float(b @ b)
    if square == 0.0:
        return float(np.linalg.norm(a)), 0.0
    return float(np.linalg.norm(a - b)) / square**0.5, float(a @ b) / square - 1.0


# -- the process ----------------------------------------------------------------------------------------------------


def answer(document: Any) -> Any:
    """What this process is asked for, a `Task`."""
    task = Task.model_validate(document)
    made = (make_reference if task.role == "reference" else check_variant)(task.config, task.folder)
    return plain(made.model_dump(by_alias=True))


if __name__ == "__main__":
    child.answer(answer)
