"""The child process of a suite: some rows on one way, a line of JSON for each, so that a crash loses one row."""

from __future__ import annotations

import json
import sys

from nanogpt_mac.errors import InputError, reason
from nanogpt_mac.records.base import plain
from nanogpt_mac.records.bench import Reading, State, Task
from nanogpt_mac.suites.run import suite_of


def main() -> None:
    task = Task.model_validate(json.load(sys.stdin))
    try:
        measure = suite_of(task.suite).measuring(task)
    except InputError as error:
        sys.exit(str(error))
    for row in task.rows:
        _say({"begun": row})
        try:
            reading = measure(row)
        except Exception as error:
            words = f"{type(error).__name__}: {reason(error)}"
            reading = Reading(row=row, way=task.way.name, round=task.round, state=State.FAILED, reason=words)
        _say(plain(reading.model_dump(mode="python")))


def _say(line: object) -> None:
    print(f"\n{json.dumps(line)}", flush=True)  # on a line of its own, whatever a library has printed


if __name__ == "__main__":
    main()
