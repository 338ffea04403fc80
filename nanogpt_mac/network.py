"""Patience with a network that does not answer."""

from __future__ import annotations

import socket
import sys
import threading
from collections.abc import Callable
from typing import TypeVar, cast
from urllib.parse import urlsplit
from urllib.request import getproxies

T = TypeVar("T")
PATIENCE_S = 4.0  # until a name is looked up and one of its addresses, of which there may be many, has been reached


class NoNetwork(Exception):  # noqa: N818 - a state, not a fault
    """No connection to the address: no name service, no route, refused, or timed out."""


def reaching(url: str, work: Callable[[], T]) -> T:
    """What `work` returns, which may talk to the host of `url`; NoNetwork where that host cannot be reached.

    A library tries for minutes: every address in turn, again and again, without a word. So it works in a thread, and
    where that takes long the host is called from here, unless a proxy stands in between.
    """
    done: list[tuple[T | None, BaseException | None]] = []

    def run() -> None:
        try:
            done.append((work(), None))
        except BaseException as error:
            done.append((None, error))

    working = threading.Thread(target=run, daemon=True)
    working.start()
    working.join(PATIENCE_S / 2)
    if working.is_alive() and not getproxies():
        print(f"waiting for {urlsplit(url).hostname}", file=sys.stderr, flush=True)
        calling = threading.Thread(target=_call, args=(url, called := list[str | None]()), daemon=True)
        calling.start()
        calling.join(PATIENCE_S)
        if working.is_alive() and called != [None]:
            raise NoNetwork(called[0] if called else f"no answer within {PATIENCE_S:g} s")
    working.join()
    value, error = done[0]
    if error is not None:
        raise error
    return cast(T, value)


def _call(url: str, called: list[str | None]) -> None:
    """Connect to the host; adds None, or why that failed."""
    parts = urlsplit(url)
    try:
        port = parts.port or {"http": 80}.get(parts.scheme, 443)
        socket.create_connection((parts.hostname or "", port), PATIENCE_S).close()
        called.append(None)
    except OSError as error:
        called.append(str(error))
