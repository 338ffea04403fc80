"""The child processes of the parity gate: one computes the reference, each other holds one variant against it.

python -m nanogpt_mac.parity.check < task.json    (a `Task`; the answer is a `Made` or a `Checked`)
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from nanogpt_mac import child
from nanogpt_mac.backends import kinds
from nanogpt_mac.backends.base import Backend
from nanogpt_mac.config import Config, backend_options
from nanogpt_mac.corpus import Corpus, prepare
from nanogpt_mac.files import plain, write_json
from nanogpt_mac.gpt.spec import GPTSpec, TrainState
from nanogpt_mac.parity import readings, tolerances
from nanogpt_mac.parity.cases import (
    RATES,
    Case,
    cases,
    drawn_weights,
    places,
    probe,
    tokens_of,
    unchecked,
    val_windows,
    windows,
)
from nanogpt_mac.parity.readings import Figures, Reading
from nanogpt_mac.records.base import Record
from nanogpt_mac.records.plan import CaseShape, Check
from nanogpt_mac.train.source import open_source

LOSS_SCALE = 1024.0  # of float16: GradScaler's own first one may overflow, which skips the step by design
MARGIN = 10.0  # times what rounding makes of the formulas is allowed, where that alone is more than a limit
SHARES = {"bfloat16": 1.0, "float32 medium": 1.0, "float16": 1 / 8, "float32 high": 1 / 8}  # of bfloat16's rounding
ROUNDED_FLOPS = 5e10  # of a case whose formulas are tried with rounded weights as well
BFLOAT16 = 2e-3  # its unit roundoff
DROPPED = {"loss": 1e-4, "gradients": 1e-3, "gradients, factor": 1e-3, "weights after 3 steps": 1e-2}  # Case.drops


class Task(Record):
    """What a child is asked: to make the reference in `folder`, or to hold a variant against the one there."""

    role: Literal["reference", "variant"]
    config: Config
    folder: Path


class Made(Record):
    """What the reference computed: the shape of each case; and what no case covers."""

    shape: dict[str, CaseShape]
    unchecked: tuple[str, ...] = ()


class Checked(Record):
    """How a variant compares with the reference: the worst of all cases, one check for each quantity."""

    device: str
    checks: tuple[Check, ...]
    deterministic: bool | None = None  # whether one step, done twice, gave the same bits
    varies: str | None = None


# -- the reference --------------------------------------------------------------------------------------------------


def make_reference(config: Config, folder: Path) -> Made:
    """Compute every case in float64 and store it in `folder`; what was computed."""
    corpus = prepare(config.data)
    source = open_source(config, corpus)
    spec = source.spec
    compared = cases(config, spec)
    write_json(folder / "spec.json", dataclasses.asdict(spec))
    for case in compared:
        draw = {"full": GPTSpec.init_weights, "own": lambda *_: source.state.weights}.get(case.name, drawn_weights)
        arrays, figures = _reference(config, corpus, case, draw(case.spec, config.seed))
        np.savez(folder / f"{case.name}.npz", **arrays)  # type: ignore[arg-type]
        write_json(folder / f"{case.name}.json", figures.model_dump())
    return Made(shape={case.name: case.shape() for case in compared}, unchecked=unchecked(config, spec))


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
    looked_at = weights if case.name == "own" else drawn_weights(spec, config.seed)
    w = reference.tensors(looked_at)
    unique = np.unique(batches[0][0], axis=0)
    # Two windows whose losses are far apart, a half of the first batch each: a mean of some rows is off.
    some = np.unique(val_windows(corpus, case, config))
    losses = [reference.loss_of(w, spec, tokens.windows("val", each[None])) for each in some]
    low, high = int(some[np.argmin(losses)]), int(some[np.argmax(losses)])
    half = (case.batch + 1) // 2
    val_starts = ((low,) * half + (high,) * (case.batch - half), (high,) * case.batch)
    val = np.concatenate([tokens.windows("val", np.array(each)) for each in val_starts])
    arrays = {"logits": reference.logits_of(w, spec, unique[:, :-1])} | {f"weights/{n}": w for n, w in weights.items()}
    arrays |= {f"gradients/{n}": g.numpy() for n, g in trained.gradients.items()}
    arrays |= {f"change/{n}": (w - start[n]).detach().numpy() for n, w in trained.weights.items()}
    arrays |= {f"size/{n}": v.sqrt().numpy() for n, v in trained.exp_avg_sq.items()}
    asked = probe(corpus, case, config) if case.name != "own" else None
    probed = reference.gradients(w, spec, asked.idx, asked.targets) if asked else None
    arrays |= {f"probe/{n}": g.numpy() for n, g in (probed[1] if probed else {}).items()}
    figures = Figures(
        losses=tuple(trained.losses),
        norms=tuple(trained.norms),
        grad_clip=trained.grad_clip,
        val_loss=reference.loss_of(w, spec, val),
        val_starts=val_starts,
        probe_loss=probed[0] if probed else None,
        single={},
        rounded={},
    )

    rng = np.random.Generator(np.random.Philox(key=config.seed))

    def off(rounding: float) -> dict[str, float]:
        """What this model makes of weights that are off by so much, and of float32, in the same formulas."""
        first, looked = (
            {
                n: torch.from_numpy(a * np.float32(1) + a * rounding * rng.standard_normal(a.shape, np.float32))
                .float()
                .requires_grad_()
                for n, a in arrays.items()
            }
            for arrays in (weights, looked_at)
        )
        rough = reference.train(first, spec, recipe, batches, RATES[: case.steps])
        found = list(
            readings.logits_off(reference.logits_of(looked, spec, unique[:, :-1]), arrays["logits"], range(len(unique)))
        )
        found += readings.figures_off(case, figures, rough.losses, rough.norms)
        found.append(readings.evaluated(reference.loss_of(looked, spec, val), figures))
        found += readings.gradients_off(case, {n: g.numpy() for n, g in rough.gradients.items()}, arrays, "gradients")
        found += readings.changes({n: (w - first[n]).detach().numpy() for n, w in rough.weights.items()}, arrays)
        if asked:
            loss, gradients = reference.gradients(looked, spec, asked.idx, asked.targets)
            found += readings.probed(case, figures, loss, {n: g.numpy() for n, g in gradients.items()}, arrays)
        return _largest({each.quantity: each.value} for each in found)

    every = case.steps * case.accumulation * case.batch * spec.block_size
    cheap = spec.flops_per_token() * every <= ROUNDED_FLOPS
    single = _largest(off(u) for u in ([0.0, *[readings.ROUNDOFF] * 3] if cheap else [0.0]))
    rounded = _largest(off(u) for u in [BFLOAT16] * 4) if cheap else {}
    figures = figures.model_copy(update={"single": single, "rounded": rounded})
    return {name: array.astype(np.float32) for name, array in arrays.items()}, figures


def _largest(found: Iterable[Mapping[str, float]]) -> dict[str, float]:
    most: dict[str, float] = {}
    for each in found:
        most |= {quantity: max(value, most.get(quantity, 0.0)) for quantity, value in each.items()}
    return most


# -- a variant ------------------------------------------------------------------------------------------------------


def _limit(reading: Reading, case: Case, figures: Figures, precision: str) -> float:
    """The table's, raised where a model magnifies rounding or has few numbers to average it over."""
    table, quantity = tolerances.limits_of(precision), reading.quantity
    share = SHARES.get(precision)
    noise = {q: n * share for q, n in figures.rounded.items()} if share else figures.single
    magnified = max((n / table[q] for q, n in noise.items() if not q.endswith("factor")), default=0.0)
    limit = max(table[quantity], reading.least)
    if magnified > 1.0:
        limit = max(limit * MARGIN * magnified, MARGIN * noise.get(quantity, 0.0))
    if reading.of:
        limit = max(limit, table[quantity.removesuffix(", factor")] / math.sqrt(reading.of))
    return max(limit, DROPPED.get(quantity, 0.0)) if case.drops else limit


def check_variant(config: Config, folder: Path) -> Checked:
    """Hold one variant against the reference in `folder`."""
    name = kinds.resolve(config.backend.name)
    options = backend_options(config, name, kinds.resolve_compile(config.compile, name))
    corpus = prepare(config.data)
    spec = GPTSpec(**json.loads((folder / "spec.json").read_text()))
    precision = tolerances.precision(config.dtype, config.matmul_precision)
    worst: dict[str, Check] = {}
    device, varies = "", None
    for case in cases(config, dataclasses.replace(spec, dropout=config.model.dropout)):
        figures = Figures.model_validate_json((folder / f"{case.name}.json").read_bytes())
        own = dataclasses.replace(options, grad_clip=figures.grad_clip)
        backend = looking = kinds.create(case.spec, own, tokens_of(corpus, case))
        if config.model.dropout:  # logits and evaluations as the run makes them: its dropout must be off there
            as_run = dataclasses.replace(case.spec, dropout=config.model.dropout)
            looking = kinds.create(as_run, own, tokens_of(corpus, case))
        device = backend.device_name
        with np.load(folder / f"{case.name}.npz") as arrays:
            held = Held(config, corpus, case, backend, looking, arrays, figures)
            for reading in held.readings():
                limit = _limit(reading, case, figures, precision)
                check = Check(
                    quantity=reading.quantity,
                    value=reading.value,
                    limit=limit,
                    passed=reading.value <= limit,  # false for nan
                    worst=f"{reading.worst} ({case.name})" if reading.worst else f"({case.name})",
                )
                if reading.quantity not in worst or _nearness(check) > _nearness(worst[reading.quantity]):
                    worst[reading.quantity] = check
        varies = varies or held.varies
    checks = tuple(worst[quantity] for quantity in tolerances.limits_of(precision) if quantity in worst)
    return Checked(device=device, checks=checks, deterministic=not varies, varies=varies)


def _nearness(check: Check) -> float:
    """How near a check came to its limit, to choose the worst; nan is worst of all."""
    return math.inf if math.isnan(check.value) else check.value / check.limit if check.limit else check.value


@dataclass
class Held:
    """A variant held against the reference in one case.

    `backend` takes the steps, `looking` (the same one, where there is no dropout) does what changes nothing.
    """

    config: Config
    corpus: Corpus
    case: Case
    backend: Backend
    looking: Backend
    arrays: Mapping[str, np.ndarray]
    figures: Figures
    varies: str | None = None  # what the same step twice did not repeat bit for bit

    def readings(self) -> Iterator[Reading]:
        before = TrainState.fresh({name: self.arrays[f"weights/{name}"] for name in self.case.spec.shapes()})
        before.loss_scale = LOSS_SCALE
        looked_at = before
        if self.case.name == "full":  # a fresh model's logits and loss hide what is wrong
            looked_at = TrainState.fresh(drawn_weights(self.case.spec, self.config.seed))
            looked_at.loss_scale = LOSS_SCALE
        self.looking.restore(looked_at)
        yield from self._forward()
        self.backend.restore(looked_at)
        yield from self._in_training()
        yield from self._steps(before)

    # -- the steps ----------------------------------------------------------------------------------------------

    def _steps(self, before: TrainState) -> Iterator[Reading]:
        case, backend, start = self.case, self.backend, before.weights
        backend.restore(before)
        losses, norms = [], []
        for step in range(case.steps):
            loss, norm, after = self._step(step)
            losses.append(loss)
            norms.append(norm)
            if step == 0:
                # The clip left so much of the gradients. It is undone by the norm that is compared on its own.
                clip = backend.options.grad_clip
                left = (1 - backend.options.beta1) * (min(1.0, clip / (norm + 1e-6)) if clip else 1.0)
                yield from readings.gradients_off(
                    case, {n: m / left for n, m in after.exp_avg.items()}, self.arrays, "gradients"
                )
                if case.name == "full":
                    backend.restore(before)
                    self.varies = readings.varying((loss, norm, after), self._step(step))
            yield from readings.update_rule(backend.options, before, after, RATES[step], step + 1)
            before = after
        yield from readings.figures_off(case, self.figures, losses, norms)
        yield from readings.changes(
            {n: before.weights[n].astype(np.float64) - w for n, w in start.items()}, self.arrays
        )

    def _step(self, step: int) -> tuple[float, float, TrainState]:
        starts = windows(self.corpus, self.case, self.config, step)
        loss, norm = self.backend.wait(self.backend.step(starts, RATES[step]))
        return loss, norm, self.backend.state()

    # -- what changes nothing -----------------------------------------------------------------------------------

    def _forward(self) -> Iterator[Reading]:
        case, exact, looking = self.case, self.arrays["logits"], self.looking
        tokens = tokens_of(self.corpus, case)
        first = tokens.windows("train", windows(self.corpus, case, self.config, 0)[0])
        _, which = np.unique(first, axis=0, return_inverse=True)
        rows = slice(0, case.looked_at)
        idx, which = first[rows, :-1], which.ravel()[rows]
        logits = looking.logits(idx)
        yield from readings.logits_off(logits, exact, which)
        if case.spec.block_size > 1 and case.spec.vocab_size > 1:
            for at in places(case.spec.block_size, len(idx), self.config.seed):
                yield readings.causality(looking, idx, logits, at)
        if case.name == "full":  # one graph for torch.compile less elsewhere
            starts = np.array(self.figures.val_starts)
            evaluated, again = (looking.evaluate("val", starts) for _ in range(2))
            yield readings.evaluated(evaluated, self.figures)
            yield Reading("evaluation", readings.relative(again, evaluated, readings.LEAST_LOSS), "once more")
            distinct, which = np.unique(starts, return_inverse=True)
            losses = readings.losses_of(looking, tokens.windows("val", distinct))
            yield Reading(
                "evaluation",
                readings.relative(evaluated, losses[which].mean(), readings.LEAST_LOSS),
                "from its own logits",
            )

    def _in_training(self) -> Iterator[Reading]:
        """Gradients of other weights and tokens in training mode, and whether targets see later tokens there."""
        asked = probe(self.corpus, self.case, self.config) if self.case.name != "own" else None
        if asked is None:
            return
        loss, gradients = self.backend.gradients(asked.idx, asked.targets)
        yield from readings.probed(self.case, self.figures, loss, gradients, self.arrays)
        first = gradients["transformer.wte.weight"][asked.markers]

        def differs(targets: np.ndarray) -> float:
            other = self.backend.gradients(asked.idx, targets)[1]["transformer.wte.weight"][asked.markers]
            return float(np.abs(other - first).max() / (np.abs(first).max() or 1.0))

        off = differs(asked.other)
        if off > 0 and off <= readings.VARIES * differs(asked.targets):
            off = 0.0
        yield Reading("causality, gradients", off, "of later tokens")


# -- the process ----------------------------------------------------------------------------------------------------


def answer(document: Any) -> Any:
    """What this process is asked for, a `Task`."""
    task = Task.model_validate(document)
    made = (make_reference if task.role == "reference" else check_variant)(task.config, task.folder)
    return plain(made.model_dump(by_alias=True))


if __name__ == "__main__":
    child.answer(answer)
