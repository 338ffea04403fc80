"""Two small networks for the suites, written in each framework as its users do: a classifier, and a language model.

`Kind.nets` names a Net. Weights cross by torch's names and in torch's shapes, float32; rows of data are numpy's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from nanogpt_mac.backends.arrays import Arrays

PLACEMENTS = ("resident", "per_batch")  # where the rows are: on the device, or brought there batch by batch
SYNCS = ("batch", "epoch")  # when the host waits
BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8  # AdamW's defaults, in every framework


@dataclass(frozen=True)
class MLPSpec:
    """Linear layers of these widths with ReLU between them; plain SGD. Rows: float32 pixels, and a class."""

    widths: tuple[int, ...]
    lr: float = 0.1

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        found: dict[str, tuple[int, ...]] = {}
        for i, (inner, outer) in enumerate(zip(self.widths, self.widths[1:], strict=False)):
            found |= _linear(f"layers.{i}", inner, outer)
        return found


@dataclass(frozen=True)
class LMSpec:
    """mlx-examples' transformer_lm: sinusoidal positions, pre-norm blocks with ReLU, attention without biases; AdamW.
    Rows: int32 tokens, and the tokens that follow."""

    blocks: int
    width: int
    heads: int
    context: int
    vocab: int
    lr: float = 3e-4
    weight_decay: float = 1e-5

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        w = self.width
        found: dict[str, tuple[int, ...]] = {"embedding.weight": (self.vocab, w)}
        for i in range(self.blocks):
            at = f"blocks.{i}"
            found |= _norm(f"{at}.ln1", w) | _norm(f"{at}.ln2", w)
            found |= {f"{at}.{name}.weight": (w, w) for name in ("query", "key", "value", "out")}
            found |= _linear(f"{at}.linear1", w, 4 * w) | _linear(f"{at}.linear2", 4 * w, w)
        return found | _norm("ln", w) | _linear("head", w, self.vocab)


Spec = MLPSpec | LMSpec


def _linear(name: str, inner: int, outer: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (outer, inner), f"{name}.bias": (outer,)}


def _norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def drawn(spec: Spec, seed: int) -> dict[str, np.ndarray]:
    """Weights from a seed, as both frameworks draw those of a linear layer: uniform within 1 / sqrt(inputs); norms are
    1 and 0, embeddings of standard deviation 0.02."""
    rng = np.random.Generator(np.random.Philox(seed))
    found = {}
    for name, shape in spec.shapes.items():
        inputs = spec.shapes[name.replace("bias", "weight")][-1]
        values = rng.uniform(-1, 1, shape) / inputs**0.5
        if name.startswith("embedding"):
            values = 0.02 * rng.standard_normal(shape)
        elif "ln" in name:
            values = np.full(shape, float(name.endswith("weight")))
        found[name] = values.astype(np.float32)
    return found


def positions(context: int, width: int) -> np.ndarray:
    """Sines beside cosines of every position, float32 (context, width): wavelengths from 2 pi to 10,000 times that."""
    angles = np.arange(context)[:, None] / 10_000 ** (np.arange(width // 2) / (width // 2))
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(np.float32)


@dataclass(frozen=True)
class Feed:
    """How a network gets its rows, and when the host waits for it."""

    batch: int
    placement: str = PLACEMENTS[0]
    sync: str = SYNCS[0]


class Net(ABC):
    """One network and its optimizer, with the rows it is trained on: `inputs` (N, ...) and `targets` (N, ...).

    AbsentError for a network or a Feed that this way does not have. One thread at a time.
    """

    def __init__(self, arrays: Arrays, spec: Spec, feed: Feed, inputs: np.ndarray, targets: np.ndarray) -> None:
        self.arrays, self.spec, self.feed, self.rows = arrays, spec, feed, (inputs, targets)
        self.build()
        found = {name: tuple(array.shape) for name, array in self.named()}
        if found != spec.shapes:
            raise TypeError(f"the network has {sorted(found.items())}, not {sorted(spec.shapes.items())}")
        self.resident = [self.put(rows) for rows in self.rows] if feed.placement == "resident" else []

    # -- what a framework writes ----------------------------------------------------------------------------------

    @abstractmethod
    def build(self) -> None:
        """Make the model, its optimizer and its step."""

    @abstractmethod
    def put(self, rows: np.ndarray) -> Any:
        """Rows of data, or their numbers, on the device. It need not wait."""

    @abstractmethod
    def named(self) -> Sequence[tuple[str, Any]]:
        """Every parameter with its name, native."""

    @abstractmethod
    def load(self, weights: Mapping[str, np.ndarray]) -> None:
        """Take the weights and start afresh: the optimizer forgets."""

    @abstractmethod
    def step(self, inputs: Any, targets: Any) -> Any:
        """Enqueue one step of training; the mean loss before it, native."""

    @abstractmethod
    def infer(self, inputs: Any) -> Any:
        """Logits of native inputs, without gradients, by the parameters as they are now."""

    @abstractmethod
    def gradients(self, inputs: Any, targets: Any) -> tuple[Any, dict[str, Any]]:
        """The mean loss and its gradients by name, native; nothing is trained."""

    # -- the same for all, unless a framework has its own structure -----------------------------------------------

    def epoch(self, order: np.ndarray) -> list[Any]:
        """Train on the rows numbered `order`, in batches, the last of which may be smaller. What must be complete: the
        last loss and all parameters. The caller waits for them."""
        outputs: list[Any] = []
        finish = self.arrays.wait if self.feed.sync == "batch" else self.arrays.start
        numbers = self.numbers(order) if self.resident else order
        for start in range(0, len(order), self.feed.batch):
            rows = numbers[start : start + self.feed.batch]
            if self.resident:
                loss = self.resident_step(rows)
            else:
                loss = self.step(self.put(self.rows[0][rows]), self.put(self.rows[1][rows]))
            outputs = [loss, *(array for _, array in self.named())]
            finish(outputs)
        return outputs

    def numbers(self, order: np.ndarray) -> Any:
        """The numbers of an epoch's rows, as `resident_step` wants to have a slice of them."""
        return self.put(order)

    def resident_step(self, rows: Any) -> Any:
        """`step` of the rows with these numbers, which are on the device."""
        return self.step(self.resident[0][rows], self.resident[1][rows])

    def weights(self) -> dict[str, np.ndarray]:
        return {name: self.arrays.get(array) for name, array in self.named()}
