"""Where every overload ran in every torch, release after release: `history=2.5..nightly`."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

from packaging.version import InvalidVersion, Version

from nanogpt_mac import files
from nanogpt_mac.coverage.config import CoverageConfig
from nanogpt_mac.coverage.model_ops import NoTrace, trace_model
from nanogpt_mac.coverage.page import CANNOT_TELL, OK, Page, section, some
from nanogpt_mac.errors import InputError
from nanogpt_mac.operators import wheel
from nanogpt_mac.operators.table import RUNS, Kind, Table, load_found
from nanogpt_mac.records.history import Checked, History, Release
from nanogpt_mac.report import svg
from nanogpt_mac.report.charts import Chart, key
from nanogpt_mac.report.table import Section
from nanogpt_mac.report.table import Table as Shown
from nanogpt_mac.report.table import rows as plain_rows
from nanogpt_mac.report.words import DASH, seconds, size

CHECKED = Path(wheel.__file__).with_name(
    "checked.json"
)  # release to what its binary says of its table; `record` writes it
_ALLOWED = "use a range such as 2.5..nightly or 2.5..2.15, and single ones behind commas"
_GROUPS = {  # of the plot
    "a kernel of its own": (Kind.NATIVE, Kind.DELEGATE, Kind.PYTHON),
    "made of others": (Kind.COMPOSITE,),
    "missing or on the CPU": (Kind.FALLBACK, Kind.MISSING_CPU, Kind.MISSING),
}
_COLOURS = ("s1", "s6", "s2")
Found = dict[Version, "wheel.Torch | InputError"]


def check(config: CoverageConfig) -> Page:
    """Reads every torch asked for, and reports. A wheel that cannot be read is a row. InputError for a bad range."""
    return page(history(config, *_ours(config)))


def history(config: CoverageConfig, ours: Iterable[str] = (), whose: str = "") -> History:
    """The document. `ours` are the overloads that come first, `whose` says whose they are."""
    asked = config.history or ""
    releases: list[Release] = []
    tables: list[Table | None] = []
    for name, torch in chosen(asked, config.python, config.nightly_index).items():
        print(f"history: torch {name}", file=sys.stderr, flush=True)
        release, table = read(name, torch, config)
        releases.append(release)
        tables.append(table)
    overloads = sorted({op for table in tables if table for op in table.entries})
    kinds = {op: tuple(table.kind(op) if table else None for table in tables) for op in overloads}
    ordered = tuple(sorted(set(ours)))
    return History(asked=asked, releases=tuple(releases), overloads=kinds, ours=ordered, whose=whose)


def read(name: str, torch: wheel.Torch | InputError, config: CoverageConfig) -> tuple[Release, Table | None]:
    """One row, and its table where there is one."""
    began, before = time.monotonic(), wheel.Traffic.bytes
    try:
        if isinstance(torch, InputError):
            raise torch
        table = load_found(torch, config.python, config.binary, config.nightly_index)
    except InputError as error:
        reason = re.sub(r"^torch=\S+: ", "", str(error))
        spent = {"bytes": wheel.Traffic.bytes - before, "seconds": time.monotonic() - began}
        return Release.model_validate({"version": name, "error": reason, **spent}), None
    disagreements = tuple(table.disagreements) if table.binary else checked().get(table.version)
    verdict = Checked.NOT if disagreements is None else Checked.DISAGREES if disagreements else Checked.AGREES
    return Release(
        version=table.version,
        git=table.git,
        sha256=table.sha256,
        bytes=wheel.Traffic.bytes - before,
        seconds=time.monotonic() - began,
        counts=table.counts(),
        by_hand=tuple(table.hand_list()),
        checked=verdict,
        disagreements=disagreements or (),
    ), table


@cache
def checked() -> dict[str, tuple[str, ...]]:
    """What the binaries of releases said of their tables."""
    return {version: tuple(lines) for version, lines in json.loads(CHECKED.read_text()).items()}


def _ours(config: CoverageConfig) -> tuple[list[str], str]:
    """The operators that come first: a script's, or this model's; none where it cannot be traced here."""
    from nanogpt_mac.operators.table import load

    if config.script is not None:
        from nanogpt_mac.coverage import program

        return list(program.run(config).reached), "this script"
    try:
        return list(trace_model(config.model, config.dtype, load("installed")).calls()), "this model"
    except (NoTrace, InputError) as error:
        print(f"history: this model cannot be traced here: {error}", file=sys.stderr)
        return [], ""


# -- which ------------------------------------------------------------------------------------------------------------


def chosen(asked: str, python: str, nightly_index: str) -> dict[str, wheel.Torch | InputError]:
    """The torches that `asked` names, oldest first; a nightly that cannot be had is its reason. InputError for others.

    A range has the releases between its ends, both included (2.15 stands for all of 2.15), and no nightly but one named
    as its end.
    """
    found: dict[str, wheel.Torch | InputError] = {}
    of_index = cache(lambda: wheel.available(asked, python))

    @cache
    def of_nightlies() -> Found | InputError:
        try:
            return wheel.available("nightly", python, nightly_index)
        except InputError as error:
            return error

    for term in asked.split(","):
        low, dots, high = term.strip().partition("..")
        if dots:
            if not _below(_version(low), high):
                raise InputError(f"history={asked}: {low} is later than {high}; exchange them")
            between = {str(v): t for v, t in of_index().items() if _within(v, low, high)}
            if not between:
                raise InputError(f"history={asked}: the index has no release in {term}; {_ALLOWED}")
            found |= between
        one = high if dots else low
        if one == "nightly" or (not dots and _version(one).is_devrelease):
            known = of_nightlies()
            if isinstance(known, InputError):
                found[one] = known
                continue
            exact = [v for v in known if v.is_devrelease and (one == "nightly" or v.public == _version(one).public)]
            found[str(exact[-1]) if exact else one] = (
                known[exact[-1]] if exact else InputError(f"torch={one}: the nightly index has no such build")
            )
        elif not dots:
            version = _version(one)
            if version not in of_index():
                raise InputError(f"history={asked}: the index has no torch {one}; {_ALLOWED}")
            found[str(version)] = of_index()[version]
    return found


def _version(text: str) -> Version:
    try:
        return Version(text)
    except InvalidVersion:
        raise InputError(f"history={text}: not a version; {_ALLOWED}") from None


def _within(version: Version, low: str, high: str) -> bool:
    return not version.is_prerelease and version >= _version(low) and _below(version, high)


def _below(version: Version, high: str) -> bool:
    """Whether a version is not above an end: 2.15 is all of 2.15."""
    top = () if high in ("", "nightly") else _version(high).release
    return version.release[: len(top)] <= top


# -- the report -------------------------------------------------------------------------------------------------------


def page(made: History) -> Page:
    """Exit code 0, or 2 where some wheel could not be read."""
    readable = [r for r in made.releases if not r.error]
    unreadable = [r.version for r in made.releases if r.error]
    if not readable:
        code, verdict = CANNOT_TELL, f"no torch could be read: {made.releases[0].error}"
    else:
        first, last = readable[0], readable[-1]
        ran = [(kinds[_at(made, first)] in RUNS, kinds[_at(made, last)] in RUNS) for kinds in _common(made)]
        verdict = f"{len(readable)} torches read, {first.version} to {last.version}: "
        verdict += f"{ran.count((False, True))} overloads gained, {ran.count((True, False))} lost"
        code = CANNOT_TELL if unreadable else OK
        if unreadable:
            verdict += f"; {some(unreadable)} could not be read"
    agree = sum(r.checked is Checked.AGREES for r in readable)
    read, took = sum(r.bytes for r in made.releases), sum(r.seconds for r in made.releases)
    lines = [
        f"read {size(read)} in {seconds(took)}; the largest wheel {size(max(r.bytes for r in made.releases))}",
        f"the tables of {agree} of {len(readable)} torches agree with their binaries, overload by overload",
    ]
    if made.ours:
        lines.append(f"the operators of {made.whose} come first ({len(made.ours)})")
    releases = section(
        "Releases", ["torch", *_GROUPS, "unknown", "by hand", "binary", "read", "s", "note"], _rows(made)
    )
    changes = Section(
        "changes",
        "Changes",
        tables=[Shown("Changes", ["overload", "whose", "gained in", "lost in", "kinds"], plain_rows(_changes(made)))],
        folded=True,
        searchable=True,
    )
    facts = made.document() | {"scope": "history"}
    charts = {releases.id: [chart(made)]} if len(readable) > 1 else {}
    return Page(f"MPS coverage, {made.asked}", lines, [releases, changes], code, verdict, facts, charts)


def _at(made: History, release: Release) -> int:
    return made.releases.index(release)


def _common(made: History) -> list[Sequence[str | None]]:
    """The kinds of the overloads that the first and the last readable torch both have."""
    ends = [i for i, r in enumerate(made.releases) if not r.error]
    return [kinds for kinds in made.overloads.values() if kinds[ends[0]] and kinds[ends[-1]]]


def _count(release: Release, kinds: Iterable[Kind]) -> int:
    return sum(release.counts.get(kind.value, 0) for kind in kinds)


def _rows(made: History) -> list[list[str]]:
    rows = []
    for r in made.releases:
        if r.error:
            rows.append([r.version, *[DASH] * (len(_GROUPS) + 4), f"{r.seconds:.1f}", r.error])
            continue
        figures = [str(_count(r, kinds)) for kinds in _GROUPS.values()]
        unknown = str(r.counts.get(Kind.UNKNOWN.value, 0))
        note = "; ".join(r.disagreements[:3])
        rows.append(
            [r.version, *figures, unknown, ", ".join(r.by_hand), r.checked, size(r.bytes), f"{r.seconds:.1f}", note]
        )
    return rows


def _changes(made: History) -> list[list[str]]:
    """One row of each overload that changed; those of the model or the script first."""
    names = [r.version for r in made.releases]
    readable = [i for i, r in enumerate(made.releases) if not r.error]
    rows = []
    for op in sorted(made.overloads, key=lambda op: (op not in made.ours, op)):
        kinds = made.overloads[op]
        gained: list[str] = []
        lost: list[str] = []
        path: list[str] = []
        before: str | None = None
        for i in readable:
            kind = kinds[i]
            if path and kind != before:
                path.append(f"{names[i]}: {kind or 'absent'}")
                if kind in RUNS and before is not None and before not in RUNS:
                    gained.append(names[i])
                if before in RUNS and kind is not None and kind not in RUNS:
                    lost.append(names[i])
            elif not path:
                path.append(kind or "absent")
            before = kind
        if len(path) > 1:
            whose = made.whose if op in made.ours else DASH
            rows.append([op, whose, ", ".join(gained) or DASH, ", ".join(lost) or DASH, "; ".join(path)])
    return rows


def chart(made: History) -> Chart:
    """Overloads over releases, by where they run."""
    releases = [r for r in made.releases if not r.error]
    title = "Overloads by where they run"
    names = ["nightly" if Version(r.version).is_devrelease else r.version for r in releases]
    rows = [[r.version, *(str(_count(r, kinds)) for kinds in _GROUPS.values())] for r in releases]
    description = "Lines. " + "; ".join(f"{row[0]}: {', '.join(row[1:])}" for row in rows) + "."
    with svg.style():
        figure, axes = svg.figure(230)
        axes.grid(axis="y")
        for (_, kinds), colour in zip(_GROUPS.items(), _COLOURS, strict=True):
            axes.plot(
                range(len(releases)), [_count(r, kinds) for r in releases], "o-", color=svg.COLOURS[colour], ms=3.5
            )
        axes.set_xticks(range(len(releases)), names, rotation=60, ha="right")
        axes.set_ylim(bottom=0)
        drawn = svg.inline(figure, "chart-history", title, description)
    legend = [
        key(f'<circle cx="6" cy="6" r="4" fill="var(--{colour})"/>', name)
        for name, colour in zip(_GROUPS, _COLOURS, strict=True)
    ]
    table = Shown(title, ["torch", *_GROUPS], plain_rows(rows))
    return Chart("chart-history", title, description, drawn, table, legend)


def record(tables: Iterable[Table], path: Path = CHECKED) -> None:
    """Writes down what binaries say of their tables, beside what is known of others."""
    known = json.loads(path.read_text()) if path.exists() else {}
    known |= {table.version: table.disagreements for table in tables if table.binary}
    ordered = {version: known[version] for version in sorted(known, key=Version)}
    files.write_aside(path, json.dumps(ordered, indent=1) + "\n")
