"""`python report.py`: one comparison's or sweep's report made anew, or a leaderboard over runs of several machines.

Only runs of the same work (model, batch, precision, corpus) are ranked together. Ranks come from the medians' 95 %
intervals: entries whose intervals overlap share one.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import nanogpt_mac
from nanogpt_mac.compare import contents, doubts, figures, runs
from nanogpt_mac.compare.collect import ROUND, read
from nanogpt_mac.compare.config import ReportConfig
from nanogpt_mac.compare.contents import median, plain, where, work_facts
from nanogpt_mac.compare.doubts import label
from nanogpt_mac.compare.runs import is_run
from nanogpt_mac.errors import InputError
from nanogpt_mac.files import run_folder, write_aside
from nanogpt_mac.records.base import DamagedError
from nanogpt_mac.records.comparison import FailedRun, Machine, VariantResult, VariantState, Work
from nanogpt_mac.records.plan import Parity, ParityResult, ParityState
from nanogpt_mac.records.run import Environment, RunState
from nanogpt_mac.records.sweep import Sweep
from nanogpt_mac.report import page, show
from nanogpt_mac.report.table import Mark, Report, Row, Section, Table
from nanogpt_mac.report.words import DASH, count, listed, ms, percent, plural, ratio, size, text, when
from nanogpt_mac.suites import agreement
from nanogpt_mac.sweep import report as sweep_report

_WORK = ("batch_size", "gradient_accumulation_steps", "dtype", "matmul_precision", "corpus_sha256")  # what ranks need


@dataclass(frozen=True)
class Entry:
    """One variant on one machine. `problems`: what of a single run could not be read; None for a comparison's."""

    variant: VariantResult
    work: Work
    machine: Machine
    environment: Environment | None
    folder: Path
    created: str | None
    problems: Sequence[str] | None = None

    @property
    def median(self) -> float:
        return self.variant.median or 0.0

    @property
    def bounds(self) -> tuple[float, float] | None:
        """The median's interval; None where it is not known, or does not hold the median."""
        found = self.variant.times.ci95 if self.variant.times else None
        return found if found and 0 < found[0] <= self.median <= found[1] else None

    @property
    def place(self) -> str:
        return ", ".join(where(self.machine))

    def unranked(self) -> str | None:
        """Why it takes no rank; None for an entry that does."""
        variant, reason = self.variant, self.variant.reason or ""
        if variant.simulated or (variant.device is None and self.machine.simulated):
            return "simulated device: its times say nothing about a Mac"
        if variant.state is VariantState.WRONG:
            return f"WRONG: {text(reason or 'failed the parity check')}"
        if variant.state is VariantState.IN_DOUBT:
            return f"in doubt: {text(reason)}"
        if not self.median:
            return text(reason or "nothing was timed")
        if variant.ranks > 1:
            return f"{variant.ranks} processes together: not ranked with single ones"
        if variant.shared_machine:
            return doubts.Doubt.SHARED_MACHINE.words
        if reason.startswith("diverged"):
            return text(reason)
        if variant.parity is ParityState.ERROR:
            return "its parity could not be checked"
        if not variant.same_work:
            return "did other work than the rest of its comparison"
        unknown = [key for key in _WORK if getattr(self.work, key) is None] + ["model"] * (self.work.model is None)
        return f"what it trained is not fully recorded: no {', '.join(unknown)}" if unknown else None


# -- what is given ----------------------------------------------------------------------------------------------------


def run(config: ReportConfig) -> int:
    """Write report.md and report.html, show the same in the terminal; 0. InputError for a path that holds no run."""
    if not config.runs:
        raise InputError("runs=[]: name the folders to report on (python report.py runs/a runs/b)")
    try:
        benches = any((Path(path) / agreement.FILE).exists() for path in config.runs)
        swept = None if benches else _sweep(config.runs)
        folders = [] if swept or benches else _folders(config.runs)
        single = read(folders[0]) if len(folders) == 1 and _is_comparison(folders[0]) else None
        board = Board([] if single or swept or benches else [entry for folder in folders for entry in entries(folder)])
    except OSError as error:  # a folder that may not be looked into
        raise InputError(f"{error.filename}: cannot be read: {error.strerror}") from error
    own = config.runs[0] if swept or (benches and len(config.runs) == 1) else str(folders[0]) if single else None
    output = config.output or own or "runs/{date}/{time}-report"
    from nanogpt_mac.compare import page as comparison_page  # matplotlib

    if benches:
        report, charts = agreement.report(config.runs)
        html = page.html(report, charts)
    elif swept:
        report = sweep_report.report(swept)
        html = page.html(report, sweep_report.charts(swept))
    else:
        report, html = (
            (contents.report(single), comparison_page.html(single)) if single else (board.report(), board.html())
        )
    try:
        folder = run_folder(output, "report") if output != own else Path(own)
        write_aside(folder / "report.md", show.markdown(report))
        write_aside(folder / "report.html", html)
    except InputError as error:
        raise InputError(str(error).replace("run_dir=", "output=", 1)) from error
    except OSError as error:
        raise InputError(f"output={output}: cannot be written: {error.strerror}") from error
    show.show(report, config.details)
    if not config.details and report.first_screen:
        print(text(f"everything: python report.py {shlex.join(config.runs)} details=true"))
    print(f"report: {folder / 'report.html'}")
    return 0


def _sweep(paths: list[str]) -> Sweep | None:
    """The sweep that is all there is to report on. One among others is a folder of runs like any."""
    try:
        return Sweep.load(Path(paths[0]) / "sweep.json") if len(paths) == 1 else None
    except FileNotFoundError:
        return None
    except DamagedError as error:
        raise InputError(f"{paths[0]}: {error}; name the folders in it instead") from error


def _is_comparison(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("plan.json", "comparison.json", "rounds"))


def _folders(paths: list[str]) -> list[Path]:
    """Folders of runs and comparisons, each once; a folder of folders means all of them."""
    found: list[Path] = []
    for path in map(Path, paths):
        if not path.is_dir():
            raise InputError(f"{path}: is not a folder; use folders that compare.py or train.py wrote")
        inside = [path] if _is_comparison(path) or is_run(path) else sorted(p for p in path.iterdir() if p.is_dir())
        holders = [folder for folder in inside if _is_comparison(folder) or is_run(folder)]
        if not holders:
            raise InputError(f"{path}: holds no run; use folders that compare.py or train.py wrote")
        found += [folder for folder in holders if folder.resolve() not in {f.resolve() for f in found}]
    return found


def entries(folder: Path) -> list[Entry]:
    """What a folder brings to a leaderboard: a comparison's variants without ablations, or the one run."""
    if not _is_comparison(folder):
        return [load_run(folder)]
    found = read(folder)
    facts = found.work, found.machine, found.environment, folder, found.created
    return [Entry(variant, *facts) for variant in plain(found)]


def load_run(folder: Path) -> Entry:
    """One run folder of any schema and state: ok (it finished), partial (it did not, but was timed), failed.

    InputError for a folder that is not a run at all.
    """
    run = runs.read(folder)
    found, facts, done = (
        figures.of_variant({0: run}, recipe=run.config, planned=1),
        run.facts,
        run.state is RunState.DONE,
    )
    checked = _own_parity(folder)
    reason: str | None = run.reason
    if checked.state is ParityState.FAIL:
        state, reason = VariantState.WRONG, f"failed parity: {checked.reason}"
    elif done:
        state, reason = VariantState.OK, None
    else:
        state = VariantState.PARTIAL if len(run.kept) else VariantState.FAILED
    # One process: its iterations are all there is to go by.
    interval = run.summary.times.ci95 if run.summary else None
    variant = VariantResult(
        **dict(found) | {"times": found.times and found.times.model_copy(update={"ci95": interval})},
        name=folder.name,
        label=f"{facts.backend.upper()} {'compiled' if facts.compile else 'eager'}" if facts else folder.name,
        state=state,
        reason=reason,
        parity=checked.state,
        ranks=facts.world_size if facts else 1,
        runs=int(done),
        failed_runs=() if done else (FailedRun(round=0, state=run.state, reason=run.reason),),
        fallbacks=runs.free(folder / "fallbacks.json", run.problems),
    )
    created = run.outcome.started if run.outcome else None
    return Entry(
        variant, run.work, figures.machine(run.env, [run.capabilities]), run.env, folder, created, run.problems
    )


def _own_parity(folder: Path) -> ParityResult:
    """What the gate said of a run that is a comparison's: rounds/2-mps. Not run for any other."""
    place = folder.resolve()
    matched = ROUND.fullmatch(place.name) if place.parent.name == "rounds" else None
    parity = runs.load(Parity, place.parent.parent / "parity.json", []) if matched else None
    found = parity.variants.get(matched[2]) if parity and matched else None
    return found or ParityResult(state=ParityState.NOT_RUN)


# -- the board --------------------------------------------------------------------------------------------------------


class Board:
    """Entries in groups of the same work, each ranked by itself."""

    def __init__(self, entries: Sequence[Entry]) -> None:
        self.entries = entries
        self.rest = [entry for entry in entries if entry.unranked() is not None]
        groups: dict[tuple[object, ...], list[Entry]] = {}
        for entry in entries:
            if entry.unranked() is None:
                groups.setdefault((entry.work.key(), entry.work.stand_in), []).append(entry)
        ranked = [sorted(group, key=lambda entry: entry.median) for group in groups.values()]
        self.groups = sorted(ranked, key=len, reverse=True)

    def report(self) -> Report:
        places = {entry.place for entry in self.entries}
        facts = [plural(len(self.entries), "entry", "entries"), plural(len(places), "machine")]
        sections = [_ranked(i, group) for i, group in enumerate(self.groups, 1)]
        sections += [_unranked(self.rest), _sources(self.entries)]
        title = "Leaderboard: " + ", ".join(facts)
        first = tuple(section.id for section in sections if section.id != "sources")
        return Report("Leaderboard", title, self.sentence(), sections, facts, version=nanogpt_mac.__version__,
                      first_screen=first)  # fmt: skip

    def html(self) -> str:
        """The page, with a chart of each group."""
        from nanogpt_mac.compare import charts

        named = [[(f"{label(e.variant)}, {text(e.machine.name)}", e.median, e.bounds) for e in g] for g in self.groups]
        return page.html(self.report(), {f"work-{i}": [charts.board(i, group)] for i, group in enumerate(named, 1)})

    def sentence(self) -> str:
        if not self.groups:
            return "Nothing here can be ranked."
        first = [_leaders(group) for group in self.groups]
        if len(first) == 1:
            return f"{first[0]}."
        return f"{len(first)} kinds of work, ranked apart. " + " ".join(f"{i}: {s}." for i, s in enumerate(first, 1))


def ranks(group: Sequence[Entry]) -> list[int | None]:
    """The rank of each entry: 1 and the number of entries whose whole interval is faster; None without an interval."""
    highs = [entry.bounds[1] for entry in group if entry.bounds]
    return [1 + sum(high < entry.bounds[0] for high in highs) if entry.bounds else None for entry in group]


def _leaders(group: Sequence[Entry]) -> str:
    best, given = group[0], ranks(group)
    leaders = [_on(entry) for entry, rank in zip(group, given, strict=True) if rank == 1]
    time = f"{ms(best.median)} ms an iteration"
    if len(group) == 1:
        return f"Only {_on(best)} could be ranked: {time}"
    if None in given:  # the times of an entry without an interval may be anything
        return f"{_on(best)} has the lowest median: {time}"
    if len(leaders) > 1:
        more = [f"{len(leaders) - 4} more"] if len(leaders) > 4 else []
        return f"{listed(leaders[:4] + more)} cannot be told apart ({time})"
    return f"{_on(best)} is fastest: {time}"


def _on(entry: Entry) -> str:
    return f"{label(entry.variant)} on {text(entry.machine.name or 'an unknown machine')}"


def _ranked(number: int, group: Sequence[Entry]) -> Section:
    given, best = ranks(group), group[0].median
    columns: dict[str, Callable[[Entry], str]] = {
        "machine": lambda e: text(e.machine.name),
        "ms an iteration [95 %]": lambda e: median(e.variant) if e.bounds else ms(e.median),
        "time relative to fastest": lambda e: ratio(e.median / best),
        "tokens/s": lambda e: count(e.variant.tokens_per_s),
        "MFU: chip": lambda e: percent(e.variant.mfu),
        "MFU: measured": lambda e: percent(e.variant.mfu_measured),
        "peak memory": lambda e: size(e.variant.peak_memory),
        "J per 1000 tokens": lambda e: text(e.variant.energy and e.variant.energy.joules_per_1000_tokens),
        "parity": lambda e: doubts.PARITY.get(e.variant.parity, e.variant.parity),
        "runs": lambda e: count(e.variant.runs),
        "GPU cores": lambda e: count(e.machine.gpu_cores),
        "memory": lambda e: size(e.machine.memory_bytes),
        "system": lambda e: text(e.machine.os),
        "framework": _framework,
        "power": lambda e: text(e.environment and e.environment.power_source),
        "note": lambda e: text(e.variant.note),
    }
    rows = []
    for entry, rank in zip(group, given, strict=True):
        place = DASH if rank is None else f"{rank}{'=' if given.count(rank) > 1 else ''}"
        partial = Mark.PARTIAL if entry.variant.state is VariantState.PARTIAL else Mark.NONE
        cells = [label(entry.variant), place, *(cell(entry) for cell in columns.values())]
        rows.append(Row(cells, Mark.BEST if rank == 1 and None not in given else partial))
    caption = "Ranked by median; entries whose intervals overlap share a rank (=)"
    board = Table(caption, ["variant", "rank", *columns], rows)
    places = list(dict.fromkeys(entry.place for entry in group))
    work = group[0].work
    title = (
        f"Work {number}: batch {work.batch_size} x {work.block_size}, {text(work.dtype)}, corpus {text(work.corpus)}"
    )
    notes = [f"{work_facts(work)}."]
    if None in given:
        notes.append("An entry without an interval has no rank: its comparison had too few rounds to bound its median.")
    if any(entry.problems is not None for entry in group):
        notes.append("A single run's interval is that of its own iterations: how runs differ is not in it.")
    return Section(f"work-{number}", title, notes, [board, *([_by_machine(group, places)] if len(places) > 1 else [])])


def _by_machine(group: Sequence[Entry], places: Sequence[str]) -> Table:
    """Variants against machines: the best median of each."""
    best: dict[str, dict[str, str]] = {}
    for entry in group:  # the fastest first, which stays
        best.setdefault(label(entry.variant), {}).setdefault(entry.place, ms(entry.median))
    rows = [Row([name, *(found.get(place, DASH) for place in places)]) for name, found in best.items()]
    return Table("Milliseconds an iteration by machine", ["variant", *places], rows)


def _framework(entry: Entry) -> str:
    able, env = entry.variant.capabilities, entry.environment
    version = env.versions.get(able.framework) if able and env else None
    return f"{able.framework} {text(version)}" if able and version else DASH


def _unranked(rest: Sequence[Entry]) -> Section:
    rows = [
        Row([label(e.variant), e.place, ms(e.median or None), e.unranked() or "", text(str(e.folder))],
            {VariantState.OK: Mark.NONE}.get(e.variant.state, Mark.PARTIAL))
        for e in rest
    ]  # fmt: skip
    columns = ["variant", "machine", "ms an iteration", "why", "from"]
    table = Table("Entries without a rank, and why", columns, rows)
    return Section("unranked", "Not ranked", [], [table], "Every entry is ranked.")


def _sources(entries: Sequence[Entry]) -> Section:
    rows = []
    for folder in dict.fromkeys(entry.folder for entry in entries):
        some = [entry for entry in entries if entry.folder == folder]
        one = some[0]
        git = one.environment.git if one.environment else None
        what = "one run" if one.problems is not None else plural(len(some), "variant")
        rows.append(Row([text(str(folder)), what, one.place, when(one.created), text(git and git.commit[:9]),
                         text("; ".join(one.problems or ()))]))  # fmt: skip
    columns = ["folder", "what", "machine", "created", "commit", "what could not be read"]
    return Section("sources", "Where it comes from", [], [Table("Folders read", columns, rows)], "Nothing was read.")
