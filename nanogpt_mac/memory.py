"""The least memory that an iteration needs, held against the machine's before anything is built."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path

import psutil

from nanogpt_mac.backends import kinds
from nanogpt_mac.config import Config
from nanogpt_mac.corpus import vocab_size
from nanogpt_mac.errors import InputError
from nanogpt_mac.machine import nvml

RECIPE = ("batch_size", "eval_iters", "gradient_accumulation_steps")  # Config's own; the others are the model's
LIMIT = Path("/sys/fs/cgroup/memory.max")  # of a container, where there is one


SIZES = ("batch_size", "block_size", "n_layer", "n_embd", "eval_iters", "gradient_accumulation_steps", "vocab_size")


@dataclass(frozen=True)
class Sizes:
    """What an iteration's memory grows with; names are Config's, in the order in which smaller ones are proposed."""

    batch_size: int
    block_size: int
    n_layer: int
    n_embd: int
    eval_iters: int
    gradient_accumulation_steps: int
    vocab_size: int
    checkpointing: bool = False
    kept_heads: int = 0  # heads whose attention weights the backward pass reads, where they are written out

    def bytes(self, dtype: str) -> int:
        """A lower bound, whatever a compiler fuses: what must exist at once.

        State: weights, AdamW's two moments and the gradients, float32: 16 (V C + T C + 12 L C^2) bytes, without norms
        and biases. Activations that the backward pass reads, for B T tokens in `dtype`: of every layer what went into
        its products or came out of them, queries, keys, values (3 C), attention's output (C), the hidden layer (4 C),
        and the logits (V). Of heads that are kept, T attention weights each, and a byte for each mask's element. With
        checkpointing the same of one layer, and what goes into each (C, float32). And where the windows of the largest
        draw begin, int64.
        """
        C, item = self.n_embd, 4 if dtype == "float32" else 2
        state = 16 * ((self.vocab_size + self.block_size) * C + 12 * self.n_layer * C * C)
        tokens = self.batch_size * self.block_size
        masks = self.kept_heads * self.block_size + 2 * C if self.kept_heads else 0
        layer = item * (8 * C + self.kept_heads * self.block_size)
        layers = layer + 4 * C * self.n_layer if self.checkpointing else layer * self.n_layer
        activations = tokens * (layers + masks * self.n_layer + item * self.vocab_size)
        return state + activations + 8 * self.batch_size * max(self.eval_iters, self.gradient_accumulation_steps)

    def most(self, name: str, dtype: str, memory: int) -> int:
        """The largest value of `name`, everything else as it is, that fits; 0 where none does."""
        low, high = 0, getattr(self, name)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self._with(name, middle).bytes(dtype) <= memory else (low, middle - 1)
        return low

    def _with(self, name: str, value: int) -> Sizes:
        return replace(self, **{name: value})  # type: ignore[arg-type]


def check(config: Config, backend: str, memory: int | None = None) -> None:
    """InputError where an iteration of `config` cannot fit into `memory` bytes: those of `backend`'s device here."""
    model, memory = config.model, memory or of(backend)
    vocabulary = model.vocab_size or vocab_size(config.data) or 1
    given = {**asdict(model), **{key: getattr(config, key) for key in RECIPE}, "vocab_size": vocabulary}
    kind = kinds.KINDS.get(backend)
    kept = model.n_head if kind and kind.keeps_attention and model.dropout else 0
    sizes = Sizes(**{name: given[name] for name in SIZES}, checkpointing=config.checkpointing, kept_heads=kept)
    needed = sizes.bytes(config.dtype)
    if needed <= memory:
        return
    keys = {name: name if name in RECIPE else f"model.{name}" for name in SIZES}
    named = sorted(keys, key=lambda name: keys[name] not in config.named)
    fitting = {name: most for name in named if (most := sizes.most(name, config.dtype, memory))}
    if "n_embd" in fitting and (most := fitting.pop("n_embd") // model.n_head * model.n_head):
        fitting["n_embd"] = most
    name = next((name for name in named if name in fitting), named[0])
    use = f"use at most {fitting[name]}" if name in fitting else "use this and other sizes that are smaller"
    if replace(sizes, checkpointing=True).bytes(config.dtype) <= memory:
        use += ", or checkpointing=true"
    raise InputError(
        f"{keys[name]}={getattr(sizes, name)}: an iteration needs at least {needed / 1e9:.3g} GB of memory, and there "
        f"are {memory / 1e9:.3g} GB here; {use}"
    )


def of(backend: str) -> int:
    """Bytes that `backend` can have here at most: a GPU's own, else the machine's (or its container's) with swap."""
    kind = kinds.KINDS.get(backend)
    if kind and kind.nvidia:
        try:
            with nvml.device() as (pynvml, handle):
                return int(pynvml.nvmlDeviceGetMemoryInfo(handle).total)
        except nvml.NvmlError:
            pass
    try:
        limit = LIMIT.read_text().strip()
    except OSError:
        limit = ""
    machine = int(psutil.virtual_memory().total + psutil.swap_memory().total)
    return min(machine, int(limit)) if limit.isdecimal() else machine
