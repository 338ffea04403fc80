"""GPT-2 from Hugging Face against transformers itself; nanoGPT's ckpt.pt against a dictionary saved as nanoGPT does."""

import json

import numpy as np
import pytest
import torch
from fakes.support import FRAMEWORKS, options

from nanogpt_mac.backends import kinds
from nanogpt_mac.backends.base import Tokens
from nanogpt_mac.errors import InputError
from nanogpt_mac.gpt import pretrained
from nanogpt_mac.gpt.spec import GPTSpec, TrainState


@pytest.fixture
def huggingface(tmp_path):
    """A tiny random GPT2LMHeadModel saved to disk, weights large enough that GELUs differ."""

    def build(**config):
        from transformers import GPT2Config, GPT2LMHeadModel

        sizes = {"n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 24, "vocab_size": 50}
        torch.manual_seed(0)
        model = GPT2LMHeadModel(GPT2Config(**sizes | {"initializer_range": 0.3} | config)).eval()
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.05 * torch.randn_like(p))  # biases and norms too, which start as constants
        model.save_pretrained(tmp_path / "hf")
        return model, tmp_path / "hf"

    return build


@pytest.mark.parametrize("activation", ["gelu_new", "gelu"])
@pytest.mark.parametrize("name", FRAMEWORKS)
def test_gpt2_weights_compute_what_transformers_computes(huggingface, name, activation):
    reference, folder = huggingface(activation_function=activation)
    loaded = pretrained.load(str(folder), dropout=0.0)
    backend = kinds.create(loaded.spec, options(name), Tokens(block_size=24))
    backend.restore(loaded.state)
    idx = np.random.default_rng(0).integers(0, 50, (3, 24))
    with torch.no_grad():
        expected = reference(torch.from_numpy(idx)).logits.numpy()
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(backend.logits(idx), expected, atol=1e-4)


def test_crop_keeps_the_first_positions(huggingface):
    reference, folder = huggingface()
    loaded = pretrained.load(str(folder), dropout=0.0).crop(8)
    backend = kinds.create(loaded.spec, options("cpu"), Tokens(block_size=8))
    backend.restore(loaded.state)
    idx = np.random.default_rng(0).integers(0, 50, (3, 8))
    with torch.no_grad():
        expected = reference(torch.from_numpy(idx)).logits.numpy()
    np.testing.assert_allclose(backend.logits(idx), expected, atol=1e-4)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("activation_function", "relu"),
        ("layer_norm_epsilon", 1e-6),
        ("n_inner", 17),
        ("scale_attn_by_inverse_layer_idx", True),
        ("tie_word_embeddings", False),
        ("model_type", "llama"),
    ],
)
def test_a_gpt2_that_is_not_ours_is_refused(huggingface, key, value):
    _, folder = huggingface()
    config = json.loads((folder / "config.json").read_text()) | {key: value}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=f"{key}={value}; use a checkpoint with "):
        pretrained.load(str(folder), dropout=0.0)


def test_a_cut_file_is_refused(huggingface):
    _, folder = huggingface()
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match="not a GPT-2 folder that can be read"):
        pretrained.load(str(folder), dropout=0.0)


def test_an_unreachable_hub_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InputError, match="init_from=gpt2: cannot be downloaded from the Hugging Face Hub") as raised:
        pretrained.load("gpt2", dropout=0.0)
    assert "\n" not in str(raised.value)


def nanogpt_checkpoint(spec):
    """What nanoGPT's train.py saves after a few steps, built with torch's own AdamW and nanoGPT's grouping."""
    from nanogpt_mac.gpt.torch_gpt import GPT

    model = GPT(spec)
    model.load_state_dict({n: torch.from_numpy(w) for n, w in spec.init_weights(3).items()})
    decay = [p for p in model.parameters() if p.dim() >= 2]
    rest = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.99))
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        idx = torch.randint(0, spec.vocab_size, (2, spec.block_size), generator=generator)
        model.loss(idx, idx.roll(-1, 1)).backward()
        optimizer.step()
        optimizer.zero_grad()
    state = {f"_orig_mod.{n}": t for n, t in model.state_dict().items()}
    state["_orig_mod.lm_head.weight"] = state["_orig_mod.transformer.wte.weight"]
    args = {k: getattr(spec, k) for k in ("n_layer", "n_head", "n_embd", "block_size", "vocab_size", "bias")}
    return (
        model,
        optimizer,
        {
            "model": state,
            "optimizer": optimizer.state_dict(),
            "model_args": args | {"dropout": 0.0},
            "iter_num": 4,
            "best_val_loss": torch.tensor(2.5),
            "config": {"dataset": "shakespeare_char"},
        },
    )


@pytest.mark.parametrize("bias", [False, True])
def test_nanogpt_checkpoint_comes_with_moments_and_goes_on_as_torch_would(tmp_path, bias):
    spec = GPTSpec(2, 2, 16, 8, 11, bias=bias)
    model, optimizer, saved = nanogpt_checkpoint(spec)
    torch.save(saved, tmp_path / "ckpt.pt")
    loaded = pretrained.load(str(tmp_path / "ckpt.pt"), dropout=0.0)
    assert (loaded.spec, loaded.trained, loaded.dataset) == (spec, True, "shakespeare_char")
    assert (loaded.state.iteration, loaded.state.optimizer_steps, loaded.best) == (4, 4, 2.5)

    data = np.random.default_rng(0).integers(0, 11, 100).astype(np.uint16)
    backend = kinds.create(spec, options("cpu", grad_clip=0.0), Tokens({"train": data}, 8))
    backend.restore(loaded.state)
    windows = np.array([[5, 40]])
    backend.wait(backend.step(windows, 1e-3))
    rows = torch.from_numpy(data[windows[0][:, None] + np.arange(9)].astype(np.int64))
    model.loss(rows[:, :-1], rows[:, 1:]).backward()
    optimizer.step()
    ours = backend.state()
    for name, p in model.named_parameters():
        np.testing.assert_allclose(ours.weights[name], p.detach().numpy(), atol=1e-7)
        np.testing.assert_allclose(ours.exp_avg[name], optimizer.state[p]["exp_avg"].numpy(), atol=1e-7)


class Evil:
    def __reduce__(self):
        return (print, ("this code must not run",))


@pytest.mark.parametrize("content", ["pickle", "cut", "text", "other"])
def test_a_checkpoint_that_is_none_is_refused_and_never_run(tmp_path, capsys, content):
    path = tmp_path / "ckpt.pt"
    spec = GPTSpec(1, 1, 8, 4, 5)
    if content == "pickle":
        torch.save({"model": Evil()}, path)
    elif content == "cut":
        torch.save(nanogpt_checkpoint(spec)[2], path)
        path.write_bytes(path.read_bytes()[:-900])
    elif content == "text":
        path.write_text("hello")
    else:
        torch.save({"weights": torch.zeros(3)}, path)
    with pytest.raises(InputError, match=r"init_from=.*ckpt\.pt") as raised:
        pretrained.load(str(path), dropout=0.0)
    assert "\n" not in str(raised.value)
    assert "must not run" not in capsys.readouterr().out


def test_optimizer_of_another_model_is_refused(tmp_path):
    _, _, saved = nanogpt_checkpoint(GPTSpec(1, 1, 8, 4, 5))
    del saved["optimizer"]["state"][0]
    torch.save(saved, tmp_path / "ckpt.pt")
    with pytest.raises(InputError, match="optimizer has"):
        pretrained.load(str(tmp_path / "ckpt.pt"), dropout=0.0)


@pytest.mark.parametrize(
    "damage",
    [
        lambda s: s["optimizer"]["state"][1].pop("exp_avg"),
        lambda s: s.update(iter_num="abc"),
        lambda s: s.update(iter_num=-5),
        lambda s: s.update(best_val_loss=None),
        lambda s: s["model"].update({"transformer.h.7.ln_1.weight": torch.ones(8)}),
        lambda s: s["model"].update({"_orig_mod.transformer.ln_f.weight": "ones"}),
        lambda s: s["model"].update({"_orig_mod.lm_head.weight": torch.zeros(5, 8)}),
        lambda s: s["model_args"].pop("n_head"),
    ],
)
def test_a_checkpoint_with_one_wrong_value_is_one_line(tmp_path, damage):
    _, _, saved = nanogpt_checkpoint(GPTSpec(1, 1, 8, 4, 5))
    damage(saved)
    torch.save(saved, tmp_path / "ckpt.pt")
    with pytest.raises(InputError, match=r"ckpt\.pt") as raised:
        pretrained.load(str(tmp_path / "ckpt.pt"), dropout=0.0)
    assert "\n" not in str(raised.value)


def test_a_config_that_is_no_object_is_one_line(huggingface):
    _, folder = huggingface()
    (folder / "config.json").write_text("[]")
    with pytest.raises(InputError, match="damaged"):
        pretrained.load(str(folder), dropout=0.0)


def test_weights_without_an_optimizer_start_afresh(tmp_path):
    _, _, saved = nanogpt_checkpoint(GPTSpec(1, 1, 8, 4, 5))
    torch.save({k: saved[k] for k in ("model", "model_args")}, tmp_path / "ckpt.pt")
    loaded = pretrained.load(str(tmp_path / "ckpt.pt"), dropout=0.0)
    assert not loaded.trained
    assert isinstance(loaded.state, TrainState)
    assert loaded.state.iteration == 0
