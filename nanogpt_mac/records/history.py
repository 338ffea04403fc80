"""Every overload's kind in every torch: the document of `mps_coverage.py history=...`, and of a bisection."""

from __future__ import annotations

from enum import StrEnum

from nanogpt_mac.records.base import Amount, Count, Document, Record


class Checked(StrEnum):
    """Whether a table was held against its binary, and what that said."""

    AGREES = "agrees"
    DISAGREES = "disagrees"
    NOT = "not checked"


class Release(Record):
    """One torch of the history. `error` is why its wheel could not be read; it then has no kinds."""

    version: str
    git: str | None = None
    sha256: str | None = None
    bytes: Count = 0  # read from a server, this time
    seconds: Amount = 0.0
    counts: dict[str, Count] = {}  # kind to overloads
    by_hand: tuple[str, ...] = ()
    checked: Checked = Checked.NOT
    disagreements: tuple[str, ...] = ()
    error: str | None = None


class History(Document):
    """`overloads` has one kind for each of `releases`; None where it does not exist there, or is not known."""

    asked: str
    releases: tuple[Release, ...]
    overloads: dict[str, tuple[str | None, ...]]
    ours: tuple[str, ...] = ()  # overloads of this model, or of a script
    whose: str = ""  # whose those are


class Build(Record):
    """One build of a bisection that was looked at."""

    version: str
    git: str | None = None
    state: str  # what it has, or what it found; `skipped: ` and the reason where it could not be looked at


class Bisection(Document):
    """`good` and `bad` are the last build before the change and the first after it, with nothing readable between."""

    asked: str
    builds: Count  # between the two that were given, those included
    read: Count  # wheels
    seen: tuple[Build, ...]
    good: Build | None = None
    bad: Build | None = None
    skipped: tuple[str, ...] = ()  # builds between these two that could not be read
    link: str | None = None
    changes: tuple[str, ...] = ()
