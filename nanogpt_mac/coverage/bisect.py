"""The first PyTorch nightly that differs: `bisect=linalg_svd good=2.13.0 bad=nightly`, one wheel a step.

What differs is read from a build's table of operators, or seen by running this model or a script under it (run=true).
A build that cannot be read or run is stepped over.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from packaging.version import Version

from nanogpt_mac import simulator
from nanogpt_mac.coverage.config import CoverageConfig
from nanogpt_mac.coverage.model_ops import NoTrace, trace_model
from nanogpt_mac.coverage.page import CANNOT_TELL, LOST, OK, Page, section, some
from nanogpt_mac.errors import InputError
from nanogpt_mac.operators import wheel
from nanogpt_mac.operators.table import RUNS, Table, load, load_found
from nanogpt_mac.records.history import Bisection, Build

COMPARE = "https://github.com/pytorch/pytorch/compare/"
_ALLOWED = "use a release such as 2.13.0, nightly, or a nightly such as 2.16.0.dev20261101"

T = TypeVar("T")
State = dict[str, str]  # an operator, or a finding, to what became of it


# -- the search -------------------------------------------------------------------------------------------------------


@dataclass
class Found(Generic[T]):
    """The last build as the first one and the first that differs, by number; None where the last is as the first.

    `seen` has what was looked at, in that order: a state, or why there is none.
    """

    good: int
    bad: int | None
    seen: dict[int, T | InputError]


def search(builds: int, look: Callable[[int], T]) -> Found[T]:
    """Halves 0 to `builds` - 1. `look` returns what a build is, or raises InputError where it cannot be looked at.

    Between neighbours good and bad lie only builds that cannot be looked at. The last is looked at only where all
    others are as the first: the right half is the smaller one, so that this costs no step more.
    """
    seen: dict[int, T | InputError] = {}

    def looked(number: int) -> T | None:
        if number not in seen:
            try:
                seen[number] = look(number)
            except InputError as error:
                seen[number] = error
        state = seen[number]
        return None if isinstance(state, InputError) else state

    first = looked(0)
    if first is None:
        raise seen[0]  # type: ignore[misc]
    good, bad = 0, builds - 1
    while True:
        middle = good + (bad - good + 1) // 2
        between = sorted(range(good + 1, bad), key=lambda number: abs(number - middle))
        number = next((n for n in between if not isinstance(seen.get(n), InputError)), None)
        if number is None:
            break
        state = looked(number)
        if state is not None:
            good, bad = (number, bad) if state == first else (good, number)
    if (last := looked(bad)) is None:
        raise seen[bad]  # type: ignore[misc]
    return Found(good, None if last == first else bad, seen)


# -- what a build is --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Looked:
    """One build: what it has, and its commit."""

    state: State
    git: str | None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Looked) and self.state == other.state

    __hash__ = None  # type: ignore[assignment]


def check(config: CoverageConfig) -> Page:
    """Exit code 0: nothing differs; 1: the change is a loss; 2: it cannot be told, or the change is none of runs."""
    torches = between(config)
    look = _runner(config) if config.run else _reader(config)
    names = [torch.version for torch in torches]

    def one(number: int) -> Looked:
        print(f"bisect: torch {names[number]}", file=sys.stderr, flush=True)
        return look(torches[number])

    return page(document(config, names, search(len(torches), one)), config.run)


def between(config: CoverageConfig) -> list[wheel.Torch]:
    """`good`, the nightlies after it, up to `bad`. InputError where one of the ends cannot be had."""
    _in_order(config, _version("good", config.good), _version("bad", config.bad))
    with wheel.asked_by("bad"):
        found = wheel.available(str(config.bad), config.python, config.nightly_index)
    nightlies = {v: t for v, t in found.items() if v.is_devrelease and not isinstance(t, InputError)}
    good, bad = (_end(key, config, nightlies) for key in ("good", "bad"))
    low, high = Version(good.version), Version(bad.version)
    _in_order(config, low, high)
    return [good, *(torch for version, torch in nightlies.items() if low < version < high), bad]


def _version(key: str, asked: str | None) -> Version:
    """What an end asks for; nightly is later than all others."""
    try:
        return Version("9999" if asked == "nightly" else str(asked))
    except ValueError:
        raise InputError(f"{key}={asked}: {_ALLOWED}") from None


def _in_order(config: CoverageConfig, low: Version, high: Version) -> None:
    if low >= high:
        raise InputError(f"good={config.good} bad={config.bad}: good is not older than bad; exchange them")


def _end(key: str, config: CoverageConfig, nightlies: dict[Version, wheel.Torch]) -> wheel.Torch:
    asked = str(getattr(config, key))
    version = _version(key, asked)
    if asked == "nightly" or version.is_devrelease:
        found = [torch for v, torch in nightlies.items() if asked == "nightly" or v.public == version.public]
        if not found:
            near = some([str(v) for v in sorted(nightlies)][-4:])
            raise InputError(f"{key}={asked}: the nightly index has no such build; its newest: {near or 'none'}")
        return found[-1]
    with wheel.asked_by(key):
        return wheel.find(asked, config.python)


def _reader(config: CoverageConfig) -> Callable[[wheel.Torch], Looked]:
    """Looks at tables, one wheel each."""
    ours = _traced(config)

    def look(torch: wheel.Torch) -> Looked:
        table = load_found(torch, config.python, config.binary, config.nightly_index)
        names = ours if ours is not None else named(table, str(config.bisect))
        return Looked({op: table.kind(op) or "absent" for op in names}, table.git)

    return look


def named(table: Table, name: str) -> list[str]:
    """The overloads of a full name, or of a bare one."""
    name = name.removeprefix("aten::")
    return [op for op in table.entries if op == name or op.split(".")[0] == name]


def _traced(config: CoverageConfig) -> list[str] | None:
    """The operators of this model or of the script; None where one operator is asked for."""
    if config.bisect == "script":
        from nanogpt_mac.coverage import program

        return sorted(program.run(config).reached)
    if config.bisect != "model":
        return None
    try:
        return sorted(trace_model(config.model, config.dtype, load("installed")).calls())
    except NoTrace as error:
        raise InputError(f"bisect=model: this model cannot be traced: {error}") from error


def _runner(config: CoverageConfig) -> Callable[[wheel.Torch], Looked]:
    """Runs this model's detector, or the script, in an environment of each build's own."""
    from nanogpt_mac.coverage import other_torch, program
    from nanogpt_mac.fallbacks import detect

    env = simulator.environment(True, *other_torch.OTHERS)

    def look(torch: wheel.Torch) -> Looked:
        python = other_torch.make(torch.version, config.nightly_index)
        if config.bisect == "script":
            made = program.run(config, python, env)
            state = {f"{f.op} ({f.where})": f.kind.value for f in made.findings if f.kind != "copy or sync"}
            return Looked(state | ({"exit code": str(made.left_with)} if made.left_with else {}), None)
        seen = detect.check_task(other_torch.task(config.model, config.dtype, config.batch_size), python, env)
        if not seen.complete:
            raise InputError(f"torch={torch.version}: {'; '.join(seen.why_incomplete)}")
        return Looked({f"{op} ({phase})": kind for op, kind, phase in other_torch.findings(seen)}, None)

    return look


# -- the report -------------------------------------------------------------------------------------------------------


def document(config: CoverageConfig, names: Sequence[str], found: Found[Looked]) -> Bisection:
    """What a search says. InputError where the operator exists in no build."""
    first, last = found.seen[0], found.seen.get(len(names) - 1)
    assert isinstance(first, Looked)
    if not config.run and found.bad is None and not first.state:
        raise InputError(f"bisect={config.bisect}: torch {names[0]} and {names[-1]} have no such operator")

    def build(number: int) -> Build:
        state = found.seen[number]
        if isinstance(state, InputError):
            return Build(version=names[number], state=f"skipped: {state}")
        return Build(version=names[number], git=state.git, state=_words(state.state, first.state))

    ends: dict[str, object] = {}
    if found.bad is not None:
        good, bad = build(found.good), build(found.bad)
        after = found.seen[found.bad]
        assert isinstance(after, Looked)
        ends = {"good": good, "bad": bad, "skipped": names[found.good + 1 : found.bad]}
        ends["changes"] = _changes(first.state, after.state)
        if good.git and bad.git:
            ends["link"] = f"{COMPARE}{good.git}...{bad.git}"
    seen = [build(number) for number in found.seen]
    assert last is None or not isinstance(last, InputError)
    return Bisection.model_validate(
        {"asked": config.bisect, "builds": len(names), "read": len(found.seen), "seen": seen, **ends}
    )


def _changes(before: State, after: State) -> list[str]:
    """One line of each difference: `op: before -> after`."""
    ops = sorted({*before, *after})
    return [
        f"{op}: {before.get(op, 'absent')} -> {after.get(op, 'absent')}"
        for op in ops
        if before.get(op) != after.get(op)
    ]


def _words(state: State, first: State) -> str:
    changes = _changes(first, state)
    if changes:
        return some(changes, 4)
    return "as the first" if len(state) != 1 else next(iter(state.values()))


def page(made: Bisection, run: bool = False) -> Page:
    """The report. What is no longer found is a gain where builds were run, and an operator lost in a table."""
    rows = [[b.version, (b.git or "")[:9], b.state] for b in made.seen]
    sections = [section("Builds looked at, in this order", ["torch", "commit", "what"], rows)]
    sections.append(section("What changed", ["change"], [[line] for line in made.changes]))
    lines = [f"{made.builds} builds, {made.read} looked at"]
    if made.good is None or made.bad is None:
        code, verdict = OK, f"{made.asked} is the same in the first and the last of {made.builds} builds"
    else:
        fine = ("-> absent",) if run else tuple(f"-> {kind.value}" for kind in RUNS)
        code = OK if all(line.endswith(fine) for line in made.changes) else LOST
        verdict = f"{made.asked} differs first in {made.bad.version}; {made.good.version} is the last without"
        if made.skipped:
            code, verdict = code or CANNOT_TELL, f"{verdict}, and {some(list(made.skipped))} could not be looked at"
        lines.append(f"commits: {made.link}" if made.link else "the builds do not name their commits")
    return Page(f"Bisection of {made.asked}", lines, sections, code, verdict, made.document() | {"scope": "bisect"})
