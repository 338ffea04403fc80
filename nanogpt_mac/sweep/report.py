"""A sweep as a report: every member in a table, and its objective against each key that was swept."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from nanogpt_mac.overrides import key_of
from nanogpt_mac.records.sweep import SPEEDS, Member, MemberState, Sweep
from nanogpt_mac.report.table import Mark, Report, Row, Section, Table
from nanogpt_mac.report.words import DASH, listed, number, plural, seconds, text, when

if TYPE_CHECKING:
    from nanogpt_mac.report.charts import Chart

MARKS = {MemberState.DONE: Mark.NONE, MemberState.RUNNING: Mark.QUIET, MemberState.STOPPED: Mark.PARTIAL}
SHARED = "Members ran side by side and slowed each other down: their speeds are not compared."
LOG_FROM = 10  # times the least value: over a decade or more


def report(sweep: Sweep) -> Report:
    """The best member first, then all of them."""
    columns = list(swept(sweep))
    best = sweep.found_best()
    objective = sweep.objective or "objective"
    rows = [
        Row(
            [
                str(member.number),
                *(_short(value_of(member, key)) for key in columns),
                text(member.state),
                text(_plain(member.objective)),
                seconds(member.seconds or None),
                text(member.folder),
            ],
            Mark.BEST if best and member.number == best.number else MARKS.get(member.state, Mark.FAILED),
        )
        for member in sweep.members
    ]
    table = Table("Members, in their order", ["member", *columns, "state", objective, "took", "folder"], rows)
    notes = [SHARED] if sweep.shared_machine else []
    sections = [
        Section("members", "Members", notes, [table], "No member has left a record.", matters=True),
    ]
    if sweep.objective and columns:
        drawn = [_table(sweep, key) for key in columns]
        tables = [table for table in drawn if table.rows]
        sections.append(
            Section("keys", f"{objective} against each key", [], tables, "Nothing to compare.", folded=True)
        )
    facts = [plural(len(sweep.members), "member"), f"sweeper {text(sweep.sweeper)}", f"launcher {text(sweep.launcher)}"]
    facts += [when(sweep.created)] if sweep.created else []
    return Report("Sweep", f"Sweep of {listed(columns) if columns else 'one combination'}", verdict(sweep),
                  sections, facts, alarms=_alarms(sweep), version=sweep.version,
                  first_screen=("members",))  # fmt: skip


def charts(sweep: Sweep) -> dict[str, list[Chart]]:
    """The charts of the page, by section. Loads matplotlib."""
    from nanogpt_mac.report import svg

    if not sweep.objective:
        return {}
    with svg.style():
        found = [_chart(sweep, i, key) for i, key in enumerate(swept(sweep)) if _table(sweep, key).rows]
    return {"keys": found}


def swept(sweep: Sweep) -> dict[str, list[str | None]]:
    """The keys whose values differ between members, with the values in the members' order."""
    keys = dict.fromkeys(key_of(override) for member in sweep.members for override in member.overrides)
    values = {key: [value_of(member, key) for member in sweep.members] for key in keys}
    return {key: found for key, found in values.items() if len(set(found)) > 1}


def value_of(member: Member, key: str) -> str | None:
    """What a member's overrides give `key`, without quotes; None where they do not name it."""
    found = [o.partition("=")[2] for o in member.overrides if key_of(o) == key]
    value = found[-1] if found else None
    return value[1:-1] if value and len(value) > 1 and value[0] == value[-1] and value[0] in "'\"" else value


def verdict(sweep: Sweep) -> str:
    """Which member is best, in a sentence."""
    best = sweep.found_best()
    done = sum(member.state is MemberState.DONE for member in sweep.members)
    if best is None:
        why = " Side by side, no speed counts." if sweep.shared_machine and sweep.objective in SPEEDS else ""
        return f"{done} of {plural(len(sweep.members), 'member')} done; none can be called best.{why}"
    how = "highest" if sweep.direction == "maximize" else "lowest"
    values = ", ".join(f"{key}={_short(value_of(best, key))}" for key in swept(sweep)) or best.title
    return f"Member {best.number} has the {how} {sweep.objective}, {_plain(best.objective)}: {text(values)}."


def _alarms(sweep: Sweep) -> list[str]:
    lines = [f"{sweep.signal} ended the sweep."] if sweep.signal else []
    bad = [m for m in sweep.members if m.state not in (MemberState.DONE, MemberState.RUNNING)]
    lines += [f"{len(bad)} of {plural(len(sweep.members), 'member')} gave nothing to compare."] if bad else []
    return lines


def _short(value: str | None) -> str:
    """A value with six digits at most: a sweeper's have seventeen."""
    numbers = _numbers([value]) if value and "." in value else None
    return f"{numbers[0]:.6g}" if numbers else text(value)


def _plain(value: float | None) -> str | None:
    return None if value is None else f"{value:.6g}"


def _points(sweep: Sweep, key: str) -> list[tuple[str, float]]:
    """(value of `key`, objective) of every member that has both."""
    pairs = [(value_of(member, key), number(member.objective)) for member in sweep.members]
    return [(value, found) for value, found in pairs if value is not None and found is not None]


def _numbers(values: Sequence[str]) -> list[float] | None:
    """`values` as numbers; None where one is none."""
    try:
        found = [float(value) for value in values]
    except ValueError:
        return None
    return found if all(map(math.isfinite, found)) else None


def _table(sweep: Sweep, key: str) -> Table:
    points = _points(sweep, key)
    numbers = _numbers([value for value, _ in points])
    order = sorted(range(len(points)), key=lambda i: numbers[i] if numbers else points[i][0])
    rows = [Row([_short(points[i][0]), _plain(points[i][1]) or DASH]) for i in order]
    return Table(f"{sweep.objective} against {key}", [key, sweep.objective or ""], rows)


def _chart(sweep: Sweep, index: int, key: str) -> Chart:
    """Dots: over numbers on an axis, logarithmic where they span a decade, or over one place a word."""
    from nanogpt_mac.report import svg
    from nanogpt_mac.report.charts import Chart, few_ticks, log_x

    points = _points(sweep, key)
    words, heights = [value for value, _ in points], [height for _, height in points]
    numbers = _numbers(words)
    figure, axes = svg.figure(190)
    places = list(dict.fromkeys(words))
    xs = numbers if numbers else [float(places.index(word)) for word in words]
    axes.plot(xs, heights, "o", color=svg.COLOURS["s1"], markersize=5.5, alpha=0.75)
    axes.grid(axis="y")
    logarithmic = bool(numbers) and min(xs) > 0 and max(xs) >= LOG_FROM * min(xs)
    if logarithmic:
        log_x(axes)
    elif numbers:
        few_ticks(axes)
    else:
        axes.set_xlim(-0.5, len(places) - 0.5)
        axes.set_xticks(range(len(places)), [text(place, 24) for place in places])
    axes.set_xlabel(f"{text(key, 40)}{', logarithmic' if logarithmic else ''}")
    axes.set_ylabel(sweep.objective)
    table = _table(sweep, key)
    described = f"Dots. {key}: {sweep.objective}. " + "; ".join(": ".join(row.cells) for row in table.rows) + "."
    identifier = f"chart-key-{index}"
    return Chart(identifier, table.caption, described, svg.inline(figure, identifier, table.caption, described), table)
