"""What the scripts at the root do: handle signals from the first moment, then run a command."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from nanogpt_mac import ranks, signals


def run(command: str, task: Callable[[Any], int]) -> NoReturn:
    """Hand the config of conf/<command>.yaml and the command line to `task`, and end with its exit code."""
    gc.disable()  # until a task begins (cli.py): importing and composing make no garbage to look for
    with signals.watched(sys.argv[0]):
        try:
            from nanogpt_mac.cli import main  # Hydra: a third of a second

            code = main(command, task)
        except signals.Stop as stop:
            if ranks.says(words := signals.words(stop.signum), unless_any=True):
                print(f"{Path(sys.argv[0]).name}: {words}", file=sys.stderr)
            code = stop.code
    signals.leave(code)
