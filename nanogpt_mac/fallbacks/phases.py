"""What the three readers of an iteration share: which phase is under way."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any


class Phased(ABC):
    """Knows the phase under way; "" outside of all."""

    def __init__(self) -> None:
        self.current = ""

    @abstractmethod
    def phase(self, name: str) -> AbstractContextManager[None]:
        """The phase `name`, while the context lasts."""

    def during(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, run as the phase `name` while any phase is under way."""

        @functools.wraps(function)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            with self.phase(name) if self.current else nullcontext():
                return function(*args, **kwargs)

        return wrapped
