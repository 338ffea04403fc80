"""The measuring core, on a clock and a device that are made up."""

import pytest

from nanogpt_mac.measure import calls


class Made:
    """A device whose queue takes `takes` seconds a call behind the host, on a clock of its own."""

    def __init__(self, takes, enqueue=1e-6, waits=True, every=None):
        self.now, self.free, self.takes, self.enqueue, self.waits, self.every = 0.0, 0.0, takes, enqueue, waits, every
        self.started, self.numbers, self.alive, self.batches = 0, [], [], []

    def clock(self):
        return self.now

    def call(self, number):
        self.now += self.enqueue
        takes = self.takes if self.every is None or number % self.every else 3 * self.takes
        self.free = max(self.free, self.now) + takes
        self.numbers.append(number)
        return (number,)

    def start(self, outputs):
        self.started += 1

    def wait(self, outputs):
        self.batches.append(len(self.numbers) - sum(self.batches))
        self.alive.append(len(outputs))
        if self.waits:
            self.now = max(self.now, self.free)

    def peek(self, array):
        self.now = max(self.now, self.free)
        return 0.0


def measure(device, budget_s=1.0, **more):
    return calls.measure(device.call, device, budget_s, clock=device.clock, **more)


def test_latency_and_throughput_are_what_the_device_takes():
    device = Made(takes=1e-3, enqueue=5e-4)
    found = measure(device)
    assert found.latency.median == pytest.approx(1.5)  # enqueued, then computed
    assert found.throughput.median == pytest.approx(1 + 0.5 / found.queued)  # the host is ahead
    assert found.throughput.ci95 == pytest.approx((found.throughput.median,) * 2)
    assert not found.fault


def test_a_batch_doubles_until_it_takes_20_ms():
    device = Made(takes=1e-3)
    found = measure(device)
    assert found.queued == 32
    counts = device.batches
    assert counts[counts.index(2) :][:5] == [2, 4, 8, 16, 32]
    assert measure(Made(takes=1e-3), budget_s=0.05).queued == 8  # a tenth of the budget


def test_every_call_is_started_and_numbered_and_the_last_is_handed_back():
    device = Made(takes=1e-3)
    found = measure(device, keep=3)
    assert device.started == len(device.numbers)
    assert device.numbers == list(range(len(device.numbers)))
    assert found.last == (found.number,)
    assert found.number == device.numbers[-1]
    assert found.before == (found.number - 1,)
    assert measure(Made(takes=1e-3)).before is None
    assert max(device.alive) == 3


def test_a_call_longer_than_a_batch_is_timed_once_for_both():
    device = Made(takes=0.5)
    found = measure(device, budget_s=1.0)
    assert found.queued == 1
    assert found.latency == found.throughput
    assert found.latency.median == pytest.approx(500, rel=1e-3)


def test_one_that_takes_longer_than_its_budget_is_still_timed():
    found = measure(Made(takes=8.0), budget_s=1.0)
    assert found.latency.count == 1
    assert found.latency.median == pytest.approx(8000, rel=1e-3)


def test_no_more_calls_are_queued_than_memory_allows():
    assert measure(Made(takes=1e-5), most=4).queued == 4


def test_unsteady_times_are_measured_until_the_budget_is_spent():
    steady, unsteady = Made(takes=1e-3), Made(takes=1e-3, every=2)
    measure(steady, budget_s=0.2)
    measure(unsteady, budget_s=0.2)
    assert len(unsteady.batches) > len(steady.batches)
    assert 0.1 < unsteady.now < 0.6


@pytest.mark.parametrize("takes", [2e-5, 1e-3, 0.1])
def test_a_wait_that_does_not_wait_is_found(takes):
    assert "read without waiting" in measure(Made(takes=takes, waits=False), most=256).fault


def test_a_wait_for_the_first_output_alone_is_found():
    class Two(Made):
        """Its second output is complete 2 ms after the first."""

        def call(self, number):
            return *super().call(number), "second"

        def peek(self, array):
            self.now = max(self.now, self.free + (2e-3 if array == "second" else 0))

    assert "read without waiting" in measure(Two(takes=1e-3)).fault


def test_garbage_is_collected_again_afterwards():
    import gc

    measure(Made(takes=1e-3))
    assert gc.isenabled()
