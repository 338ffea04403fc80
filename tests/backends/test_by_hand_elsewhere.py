"""The same launches elsewhere: in Triton's interpreter, through torch's Metal shaders, as nodes of MLX's graph."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from fakes.support import ROOT

from nanogpt_mac.backends import kinds
from nanogpt_mac.backends.arrays import AbsentError
from nanogpt_mac.backends.nets import Feed, LMSpec, MLPSpec, drawn
from nanogpt_mac.corpus import mnist
from nanogpt_mac.suites.nets.measured import distance
from nanogpt_mac.suites.nets.twin import Twin

DEEP = (784, 32, 32, 10)
IMAGES, BATCH = 2000, 256

# Of every kernel of three versions and of an epoch of each, how far it is off.
ASK = """
import json, sys
import numpy as np
from fakes import hand_kernels
from nanogpt_mac import simulator
from nanogpt_mac.backends import kinds
from nanogpt_mac.backends.by_hand import launches, torch_devices
from nanogpt_mac.backends.by_hand.net import HandNet
from nanogpt_mac.backends.nets import Feed, MLPSpec, drawn
from nanogpt_mac.corpus import mnist
from nanogpt_mac.suites.nets.measured import distance
from nanogpt_mac.suites.nets.twin import Twin

device, widths, sizes, count, batch = json.loads(sys.argv[1])
kind = kinds.KINDS[device]
if device == "mps":
    simulator.install()
made = torch_devices.ShaderArrays if device == "mps" else torch_devices.TritonArrays
at = simulator.DEVICE_NAME if device == "mps" else device
V = launches.Version
versions = [*launches.VERSIONS.values()]
if device != "mps" and count < 1000:
    versions += [V("n2", "naive", "batch", "batch"), V("n3", "naive", "epoch", "epoch")]
    versions += [V("t1", "tiled", "launch", "batch")]
images = mnist.stand_in()
every = 784 // widths[0]  # narrower networks see fewer pixels
rows = np.ascontiguousarray(images.train[:count, ::every].astype(np.float32) / np.float32(255))
classes, order = images.train_classes[:count].astype(np.int32), np.random.default_rng(4).permutation(count)
spec = MLPSpec(tuple(widths))
widths = spec.widths
twin = Twin(spec, drawn(spec, 1))
twin.epoch(rows, classes, order, batch)
done = set()
for version in versions:
    arrays = made(version, kind, at)
    worst = {}
    for size in sizes:
        for launch in launches.training(version, widths, size, 0.1):
            if (launch.kernel, size) in worst:
                continue
            if (version.order == "epoch", launch.kernel, size) in done:  # of another version
                continue
            done.add((version.order == "epoch", launch.kernel, size))
            given = hand_kernels.drawn(launch, widths, size, seed=size)
            native = [arrays.put(a) for a in given]
            arrays.launch(launch, native)
            arrays.wait(())
            off = [
                np.abs(arrays.get(native[i])[: len(values)].astype(float) - values) / scale
                for i, (values, scale) in hand_kernels.expected(launch, given).items()
            ]
            worst[launch.kernel, size] = max(float(one.max()) for one in off)
    net = HandNet(arrays, spec, Feed(batch), rows, classes)
    net.load(drawn(spec, 1))
    arrays.counted()
    simulator.clear_launches() if device == "mps" else None
    arrays.wait(net.epoch(order))
    counts = arrays.counted()
    launched = len(simulator.launches()) if device == "mps" else None
    off = distance(net.weights(), twin.weights)
    loss, gradients = net.gradients(net.put(rows[:33]), net.put(classes[:33]))
    value, expected = Twin(spec, net.weights()).gradients(rows[:33], classes[:33])
    found = distance({n: arrays.get(g) for n, g in gradients.items()}, expected)
    print(json.dumps({"version": version.name, "kernels": sorted({k for k, _ in worst}),
                      "worst": max(worst.values(), default=0), "off": off,
                      "gradients": found, "loss": float(arrays.get(loss)) / value,
                      "counts": counts, "launched": launched}))
"""


def asked(*given: Any, timeout: float = 300, **environment: str) -> dict[str, dict[str, Any]]:
    """In a process of its own, which has another device or language than this one."""
    env = os.environ | environment | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    argv = [sys.executable, "-c", ASK, json.dumps(given)]
    done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=timeout, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {line["version"]: line for line in lines}


def right(found: dict[str, Any]) -> None:
    assert found["worst"] < 1e-5, found
    assert found["off"] < 1e-5, found
    assert found["gradients"] < 1e-5, found
    assert found["loss"] == pytest.approx(1, abs=1e-5), found


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize(
    "given",
    [
        ("cpu", (49, 16, 16, 10), [1, 33], 70, 32),
        pytest.param(("cpu", DEEP, [1, 31, 33, 96, 1000], IMAGES, BATCH), marks=pytest.mark.slow),
    ],
)
def test_in_tritons_interpreter(given: Any) -> None:
    found = asked(*given, timeout=3000, TRITON_INTERPRET="1")
    assert set(found) == {"v1", "v2", "v3"} | (set() if given[1] == DEEP else {"n2", "n3", "t1"})
    for one in found.values():
        right(one)
    assert len(found["v1"]["kernels"]) == 11
    assert "n3" not in found or "advance" in found["n3"]["kernels"]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_v3_is_a_graph_a_batch_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU: what is recorded, replayed and in which order, the last batch among it."""
    import torch

    from nanogpt_mac.backends.by_hand import launches
    from nanogpt_mac.backends.by_hand.net import HandNet
    from nanogpt_mac.backends.by_hand.torch_devices import TritonArrays

    executed: list[Any] = []
    replays: list[int] = []
    now: list[list[Any]] = [executed]  # where launches go: to the device, or into what is being recorded

    class Graph:
        def __init__(self) -> None:
            self.work: list[Any] = []

        def replay(self) -> None:
            replays.append(len(self.work))
            executed.extend(self.work)

    @contextmanager
    def recording(graph: Graph, **_mode: str) -> Iterator[None]:
        now.append(graph.work)
        yield
        now.pop()

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", recording)
    version, widths = launches.VERSIONS["v3"], (12, 8, 10)
    arrays = TritonArrays(version, kinds.KINDS["cpu"], "cpu")
    arrays.graphed = True
    arrays.run = lambda launch, given: now[-1].append(launch)
    net = HandNet(arrays, MLPSpec(widths), Feed(4), np.zeros((14, 12), np.float32), np.zeros(14, np.int32))
    whole, last = (launches.training(version, widths, rows, 0.1) for rows in (4, 2))
    for epoch in range(3):
        executed.clear()
        replays.clear()
        arrays.wait(net.epoch(np.arange(14)))
        assert executed == [*whole, *whole, *whole, *last]
        assert (
            len(replays) == (2, 4, 4)[epoch]
        )  # of full batches from the second on, of the last one a whole epoch later


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the simulated MPS device runs on Linux only")
def test_through_torchs_shaders_on_the_simulated_device() -> None:
    found = asked("mps", DEEP, [1, 31, 33, 96], IMAGES, BATCH)
    for one in found.values():
        right(one)
    assert {name: one["launched"] for name, one in found.items()} == {"v1": 27 * 8, "v2": 80, "v3": 80}
    assert found["v1"]["counts"]["waits"] >= 27 * 8
    assert 8 <= found["v2"]["counts"]["waits"] < 8 * 4
    assert found["v3"]["counts"]["waits"] <= 4


@pytest.mark.skipif(sys.platform != "linux" or kinds.missing("mlx") is not None, reason="needs MLX and the shim")
def test_as_nodes_of_mlxs_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    from fakes import mlx_metal

    from nanogpt_mac.backends.by_hand.mlx_kernels import MLXKernelNet
    from nanogpt_mac.backends.mlx_arrays import MLXArrays

    monkeypatch.setattr("mlx.core.fast.metal_kernel", mlx_metal.metal_kernel)
    arrays, spec, images = MLXArrays(kinds.KINDS["mlx"], "cpu", False), MLPSpec(DEEP), mnist.stand_in()
    rows = images.train[:IMAGES].astype(np.float32) / np.float32(255)
    classes, order = images.train_classes[:IMAGES].astype(np.int32), np.random.default_rng(4).permutation(IMAGES - 13)
    net = MLXKernelNet(arrays, spec, Feed(BATCH), rows, classes)  # the last batch has 3 rows: MLX passes them otherwise
    twin = Twin(spec, drawn(spec, 1))
    order = order[: 7 * BATCH + 3]
    twin.epoch(rows, classes, order, BATCH)
    net.load(drawn(spec, 1))
    mlx_metal.launched.clear()
    arrays.wait(net.epoch(order))
    assert distance(net.weights(), twin.weights) < 1e-5
    assert mlx_metal.launched.total() == 9 * 8  # MLX gathers the rows
    loss, gradients = net.gradients(net.put(rows[:33]), net.put(classes[:33]))
    value, wanted = Twin(spec, net.weights()).gradients(rows[:33], classes[:33])
    assert float(arrays.get(loss)) == pytest.approx(value, rel=1e-6)
    assert distance({n: arrays.get(g) for n, g in gradients.items()}, wanted) < 1e-5
    np.testing.assert_allclose(arrays.get(net.infer(net.put(rows[:50]))), twin.logits(rows[:50]), atol=1e-4)
    for other, words in ((MLPSpec((784, 7, 10)), "widths below 8"), (LMSpec(1, 8, 1, 8, 8), "suite=mlp")):
        with pytest.raises(AbsentError, match=words):
            MLXKernelNet(arrays, other, Feed(BATCH), rows, classes)
