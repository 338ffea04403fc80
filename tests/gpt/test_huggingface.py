"""Hugging Face folders as people have them, each against transformers."""

import copy
import json
import re
import shutil

import numpy as np
import pytest
import safetensors.torch
import torch
from fakes.support import FRAMEWORKS, options

from nanogpt_mac.backends import kinds
from nanogpt_mac.backends.base import Tokens
from nanogpt_mac.errors import InputError
from nanogpt_mac.gpt import pretrained


def rewrite(folder, change, file="model.safetensors"):
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    changed = {name: tensor.contiguous().clone() for name, tensor in change(tensors).items()}
    if file.endswith(".bin"):
        torch.save(changed, folder / file, _use_new_zipfile_serialization=file.startswith("p"))
    else:
        safetensors.torch.save_file(changed, folder / file)  # without metadata


def set_config(folder, gone=(), **values):
    config = json.loads((folder / "config.json").read_text()) | values
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k not in gone}))


def shards(folder, suffix):
    """Two shards and their index, as transformers writes them."""
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    names, where = sorted(tensors), {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"{stem}-{number:05}-of-00002.{suffix}"
        held = {name: tensors[name].clone() for name in part}
        save = safetensors.torch.save_file if suffix == "safetensors" else torch.save
        save(held, folder / file)
        where |= dict.fromkeys(part, file)
    (folder / "model.safetensors").unlink()
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def head_only(tensors):
    embedding = tensors.pop("transformer.wte.weight")
    return tensors | {"lm_head.weight": embedding}


def masks(tensors):
    mask = torch.ones(1, 1, 24, 24).tril()
    return tensors | {"transformer.h.0.attn.bias": mask, "transformer.h.0.attn.masked_bias": torch.tensor(-1e4)}


FOLDERS = {
    "as saved": lambda f: None,
    "base model": lambda f: rewrite(f, lambda t: {n.removeprefix("transformer."): w for n, w in t.items()}),
    "head too": lambda f: rewrite(f, lambda t: t | {"lm_head.weight": t["transformer.wte.weight"]}),
    "head only": lambda f: rewrite(f, head_only),
    "masks": lambda f: rewrite(f, masks),
    "bin": lambda f: rewrite(f, lambda t: t, "pytorch_model.bin"),
    "shards": lambda f: shards(f, "safetensors"),
    "shards of bin": lambda f: shards(f, "bin"),
    "context": lambda f: set_config(f, gone=["n_positions"], n_ctx=24),
    "bare config": lambda f: set_config(f, gone=["model_type", "activation_function", "layer_norm_epsilon", "n_inner"]),
    "float16": lambda f: (rewrite(f, lambda t: {n: w.half() for n, w in t.items()}), set_config(f, dtype="float16")),
    "bfloat16": lambda f: rewrite(f, lambda t: {n: w.bfloat16() for n, w in t.items()}),
    "other head's name": lambda f: set_config(f, architectures=["GPT2DoubleHeadsModel"]),
}


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 24, "vocab_size": 50}
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**sizes, initializer_range=0.3)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_((p + 0.05 * torch.randn_like(p)).half())  # so that float16 holds them exactly
    folder = tmp_path_factory.mktemp("gpt2") / "hf"
    model.save_pretrained(folder)
    return model, folder


@pytest.mark.parametrize("kind", FOLDERS)
@pytest.mark.parametrize("name", FRAMEWORKS)
def test_every_kind_of_folder_computes_what_transformers_computes(gpt2, tmp_path, kind, name):
    model, source = gpt2
    folder = shutil.copytree(source, tmp_path / "hf")
    FOLDERS[kind](folder)
    loaded = pretrained.load(str(folder), dropout=0.0)
    if kind == "bfloat16":
        model = copy.deepcopy(model).bfloat16().float()
    backend = kinds.create(loaded.spec, options(name), Tokens(block_size=24))
    backend.restore(loaded.state)
    idx = np.random.default_rng(0).integers(0, 50, (2, 24))
    with torch.no_grad():
        expected = model(torch.from_numpy(idx)).logits.numpy()
    np.testing.assert_allclose(backend.logits(idx), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        (
            lambda f: rewrite(f, lambda t: t | {"multiple_choice_head.summary.bias": torch.ones(1)}),
            "multiple_choice_head",
        ),
        (
            lambda f: rewrite(f, lambda t: t | {"lm_head.weight": t["transformer.wte.weight"] + 1}),
            "use .* head is tied",
        ),
        (lambda f: (f / "model.safetensors").unlink(), "it has neither model.safetensors nor pytorch_model.bin"),
        (lambda f: (shards(f, "bin"), (f / "pytorch_model-00002-of-00002.bin").unlink()), "lacks pytorch_model-00002"),
        (lambda f: (f / "model.safetensors").replace(f / "model.safetensors.index.json"), "damaged"),
        (lambda f: set_config(f, n_layer="two"), "n_layer=two; use a whole number"),
        (lambda f: set_config(f, n_layer=3), r"lacks transformer\.h\.2"),
        (lambda f: (f / "tokenizer.json").write_text("{"), "not a GPT-2 folder that can be read"),
    ],
)
def test_a_folder_that_does_not_hold_this_model_is_one_line(gpt2, tmp_path, damage, line):
    folder = shutil.copytree(gpt2[1], tmp_path / "hf")
    damage(folder)
    with pytest.raises(InputError, match=f"^run={re.escape(str(folder))}: .*{line}") as raised:
        pretrained.load(str(folder), 0.0, "run")
    assert "\n" not in str(raised.value)


def test_an_index_cannot_name_files_elsewhere(gpt2, tmp_path):
    folder = shutil.copytree(gpt2[1], tmp_path / "hf")
    (folder / "model.safetensors").replace(tmp_path / "model.safetensors")
    index = {"weight_map": {"transformer.wte.weight": "../model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"lacks \.\./model\.safetensors"):
        pretrained.load(str(folder), 0.0)
