"""The whole surface, run: torch's own operator database on MPS against the CPU, and against what torch expects to fail.

The cases run in child processes, on a Mac's device or on the simulated one. A case that kills its process, or that does
not end, is an outcome of its own and the sweep goes on behind it.
"""

from __future__ import annotations

import platform
import sys
from collections import Counter
from dataclasses import asdict, dataclass
from importlib.util import find_spec

from nanogpt_mac import child, simulator
from nanogpt_mac.coverage import expected
from nanogpt_mac.coverage.page import CANNOT_TELL, LOST, OK, Page, section, some
from nanogpt_mac.errors import InputError
from nanogpt_mac.operators import by_hand, wheel
from nanogpt_mac.report.table import Section

SCHEMA = 1
JUDGEMENTS = ("newly fails", "newly falls back", "works although listed", "as expected", "not judged")
STATUSES = ("works", "falls back", "missing", "dtype limit", "wrong value", "error", "crashed", "skipped")
_FAILS = ("missing", "dtype limit", "wrong value", "error", "crashed")
_BATCH = 1000  # cases a process: what one of them breaks in a device ends with it
_LIMIT_S = 300  # a case that takes longer hangs
_BY_HAND = [f"'aten::{row.op}'" for row in by_hand.LIST if not row.raises]


@dataclass(frozen=True)
class Case:
    """One operator of the database in one dtype."""

    op: str
    dtype: str
    status: str  # one of STATUSES
    leg: str  # `forward`, or `gradient` where the forward pass works
    reason: str  # what was seen; empty where it works
    expected: str  # the lists of torch that have it; empty where torch expects it to work
    judged: str  # one of JUDGEMENTS


@dataclass(frozen=True)
class Begun:
    """A case that is about to run, in the words of the child."""

    number: int
    op: str
    key: str  # its name in torch's lists
    dtype: str
    own: dict[str, str]  # leg to what its own entry in the database expects


@dataclass
class Sweep:
    """Every case of the sweep, and the device and torch that it ran on."""

    device: str
    torch: str
    cases: list[Case]


def judge(status: str, reason: str, listed: str) -> str:
    """How an outcome compares with torch's lists. A list that says not to run a case expects nothing of it."""
    fails_there, not_run = "XFAIL" in listed or "COMPLEX" in listed, "SKIP" in listed
    if status == "skipped":
        return "not judged"
    if status in _FAILS:
        return "as expected" if fails_there else "not judged" if not_run else "newly fails"
    if not_run:
        return "not judged"
    registered = any(op in reason for op in _BY_HAND) or not reason.startswith("The operator")
    if status == "falls back" and not registered:
        return "newly falls back"
    return "works although listed" if fails_there else "as expected"


def sweep(names: list[str], samples: int) -> Sweep:
    """Runs the cases of the operators `names`, all for none; a line of progress goes to standard error.

    `samples` is how many of each case and leg are run at most. InputError where there is no expecttest or no device,
    for an operator that the database does not have, and where the child cannot start.
    """
    if find_spec("expecttest") is None:
        raise InputError("scope=opinfo: torch's operator database needs expecttest: python -m pip install expecttest")
    torch = wheel.find("installed")
    assert torch.path is not None
    lists = expected.read(torch.path)
    macos = tuple(int(part) for part in platform.mac_ver()[0].split(".") if part) or None
    total: int | None = None
    device = version = ""
    cases: list[Case] = []
    while total is None or len(cases) < total:
        begun: Begun | None = None
        why = "its process ended"
        done = len(cases)
        task = {"ask": "cases", "names": names, "samples": samples, "start": done, "stop": done + _BATCH}
        environment = simulator.environment(fallback=False)
        question = child.Question("nanogpt_mac.coverage.device_child", task, None, environment, _LIMIT_S)
        try:
            for line in child.ask_lines(question):
                if "cases" in line:
                    total, device, version = line["cases"], line["device"], line["torch"]
                elif "status" not in line:
                    begun = Begun(**line)
                else:
                    assert begun is not None
                    assert total is not None
                    cases.append(_case(begun, line["status"], line["leg"], line["reason"], lists, macos))
                    begun = None
                    _progress(len(cases), total)
        except child.ChildError as error:
            why = str(error)
            if begun is None:
                raise InputError(why if why.startswith("op=") else f"scope=opinfo: {why}") from error
        if total is None:
            raise InputError(f"scope=opinfo: {why} before it ran anything")
        if begun is not None:  # it ended in the middle of this case
            cases.append(_case(begun, "crashed", "forward", why, lists, macos))
    _progress(len(cases), len(cases), end=True)
    return Sweep(device, version, cases)


def _case(
    begun: Begun, status: str, leg: str, reason: str, lists: expected.Expected, macos: tuple[int, ...] | None
) -> Case:
    gradient = leg == "gradient"
    found = [lists.of(begun.key, begun.dtype, gradient, macos), begun.own["forward"]]
    found += [begun.own["gradient"]] if gradient else []
    listed = ", ".join(dict.fromkeys(filter(None, found)))
    return Case(begun.op, begun.dtype, status, leg, reason, listed, judge(status, reason, listed))


def _progress(done: int, total: int, end: bool = False) -> None:
    if sys.stderr.isatty():
        print(f"\r{done} of {total} cases", end="\n" if end else "", file=sys.stderr, flush=True)
    elif end or done % 1000 == 0:
        print(f"{done} of {total} cases", file=sys.stderr, flush=True)


# -- the report -------------------------------------------------------------------------------------------------------


def page(swept: Sweep) -> Page:
    """The report: what is unexpected first, what is as expected only counted.

    Exit code 0 as expected, 1 something newly fails or falls back, 2 nothing could be compared.
    """
    by_judgement = {name: [c for c in swept.cases if c.judged == name] for name in JUDGEMENTS}
    lost = [*by_judgement["newly fails"], *by_judgement["newly falls back"]]
    compared = [c for c in swept.cases if c.status != "skipped"]
    if lost:
        names = some([f"{c.op} ({c.dtype})" for c in lost])
        code, verdict = LOST, f"{len(lost)} cases fail or fall back that torch expects to work: {names}"
    elif not compared:
        code, verdict = CANNOT_TELL, "no case could be compared with the CPU"
    else:
        unlisted = by_judgement["works although listed"]
        code, verdict = OK, f"nothing fails that torch expects to work, in {len(compared)} cases"
        verdict += f"; {len(unlisted)} work that it expects to fail" if unlisted else ""
    lines = [f"torch {swept.torch} on {swept.device}: {len(swept.cases)} cases of torch's operator database"]
    if swept.device != "mps":
        lines.append("simulated: CPU kernels, so a Mac's own limits of dtype and its values cannot show")
    data = {
        "schema": SCHEMA,
        "scope": "opinfo",
        "torch": swept.torch,
        "device": swept.device,
        "counts": dict(Counter(c.status for c in swept.cases)),
        "judged": {name: len(cases) for name, cases in by_judgement.items()},
        "cases": [asdict(c) for c in sorted(swept.cases, key=lambda c: JUDGEMENTS.index(c.judged))],
    }
    title = f"torch's operator database on MPS, torch {swept.torch}"
    return Page(title, lines, _sections(by_judgement), code, verdict, data)


def _sections(by_judgement: dict[str, list[Case]]) -> list[Section]:
    made = []
    for name in ("newly fails", "newly falls back"):
        rows = [[c.op, c.dtype, c.status, c.leg, c.reason] for c in by_judgement[name]]
        made.append(section(name.capitalize(), ["op", "dtype", "outcome", "leg", "what was seen"], rows))
    falling = [(c.op, c.dtype, c.reason) for c in by_judgement["as expected"] if c.status == "falls back"]
    made.append(section("Falls back, as it is registered to", ["op", "dtypes", "what was seen"], _by_op(falling)))
    works = [(c.op, c.dtype, c.expected) for c in by_judgement["works although listed"]]
    made.append(section("Works although torch lists it as failing", ["op", "dtypes", "lists"], _by_op(works)))
    counts = Counter((c.status, name) for name, cases in by_judgement.items() for c in cases)
    table = [[s, *(str(counts[s, j]) for j in JUDGEMENTS)] for s in STATUSES if any(counts[s, j] for j in JUDGEMENTS)]
    made.append(section("Cases (operator x dtype) by outcome", ["", *JUDGEMENTS], table))
    return [one for one in made if not one.missing]


def _by_op(cases: list[tuple[str, str, str]]) -> list[list[str]]:
    """Operator, dtype and remark, with the dtypes that share a remark in one row."""
    dtypes: dict[tuple[str, str], list[str]] = {}
    for op, dtype, remark in cases:
        dtypes.setdefault((op, remark), []).append(dtype)
    return [[op, ", ".join(names), remark] for (op, remark), names in dtypes.items()]
