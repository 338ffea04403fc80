"""The backward pass of one of several ranks: parts of its gradients go to the others while it computes the next."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nanogpt_mac.backends.torch_adamw import AdamW

if TYPE_CHECKING:  # a run of one process has no use for torch.distributed
    from nanogpt_mac.backends.torch_world import TorchWorld


def backward(loss: Tensor, optimizer: AdamW, world: TorchWorld, add: bool) -> None:
    """Take the gradients of `loss`, or `add` them to those taken, and begin to make each part the mean over ranks.

    A part begins as soon as autograd has the last gradient of it and the parts before it have begun: the order is the
    same on every rank. Where the whole loss is one compiled function, all gradients come at its end.
    """
    found: dict[int, Tensor] = {}
    left = optimizer.parts(world.bucket)

    def came(number: int, gradient: Tensor) -> None:  # on CUDA in autograd's own thread, in the stream of the loss
        found[number] = gradient
        while left and all(i in found for i in left[0]):
            part = left.pop(0)
            world.begin(optimizer.take([found[i] for i in part], add, part))

    hooks = [p.register_hook(partial(came, number)) for number, p in enumerate(optimizer.ordered)]
    try:
        every = torch.autograd.grad(loss, optimizer.ordered, materialize_grads=True)
    finally:
        for hook in hooks:
            hook.remove()
    for number, gradient in enumerate(every):  # what the loss does not depend on has come through no hook
        came(number, gradient)
