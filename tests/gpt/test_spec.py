import dataclasses

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from nanogpt_mac.errors import InputError
from nanogpt_mac.gpt.spec import GPTSpec, ModelConfig, TrainState
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


def test_the_default_model_is_nanogpts_shakespeare_char():
    """config/train_shakespeare_char.py of nanoGPT."""
    sizes = {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256}
    assert dataclasses.asdict(ModelConfig()) == sizes | {
        "dropout": 0.2,
        "bias": False,
        "gelu": "exact",
        "vocab_size": None,
    }


def test_the_smallest_model_is_one_of_everything():
    assert GPTSpec(1, 1, 1, 1, 1).n_params() == 1 + 3 + 4 + 1 + 4 + 3  # wte, c_attn, c_fc and c_proj's, norms
    with pytest.raises(InputError, match=r"model\.dropout=-0\.5"):
        GPTSpec(1, 1, 1, 1, 1, dropout=-0.5)


def test_biases_start_at_zero_and_norms_at_one():
    weights = SPECS[2].init_weights(0)
    for name, array in weights.items():
        if array.ndim == 1:
            assert (array == (0 if name.endswith("bias") else 1)).all(), name


def test_matmul_shapes_are_those_of_the_linear_layers():
    """Against the module's own layers on the meta device: (rows, inputs) times (inputs, outputs), four kinds."""
    seen = set()
    with torch.device("meta"):
        model = GPT(SHAKESPEARE)
    for layer in model.modules():
        if isinstance(layer, torch.nn.Linear):
            seen.add((layer.in_features, layer.out_features))
    seen.add((384, 65))  # the head, which shares the embedding's weights
    assert len(seen) == 5  # c_proj of attention is a fifth; the smallest, and left out
    assert SHAKESPEARE.matmul_shapes(3) == [(768, 384, 1152), (768, 384, 1536), (768, 1536, 384), (768, 384, 65)]
    assert {(k, n) for _, k, n in SHAKESPEARE.matmul_shapes(3)} == seen - {(384, 384)}
    assert isinstance(SHAKESPEARE.flops_per_token(), int)


def test_a_fresh_state_has_moments_of_its_own_and_torchs_loss_scale():
    weights = SPECS[1].init_weights(0)
    state = TrainState.fresh(weights)
    assert state.weights is weights
    assert (state.iteration, state.optimizer_steps, state.scale_growth) == (0, 0, 0)
    assert state.loss_scale == torch.amp.GradScaler("cpu").get_scale() == 65536.0
    for name, w in weights.items():
        for moment in (state.exp_avg[name], state.exp_avg_sq[name]):
            assert moment.shape == w.shape
            assert not moment.any()
        assert state.exp_avg[name] is not state.exp_avg_sq[name]
