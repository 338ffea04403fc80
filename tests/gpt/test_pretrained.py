"""GPT-2 from Hugging Face against transformers itself; nanoGPT's ckpt.pt against a dictionary saved as nanoGPT does."""

import copy
import fractions
import json
import re

import numpy as np
import pytest
import torch
from fakes.nanogpt_files import trained
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
    loaded = pretrained.load(str(folder), dropout=0.0)
    spec, state = pretrained.crop(loaded.spec, loaded.state, 8)
    spec.check(state.exp_avg, "moments")
    backend = kinds.create(spec, options("cpu"), Tokens(block_size=8))
    backend.restore(state)
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
    assert (loaded.spec, loaded.trained, loaded.encoder) == (spec, True, None)
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


@pytest.mark.parametrize(
    "damage",
    [
        lambda o: o["state"].pop(0),
        lambda o: o["state"][1].pop("exp_avg"),
        lambda o: o["state"][1].update(step=2),
        lambda o: o["state"][1].update(exp_avg=torch.full((4, 8), torch.nan)),
        lambda o: o["param_groups"].pop(),
        lambda o: o["param_groups"].reverse(),
        lambda o: o.pop("param_groups"),
        lambda o: o.update(state=[]),
    ],
)
def test_moments_that_do_not_fit_leave_the_weights_and_a_line(tmp_path, damage):
    model, _, saved = nanogpt_checkpoint(GPTSpec(1, 1, 8, 4, 5))
    damage(saved["optimizer"])
    torch.save(saved, tmp_path / "ckpt.pt")
    loaded = pretrained.load(str(tmp_path / "ckpt.pt"), dropout=0.0)
    assert (loaded.trained, loaded.state.iteration, loaded.state.optimizer_steps) == (False, 0, 0)
    assert not any(array.any() for array in loaded.state.exp_avg.values())
    for name, p in model.named_parameters():
        np.testing.assert_array_equal(loaded.state.weights[name], p.detach().numpy())
    (note,) = loaded.notes
    assert re.fullmatch(r"init_from=.*ckpt\.pt: its optimizer's moments do not fit \(.*\); .* at iteration 0", note)


@pytest.mark.parametrize(
    "damage",
    [
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


WRAPPERS = ["_orig_mod.", "module.", "_orig_mod.module.", "module._orig_mod.", "model.", "model._orig_mod.module."]


@pytest.fixture(scope="module")
def sound():
    """A checkpoint after four iterations."""
    return trained("to be or not to be, that is the question " * 20, 4)


def read(tmp_path, saved, **options):
    torch.save(saved, tmp_path / "ckpt.pt", **options)
    return pretrained.load(str(tmp_path / "ckpt.pt"), dropout=0.0)


def same(loaded, saved):
    for name, array in loaded.state.weights.items():
        np.testing.assert_array_equal(array, saved["model"][name].float().numpy())
    return True


@pytest.mark.parametrize(
    "rename",
    [
        *(lambda name, wrapper=wrapper: wrapper + name for wrapper in WRAPPERS),
        lambda name: name.removeprefix("transformer."),
        lambda name: name.replace("h.0.", "h.0._orig_mod."),
        lambda name: f"_fsdp_wrapped_module.{name.replace('h.0.', 'h.0._checkpoint_wrapped_module.')}",
    ],
)
def test_wrappers_leave_no_trace(tmp_path, sound, rename):
    loaded = read(tmp_path, sound | {"model": {rename(name): tensor for name, tensor in sound["model"].items()}})
    assert loaded.trained
    assert same(loaded, sound)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floats_become_float32(tmp_path, sound, dtype):
    saved = sound | {"model": {name: tensor.to(dtype) for name, tensor in sound["model"].items()}}
    assert same(read(tmp_path, saved), saved)


@pytest.mark.parametrize("gone", ["lm_head.weight", "transformer.wte.weight"])
def test_either_of_the_tied_tensors_is_enough(tmp_path, sound, gone):
    loaded = read(tmp_path, sound | {"model": {n: t for n, t in sound["model"].items() if n != gone}})
    assert same(loaded, sound)


@pytest.mark.parametrize(
    "change",
    [
        {"best_val_loss": np.float64(2.5), "iter_num": np.int64(4)},
        {"best_val_loss": np.float32(2.5), "iter_num": torch.tensor(4)},
        {"scaler": {"scale": 65536.0}, "rng": torch.get_rng_state(), "git": "abc", "config": None},
    ],
)
def test_metadata_of_any_kind_does_no_harm(tmp_path, sound, change):
    loaded = read(tmp_path, sound | change)
    assert (loaded.state.iteration, loaded.best, loaded.trained) == (4, 2.5, True)


def test_steps_may_be_whole_numbers(tmp_path, sound):
    optimizer = copy.deepcopy(sound["optimizer"])
    for entry in optimizer["state"].values():
        entry["step"] = int(entry["step"])
    assert read(tmp_path, sound | {"optimizer": optimizer}).state.optimizer_steps == 4


def test_numpys_scalars_are_read_under_numpy_1s_name(tmp_path, sound):
    torch.save(sound | {"best_val_loss": np.float64(2.5)}, tmp_path / "new.pt", _use_new_zipfile_serialization=False)
    data = (tmp_path / "new.pt").read_bytes()
    assert b"numpy._core.multiarray" in data
    (tmp_path / "old.pt").write_bytes(data.replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    assert pretrained.load(str(tmp_path / "old.pt"), dropout=0.0).best == 2.5


def test_other_objects_in_a_checkpoint_are_named_and_not_made(tmp_path, sound):
    with pytest.raises(InputError, match=r"it calls fractions\.Fraction$"):
        read(tmp_path, sound | {"config": fractions.Fraction(1)})


def test_torchs_old_format_and_a_folder_with_a_checkpoint_are_read(tmp_path, sound):
    assert same(read(tmp_path, sound, _use_new_zipfile_serialization=False), sound)
    assert same(pretrained.load(str(tmp_path), dropout=0.0), sound)
    assert pretrained.is_pretrained(str(tmp_path))


def test_what_an_older_checkpoint_does_not_say_is_seen_in_its_weights(tmp_path):
    saved = trained("to be or not to be " * 20, 2, bias=True)
    for key in ("bias", "dropout", "vocab_size"):
        del saved["model_args"][key]
    loaded = read(tmp_path, saved)
    assert (loaded.spec.bias, loaded.spec.vocab_size) == (True, 7)
    saved["config"] = saved.pop("model_args")
    assert read(tmp_path, saved).spec == loaded.spec


@pytest.mark.parametrize("bias", [False, True])
def test_moments_in_the_order_of_their_names_are_the_same_moments(tmp_path, bias):
    """As nanoGPT numbered them until 2023; with eleven layers h.10 comes before h.2."""
    text, sizes = "to be or not to be " * 20, {"n_layer": 11, "n_embd": 8, "bias": bias}
    now, old = (read(tmp_path, trained(text, 2, by_name=by_name, **sizes)) for by_name in (False, True))
    assert old.trained
    for name, array in now.state.exp_avg_sq.items():
        np.testing.assert_allclose(old.state.exp_avg_sq[name], array, rtol=1e-4, atol=1e-12)
        np.testing.assert_allclose(old.state.exp_avg[name], now.state.exp_avg[name], rtol=1e-4, atol=1e-8)


def renumbered(saved, groups):
    """The same moments, as an optimizer with these groups of names would have saved them."""
    shapes = GPTSpec(**saved["model_args"]).shapes()
    order = [n for n in shapes if len(shapes[n]) >= 2] + [n for n in shapes if len(shapes[n]) < 2]
    entries = {name: saved["optimizer"]["state"][number] for number, name in enumerate(order)}
    ids = {name: number for number, name in enumerate(name for group in groups for name in group)}
    state = {ids[name]: entry for name, entry in entries.items()}
    return {"state": state, "param_groups": [{"params": [ids[name] for name in group]} for group in groups]}


def test_moments_of_the_first_versions_whose_embeddings_do_not_decay(tmp_path, sound):
    names = sorted(GPTSpec(**sound["model_args"]).shapes())
    decay = [n for n in names if ".c_" in n]
    optimizer = renumbered(sound, [decay, [n for n in names if n not in decay]])
    loaded, expected = read(tmp_path, sound | {"optimizer": optimizer}), read(tmp_path, sound)
    assert loaded.trained
    for name, array in expected.state.exp_avg.items():
        np.testing.assert_array_equal(loaded.state.exp_avg[name], array)


def test_names_in_the_optimizer_decide_and_no_known_order_loads_the_weights_alone(tmp_path, sound):
    groups = [list(reversed(GPTSpec(**sound["model_args"]).shapes()))]
    optimizer = renumbered(sound, groups)
    assert read(tmp_path, sound | {"optimizer": optimizer}).notes
    optimizer["param_groups"][0]["param_names"] = [f"module.{name}" for name in groups[0]]
    loaded, expected = read(tmp_path, sound | {"optimizer": optimizer}), read(tmp_path, sound)
    for name, array in expected.state.exp_avg.items():
        np.testing.assert_array_equal(loaded.state.exp_avg[name], array)


MASK = torch.ones(1, 1, 16, 16).tril()


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("h.0.attn.bias", MASK),
        ("h.0.attn.bias", MASK.bool()),
        ("h.0.attn.bias", torch.ones(40, 40, dtype=torch.uint8).tril()),
        ("h.0.attn.masked_bias", torch.tensor(-1e4)),
        ("h.0.attn.masked_bias", torch.tensor(-torch.inf, dtype=torch.float16)),
        ("position_ids", torch.arange(16)[None]),
        ("module.wte.weight", None),
    ],
)
def test_what_says_nothing_new_is_left_out(tmp_path, sound, name, tensor):
    tensor = sound["model"]["transformer.wte.weight"].clone() if tensor is None else tensor
    assert same(read(tmp_path, sound | {"model": sound["model"] | {f"transformer.{name}": tensor}}), sound)


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("transformer.h.0.attn.bias", torch.ones(1, 1, 16, 16)),
        ("transformer.h.0.attn.bias", MASK.triu()),
        ("transformer.h.0.attn.bias", MASK[..., :8, :8]),
        ("transformer.h.0.attn.bias", MASK.bool() & (torch.arange(16) > 2)),
        ("transformer.h.0.attn.masked_bias", torch.tensor(-1.0)),
        ("transformer.h.0.attn.rotary.inv_freq", torch.ones(4)),
        ("transformer.position_ids", torch.arange(16).flip(0)),
        ("multiple_choice_head.summary.weight", torch.ones(1, 16)),
        ("score.weight", torch.ones(2, 16)),
        ("lm_head.bias", torch.zeros(13)),
        ("module.transformer.ln_f.weight", torch.zeros(16)),
    ],
)
def test_what_says_more_is_named_and_refused(tmp_path, sound, name, tensor):
    with pytest.raises(InputError, match=r"^init_from=.*ckpt\.pt: .*" + re.escape(name)):
        read(tmp_path, sound | {"model": sound["model"] | {name: tensor}})
