"""With PYTORCH_ENABLE_MPS_FALLBACK=1 in the environment: what MPS lacks runs on the CPU and warns."""

from __future__ import annotations

import os
import warnings

import torch

from nanogpt_mac import simulator

assert os.environ["PYTORCH_ENABLE_MPS_FALLBACK"] == "1"
simulator.install()


def run_missing(x: torch.Tensor) -> list[torch.Tensor]:
    return [torch.mode(x)[0], torch.pdist(x), torch.mode(x)[0]]


def test_missing_operators_run_on_the_cpu_and_warn_once() -> None:
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    simulator.reset_counts()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        results = run_missing(x.to("mps"))
    for got, expected in zip(results, run_missing(x), strict=True):
        assert got.device.type == "mps"
        torch.testing.assert_close(got.cpu(), expected)
    assert simulator.operators("fallback") == {"aten::mode": 2, "aten::_pdist_forward": 1}
    assert [str(w.message).split("'")[1] for w in caught] == ["aten::mode"]

    torch.set_warn_always(True)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run_missing(x.to("mps"))
    finally:
        torch.set_warn_always(False)
    assert [str(w.message).split("'")[1] for w in caught] == ["aten::mode", "aten::_pdist_forward", "aten::mode"]


def test_a_fallback_waits_for_the_queue() -> None:
    x = torch.randn(4, 3, device="mps")
    with simulator.plan(us_per_kernel=1000):
        for _ in range(20):
            x = x + 1
        simulator.reset_counts()
        torch.mode(x)
        assert simulator.counts().waits >= 2  # its input to the host, its results back
        torch.mps.synchronize()


def test_the_profiler_sees_the_copies() -> None:
    x = torch.randn(4, 3, device="mps")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profile:
        torch.mode(x)
        torch.sin(x)
    copies = [e for e in profile.events() if e.name == "aten::_to_cpu"]
    assert [e.cpu_parent.name for e in copies] == ["aten::mode"]


def test_what_neither_has_still_raises() -> None:
    """An operator without a CPU kernel either cannot be helped by the variable."""
    import pytest

    x = torch.randn(4, 3, device="mps")
    with pytest.raises((NotImplementedError, RuntimeError)):
        torch.ops.aten._cudnn_ctc_loss(x[None], x.int(), [1], [1], 0, True, False)
