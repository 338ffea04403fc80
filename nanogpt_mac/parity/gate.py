"""The parity gate: before anything is timed, every variant must compute what float64 computes.

Each variant is held against the reference in a fresh process of its own, so that a crash, a hang or a missing operator
of one is one row of the result. What is compared is in check.py, how far it may be off in tolerances.py.
"""

from __future__ import annotations

import dataclasses
import json
import math
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from nanogpt_mac.backends.kinds import KINDS
from nanogpt_mac.child import Answer, Question, ask_side_by_side, require_room
from nanogpt_mac.config import Config
from nanogpt_mac.files import plain, write_json
from nanogpt_mac.machine.cores import usable
from nanogpt_mac.parity import tolerances
from nanogpt_mac.parity.check import Checked, Made
from nanogpt_mac.records.base import DamagedError
from nanogpt_mac.records.plan import Check, Parity, ParityResult, ParityState

REFERENCE = "torch float64, CPU"
CHILD = "nanogpt_mac.parity.check"
MANY_CORES = 4  # fewer are busy with one variant's compilers
# What a reference depends on: variants that agree in these share one.
WORK = ("model", "data", "path", "data_dir", "seed", "init_from", "run", "batch_size", "gradient_accumulation_steps")
HYPERPARAMETERS = ("weight_decay", "beta1", "beta2", "grad_clip")


def check(
    configs: Mapping[str, Config], folder: Path, timeout_s: float = 1200.0, child: str | Sequence[str] = CHILD
) -> Parity:
    """Hold every variant of `configs` (by name) against the reference; write `folder`/parity.json and return it.

    `folder` is made where it is missing, and the reference lies under it while this runs. `timeout_s`, in seconds, ends
    one variant, or the reference, as hung. `child`: the module or the command of the child processes.

    A variant fails where it computes something else (`reason` names the worst tensor and its figure); it is an error
    where that could not be found out (`reason` is one line).
    """
    began = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    references: dict[str, tuple[Path, Answer]] = {}
    results: dict[str, ParityResult] = {}
    queues: dict[str, dict[str, Question]] = {}
    with tempfile.TemporaryDirectory(prefix=".parity-", dir=folder) as work:
        for name, config in configs.items():
            document = dataclasses.asdict(config)
            key = json.dumps({field: document[field] for field in WORK + HYPERPARAMETERS}, sort_keys=True)
            if key not in references:
                place = Path(work) / str(len(references))
                place.mkdir()
                task = plain({"role": "reference", "config": document, "folder": str(place)})
                question = Question(child, task, timeout_s=timeout_s, log=folder / "parity-reference.log")
                references[key] = place, ask_side_by_side([[question]])[0][0]
            place, answer = references[key]
            if answer.error:
                results[name] = ParityResult(state=ParityState.ERROR, reason=f"no reference: {answer.error}")
                continue
            task = plain({"role": "variant", "config": document, "folder": str(place)})
            question = Question(child, task, timeout_s=timeout_s, log=folder / f"parity-{name}.log")
            queues.setdefault(_queue(config, len(results) + sum(map(len, queues.values()))), {})[name] = question
        answers = ask_side_by_side(list(questions.values()) for questions in queues.values())
        for questions, answered in zip(queues.values(), answers, strict=True):
            results |= {name: _result(answer) for name, answer in zip(questions, answered, strict=True)}
        if any(result.state == ParityState.ERROR for result in results.values()):
            require_room(folder)
    made = [Made.model_validate(answer.value) for _, answer in references.values() if not answer.error]
    precisions = dict.fromkeys(tolerances.precision(c.dtype, c.matmul_precision) for c in configs.values())
    parity = Parity(
        reference=REFERENCE,
        shape=made[0].shape if made else None,
        unchecked=tuple(dict.fromkeys(what for each in made for what in each.unchecked)),
        seconds=time.monotonic() - began,
        tolerances=tolerances.rows(precisions),
        variants={name: results[name] for name in configs},
    )
    write_json(folder / "parity.json", parity.document())
    return parity


def _queue(config: Config, number: int) -> str:
    """Whom the variant of this `number` waits for.

    Nothing is timed here and much of it is compiling, so variants are checked side by side: three take as much memory
    as the reference did. Not those of one back end where both may write the same compiled kernel.
    """
    together = usable() // MANY_CORES
    if not together:
        return ""
    name = config.backend.name
    return f"{name} {number % together}" if KINDS[name].compiles_side_by_side else name


def read(folder: Path, variants: Iterable[str]) -> Parity | None:
    """parity.json of `folder` where it says how each of `variants` ended; None where it must be made (again)."""
    try:
        parity = Parity.load(folder / "parity.json")
    except (DamagedError, FileNotFoundError):
        return None
    ended = {name for name, result in parity.variants.items() if result.state != ParityState.NOT_RUN}
    return parity if ended.issuperset(variants) else None


def _result(answer: Answer) -> ParityResult:
    if answer.error:
        return ParityResult(state=ParityState.ERROR, reason=str(answer.error), seconds=answer.seconds)
    checked = Checked.model_validate(answer.value)
    failed = [check for check in checked.checks if not check.passed]
    state, reason = ParityState.PASS, None
    if failed:
        more = f", and {len(failed) - 1} more" if len(failed) > 1 else ""
        state, reason = ParityState.FAIL, _sentence(max(failed, key=_excess)) + more
    return ParityResult(
        state=state,
        reason=reason,
        device=checked.device,
        seconds=answer.seconds,
        checks=checked.checks,
        deterministic=checked.deterministic,
        varies=checked.varies,
    )


def _excess(check: Check) -> float:
    """How many times its limit a check that failed is; nan is worst of all."""
    times = check.value / check.limit if check.limit else math.inf
    return math.inf if math.isnan(times) else times


def _sentence(check: Check) -> str:
    return f"{check.quantity}: {check.worst} is off by {check.value:.2g}, at most {check.limit:.2g} is expected"
