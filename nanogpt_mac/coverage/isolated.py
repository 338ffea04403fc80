"""The runtime detector under a torch that is not installed, against the same under the one that is."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import Any

from nanogpt_mac.config import Config, backend_options
from nanogpt_mac.coverage import environments
from nanogpt_mac.coverage.config import CoverageConfig
from nanogpt_mac.coverage.device import environment
from nanogpt_mac.coverage.render import CANNOT_TELL, LOST, OK, Page, Section, some
from nanogpt_mac.errors import InputError
from nanogpt_mac.fallbacks import detect as runtime
from nanogpt_mac.gpt.spec import GPTSpec, ModelConfig

SCHEMA = 1
SYMBOLS = 65  # of the default corpus

Document = dict[str, Any]  # what the runtime detector returns


def task(model: ModelConfig, dtype: str, batch_size: int) -> dict[str, Any]:
    """What the detector runs: one eager iteration, evaluation and sampling of this model, resident data.

    Narrow and short on the simulated device, which has no limits of size that could show.
    """
    sizes = asdict(model) | {"vocab_size": model.vocab_size or SYMBOLS}
    if sys.platform != "darwin":
        sizes |= {"n_embd": model.n_head * 8, "block_size": min(model.block_size, 16)}
        batch_size = min(batch_size, 2)
    spec = GPTSpec(**sizes)
    return {
        "options": asdict(backend_options(Config(dtype=dtype), "mps")),
        "spec": asdict(spec),
        "batch_size": batch_size,
        "gradient_accumulation_steps": 1,
        "resident": True,
    }


def check(config: CoverageConfig) -> Page:
    """Makes the environment, runs both, and returns the report.

    Raises:
        InputError: there is no such torch for this machine, or no MPS device that could be had here.
    """
    made = task(config.model, config.dtype, config.batch_size)
    env = environment(fallback=True)
    python = environments.make(config.torch, config.nightly_index)
    print("running this model under the installed torch, and under the other", file=sys.stderr)
    before = runtime.check_task(made, sys.executable, env).document()
    after = runtime.check_task(made, python, env).document()
    meant = environments.version(python)
    if after["torch"] not in (None, meant):  # what lies on its path must not be taken for it
        raise InputError(f"torch={config.torch}: torch {after['torch']} ran there, and not {meant}")
    return page(config.torch, before, after)


def findings(document: Document) -> dict[tuple[str, str, str], dict[str, Any]]:
    """By operator, kind and phase: what two torches are compared by."""
    return {(f["op"], str(f["kind"]), f["phase"]): f for f in document["findings"]}


def page(asked: str, before: Document, after: Document) -> Page:
    """The report. Exit code 0 nothing newly leaves the GPU, 1 something does, 2 cannot tell.

    Args:
        asked: the torch that `after` ran under, as the user named it.
    """
    old, new = findings(before), findings(after)
    gained = [new[key] for key in new if key not in old]
    gone = [old[key] for key in old if key not in new]
    name = after["torch"] or asked
    incomplete = [
        f"torch {d['torch'] or which}: {why}"
        for which, d in (("installed", before), (asked, after))
        for why in d["why_incomplete"]
    ]
    if not before["complete"] and not before["torch"]:
        gained = []  # nothing is known of the other side
    if gained:
        ops = some([f"{f['op']} ({f['phase']})" for f in gained])
        code, verdict = LOST, f"{len(gained)} findings are new since {before['torch']}: {ops}"
    elif incomplete:
        code, verdict = CANNOT_TELL, f"cannot tell: {incomplete[0]}"
    else:
        both = f"; {len(new)} leave it in both" if new else ""
        code, verdict = OK, f"nothing of this model newly leaves the GPU since {before['torch']}{both}"
    data = {
        "schema": SCHEMA,
        "scope": "run",
        "torch": after["torch"],
        "against": before["torch"],
        "asked": asked,
        "device": after["device"] or before["device"],
        "gained": gained,
        "gone": gone,
        "incomplete": incomplete,
        "runs": {"against": before, "torch": after},
        "exit_code": code,
        "verdict": verdict,
    }
    return Page(
        f"This model on MPS, torch {name}",
        _lines(before, after),
        _sections(gained, gone, new, old),
        verdict,
        code,
        data,
    )


def _lines(before: Document, after: Document) -> list[str]:
    made = []
    for which, document in (("against (installed)", before), ("torch", after)):
        state = "complete" if document["complete"] else "incomplete: " + "; ".join(document["why_incomplete"])
        made.append(f"{which}: {document['torch'] or 'unknown'} on {document['device'] or 'no device'}, {state}")
    return made


def _sections(*groups: Any) -> list[Section]:
    gained, gone, new, old = groups
    headings = ["op", "kind", "phase", "calls", "where", "what to do"]
    both = [new[key] for key in new if key in old]
    made: list[Section] = []
    for title, found in (("New: leaves the GPU", gained), ("Gone", gone), ("In both", both)):
        if found:
            rows = [
                [f["op"], str(f["kind"]), f["phase"], str(f["calls_per_iteration"]), f["where"] or "", f["advice"]]
                for f in found
            ]
            made.append((title, headings, rows))
    return made
