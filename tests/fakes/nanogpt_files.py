"""Checkpoints as nanoGPT's train.py saves them, of a small model that was trained on a text."""

from typing import Any

import torch

from nanogpt_mac.gpt.spec import GPTSpec
from nanogpt_mac.gpt.torch_gpt import GPT


def trained(text: str, steps: int, lr: float = 1e-2, by_name: bool = False, **sizes: Any) -> dict[str, Any]:
    """What ckpt.pt holds after `steps` iterations on `text`, one token a character.

    `by_name` numbers the optimizer's parameters as nanoGPT did until 2023.
    """
    chars = sorted(set(text))
    tokens = torch.tensor([chars.index(char) for char in text])
    given = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16, "vocab_size": len(chars), "bias": False} | sizes
    spec = GPTSpec(**given)
    model = GPT(spec)
    model.load_state_dict({name: torch.from_numpy(array) for name, array in spec.init_weights(3).items()})
    named = sorted(model.named_parameters()) if by_name else list(model.named_parameters())
    decay, rest = ([p for _, p in named if (p.dim() >= 2) is matrix] for matrix in (True, False))
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.99))
    generator = torch.Generator().manual_seed(0)
    offsets = torch.arange(spec.block_size + 1)
    for _ in range(steps):
        starts = torch.randint(len(tokens) - spec.block_size, (16,), generator=generator)
        rows = tokens[starts[:, None] + offsets]
        model.loss(rows[:, :-1], rows[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
    weights = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    return {
        "model": weights | {"lm_head.weight": weights["transformer.wte.weight"]},
        "optimizer": optimizer.state_dict(),
        "model_args": given | {"dropout": 0.0},
        "iter_num": steps,
        "best_val_loss": torch.tensor(2.5),
        "config": {"dataset": "shakespeare_char"},
    }
