"""The child's side of suite=mlp and suite=lm: one network on one way, held against float64 before and after its time.

A run whose first epoch does not lead to the reference's weights is refused, with the likeliest cause by name.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from nanogpt_mac import files
from nanogpt_mac.backends.arrays import AbsentError, Arrays
from nanogpt_mac.backends.nets import Feed, MLPSpec, Net, Spec, drawn
from nanogpt_mac.errors import reason
from nanogpt_mac.machine import probe
from nanogpt_mac.measure import calls
from nanogpt_mac.records.bench import NetReading, State, Task
from nanogpt_mac.suites import suite
from nanogpt_mac.suites.nets.twin import Twin

CHECKED_STEPS = 235  # before timing: an epoch at batch 256, and as many steps of smaller batches
WEIGHTS_TOLERANCE = 1e-4  # relative, of each tensor's norm
UPDATE_TOLERANCE = 1e-2  # the same of what AdamW added
# An AdamW step is gradient / |gradient| at first, so where a gradient is nearly zero rounding makes a whole step of it:
# numbers whose gradient is below this share of its tensor's root mean square are left out.
DECIDED = 0.02
# Of a timed epoch: in every second one rounding puts some ReLU on the other side of zero, which is worth up to 1e-3.
LAST_TOLERANCE = 1e-2
ACCURACY_TOLERANCE = 0.01
LOGITS_TOLERANCE = 1e-4
FEWEST_EPOCHS = 2
LATE = 0.25  # of an epoch, that reading a parameter may take beyond reading it again


@dataclass(frozen=True)
class NetRow:
    """`inputs` and `targets` are what it is trained on, `asked` and `answers` what is asked after (answers: classes, or
    none); `per_epoch` how many rows of `inputs` an epoch takes."""

    spec: Spec
    batch: int
    inputs: np.ndarray
    targets: np.ndarray
    asked: np.ndarray
    answers: np.ndarray | None
    per_epoch: int
    trained: bool = True  # else only asked
    checked_steps: int = CHECKED_STEPS


@dataclass(frozen=True)
class Settings:
    epochs: int
    placement: str
    sync: str
    seed: int


Make = Callable[[Arrays, Spec, Feed, np.ndarray, np.ndarray], Net]


class Measuring(suite.Measuring):
    """Measures rows on one way. `make` is its framework's Net."""

    reading = NetReading

    def __init__(
        self, task: Task, arrays: Arrays, make: Make, row: Callable[[str], NetRow], settings: Settings
    ) -> None:
        super().__init__(task, arrays)
        self.make, self.row, self.settings = make, row, settings

    def figures(self, name: str) -> dict[str, Any]:
        row = self.row(name)
        feed = Feed(row.batch, self.settings.placement, self.settings.sync)
        try:
            net = self.make(self.arrays, row.spec, feed, row.inputs, row.targets)
        except AbsentError as absent:
            raise suite.RefusedError(State.ABSENT, reason(absent)) from absent
        one = _One(name, row, net, self)
        return one.trained() if row.trained else one.asked()


def _wrong(why: str) -> suite.RefusedError:
    """A run that is not shown, and why."""
    return suite.RefusedError(State.WRONG, why)


class _One:
    def __init__(self, name: str, row: NetRow, net: Net, of: Measuring) -> None:
        self.name, self.row, self.net = name, row, net
        self.task, self.arrays, self.settings = of.task, of.arrays, of.settings

    def order(self, epoch: int) -> np.ndarray:
        """The rows of an epoch, the same for every way and in every round; epoch 0 is the one that is checked."""
        rng = np.random.Generator(np.random.Philox(key=[self.settings.seed, epoch]))
        order = rng.permutation(len(self.row.inputs))[: self.row.per_epoch]
        if epoch:
            return order
        batch = self.row.batch
        most = self.row.checked_steps * batch
        return order[max(0, -(-(len(order) - most) // batch) * batch) :]  # its end: the batch that is not full

    @cached_property
    def first(self) -> dict[str, np.ndarray]:
        return drawn(self.row.spec, self.settings.seed)

    # -- training -------------------------------------------------------------------------------------------------

    def trained(self) -> dict[str, Any]:
        checked = self._check_first()
        if self.task.way.simulated:
            self.arrays.counted()
            self.arrays.wait(self.net.epoch(self.order(1)))
            return {**checked, "counts": self.arrays.counted()}
        self.net.load(self.first)
        self.arrays.wait(self.net.epoch(self.order(1)))  # a batch that is not full may have to be compiled for itself
        self.net.load(self.first)
        epochs: list[float] = []
        busy: list[float] = []
        before: dict[str, np.ndarray] = {}
        began, cpu = time.perf_counter(), 0.0
        while len(epochs) < self.settings.epochs:
            if len(epochs) >= FEWEST_EPOCHS and time.perf_counter() - began + epochs[-1] > self.task.row_s:
                break
            order, before, cpu_before = self.order(1 + len(epochs)), self.net.weights(), time.process_time()
            self.arrays.gpu_seconds()
            last: list[Any] = []

            def call(order: np.ndarray = order, last: list[Any] = last) -> list[Any]:
                last[:] = self.net.epoch(order)
                return last

            epochs.append(calls.once(call, self.arrays))
            self._require_waited(last, epochs[-1])
            cpu += time.process_time() - cpu_before
            known = self.arrays.gpu_seconds()
            share = probe.gpu_utilisation() if self.task.way.accelerator else None
            use = share if known is None else known / epochs[-1]
            busy += [] if use is None else [use]
        run_s = time.perf_counter() - began
        accuracy, distance = self._check_last(before, self.order(len(epochs)))
        return {
            **checked,
            "batch": self.row.batch,
            "epochs_s": tuple(epochs),
            "median_s": statistics.median(epochs),
            "run_s": run_s,
            "cpu": cpu / sum(epochs),
            "gpu": statistics.fmean(busy) if busy else None,
            "accuracy_last": accuracy,
            "distance_last": distance,
        }

    def _require_waited(self, outputs: list[Any], took: float) -> None:
        """What was waited for can be read at once; the second reading is what reading costs."""
        clock = time.perf_counter
        start = clock()
        self.arrays.peek(outputs[-1])
        first = clock()
        self.arrays.peek(outputs[-1])
        late = (first - start) - (clock() - first)
        if late > LATE * took + 2e-3:
            raise _wrong(f"the clock was read without waiting: the weights came {1e3 * late:.3g} ms after it")

    # -- checks ---------------------------------------------------------------------------------------------------

    def _check_first(self) -> dict[str, Any]:
        self.net.load(self.first)
        if distance(self.net.weights(), self.first) > 0:
            raise _wrong("its weights were not loaded")
        reference = self._reference(self.order(0))
        order = reference["order"]
        self._check_gradients(reference, order)
        outputs = self.net.epoch(order)
        self.arrays.wait(outputs)
        self.arrays.peek(outputs[-1])  # the first reading may compile something
        found, expected = self.net.weights(), _part(reference, "weight")
        off = self._off(found, expected, self.first)
        if not off <= self._tolerance:
            raise _wrong(f"{self._cause(found, order)}: its weights are {off:.2g} from float64's, relative")
        accuracy = self._accuracy(found)
        return {"accuracy": accuracy, "distance": off}

    @property
    def _tolerance(self) -> float:
        return WEIGHTS_TOLERANCE if isinstance(self.row.spec, MLPSpec) else UPDATE_TOLERANCE

    def _off(self, found: Mapping[str, Any], expected: Mapping[str, Any], before: Mapping[str, Any]) -> float:
        """How far weights are from the reference's: of SGD by the weights, of AdamW, whose steps are small, by what was
        added to them."""
        if isinstance(self.row.spec, MLPSpec):
            return distance(found, expected)
        gradients = _part(self._reference(self.order(0)), "gradient")
        kept = {n: decided(g) for n, g in gradients.items()}
        found, expected = ({n: (w[n] - before[n])[kept[n]] for n in before} for w in (found, expected))
        return distance(found, expected)

    def _check_gradients(self, expected: Mapping[str, np.ndarray], order: np.ndarray) -> None:
        """Of the first batch: the loss, and every tensor's gradient."""
        inputs, targets = (rows[order[: self.row.batch]] for rows in (self.row.inputs, self.row.targets))
        loss, gradients = self.net.gradients(self.net.put(inputs), self.net.put(targets))
        found, right = float(self.arrays.get(loss)), float(expected["loss"])
        if not abs(found - right) <= WEIGHTS_TOLERANCE * abs(right):
            raise _wrong(f"its first loss is {found:.7g}, float64's {right:.7g}")
        wanted = _part(expected, "gradient")
        if gradients.keys() != wanted.keys():
            raise _wrong(f"its gradients are of {', '.join(sorted(gradients))}")
        for name, doubt in _part(expected, "doubt").items():
            off = distance({name: self.arrays.get(gradients[name])}, {name: wanted[name]})
            if not off <= float(np.hypot(WEIGHTS_TOLERANCE, doubt)):
                raise _wrong(f"its first gradients are {off:.2g} from float64's, relative")

    def _reference(self, order: np.ndarray) -> dict[str, np.ndarray]:
        """Float64's loss and gradients of the first batch, the rows of the checked epoch and the weights after it.

        Made once for all ways and rounds of this run of the suite.
        """

        def make(folder: Path) -> Path:
            twin = Twin(self.row.spec, self.first)
            taken = twin.clear_epoch(self.row.inputs, self.row.targets, order, self.row.batch)
            rows = taken[: self.row.batch]
            first, batch = Twin(self.row.spec, self.first), (self.row.inputs[rows], self.row.targets[rows])
            loss, g = first.gradients(*batch)
            found = {f"gradient {n}": values for n, values in g.items()} | {"loss": np.array(loss), "order": taken}
            found |= {f"doubt {n}": np.array(doubt) for n, doubt in first.doubts(*batch).items()}
            found |= {f"weight {n}": values for n, values in twin.weights.items()}
            with (made := folder / "reference.npz").open("wb") as file:
                np.savez(file, **found)  # type: ignore[arg-type]
            return made

        place = Path(self.task.folder) / f"{self.name.replace(' ', '-')}.npz"
        with np.load(files.make_once(place, make), allow_pickle=False) as kept:
            return dict(kept)

    def _twin(self, weights: Mapping[str, np.ndarray], order: np.ndarray) -> Twin:
        twin = Twin(self.row.spec, weights)
        twin.epoch(self.row.inputs, self.row.targets, order, self.row.batch)
        return twin

    def _cause(self, found: dict[str, np.ndarray], order: np.ndarray) -> str:
        """What may have gone wrong, of what often does: each is tried on the reference."""
        if distance(found, self.first) == 0:
            return "the optimizer changed nothing"
        whole = len(order) // self.row.batch * self.row.batch
        tried = {
            "the last batch, which is not full, was left out": order[:whole],
            "the rows were not shuffled": np.sort(order),
            "the rows were not shuffled, but taken from the first": np.arange(len(order)),
        }
        for words, rows in tried.items():
            if len(rows) and self._off(found, self._twin(self.first, rows).weights, self.first) <= self._tolerance:
                return words
        return "it computes something else"

    def _check_last(self, before: dict[str, np.ndarray], order: np.ndarray) -> tuple[float | None, float | None]:
        """Of the last timed epoch: its weights, where float64 can follow from those before it; the accuracy."""
        found = self.net.weights()
        if distance(found, before) == 0:
            raise _wrong("the last timed epoch changed no weight")
        off = None
        if isinstance(self.row.spec, MLPSpec) and len(order) <= self.row.checked_steps * self.row.batch:
            off = distance(found, self._twin(before, order).weights)
            if not off <= LAST_TOLERANCE:
                raise _wrong(f"after the last timed epoch its weights are {off:.2g} from float64's, relative")
        return self._accuracy(found), off

    def _accuracy(self, weights: Mapping[str, np.ndarray]) -> float | None:
        """On the rows that are asked; also that the logits are those of these rows and weights."""
        logits = self.arrays.get(self.net.infer(self.net.put(self.row.asked)))
        return self._checked(logits, weights)

    def _checked(self, logits: np.ndarray, weights: Mapping[str, np.ndarray]) -> float | None:
        expected = Twin(self.row.spec, weights).logits(self.row.asked)
        if logits.shape != expected.shape:
            raise _wrong(f"it answered {logits.shape}, not {expected.shape}: not the rows that were asked")
        off = float(np.abs(logits - expected).max() / np.abs(expected).max())
        answers = self.row.answers
        if answers is None:
            right, wanted = None, None
        else:
            right, wanted = (float((values.argmax(-1) == answers).mean()) for values in (logits, expected))
        if not off <= LOGITS_TOLERANCE or (right is not None and abs(right - wanted) > ACCURACY_TOLERANCE):  # type: ignore[operator]
            raise _wrong(f"its logits are {off:.2g} from float64's: other rows, or other weights, than asked")
        return right

    # -- inference ------------------------------------------------------------------------------------------------

    def asked(self) -> dict[str, Any]:
        """Times asking all rows at once, weights and rows on the device."""
        self.net.load(self.first)
        accuracy = self._accuracy(self.first)
        asked = self.net.put(self.row.asked)
        self.arrays.wait([asked])
        if self.task.way.simulated:
            self.arrays.counted()
            self.arrays.wait([self.net.infer(asked)])
            return {"accuracy": accuracy, "counts": self.arrays.counted()}
        cpu, began = time.process_time(), time.perf_counter()
        measured = calls.measure(lambda _: (self.net.infer(asked),), self.arrays, min(self.task.row_s, 2.0))
        cpu, took = time.process_time() - cpu, time.perf_counter() - began
        if measured.fault:
            raise _wrong(measured.fault)
        self._checked(self.arrays.get(measured.last[0]), self.first)
        return {"accuracy": accuracy, "calls": measured.latency, "run_s": took, "cpu": cpu / took}


def _part(reference: Mapping[str, np.ndarray], kind: str) -> dict[str, np.ndarray]:
    return {n.removeprefix(f"{kind} "): values for n, values in reference.items() if n.startswith(f"{kind} ")}


def decided(gradient: np.ndarray) -> np.ndarray:
    """Where rounding does not decide which way AdamW's first step goes; a gradient of zero is exact."""
    share = DECIDED * np.sqrt(np.mean(np.square(gradient)))
    return (gradient == 0) | (np.abs(gradient) >= share)


def distance(found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> float:
    """The largest over all tensors of |found - expected| / |expected|, Euclidean; inf where one is missing."""
    if found.keys() != expected.keys():
        return float("inf")
    pairs = ((np.linalg.norm(found[n].astype(np.float64) - e), np.linalg.norm(e)) for n, e in expected.items())
    return float(max(off / size if size else off for off, size in pairs))
