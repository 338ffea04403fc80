"""What one torch runs on MPS and another does not."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from nanogpt_mac.operators.table import Kind, Table

ABSENT = "absent"  # the overload does not exist in that torch


@dataclass(frozen=True)
class Change:
    """One overload; `before` and `after` are a Kind's value, or ABSENT."""

    op: str
    before: str
    after: str


@dataclass
class Diff:
    """Changes from one table to another."""

    lost: list[Change] = field(default_factory=list)  # ran on MPS, and now is missing or falls back to the CPU
    gained: list[Change] = field(default_factory=list)  # the reverse
    removed: list[Change] = field(default_factory=list)  # the overload no longer exists
    moved: list[Change] = field(default_factory=list)  # other changes of kind: a composite that got a kernel of its own
    unclear: list[Change] = field(default_factory=list)  # the sources of one of the two contradict each other
    hand_added: list[str] = field(default_factory=list)  # new registrations by hand: CPU fallbacks, errors
    hand_removed: list[str] = field(default_factory=list)


def compare(old: Table, new: Table, ops: Iterable[str] | None = None) -> Diff:
    """The changes from `old` to `new`, of the overloads `ops` or of all that `old` has.

    An overload that only `new` has does not count: nothing that ran before calls it.
    """
    diff = Diff(
        hand_added=sorted(set(new.hand_list()) - set(old.hand_list())),
        hand_removed=sorted(set(old.hand_list()) - set(new.hand_list())),
    )
    for op in sorted(old.entries if ops is None else set(ops) & old.entries.keys()):
        before, after = old.entries[op], new.entries.get(op)
        if after is not None and before.kind == after.kind:
            continue
        change = Change(op, before.kind.value, after.kind.value if after else ABSENT)
        if after is None:
            diff.removed.append(change)
        elif Kind.UNKNOWN in (before.kind, after.kind):
            diff.unclear.append(change)
        elif before.runs != after.runs:
            (diff.lost if before.runs else diff.gained).append(change)
        else:
            diff.moved.append(change)
    return diff
