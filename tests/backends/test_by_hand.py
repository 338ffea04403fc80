"""The classifier by kernels of our own: each kernel, whole epochs, what is submitted, and faults that must be seen."""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
from fakes import hand_kernels

from nanogpt_mac import simulator
from nanogpt_mac.backends.arrays import AbsentError
from nanogpt_mac.backends.by_hand import launches, metal
from nanogpt_mac.backends.by_hand.launches import Launch, version
from nanogpt_mac.backends.by_hand.metal import MetalArrays
from nanogpt_mac.backends.by_hand.net import HandNet
from nanogpt_mac.backends.nets import Feed, LMSpec, MLPSpec, drawn
from nanogpt_mac.corpus import mnist
from nanogpt_mac.errors import InputError
from nanogpt_mac.simulator import pyobjc_metal
from nanogpt_mac.simulator.pyobjc_metal import MetalError
from nanogpt_mac.suites.nets.measured import distance
from nanogpt_mac.suites.nets.twin import Twin

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the simulated Metal objects need Linux and g++")

DEEP, WIDE = (784, 32, 32, 10), (784, 128, 10)
ROWS = (1, 31, 33, 96, 1000)
OF_TERMS = 1e-5  # of the sum of the absolute terms
OF_WEIGHTS = 1e-5  # relative, after an epoch
IMAGES, BATCH = 2000, 256


# -- kernels ----------------------------------------------------------------------------------------------------------


def kernels(name: str, rows: int) -> dict[str, Launch]:
    """The first launch of every kernel of a version, in a step of so many rows."""
    found: dict[str, Launch] = {}
    for launch in launches.training(version(name), DEEP, rows, 0.1):
        found.setdefault(launch.kernel, launch)
    return found


def test_the_kernels_are_as_many_as_the_issue_has() -> None:
    assert {name: len(kernels(name, 8)) for name in ("v1", "v2", "v3")} == {"v1": 11, "v2": 6, "v3": 6}


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("name", ["v1", "v2", "v3"])
def test_each_kernel_gives_what_numpy_gives(name: str, rows: int) -> None:
    arrays = MetalArrays(version(name))
    for kernel, launch in kernels(name, rows).items():
        given = hand_kernels.drawn(launch, DEEP, rows, seed=rows)
        native = [arrays.put(a) for a in given]
        arrays.launch(launch, native)
        arrays.wait(())
        wanted = hand_kernels.expected(launch, given)
        for number, (values, scale) in wanted.items():
            off = abs(arrays.get(native[number])[: len(values)].astype(np.float64) - values)
            assert (off <= OF_TERMS * scale).all(), (kernel, launch.arrays[number], off.max())
        for number in set(range(len(given))) - set(wanted):  # and nothing else was written
            np.testing.assert_array_equal(arrays.get(native[number]), given[number], kernel)


# -- whole epochs -----------------------------------------------------------------------------------------------------


@cache
def data(count: int = IMAGES) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images, their classes, and the order of an epoch."""
    images = mnist.stand_in()
    shares = images.train[:count].astype(np.float32) / np.float32(255)
    return shares, images.train_classes[:count].astype(np.int32), np.random.default_rng(4).permutation(count)


@cache
def twin(widths: tuple[int, ...], batch: int, count: int) -> Twin:
    found = Twin(MLPSpec(widths), drawn(MLPSpec(widths), 1))
    found.epoch(*data(count), batch)
    return found


class Run:
    """A net on the simulated Metal, and one epoch from the drawn weights."""

    def __init__(
        self, name: str, widths: tuple[int, ...] = DEEP, batch: int = BATCH, net: type = HandNet, count: int = IMAGES
    ) -> None:
        self.arrays, spec = MetalArrays(version(name)), MLPSpec(widths)
        images, classes, self.order = data(count)
        self.twin = twin(widths, batch, count)
        self.net = net(self.arrays, spec, Feed(batch), images, classes)
        self.net.load(drawn(spec, 1))
        self.arrays.counted()

    def epoch(self) -> dict[str, int]:
        """Its counts."""
        self.arrays.wait(self.net.epoch(self.order))
        return dict(self.arrays.counted() or {})

    def off(self) -> float:
        return distance(self.net.weights(), self.twin.weights)


BATCHES = -(-IMAGES // BATCH)  # 8, the last of 208
COUNTS = {  # launches, command buffers, waits
    "v1": (27 * BATCHES, 27 * BATCHES, 27 * BATCHES),
    "v2": (10 * BATCHES, BATCHES, BATCHES),
    "v3": (10 * BATCHES, BATCHES, 1),
    "v3-5": (10 * BATCHES, 2, 1),
    "v3-all": (10 * BATCHES, 1, 1),
    "v3-queue2": (10 * BATCHES, BATCHES, 1),
    "v3-5-queue1": (10 * BATCHES, 2, 1),
}


@pytest.mark.parametrize("name", COUNTS)
def test_an_epoch_leads_to_float64s_weights_with_the_submissions_that_are_stated(name: str) -> None:
    run = Run(name)
    counts = run.epoch()
    assert run.off() < OF_WEIGHTS
    assert counts == dict(zip(("launches", "buffers", "waits"), COUNTS[name], strict=True))


@pytest.mark.parametrize(("name", "each"), [("v1", 18), ("v2", 7), ("v3", 7)])
def test_two_layers_and_small_batches(name: str, each: int) -> None:
    run = Run(name, WIDE, 96, count=500)
    counts = run.epoch()
    assert run.off() < OF_WEIGHTS
    assert counts["launches"] == each * 6


@pytest.mark.parametrize("name", ["v1", "v2", "v3"])
def test_loss_gradients_and_logits(name: str) -> None:
    run, spec = Run(name), MLPSpec(DEEP)
    images, classes, _ = data()
    for rows in (33, 300):  # more than a batch
        loss, gradients = run.net.gradients(run.net.put(images[:rows]), run.net.put(classes[:rows]))
        value, wanted = Twin(spec, drawn(spec, 1)).gradients(images[:rows], classes[:rows])
        assert float(run.arrays.get(loss)) == pytest.approx(value, rel=1e-6)
        assert distance({n: run.arrays.get(g) for n, g in gradients.items()}, wanted) < 1e-5
    assert distance(run.net.weights(), drawn(spec, 1)) == 0  # nothing was trained
    logits = run.arrays.get(run.net.infer(run.net.put(images[:500])))
    np.testing.assert_allclose(logits, Twin(spec, drawn(spec, 1)).logits(images[:500]), atol=1e-5)
    run.epoch()
    assert run.off() < OF_WEIGHTS


def test_the_host_reads_every_loss_and_v3_adds_them_up() -> None:
    """And nothing is left of an epoch when the next begins."""
    runs = {name: Run(name, batch=96, count=500) for name in ("v1", "v2", "v3")}
    sums = []
    for name, run in runs.items():
        run.epoch()
        run.net.load(drawn(MLPSpec(DEEP), 1))
        run.epoch()
        assert run.off() < OF_WEIGHTS
        assert len(run.net.losses) == (0 if name == "v3" else 6)
        sums.append(sum(run.net.losses) or float(run.arrays.get(run.net.held["loss"]).sum()))
    assert sums == pytest.approx([sums[0]] * 3, rel=1e-5)


def test_a_command_buffer_that_fails_is_an_error_whichever_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 6 in a queue of 3: seen when it leaves the queue, or at the wait."""
    for failing in (0, 4):
        run, made = Run("v3-queue3", batch=96, count=500), list[Any]()
        run.arrays.gpu_seconds()
        run.epoch()
        assert 0 < (run.arrays.gpu_seconds() or 0) < 60
        assert run.arrays.gpu_seconds() == 0

        def status(command: Any, made: list[Any] = made, failing: int = failing) -> int:
            made.append(command)
            return 5 if len(made) == failing + 1 else 4

        with monkeypatch.context() as patched:
            patched.setattr(pyobjc_metal.CommandBuffer, "status", status)
            patched.setattr(pyobjc_metal.CommandBuffer, "error", lambda self: "it took too long")
            with pytest.raises(RuntimeError, match="Metal: it took too long"):
                run.epoch()


# -- what is planted must be seen -------------------------------------------------------------------------------------


class NeverWaits(HandNet):
    """v2 without its wait: the host overwrites the order of rows that no kernel has read."""

    def _finish(self) -> None:
        self.arrays.submit()


class LastBatchIgnored(HandNet):
    def epoch(self, order: np.ndarray) -> list[Any]:
        return super().epoch(order[: len(order) // self.feed.batch * self.feed.batch])


class WeightsFirst(HandNet):
    """Every layer is updated before its input's gradient is taken."""

    def build(self) -> None:
        super().build()
        right = self.training

        def wrong(rows: int) -> list[Launch]:
            step = right(rows)
            turned = list(step)
            for i, launch in enumerate(step):
                if launch.kernel == "linear_backward_input":
                    turned[i], turned[i + 1] = step[i + 1], launch
            return turned

        self.training = wrong  # type: ignore[assignment]


@pytest.mark.parametrize("net", [NeverWaits, LastBatchIgnored, WeightsFirst])
def test_planted_in_the_host(net: type) -> None:
    run = Run("v2", net=net)
    run.epoch()
    assert run.off() > 100 * OF_WEIGHTS


@pytest.mark.parametrize("which", [0, 1])
def test_planted_a_barrier_taken_out_of_the_tile_loop(which: int, monkeypatch: pytest.MonkeyPatch) -> None:
    barrier = "threadgroup_barrier(mem_flags::mem_threadgroup);"
    parts = launches.source("v2").split(barrier)
    assert len(parts) == 3
    broken = (barrier if which else "").join(parts[:2]) + ("" if which else barrier) + parts[2]
    monkeypatch.setattr(launches, "source", lambda name: broken)
    run = Run("v2")
    run.epoch()
    assert not run.off() < 100 * OF_WEIGHTS


def test_planted_submissions(monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = Run("v3").arrays
    with monkeypatch.context() as patched:
        patched.setattr(pyobjc_metal.Encoder, "endEncoding", lambda self: None)
        with pytest.raises(MetalError, match="endEncoding is missing"):
            Run("v3").epoch()
    submitted = arrays.queue.commandBuffer()
    submitted.commit()
    with pytest.raises(MetalError, match="committed twice"):
        submitted.commit()
    launch = replace(launches.training(version("v3"), DEEP, 8, 0.1)[1], group=(32, 64))
    with pytest.raises(MetalError, match="at most 1024 threads"):
        arrays.launch(launch, [arrays.put(np.zeros((40_000,), np.float32)) for _ in launch.arrays])


# -- what is asked for ------------------------------------------------------------------------------------------------


def test_versions_by_name() -> None:
    assert version("v3-5-queue128") == replace(launches.VERSIONS["v3"], batches=5, depth=128)
    assert version("v3-all").batches == 0
    for words in ("v4", "v2-5", "v3-0", "v3-queue0", "v1-all", "v3-"):
        with pytest.raises(InputError, match=f"{words!r}: use v1, v2, v3, or"):
            version(words)


def test_other_networks_are_refused() -> None:
    with pytest.raises(AbsentError, match="these kernels are for suite=mlp"):
        HandNet(MetalArrays(version("v3")), LMSpec(1, 8, 1, 8, 8), Feed(2), np.zeros((1, 9)), np.zeros((1, 9)))


def test_where_there_is_no_metal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(simulator.VARIABLE, "0")
    assert metal.missing() == "it needs a Mac (NANOGPT_MAC_SIMULATE_MPS=1 simulates Metal on Linux)"
    monkeypatch.setenv(simulator.VARIABLE, "1")
    assert metal.missing() is None
    monkeypatch.setattr(sys, "platform", "darwin")
    assert metal.missing() == "PyObjC's Metal is not installed: pip install 'nanogpt-mac[metal]'"
