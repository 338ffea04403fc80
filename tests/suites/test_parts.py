"""Where an iteration goes: the arithmetic by hand and by a clockwork, planted slow parts, and the suite as a whole."""

import importlib
import shutil
import sys
import time
from dataclasses import asdict

import pytest
import torch
from fakes.support import WITH_PARTS

from nanogpt_mac import cli
from nanogpt_mac.backends import kinds
from nanogpt_mac.backends.parts import NAMES
from nanogpt_mac.config import Config
from nanogpt_mac.errors import InputError
from nanogpt_mac.gpt.spec import GPTSpec
from nanogpt_mac.measure import calls
from nanogpt_mac.records.bench import State, Task, Way
from nanogpt_mac.records.parts import ITERATION, Account, Figure, PartCost, PartReading, PartsBench
from nanogpt_mac.records.run import Times
from nanogpt_mac.report import show
from nanogpt_mac.suites import parts
from nanogpt_mac.suites.account import account, accounts, differences, reason

WAY = Way(name="x", label="X", backend="cpu", device="cpu")
COMPILED = WAY.model_copy(update={"compiled": True})


def times(ms, spread=0.01):
    return Times(median=ms, ci95=(ms * (1 - spread), ms * (1 + spread)), count=9)


def read(row, forward, both=None, number=0, **more):
    made = {"forward": times(forward), "both": both and times(both)} | more
    return PartReading(row=row, way="x", round=number, state=State.OK, **made)


def lines(found):
    return {each.name: pytest.approx(each.ms) for each in found.left}


# -- an account -------------------------------------------------------------------------------------------------------


def test_a_parts_cost_is_its_places_times_the_median_of_its_rounds():
    rounds = [read("MLP", 2.0, 5.0, 0, times=6), read("MLP", 2.2, 5.6, 1, times=6), read("MLP", 1.9, 5.3, 2, times=6)]
    (cost,) = account(WAY, [*rounds, read(ITERATION, 40.0)]).parts
    assert cost.forward.ms == 6 * 2.0
    assert cost.backward.rounds == pytest.approx({0: 18.0, 1: 20.4, 2: 20.4})
    assert (cost.forward.low, cost.forward.high) == pytest.approx((6 * 1.9 * 0.99, 6 * 2.2 * 1.01))
    assert cost.backward.ms == pytest.approx(6 * 3.4)  # of 3.0, 3.4 and 3.4
    assert cost.backward.low == pytest.approx(6 * (5.0 * 0.99 - 2.0 * 1.01))
    assert cost.backward.high == pytest.approx(6 * (5.6 * 1.01 - 2.2 * 0.99))


def test_parts_and_what_is_left_over_are_the_iteration():
    parts = [read("attention", 1.0, 4.0, times=3), read("clip", 0.5)]  # 12.5 ms
    assert lines(account(WAY, [*parts, read(ITERATION, 14.0)])) == {"host, casts, caches": 1.5}
    assert lines(account(WAY, [*parts, read(ITERATION, 11.0)])) == {"less than each alone": -1.5}
    assert lines(account(COMPILED, [*parts, read(ITERATION, 11.0)])) == {"fusion across parts": -1.5}
    ahead = {"queued": 18.0, "dispatch": 2.0, "launch": 0.01}
    waits = lines(account(WAY, [*parts, read(ITERATION, 20.0, **ahead)]))
    assert waits == {"waits": 2.0, "host, casts, caches": 5.5}
    counted = [r.model_copy(update={"counts": {"kernels": 40}}) for r in parts]  # 160 in an iteration
    found = account(WAY, [*counted, read(ITERATION, 20.0, counts={"kernels": 361}, **ahead)])
    assert lines(found) == {"waits": 2.0, "201 kernel launches between the parts": 2.01, "host, casts, caches": 3.49}
    slow_host = account(WAY, [*parts, read(ITERATION, 20.0, **ahead | {"dispatch": 17.0})])
    assert lines(slow_host) == {"waits": 2.0, "host, slower than the device": 5.5}
    for each in (found, slow_host):
        assert each.total + sum(line.ms for line in each.left) == pytest.approx(each.iteration.ms)


@pytest.mark.parametrize("state", [State.FAILED, State.WRONG, State.SKIPPED])
def test_without_a_whole_measurement_there_is_no_account(state):
    lost = PartReading(row="clip", way="x", round=0, state=state, reason="out of memory")
    found = account(WAY, [read(ITERATION, 9.0), read("MLP", 1.0, 2.0), lost])
    assert (found.iteration, found.why_not) == (None, "clip: out of memory")
    absent = PartReading(row="dropout masks", way="x", round=0, state=State.ABSENT, reason="an iteration has none here")
    later = [read("clip", 1.0), lost.model_copy(update={"state": State.SKIPPED, "round": 1})]
    assert account(WAY, [read(ITERATION, 9.0), absent, *later]).iteration.ms == 9.0  # one round is enough
    assert account(WAY, [absent]).why_not == "an iteration has none here"


def test_what_was_not_measured_is_said_with_the_reason():
    lost = PartReading(row=ITERATION, way="x", round=0, state=State.FAILED, reason="it has no memory left")
    bench = PartsBench(suite="parts", created="2026-11-27T00:00:00", version="0.1", seconds=1, complete=False, seed=1,
                       rounds=1, ways=(WAY,), rows=(ITERATION, "MLP"), readings=(lost,))  # fmt: skip
    report = parts.report(bench)
    assert "X: failed: iteration: it has no memory left" in show.markdown(report)
    assert report.alarms == ["It is not complete: what is missing is listed as skipped."]


def test_a_model_that_does_not_fit_the_corpus_is_bad_input():
    config = cli.compose(["suite=parts", "ways=[cpu]", "model.vocab_size=1", "data=stand_in"], "bench")
    with pytest.raises(InputError, match="vocab_size=1: data=stand_in has 65 symbols"):
        parts.SUITE.plan(config)


# -- two accounts -----------------------------------------------------------------------------------------------------


class Clockwork:
    """Parts that take just so many ms, and the device and the clock that say so."""

    def __init__(self, parts):
        self.now, self.parts = 0.0, parts

    def call(self, ms):
        def advance(number):
            self.now += ms / 1e3
            return (number,)

        return advance

    def start(self, outputs):
        pass

    wait = start

    def peek(self, array):
        return 0.0

    def timed(self, ms):
        found = calls.measure(self.call(ms), self, 1.0, clock=lambda: self.now).throughput
        return found.model_copy(update={"ci95": (0.98 * found.median, 1.02 * found.median)})

    def account(self, name="x"):
        readings = [read(ITERATION, sum(map(sum, self.parts.values())))]
        for part, (forward, backward) in self.parts.items():
            for number in range(2):
                found = {"forward": self.timed(forward), "both": self.timed(forward + backward)}
                readings.append(PartReading(row=part, way="x", round=number, state=State.OK, **found))
        return account(WAY, readings).model_copy(update={"name": name, "label": name.upper()})


TAKES = {"embedding": (0.2, 0.3), "layer norms": (1.0, 1.5), "attention": (5.0, 11.0), "MLP": (7.0, 14.0),
         "head and loss": (1.2, 2.0)}  # fmt: skip


@pytest.mark.parametrize("slow", TAKES)
@pytest.mark.parametrize("direction", [0, 1])
def test_a_part_that_is_a_fifth_slower_is_named(slow, direction):
    forward, backward = TAKES[slow]
    planted = (1.2 * forward, backward) if direction == 0 else (forward, 1.2 * backward)
    base, other = Clockwork(TAKES).account("a"), Clockwork(TAKES | {slow: planted}).account("b")
    (cause,) = differences(base, other)
    assert cause.name == f"{slow} {('forward', 'backward')[direction]}"
    assert cause.ms == pytest.approx(0.2 * TAKES[slow][direction])
    assert differences(base, Clockwork(TAKES).account()) == ()
    assert differences(other, base)[0].ms == pytest.approx(-cause.ms)


@pytest.mark.parametrize(("off", "clear"), [((1.0, 1.2, 0.9, 1.1), True), ((1.0, -1.2, 0.9, -0.8), False),
                                            ((0.05, 0.05, 0.05, 0.05), False)])  # fmt: skip
def test_rounds_are_paired(off, clear):
    """What moves both from round to round says nothing, and neither does a difference below a hundredth."""
    levels = (10.0, 14.0, 9.0, 30.0)
    base = account(WAY, [read("MLP", ms, number=n) for n, ms in enumerate(levels)] + [read(ITERATION, 40.0)])
    other = account(WAY, [read("MLP", ms + off[n], number=n) for n, ms in enumerate(levels)] + [read(ITERATION, 40.0)])
    assert bool(differences(base, other)) is clear


def figure(ms):
    return Figure(ms=ms, low=ms * 0.99, high=ms * 1.01)


def test_the_sentence_names_what_matters():
    def made(label, iteration, attention, norms, mlp, **more):
        parts = (
            PartCost(name="attention", times=6, forward=figure(20.0), backward=figure(attention)),
            PartCost(name="layer norms", times=13, forward=figure(norms), kernels=361),
            PartCost(name="MLP", times=6, forward=figure(mlp)),
        )
        return Account(name=label, label=label, iteration=figure(iteration), parts=parts, **more)

    mlx = made("MLX", 200.0, 60.0, 1.0, 50.0)
    mps = made("MPS eager", 262.0, 101.0, 13.0, 54.0, launch=0.033)
    said = reason(mlx, mps, "MLX is 1.3 x as fast as MPS eager")
    assert said.sentence == (
        "MLX is 1.3 x as fast as MPS eager: of 62.00 ms difference 41.00 lie in attention backward, "
        "12.00 in 361 kernel launches (layer norms), 4.000 in MLP."
    )
    assert [(c.name, round(c.ms)) for c in said.causes] == [
        ("attention backward", 41), ("361 kernel launches (layer norms)", 12), ("MLP", 4),
    ]  # fmt: skip
    ahead = reason(mlx, made("MPS eager", 262.0, 101.0, 13.0, 40.0, launch=0.033), "MLX is 1.3 x as fast")
    assert ahead.sentence.endswith(" MPS eager is ahead by 10.00 ms in MLP.")
    assert "too close together" in reason(mlx, made("MPS eager", 201.0, 60.0, 1.0, 50.0), "as").sentence
    lost = Account(name="b", label="B", why_not="MLP: out of memory")
    assert "the parts of B were not measured (MLP: out of memory)" in reason(mlx, lost, "as").sentence


# -- planted, in each framework ---------------------------------------------------------------------------------------

PLACES = {
    "embedding": (("GPT", "embed"),), "layer norms": (("LayerNorm", ""),), "attention": (("CausalSelfAttention", ""),),
    "MLP": (("MLP", ""),), "head and loss": (("GPT", "head"), ("", "mean_nats")),
}  # fmt: skip
OF_JAX = {"layer norms": "norm", "attention": "attention", "MLP": "mlp"}  # whose twin is one class
ROUNDS = 20
EVERY = 5  # calls: one of them computes twice, so the part takes a fifth more; so many are timed together


def slowed(own):
    count = [0]

    def slower(*given):
        count[0] += 1
        return (own(*given) + own(*given)) / 2 if count[0] % EVERY == 0 else own(*given)

    return slower


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in WITH_PARTS if n != "tinygrad"])  # where the plant takes no longer
@pytest.mark.parametrize("part", PLACES)
def test_a_part_that_is_a_fifth_slower_is_named_in_each_framework(make, starts, monkeypatch, name, part):
    """On a CPU it is the processor's time that counts, not a busy machine's."""
    torch.set_num_threads(1)
    spec = GPTSpec(n_layer=2, n_head=2, n_embd=64, block_size=32, vocab_size=65)
    backend, at = make(name, spec=spec, compile=False), starts(0)  # a fault cannot be planted in what is compiled
    places = PLACES | ({part: (("GPT", method),) for part, method in OF_JAX.items()} if name == "jax" else {})
    clock = time.perf_counter if backend.runs_ahead else time.process_time
    twin = importlib.import_module(type(backend.model).__module__)
    of_parts = importlib.import_module(type(looked_at := backend.parts(at)).__module__)

    def plant(patched):
        for of_class, method in places[part]:
            for at in [getattr(twin, of_class)] if of_class else [m for m in (twin, of_parts) if hasattr(m, method)]:
                named = method or ("forward" if hasattr(at, "forward") else "__call__")
                patched.setattr(at, named, slowed(getattr(at, named)))

    def measured(each, number):
        found = {}
        for key, call in (("forward", each.forward), ("both", each.both)):
            if call is not None:

                def some(number, call=call):
                    return [output for _ in range(EVERY) for output in call(number)]

                found[key] = calls.measure(some, looked_at, 0.02, clock=clock).throughput
        return PartReading(row=each.name, way="x", round=number, state=State.OK, times=each.times, **found)

    found = {False: [read(ITERATION, 9.0)], True: [read(ITERATION, 9.0)]}
    for number in range(ROUNDS):
        for each in looked_at.parts.values():  # one right after the other, as what disturbs them changes
            for planted in (False, True) if number % 2 else (True, False):
                with monkeypatch.context() as patched:
                    if planted:
                        plant(patched)
                    found[planted].append(measured(each, number))
    causes = differences(account(WAY, found[False]), account(WAY, found[True]))
    assert causes, part
    assert causes[0].name.removesuffix(" forward").removesuffix(" backward") == part, causes
    assert causes[0].ms > 0


# -- the suite --------------------------------------------------------------------------------------------------------


def task(way, round=0, **overrides):
    """All parts of a small model on `way`, timed as briefly as can be."""
    given = [f"{key}={value}" for key, value in overrides.items()]
    config = cli.compose(["experiment=smoke", "data=stand_in", f"backend={way.backend}", *given])
    work = {"configs": {way.name: asdict(config)}}
    return Task(suite="parts", way=way, rows=parts.ROWS, round=round, row_s=0.02, folder="", work=work)


def bench(way, readings):
    return PartsBench(suite="parts", created="", version="", seconds=1.0, complete=True, seed=1, rounds=1, ways=(way,),
                      rows=parts.ROWS, readings=readings)  # fmt: skip


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in ("tinygrad", "jax") else n for n in WITH_PARTS]
)
def test_the_suite_says_where_an_iteration_goes(name):
    here = kinds.KINDS[name]
    way = Way(name=name, label="This", backend=name, device=here.load().device_of(here))
    measure = parts.SUITE.measuring(task(way, gradient_accumulation_steps=2))
    readings = [measure(row) for row in parts.ROWS]
    absent = [r.row for r in readings if r.state is State.ABSENT]
    assert absent == ["dropout masks", "casts"]
    (found,) = accounts(bench(way, readings))
    assert [part.name for part in found.parts] == [each for each in NAMES if each not in absent]
    assert found.total + sum(line.ms for line in found.left) == pytest.approx(found.iteration.ms)
    assert all(part.forward.ms > 0 for part in found.parts)
    assert bool(found.inside_iteration) is (name == "cpu")
    assert found.not_inside or all(part.inside for part in found.parts)
    report = parts.SUITE.report(bench(way, readings))
    text = show.markdown(report)
    assert report.verdict.startswith("An iteration: This ")
    assert all(word in text for word in ("all parts", "layer norms", "iteration", "attention has both projections"))
    later = parts.SUITE.measuring(task(way, round=1))
    assert later("clip").inside is None  # the profiler is asked once


def test_a_back_end_that_gives_no_parts_is_absent():
    measured = object.__new__(parts._Measured)
    measured.task = task(WAY)
    measured.parts = None
    found = measured.reading("MLP")
    assert (found.state, found.reason) == (State.ABSENT, "X gives no parts")


def test_a_key_that_another_suite_has_for_itself_is_train_pys():
    given = cli.compose(
        ["suite=parts", "experiment=smoke", "data=stand_in", "ways=[cpu]", "gradient_accumulation_steps=3"], "bench"
    )
    own = given.sync  # suite=mlp's: batch or epoch
    (config,) = parts.SUITE.plan(given).work["configs"].values()
    assert config["sync"] == Config().sync != own
    assert (config["gradient_accumulation_steps"], config["batch_size"]) == (3, given.batch_size)


@pytest.mark.slow
def test_a_part_that_is_not_there_is_one_line(command):
    done = command("bench.py", "suite=parts", "rows=softmax", "ways=[cpu]", "data=stand_in")
    assert done.returncode == 2
    assert "rows=softmax: no part is called so; use a part of a name such as iteration, batch" in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(
    sys.platform != "linux" or not shutil.which("g++"), reason="the simulated device needs Linux and g++"
)
def test_the_simulated_device_counts_kernels_and_waits(command, tmp_path):
    done = command("bench.py", "suite=parts", "ways=[mps]", "experiment=smoke", "data=stand_in", "rounds=1",
                   "run_dir=out", NANOGPT_MAC_SIMULATE_MPS="1", timeout=300)  # fmt: skip
    assert done.returncode == 0, done.stderr + (tmp_path / "out" / "bench.json").read_text()
    (found,) = accounts(PartsBench.load(tmp_path / "out" / "bench.json"))
    kernels = {part.name: part.kernels for part in found.parts}
    assert kernels["layer norms"] % 5 == 0
    assert kernels["attention"] > kernels["residual sums"] > 0
    assert 0 < sum(kernels.values()) <= found.kernels
    assert found.waits == 1  # the loss is read once
    assert all(part.waits == 0 and part.forward is None for part in found.parts)
    assert "what an iteration has the device do" in (tmp_path / "out" / "report.md").read_text()
    assert "kernels and 1 wait" in (tmp_path / "out" / "report.html").read_text()
