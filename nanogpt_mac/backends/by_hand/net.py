"""The classifier by kernels of our own: what the host does in each version, whatever it submits to.

v1 brings each batch and waits for every kernel; v2 writes which rows come next, submits a batch and waits for it; v3
submits batch after batch and waits once an epoch.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np

from nanogpt_mac.backends.arrays import AbsentError, Arrays, Function, Op
from nanogpt_mac.backends.by_hand import launches
from nanogpt_mac.backends.by_hand.launches import Launch, Version
from nanogpt_mac.backends.nets import Feed, MLPSpec, Net, Spec


class Submitting(Arrays):
    """A device that takes launches, on top of what suites ask of any framework. Whole numbers are of 32 bits there."""

    version: Version

    @abstractmethod
    def launch(self, launch: Launch, arrays: Sequence[Any]) -> None:
        """Add one launch to what will be submitted."""

    @abstractmethod
    def submit(self) -> None:
        """Hand over what was launched, without waiting."""

    @abstractmethod
    def overwrite(self, array: Any, values: np.ndarray) -> None:
        """The first of its numbers, by the host. The caller sees to it that the device is through with the old ones."""

    @abstractmethod
    def seen(self, array: Any) -> np.ndarray:
        """What the host reads there now. Where memory is shared, that is what was, until somebody has waited."""

    def batch(self) -> AbstractContextManager[Any]:
        """Around what the host does for a batch."""
        return nullcontext()

    # -- it has launches and no operations -------------------------------------------------------------------------

    def op(self, name: str) -> Op | None:
        return None

    def ready(self, function: Function) -> Function:
        return function

    def ready_with_gradient(self, function: Function, of: Sequence[int]) -> Function:
        raise AbsentError("kernels by hand differentiate nothing")


class HandNet(Net):
    """Feed's batch counts; where rows are and when the host waits is the version's own."""

    arrays: Submitting

    def __init__(self, arrays: Submitting, spec: Spec, feed: Feed, inputs: np.ndarray, targets: np.ndarray) -> None:
        super().__init__(arrays, spec, Feed(feed.batch, "per_batch"), inputs, targets)  # which keeps no rows for itself

    def build(self) -> None:
        if not isinstance(self.spec, MLPSpec):
            raise AbsentError("these kernels are for suite=mlp")
        widths, self.of = self.spec.widths, self.arrays.version
        self.widths = widths
        self.layers = range(len(widths) - 1)
        self.held: dict[str, Any] = {}
        for i, (inner, outer) in enumerate(pairwise(widths)):
            for prefix in ("", "g"):
                self.held |= {f"{prefix}w{i}": self._zeros(outer, inner), f"{prefix}b{i}": self._zeros(outer)}
        images, classes = self.rows
        if self.of.order != "host":
            self.held |= {"images": self.put(images), "classes": self.put(classes)}
            self.held |= {"order": self._zeros(len(images), kind=np.int32), "behind": self._zeros(1, kind=np.int32)}
            self.held |= {"x0": self._zeros(self.feed.batch, widths[0])}
            self.held |= {"y": self._zeros(self.feed.batch, kind=np.int32)}
        self.room = 0
        self._make_room(self.feed.batch)
        self.training = cache(lambda rows: launches.training(self.of, widths, rows, self.spec.lr))
        self.losses: list[float] = []  # of every batch, where the host reads them

    def _zeros(self, *shape: int, kind: Any = np.float32) -> Any:
        return self.arrays.put(np.zeros(shape, kind))

    def _make_room(self, rows: int) -> None:
        """For what so many rows become."""
        if rows <= self.room:
            return
        self.room = rows
        for i, width in enumerate(self.widths[1:], 1):
            self.held |= {f"x{i}": self._zeros(rows, width), f"d{i}": self._zeros(rows, width)}
        self.held |= {"loss": self._zeros(rows), "shares": self._zeros(rows, self.widths[-1])}

    def _launch(self, each: Launch, **other: Any) -> None:
        self.arrays.launch(each, [other.get(name, self.held.get(name)) for name in each.arrays])

    def _finish(self) -> None:
        self.arrays.submit()
        self.arrays.wait(())

    def _loss(self, rows: int) -> float:
        return float(self.arrays.seen(self.held["loss"])[:rows].sum())

    # -- a Net ------------------------------------------------------------------------------------------------------

    def put(self, rows: np.ndarray) -> Any:
        return self.arrays.put(rows if rows.dtype == np.float32 else rows.astype(np.int32))

    def named(self) -> Sequence[tuple[str, Any]]:
        found = []
        for i in self.layers:
            found += [(f"layers.{i}.weight", self.held[f"w{i}"]), (f"layers.{i}.bias", self.held[f"b{i}"])]
        return found

    def load(self, weights: Mapping[str, np.ndarray]) -> None:
        self.arrays.wait(())
        for name, array in self.named():
            self.arrays.overwrite(array, weights[name])

    def epoch(self, order: np.ndarray) -> list[Any]:
        of, batch, order = self.of, self.feed.batch, order.astype(np.int32)
        self.losses = []
        if of.order == "epoch":
            self.arrays.overwrite(self.held["order"], order)
            self.arrays.overwrite(self.held["behind"], np.zeros(1, np.int32))
            self.arrays.overwrite(self.held["loss"], np.zeros(self.room, np.float32))
        for number, begin in enumerate(range(0, len(order), batch), 1):
            with self.arrays.batch():
                self._batch(order[begin : begin + batch])
                if of.wait == "epoch" and of.batches and number % of.batches == 0:
                    self.arrays.submit()
        self.arrays.submit()
        return [self.held["loss"], *(array for _, array in self.named())]

    def _batch(self, rows: np.ndarray) -> None:
        if self.of.order == "host":  # as one writes it first: new arrays, each time
            self.held |= {"x0": self.put(self.rows[0][rows]), "y": self.put(self.rows[1][rows])}
        elif self.of.order == "batch":
            self.arrays.overwrite(self.held["order"], rows)
        for each in self.training(len(rows)):
            self._launch(each)
            if self.of.wait == "launch":
                self._finish()
        if self.of.wait == "batch":
            self._finish()
        if self.of.wait != "epoch":
            self.losses.append(self._loss(len(rows)))

    def step(self, inputs: Any, targets: Any) -> Any:
        raise AbsentError("these kernels take whole epochs")

    def infer(self, inputs: Any) -> Any:
        rows = len(inputs)
        self._make_room(rows)
        for each in launches.forward(self.of, self.widths, rows):
            self._launch(each, x0=inputs)
        self.arrays.submit()
        return self.held[f"x{len(self.layers)}"][:rows]

    def gradients(self, inputs: Any, targets: Any) -> tuple[Any, dict[str, Any]]:
        rows, of, widths = len(inputs), self.of, self.widths
        self._make_room(rows)
        found = {f"layers.{i}.{kind}": self.held[f"g{kind[0]}{i}"] for i in self.layers for kind in ("weight", "bias")}
        for array in (self.held["loss"], *found.values()):
            self.arrays.overwrite(array, np.zeros(array.shape, np.float32))
        all_of = launches.forward(of, widths, rows) + launches.backward(of, widths, rows, 0.0, update=False)
        for each in all_of:
            self._launch(each, x0=inputs, y=targets)
        self._finish()
        return self.arrays.put(np.array(self._loss(rows), np.float32)), found
