"""The losses of the timed rounds, held against each other: a variant that goes wrong after the gate is found here.

All variants start from the same weights and see the same batches, so what is left between their losses on one batch is
rounding, which training magnifies, and dropout's masks. How far apart correct variants drift, and which faults move
them further, was measured: docs/method.md. Pure functions over what runs have recorded.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from nanogpt_mac.compare.runs import Run
from nanogpt_mac.parity import tolerances
from nanogpt_mac.records.comparison import Agreement, AgreementState, VariantResult, VariantState
from nanogpt_mac.records.plan import ParityState

WINDOW = 20  # iterations whose mean difference is judged, so that masks and single batches average out
STANDARD_ERRORS = 4.0  # that chance may add to a window's mean
# The limit of a window, as a share of the loss. Learning rates added up say how far AdamW may have moved a weight:
# rounding doubles with every DOUBLING of that; up to EARLY, about what weights are drawn with, no further than SMALL;
# then twice that with every LATER, and never further than MOST.
DOUBLING, EARLY, LATER = 0.0014, 0.015, 0.025
SMALL, MOST = 0.005, 0.08
EVALUATION = 2.0  # windows' limits: its few batches are no mean over iterations
EXACT = 1e-4  # a tolerance below which rounding is no noise to average out
FLOOR = 0.25  # of the first loss: below that, a share of the loss says little


@dataclass(frozen=True)
class Difference:
    """One comparison: `ours` and `theirs` may be `limit` apart."""

    iteration: int  # the first that it is of
    where: str
    ours: float
    theirs: float
    limit: float

    @property
    def share(self) -> float:
        """Of the limit; infinite where one of the two is not a number."""
        off = abs(self.ours - self.theirs)
        return off / self.limit if math.isfinite(off) else math.inf

    def words(self, other: str) -> str:
        values = f"{self.where} is {self.ours:.5g}, of {other} {self.theirs:.5g}"
        if not math.isfinite(self.share):
            return values
        return f"{values}: off by {abs(self.ours - self.theirs):.2g}, at most {self.limit:.2g} is expected"


@dataclass(frozen=True)
class Curve:
    """What one run has recorded of its losses, up to the first that is not a number, that one included."""

    run: Run

    @cached_property
    def losses(self) -> np.ndarray:
        losses = np.array([row.loss for row in self.run.iterations], dtype=float)
        broken = np.flatnonzero(~np.isfinite(losses))
        return losses[: broken[0] + 1] if len(broken) else losses

    @cached_property
    def rates(self) -> np.ndarray:
        return np.array([row.lr for row in self.run.iterations], dtype=float)

    @cached_property
    def skipped(self) -> frozenset[int]:
        """Steps that float16's loss scaling has left out."""
        return frozenset(i for i, row in enumerate(self.run.iterations) if not math.isfinite(row.grad_norm))

    @property
    def dropout(self) -> float:
        return self.run.work.model.dropout if self.run.work.model else 0.0

    @property
    def tolerance(self) -> float:
        """How far a loss may be off by the dtype's rounding, relative: the gate's own limit."""
        work = self.run.work
        return tolerances.limits(work.dtype or "float32", work.matmul_precision or "highest")["loss"]

    @cached_property
    def computes(self) -> tuple[object, ...] | None:
        """Equal for runs whose losses must agree: all that decides what is learnt, but rounding and the schedule,
        which every row has. None where it is not recorded.
        """
        facts, config = self.run.facts, self.run.config
        recipe = config.weight_decay, config.beta1, config.beta2, config.grad_clip
        if facts is None or None in recipe or not len(self.losses) or self.run.iterations[0].iter:
            return None
        if tolerances.precision(facts.dtype, facts.matmul_precision) not in tolerances.PRECISIONS:  # another version's
            return None
        model = tuple(sorted(facts.model.model_dump().items()))
        batch = facts.batch_size, facts.gradient_accumulation_steps
        return model, batch, facts.corpus_facts.sha256, facts.seed, facts.init_from, recipe


def differences(ours: Curve, theirs: Curve, number: int) -> Iterator[Difference]:
    """Everything of two runs, of round `number`, that can be held against each other."""
    count = min(len(ours.losses), len(theirs.losses))
    other_rates = np.flatnonzero(~np.isclose(ours.rates[:count], theirs.rates[:count], rtol=1e-9, atol=0))
    ends = [count, *other_rates[:1], *sorted(ours.skipped ^ theirs.skipped)[:1]]
    count = int(min(ends))
    if not count:
        return
    a, b = ours.losses[:count], theirs.losses[:count]
    moved = np.cumsum(ours.rates[:count])
    tolerance, dropout = max(ours.tolerance, theirs.tolerance), ours.dropout > 0
    scale = max(a[0], b[0])

    def allowed(iteration: int, size: float) -> float:
        """At most so far apart may losses of about `size` be, once `iteration` is done."""
        s = float(moved[iteration])
        small = SMALL if dropout else min(SMALL, tolerance * 2 ** min(s / DOUBLING, 64.0))
        late = SMALL * 2 ** min(max(0.0, s - EARLY) / LATER, 64.0)
        share = min(MOST, small if s <= EARLY else late)
        return share * max(size, FLOOR * scale, tolerance)

    of = f"of round {number}"
    if not dropout:
        yield Difference(0, f"the first training loss {of}", a[0], b[0], tolerance * max(scale, tolerance))
    for i in np.flatnonzero(np.isfinite(a) != np.isfinite(b)):
        yield Difference(int(i), f"the training loss at iteration {i} {of}", a[i], b[i], math.inf)
    whole = count - 1 if not (math.isfinite(a[-1]) and math.isfinite(b[-1])) else count
    for start in range(0, max(whole - WINDOW, 0) + 1, WINDOW // 2) if whole else ():
        end = min(start + WINDOW, whole)
        x, y = a[start:end], b[start:end]
        noisy = dropout or tolerance > EXACT
        chance = STANDARD_ERRORS * _noise(x - y) / math.sqrt(len(x)) if noisy else 0.0
        limit = allowed(end - 1, max(x.mean(), y.mean())) + chance
        where = f"the training loss at iterations {start} to {end - 1} {of}"
        yield Difference(start, where, float(x.mean()), float(y.mean()), limit)
    evaluated = {row.iter: row for row in theirs.run.evaluations}
    for row in ours.run.evaluations:
        if (other := evaluated.get(row.iter)) is None or row.iter > count:
            continue
        for split in ("train", "val"):
            x, y = getattr(row, f"{split}_loss"), getattr(other, f"{split}_loss")
            if not (math.isfinite(x) or math.isfinite(y)):
                continue
            size = max(x, y) if math.isfinite(x) and math.isfinite(y) else scale
            limit = EVALUATION * allowed(row.iter - 1, size) if row.iter else tolerance * max(size, tolerance)
            when = f"after {row.iter} iterations" if row.iter else "before the first iteration"
            yield Difference(row.iter, f"the evaluation's {split} loss {when} {of}", x, y, limit)


def _noise(differences: np.ndarray) -> float:
    """Standard deviation from one iteration to the next, which neither an offset nor a slope enters."""
    bends = np.abs(np.diff(differences, 2))
    return float(1.4826 * np.median(bends) / math.sqrt(6)) if len(bends) else 0.0


@dataclass(frozen=True)
class Pair:
    """Two variants over all their rounds. `wrong`: the earliest difference beyond its limit."""

    iterations: int
    share: float
    wrong: Difference | None

    def turned(self) -> Difference | None:
        d = self.wrong
        return d and Difference(d.iteration, d.where, d.theirs, d.ours, d.limit)


def compared(ours: Mapping[int, Curve], theirs: Mapping[int, Curve]) -> Pair | None:
    """Round by round, of rounds that both have, or else the first of each; None where nothing can be held against
    each other.
    """
    common = [(r, ours[r], theirs[r]) for r in sorted(ours.keys() & theirs.keys())]
    if not common and ours and theirs:
        common = [(min(ours), ours[min(ours)], theirs[min(theirs)])]
    found: list[Difference] = []
    iterations = 0
    for number, a, b in common:
        if a.computes is not None and a.computes == b.computes and (these := list(differences(a, b, number))):
            found += these
            iterations = max(iterations, min(len(a.losses), len(b.losses)))
    if not found:
        return None
    beyond = [difference for difference in found if not difference.share <= 1]
    share = max(difference.share for difference in found)
    return Pair(iterations, share, min(beyond, key=lambda d: d.iteration, default=None))


def hold(variants: Sequence[VariantResult], runs: Mapping[str, Mapping[int, Run]]) -> list[VariantResult]:
    """Every variant held against all others that compute the same; `runs`: name -> round -> its run.

    Of two that differ, the one with fewer on its side is wrong: those that passed the gate count first. Where as many
    are on either side, nothing shows which is wrong, and none of them may win.
    """
    by_name = {variant.name: variant for variant in variants}
    usable = {name: _usable(runs.get(name, {})) for name in by_name}
    pairs: dict[tuple[str, str], Pair] = {}
    wrong: dict[tuple[str, str], Difference | None] = {}
    for a, b in itertools.combinations(by_name, 2):
        if (pair := compared(usable[a], usable[b])) is not None:
            pairs[a, b] = pairs[b, a] = pair
            wrong[a, b], wrong[b, a] = pair.wrong, pair.turned()
    # One whose own loss is no number, or that failed the gate, says nothing about the others.
    heard = {
        name
        for name, variant in by_name.items()
        if variant.parity is not ParityState.FAIL and not any(_broken(curve.run) for curve in usable[name].values())
    }

    def strength(name: str) -> tuple[int, int]:
        side = [name, *(other for other in heard if (name, other) in wrong and wrong[name, other] is None)]
        side = [each for each in side if each in heard]
        return sum(by_name[each].parity is ParityState.PASS for each in side), len(side)

    def judged(name: str) -> Agreement:
        others = [other for other in by_name if (name, other) in pairs and other in heard]
        if not others:
            return Agreement()
        foes = [(other, found) for other in others if (found := wrong[name, other])]
        stronger = [(other, found) for other, found in foes if strength(other) > strength(name)]
        equal = [(other, found) for other, found in foes if strength(other) == strength(name)]
        state, reason = AgreementState.AGREE, None
        if stronger or equal:
            state = AgreementState.WRONG if stronger else AgreementState.IN_DOUBT
            other, found = (stronger or equal)[0]
            reason = found.words(by_name[other].label)
        return Agreement(
            state=state,
            reason=reason,
            against=tuple(others),
            iterations=max(pairs[name, other].iterations for other in others),
            share=min(max(pairs[name, other].share for other in others), 1e9),
        )

    return [_with(variant, judged(variant.name)) for variant in variants]


def _usable(rounds: Mapping[int, Run]) -> dict[int, Curve]:
    """Runs of train.py that ended well, or in a loss that is no number."""
    return {r: Curve(run) for r, run in sorted(rounds.items()) if run.iterations and (run.timed or _broken(run))}


def _broken(run: Run) -> bool:
    return any(not math.isfinite(row.loss) for row in run.iterations)


def _with(variant: VariantResult, losses: Agreement) -> VariantResult:
    changes: dict[str, object] = {"losses": losses}
    if variant.state is not VariantState.WRONG and losses.state is AgreementState.WRONG:
        changes |= {"state": VariantState.WRONG, "reason": f"its losses are not those of the others: {losses.reason}"}
    elif variant.state in (VariantState.OK, VariantState.PARTIAL) and losses.state is AgreementState.IN_DOUBT:
        words = f"one of the two is wrong, and nothing here shows which: {losses.reason}"
        changes |= {"state": VariantState.IN_DOUBT, "reason": words}
    return variant.model_copy(update=changes)
