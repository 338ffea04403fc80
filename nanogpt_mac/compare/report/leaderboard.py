"""`python report.py`: one comparison's report made anew, or a leaderboard over runs of several machines.

Only runs of the same work (model, batch, precision, corpus) are ranked together. Ranks come from the medians' 95 %
intervals: entries whose intervals overlap share one.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nanogpt_mac
from nanogpt_mac import simulator
from nanogpt_mac.compare.report import render
from nanogpt_mac.compare.report.config import ReportConfig
from nanogpt_mac.compare.report.sections import plain, work_facts
from nanogpt_mac.compare.results.collect import SCHEMA, collect, load_run
from nanogpt_mac.compare.results.runs import RUN_FILES, WORK_KEYS, parsed, work_key
from nanogpt_mac.errors import InputError
from nanogpt_mac.files import run_folder
from nanogpt_mac.report import show
from nanogpt_mac.report.table import Row, Section, Table
from nanogpt_mac.report.words import (
    DASH,
    count,
    get,
    interval,
    label,
    ms,
    num,
    nums,
    percent,
    ratio,
    size,
    state,
    text,
    when,
)  # fmt: skip

_MODEL_KEYS = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size", "dropout")


@dataclass(frozen=True)
class Entry:
    """One variant on one machine."""

    variant: dict[str, Any]
    work: dict[str, Any]
    machine: dict[str, Any]
    environment: dict[str, Any]
    folder: Path
    created: Any

    @property
    def median(self) -> float:
        return max(num(get(self.variant, "iter_ms", "median")) or 0.0, 0.0)

    @property
    def bounds(self) -> list[float] | None:
        """The median's interval; None where it is not known, or does not hold the median."""
        found = nums(get(self.variant, "iter_ms", "ci95"), 2)
        return found if found and 0 < found[0] <= self.median <= found[1] else None

    def where(self) -> str:
        """The machine in a few words."""
        cores = num(get(self.machine, "gpu_cores"))
        memory = get(self.machine, "memory_bytes")
        pieces = [text(get(self.machine, "name") or "machine not known")]
        pieces += [f"{cores:.0f} GPU cores"] if cores else []
        pieces += [size(memory)] if num(memory) else []
        return ", ".join(pieces)

    def unranked(self) -> str | None:
        """Why it takes no rank; None for an entry that does."""
        device = self.variant.get("device")
        if device == simulator.DEVICE_NAME or (device is None and get(self.machine, "simulated") is True):
            return "simulated device: its times are no Mac's"
        if state(self.variant) == "wrong":
            return f"WRONG: {text(self.variant.get('reason') or 'failed the parity check')}"
        if not self.median:
            return text(self.variant.get("reason") or "nothing was timed")
        if str(self.variant.get("reason") or "").startswith("diverged"):
            return text(self.variant["reason"])
        if self.variant.get("parity") == "error":
            return "its parity could not be checked"
        if self.variant.get("same_work") is False:
            return "did other work than the rest of its comparison"
        model = get(self.work, "model") or {}
        unknown = [key for key in WORK_KEYS if get(self.work, key) is None]
        unknown += [f"model.{key}" for key in _MODEL_KEYS if get(model, key) is None]
        return f"what it trained is not fully recorded: no {', '.join(unknown)}" if unknown else None


# -- what is given ----------------------------------------------------------------------------------------------------


def run(config: ReportConfig) -> int:
    """Write report.md and report.html, show the same in the terminal; 0. InputError for a path that holds no run."""
    if not config.runs:
        raise InputError("runs=[]: name the folders to report on (python report.py runs/a runs/b)")
    try:
        folders = _folders(config.runs)
        single = read(folders[0]) if len(folders) == 1 and _is_comparison(folders[0]) else None
        board = Board([] if single else [entry for folder in folders for entry in entries(folder)])
    except OSError as error:  # a folder that may not be looked into
        raise InputError(f"{error.filename}: cannot be read: {error.strerror}") from error
    if single:
        render.show(single)
        made = render.markdown(single), render.html(single)
        output = config.output or str(folders[0])
    else:
        show.show_page(board.sentence(), board.facts(), [], board.sections())
        made = board.markdown(), board.html()
        output = config.output or "runs/{date}/{time}-report"
    try:
        folder = run_folder(output, "report") if output != str(folders[0]) else folders[0]
        for name, content in zip(("report.md", "report.html"), made, strict=True):
            (folder / name).write_text(content, encoding="utf-8")
    except InputError as error:
        raise InputError(str(error).replace("run_dir=", "output=", 1)) from error
    except OSError as error:
        raise InputError(f"output={output}: cannot be written: {error.strerror}") from error
    print(f"report: {folder / 'report.html'}")
    return 0


def _is_comparison(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("plan.json", "comparison.json", "rounds"))


def _is_run(folder: Path) -> bool:
    return any((folder / name).is_file() for name in RUN_FILES)


def _folders(paths: list[str]) -> list[Path]:
    """Folders of runs and comparisons, each once; a folder of several stands for those."""
    found: list[Path] = []
    for path in map(Path, paths):
        if not path.is_dir():
            raise InputError(f"{path}: is no folder; allowed are folders that compare.py or train.py wrote")
        inside = [path] if _is_comparison(path) or _is_run(path) else sorted(p for p in path.iterdir() if p.is_dir())
        holders = [folder for folder in inside if _is_comparison(folder) or _is_run(folder)]
        if not holders:
            raise InputError(f"{path}: holds no run; allowed are folders that compare.py or train.py wrote")
        found += [folder for folder in holders if folder.resolve() not in {f.resolve() for f in found}]
    return found


def read(folder: Path) -> dict[str, Any]:
    """A comparison: collected from its runs, or its comparison.json where they were not kept."""
    if (folder / "rounds").is_dir() or not (folder / "comparison.json").is_file():
        return collect(folder)
    try:
        found = parsed((folder / "comparison.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{folder / 'comparison.json'}: cannot be read ({text(str(error))})") from error
    if not isinstance(found, dict):
        raise InputError(f"{folder / 'comparison.json'}: holds no comparison")
    schema = found.get("schema")
    if isinstance(schema, int) and schema > SCHEMA:
        warnings = found.get("warnings")
        newer = f"comparison.json has schema {schema}, newer than this program's {SCHEMA}: something may be missing"
        found["warnings"] = [newer, *(warnings if isinstance(warnings, list) else [])]
    return found


def entries(folder: Path) -> list[Entry]:
    """What a folder brings to a leaderboard: a comparison's variants without ablations, or the one run."""
    document = read(folder) if _is_comparison(folder) else load_run(folder)
    variants = plain(document) if _is_comparison(folder) else [document]
    facts = [get(document, key) for key in ("work", "machine", "environment")]
    work, machine, environment = (fact if isinstance(fact, dict) else {} for fact in facts)
    return [Entry(variant, work, machine, environment, folder, document.get("created")) for variant in variants]


# -- the board --------------------------------------------------------------------------------------------------------


class Board:
    """Entries in groups of the same work, each ranked by itself."""

    def __init__(self, entries: list[Entry]) -> None:
        self.entries = entries
        groups: dict[Any, list[Entry]] = {}
        for entry in entries:
            if entry.unranked() is None:
                key = (repr(work_key(entry.work)), bool(entry.work.get("stand_in")))
                groups.setdefault(key, []).append(entry)
        ranked = [sorted(group, key=lambda entry: entry.median) for group in groups.values()]
        self.groups = sorted(ranked, key=len, reverse=True)
        self.rest = [entry for entry in entries if entry.unranked() is not None]

    def sentence(self) -> str:
        if not self.groups:
            return "Nothing here can be ranked."
        first = []
        for group in self.groups:
            best = group[0]
            given = ranks(group)
            leaders = [entry for entry, rank in zip(group, given, strict=True) if rank == 1]
            if len(group) == 1:
                first.append(f"{_on(best)} is the only entry to rank: {ms(best.median)} ms an iteration")
            elif None in given:  # the times of an entry without an interval may be anything
                first.append(f"{_on(best)} has the lowest median: {ms(best.median)} ms an iteration")
            elif len(leaders) > 1:
                names = [_on(entry) for entry in leaders[:4]]
                names += [f"{len(leaders) - 4} more"] if len(leaders) > 4 else []
                first.append(f"{' and '.join(names)} cannot be told apart ({ms(best.median)} ms an iteration)")
            else:
                first.append(f"{_on(best)} is fastest: {ms(best.median)} ms an iteration")
        if len(first) == 1:
            return f"{first[0]}."
        return f"{len(first)} kinds of work, ranked apart. " + " ".join(f"{i}: {s}." for i, s in enumerate(first, 1))

    def facts(self) -> str:
        return ", ".join(self._facts())

    def _facts(self) -> list[str]:
        machines = {entry.where() for entry in self.entries}
        return [_plural(len(self.entries), "entry", "entries"), _plural(len(machines), "machine", "machines")]

    def sections(self) -> list[Section]:
        made = [_group_section(i, group) for i, group in enumerate(self.groups, 1)]
        rows = [
            Row([label(entry.variant), entry.where(), ms(entry.median or None), entry.unranked() or "",
                 text(str(entry.folder))],
                state(entry.variant) if state(entry.variant) != "ok" else "")
            for entry in self.rest
        ]  # fmt: skip
        unranked = Table(
            "Entries without a rank, and why", ["variant", "machine", "ms an iteration", "why", "from"], rows
        )
        made.append(Section("unranked", "Not ranked", [], [unranked], "Every entry is ranked."))
        made.append(_sources(self.entries))
        return made

    def markdown(self) -> str:
        heading = "Leaderboard: " + self.facts()
        return show.markdown_page(heading, self.sentence(), self.sections(), nanogpt_mac.__version__)

    def html(self) -> str:
        """The page, with a chart of each group."""
        from nanogpt_mac.compare.report import charts, page

        drawn = {f"work-{i}": [charts.board(i, _named(group))] for i, group in enumerate(self.groups, 1)}
        return page.filled(
            page.Page("Leaderboard", "Leaderboard", self.sentence(), self._facts(), [], [], self.sections(),
                      nanogpt_mac.__version__, drawn)
        )  # fmt: skip


def _on(entry: Entry) -> str:
    return f"{label(entry.variant)} on {text(get(entry.machine, 'name') or 'a machine not known')}"


def ranks(group: list[Entry]) -> list[int | None]:
    """The rank of each entry: 1 and the number of entries whose whole interval is faster; None without an interval."""
    highs = [entry.bounds[1] for entry in group if entry.bounds]
    return [1 + sum(high < entry.bounds[0] for high in highs) if entry.bounds else None for entry in group]


def _named(group: list[Entry]) -> list[tuple[str, float, str]]:
    return [(f"{label(e.variant)}, {text(get(e.machine, 'name'))}", e.median, f"{ms(e.median)} ms") for e in group]


def _group_section(number: int, group: list[Entry]) -> Section:
    given = ranks(group)
    rows = []
    for entry, rank in zip(group, given, strict=True):
        variant, best = entry.variant, group[0].median
        shared = "=" if given.count(rank) > 1 else ""
        median = ms(entry.median) + (f" {interval(entry.bounds)}" if entry.bounds else "")
        cells = [
            label(variant), DASH if rank is None else f"{rank}{shared}", text(get(entry.machine, "name")), median,
            ratio(entry.median / best), count(variant.get("tokens_per_s")), percent(variant.get("mfu")),
            percent(variant.get("mfu_measured")), size(variant.get("peak_memory")),
            text(num(get(variant, "energy", "joules_per_1000_tokens"))), text(variant.get("parity")), count(variant.get("runs")),
            count(get(entry.machine, "gpu_cores")), size(get(entry.machine, "memory_bytes")),
            text(get(entry.machine, "os")), _framework(entry), text(get(entry.environment, "power_source")),
        ]  # fmt: skip
        rows.append(
            Row(
                cells,
                "fastest" if rank == 1 and None not in given else "partial" if state(variant) == "partial" else "",
            )
        )
    columns = ["variant", "rank", "machine", "ms an iteration [95 %]", "x the fastest", "tokens/s", "MFU: chip",
               "MFU: measured", "peak memory", "J per 1000 tokens", "parity", "runs", "GPU cores", "memory", "system",
               "framework", "power"]  # fmt: skip
    board = Table("Ranked by median; entries whose intervals overlap share a rank (=)", columns, rows)
    machines = list(dict.fromkeys(entry.where() for entry in group))
    tables = [_by_machine(group, machines), board] if len(machines) > 1 else [board]
    corpus = text(get(group[0].work, "corpus"))
    batch, block, dtype = (text(get(group[0].work, key)) for key in ("batch_size", "block_size", "dtype"))
    title = f"Work {number}: batch {batch} x {block}, {dtype}, corpus {corpus}"
    notes = [work_facts(group[0].work) + "."]
    if any(rank is None for rank in given):
        notes.append("An entry without an interval has no rank: its comparison had too few rounds to bound its median.")
    if any("problems" in entry.variant for entry in group):  # a single run
        notes.append("A single run's interval is that of its own iterations: how runs differ is not in it.")
    return Section(f"work-{number}", title, notes, tables)


def _by_machine(group: list[Entry], machines: list[str]) -> Table:
    """Variants against machines: the best median of each."""
    rows = []
    for name in dict.fromkeys(label(entry.variant) for entry in group):
        best = {}
        for entry in reversed(group):  # the fastest last, which stays
            if label(entry.variant) == name:
                best[entry.where()] = ms(entry.median)
        rows.append(Row([name, *(best.get(machine, DASH) for machine in machines)]))
    return Table("Milliseconds an iteration by machine", ["variant", *machines], rows)


def _framework(entry: Entry) -> str:
    name = "mlx" if entry.variant.get("backend") == "mlx" else "torch"
    version = get(entry.environment, "versions", name)
    return f"{name} {text(version)}" if version else DASH


def _sources(entries: list[Entry]) -> Section:
    rows = []
    for folder in dict.fromkeys(entry.folder for entry in entries):
        some = [entry for entry in entries if entry.folder == folder]
        problems = some[0].variant.get("problems")
        what = _plural(len(some), "variant", "variants") if _is_comparison(folder) else "one run"
        cells = [text(str(folder)), what, some[0].where(), when(some[0].created)]
        cells += [text(get(some[0].environment, "git", "commit"))[:9], text(problems)]
        rows.append(Row(cells))
    columns = ["folder", "what", "machine", "created", "commit", "what could not be read"]
    return Section("sources", "Where it comes from", [], [Table("Folders read", columns, rows)], "Nothing was read.")


def _plural(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"
