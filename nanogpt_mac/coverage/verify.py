"""What was predicted off a Mac, held against a device: one JSON to attach to a report, and a table.

The dispatcher's classes are predicted on the spot, from the files of the installed torch (table.py). What the device
does is predicted by the simulated one on Linux, once a release (`verify=predict`), and kept in predictions/.
"""

from __future__ import annotations

import json
import platform
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from packaging.version import Version

from nanogpt_mac.compile_report import check as compiled
from nanogpt_mac.coverage import isolated
from nanogpt_mac.coverage.config import CoverageConfig
from nanogpt_mac.coverage.device import environment
from nanogpt_mac.coverage.render import CANNOT_TELL, LOST, OK, Page, Section, some
from nanogpt_mac.coverage.trace import NoTrace, trace_model
from nanogpt_mac.errors import InputError
from nanogpt_mac.fallbacks import detect as runtime
from nanogpt_mac.operators.table import HAND_LIST, IN_COMPOSITE, Entry, Kind, Table, load

SCHEMA = 1
PREDICTIONS = Path(__file__).with_name("predictions")
# Composites that the simulated device replaces by kernels of its own: their branch for MPS is compiled on a Mac only.
OF_SIMULATOR = (*IN_COMPOSITE, "rms_norm", "scaled_dot_product_attention")
_LAUNCHES = ("launches", "pointwise", "reduction", "matrix_products", "buffers")
_NAMES = {
    "phases": "operators that reach the device",
    "waits": "waits of the host for the device",
    "classes": "classes of the dispatcher's table",
    "errors": "texts of errors",
    "warnings": "texts of warnings",
    "findings": "what leaves the GPU",
    "compiled": "of a compiled iteration",
}


@dataclass(frozen=True)
class Item:
    """One thing predicted and observed; `equal` is None where either side is not there, and `why` says so."""

    name: str
    predicted: Any
    observed: Any
    equal: bool | None
    why: str | None = None

    def differences(self) -> dict[str, tuple[Any, Any]]:
        """Where two dictionaries differ: key to both values."""
        if not (isinstance(self.predicted, dict) and isinstance(self.observed, dict)):
            return {}
        keys = sorted({*self.predicted, *self.observed})
        both = {key: (self.predicted.get(key), self.observed.get(key)) for key in keys}
        return {key: (a, b) for key, (a, b) in both.items() if a != b}


# -- the two commands -------------------------------------------------------------------------------------------------


def check(config: CoverageConfig) -> Page:
    """Observes the device at hand, compares, writes the JSON and returns the report.

    Exit code 0 all equal, 1 something differs, 2 something could not be compared.
    """
    table = load("installed", config.python, config.binary)
    day = datetime.now(UTC).date().isoformat()
    path = _writable(config.output or f"mps-verify-{table.version}-{day}.json")
    seen, failed = _look(config, table, live=True)
    told, no_prediction = predictions(table.version, _asked(config))
    items = compare(told, seen, no_prediction, failed)
    items += _classes(table, seen.get("classes"), failed.get("classes"), sys.platform != "darwin")
    made = page(table.version, seen.get("device"), items, str(path))
    path.write_text(json.dumps(made.data | {"machine": _machine(), "date": day, "asked": _asked(config)}, indent=1))
    return made


def predict(config: CoverageConfig) -> Page:
    """Writes the prediction for the installed torch, made on the simulated device.

    InputError off Linux, and where any part of it cannot be had: a prediction with holes is none.
    """
    if sys.platform != "linux":
        raise InputError(f"verify=predict: the simulated MPS device runs on Linux only, not on {sys.platform}")
    table = load("installed", config.python, config.binary)
    release = _release(table.version)
    path = _writable(config.output or str(PREDICTIONS / f"{release}.json"))
    seen, failed = _look(config, table, live=False)
    if failed:
        raise InputError(f"verify=predict: {next(iter(failed.values()))}")
    seen.pop("classes")
    made = {"schema": SCHEMA, "release": release, "asked": _asked(config), **seen}
    path.write_text(json.dumps(made, indent=1, sort_keys=True) + "\n")
    verdict = f"written: {path}"
    return Page(f"Predictions for torch {release}", [f"made with torch {seen['torch']}"], [], verdict, OK, made)


def _writable(name: str) -> Path:
    path = Path(name).expanduser()
    if path.is_dir() or not path.parent.is_dir():
        raise InputError(f"output={name}: allowed is a file in a folder that exists")
    return path


def _asked(config: CoverageConfig) -> dict[str, Any]:
    return {"model": asdict(config.model), "dtype": config.dtype, "batch_size": config.batch_size}


def _release(version: str) -> str:
    return Version(version).public


def _machine() -> dict[str, str]:
    return {"platform": platform.platform(), "machine": platform.machine(), "macos": platform.mac_ver()[0]}


def predictions(version: str, asked: dict[str, Any]) -> tuple[dict[str, Any], str | None]:
    """The prediction for a torch and a model, and where there is none, why."""
    path = PREDICTIONS / f"{_release(version)}.json"
    made_for = ", ".join(sorted(p.stem for p in PREDICTIONS.glob("*.json"))) or "none"
    if not path.is_file():
        return {}, f"no prediction for torch {_release(version)}; made for {made_for}"
    told: dict[str, Any] = json.loads(path.read_text())
    if told["asked"] != asked:
        return {}, "no prediction for this model; made for the default model, dtype and batch size"
    return told, None


# -- looking ----------------------------------------------------------------------------------------------------------


def _look(config: CoverageConfig, table: Table, live: bool) -> tuple[dict[str, Any], dict[str, str]]:
    """What the device does, part by part, and why parts are absent.

    Args:
        live: by torch's profiler; otherwise by the simulated device's own counters.
    """
    seen: dict[str, Any] = {"torch": table.version}
    failed: dict[str, str] = {}

    def part(names: tuple[str, ...], look: Callable[[], dict[str, Any]]) -> None:
        print(f"verify: {', '.join(names)}", file=sys.stderr, flush=True)
        try:
            seen.update(look())
        except (InputError, NoTrace) as error:
            failed.update(dict.fromkeys(names, str(error)))

    part(("phases", "waits"), lambda: _traced(config, table, live))
    part(("classes", "errors"), lambda: _asked_device(fallback=False))
    part(("warnings",), lambda: _asked_device(fallback=True))
    part(("findings",), lambda: _detected(config))
    part(("compiled",), lambda: _compiled(config))
    return seen, failed


def _traced(config: CoverageConfig, table: Table, live: bool) -> dict[str, Any]:
    trace = trace_model(config.model, config.dtype, table, live=live)
    if trace.stopped:
        raise NoTrace(trace.stopped)
    phases = {
        name: {op: calls for op, calls in ops.items() if op not in trace.no_tensors}
        for name, ops in trace.phases.items()
    }
    return {"phases": phases, "waits": trace.waits, "device": trace.device}


def _asked_device(fallback: bool) -> dict[str, Any]:
    argv = [sys.executable, "-W", "ignore", "-m", "nanogpt_mac.coverage.verify_child", *(["texts"] if fallback else [])]
    child = subprocess.run(argv, capture_output=True, text=True, env=environment(fallback=fallback), check=False)
    if child.returncode:
        lines = child.stderr.strip().splitlines() or [f"exit code {child.returncode}"]
        raise InputError(f"the device could not be asked: {lines[-1]}")
    said = json.loads(child.stdout)
    texts = {op: re.sub(r"commit hash [0-9a-f]+", "commit hash ...", text or "") for op, text in said["texts"].items()}
    return {"warnings": texts} if fallback else {"errors": texts, "classes": said["classes"]}


def _detected(config: CoverageConfig) -> dict[str, Any]:
    task = isolated.task(config.model, config.dtype, config.batch_size)
    document = runtime.check_task(task, sys.executable, environment(fallback=True)).document()
    if not document["complete"]:
        raise InputError(f"the detector's run is incomplete: {'; '.join(document['why_incomplete'])}")
    found = Counter(f"{op}, {kind}, {phase}" for op, kind, phase in isolated.findings(document))
    return {"findings": dict(found)}


def _compiled(config: CoverageConfig) -> dict[str, Any]:
    report = compiled.check(config.model, config.dtype, config.batch_size, warm=False)
    made: dict[str, Any] = {}
    for name, iteration in report["iterations"].items():
        made[name] = {key: iteration[key] for key in _LAUNCHES}
        made[name]["ATen operators"] = None if iteration["aten"] is None else sum(r["count"] for r in iteration["aten"])
    breaks = report["graph_breaks"]
    made["graphs"] = {"graphs": report["dynamo_graphs"], "breaks": None if breaks is None else len(breaks)}
    return {"compiled": made}


# -- comparing --------------------------------------------------------------------------------------------------------


def compare(
    told: dict[str, Any], seen: dict[str, Any], no_prediction: str | None, failed: dict[str, str]
) -> list[Item]:
    """Every part of a prediction against what was observed.

    Args:
        no_prediction: why `told` is empty.
        failed: part to the reason that it was not observed.
    """
    items = []
    for part in ("phases", "waits", "errors", "warnings", "findings", "compiled"):
        mine, theirs = told.get(part), seen.get(part)
        why = failed.get(part) or (no_prediction if mine is None else None)
        if why or mine is None or theirs is None:
            items.append(Item(_NAMES[part], mine, theirs, None, why or "not in the prediction"))
        elif part in ("phases", "compiled"):
            for name in dict.fromkeys([*mine, *theirs]):
                a, b = mine.get(name, {}), theirs.get(name, {})
                items.append(_item(f"{name}: {_NAMES[part]}" if part == "phases" else f"compiled {name}", a, b))
        else:
            items.append(_item(_NAMES[part], mine, theirs))
    return items


def _item(name: str, predicted: dict[str, Any], observed: dict[str, Any]) -> Item:
    unknown = [key for key, value in [*predicted.items(), *observed.items()] if value is None]
    equal = predicted == observed
    if equal or not unknown:
        return Item(name, predicted, observed, equal)
    known = {k for k in {*predicted, *observed} if k not in unknown}
    if any(predicted.get(key) != observed.get(key) for key in known):
        return Item(name, predicted, observed, False)
    return Item(name, predicted, observed, None, f"not known: {', '.join(sorted(set(unknown)))}")


def expected_classes(entry: Entry) -> tuple[str, ...]:
    """What the dispatcher may say of an overload of this kind (verify_child.dispatch_class)."""
    if entry.op in {row.op for row in HAND_LIST if row.kind is Kind.MISSING} and entry.kind is Kind.MISSING:
        return ("explicit fallback", "kernel")  # registered, by hand, to raise
    if entry.kind in (Kind.MISSING, Kind.MISSING_CPU):
        return ("composite",) if entry.facts.delegate else ("missing",)  # the generated wrapper of its out= form
    if entry.kind is Kind.FALLBACK:
        return ("explicit fallback",)
    return ("composite",) if entry.kind is Kind.COMPOSITE else ("kernel",)


def _classes(table: Table, seen: dict[str, str] | None, failed: str | None, simulated: bool) -> list[Item]:
    name = _NAMES["classes"]
    if seen is None:
        return [Item(name, None, None, None, failed)]
    told, observed = {}, {}
    left_out = OF_SIMULATOR if simulated else ()
    for op, entry in table.entries.items():
        if entry.kind is not Kind.UNKNOWN and op not in left_out:
            may_be = expected_classes(entry)
            observed[op] = seen.get(op, "absent")
            told[op] = observed[op] if observed[op] in may_be else may_be[0]
    return [Item(name, told, observed, told == observed)]


# -- the report -------------------------------------------------------------------------------------------------------


def page(version: str, device: str | None, items: list[Item], path: str) -> Page:
    wrong = [item.name for item in items if item.equal is False]
    open_ = [item for item in items if item.equal is None]
    if wrong:
        code, verdict = LOST, f"{len(wrong)} of {len(items)} predictions are not so: {some(wrong)}"
    elif open_:
        code, verdict = CANNOT_TELL, f"{len(open_)} of {len(items)} could not be compared: {open_[0].why}"
    else:
        code, verdict = OK, f"all {len(items)} predictions are so"
    rows = [[item.name, _short(item.predicted), _short(item.observed), _equal(item)] for item in items]
    made: list[Section] = [("Predicted and observed", ["", "predicted", "observed", "equal"], rows)]
    unequal = [item for item in items if item.equal is False]
    details = [[i.name, key, _text(a), _text(b)] for i in unequal for key, (a, b) in i.differences().items()]
    if details:
        made.append(("What differs", ["", "", "predicted", "observed"], details))
    data = {
        "schema": SCHEMA,
        "scope": "verify",
        "torch": version,
        "device": device,
        "items": [asdict(item) for item in items],
        "exit_code": code,
        "verdict": verdict,
    }
    lines = [f"torch {version} on {device or 'no device'}; attach {path} to a report"]
    return Page(f"Predictions against the device, torch {version}", lines, made, verdict, code, data)


def _equal(item: Item) -> str:
    return {True: "yes", False: "NO", None: item.why or "unknown"}[item.equal]


def _text(value: Any) -> str:
    return "none" if value is None else str(value)


def _short(value: Any) -> str:
    """A dictionary of many numbers or texts, in few words."""
    if not isinstance(value, dict):
        return _text(value)
    if all(isinstance(v, int) for v in value.values()):
        if len(value) > 6:
            return f"{len(value)} operators, {sum(value.values())} calls"
        return ", ".join(f"{k} {v}" for k, v in value.items()) or "nothing"
    if any(isinstance(v, dict) for v in value.values()):
        return f"{len(value)} parts"
    alike = Counter(value.values())
    if len(value) > 20:
        return ", ".join(f"{count} {_text(kind)}" for kind, count in alike.most_common(4))
    return f"{len(value)} texts"
