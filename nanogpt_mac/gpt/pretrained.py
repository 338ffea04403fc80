"""Weights trained elsewhere: GPT-2 from Hugging Face, and nanoGPT's own ckpt.pt. Nothing is unpickled."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from nanogpt_mac.errors import InputError, reason
from nanogpt_mac.gpt.spec import GPTSpec, TrainState
from nanogpt_mac.network import NoNetwork, reaching

GPT2 = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
SOURCES = f"scratch, resume, {', '.join(GPT2)}, a folder with config.json and model.safetensors, or a nanoGPT ckpt.pt"
# OpenAI's weights are (inputs, outputs) (Conv1D), ours (outputs, inputs).
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


@dataclass(frozen=True)
class Pretrained:
    spec: GPTSpec
    state: TrainState
    best: float = float("inf")
    dataset: str | None = None  # nanoGPT's name for the data it was trained on; None: text in GPT-2's own vocabulary
    trained: bool = False  # whether it has moments and an iteration, so that training continues

    def crop(self, block_size: int) -> Pretrained:
        """The same model with a shorter context (nanoGPT's crop_block_size)."""
        weights = dict(self.state.weights)
        weights["transformer.wpe.weight"] = weights["transformer.wpe.weight"][:block_size].copy()
        spec = dataclasses.replace(self.spec, block_size=block_size)
        return dataclasses.replace(self, spec=spec, state=TrainState.fresh(weights))


def is_pretrained(source: str) -> bool:
    """Whether `load` reads `source` (and it is not a run or checkpoint of ours)."""
    return source in GPT2 or source.endswith(".pt") or (Path(source) / "model.safetensors").is_file()


def load(source: str, dropout: float) -> Pretrained:
    """Read `source`: a GPT-2 name, a Hugging Face folder, or a nanoGPT checkpoint; InputError for anything else."""
    if source in GPT2:
        return _huggingface(_download(source), dropout)
    path = Path(source)
    try:
        if path.is_dir():
            return _huggingface(path, dropout)
        if path.is_file():
            return _nanogpt(path, dropout)
    except (
        AttributeError,
        KeyError,
        TypeError,
        ValueError,
    ) as error:  # of the wrong kind
        raise InputError(f"init_from={source}: damaged: {type(error).__name__}: {reason(error)}") from error
    raise InputError(f"init_from={source}: not a known name, file or folder; use {SOURCES}")


def _download(name: str) -> Path:
    from huggingface_hub import constants, snapshot_download

    try:
        fetch = partial(snapshot_download, name, allow_patterns=["config.json", "model.safetensors"])
        return Path(reaching(constants.ENDPOINT, fetch))
    except (OSError, ValueError, NoNetwork) as error:  # huggingface_hub's own errors derive from these
        raise InputError(
            f"init_from={name}: cannot be downloaded from the Hugging Face Hub ({reason(error)}); connect, or use "
            "a folder with config.json and model.safetensors"
        ) from error


def _huggingface(folder: Path, dropout: float) -> Pretrained:
    """GPT2LMHeadModel's folder: config.json and model.safetensors."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        config = json.loads((folder / "config.json").read_bytes())
        tensors = load_file(folder / "model.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"init_from={folder}: not a GPT-2 folder that can be read: {reason(error)}") from error
    spec = _huggingface_spec(folder, config, dropout)
    weights = {}
    for name, array in tensors.items():
        canonical = name if name.startswith("transformer.") else f"transformer.{name}"
        if canonical.endswith((".attn.bias", ".attn.masked_bias")) or name == "lm_head.weight":
            continue  # the causal mask, and the tied head
        array = array.T if canonical.endswith(TRANSPOSED) else array
        weights[canonical] = np.ascontiguousarray(array, np.float32)
    spec.check(weights, str(folder / "model.safetensors"))
    return Pretrained(spec, TrainState.fresh(weights))


def _huggingface_spec(folder: Path, config: Mapping[str, object], dropout: float) -> GPTSpec:
    gelus = {"gelu": "exact", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh"}
    n_embd = config.get("n_embd")
    required = {  # our model; a checkpoint that differs would load and compute something else
        "model_type": ("gpt2",),
        "activation_function": tuple(gelus),
        "layer_norm_epsilon": (1e-5,),
        "n_inner": (None, 4 * n_embd if isinstance(n_embd, int) else None),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "tie_word_embeddings": (True,),
    }
    defaults = {"activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "n_inner": None}
    defaults |= {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "tie_word_embeddings": True}
    for key, allowed in required.items():
        value = config.get(key, defaults.get(key))
        if value not in allowed:
            names = " or ".join(str(a) for a in allowed if a is not None)
            raise InputError(f"init_from={folder}: config.json has {key}={value}; use a checkpoint with {names}")
    keys = ("n_layer", "n_head", "n_embd", "n_positions", "vocab_size")
    sizes = _sizes(config, keys, f"init_from={folder}: config.json")
    return GPTSpec(*sizes, dropout, bias=True, gelu=gelus[str(config.get("activation_function", "gelu_new"))])


def _sizes(given: Mapping[str, Any], keys: Sequence[str], where: str) -> tuple[int, int, int, int, int]:
    """The five numbers that a `GPTSpec` begins with."""
    try:
        layer, head, embd, block, vocab = (int(given[key]) for key in keys)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{where} lacks a whole number: {error}") from error
    return layer, head, embd, block, vocab


def _nanogpt(path: Path, dropout: float) -> Pretrained:
    """nanoGPT's `torch.save`d dictionary, read with weights_only=True, with moments and iteration if it holds them."""
    import torch

    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many kinds: a cut zip, a pickle that would run code, ...
        raise InputError(
            f"init_from={path}: not a checkpoint that can be read without running it: {reason(error)}"
        ) from error
    if not isinstance(saved, dict) or not isinstance(saved.get("model"), dict) or "model_args" not in saved:
        raise InputError(f"init_from={path}: not a nanoGPT checkpoint (it lacks model or model_args)")
    args = saved["model_args"]
    keys = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")
    sizes = _sizes(args, keys, f"init_from={path}: model_args")
    spec = GPTSpec(*sizes, dropout, bias=bool(args.get("bias", True)))
    tensors = {name.removeprefix("_orig_mod."): tensor for name, tensor in saved["model"].items()}
    head = tensors.pop("lm_head.weight", None)
    if head is not None and not torch.equal(head, tensors["transformer.wte.weight"]):
        raise InputError(
            f"init_from={path}: its lm_head.weight is not transformer.wte.weight; use a checkpoint whose head is tied"
        )
    weights = {
        name: tensor.float().numpy().copy() for name, tensor in tensors.items() if not name.endswith(".attn.bias")
    }  # .attn.bias is the causal mask of a model without fused attention
    spec.check(weights, str(path))
    state = TrainState.fresh(weights)
    trained = _moments(saved.get("optimizer"), spec, state, path)
    if trained:
        state.iteration = int(saved.get("iter_num", 0))
        if state.iteration < 0:
            raise InputError(f"init_from={path}: iter_num={state.iteration}: use a checkpoint at iteration 0 or later")
    config = saved.get("config")
    dataset = config.get("dataset") if isinstance(config, dict) else None
    best = float(saved["best_val_loss"]) if trained and "best_val_loss" in saved else float("inf")
    names = {"shakespeare_char": "shakespeare_char"}  # nanoGPT's other corpora have GPT-2's vocabulary
    return Pretrained(spec, state, best, names.get(str(dataset)), trained)


def _moments(optimizer: Any, spec: GPTSpec, state: TrainState, path: Path) -> bool:
    """Fill in AdamW's moments. nanoGPT numbers its parameters: matrices first, then vectors, in the model's order."""
    entries = optimizer.get("state") if isinstance(optimizer, dict) else None
    if not entries:
        return False
    shapes = spec.shapes()
    order = [n for n in shapes if len(shapes[n]) >= 2] + [n for n in shapes if len(shapes[n]) < 2]
    if sorted(entries) != list(range(len(order))):
        raise InputError(f"init_from={path}: its optimizer has {len(entries)} parameters, the model {len(order)}")
    for number, name in enumerate(order):
        entry = entries[number]
        state.exp_avg[name] = entry["exp_avg"].float().numpy().copy()
        state.exp_avg_sq[name] = entry["exp_avg_sq"].float().numpy().copy()
        state.optimizer_steps = int(entry["step"])
    for kind in ("exp_avg", "exp_avg_sq"):
        spec.check(getattr(state, kind), f"{path} ({kind})")
    return True
