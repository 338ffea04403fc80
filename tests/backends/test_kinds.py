"""The registry: what this machine has, what auto takes, what records without capabilities are given."""

import pytest

from nanogpt_mac import ranks
from nanogpt_mac.backends import kinds


def test_a_gpu_that_does_not_compute_is_left_out(monkeypatch):
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert kinds.missing("mps") is None
    monkeypatch.setenv("NANOGPT_MAC_NO_GPU", "1")
    for name in ("mps", "cuda"):
        assert kinds.missing(name) == "NANOGPT_MAC_NO_GPU leaves this machine's GPU out"
    assert kinds.missing("cpu") is kinds.missing("mlx") is None
    monkeypatch.setenv("NANOGPT_MAC_NO_GPU", "0")
    assert kinds.missing("mps") is None


@pytest.mark.parametrize(("value", "devices"), [("1", ["cpu"]), ("0", [])])
def test_mlx_then_computes_on_the_cpu(make, monkeypatch, value, devices):
    import mlx.core as mx

    set_to = []
    monkeypatch.setattr(mx, "set_default_device", lambda device: set_to.append(str(device.type).rpartition(".")[2]))
    monkeypatch.setenv("NANOGPT_MAC_NO_GPU", value)
    make("mlx")
    assert set_to == devices


@pytest.mark.parametrize(
    ("platform", "there", "taken"),
    [
        ("darwin", {"mps", "mlx", "cpu"}, "mlx"),
        ("darwin", {"mps", "cpu"}, "mps"),
        ("linux", {"cuda", "mlx", "cpu"}, "cuda"),
        ("linux", {"mps", "mlx", "cpu"}, "cpu"),  # the simulated device is never taken by itself
    ],
)
def test_auto_takes_the_first_that_is_there(monkeypatch, platform, there, taken):
    monkeypatch.setattr("sys.platform", platform)
    monkeypatch.setattr(kinds, "missing", lambda name: None if name in there else "not there")
    assert kinds.resolve("auto") == taken


def test_under_a_launcher_auto_takes_what_it_starts_several_of(monkeypatch):
    monkeypatch.setattr(kinds, "missing", lambda name: None)
    for platform, launcher, taken in (
        ("linux", ranks.MLX, "mlx"),
        ("linux", ranks.TORCHRUN, "cuda"),
        ("darwin", ranks.MLX, "mlx"),
    ):
        monkeypatch.setattr("sys.platform", platform)
        assert kinds.resolve("auto", launcher) == taken
    monkeypatch.setattr(kinds, "missing", lambda name: None if name in {"mps", "mlx", "cpu"} else "not there")
    assert kinds.resolve("auto", ranks.TORCHRUN) == "mps"


def test_records_without_capabilities_are_given_those_of_their_device():
    """Schema 1 has a back end's name and its device: what reports then concluded from them."""
    facts = {
        ("mps", "mps"): (True, True, False, True),
        ("mps", "simulated-mps"): (False, True, True, True),
        ("cuda", "cuda"): (True, True, False, False),
        ("mlx", "metal"): (True, True, False, False),
        ("mlx", "cpu"): (False, False, False, False),
        ("cpu", "cpu"): (False, False, False, False),
        ("abacus", "beads"): (False, False, False, False),
    }
    for (backend, device), expected in facts.items():
        found = kinds.recorded(backend, device)
        assert found.device == device
        assert (found.accelerator, found.runs_ahead, found.simulated, found.detector) == expected
    assert [kinds.recorded(name, "cuda").framework for name in ("cuda", "mlx")] == ["torch", "mlx"]


def test_a_back_end_has_its_own_settings_and_ignores_the_others():
    given = {"name": "mlx", "blas": "torch", "fused_adamw": False, "compile_mode": "default"}
    assert kinds.own_settings("mlx", given) == {"blas": "torch"}
    assert kinds.own_settings("cpu", given) == {"fused_adamw": False, "compile_mode": "default"}


@pytest.mark.parametrize(
    ("line", "state"),
    [
        ("RuntimeError: [metal::malloc] Unable: Insufficient Memory (00000008)", "oom"),
        ("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes", "oom"),
        ("NotImplementedError: The operator 'aten::x' is not currently implemented for the MPS device.", "missing_op"),
        ("RuntimeError: [metal::load_library] Unable to load kernel steel_attention", "missing_op"),
        ("ValueError: shapes do not match", None),
    ],
)
def test_a_line_of_a_log_says_what_went_wrong(line, state):
    assert [name for name, pattern in kinds.signs().items() if pattern.search(line)] == ([state] if state else [])
