"""What a GPT is, without any framework: sizes, parameter names and shapes, initial weights, FLOPs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nanogpt_mac.errors import InputError

if TYPE_CHECKING:  # `--help` has no time for it
    import numpy as np

GELUS = ("exact", "tanh")
INIT_LOSS_SCALE = 65536.0  # of float16, whose gradients underflow: torch.amp.GradScaler's default


@dataclass
class ModelConfig:
    """The `model` group. Its defaults, which stand only here, are nanoGPT's config/train_shakespeare_char.py."""

    n_layer: int = 6
    """Blocks, at least 1."""
    n_head: int = 6
    """Attention heads, at least 1; they must divide n_embd."""
    n_embd: int = 384
    """Channels of the residual stream."""
    block_size: int = 256
    """Longest context, in tokens."""
    dropout: float = 0.2
    """Share of activations dropped in training, from 0 up to, not including, 1."""
    bias: bool = False
    """Whether linear layers and layer norms have a bias."""
    gelu: str = "exact"
    """exact, or tanh: the approximation that OpenAI's GPT-2 weights were trained with."""
    vocab_size: int | None = None
    """Tokens that the model knows. null: the corpus's own number, padded where nanoGPT pads it."""


@dataclass(frozen=True)
class GPTSpec:
    """Sizes of one GPT, as in ModelConfig. Parameter names, shapes and layouts are nanoGPT's ((outputs, inputs) for
    linear layers). Raises InputError for sizes that cannot be."""

    n_layer: int
    n_head: int
    n_embd: int
    block_size: int
    vocab_size: int
    dropout: float = 0.0
    bias: bool = ModelConfig.bias
    gelu: str = ModelConfig.gelu

    def __post_init__(self) -> None:
        for key in ("n_layer", "n_head", "n_embd", "block_size", "vocab_size"):
            if getattr(self, key) < 1:
                raise InputError(f"model.{key}={getattr(self, key)}: use at least 1")
        if self.n_embd % self.n_head:
            raise InputError(
                f"model.n_embd={self.n_embd}: model.n_head={self.n_head} does not divide it; "
                f"use a multiple of {self.n_head}"
            )
        if not 0.0 <= self.dropout < 1.0:
            raise InputError(f"model.dropout={self.dropout}: use a number from 0 up to, not including, 1")
        if self.gelu not in GELUS:
            raise InputError(f"model.gelu={self.gelu}: use {' or '.join(GELUS)}")

    def mask_shapes(self, batch: int, length: int) -> list[tuple[int, ...]]:
        """What dropout draws for one pass, in its order: embedding; a layer: attention weights, its output, MLP's."""
        rows, weights = (batch, length, self.n_embd), (batch, self.n_head, length, length)
        return [rows, *[weights, rows, rows] * self.n_layer]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every parameter's name and shape, in the order in which torch's twin registers them."""
        C = self.n_embd
        shapes: dict[str, tuple[int, ...]] = {
            "transformer.wte.weight": (self.vocab_size, C),
            "transformer.wpe.weight": (self.block_size, C),
        }

        def layer(name: str, *shape: int) -> None:
            shapes[f"{name}.weight"] = shape
            if self.bias:
                shapes[f"{name}.bias"] = shape[:1]

        for i in range(self.n_layer):
            block = f"transformer.h.{i}"
            layer(f"{block}.ln_1", C)
            layer(f"{block}.attn.c_attn", 3 * C, C)
            layer(f"{block}.attn.c_proj", C, C)
            layer(f"{block}.ln_2", C)
            layer(f"{block}.mlp.c_fc", 4 * C, C)
            layer(f"{block}.mlp.c_proj", C, 4 * C)
        layer("transformer.ln_f", C)
        return shapes

    def init_weights(self, seed: int) -> dict[str, np.ndarray]:
        """Draw float32 weights as nanoGPT does: N(0, 0.02), `c_proj` scaled by 1/sqrt(2 n_layer), norms 1, biases 0."""
        import numpy as np

        rng = np.random.Generator(np.random.Philox(key=seed))
        weights = {}
        for name, shape in self.shapes().items():
            if len(shape) == 1:
                weights[name] = np.full(shape, 0.0 if name.endswith(".bias") else 1.0, np.float32)
            else:
                std = 0.02 / math.sqrt(2 * self.n_layer) if name.endswith("c_proj.weight") else 0.02
                weights[name] = rng.standard_normal(shape, np.float32) * np.float32(std)
        return weights

    def check(self, arrays: Mapping[str, np.ndarray], source: str) -> None:
        """Raise InputError unless `arrays` holds just this model's parameters, in their shapes, as finite float32."""
        import numpy as np

        shapes = self.shapes()
        missing, extra = shapes.keys() - arrays.keys(), arrays.keys() - shapes.keys()
        if missing or extra:
            what = f"lacks {min(missing)}" if missing else f"has an unknown tensor {min(extra)}"
            raise InputError(f"{source}: {what}; use a file that holds a GPT of these sizes")
        for name, shape in shapes.items():
            array = arrays[name]
            if array.shape != shape or array.dtype != np.float32:
                raise InputError(f"{source}: {name} is {array.dtype}{array.shape} where this model has float32{shape}")
            if not np.isfinite(array).all():
                raise InputError(f"{source}: {name} holds values that are not finite")

    def n_params(self) -> int:
        """Number of parameters, without those of the position embedding wpe: nanoGPT's N.

        Left out as in nanoGPT's get_num_params; a checkpoint holds block_size x n_embd more.
        """
        sizes = {name: math.prod(shape) for name, shape in self.shapes().items()}
        return sum(sizes.values()) - sizes["transformer.wpe.weight"]

    def flops_per_token(self) -> int:
        """Model FLOPs of one token, forward and backward: `6N + 12LHQT` (nanoGPT; PaLM paper, appendix B).

        N is `n_params()`, without wpe; L layers, H heads of Q = n_embd / H channels, T = block_size.
        """
        head_size = self.n_embd // self.n_head
        return 6 * self.n_params() + 12 * self.n_layer * self.n_head * head_size * self.block_size

    def matmul_shapes(self, batch: int) -> list[tuple[int, int, int]]:
        """(M, K, N) of the linear layers' products for `batch` sequences: the measured peak should include them."""
        rows, C = batch * self.block_size, self.n_embd
        return [(rows, C, 3 * C), (rows, C, 4 * C), (rows, 4 * C, C), (rows, C, self.vocab_size)]


@dataclass
class TrainState:
    """All that training has learned so far: weights and AdamW's moments, float32, under nanoGPT's names."""

    weights: dict[str, np.ndarray]
    exp_avg: dict[str, np.ndarray]
    exp_avg_sq: dict[str, np.ndarray]
    iteration: int = 0  # iterations done; also the counter from which dropout is drawn
    optimizer_steps: int = 0  # fewer than `iteration` where float16 overflowed and the update was left out
    loss_scale: float = INIT_LOSS_SCALE
    scale_growth: int = 0  # steps since the loss scale last changed

    @classmethod
    def fresh(cls, weights: dict[str, np.ndarray]) -> TrainState:
        import numpy as np

        # Not zeros_like, which writes them: where a moment is replaced, its zeros cost nothing.
        zeros, more_zeros = ({n: np.zeros(w.shape, w.dtype) for n, w in weights.items()} for _ in range(2))
        return cls(weights, zeros, more_zeros)


def keeping(dropout: float) -> int:
    """Of 65,536 equally likely draws, those that keep an activation."""
    return max(1, round((1.0 - dropout) * 65536))
