"""The clock against a device whose every moment is known."""

import pytest

from nanogpt_mac.train.clock import Clock

MS = 1_000_000


class Device:
    """A device that takes `work_ms` an iteration, one after the other, behind a host that takes `enqueue_ms`."""

    def __init__(self, work_ms, enqueue_ms, ahead=True):
        self.work, self.enqueue, self.ahead = work_ms * MS, enqueue_ms * MS, ahead
        self.host = 0
        self.wall_lead = 0
        self.queue_done = 0
        self.enqueued = 0

    def now(self):
        return self.host

    def wall(self):
        return self.host + self.wall_lead

    def step(self):
        self.host += self.enqueue
        self.queue_done = max(self.queue_done, self.host) + self.work
        if not self.ahead:
            self.host = self.queue_done
        self.enqueued += 1
        return self.queue_done

    def wait(self, done):
        self.host = max(self.host, done)
        return 1.0, 2.0

    def clock(self, policy="completion", **options):
        return Clock(self.wait, policy, now_ns=self.now, wall_ns=self.wall, ahead=self.ahead, **options)


def run(clock, device, first, last):
    done = []
    for i in range(first, last):
        done += clock.submit(i, device.step)
    return done + clock.drain()


@pytest.mark.parametrize("policy", ["completion", "iteration", "interval"])
def test_a_device_behind_the_host_is_timed_by_its_completions(policy):
    device = Device(work_ms=50, enqueue_ms=5)
    done = run(device.clock(policy, interval=4), device, 0, 41)
    assert [d.iteration for d in done] == list(range(41))
    counted = [d.iter_ms for d in done if d.left_out is None]
    expected = 55 if policy == "iteration" else 50  # waiting for each drains the queue: the host's 5 ms come on top
    assert len(counted) >= 36
    assert all(t == pytest.approx(expected, rel=0.03 if policy == "interval" else 0.001) for t in counted)
    assert {d.dispatch_ms for d in done} == {5.0}


def test_the_queue_is_never_drained_by_the_completion_policy():
    device = Device(work_ms=50, enqueue_ms=5)
    run(device.clock(), device, 0, 101)
    assert device.host == 101 * 50 * MS + 5 * MS + 5 * MS  # the first, alone, and the start of the second cost 5 each


def test_a_host_that_is_slower_than_the_device_is_what_is_timed():
    device = Device(work_ms=5, enqueue_ms=20)
    counted = [d.iter_ms for d in run(device.clock(), device, 0, 50) if d.left_out is None]
    assert all(t == pytest.approx(20) for t in counted)


@pytest.mark.parametrize("policy", ["completion", "iteration", "interval"])
def test_a_device_that_does_not_run_behind_is_timed_step_by_step(policy):
    device = Device(work_ms=30, enqueue_ms=1, ahead=False)
    done = run(device.clock(policy, interval=4), device, 0, 10)
    assert [d.left_out for d in done] == ["first"] + [None] * 9
    assert all(d.iter_ms == 31 for d in done)


def test_pauses_are_off_the_clock_and_their_edges_marked():
    device = Device(work_ms=50, enqueue_ms=5)
    clock = device.clock(warmup=2)
    done = run(clock, device, 0, 10)
    device.host += 9_000 * MS  # an evaluation
    done += run(clock, device, 10, 20)
    assert [d.left_out for d in done[:5]] == ["first", "warmup", "warmup", None, None]
    assert [d.left_out for d in done[9:12]] == ["drain", "restart", None]
    assert done[-1].left_out == "drain"
    assert max(d.iter_ms for d in done) < 60
    assert all(d.iter_ms == 50 for d in done if d.left_out is None)


def test_the_first_iteration_runs_alone():
    device = Device(work_ms=50, enqueue_ms=5)
    clock = device.clock()
    (first,) = clock.submit(0, device.step)
    assert (first.iteration, first.iter_ms, first.left_out) == (0, 55, "first")
    assert clock.submit(1, device.step) == []


def test_sleep_is_seen_by_the_wall_clock_and_left_out():
    device = Device(work_ms=50, enqueue_ms=5)
    clock = device.clock()
    done = [d for i in range(5) for d in clock.submit(i, device.step)]
    device.wall_lead = 3600 * 1000 * MS  # the monotonic clock stands still while a Mac sleeps
    done += [d for i in range(5, 10) for d in clock.submit(i, device.step)]
    assert [d.iteration for d in done if d.left_out == "slept"] == [4]


def test_loss_and_norm_come_with_their_own_iteration():
    values = iter(range(100))
    clock = Clock(lambda handle: (float(handle), 10.0 * handle), "interval", interval=3)
    done = [d for i in range(10) for d in clock.submit(i, lambda: next(values))] + clock.drain()
    assert [(d.iteration, d.loss, d.grad_norm) for d in done] == [(i, float(i), 10.0 * i) for i in range(10)]


def test_iterations_come_back_when_the_policy_says():
    """How many complete with each submit, of a device that runs behind, and whether any is held back at the end."""
    for policy, interval, expected in [
        ("completion", 1, [1, 0, 1, 1, 1, 1, 1, 1, 1]),
        ("iteration", 1, [1, 1, 1, 1, 1, 1, 1, 1, 1]),
        ("interval", 4, [1, 0, 0, 0, 4, 0, 0, 0, 4]),
        ("interval", 1, [1, 1, 1, 1, 1, 1, 1, 1, 1]),
    ]:
        device = Device(work_ms=50, enqueue_ms=5)
        clock = device.clock(policy, interval=interval)
        assert [len(clock.submit(i, device.step)) for i in range(9)] == expected
        assert len(clock.drain()) == 9 - sum(expected)


def test_what_is_not_said_is_every_iteration_of_a_device_that_runs_behind():
    device = Device(work_ms=50, enqueue_ms=5)
    each = Clock(device.wait, "interval", now_ns=device.now, wall_ns=device.wall)
    assert [len(each.submit(i, device.step)) for i in range(5)] == [1] * 5
    device = Device(work_ms=50, enqueue_ms=5)
    behind = Clock(device.wait, now_ns=device.now, wall_ns=device.wall)
    assert [len(behind.submit(i, device.step)) for i in range(5)] == [1, 0, 1, 1, 1]


@pytest.mark.parametrize(("gained", "slept"), [(1_000_000_000, []), (1_000_000_001, [4])])
def test_a_second_more_on_the_wall_is_sleep_whatever_the_clocks_began_at(gained, slept):
    device = Device(work_ms=1500, enqueue_ms=5)  # iterations of more than a second are no sleep
    device.host, device.wall_lead = 10**15, 1_790_000_000 * 10**9  # up for days, in the year 2026
    device.queue_done = device.host
    clock = device.clock()
    done = [d for i in range(5) for d in clock.submit(i, device.step)]
    device.wall_lead += gained
    done += [d for i in range(5, 10) for d in clock.submit(i, device.step)]
    assert [d.iteration for d in done if d.left_out == "slept"] == slept
    assert [d.iter_ms for d in done[2:]] == [1500.0] * 7
