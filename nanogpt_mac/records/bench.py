"""What `bench.py` measured: every row on every way of computing it, round by round."""

from __future__ import annotations

from enum import StrEnum
from typing import Any

from pydantic import SerializeAsAny

from nanogpt_mac.records.base import Amount, Count, Document, Record
from nanogpt_mac.records.run import Environment, Times


class State(StrEnum):
    """What became of a row on a way."""

    OK = "ok"
    WRONG = "wrong"  # its result, or its time, cannot be right
    SKIPPED = "skipped"  # not tried: memory, the budget
    ABSENT = "absent"  # this way does not have it
    FAILED = "failed"  # an error, a crash, a hang


class Way(Record):
    """One way of computing: a back end's variant on one device or, without a `backend`, something of a suite's own."""

    name: str
    label: str
    backend: str = ""
    device: str = ""
    compiled: bool = False
    accelerator: bool = False
    simulated: bool = False  # its times mean nothing


class Task(Record):
    """What a child process is asked: these rows, on one way."""

    suite: str
    way: Way
    rows: tuple[str, ...]
    round: Count
    row_s: Amount  # that timing one row may take
    folder: str  # for what the children of one run share, gone when it ends
    work: dict[str, Any]  # the suite's own, which it validates


class Reading(Record):
    """One row on one way in one round. A suite's own class has figures more, each with a default."""

    row: str
    way: str
    round: Count
    state: State
    reason: str = ""  # why it is not OK, in a few words
    spent: dict[str, Amount] = {}  # seconds, by what for, as far as that is told apart


class Calls(Reading):
    """A function that was called many times: milliseconds a call."""

    throughput: Times | None = None  # queued behind each other, one wait for many
    latency: Times | None = None  # one call, one wait
    counts: dict[str, Count] | None = None  # of one call, on a simulated device, in place of times


class Bench(Document):
    """bench.json."""

    suite: str
    created: str
    version: str
    seconds: Amount
    complete: bool  # False: the budget was spent, or it was stopped
    seed: Count
    rounds: Count
    environment: Environment | None = None
    ways: tuple[Way, ...]
    missing: dict[str, str] = {}  # back end -> why it cannot run here
    rows: tuple[str, ...]
    work: dict[str, Any] = {}
    readings: tuple[SerializeAsAny[Reading], ...] = ()
    spent: dict[str, Amount] = {}  # seconds, by what for: of all processes, one after the other


class OpReading(Calls):
    """suite=ops: one operation."""

    cold: bool = False  # its inputs and outputs rotate past the last cache
    copies: Count = 0  # that they rotate over
    queued: Count = 0  # calls in a batch of `throughput`
    error: Amount | None = None  # of the last timed call, in units of what float32 may lose: 1 would be wrong
    deterministic: bool | None = None  # whether two calls gave the same bits; None: too large to be asked
    careless: str = ""  # of a right result: where it has lost more than it had to
    floor_ms: Amount | None = None  # what moving its bytes takes here, at least


class OpsBench(Bench):
    readings: tuple[OpReading, ...] = ()


class GemmReading(OpReading):
    """suite=gemm: one matrix product. `error` is of its root mean square, in units of what float32 sums may lose."""

    library: str = ""  # whose product it is
    coarse: bool = False  # of 16 bits: it sums in less than float32


class GemmBench(OpsBench):
    readings: tuple[GemmReading, ...] = ()


class Outcome(StrEnum):
    """What an operation made of a dtype."""

    OK = "ok"
    PROMOTES = "promotes"  # the result has another dtype, and is right
    COARSER = "float32 inside"  # float64 in name, and right as far as float32 goes
    REFUSED = "refused"
    ON_CPU = "on the CPU"  # a fallback was counted
    WRONG = "wrong"
    ERROR = "error"
    MEMORY = "out of memory"
    CRASHED = "crashed"  # or hung: its process gave no answer


class DtypeReading(Reading):
    """suite=ops dtypes=true: one operation in one dtype. `reason` is the framework's own text where it has one."""

    outcome: Outcome = Outcome.CRASHED
    became: str = ""  # the dtype of its result


class DtypeBench(Bench):
    readings: tuple[DtypeReading, ...] = ()


class NetReading(Reading):
    """suite=mlp, suite=lm: one network, trained or asked, in one process: a run."""

    batch: Count = 0  # rows of a step of training
    epochs_s: tuple[Amount, ...] = ()  # seconds of each timed epoch, in their order; of suite=lm, of so many iterations
    median_s: Amount | None = None  # of `epochs_s`
    calls: Times | None = None  # of inference: milliseconds a call
    run_s: Amount | None = None  # all of them and what lay between
    cpu: Amount | None = None  # seconds of process CPU time per second of the epochs
    gpu: Amount | None = None  # share of the time in which the GPU was busy, 0 to 1
    accuracy: Amount | None = None  # on the test images after the epoch that was checked
    accuracy_last: Amount | None = None  # after the last
    distance: Amount | None = None  # from float64's weights after the checked epoch, relative
    distance_last: Amount | None = None  # the same of the last timed epoch; None: too many steps for it
    counts: dict[str, Count] | None = None  # of one epoch, on a simulated device, in place of times


class NetBench(Bench):
    readings: tuple[NetReading, ...] = ()
