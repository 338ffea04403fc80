"""The loop with a back end that computes nothing and writes down what it is asked."""

import math
from contextlib import contextmanager

import numpy as np
import pytest

from nanogpt_mac.backends.base import Tokens
from nanogpt_mac.backends.world import World
from nanogpt_mac.config import Config
from nanogpt_mac.corpus.batches import starts
from nanogpt_mac.train.loop import Loop
from nanogpt_mac.train.schedule import learning_rate

LENGTHS = {"train": 1000, "val": 200}
BLOCK = 8
TOKENS = Tokens({split: np.zeros(length, np.uint16) for split, length in LENGTHS.items()}, BLOCK)


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    monkeypatch.setattr("nanogpt_mac.train.loop.probe.power_source", lambda: "sun")
    monkeypatch.setattr("nanogpt_mac.train.loop.probe.thermal_state", lambda: None)
    monkeypatch.setattr("nanogpt_mac.train.loop.probe.gpu_utilisation", lambda: 3)


class Device:
    """Losses as a test gives them, `held` bytes an iteration; `asked` has every step and evaluation in order."""

    held, eval_chunk = None, 10

    def __init__(self, val_losses=(), losses=(), train_loss=9.0, ahead=False):
        self.runs_ahead, self.world = ahead, World()
        self.val_losses, self.losses, self.train_loss = iter(val_losses), list(losses), train_loss
        self.asked, self.val_batches = [], []

    def step(self, windows, lr):
        self.asked.append(("step", windows.tolist(), lr))
        return sum(kind == "step" for kind, *_ in self.asked) - 1

    def wait(self, number):
        return (self.losses[number] if number < len(self.losses) else 1.0), 0.5

    def evaluate(self, split, windows):
        self.asked.append((split, windows.tolist()))
        if split == "train":
            return self.train_loss
        return next(self.val_losses, 1.0)

    def memory(self):
        return {"current": 1, "peak": 2}

    def iteration_bytes(self):
        return self.held

    def free_memory(self):
        return 100


class Records:
    """A recorder that remembers."""

    def __init__(self, overdue=()):
        self.rows, self.evaluations, self.events = [], [], []
        self.flushes, self.ticks, self._overdue = 0, 0, iter(overdue)

    def iteration(self, done, lr, memory):
        assert memory == {"current": 1, "peak": 2}
        self.rows.append((done, lr))

    def evaluation(self, iteration, train_loss, val_loss, seconds):
        self.evaluations.append((iteration, train_loss, val_loss, seconds))

    def event(self, name, iteration, **facts):
        self.events.append((name, iteration, facts))

    def flush(self):
        self.flushes += 1

    def tick(self):
        self.ticks += 1

    def overdue(self):
        return next(self._overdue, False)


class Run:
    """One loop over a Device, and what it left behind."""

    def __init__(self, device, start=0, best=math.inf, stop=lambda: None, save=True, overdue=(), **config):
        recipe = {"max_iters": 4, "eval_interval": 1, "eval_iters": 1, "batch_size": 2, "timing_warmup": 0}
        self.config, self.device, self.records, self.saved = Config(**recipe | config), device, Records(overdue), []
        self.order = []
        loop = Loop(
            self.config,
            device,
            TOKENS,
            self.records,
            self.saving if save else None,
            stop,
            best,
        )
        self.ended = loop.train(start)
        self.best = loop.best

    @contextmanager
    def saving(self):
        self.order.append(("begun", len(self.device.asked)))
        yield lambda best, is_best: self.saved.append((best, is_best))
        self.order.append(("ended", len(self.device.asked)))


TINY = 2.0**-40


@pytest.mark.parametrize(
    ("later", "is_best"),
    [(2.0 - TINY, True), (2.0, False), (2.0 + TINY, False), (2.009, False), (1.991, True), (math.nan, False)],
)
def test_best_is_the_lowest_loss_and_an_equal_one_is_not_better(later, is_best):
    """However small the difference: a checkpoint called best is never worse than the one it replaces."""
    run = Run(Device(val_losses=[5.0, 2.0, later]), max_iters=2)
    assert run.saved == [(2.0, True), (later if is_best else 2.0, is_best)]
    assert run.best == min(2.0, later)


def test_best_over_many_evaluations_is_the_running_minimum():
    losses = [3.0, 2.5, 2.6, 2.5, 2.5 - TINY, 2.5, 2.4, 2.4 + TINY]
    run = Run(Device(val_losses=losses), max_iters=7)
    assert run.saved == [(min(losses[: i + 1]), losses[i] < min(losses[:i])) for i in range(1, 8)]


@pytest.mark.parametrize(("first", "is_best"), [(1.5, False), (1.5 - TINY, True), (1.5 + TINY, False)])
def test_a_resumed_run_is_held_against_the_best_so_far(first, is_best):
    run = Run(Device(val_losses=[9.0, first]), start=3, best=1.5, max_iters=4, init_from="resume")
    assert run.saved == [(min(1.5, first), is_best)]


def test_weights_that_start_better_are_saved_at_once_and_fresh_ones_never():
    """Iteration 0 of loaded weights is worth a checkpoint where it is the best; of drawn weights nothing is learnt."""
    assert Run(Device(val_losses=[1.0, 2.0]), max_iters=1, init_from="gpt2").saved == [(1.0, True), (1.0, False)]
    assert Run(Device(val_losses=[1.0, 2.0]), max_iters=1, init_from="gpt2", best=0.5).saved == [(0.5, False)]
    assert Run(Device(val_losses=[1.0, 2.0]), max_iters=1).saved == [(1.0, False)]


def test_a_checkpoint_is_written_while_its_state_is_evaluated_and_no_longer():
    """`order` is by what the device was asked so far: an evaluation is two requests, an iteration one."""
    assert Run(Device(), max_iters=2).order == [("begun", 3), ("ended", 5), ("begun", 6), ("ended", 8)]
    assert Run(Device(), max_iters=2, eval_interval=0).order == [("begun", 2), ("ended", 2)]
    loaded = Run(Device(val_losses=[1.0, 2.0]), max_iters=1, init_from="gpt2", best=0.5)
    assert loaded.order == [("begun", 0), ("ended", 2), ("begun", 3), ("ended", 5)]  # the first is not completed
    assert Run(Device(), max_iters=2, save=False).order == []


def test_steps_take_the_batches_and_rates_of_their_iteration():
    run = Run(Device(), start=2, max_iters=6, eval_interval=0, gradient_accumulation_steps=3, warmup_iters=4)
    steps = [entry for entry in run.device.asked if entry[0] == "step"]
    for i, (_, windows, lr) in enumerate(steps, 2):
        expected = starts(run.config.seed, i, "train", 6, LENGTHS["train"], BLOCK).reshape(3, 2)
        assert windows == expected.tolist()
        assert lr == learning_rate(run.config, i)
    assert [done.iteration for done, _ in run.records.rows] == [2, 3, 4, 5]
    assert [lr for _, lr in run.records.rows] == [lr for *_, lr in steps]
    assert run.ended == "finished"


@pytest.mark.parametrize("sync", ["completion", "iteration", "interval"])
def test_each_row_has_its_own_rate_on_a_device_that_runs_behind(sync):
    losses = [float(i) for i in range(11)]
    run = Run(Device(losses=losses, ahead=True), max_iters=11, eval_interval=4, sync=sync, log_interval=3)
    assert [(done.iteration, done.loss) for done, _ in run.records.rows] == list(enumerate(losses))
    assert [lr for _, lr in run.records.rows] == [learning_rate(run.config, i) for i in range(11)]


@pytest.mark.parametrize(("held", "most"), [(None, 2), (100, 2), (101, 1)])
def test_where_two_iterations_do_not_fit_each_is_waited_for(held, most):
    """The device has 100 bytes left. `under_way` is how many are enqueued and not waited for, at each moment."""
    device, order = Device(ahead=True), []
    device.held, step, wait = held, device.step, device.wait
    device.step = lambda *given: order.append("step") or step(*given)
    device.wait = lambda number: order.append(number) or wait(number)
    run = Run(device, max_iters=6, eval_interval=0, sync="completion")
    under_way = [order[:i].count("step") - len(set(order[:i]) - {"step"}) for i in range(len(order) + 1)]
    assert max(under_way) == most
    facts = {"iteration_memory": {"bytes": held}, "one_in_flight": {"bytes": held}}
    expected = list(facts)[: 0 if held is None else 3 - most]
    assert [(name, given) for name, _, given in run.records.events if name in facts] == [
        (n, facts[n]) for n in expected
    ]


@pytest.mark.parametrize("chunk", [10, 50])
def test_an_evaluation_is_the_mean_over_its_own_batches_some_at_a_time(chunk):
    device, batches = Device(val_losses=[1.0, 2.0, 4.0], train_loss=3.0), 2 * chunk + 3
    device.eval_chunk = chunk
    run = Run(device, max_iters=1, eval_interval=2, eval_iters=batches)
    iteration, train_loss, val_loss, seconds = run.records.evaluations[0]
    assert (iteration, train_loss, val_loss) == (0, 3.0, pytest.approx((chunk * 1 + chunk * 2 + 3 * 4) / batches))
    assert 0 <= seconds < 60
    for split in ("train", "val"):
        drawn = [windows for kind, windows, *_ in run.device.asked if kind == split][:3]
        assert [len(some) for some in drawn] == [chunk, chunk, 3]
        expected = starts(run.config.seed, 0, f"eval-{split}", 2 * batches, LENGTHS[split], BLOCK).reshape(batches, 2)
        assert [start for some in drawn for start in some] == expected.tolist()


def test_evaluations_come_at_the_interval_and_at_the_end():
    assert [e[0] for e in Run(Device(), max_iters=7, eval_interval=3).records.evaluations] == [0, 3, 6, 7]
    assert [e[0] for e in Run(Device(), max_iters=6, eval_interval=3).records.evaluations] == [0, 3, 6]
    never = Run(Device(), max_iters=6, eval_interval=0)
    assert never.records.evaluations == []
    assert never.saved == [(math.inf, False)]  # the last weights are kept all the same
    assert [event[:2] for event in never.records.events] == [("pause", 6)]
    assert never.records.events[0][2] == {"power_source": "sun", "thermal_state": None, "gpu_utilisation": 3}
    assert Run(Device(), save=False).saved == []


def test_records_are_written_at_each_pause_and_rows_as_they_come():
    run = Run(Device(), max_iters=6, eval_interval=3)
    assert run.records.flushes == 3
    assert run.records.ticks >= 6
    late = Run(Device(), max_iters=6, eval_interval=0, overdue=[False, False, True])
    assert [event[:2] for event in late.records.events] == [("pause", 2), ("pause", 6)]
    assert late.records.evaluations == []
    assert late.saved == [(math.inf, False)]  # such a pause is for the records alone


def test_a_signal_ends_the_run_before_the_next_iteration_with_a_checkpoint():
    device = Device(val_losses=[3.0, 2.0, 1.0])
    stop = lambda: 15 if sum(kind == "step" for kind, *_ in device.asked) >= 2 else None  # noqa: E731
    run = Run(device, stop=stop, max_iters=9, eval_interval=2)
    assert run.ended == "stopped"
    assert [done.iteration for done, _ in run.records.rows] == [0, 1]
    assert [e[0] for e in run.records.evaluations] == [0]  # nobody waits for one after a signal
    assert run.saved == [(3.0, False)]


def test_a_signal_during_an_evaluation_leaves_it_out():
    """The rest of it, too; the iteration that it came before is still made, and kept."""
    device = Device(val_losses=[3.0] * 9)
    stop = lambda: 2 if len(device.asked) >= 3 else None  # noqa: E731
    run = Run(device, stop=stop, max_iters=9, eval_interval=2, eval_iters=30)
    assert run.ended == "stopped"
    assert run.records.evaluations == []
    assert [kind for kind, *_ in device.asked] == ["train", "train", "train", "step"]
    assert run.saved == [(math.inf, False)]


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("ahead", [True, False])
def test_a_loss_that_is_no_number_ends_the_run_without_a_checkpoint(loss, ahead):
    run = Run(Device(losses=[1.0, 1.0, loss], ahead=ahead), max_iters=9, eval_interval=0)
    assert run.ended == "diverged"
    assert run.saved == []
    name, iteration, facts = run.records.events[-1]
    assert (name, iteration, str(facts["loss"])) == ("diverged", 2, str(loss))
    assert [done.iteration for done, _ in run.records.rows] == [0, 1, 2]
    assert Run(Device(losses=[1.0, loss], ahead=ahead), max_iters=2, eval_interval=0).ended == "diverged"


def test_a_resumed_run_begins_with_an_evaluation_and_ends_with_one():
    run = Run(Device(val_losses=[3.0, 2.0]), start=2, max_iters=3, init_from="resume")
    assert [e[:3] for e in run.records.evaluations] == [(2, 9.0, 3.0), (3, 9.0, 2.0)]
