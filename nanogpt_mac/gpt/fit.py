"""Whether a model was trained on these tokens: what it predicts is held against what stands there.

A loss cannot tell: a model that was trained for four iterations has almost chance's with the right tokens too. Whatever
it has learned, each symbol's log-probability must be highest where that symbol stands. So the numbers of the symbols
that occur are assigned anew, in the best way there is, and the share of what that could gain which the given numbers
have already is the fit: 1 for the right tokens, about 0 for others.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nanogpt_mac.gpt.spec import GPTSpec, TrainState

TOKENS, SYMBOLS, LEAST = 8192, 256, 8  # tokens looked at; the most frequent symbols of them, if they occur so often


@dataclass(frozen=True)
class Fit:
    share: float  # see above; 0 where nothing could be gained
    loss: float  # nats a token
    beyond: float  # probability of the numbers that no symbol has, over what chance gives them; 0: there are none


def is_untrained(state: TrainState) -> bool:
    """Whether no iteration has touched these weights: every norm's gain is 1, every bias 0, as both are drawn."""
    vectors = [(name, array) for name, array in state.weights.items() if array.ndim == 1]
    return all((array == (0.0 if name.endswith(".bias") else 1.0)).all() for name, array in vectors)


def measure(spec: GPTSpec, state: TrainState, tokens: np.ndarray, vocabulary: int) -> Fit:
    """How `tokens` (1-D, numbers below `vocabulary`) fit the model, computed on the CPU.

    8192 of them are looked at, for a large model 2048.
    """
    import torch
    from scipy.optimize import linear_sum_assignment

    from nanogpt_mac.gpt.torch_gpt import GPT

    with torch.device("meta"):
        model = GPT(spec)
    named = {name: torch.from_numpy(array) for name, array in state.weights.items()}
    model.load_state_dict(named, assign=True)
    model.eval()
    count = TOKENS if spec.n_params() < 2e7 else TOKENS // 4
    length = min(spec.block_size, len(tokens) - 1)
    starts = np.unique(np.linspace(0, len(tokens) - length - 1, max(1, count // length)).astype(int))
    windows = tokens[starts[:, None] + np.arange(length + 1)].astype(np.int64)
    numbers, counts = np.unique(windows[:, 1:], return_counts=True)
    frequent = numbers[np.argsort(-counts, kind="stable")[:SYMBOLS]]
    frequent = frequent[np.isin(frequent, numbers[counts >= min(LEAST, counts.max())])]
    gained = np.zeros((len(frequent), len(frequent)))  # [symbol that stands there, number that it could have]
    loss = beyond = 0.0
    at_a_time = max(1, 2**22 // (length * spec.vocab_size))  # 16 MB of logits
    with torch.no_grad():
        for some in np.array_split(windows, -(-len(windows) // at_a_time)):
            expected = some[:, 1:].ravel()
            predicted = torch.log_softmax(model(torch.from_numpy(some[:, :-1])), -1).flatten(0, 1).numpy()
            loss -= float(predicted[np.arange(len(expected)), expected].sum())
            beyond += float(np.exp(predicted[:, vocabulary:]).sum())
            gained += (expected[None] == frequent[:, None]).astype(np.float32) @ predicted[:, frequent]
    rows, columns = linear_sum_assignment(gained, maximize=True)
    best, chance = gained[rows, columns].sum(), gained.mean(1).sum()
    looked_at, padding = windows[:, 1:].size, (spec.vocab_size - vocabulary) / spec.vocab_size
    share = float((np.trace(gained) - chance) / (best - chance)) if best > chance else 0.0
    return Fit(share, loss / looked_at, beyond / looked_at / padding if padding > 0 else 0.0)
