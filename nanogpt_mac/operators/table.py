"""Where each operator of one torch runs when its tensors are on MPS: the table behind everything else here.

Sources: the `native_functions.yaml` that every torch carries, read by that torch's own torchgen; the registrations made
by hand in C++ (by_hand.py) and from Python. `binary=true` reads the compiled registrations too and checks the three
against them: for 2.9.1, 2.12.0, 2.13.0, 2.14.1 and 2.15.0 they agree in every operator.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from pathlib import Path

from packaging.version import Version

from nanogpt_mac import child, files
from nanogpt_mac.errors import InputError
from nanogpt_mac.operators import by_hand, macho, native_yaml, wheel
from nanogpt_mac.operators.by_hand import IN_COMPOSITE
from nanogpt_mac.operators.native_yaml import Facts


class Kind(StrEnum):
    """Where an overload runs. Under COMPOSITE it is made of other operators, whose own kinds decide."""

    NATIVE = "native"  # a kernel of its own
    DELEGATE = "structured delegate"  # the kernel of its out= form
    PYTHON = "python"  # a kernel registered from Python
    COMPOSITE = "composite"
    FALLBACK = "explicit fallback"  # registered to run on the CPU, whatever the environment says
    MISSING_CPU = "missing, CPU kernel"  # an error, or the CPU with PYTORCH_ENABLE_MPS_FALLBACK=1
    MISSING = "missing, no CPU kernel"  # an error; the variable cannot help
    UNKNOWN = "unknown"  # the sources contradict each other, or do not know the operator


RUNS = (Kind.NATIVE, Kind.DELEGATE, Kind.PYTHON, Kind.COMPOSITE)  # nothing is left to the CPU by the operator itself
COMPOSITE_KEYS = ("CompositeImplicitAutograd", "CompositeExplicitAutograd", "CompositeExplicitAutogradNonFunctional")


_OF_OTHERS = ("sparse", "dequantize", "for_cpu")  # in the names of operators that no dense tensor on MPS meets


@dataclass(frozen=True)
class Entry:
    """One overload, named without `aten::`.

    `decomposes_to` is, for a composite, the operators that its code can call in any branch; None where the sources that
    were read do not tell (for most of them only the binary does).
    """

    op: str
    kind: Kind
    facts: Facts
    decomposes_to: list[str] | None = None
    note: str | None = None  # what is unusual about it

    @property
    def runs(self) -> bool:
        return self.kind in RUNS

    @property
    def reported_as(self) -> str:
        """The name that torch's warning or error uses: a missing structured operator's out= form."""
        missing = self.kind in (Kind.MISSING, Kind.MISSING_CPU)
        return (self.facts.delegate or self.op) if missing else self.op


@dataclass
class Table:
    """All overloads of one torch. `hand_list` and `disagreements` hold lines for the report."""

    asked: str
    version: str
    git: str | None
    wheel: str | None
    sha256: str | None
    binary: bool
    entries: dict[str, Entry]
    disagreements: list[str] = field(default_factory=list)

    def kind(self, op: str) -> str | None:
        """A `Kind` as it is written down; None where this torch has no such overload."""
        entry = self.entries.get(op)
        return entry.kind.value if entry else None

    def counts(self) -> dict[str, int]:
        count = Counter(entry.kind for entry in self.entries.values())
        return {kind.value: count[kind] for kind in Kind}

    def hand_list(self) -> list[str]:
        """The registrations by hand in force."""
        return sorted(o for o, e in self.entries.items() if e.kind is Kind.FALLBACK or _raises(o, e.kind))

    def left_behind(self, op: str) -> list[str] | None:
        """Operators that do not run on MPS and that a composite can reach in some branch, or `op` if it does not run.

        Branches for other devices (parts without a CPU kernel: oneDNN, cuDNN) and other kinds of tensors are left out.
        None where the sources that were read do not tell what a composite is made of.
        """
        todo, seen, found = [op], {op}, []
        while todo:
            entry = self.entries[todo.pop()]
            if not entry.runs:
                found.append(entry.op)
            elif entry.kind is Kind.COMPOSITE and entry.op not in IN_COMPOSITE:
                if entry.decomposes_to is None:
                    return None
                parts = [p for p in entry.decomposes_to if p not in seen and not any(o in p for o in _OF_OTHERS)]
                todo += [p for p in parts if self.entries[p].runs or self.entries[p].facts.cpu]
                seen.update(entry.decomposes_to)
        return sorted(found)

    def evidence(self) -> str:
        """What the table rests on, and how far the list of registrations by hand can be trusted for this torch."""
        if self.binary:
            return (
                "native_functions.yaml, the registrations by hand and from Python, checked against libtorch_cpu.dylib"
            )
        low, high = map(Version, by_hand.CHECKED)
        known = low <= Version(Version(self.version).base_version) <= high
        trust = f"last checked against {high}" if known else f"NOT checked for this version (only {low} to {high})"
        return f"native_functions.yaml and the registrations by hand and from Python ({trust})"


def _raises(op: str, kind: Kind | None) -> bool:
    """Whether an overload of that kind is one that is registered by hand to raise."""
    return kind is Kind.MISSING and op in by_hand.RAISING


def classify(facts: dict[str, Facts], python: set[str]) -> dict[str, Entry]:
    """The kind of every overload; every delegate is itself a name of `facts`, and `python` are those from Python."""
    native = native_yaml.native(facts)
    registered = by_hand.in_force(native)

    def entry(op: str, fact: Facts) -> Entry:
        if op in native:
            return Entry(op, Kind.NATIVE if fact.kernel else Kind.DELEGATE, fact)
        if row := registered.get(op):
            return Entry(op, Kind.MISSING if row.raises else Kind.FALLBACK, fact, note=row.note)
        if op in python:
            return Entry(op, Kind.PYTHON, fact)
        if fact.delegate in python:  # the generated wrapper calls the out= form
            return Entry(op, Kind.COMPOSITE, fact, [fact.delegate])
        if fact.composite:
            branch = "its composite kernel has a branch of its own for MPS" if op in IN_COMPOSITE else None
            return Entry(op, Kind.COMPOSITE, fact, note=branch)
        return Entry(op, Kind.MISSING_CPU if fact.cpu else Kind.MISSING, fact)

    return {op: entry(op, fact) for op, fact in facts.items()}


def python_registrations(source: str) -> set[str]:
    """Overloads that a Python file registers for MPS: `Library(..., "MPS").impl(op, f)` or `.impl(op, f, "MPS")`."""
    tree = ast.parse(source)

    def constants(call: ast.Call) -> list[object]:
        values = [*call.args, *(keyword.value for keyword in call.keywords)]
        return [value.value for value in values if isinstance(value, ast.Constant)]

    of_mps = {
        target.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call) and "MPS" in constants(node.value)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    ops = set()
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "impl"):
            continue
        library, values = node.func.value, constants(node)
        if "MPS" in values or (isinstance(library, ast.Name) and library.id in of_mps):
            ops |= {str(values[0]).removeprefix("aten::")} if values else set()
    return ops


def disagreements(entries: dict[str, Entry], found: list[macho.Registration]) -> dict[str, str]:
    """Overloads whose kind the binary contradicts, and how; `found` is what it registers for MPS and COMPOSITE_KEYS."""
    aten = [r for r in found if r.namespace in ("aten", "_") and r.op]
    mps = {r.op: r for r in aten if r.key == "MPS"}
    composite = {r.op for r in aten if r.key in COMPOSITE_KEYS}
    wrong: dict[str, str] = {}
    for op in {*entries, *(str(op) for op in mps)}:
        entry, registration = entries.get(op), mps.get(op)
        kind = entry.kind if entry else None
        if kind is None:
            wrong[op] = "registered for MPS in the binary, unknown to the YAML"
        elif registration is None:
            if kind in (Kind.NATIVE, Kind.DELEGATE, Kind.FALLBACK) or _raises(op, kind):
                wrong[op] = f"{kind} by the YAML and the hand list, not registered for MPS in the binary"
            elif kind is Kind.COMPOSITE and op not in composite:
                wrong[op] = "composite by the YAML, not in the binary"
        elif registration.falls_back != (kind is Kind.FALLBACK):
            what = "a CPU fallback" if registration.falls_back else "a kernel"
            wrong[op] = f"{kind} by the YAML and the hand list, registered as {what} in the binary"
        elif kind not in (Kind.NATIVE, Kind.DELEGATE, Kind.FALLBACK) and not _raises(op, kind):
            wrong[op] = f"{kind} by the YAML and the hand list, registered for MPS in the binary"
    return wrong


# -- making and keeping one -------------------------------------------------------------------------------------------


def load(asked: str, python: str = "3.12", binary: bool = False, nightly_index: str = wheel.NIGHTLY_INDEX) -> Table:
    """The table of the torch that `asked` names (see wheel.find), from the cache folder where it was read before.

    InputError where that torch cannot be found or read; then nothing is kept.
    """
    if (identity := wheel.release_identity(asked, python)) is None:
        return load_found(wheel.find(asked, python, nightly_index), python, binary, nightly_index)
    return _kept(asked, identity, lambda: wheel.find(asked, python, nightly_index), python, binary, nightly_index)


def load_found(
    torch: wheel.Torch, python: str = "3.12", binary: bool = False, nightly_index: str = wheel.NIGHTLY_INDEX
) -> Table:
    """As `load`, for a torch that was found before."""
    return _kept(torch.asked, torch.identity, lambda: torch, python, binary, nightly_index)


def _kept(
    asked: str, identity: str, find: Callable[[], wheel.Torch], python: str, binary: bool, nightly_index: str
) -> Table:
    def make() -> str:
        wanted = find()
        with wheel.unpacked(wanted, binary, python, nightly_index) as root:
            return json.dumps(asdict(read(wanted, root, binary)))

    return replace(files.kept(_cache_file(identity, binary), _parsed, make), asked=asked)


def _cache_file(identity: str, binary: bool) -> Path:
    """Named after the torch and after the code that reads it, so that a change here is never hidden by the cache."""
    digest = hashlib.sha256(f"{identity} {binary}".encode())
    for name in ("table.py", "by_hand.py", "macho.py", "native_yaml.py", "wheel.py"):
        digest.update(Path(__file__).with_name(name).read_bytes())
    return wheel.cache_folder() / "tables" / f"{digest.hexdigest()[:32]}.json"


def _parsed(text: str) -> Table:
    kept = json.loads(text)
    entries = {
        op: Entry(op, Kind(e["kind"]), Facts(**e["facts"]), e["decomposes_to"], e["note"])
        for op, e in kept.pop("entries").items()
    }
    return Table(**kept, entries=entries)


def read(torch: wheel.Torch, root: Path, binary: bool) -> Table:
    """Reads the table out of the files that wheel.unpacked laid out in `root`."""
    facts = _run_torchgen(torch, root)
    sources = [root / name for name in wheel.PYTHON_SOURCES]
    python = set().union(*(python_registrations(path.read_text()) for path in sources if path.is_file()))
    entries = classify(facts, python)
    if not any(entry.kind is Kind.NATIVE for entry in entries.values()):
        raise InputError(f"torch={torch.asked}: no operator of {wheel.YAML} has an MPS kernel (dispatch key renamed?)")
    text = (root / "torch/version.py").read_text() if (root / "torch/version.py").is_file() else ""
    git = re.search(r"git_version = '([0-9a-f]+)'", text)
    lines: list[str] = []
    if binary:
        try:
            entries, lines = _check_binary(entries, macho.Image(root / wheel.DYLIB))
        except InputError as error:
            raise InputError(f"torch={torch.asked}: {error}") from error
    return Table(
        torch.asked, torch.version, git and git[1], torch.wheel, torch.sha256, binary, entries, disagreements=lines
    )


def _run_torchgen(torch: wheel.Torch, root: Path) -> dict[str, Facts]:
    try:
        facts = child.ask([sys.executable, "-I", native_yaml.__file__, root])
    except child.ChildError as error:
        raise InputError(f"torch={torch.asked}: its torchgen cannot read its {wheel.YAML}: {error}") from error
    return {op: Facts(**fact) for op, fact in facts.items()}


def _check_binary(entries: dict[str, Entry], image: macho.Image) -> tuple[dict[str, Entry], list[str]]:
    """The entries with what the binary adds: composites' parts, and UNKNOWN wherever it disagrees."""
    found = macho.registrations(image, ("MPS", *COMPOSITE_KEYS))
    entries = dict(entries)
    in_cpp = {op.replace(".", "_"): op for op in entries}
    for r in found:
        if r.namespace == "aten" and r.key in COMPOSITE_KEYS and r.op in entries:
            entry, called = entries[r.op], macho.operators_called(image, r)
            if entry.kind is Kind.COMPOSITE and called is not None:
                entries[r.op] = replace(entry, decomposes_to=sorted(in_cpp[c] for c in called if c in in_cpp))
    wrong = disagreements(entries, found)
    for op, how in wrong.items():
        facts = entries[op].facts if op in entries else Facts(None, None, False, False, False)
        entries[op] = Entry(op, Kind.UNKNOWN, facts, note=how)
    return entries, [f"{op}: {how}" for op, how in sorted(wrong.items())]
