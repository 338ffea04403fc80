"""The probe of a Mac's GPU: what it takes for a GPU that computes."""

import sys

import pytest

from tools import mac_gpu


def test_a_probe_that_passes_has_no_failure():
    assert mac_gpu.failure("assert 1 + 1 == 2") is None


@pytest.mark.parametrize(
    ("program", "line"),
    [
        ("import sys; print('a'); sys.exit('no memory')", "no memory"),
        ("assert False, 'a matrix product is wrong'", "AssertionError: a matrix product is wrong"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "ended with exit code -9"),
    ],
)
def test_a_failure_is_one_line(program, line):
    assert mac_gpu.failure(program) == line


def test_a_gpu_that_hangs_does_not_compute():
    assert mac_gpu.failure("import time; time.sleep(60)", timeout_s=0.5) == "no answer within 0.5 s"


def test_both_must_compute(monkeypatch, capsys):
    monkeypatch.setattr(mac_gpu, "PROBES", {"torch MPS": "pass", "MLX": "raise SystemExit('zeros')"})
    assert mac_gpu.main() == 1
    assert capsys.readouterr().out == "torch MPS: computes\nMLX: zeros\n"
    monkeypatch.setattr(mac_gpu, "PROBES", {"torch MPS": "pass", "MLX": "pass"})
    assert mac_gpu.main() == 0


@pytest.mark.skipif(sys.platform != "linux", reason="the simulated MPS device runs on Linux only")
def test_torchs_probe_passes_where_mps_computes():
    simulated = "import os; os.environ['NANOGPT_MAC_SIMULATE_MPS'] = '1'\n"
    simulated += "from nanogpt_mac import simulator; simulator.install_if_asked()\n"
    assert mac_gpu.failure(simulated + mac_gpu.TORCH) is None
    wrong = mac_gpu.TORCH.replace("x[i] * 2.0f", "0.0f")
    assert mac_gpu.failure(simulated + wrong) == "AssertionError: a Metal kernel is wrong"
