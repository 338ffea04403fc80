"""Ways by kernels of our own in suite=mlp: their names, what is not here, and a run on the simulated devices."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from nanogpt_mac import simulator
from nanogpt_mac.backends.by_hand import metal
from nanogpt_mac.errors import InputError
from nanogpt_mac.records.bench import Way
from nanogpt_mac.suites import mlp
from nanogpt_mac.suites.config import BenchConfig
from nanogpt_mac.suites.nets import by_hand

FOUND = {
    way.name: way
    for way in (
        Way(name="mps", label="MPS eager", backend="mps", device="mps", accelerator=True),
        Way(name="mlx-eager", label="MLX eager", backend="mlx", device="metal", accelerator=True),
        Way(name="mlx", label="MLX compiled", backend="mlx", device="metal", accelerator=True, compiled=True),
        Way(name="mlx-cpu", label="MLX compiled (CPU)", backend="mlx", device="cpu", compiled=True),
    )
}


def asked(*names: str, found: dict[str, Way] = FOUND) -> list[Way]:
    """What these names add."""
    made = by_hand.asked(BenchConfig(suite="mlp", ways=list(names)), dict(found))
    return [way for name, way in made.items() if name not in found]


def test_ways_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metal, "missing", lambda: None)
    monkeypatch.setattr(sys, "platform", "darwin")
    first, second, third, fourth = asked("metal-v1", "mps", "metal-v3-all-queue128", "mps-v2", "mlx-v3")
    assert (first.backend, first.device, first.accelerator, first.simulated) == ("", "metal", True, False)
    assert by_hand.parsed(second.name)[1].depth == 128  # type: ignore[index]
    assert (third.backend, third.label) == ("mps", "torch MPS, our Metal kernels, v2")
    assert (fourth.device, fourth.compiled) == ("metal", True)
    assert asked("mps", "mps-compile", "mlx") == []
    assert by_hand.asked(BenchConfig(suite="mlp"), dict(FOUND)) == FOUND
    assert asked("cuda-v3") == []  # whose back end is not here: ways.py says why
    for name in ("metal-v4", "mlx-v1", "mps-v3-5", "cuda-v9"):
        with pytest.raises(InputError, match=rf"ways=\[{name}\]: .*use "):
            asked(name)


def test_what_is_not_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(simulator.VARIABLE, "0")
    if sys.platform == "linux":
        with pytest.raises(InputError, match=r"ways=\[metal-v1\]: not available here: it needs a Mac"):
            asked("metal-v1")
    on_cpu = {"mlx": FOUND["mlx"].model_copy(update={"device": "cpu"})}
    with pytest.raises(InputError, match=r"ways=\[mlx-v3\]: .* it computes on the CPU here"):
        asked("mlx-v3", found=on_cpu)
    monkeypatch.setattr(by_hand, "find_spec", lambda name: None)
    cuda = {"cuda": Way(name="cuda", label="CUDA", backend="cuda", device="cuda")}
    with pytest.raises(InputError, match=r"ways=\[cuda-v1\]: .*triton is not installed"):
        asked("cuda-v1", found=cuda)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the simulated devices run on Linux only")
def test_on_the_simulated_devices_there_are_values_and_counts(command: Any, tmp_path: Path) -> None:
    row = mlp.MAIN
    given = [
        "suite=mlp",
        "ways=[metal-v2,mps-v3]",
        f"rows={row}",
        "images=1000",
        "rounds=1",
        "run_dir=out",
    ]
    done = command("bench.py", *given, timeout=300, **{simulator.VARIABLE: "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    bench = json.loads((tmp_path / "out" / "bench.json").read_text())
    readings = {reading["way"]: reading for reading in bench["readings"]}
    assert all(reading["state"] == "ok" and reading["distance"] < 1e-5 for reading in readings.values())
    assert readings["metal-v2"]["counts"] == {"launches": 40, "buffers": 4, "waits": 4}
    assert readings["mps-v3"]["counts"]["kernels"] >= 40
    assert not any(reading.get("epochs_s") for reading in readings.values())
    report = (tmp_path / "out" / "report.md").read_text()
    assert "40 launches, 4 buffers, 4 waits" in report
    assert "docs/metal.md" in report
    assert "Speed against" not in report  # nothing was timed
