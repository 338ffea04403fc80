"""A library's words in one of our lines: the reason, never its escape codes nor its advice to its own callers."""

import pickle
from pathlib import Path

import pytest

from nanogpt_mac.errors import cleaned, reason

HYDRA = "Could not load x\n\nSet the environment variable HYDRA_FULL_ERROR=1 for a complete stack trace."


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("one\ntwo\nthree", "one"),
        ("", "ValueError"),
        ("\n \n", "ValueError"),
        ("Please pass a token.", "ValueError"),
        (
            "Weights only load failed. This file can still be loaded, to do so you have two options, \x1b[1mdo those "
            "steps only if you trust the source of the checkpoint\x1b[0m. \n\t(1) In PyTorch 2.6, we changed",
            "Weights only load failed",
        ),
        ("api_key not configured (no-tty). call wandb.login(key=[your_api_key])", "api_key not configured (no-tty)"),
        (
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 1 GiB free. If reserved but unallocated memory "
            "is large try setting PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True.",
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 1 GiB free",
        ),
        ("'inductor' raised:\nException: no g++\n\nSet TORCHDYNAMO_VERBOSE=1", "'inductor' raised: Exception: no g++"),
        (HYDRA, "Could not load x"),
        ("\x1b[31mred\x1b[0m", "red"),
        ("seti is a word. used too", "seti is a word. used too"),
        ("x" * 400, "x" * 297 + "..."),
    ],
)  # fmt: skip
def test_the_reason_is_kept_and_the_advice_is_not(text, kept):
    assert reason(ValueError(text)) == kept


def test_advice_inside_longer_words_goes_as_well():
    assert cleaned(HYDRA.replace("load x", "load x.")) == "Could not load x"


def test_torchs_own_words_today(tmp_path):
    import torch

    path = tmp_path / "x.pt"
    torch.save({"a": Path("x")}, path)
    with pytest.raises(pickle.UnpicklingError) as error:
        torch.load(path, weights_only=True)
    assert "\x1b" in str(error.value)  # what makes this test worth having
    assert "option" in str(error.value)
    words = reason(error.value)
    assert words.startswith("Weights only load failed")
    assert not {"\x1b", "option", "trust"} & set(words.replace(".", "").split())
