"""Weights trained elsewhere: Hugging Face folders, and nanoGPT's own ckpt.pt. Nothing is unpickled.

A tensor is left out only where it is shown to say nothing new (the tied head, a causal mask); any other that this GPT
has no place for is named and refused.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nanogpt_mac.errors import InputError
from nanogpt_mac.gpt.spec import GPTSpec, TrainState

if TYPE_CHECKING:
    import torch

GPT2 = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
SOURCES = (
    f"scratch, resume, {', '.join(GPT2)}, a run or checkpoint of this project, a Hugging Face folder (config.json with "
    "model.safetensors or pytorch_model.bin), or a nanoGPT ckpt.pt"
)
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
# OpenAI's weights are (inputs, outputs) (Conv1D), ours (outputs, inputs).
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
# What torch.compile, DDP, FSDP, activation checkpoints and wrappers of users put into a parameter's name.
WRAPPERS = {"_orig_mod", "module", "model", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "transformer"}
HEAD, EMBEDDING, POSITIONS = "lm_head.weight", "transformer.wte.weight", "transformer.wpe.weight"


@dataclass(frozen=True)
class Pretrained:
    spec: GPTSpec
    state: TrainState
    best: float = float("inf")
    trained: bool = False  # whether it has moments and an iteration, so that training continues
    encoder: dict[str, object] | None = None  # what its tokens mean, as `encoder_from_json` takes it; None: not said
    notes: tuple[str, ...] = ()  # what a user should know of the reading, one line each


def crop(spec: GPTSpec, state: TrainState, block_size: int) -> tuple[GPTSpec, TrainState]:
    """The same model with a shorter context (nanoGPT's crop_block_size), and its moments with it."""
    kinds = {}
    for kind in ("weights", "exp_avg", "exp_avg_sq"):
        arrays = getattr(state, kind)
        kinds[kind] = arrays | {POSITIONS: arrays[POSITIONS][:block_size].copy()}
    return dataclasses.replace(spec, block_size=block_size), dataclasses.replace(state, **kinds)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def is_pretrained(source: str) -> bool:
    """Whether `load` reads `source` (and it is not a run or checkpoint of ours)."""
    path = Path(source)
    return source in GPT2 or path.is_file() or (path / "ckpt.pt").is_file() or (path / "config.json").is_file()


def load(source: str, dropout: float, key: str = "init_from") -> Pretrained:
    """Read `source`: a GPT-2 name, a Hugging Face folder, a nanoGPT checkpoint or its folder; InputError for others,
    which begins with `key`=."""
    where = f"{key}={source}"
    if source in GPT2:
        folder = _download(source, where)
        return dataclasses.replace(_huggingface(folder, dropout, where), encoder={"kind": "gpt2"})
    path = Path(source)
    try:
        if path.is_dir():
            inside = path / "ckpt.pt"
            if inside.is_file():
                return _nanogpt(inside, dropout, f"{where}/ckpt.pt")
            return _huggingface(path, dropout, where)
        if path.is_file():
            return _nanogpt(path, dropout, where)
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:  # of the wrong kind
        raise InputError(f"{where}: damaged: {type(error).__name__}: {_first_line(error)}") from error
    raise InputError(f"{where}: not a known name, file or folder; use {SOURCES}")


# -- Hugging Face -----------------------------------------------------------------------------------------------------


def _download(name: str, where: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=["config.json", "model.safetensors"]))
    except (OSError, ValueError) as error:  # huggingface_hub's own errors derive from these
        raise InputError(
            f"{where}: cannot be downloaded from the Hugging Face Hub ({_first_line(error)}); connect, or use "
            "a folder with config.json and model.safetensors"
        ) from error


def _huggingface(folder: Path, dropout: float, where: str) -> Pretrained:
    """A GPT-2 as transformers saves it: config.json, weights in one file or in shards, perhaps tokenizer.json."""
    try:
        config = json.loads((folder / "config.json").read_bytes())
        tokenizer = folder / "tokenizer.json"
        encoder = {"kind": "bpe", "tokenizer": json.loads(tokenizer.read_bytes())} if tokenizer.is_file() else None
    except (OSError, ValueError) as error:
        raise InputError(f"{where}: not a GPT-2 folder that can be read: {_first_line(error)}") from error
    spec = _huggingface_spec(config, dropout, where)
    tensors: dict[str, torch.Tensor] = {}
    for file in _files(folder, where):
        tensors |= _tensors(file, where)
    weights = _weights(tensors, spec.block_size, where, lambda name: name.endswith(TRANSPOSED))
    spec.check(weights, where)
    return Pretrained(spec, TrainState.fresh(weights), encoder=encoder)


def _files(folder: Path, where: str) -> list[Path]:
    """The files that hold a folder's weights: the first of `WEIGHTS` that is there, whole or in shards."""
    for name in WEIGHTS:
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return [folder / name]
        if index.is_file():
            shards = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
            for shard in shards:
                if Path(shard).name != shard or not (folder / shard).is_file():
                    raise InputError(f"{where}: lacks {shard}, which {index.name} names; fetch all shards")
            return [folder / shard for shard in shards]
    raise InputError(f"{where}: not a GPT-2 folder that can be read: it has neither {' nor '.join(WEIGHTS)}")


def _tensors(file: Path, where: str) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if file.suffix != ".safetensors":
        return dict(_unpickled(file, where))
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{where}: not a GPT-2 folder that can be read: {file.name}: {_first_line(error)}") from error


def _huggingface_spec(config: Mapping[str, object], dropout: float, where: str) -> GPTSpec:
    gelus = {"gelu": "exact", "gelu_python": "exact"}
    gelus |= dict.fromkeys(("gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_accurate"), "tanh")
    sizes = {"n_layer": 12, "n_head": 12, "n_embd": 768, "n_positions": 1024, "vocab_size": 50257}  # GPT2Config's own
    other = {"n_layer": "num_hidden_layers", "n_head": "num_attention_heads", "n_embd": "hidden_size"}
    for key, default in sizes.items():
        names = (
            ("n_positions", "n_ctx", "max_position_embeddings") if key == "n_positions" else (key, other.get(key, key))
        )
        given = next((config[name] for name in names if name in config), default)
        if not isinstance(given, int) or isinstance(given, bool):
            raise InputError(f"{where}: config.json has {key}={given}; use a whole number")
        sizes[key] = given
    required = {  # our model; a checkpoint that differs would load and compute something else
        "model_type": ("gpt2",),
        "activation_function": tuple(gelus),
        "layer_norm_epsilon": (1e-5,),
        "n_inner": (None, 4 * sizes["n_embd"]),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "tie_word_embeddings": (True,),
    }
    defaults = {"model_type": "gpt2", "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "n_inner": None}
    defaults |= {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "tie_word_embeddings": True}
    for key, allowed in required.items():
        value = config.get(key, defaults[key])
        if value not in allowed:
            words = " or ".join(str(a) for a in allowed if a is not None)
            raise InputError(f"{where}: config.json has {key}={value}; use a checkpoint with {words}")
    gelu = gelus[str(config.get("activation_function", "gelu_new"))]
    layer, head, embd, block, vocabulary = sizes.values()
    return GPTSpec(layer, head, embd, block, vocabulary, dropout, bias=True, gelu=gelu)


# -- nanoGPT ----------------------------------------------------------------------------------------------------------


def _nanogpt(path: Path, dropout: float, where: str) -> Pretrained:
    """nanoGPT's `torch.save`d dictionary, with moments and iteration if it holds them."""
    saved = _unpickled(path, where)
    args = saved.get("model_args", saved.get("config"))
    if not isinstance(saved.get("model"), dict) or not isinstance(args, dict):
        raise InputError(f"{where}: not a nanoGPT checkpoint (it lacks model or model_args)")
    names = {_canonical(name) for name in saved["model"]}
    given: dict[str, Any] = {"bias": any(name.endswith("c_attn.bias") for name in names)} | args  # older: not said
    vocabulary = {_canonical(name): len(tensor) for name, tensor in saved["model"].items() if tensor.dim()}
    given.setdefault("vocab_size", vocabulary.get(EMBEDDING, vocabulary.get(HEAD)))
    try:
        keys = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")
        layer, head, embd, block, vocab = (int(given[key]) for key in keys)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{where}: model_args lacks a whole number: {error}") from error
    spec = GPTSpec(layer, head, embd, block, vocab, dropout, bias=bool(given["bias"]))
    weights = _weights(saved["model"], spec.block_size, where)
    spec.check(weights, where)
    iteration = int(saved.get("iter_num", 0))
    if iteration < 0:
        raise InputError(f"{where}: iter_num={iteration}: use a checkpoint at iteration 0 or later")
    best = float(saved.get("best_val_loss", "inf"))
    if not saved.get("optimizer"):
        return Pretrained(spec, TrainState.fresh(weights))
    try:
        state = _moments(saved["optimizer"], spec, weights)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError, InputError) as error:
        why = f"{where}: its optimizer's moments do not fit ({_first_line(error)}); the weights start with fresh ones"
        return Pretrained(spec, TrainState.fresh(weights), notes=(f"{why}, at iteration 0",))
    state.iteration = iteration
    return Pretrained(spec, state, best, trained=True)


def _unpickled(path: Path, where: str) -> dict[str, Any]:
    """What `torch.save` wrote, by weights_only=True: nothing in the file is run."""
    import torch

    kinds = (np.float64, np.float32, np.float16, np.int64, np.int32, np.bool_)
    scalar: Any = np.float64(0).__reduce__()[0]  # how numpy's scalars are made, under its names in numpy 1 and 2
    numbers: list[Any] = [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    numbers += [np.dtype, *(type(np.dtype(kind)) for kind in kinds)]
    try:
        with torch.serialization.safe_globals(numbers):
            saved = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many kinds: a cut zip, a pickle that would run code, ...
        code = re.search(r"GLOBAL ([\w.]+)", str(error))  # torch's own words go on to advise running it
        reason = f"it calls {code[1]}" if code else f"{type(error).__name__}: not a file that torch.save wrote"
        raise InputError(f"{where}: not a checkpoint that can be read without running it: {reason}") from error
    if not isinstance(saved, dict):
        raise InputError(f"{where}: {path.name} holds a {type(saved).__name__}; use a file that holds a dictionary")
    return saved


def _moments(optimizer: Mapping[str, Any], spec: GPTSpec, weights: dict[str, np.ndarray]) -> TrainState:
    """AdamW's moments, by name. ValueError, or what a wrong kind raises, where they cannot be told apart."""
    groups, entries = optimizer["param_groups"], optimizer["state"]
    ids = [number for group in groups for number in group["params"]]
    shapes, fitting = spec.shapes(), []
    for order in _orders(groups, shapes):
        if len(order) == len(ids) and all(
            tuple(entries[number]["exp_avg"].shape) == shapes[name] for number, name in zip(ids, order, strict=True)
        ):
            fitting.append(order)
    if not fitting or any(order != fitting[0] for order in fitting):
        raise ValueError(f"{len(ids)} parameters in {'no' if not fitting else 'more than one'} known order")
    steps = {int(entries[number]["step"]) for number in ids}
    if len(steps) != 1:
        raise ValueError(f"steps of {min(steps)} to {max(steps)}")
    state = TrainState.fresh(weights)
    state.optimizer_steps = steps.pop()
    for kind in ("exp_avg", "exp_avg_sq"):
        arrays = getattr(state, kind)
        for number, name in zip(ids, fitting[0], strict=True):
            arrays[name] = entries[number][kind].float().numpy().copy()
        spec.check(arrays, kind)
    return state


def _orders(groups: Sequence[Mapping[str, Any]], shapes: Mapping[str, tuple[int, ...]]) -> Iterator[list[str]]:
    """The orders in which nanoGPT's versions have numbered parameters, of those whose groups have these sizes.

    Matrices, then vectors, as the model has them; until 2023 each sorted by name; first, embeddings were in the second
    group. Optimizers that were given names tell them.
    """
    if all("param_names" in group for group in groups):
        yield [_canonical(name) for group in groups for name in group["param_names"]]
        return
    sizes = [len(group["params"]) for group in groups]
    matrices = {name for name in shapes if len(shapes[name]) >= 2}
    for decayed in (matrices, matrices - {EMBEDDING, POSITIONS}):
        if sizes == [len(decayed), len(shapes) - len(decayed)]:
            for names in (list(shapes), sorted(shapes)):
                yield [n for n in names if n in decayed] + [n for n in names if n not in decayed]


# -- both -------------------------------------------------------------------------------------------------------------


def _canonical(name: str) -> str:
    """A tensor's name without what wrappers put into it."""
    bare = ".".join(part for part in name.split(".") if part not in WRAPPERS)
    return f"transformer.{bare}" if bare.startswith(("wte.", "wpe.", "h.", "ln_f.")) else bare


def _weights(
    tensors: Mapping[str, torch.Tensor],
    block_size: int,
    where: str,
    transposed: Callable[[str], bool] = lambda name: False,
) -> dict[str, np.ndarray]:
    """Float32 arrays by canonical name; InputError for what contradicts itself or is no weight."""
    import torch

    found: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        key = _canonical(name)
        if not isinstance(tensor, torch.Tensor):
            raise InputError(f"{where}: {name} is a {type(tensor).__name__}; use a file that holds tensors")
        if _redundant(key, tensor, block_size):
            continue
        if not tensor.is_floating_point() or tensor.element_size() < 2:
            raise InputError(f"{where}: {name} is {tensor.dtype}, and this GPT has no place for it; use one without it")
        if key in found and not torch.equal(found[key], tensor):
            raise InputError(f"{where}: {name} is there twice with different values; use a file with one of them")
        found[key] = tensor
    head = found.pop(HEAD, None)
    if head is not None and not torch.equal(head, found.setdefault(EMBEDDING, head)):
        raise InputError(
            f"{where}: its {HEAD} is not {EMBEDDING}; use a checkpoint whose head is tied to the embedding"
        )
    return {
        name: np.ascontiguousarray((tensor.T if transposed(name) else tensor).float().numpy(), np.float32).copy()
        for name, tensor in found.items()
    }


def _redundant(name: str, tensor: torch.Tensor, block_size: int) -> bool:
    """Whether a tensor says nothing that this model does not know: a whole causal mask, its constant, positions."""
    import torch

    if name.endswith((".attn.bias", ".attn.mask")) and tensor.dim() >= 2:
        size = tensor.shape[-1]
        mask = torch.ones(size, size, dtype=torch.bool).tril()
        is_whole = size >= block_size and tensor.numel() == size * size
        return is_whole and torch.equal(tensor.reshape(size, size), mask.to(tensor.dtype))
    if name.endswith(".attn.masked_bias"):
        return tensor.numel() == 1 and float(tensor) <= -1e4
    return name.endswith("position_ids") and torch.equal(tensor.flatten(), torch.arange(tensor.numel()))
