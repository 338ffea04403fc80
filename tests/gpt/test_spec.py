import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from nanogpt_mac.errors import InputError
from nanogpt_mac.gpt.spec import GPTSpec
from nanogpt_mac.gpt.torch_gpt import GPT

SHAKESPEARE = GPTSpec(6, 6, 384, 256, 65, 0.2)
SPECS = [SHAKESPEARE, GPTSpec(4, 4, 128, 64, 65), GPTSpec(3, 2, 48, 40, 97, bias=True)]


def test_shakespeare_char_has_the_size_that_nanogpt_reports():
    assert round(SHAKESPEARE.n_params() / 1e6, 2) == 10.65
    assert round(SHAKESPEARE.flops_per_token() * 64 * 256 / 1e9, 1) == 1162.6


@pytest.mark.parametrize("spec", SPECS)
def test_names_and_shapes_are_those_of_the_torch_module(spec):
    parameters = {name: tuple(p.shape) for name, p in GPT(spec).named_parameters()}
    assert list(parameters.items()) == list(spec.shapes().items())


@pytest.mark.parametrize("spec", SPECS)
def test_flops_are_what_torch_counts(spec):
    """6 x matmul parameters + 12LHQT exactly; the formula also counts norms and biases, well under 1 %."""
    with torch.device("meta"):
        model, idx = GPT(spec), torch.zeros(2, spec.block_size, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model.loss(idx, idx).backward()
    vectors = sum(shape[0] for shape in spec.shapes().values() if len(shape) == 1)
    assert counter.get_total_flops() == (spec.flops_per_token() - 6 * vectors) * 2 * spec.block_size
    assert 6 * vectors < 0.02 * spec.flops_per_token()


def test_weights_are_drawn_as_nanogpt_draws_them():
    weights = SHAKESPEARE.init_weights(1337)
    SHAKESPEARE.check(weights, "drawn")
    for name, array in weights.items():
        if array.ndim == 1:
            assert (array == 1).all()
        else:
            std = 0.02 / np.sqrt(12) if name.endswith("c_proj.weight") else 0.02
            assert array.std() == pytest.approx(std, rel=0.02)
            assert abs(array.mean()) < 5 * std / np.sqrt(array.size)
    again, other = SHAKESPEARE.init_weights(1337), SHAKESPEARE.init_weights(1338)
    assert all((again[n] == w).all() for n, w in weights.items())
    assert (other["transformer.wte.weight"] != weights["transformer.wte.weight"]).any()


@pytest.mark.parametrize(
    ("sizes", "text"),
    [
        ({"n_embd": 130}, "model.n_embd=130: model.n_head=4 does not divide it; use a multiple of 4"),
        ({"n_layer": 0}, "model.n_layer=0: use at least 1"),
        ({"dropout": 1.0}, "model.dropout=1.0"),
        ({"gelu": "relu"}, "model.gelu=relu: use exact or tanh"),
    ],
)
def test_impossible_sizes_are_named(sizes, text):
    good = {"n_layer": 2, "n_head": 4, "n_embd": 32, "block_size": 8, "vocab_size": 5}
    with pytest.raises(InputError, match=text):
        GPTSpec(**good | sizes)


def test_check_names_the_tensor_that_does_not_fit():
    spec = SPECS[1]
    good = spec.init_weights(0)
    name = "transformer.h.1.mlp.c_fc.weight"
    for bad, text in [
        ({n: a for n, a in good.items() if n != name}, f"lacks {name}"),
        (good | {"zzz": good[name]}, "unknown tensor zzz"),
        (good | {name: good[name].T}, f"{name} is float32"),
        (good | {name: good[name].astype(np.float16)}, f"{name} is float16"),
        (good | {name: good[name] * np.float32("nan")}, f"{name} holds values that are not finite"),
    ]:
        with pytest.raises(InputError, match=text):
            spec.check(bad, "file")
