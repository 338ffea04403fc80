"""The fit of tokens to a model, against models that were trained on these tokens and on others."""

import numpy as np
import pytest
import torch
from fakes.nanogpt_files import trained

from nanogpt_mac.corpus import CharEncoder
from nanogpt_mac.corpus.stand_in import generate
from nanogpt_mac.gpt import fit, pretrained
from nanogpt_mac.gpt.spec import GPTSpec, TrainState

OTHER = str.maketrans("abcdefghijklmnopqrstuvwxyz", "zyxwvutsrqponmlkjihgfedcba")


@pytest.fixture(scope="module")
def text():
    return generate()[:60_000]


@pytest.fixture(scope="module")
def model(text, tmp_path_factory):
    path = tmp_path_factory.mktemp("fit") / "ckpt.pt"
    torch.save(trained(text, 80), path)
    return pretrained.load(str(path), 0.0)


def tokens(text):
    return CharEncoder.of(text).array(text)


def test_the_text_fits_and_no_other_with_as_many_symbols(model, text):
    symbols = len(set(text))
    assert fit.measure(model.spec, model.state, tokens(text), symbols).share > 0.98
    assert fit.measure(model.spec, model.state, tokens(text[30_000:]), symbols).share > 0.98
    for other, most in ((text.translate(OTHER), 0.9), (text.swapcase(), 0.5), (text.replace("q", "ñ"), 0.97)):
        assert len(set(other)) == symbols
        assert fit.measure(model.spec, model.state, tokens(other), symbols).share < most


def test_the_loss_is_the_models_own(model, text):
    found = fit.measure(model.spec, model.state, tokens(text), len(set(text)))
    windows = np.lib.stride_tricks.sliding_window_view(tokens(text), 17)[::50].astype(np.int64)
    from nanogpt_mac.gpt.torch_gpt import GPT

    twin = GPT(model.spec)
    twin.load_state_dict({name: torch.from_numpy(array) for name, array in model.state.weights.items()})
    with torch.no_grad():
        expected = float(twin.loss(torch.from_numpy(windows[:, :-1]), torch.from_numpy(windows[:, 1:])))
    assert found.loss == pytest.approx(expected, abs=0.05)


def test_numbers_without_a_symbol_are_padding_only_where_they_are_never_predicted(text):
    padded = GPTSpec(1, 2, 16, 16, len(set(text)) + 8)
    state = TrainState.fresh(padded.init_weights(3))
    assert fit.measure(padded, state, tokens(text), len(set(text))).beyond == pytest.approx(1, abs=0.1)
    assert fit.measure(padded, state, tokens(text), padded.vocab_size).beyond == 0


def test_untrained_is_what_was_drawn(model):
    spec = GPTSpec(1, 2, 16, 16, 65, bias=True)
    state = TrainState.fresh(spec.init_weights(1))
    assert fit.is_untrained(state)
    state.weights["transformer.ln_f.bias"][0] = 1e-3
    assert not fit.is_untrained(state)
    assert not fit.is_untrained(model.state)
