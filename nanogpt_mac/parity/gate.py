"""The parity gate: before anything is timed, every variant must compute what float64 computes.

Each variant is held against the reference in a fresh process of its own, so that a crash, a hang or a missing operator of
one is one row of the result. What is compared is in parity_child.py, what is allowed in tolerances.py.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanogpt_mac.child import require_room
from nanogpt_mac.config import Config
from nanogpt_mac.files import write_json
from nanogpt_mac.parity import tolerances

SCHEMA = 1
REFERENCE = "torch float64, CPU"
POLL_S = 0.05
MANY_CORES = 4  # fewer are busy with one variant's compilers
CHILD = (sys.executable, "-m", "nanogpt_mac.parity.check")
ROOT = Path(__file__).resolve().parents[2]
# What a reference depends on: variants that agree in these share one.
WORK = ("model", "data", "path", "data_dir", "seed", "init_from", "run", "batch_size")
HYPERPARAMETERS = ("weight_decay", "beta1", "beta2", "grad_clip")
Job = tuple[str, dict[str, Any], Path]  # a variant's name, its task, its log


def check(
    configs: Mapping[str, Config], folder: Path, timeout_s: float = 600.0, child: Sequence[str] = CHILD
) -> dict[str, Any]:
    """Hold every variant of `configs` against the reference; write `folder`/parity.json and return it.

    Args:
        configs: by variant's name; resolved as train.py resolves them, `dropout` put to 0 here.
        folder: made where it is missing; the reference lies under it while this runs.
        timeout_s: after which one variant (or the reference) counts as hung.
        child: the command of the child processes.

    A variant's `state` is pass, fail (`reason` names the worst tensor and its figure) or error (`reason` is one line).
    """
    began = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    references: dict[str, dict[str, Any]] = {}
    found: dict[str, dict[str, Any]] = {}
    queues: dict[str, list[Job]] = {}
    with tempfile.TemporaryDirectory(prefix=".parity-", dir=folder) as work:
        for name, config in configs.items():
            document = dataclasses.asdict(config)
            key = json.dumps({field: document[field] for field in WORK + HYPERPARAMETERS}, sort_keys=True)
            if key not in references:
                place = Path(work) / str(len(references))
                place.mkdir()
                task = {"role": "reference", "config": document, "folder": str(place)}
                references[key] = {"folder": str(place)} | _run(child, task, timeout_s, folder / "parity-reference.log")
            reference = references[key]
            if "error" in reference:
                found[name] = {"error": f"no reference: {reference['error']}", "seconds": 0.0}
                continue
            task = {"role": "variant", "config": document, "folder": reference["folder"]}
            # Nothing is timed here and much of it is compiling, so back ends are checked side by side: three take as
            # much memory as the reference did. Not variants of one back end, which may write the same compiled kernel.
            queue = config.backend.name if (os.cpu_count() or 1) >= MANY_CORES else ""
            queues.setdefault(queue, []).append((name, task, folder / f"parity-{name}.log"))
        found |= _run_all(child, queues.values(), timeout_s)
        if any("error" in result for result in found.values()):
            require_room(folder)
    precisions = dict.fromkeys(tolerances.precision(c.dtype, c.matmul_precision) for c in configs.values())
    parity = {
        "schema": SCHEMA,
        "reference": REFERENCE,
        "shape": next((r["shape"] for r in references.values() if "shape" in r), None),
        "seconds": time.monotonic() - began,
        "tolerances": tolerances.rows(precisions),
        "variants": {name: _ended(found[name]) for name in configs},
    }
    write_json(folder / "parity.json", parity)
    return parity


def read(folder: Path, variants: Iterable[str]) -> dict[str, Any] | None:
    """parity.json of `folder` where it says of each of `variants` how it ended; None where it must be made (again)."""
    try:
        parity: dict[str, Any] = json.loads((folder / "parity.json").read_text())
        said = [(parity["variants"][name]["state"], parity["variants"][name]["reason"]) for name in variants]
        whole = parity["seconds"] >= 0 and all(state in ("pass", "fail", "error") for state, _ in said)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return parity if whole else None


def _ended(result: dict[str, Any]) -> dict[str, Any]:
    """A variant's entry in parity.json."""
    variant = {"device": result.get("device"), "seconds": result["seconds"], "checks": result.get("checks", [])}
    if "error" in result:
        return {"state": "error", "reason": result["error"]} | variant
    failed = [c for c in variant["checks"] if not c["pass"]]
    if not failed:
        return {"state": "pass", "reason": None} | variant
    worst = max(failed, key=_excess)
    more = f", and {len(failed) - 1} more" if len(failed) > 1 else ""
    return {"state": "fail", "reason": _sentence(worst) + more} | variant


def _excess(check: Mapping[str, Any]) -> float:
    """How many times its limit a check that failed is; nan is worst of all."""
    times = float(check["value"]) / check["limit"] if check["limit"] else math.inf
    return math.inf if math.isnan(times) else times


def _sentence(check: Mapping[str, Any]) -> str:
    return (
        f"{check['quantity']}: {check['worst']} is off by {float(check['value']):.2g}, allowed is {check['limit']:.2g}"
    )


@dataclass
class _Child:
    """One child process under way. Its output is kept where it failed."""

    task: dict[str, Any]
    log: Path
    timeout_s: float
    command: Sequence[str]
    hung = False

    def __post_init__(self) -> None:
        self.began = time.monotonic()
        asked, self.answer = (Path(self.task["folder"]) / f"{self.log.stem}-{end}.json" for end in ("task", "result"))
        asked.write_text(json.dumps(self.task | {"result": str(self.answer)}))
        self.answer.unlink(missing_ok=True)
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        with asked.open() as stdin, self.log.open("w") as output:
            self.process = subprocess.Popen(
                self.command,
                stdin=stdin,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
                start_new_session=True,  # a compiler that the child has started ends with it
            )

    def over(self) -> bool:
        """Whether it has ended, if need be by us."""
        self.hung = time.monotonic() - self.began > self.timeout_s
        if self.process.poll() is None and not self.hung:
            return False
        self.end()
        return True

    def end(self) -> None:
        """The child and whatever it has started."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass  # all gone already
        except PermissionError:
            self.process.kill()  # macOS refuses the group of a child that has ended but not been waited for
        self.process.wait()

    def result(self) -> dict[str, Any]:
        """What it answered, or {"error": one line}; `seconds` either way."""
        seconds = {"seconds": time.monotonic() - self.began}
        found = json.loads(self.answer.read_text()) if self.answer.exists() else {}
        if self.process.returncode == 0 and "error" not in found and found and not self.hung:
            self.log.unlink()
            return found | seconds
        timeout_s = self.timeout_s if self.hung else None
        return {"error": _reason(self.process.returncode, found, self.log, timeout_s)} | seconds


def _run(child: Sequence[str], task: dict[str, Any], timeout_s: float, log: Path) -> dict[str, Any]:
    return _run_all(child, [[("", task, log)]], timeout_s)[""]


def _run_all(child: Sequence[str], queues: Iterable[Sequence[Job]], timeout_s: float) -> dict[str, dict[str, Any]]:
    """Results by name: the queues side by side, what is in one of them in its order."""
    waiting = [list(queue) for queue in queues]
    running: dict[int, tuple[str, _Child]] = {}
    results = {}
    try:
        while any(waiting) or running:
            for number, queue in enumerate(waiting):
                if queue and number not in running:
                    name, task, log = queue.pop(0)
                    running[number] = name, _Child(task, log, timeout_s, child)
            time.sleep(POLL_S)
            for number, (name, one) in list(running.items()):
                if one.over():
                    results[name] = one.result()
                    del running[number]
    finally:
        for _, one in running.values():
            one.end()
    return results


def _reason(code: int, found: Mapping[str, Any], log: Path, timeout_s: float | None) -> str:
    if timeout_s is not None:
        return f"no answer within {timeout_s:g} s"
    if "error" in found:
        return str(found["error"])
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    if code < 0:
        name = signal.Signals(-code).name
        return f"killed by {name}" + (": out of memory?" if name == "SIGKILL" else "")
    return f"exit code {code}: {lines[-1][:300] if lines else 'nothing said'}"


# -- for reports ----------------------------------------------------------------------------------------------------


def sections(parity: Mapping[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """Titled tables, all cells text: the variants, every check, and what was allowed."""
    variants = parity.get("variants") or {}
    states = [
        [
            name,
            variant["state"],
            variant.get("device") or "",
            f"{variant.get('seconds') or 0:.0f}",
            variant.get("reason") or "",
        ]
        for name, variant in variants.items()
    ]
    quantities = list(
        dict.fromkeys(c["quantity"] for variant in variants.values() for c in variant.get("checks") or [])
    )
    figures = []
    for quantity in quantities:
        row = [quantity]
        for variant in variants.values():
            check = next((c for c in variant.get("checks") or [] if c["quantity"] == quantity), None)
            row.append("" if check is None else _cell(check))
        figures.append(row)
    allowed = [[t["dtype"], t["quantity"], f"{t['limit']:.2g}", t["reason"]] for t in parity.get("tolerances") or []]
    return [
        ("Parity", ["variant", "parity", "device", "s", "reason"], states),
        ("Largest differences from float64 (and what is allowed)", ["quantity", *variants], figures),
        ("Tolerances", ["dtype", "quantity", "limit", "reason"], allowed),
    ]


def _cell(check: Mapping[str, Any]) -> str:
    wrong = "" if check["pass"] else f" WRONG: {check['worst']}"
    return f"{float(check['value']):.1e} ({check['limit']:.0e}){wrong}"
