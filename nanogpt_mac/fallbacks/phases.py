"""What the three readers of an iteration share: which phase is under way. They read a back end's own marks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from typing import Any


class Phased(ABC):
    """Knows the phase under way; "" outside of all."""

    def __init__(self) -> None:
        self.current = ""

    @abstractmethod
    def phase(self, name: str) -> AbstractContextManager[None]:
        """The phase `name`, while the context lasts."""

    def within(self, name: str) -> AbstractContextManager[Any]:
        """What `backend.phase` is set to: the phase `name` where another is under way, so that warming up is none."""
        return self.phase(name) if self.current else nullcontext()
