"""What was predicted off a Mac, held against a device: one JSON to attach to a report, and a table.

The dispatcher's classes are predicted on the spot, from the files of the installed torch (table.py). What the device
does is predicted by the simulated one on Linux, once a release (`verify=predict`), and kept in predictions/.
"""

from __future__ import annotations

import json
import platform
import re
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from packaging.version import Version

from nanogpt_mac import child, files, simulator
from nanogpt_mac.compile_report import check as compiled
from nanogpt_mac.coverage import other_torch
from nanogpt_mac.coverage.config import CoverageConfig
from nanogpt_mac.coverage.model_ops import NoTrace, Trace, trace_model
from nanogpt_mac.coverage.page import CANNOT_TELL, LOST, OK, Page, section, some, writable
from nanogpt_mac.errors import InputError
from nanogpt_mac.fallbacks import detect
from nanogpt_mac.operators import by_hand
from nanogpt_mac.operators.dispatch import Dispatch
from nanogpt_mac.operators.table import Entry, Kind, Table, load
from nanogpt_mac.records.base import DamagedError
from nanogpt_mac.records.coverage import Asked, Observed, Prediction

T = TypeVar("T")
SCHEMA = 1
PREDICTIONS = Path(__file__).with_name("predictions")
# Composites that the simulated device replaces by kernels of its own: their branch for MPS is compiled on a Mac only.
OF_SIMULATOR = (*by_hand.IN_COMPOSITE, "rms_norm", "scaled_dot_product_attention")
_LAUNCHES = ("launches", "pointwise", "reduction", "matrix_products", "buffers")
_NAMES = {
    "phases": "operators that reach the device",
    "waits": "waits of the host for the device",
    "errors": "texts of errors",
    "warnings": "texts of warnings",
    "findings": "what leaves the GPU",
    "compiled": "of a compiled iteration",
}


@dataclass(frozen=True)
class Item:
    """One thing predicted and observed; `equal` is None where either side is absent, and `why` says so."""

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
    path = writable("output", config.output or f"mps-verify-{table.version}-{day}.json")
    seen, classes, failed = _look(config, table, live=True)
    predicted, no_prediction = predictions(table.version, _asked(config))
    items = compare(predicted, seen, no_prediction, failed)
    items += _classes(table, classes, failed.get("classes"), sys.platform != "darwin")
    made = page(table.version, seen.device, items, str(path))
    more = {"machine": _machine(), "date": day, "asked": _asked(config).model_dump()}
    files.write_aside(path, json.dumps(made.data | more, indent=1))
    return made


def predict(config: CoverageConfig) -> Page:
    """Writes the prediction for the installed torch, made on the simulated device.

    InputError off Linux, and where any part of it cannot be had: a prediction with holes is useless.
    """
    if sys.platform != "linux":
        raise InputError(f"verify=predict: the simulated MPS device needs Linux; this is {sys.platform}")
    table = load("installed", config.python, config.binary)
    release = _release(table.version)
    path = writable("output", config.output or str(PREDICTIONS / f"{release}.json"))
    seen, _, failed = _look(config, table, live=False)
    if failed:
        raise InputError(f"verify=predict: {next(iter(failed.values()))}")
    made = Prediction(release=release, asked=_asked(config), **seen.model_dump()).document()
    files.write_aside(path, json.dumps(made, indent=1, sort_keys=True) + "\n")
    lines = [f"made with torch {seen.torch}"]
    return Page(f"Predictions for torch {release}", lines, [], OK, f"written: {path}", made)


def _asked(config: CoverageConfig) -> Asked:
    return Asked(model=asdict(config.model), dtype=config.dtype, batch_size=config.batch_size)


def _release(version: str) -> str:
    return Version(version).public


def _machine() -> dict[str, str]:
    return {"platform": platform.platform(), "machine": platform.machine(), "macos": platform.mac_ver()[0]}


def predictions(version: str, asked: Asked) -> tuple[Observed, str | None]:
    """The prediction for a torch and a model, and where there is none, why."""
    path = PREDICTIONS / f"{_release(version)}.json"
    try:
        made = Prediction.load(path)
    except FileNotFoundError:
        made_for = ", ".join(sorted(p.stem for p in PREDICTIONS.glob("*.json"))) or "none"
        return Observed(), f"no prediction for torch {_release(version)}; made for {made_for}"
    except DamagedError as error:
        return Observed(), f"the prediction is damaged: {error}"
    if made.asked != asked:
        return Observed(), "no prediction for this model; made for the default model, dtype and batch size"
    return made, None


# -- looking ----------------------------------------------------------------------------------------------------------


def _look(
    config: CoverageConfig, table: Table, live: bool
) -> tuple[Observed, dict[str, Dispatch] | None, dict[str, str]]:
    """What the device does, the dispatcher's class of every overload, and by part why it is absent.

    `live` looks by torch's profiler; otherwise by the simulated device's own counters.
    """
    failed: dict[str, str] = {}

    def part(names: tuple[str, ...], look: Callable[[], T]) -> T | None:
        print(f"verify: {', '.join(names)}", file=sys.stderr, flush=True)
        try:
            return look()
        except (InputError, NoTrace) as error:
            failed.update(dict.fromkeys(names, str(error)))
            return None

    traced = part(("phases", "waits"), lambda: _traced(config, table, live))
    errors, classes = part(("classes", "errors"), lambda: _asked_device(fallback=False)) or (None, None)
    warnings, _ = part(("warnings",), lambda: _asked_device(fallback=True)) or (None, None)
    seen = Observed(
        torch=table.version,
        device=traced.device if traced else None,
        phases=traced.phases if traced else None,
        waits=traced.waits if traced else None,
        errors=errors,
        warnings=warnings,
        findings=part(("findings",), lambda: _detected(config)),
        compiled=part(("compiled",), lambda: _compiled(config)),
    )
    return seen, classes, failed


def _traced(config: CoverageConfig, table: Table, live: bool) -> Trace:
    """The trace, without the operators that have no tensors, which a profile does not show."""
    trace = trace_model(config.model, config.dtype, table, live=live)
    if trace.stopped:
        raise NoTrace(trace.stopped)
    phases = {
        name: {op: calls for op, calls in ops.items() if op not in trace.no_tensors}
        for name, ops in trace.phases.items()
    }
    return replace(trace, phases=phases)


def _asked_device(fallback: bool) -> tuple[dict[str, str | None], dict[str, Dispatch] | None]:
    """The texts of what the device refuses, and every overload's class; under `fallback` its warnings alone."""
    task = {"ask": "itself", "fallback": fallback}
    try:
        answer = child.ask("nanogpt_mac.coverage.device_child", task, environment=simulator.environment(fallback))
    except child.ChildError as error:
        raise InputError(f"the device could not be asked: {error}") from error
    texts: dict[str, str | None] = {
        op: re.sub(r"commit hash [0-9a-f]+", "commit hash ...", t or "") for op, t in answer["texts"].items()
    }
    return texts, answer.get("classes")


def _detected(config: CoverageConfig) -> dict[str, int]:
    task = other_torch.task(config.model, config.dtype, config.batch_size)
    seen = detect.check_task(task, sys.executable, simulator.environment(fallback=True))
    if not seen.complete:
        raise InputError(f"the detector's run is incomplete: {'; '.join(seen.why_incomplete)}")
    return dict(Counter(", ".join(found) for found in other_torch.findings(seen)))


def _compiled(config: CoverageConfig) -> dict[str, dict[str, int | None]]:
    report = compiled.check(config.model, config.dtype, config.batch_size, warm=False)
    made: dict[str, dict[str, int | None]] = {}
    for name, iteration in report.iterations.items():
        made[name] = {key: getattr(iteration, key) for key in _LAUNCHES}
        made[name]["ATen operators"] = None if iteration.aten is None else sum(row.count for row in iteration.aten)
    breaks = report.graph_breaks
    made["graphs"] = {"graphs": report.dynamo_graphs, "breaks": None if breaks is None else len(breaks)}
    return made


# -- comparing --------------------------------------------------------------------------------------------------------


def compare(predicted: Observed, seen: Observed, no_prediction: str | None, failed: dict[str, str]) -> list[Item]:
    """Every part of a prediction against what was observed.

    `no_prediction` is why `predicted` is empty, `failed` has why a part was not observed.
    """
    items = []
    for part, name in _NAMES.items():
        mine, theirs = getattr(predicted, part), getattr(seen, part)
        why = failed.get(part) or (no_prediction if mine is None else None)
        if why or mine is None or theirs is None:
            items.append(Item(name, mine, theirs, None, why or "not in the prediction"))
        elif part in ("phases", "compiled"):
            for key in dict.fromkeys([*mine, *theirs]):
                title = f"{key}: {name}" if part == "phases" else f"compiled {key}"
                items.append(_item(title, mine.get(key, {}), theirs.get(key, {})))
        else:
            items.append(_item(name, mine, theirs))
    return items


def _item(name: str, predicted: Mapping[str, object], observed: Mapping[str, object]) -> Item:
    unknown = [key for key, value in [*predicted.items(), *observed.items()] if value is None]
    equal = predicted == observed
    if equal or not unknown:
        return Item(name, predicted, observed, equal)
    known = {k for k in {*predicted, *observed} if k not in unknown}
    if any(predicted.get(key) != observed.get(key) for key in known):
        return Item(name, predicted, observed, False)
    return Item(name, predicted, observed, None, f"not known: {', '.join(sorted(set(unknown)))}")


def expected_classes(entry: Entry) -> tuple[Dispatch, ...]:
    """What the dispatcher may say of an overload of this kind."""
    if entry.op in by_hand.RAISING and entry.kind is Kind.MISSING:
        return (Dispatch.BY_HAND, Dispatch.KERNEL)
    if entry.kind in (Kind.MISSING, Kind.MISSING_CPU):
        return (Dispatch.COMPOSITE,) if entry.facts.delegate else (Dispatch.MISSING,)  # the wrapper of its out= form
    if entry.kind is Kind.FALLBACK:
        return (Dispatch.BY_HAND,)
    return (Dispatch.COMPOSITE,) if entry.kind is Kind.COMPOSITE else (Dispatch.KERNEL,)


def _classes(table: Table, seen: dict[str, Dispatch] | None, failed: str | None, simulated: bool) -> list[Item]:
    name = "classes of the dispatcher's table"
    if seen is None:
        return [Item(name, None, None, None, failed)]
    predicted: dict[str, str] = {}
    observed: dict[str, str] = {}
    left_out = OF_SIMULATOR if simulated else ()
    for op, entry in table.entries.items():
        if entry.kind is not Kind.UNKNOWN and op not in left_out:
            may_be = expected_classes(entry)
            observed[op] = seen.get(op, "absent")
            predicted[op] = observed[op] if observed[op] in may_be else may_be[0]
    return [Item(name, predicted, observed, predicted == observed)]


# -- the report -------------------------------------------------------------------------------------------------------


def page(version: str, device: str | None, items: list[Item], path: str) -> Page:
    wrong = [item for item in items if item.equal is False]
    unknown = [item for item in items if item.equal is None]
    if wrong:
        names = some([item.name for item in wrong])
        code, verdict = LOST, f"{len(wrong)} of {len(items)} predictions do not hold: {names}"
    elif unknown:
        code, verdict = CANNOT_TELL, f"{len(unknown)} of {len(items)} could not be compared: {unknown[0].why}"
    else:
        code, verdict = OK, f"all {len(items)} predictions hold"
    rows = [[item.name, _short(item.predicted), _short(item.observed), _equal(item)] for item in items]
    details = [[i.name, key, _text(a), _text(b)] for i in wrong for key, (a, b) in i.differences().items()]
    sections = [
        section("Predicted and observed", ["", "predicted", "observed", "equal"], rows),
        section("What differs", ["", "", "predicted", "observed"], details),
    ]
    data = {
        "schema": SCHEMA,
        "scope": "verify",
        "torch": version,
        "device": device,
        "items": [asdict(item) for item in items],
    }
    lines = [f"torch {version} on {device or 'no device'}; attach {path} to a report"]
    return Page(f"Predictions against the device, torch {version}", lines, sections, code, verdict, data)


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
