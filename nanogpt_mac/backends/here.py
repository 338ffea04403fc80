"""What this machine has of every back end, asked in a process of its own.

Asking a framework for its devices loads it, takes its GPU, and settles what it reads from the environment only once.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from nanogpt_mac import child
from nanogpt_mac.backends.base import BackendOptions, Kind
from nanogpt_mac.backends.kinds import KINDS
from nanogpt_mac.errors import InputError
from nanogpt_mac.records.capabilities import Capabilities

TIMEOUT_S = 300.0  # a cold import of several frameworks from a slow disk


def look() -> tuple[dict[str, str], dict[str, Capabilities]]:
    """(Why a back end cannot run here, what it is where it can), each by name in the registry's order."""
    try:
        answers: dict[str, Any] = child.ask(__name__, timeout_s=TIMEOUT_S)
    except child.ChildError as error:
        raise InputError(str(error)) from error
    missing = {name: found for name, found in answers.items() if isinstance(found, str)}
    return missing, {
        name: Capabilities(**found | {"dtypes": tuple(found["dtypes"])})
        for name, found in answers.items()
        if name not in missing
    }


def _ask(kind: Kind) -> Any:
    """Why it is missing, or its Capabilities as JSON."""
    try:
        if reason := kind.missing():
            return reason
        kind.prepare(BackendOptions(kind.name, False, "float32", "highest", 0, 0.0, 0.0, 0.0, 0.0))
        return asdict(kind.on(kind.load().device_of(kind)))
    except InputError:
        raise
    except Exception as error:  # a broken installation: the others can still run
        return f"it cannot be loaded: {type(error).__name__}: {' '.join(str(error).split())[:200]}"


if __name__ == "__main__":
    child.answer(lambda _task: {kind.name: _ask(kind) for kind in KINDS.values()})
