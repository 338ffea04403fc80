"""Whether two runs of a suite came to the same figures: `python report.py runs/bench-ops-1 runs/bench-ops-2`."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanogpt_mac.errors import InputError
from nanogpt_mac.measure.times import order_interval, summary
from nanogpt_mac.records.base import DamagedError
from nanogpt_mac.records.bench import Bench, NetReading, Reading, State
from nanogpt_mac.records.run import Times
from nanogpt_mac.report.table import Report, Row, Section, Table
from nanogpt_mac.report.words import DASH, beside, interval, ms, percent, ratio, when
from nanogpt_mac.suites.contents import BAD, Found, found_of
from nanogpt_mac.suites.run import suite_of

if TYPE_CHECKING:
    from nanogpt_mac.report.charts import Chart

FILE = "bench.json"
NOTHING = "They have no figure in common."
WANTED = 0.95  # of the figures that two runs should agree in


def report(paths: Sequence[str]) -> tuple[Report, dict[str, list[Chart]]]:
    """Of one folder of bench.py its report, made anew; of two, how far they agree. InputError for any others."""
    benches = [_read(Path(path)) for path in paths]
    if len(benches) > 2:
        raise InputError(f"{paths[2]}: two runs of bench.py are held against each other; name two folders")
    one, *others = benches
    if not others:
        from nanogpt_mac.report import svg  # matplotlib

        suite = suite_of(one.suite)
        with svg.style():
            return suite.report(one), suite.charts(one)
    if one.suite != (other := others[0]).suite:
        raise InputError(f"{paths[1]}: is of suite={other.suite}, not of suite={one.suite}; use two of one suite")
    return _compared(one, other), {}


def _read(folder: Path) -> Bench:
    try:
        name = json.loads((folder / FILE).read_text(encoding="utf-8"))["suite"]
        return suite_of(name).document.load(folder / FILE)
    except FileNotFoundError:
        raise InputError(f"{folder}: has no {FILE}; use folders of bench.py alone, or of the others") from None
    except (OSError, ValueError, KeyError, TypeError, DamagedError) as error:
        raise InputError(f"{folder}: {FILE} cannot be read ({error}); run the suite again") from error


@dataclass(frozen=True)
class Pair:
    """One figure of both runs; `ratio` is of the second to the first."""

    row: str
    way: str
    figure: str
    one: Found
    other: Found

    @property
    def ratio(self) -> float:
        return self.other.value / self.one.value

    @property
    def agrees(self) -> bool | None:
        """Whether the intervals have something in common; None where one of them has none."""
        a, b = self.one.bounds, self.other.bounds
        return None if a is None or b is None else a[0] <= b[1] and b[0] <= a[1]


def pairs(one: Bench, other: Bench) -> list[Pair]:
    """Of every figure that both have."""
    a, b = _figures(one), _figures(other)
    return [Pair(*key, a[key], b[key]) for key in a if key in b]


def _figures(bench: Bench) -> dict[tuple[str, str, str], Found]:
    times: dict[tuple[str, str, str], list[Times]] = {}
    bad = {(r.row, r.way) for r in bench.readings if r.state in BAD}
    for reading in bench.readings:
        if reading.state is State.OK and (reading.row, reading.way) not in bad:
            for figure, each in _times(reading):
                times.setdefault((reading.row, reading.way, figure), []).append(each)
    return {key: found for key, some in times.items() if (found := found_of(some))}


def _times(reading: Reading) -> Iterator[tuple[str, Times]]:
    """Every distribution that a reading has, whichever suite it is of."""
    for name in type(reading).model_fields:
        if isinstance(value := getattr(reading, name), Times):
            yield name, value
    if isinstance(reading, NetReading) and reading.epochs_s:
        values = [1e3 * s for s in reading.epochs_s]
        yield "epoch", summary(values, order_interval(values))


def _compared(one: Bench, other: Bench) -> Report:
    found = pairs(one, other)
    judged = [pair for pair in found if pair.agrees is not None]
    agreeing = [pair for pair in judged if pair.agrees]
    share = len(agreeing) / len(judged) if judged else None
    if share is None:
        verdict = "No figure has an interval in both runs: use rounds=2 or more." if found else NOTHING
    else:
        enough = f"{percent(WANTED, 0)} and more" if share >= WANTED else f"fewer than {percent(WANTED, 0)}"
        agree = f"{len(agreeing)} of {len(judged)} figures agree within their intervals"
        verdict = f"{agree}: {percent(share)}, {enough}."
    labels = {way.name: way.label for way in (*one.ways, *other.ways)}
    apart = [_apart([pair for pair in judged if not pair.agrees], labels)] if judged else []
    sections = [_ways(found, labels), *apart]
    facts = [f"suite={one.suite}", f"first: {when(one.created)}", f"second: {when(other.created)}"]
    return Report("Two runs", "Two runs of one suite", verdict, sections, facts, alarms=list(_unlike(one, other)),
                  version=one.version)  # fmt: skip


def _unlike(one: Bench, other: Bench) -> Iterator[str]:
    """What makes them runs of different things."""
    for words, of in (("machines", _machine), ("sizes or settings", lambda bench: _plain(bench.work))):
        if of(one) != of(other):
            yield f"They are of different {words}: differences are no fault of the figures."
    for bench, which in ((one, "first"), (other, "second")):
        if not bench.complete:
            yield f"The {which} is not complete."


def _machine(bench: Bench) -> Any:
    env = bench.environment
    return env and (env.chip, env.gpu, env.versions)


def _plain(work: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in work.items() if key != "bandwidth"}  # measured anew in each run


def _ways(found: Sequence[Pair], labels: dict[str, str]) -> Section:
    rows = []
    for way, figure in dict.fromkeys((pair.way, pair.figure) for pair in found):
        some = [pair for pair in found if (pair.way, pair.figure) == (way, figure)]
        judged = [pair for pair in some if pair.agrees is not None]
        widths = [(b[1] - b[0]) / p.one.value for p in judged if (b := p.one.bounds)]
        rows.append(Row([
            labels[way], figure, str(len(some)), str(len(judged)),
            percent(sum(bool(p.agrees) for p in judged) / len(judged)) if judged else DASH,
            ratio(statistics.geometric_mean(p.ratio for p in some)),
            percent(statistics.median(abs(p.ratio - 1) for p in some)),
            percent(statistics.median(widths)) if widths else DASH,
        ]))  # fmt: skip
    columns = ["way", "figure", "rows", "with intervals", "agree", "second / first", "apart, by median",
               "width of an interval, by median"]  # fmt: skip
    note = "They agree where their 95 % intervals, of Student's t over the rounds, have times in common."
    return Section("agreement", "How far they agree", [note], [Table("Of each way", columns, rows)],
                   NOTHING)  # fmt: skip


def _apart(found: Sequence[Pair], labels: dict[str, str]) -> Section:
    rows = [
        Row([
            pair.row, labels[pair.way], pair.figure, beside(ms(pair.one.value), interval(pair.one.bounds)),
            beside(ms(pair.other.value), interval(pair.other.bounds)), ratio(pair.ratio),
        ])
        for pair in sorted(found, key=lambda pair: -abs(pair.ratio - 1))
    ]  # fmt: skip
    columns = ["row", "way", "figure", "first, ms", "second, ms", "second / first"]
    return Section("apart", "Where they do not", tables=[Table("The furthest first", columns, rows)],
                   empty="They agree in every figure.", matters=True)  # fmt: skip
