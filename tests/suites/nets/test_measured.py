"""What a run must be refused for: each fault that is planted in a framework's net is found, and named."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nanogpt_mac.backends import kinds
from nanogpt_mac.backends.nets import LMSpec, MLPSpec
from nanogpt_mac.backends.torch_nets import TorchNet
from nanogpt_mac.records.bench import NetReading, State, Task, Way
from nanogpt_mac.suites import ways
from nanogpt_mac.suites.config import BenchConfig
from nanogpt_mac.suites.nets.measured import Measuring, NetRow, Settings, decided

WAY = Way(name="cpu", label="CPU", backend="cpu", device="cpu")
SPEC = MLPSpec((20, 8, 5))
RNG = np.random.default_rng(5)
INPUTS, TARGETS = RNG.random((330, 20), np.float32), RNG.integers(0, 5, 330, np.int32)
ASKED, ANSWERS = RNG.random((50, 20), np.float32), RNG.integers(0, 5, 50, np.int32)


class LastBatchIgnored(TorchNet):
    def epoch(self, order: np.ndarray) -> list[Any]:
        return super().epoch(order[: len(order) // self.feed.batch * self.feed.batch])


class NotShuffled(TorchNet):
    def epoch(self, order: np.ndarray) -> list[Any]:
        return super().epoch(np.sort(order))


class OptimizerNotCalled(TorchNet):
    def step(self, inputs: Any, targets: Any) -> Any:
        return self.loss(inputs, targets).detach()


class NotLoaded(TorchNet):
    def load(self, weights: Any) -> None:
        pass


class OtherRowsAsked(TorchNet):
    """Accuracy on the training set: as many rows, but others."""

    def build(self) -> None:
        super().build()
        right = self.infer
        self.infer = lambda inputs: right(self.put(self.rows[0][: len(inputs)]))  # type: ignore[method-assign]


class OtherLearningRate(TorchNet):
    def step(self, inputs: Any, targets: Any) -> Any:
        self.optimizer.param_groups[0]["lr"] = 0.11
        return super().step(inputs, targets)


class LossSummed(TorchNet):
    def build(self) -> None:
        super().build()
        mean = self.loss
        self.loss = lambda inputs, targets: mean(inputs, targets) * len(targets)


class FurtherGradient(TorchNet):
    def gradients(self, inputs: Any, targets: Any) -> tuple[Any, dict[str, Any]]:
        loss, found = super().gradients(inputs, targets)
        return loss, found | {"another.weight": next(iter(found.values()))}


class StopsTraining(TorchNet):
    """Right where it is checked; nothing is trained from the second timed epoch on."""

    epochs = 0

    def load(self, weights: Any) -> None:
        super().load(weights)
        self.epochs = 0

    def epoch(self, order: np.ndarray) -> list[Any]:
        self.epochs += 1
        return [p for _, p in self.named()] if self.epochs > 1 else super().epoch(order)


def measured(net: type, folder: Path, arrays: Any = None, trained: bool = True) -> NetReading:
    task = Task(suite="mlp", way=WAY, rows=("x",), round=0, row_s=5, folder=str(folder), work={})
    row = NetRow(SPEC, 32, INPUTS, TARGETS, ASKED, ANSWERS, len(INPUTS), trained)
    settings = Settings(epochs=3, placement="resident", sync="batch", seed=7)
    return Measuring(task, arrays or ways.arrays(WAY, BenchConfig()), net, lambda name: row, settings)("x")


@pytest.mark.parametrize(
    ("net", "words"),
    [
        (LastBatchIgnored, "the last batch, which is not full, was left out"),
        (NotShuffled, "the rows were not shuffled"),
        (OptimizerNotCalled, "the optimizer changed nothing"),
        (NotLoaded, "its weights were not loaded"),
        (OtherRowsAsked, "other rows, or other weights, than asked"),
        (OtherLearningRate, "it computes something else"),
        (LossSummed, "its first loss"),
        (FurtherGradient, "another.weight"),
        (StopsTraining, "the last timed epoch changed no weight"),
    ],
)
def test_planted(net: type, words: str, tmp_path: Path) -> None:
    found = measured(net, tmp_path)
    assert found.state is State.WRONG, found.reason
    assert words in found.reason
    assert not found.epochs_s


LANGUAGE = LMSpec(2, 32, 4, 16, 23)


class GradientOff(TorchNet):
    """Of one tensor, by a thousandth."""

    def gradients(self, inputs: Any, targets: Any) -> tuple[Any, dict[str, Any]]:
        loss, found = super().gradients(inputs, targets)
        return loss, {n: g * (1.001 if n == "blocks.1.linear1.weight" else 1.0) for n, g in found.items()}


@pytest.mark.parametrize(("net", "state"), [(GradientOff, State.WRONG), (TorchNet, State.OK)])
def test_a_gradient_of_a_language_model_that_is_a_thousandth_off(net: type, state: State, tmp_path: Path) -> None:
    windows = np.random.default_rng(3).integers(0, LANGUAGE.vocab, (24, LANGUAGE.context + 1), np.int32)
    row = NetRow(LANGUAGE, 8, windows[:, :-1], windows[:, 1:], windows[:8, :-1], None, 24, True, 3)
    task = Task(suite="lm", way=WAY, rows=("x",), round=0, row_s=5, folder=str(tmp_path), work={})
    settings = Settings(epochs=3, placement="resident", sync="batch", seed=7)
    found = Measuring(task, ways.arrays(WAY, BenchConfig()), net, lambda name: row, settings)("x")
    assert found.state is state, found.reason
    assert ("first gradients are 0.001 from" in found.reason) == (state is State.WRONG)


class Unwaited:
    """Arrays whose `wait` does not wait: what is computed comes only when it is read."""

    def __init__(self) -> None:
        self.arrays, self.running = ways.arrays(WAY, BenchConfig()), False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.arrays, name)

    def wait(self, outputs: Any) -> None:
        self.running = True

    def peek(self, array: Any) -> float:
        import time

        if self.running:
            time.sleep(0.3)
        self.running = False
        return self.arrays.peek(array)


def test_clock_read_before_waiting(tmp_path: Path) -> None:
    found = measured(TorchNet, tmp_path, Unwaited())
    assert found.state is State.WRONG
    assert "the clock was read without waiting" in found.reason


@pytest.mark.parametrize("backend", [name for name in ("cpu", "mlx") if kinds.missing(name) is None])
def test_right(backend: str, tmp_path: Path) -> None:
    kind = kinds.KINDS[backend]
    way = WAY.model_copy(update={"backend": backend, "device": kind.load().device_of(kind)})
    arrays = ways.arrays(way, BenchConfig())
    make: Callable[..., Any] = kind.load_nets()
    found = measured(make, tmp_path, arrays)  # type: ignore[arg-type]
    assert found.state is State.OK, found.reason
    assert len(found.epochs_s) == 3
    assert (found.distance or 1) < 1e-5
    assert (found.distance_last or 1) < 1e-2
    asked = measured(make, tmp_path, arrays, trained=False)  # type: ignore[arg-type]
    assert asked.calls is not None, asked.reason
    assert asked.calls.median


def test_of_adamw_only_numbers_are_left_out_whose_gradient_is_nearly_zero():
    gradient = np.array([0.0, 1e-5, -1e-5, 1e-3, -2e-3, 0.0])
    assert decided(gradient).tolist() == [True, False, False, True, True, True]
    assert decided(np.zeros(3)).all()
    assert decided(np.random.default_rng(0).normal(size=10_000)).mean() > 0.98
