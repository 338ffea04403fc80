"""Without PYTORCH_ENABLE_MPS_FALLBACK: what MPS lacks is refused with torch's own text."""

from __future__ import annotations

import re
import warnings

import pytest
import torch

from nanogpt_mac import simulator

simulator.install()

TEXT = (
    r"^The operator 'aten::{}' is not currently implemented for the MPS device\. If you want this op to be considered "
    r"for addition please comment on https://github.com/pytorch/pytorch/issues/141287 and mention use-case, that "
    r"resulted in missing op as well as commit hash [0-9a-f]{{40}}\. As a temporary fix, you can set the environment "
    r"variable `PYTORCH_ENABLE_MPS_FALLBACK=1` to use the CPU as a fallback for this op\. WARNING: this will be slower "
    r"than running natively on MPS\."
)


@pytest.mark.parametrize(
    ("operator", "call"),
    [
        ("linalg_eig", torch.linalg.eig),
        ("geqrf", torch.geqrf),
        ("mode", torch.mode),
        ("_pdist_forward", torch.pdist),
        # a structured operator: its functional form is composed from the out form, which is the one that is missing
        ("adaptive_max_pool3d.out", lambda x: torch.nn.functional.adaptive_max_pool3d(x[None, None, None], (1, 1, 1))),
    ],
)
def test_missing_operators_raise(operator: str, call) -> None:
    if operator not in simulator.table().missing:
        pytest.skip(f"torch {torch.__version__} has {operator} on MPS")
    x = torch.randn(3, 3, device="mps")
    simulator.reset_counts()
    with pytest.raises(NotImplementedError, match=TEXT.format(operator)):
        call(x)
    assert simulator.operators("refused") == {f"aten::{operator}": 1}


def test_hand_registered_fallbacks_run_and_warn_once_for_all() -> None:
    hand = simulator.table().fallback
    assert "embedding_renorm_" in hand
    x = torch.tensor([[3.0, 4.0], [0.3, 0.4]], device="mps")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            torch.embedding_renorm_(x, torch.tensor([0, 1], device="mps"), 1.0, 2.0)
        if "linalg_svd" in hand:
            torch.linalg.svd(x)
    assert x.device.type == "mps"
    torch.testing.assert_close(x.cpu(), torch.tensor([[0.6, 0.8], [0.3, 0.4]]), rtol=1e-5, atol=1e-5)
    assert len(caught) == 1
    text = str(caught[0].message)
    assert text.startswith(
        "The operator 'aten::embedding_renorm_' is not currently supported on the MPS backend and will fall back to "
        "run on the CPU. This may have performance implications."
    )
    assert "Triggered internally at" in text
    assert "MPSFallback" in text


def test_the_dispatch_table_reads_as_on_a_mac() -> None:
    def line(name: str) -> str:
        table = torch._C._dispatch_dump_table(f"aten::{name}")
        return next(row for row in table.splitlines() if row.startswith("MPS:"))

    assert re.search(r"RegisterMPS.*\[kernel\]$", line("mm"))
    assert re.search(r"MPSFallback.*\[kernel\]$", line("embedding_renorm_"))
    assert re.search(r"MPSFallback.*\[backend fallback\]$", line("mode"))
    assert line("dropout").endswith("[math kernel]")


def test_the_table_is_the_wheels() -> None:
    table = simulator.table()
    assert not set(table.native) & set(table.missing)
    assert not set(table.fallback) & set(table.missing)
    for name in ("linear", "_fused_adamw_", "native_layer_norm", "gelu", "embedding_dense_backward"):
        assert name in table.native
    if torch.__version__.startswith("2.13."):
        assert (len(table.native), len(table.fallback), len(table.missing)) == (894, 3, 363)
    assert table.variants("gelu") == ["gelu", "gelu.out", "gelu_"]
