"""From readings of parts to where an iteration goes, and from two such accounts to why one takes longer. Arithmetic."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from scipy import stats

from nanogpt_mac.measure.stats import CONFIDENCE
from nanogpt_mac.records.bench import State, Way
from nanogpt_mac.records.parts import (
    ITERATION,
    Account,
    Cause,
    Figure,
    Left,
    PartCost,
    PartReading,
    PartsBench,
    Reason,
)
from nanogpt_mac.records.run import Times
from nanogpt_mac.report.words import listed, ms

BOUND = 0.8  # of a part's time are its launches: it is these that take it
HOST_BOUND = 0.9  # of an iteration the host is busy enqueuing it
FEWEST_RANKED = 8  # rounds: the ranks of fewer can hardly say anything at 99 %
LEAST = 0.01  # of a part's time: less is no reason for anything
MATTERS, MOST = 0.05, 3  # of the difference, and how many causes a sentence names


def accounts(bench: PartsBench) -> list[Account]:
    """Of each way, in order."""
    return [account(way, [r for r in bench.readings if r.way == way.name]) for way in bench.ways]


def account(way: Way, readings: Sequence[PartReading]) -> Account:
    """Of one way's `readings`, of all rounds."""
    rows: dict[str, list[PartReading]] = defaultdict(list)
    for reading in readings:
        rows[reading.row].append(reading)
    done = {row: ok for row, some in rows.items() if (ok := [r for r in some if r.state is State.OK])}
    failed = next((r for r in readings if r.state in (State.WRONG, State.FAILED)), None)
    failed = failed or next((r for r in readings if r.state is State.SKIPPED and r.row not in done), None)
    parts = tuple(_cost(name, some) for name, some in done.items() if name != ITERATION)
    named: dict[str, Any] = {"name": way.name, "label": way.label, "simulated": way.simulated, "parts": parts}
    if failed or ITERATION not in done:
        why = f"{failed.row}: {failed.reason}" if failed else next((r.reason for r in readings), "nothing was measured")
        return Account(**named, why_not=why)
    whole = done[ITERATION]
    one = whole[0]
    iteration = _figure({r.round: r.forward for r in whole})
    found = Account(
        **named,
        iteration=iteration,
        kernels=one.counts.get("kernels"),
        waits=one.counts.get("waits"),
        launch=_middle([r.launch for r in whole]),
        inside_iteration=one.inside_iteration,
        not_inside=one.not_inside,
    )
    if iteration is None:
        return found
    queued, dispatch = _middle([r.queued for r in whole]), _middle([r.dispatch for r in whole])
    return found.model_copy(update={"left": left_over(found, queued, dispatch, way.compiled)})


def _cost(name: str, readings: Sequence[PartReading]) -> PartCost:
    one, times = readings[0], readings[0].times
    kernels, waits = one.counts.get("kernels"), one.counts.get("waits")
    return PartCost(
        name=name,
        note=one.note,
        times=times,
        forward=_figure({r.round: r.forward for r in readings}, times),
        backward=_figure({r.round: r.both for r in readings}, times, {r.round: r.forward for r in readings}),
        inside=one.inside,
        kernels=None if kernels is None else times * kernels,
        waits=None if waits is None else times * waits,
    )


def _figure(
    found: Mapping[int, Times | None], times: int = 1, less: Mapping[int, Times | None] | None = None
) -> Figure | None:
    """Of the rounds' medians, `less` others, `times` each."""
    values = {}
    for number, one in found.items():
        other = less[number] if less else None
        if one and one.median is not None:
            rest = _bounds(other)[::-1] if other else (0.0, 0.0, 0.0)
            values[number] = [times * (a - b) for a, b in zip(_bounds(one), rest, strict=True)]
    if not values:
        return None
    low, middle, high = zip(*values.values(), strict=True)
    rounds = {number: value[1] for number, value in values.items()}
    return Figure(ms=median(middle), low=min(low), high=max(high), rounds=rounds)


def _bounds(times: Times) -> tuple[float, float, float]:
    assert times.median is not None
    low, high = times.ci95 or (times.median, times.median)
    return low, times.median, high


def _middle(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None


def left_over(found: Account, queued: float | None, dispatch: float | None, compiled: bool) -> tuple[Left, ...]:
    """What `found.iteration` takes beyond its parts, by name. Together they are just that.

    `queued`, `dispatch`: as in PartReading, None on a device that does not run behind the host.
    """
    assert found.iteration is not None
    whole = found.iteration.ms
    rest, lines = whole - found.total, list[Left]()

    def take(name: str, amount: float) -> None:
        nonlocal rest
        if amount > 0:
            lines.append(Left(name=name, ms=amount))
            rest -= amount

    if queued is not None:
        take("waits", whole - queued)
    if found.launch and found.kernels is not None and rest > 0:
        more = found.kernels - sum(part.kernels or 0 for part in found.parts)
        take(f"{more} kernel launches between the parts", min(rest, max(more, 0) * found.launch))
    if dispatch is not None and dispatch >= HOST_BOUND * (queued or whole):
        take("host, slower than the device", rest)
    if rest < 0:
        gain = "fusion across parts" if compiled else "less than each alone"
        return (*lines, Left(name=gain, ms=rest))
    take("host, casts, caches", rest)
    return tuple(lines)


# -- two of them ------------------------------------------------------------------------------------------------------


def differences(faster: Account, slower: Account) -> tuple[Cause, ...]:
    """In which parts `slower` clearly takes longer, or less, by size."""
    base = {part.name: part for part in faster.parts}
    nothing, bound = Figure(ms=0.0, low=0.0, high=0.0), dict[str, float]()
    causes, launches = [], 0
    for part in slower.parts:
        other = base.get(part.name)
        held = bool(slower.launch and part.kernels and part.kernels * slower.launch >= BOUND * part.ms)
        for direction in ("forward", "backward"):
            one, two = getattr(part, direction), (getattr(other, direction) if other else None) or nothing
            if one is None or not (longer := _longer(one, two)):
                continue
            if held and longer > 0:
                bound[part.name] = bound.get(part.name, 0.0) + longer
            else:
                alone = part.backward is None
                causes.append(Cause(name=part.name if alone else f"{part.name} {direction}", ms=longer))
        launches += part.kernels or 0 if part.name in bound else 0
    for name in base.keys() - {part.name for part in slower.parts}:
        causes.append(Cause(name=name, ms=-base[name].ms))
    if bound:
        causes.append(Cause(name=f"{launches} kernel launches ({listed(list(bound))})", ms=sum(bound.values())))
    return tuple(sorted(causes, key=lambda cause: -abs(cause.ms)))


def _longer(one: Figure, two: Figure) -> float:
    """By how much `one` is longer; 0 where that is not clear.

    By the differences of the rounds that both have, paired as in a comparison: of FEWEST_RANKED by their signed ranks
    (Wilcoxon), which a round beside another program does not move far, of three and more by Student's t. Of fewer,
    where no round's interval reaches into the other's.
    """
    common = one.rounds.keys() & (two.rounds.keys() or one.rounds.keys())
    if len(common) < 3:
        return one.ms - two.ms if one.low > two.high or two.low > one.high else 0.0
    off = [one.rounds[number] - two.rounds.get(number, 0.0) for number in common]
    if max(off) - min(off) == 0:
        clear = True
    elif len(off) >= FEWEST_RANKED:
        clear = stats.wilcoxon(off).pvalue < 1 - CONFIDENCE
    else:
        clear = stats.ttest_1samp(off, 0.0).pvalue < 1 - CONFIDENCE
    longer = median(off)
    return longer if clear and abs(longer) > LEAST * max(one.ms, two.ms) else 0.0


def reason(faster: Account, slower: Account, ratio: str) -> Reason:
    """Why; `ratio` is how the comparison says that: "MLX is 1.3 x as fast as MPS eager"."""
    names: dict[str, Any] = {"faster": faster.name, "slower": slower.name}
    one, two = faster.iteration, slower.iteration
    if one is None or two is None:
        unknown = faster if one is None else slower
        why = f"{ratio}; why is not known: the parts of {unknown.label} were not measured ({unknown.why_not})."
        return Reason(**names, difference=0.0, sentence=why)
    difference = two.ms - one.ms
    if two.low <= one.high:
        again = f"{ratio}; measured again beside their parts, the two lie too close together for a reason."
        return Reason(**names, difference=difference, sentence=again)
    left = {each.name: each.ms for each in slower.left}
    for other in faster.left:
        left[other.name] = left.get(other.name, 0.0) - other.ms
    rest = [Cause(name=f"what is left over ({name})", ms=value) for name, value in left.items()]
    every = (*differences(faster, slower), *(c for c in rest if abs(c.ms) > MATTERS * difference))
    causes = tuple(sorted(every, key=lambda cause: -abs(cause.ms)))
    more = [c for c in causes if c.ms > MATTERS * difference][:MOST]
    less = [c for c in causes if c.ms < -MATTERS * difference][:1]
    if more:
        first, *others = [f"{ms(c.ms)} {{}}in {c.name}" for c in more]
        said = ", ".join([first.format("lie "), *(o.format("") for o in others)])
        sentence = f"{ratio}: of {ms(difference)} ms difference {said}."
    else:
        sentence = f"{ratio}: no single part clearly takes the {ms(difference)} ms longer."
    sentence += "".join(f" {slower.label} is ahead by {ms(-c.ms)} ms in {c.name}." for c in less)
    return Reason(**names, difference=difference, causes=causes, sentence=sentence)
