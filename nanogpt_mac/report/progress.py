"""How far something long has come: a bar on standard error where that is a terminal, else one line at the start."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress(what: str, total: int, least: int, unit: str) -> Iterator[Callable[[int], object]]:
    """Yields `advance(amount)`; shows nothing where `total` is below `least`, which is done at once."""
    if total < least:
        yield lambda amount: None
        return
    if not sys.stderr.isatty():
        print(f"{what}: {total / 1e6:.1f} million {unit}", file=sys.stderr, flush=True)
        yield lambda amount: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True)) as shown:
        bar = shown.add_task(what, total=total)
        yield lambda amount: shown.advance(bar, amount)
