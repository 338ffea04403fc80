"""What is left out on a machine whose GPU does not compute."""

import pytest

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
