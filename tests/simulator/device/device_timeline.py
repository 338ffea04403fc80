"""The queue runs behind the host: who waits, who does not, and that timing through it is right."""

from __future__ import annotations

import time

import pytest
import torch

from nanogpt_mac import simulator

simulator.install()


def iteration(x: torch.Tensor) -> torch.Tensor:
    """50 kernels of 1 ms each under the plan of these tests; the host needs a fraction of that."""
    y = x
    for _ in range(50):
        y = y + 1
    return y


def milliseconds(f) -> float:
    start = time.perf_counter()
    f()
    return (time.perf_counter() - start) * 1e3


@pytest.fixture
def x():
    tensor = torch.zeros(4, device="mps")
    with simulator.plan(us_per_kernel=1000):
        yield tensor
        torch.mps.synchronize()


WAITS = {
    "synchronize": lambda y: torch.mps.synchronize(),
    "accelerator": lambda y: torch.accelerator.synchronize(),
    "item": lambda y: y[0].item(),
    "cpu": lambda y: y.cpu(),
    "tolist": lambda y: y.tolist(),
    "copy_": lambda y: torch.empty(4).copy_(y),
    "blocking copy to the device": lambda y: y.copy_(torch.ones(4)),
    "nonzero": lambda y: y.nonzero(),
    "mask": lambda y: y[y > 0],
    "bool": lambda y: bool((y > 0).all()),
}


@pytest.mark.parametrize("wait", WAITS)
def test_these_wait(x: torch.Tensor, wait: str) -> None:
    simulator.reset_counts()
    assert milliseconds(lambda: WAITS[wait](iteration(x))) >= 50
    assert simulator.counts().waits > 0


GOES_ON = {
    "non_blocking": lambda y: y.to("cpu", non_blocking=True),
    "non_blocking copy to the device": lambda y: y.copy_(torch.ones(4), non_blocking=True),
    "kernel": lambda y: y * 2,
    "index": lambda y: y[torch.arange(2, device="mps")],
    "view": lambda y: y[1:].view(3, 1),
    "empty": lambda y: torch.empty(5, device="mps"),
    "record": lambda y: torch.mps.Event(enable_timing=True).record(),
}


@pytest.mark.parametrize("step", GOES_ON)
def test_these_do_not_wait(x: torch.Tensor, step: str) -> None:
    y = iteration(x)
    simulator.reset_counts()
    GOES_ON[step](y)
    assert simulator.counts().waits == 0


def test_an_iteration_planned_at_50_ms_is_timed_as_50(x: torch.Tensor) -> None:
    """By synchronisation after each, by synchronisation after many, by lag-1 events, and by events' own times."""
    enqueue = min(milliseconds(lambda: iteration(x)) for _ in range(3))
    torch.mps.synchronize()
    assert enqueue < 25  # reading the clock without waiting would report this

    def each() -> float:
        return milliseconds(lambda: (iteration(x), torch.mps.synchronize()))

    def interval() -> float:
        return milliseconds(lambda: ([iteration(x) for _ in range(3)], torch.mps.synchronize())) / 3

    def lag_one() -> float:
        """The completion of an iteration is waited for when the next has been enqueued."""
        moments, pending = [], None
        for _ in range(5):
            iteration(x)
            event = torch.mps.Event()
            event.record()
            if pending is not None:
                pending.synchronize()
                moments.append(time.perf_counter())
            pending = event
        torch.mps.synchronize()
        return (moments[-1] - moments[0]) * 1e3 / 3

    def by_event() -> float:
        start, end = torch.mps.Event(enable_timing=True), torch.mps.Event(enable_timing=True)
        start.record()
        iteration(x)
        end.record()
        return start.elapsed_time(end)

    figures = {}
    for measure in (each, interval, lag_one, by_event):
        for _ in range(8):  # the machine is shared
            figures[measure.__name__] = measure()
            if figures[measure.__name__] == pytest.approx(50, rel=0.02):
                break
    print(figures)
    assert figures == pytest.approx(dict.fromkeys(figures, 50), rel=0.02)


def test_bytes_and_flops_are_planned() -> None:
    a, b = torch.zeros(100, 200, device="mps"), torch.zeros(200, 50, device="mps")
    simulator.reset_counts()
    with simulator.plan(us_per_gigaflop=1e6):  # 1 ns a FLOP
        a @ b
        torch.nn.functional.linear(a, b.t())
        a + 1  # none counted
    assert simulator.counts().device_ms == pytest.approx(2 * 2 * 100 * 200 * 50 / 1e6)
    simulator.reset_counts()
    with simulator.plan(us_per_megabyte=1e3):  # 1 ns a byte
        a + 1
    assert simulator.counts().device_ms == pytest.approx(2 * a.nbytes / 1e6)
    simulator.reset_counts()
    a + 1
    assert (simulator.counts().device_ms, simulator.counts().kernels) == (0, 1)


def test_events_wait_and_answer(x: torch.Tensor) -> None:
    for _ in range(4):
        iteration(x)
    event = torch.mps.Event(enable_timing=True)
    event.record()
    assert not event.query()
    simulator.reset_counts()
    event.wait()  # the queue waits, not the host
    assert simulator.counts().waits == 0
    event.synchronize()
    assert event.query()
