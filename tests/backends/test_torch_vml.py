"""MKL's vector functions are first called by one thread, before anything that several threads compute."""

import functools

import pytest
import torch
from fakes.support import options
from torch.utils._python_dispatch import TorchDispatchMode

from nanogpt_mac.backends import torch_vml
from nanogpt_mac.backends.base import Tokens
from nanogpt_mac.backends.kinds import KINDS
from nanogpt_mac.gpt.spec import GPTSpec


class _Calls(TorchDispatchMode):
    """What torch was asked for, how many numbers each time."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor):
            self.made.append((function.overloadpacket.__name__, made.dtype, made.numel()))
        return made


def _arrays():
    kind = KINDS["cpu"]
    return kind.load_arrays()(kind, kind.devices[0].device, False)


def _backend():
    spec = GPTSpec(n_layer=1, n_head=1, n_embd=16, block_size=16, vocab_size=65)
    return KINDS["cpu"].load()(spec, options("cpu"), Tokens(block_size=16))


@pytest.mark.parametrize("made", [_arrays, _backend])
def test_each_is_called_alone_before_anything_else(made, monkeypatch):
    monkeypatch.setattr(torch_vml, "settle", functools.cache(torch_vml.settle.__wrapped__))  # as in a fresh process
    with _Calls() as calls:
        made()
        first = len(calls.made)
        torch.full((1 << 16,), 0.5).sqrt()
    before = calls.made[:first]
    for name in torch_vml.FUNCTIONS:
        assert {(name, torch.float32, 1), (name, torch.float64, 1)} <= set(before)
    assert all(elements == 1 for name, _, elements in before if name in torch_vml.FUNCTIONS)


def test_it_is_done_once(monkeypatch):
    monkeypatch.setattr(torch_vml, "settle", functools.cache(torch_vml.settle.__wrapped__))
    torch_vml.settle()
    with _Calls() as calls:
        torch_vml.settle()
    assert calls.made == []
