"""A multirun sweep (`-m`): every member runs in a process of its own, and all of them are summed up at the end."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nanogpt_mac import child


@dataclass(frozen=True)
class Member:
    """One combination of a sweep's values, and the exit code of its run."""

    title: str
    code: int


def run_member(number: int, overrides: Sequence[str], folder: str) -> Member:
    """Run one member: nothing leaks to the next, and a crash ends only it.

    Its run lies in `folder` unless it names another. A signal, which is handed on to the member, ends the whole sweep.
    """
    title = " ".join(overrides)
    given = list(overrides)
    if not any(override.startswith("run_dir=") for override in given):
        given.append(f"run_dir={Path(folder) / f'{number}-{{name}}'}")
    print(f"== sweep member {number}: {title}", flush=True)
    environment = {name: value for name, value in os.environ.items() if name != "HYDRA_FULL_ERROR"}
    code, signum = child.attend([sys.executable, sys.argv[0], *given], environment)
    if signum is not None:
        sys.exit(128 + signum)
    return Member(title, code)


def report(members: Sequence[Member]) -> int:
    """Say how every member ended; 0 when all did well, 2 when all that failed were given bad input, else 1."""
    print("== sweep")
    for number, member in enumerate(members):
        how = {0: "done", 2: "bad input (exit code 2)"}.get(member.code, f"FAILED (exit code {member.code})")
        print(f"{number}: {member.title}: {how}")
    failures = {member.code for member in members if member.code}
    if not failures:
        return 0
    print(f"{sum(bool(member.code) for member in members)} of {len(members)} failed", file=sys.stderr)
    return 2 if failures == {2} else 1
