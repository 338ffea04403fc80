"""What a back end says of itself before it computes: its device, when its levers matter."""

from types import SimpleNamespace

import pytest

from nanogpt_mac import simulator
from nanogpt_mac.backends import torch_choices
from nanogpt_mac.backends.base import Backend, Kind
from nanogpt_mac.backends.kinds import KINDS
from nanogpt_mac.backends.torch_backend import TorchBackend
from nanogpt_mac.records.capabilities import Capabilities


def test_by_default_it_is_on_the_first_of_its_devices(make):
    kind = Kind("abacus", "beads:Abacus", "Abacus", "beads", tuple(map(Capabilities, ("wood", "brass", "bone"))))
    assert Backend.device_of(kind) == "wood"
    assert kind.compiled_by_default is False
    assert (make("cpu").device_name, make("cpu").runs_ahead) == ("cpu", False)


@pytest.mark.parametrize(("active", "mps"), [(1, simulator.DEVICE_NAME), (0, "mps")])
def test_torchs_device_is_its_kinds_or_simulated(monkeypatch, active, mps):
    monkeypatch.setattr(simulator, "active", lambda: bool(active))
    devices = {name: TorchBackend.device_of(KINDS[name]) for name in ("cpu", "mps", "cuda")}
    assert devices == {"cpu": "cpu", "mps": mps, "cuda": "cuda"}


def test_the_fused_optimizer_is_one_and_its_lever_turns_it_off(make):
    lever = next(lever for lever in TorchBackend.LEVERS if lever.key == "backend.fused_adamw")
    asked = {
        value: lever.when(None, SimpleNamespace(backend=SimpleNamespace(fused_adamw=value))) for value in (None, 1)
    }
    assert asked == {None: True, 1: True}
    for value in (True, False):
        assert lever.when(None, SimpleNamespace(backend=SimpleNamespace(fused_adamw=value))) is value
    backend = make("cpu")
    assert backend.details["fused_adamw"] is backend.optimizer.fused is True


@pytest.mark.parametrize("same", [1, 0])
def test_products_round_where_a_lower_precision_changes_one(monkeypatch, same):
    asked = []
    monkeypatch.setattr("torch.get_float32_matmul_precision", lambda: "highest")
    monkeypatch.setattr("torch.set_float32_matmul_precision", asked.append)
    monkeypatch.setattr("torch.equal", lambda *_: bool(same))
    assert torch_choices.products_round() is not bool(same)
    assert asked == ["medium", "highest"]
