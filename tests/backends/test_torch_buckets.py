"""Gradients that go to the other ranks in parts while the backward pass goes on: when, which, and to what sum."""

import dataclasses
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.distributed as dist

from nanogpt_mac.backends import torch_world
from nanogpt_mac.backends.torch_world import TorchWorld
from nanogpt_mac.backends.world import World

SMALL, PARTS = 20_000, 8  # bytes of a part; how many the tests' model has then


class Groups:
    """In place of torch.distributed: ranks that are threads, by gloo, and what each of them has begun."""

    ReduceOp = dist.ReduceOp

    def __init__(self, size):
        self.store, self.size, self.own, self.log = dist.HashStore(), size, threading.local(), [[] for _ in range(size)]

    def join(self, rank):
        self.own.rank, self.own.group = rank, dist.ProcessGroupGloo(self.store, rank, self.size)

    def all_reduce(self, tensor, op=dist.ReduceOp.SUM, async_op=False):
        self.log[self.own.rank].append(tensor.numel())
        options = dist.AllreduceOptions()
        options.reduceOp = op
        work = self.own.group.allreduce([tensor], options)
        return work if async_op else work.wait()


@pytest.fixture
def trained(make, spec, monkeypatch):
    """A function: an iteration of so many ranks by parts of so many bytes; loss and norm, what was shared, the log."""

    def trained(size, bucket, accumulation, **options):
        groups = Groups(size)
        monkeypatch.setattr(torch_world, "dist", groups)
        windows = np.random.default_rng(0).integers(0, 3500, (accumulation, 4))
        plain = dataclasses.replace(spec, dropout=0.0)
        backends = [make("cpu", spec=plain, **options) for _ in range(size)]

        def rank(number):
            groups.join(number)
            backend = backends[number]
            backend.world = world = TorchWorld(number, size, "gloo", bucket=bucket)
            world.asked = number == 0
            found = backend.wait(backend.step(world.share(windows), 1e-3))
            return *found, backend.optimizer.shared.clone(), world

        with ThreadPoolExecutor(size) as pool:
            return list(pool.map(rank, range(size))), groups.log

    return trained


class Here(World):
    """Two ranks of which one is heard: sums begin, and add nothing."""

    def __init__(self, bucket):
        super().__init__(0, 2, bucket=bucket)
        self.events = []

    def begin(self, flat):
        self.events.append((flat.storage_offset(), flat.clone()))

    def finish(self):
        self.events.append("finish")
        return torch.zeros(())


@pytest.mark.parametrize("options", [{}, {"checkpointing": True}])
def test_sums_begin_while_the_backward_pass_goes_on(make, starts, options):
    backend = make("cpu", **options)
    backend.world = world = Here(SMALL)
    for name, parameter in backend.parameters.items():
        parameter.register_hook(lambda _, name=name: world.events.append(name))
    backend.wait(backend.step(starts(0, 2), 1e-3))
    of_last = world.events[len(backend.parameters) :]  # the first micro-batch sends nothing
    assert all(isinstance(event, str) for event in world.events[: len(backend.parameters)])
    kinds = ["begin" if isinstance(event, tuple) else event for event in of_last]
    assert kinds.count("begin") == PARTS
    assert kinds.index("begin") < kinds.index("transformer.h.1.attn.c_attn.weight")
    assert kinds.index("transformer.wte.weight") < len(kinds) - 1 - kinds[::-1].index("begin")  # the last part is its
    assert kinds[-1] == "finish"
    flat = backend.optimizer.shared
    begun = sorted((event for event in of_last if isinstance(event, tuple)), key=lambda event: event[0])
    assert [at for at, _ in begun] == np.cumsum([0, *(len(part) for _, part in begun[:-1])]).tolist()
    assert sum(len(part) for _, part in begun) == len(flat)  # each number once


@pytest.mark.parametrize("accumulation", [2, 4])
def test_parts_come_to_the_one_sum(trained, accumulation):
    single, log = trained(2, float("inf"), accumulation)
    parts, order = trained(2, SMALL, accumulation)
    assert [len(begun) for begun in log] == [1, 1]
    assert order[0] == order[1]
    assert len(order[0]) == PARTS
    for one, other in zip(single, parts, strict=True):
        assert one[:2] == other[:2]
        assert torch.equal(one[2], other[2])
        assert len(other[3].waited_ms) == 1
        assert other[3].agreed
    assert torch.equal(parts[0][2], parts[1][2])


def test_four_ranks_compute_what_one_does(trained, make, spec):
    every, _ = trained(4, SMALL, 4)
    backend = make("cpu", spec=dataclasses.replace(spec, dropout=0.0))
    loss, norm = backend.wait(backend.step(np.random.default_rng(0).integers(0, 3500, (4, 4)), 1e-3))
    for found in every:
        assert found[0] == pytest.approx(loss, rel=1e-6)
        assert found[1] == pytest.approx(norm, rel=1e-5)


@pytest.mark.slow
@pytest.mark.xdist_group("inductor")
def test_a_compiled_backward_pass_gives_its_parts_in_the_same_order(make, starts):
    eager, compiled = (make("cpu", compile=compiled) for compiled in (False, True))
    for backend in (eager, compiled):
        backend.world = Here(SMALL)
        backend.wait(backend.step(starts(0, 2), 1e-3))
    assert len(compiled.world.events) == PARTS + 1
    for one, other in zip(eager.world.events[:-1], compiled.world.events[:-1], strict=True):
        assert one[0] == other[0]
        torch.testing.assert_close(one[1], other[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("most", "sizes"), [(float("inf"), [15]), (1 << 20, [15]), (SMALL, None), (1, None)])
def test_parts_have_every_tensor_once(make, most, sizes):
    optimizer = make("cpu").optimizer
    parts = optimizer.parts(most)
    assert sorted(number for part in parts for number in part) == list(range(len(optimizer.ordered)))
    if sizes:
        assert [len(part) for part in parts] == sizes
        return
    *before, vectors, last = parts
    assert all(one.start == next_.stop for one, next_ in zip([*before], [*before[1:], last], strict=True))
    assert all(optimizer.ordered[number].dim() < 2 for number in vectors)
    for part in [*before, last]:
        assert len(part) == 1 or 4 * sum(optimizer.ordered[number].numel() for number in part) <= most
