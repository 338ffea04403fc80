"""What watching costs: a program under the detector and without it, on the same simulated device, in turns.

`python program_overhead.py ROUNDS STEPS MAP PROGRAM ARGUMENTS...` in the program's folder, with STEPS and MAP as
program_reference.py has them. Prints JSON: of each the exit codes, and of wall and CPU time the middle seconds and the
middle, least and greatest ratio of the rounds. A run is a process of its own; it is timed from the program's first line
to its end, or to its last step, the reading of profiles included.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from nanogpt_mac import simulator


def run(kind, times, steps, mapped, *argv):
    """One run, in this process."""
    import program_reference

    from nanogpt_mac.fallbacks import program

    simulator.install()
    task = {"argv": list(argv), "steps": int(steps) or None, "map_cuda": mapped == "cuda", "path": ""}
    sys.argv = ["", "-", steps, mapped, *argv]
    wall, cpu = time.perf_counter(), time.process_time()
    try:
        if kind == "plain":
            program_reference.main()
        else:
            sys.exit(program.run(task | {"answer": f"{times}.answer"}))
    finally:
        Path(times).write_text(json.dumps([time.perf_counter() - wall, time.process_time() - cpu]))


def main():
    rounds, *what = sys.argv[1:]
    environment = simulator.environment(fallback=True) | {"KINETO_LOG_LEVEL": "99", "TORCHDYNAMO_DISABLE": "1"}
    seen, codes = {"plain": [], "watched": []}, {"plain": set(), "watched": set()}
    with tempfile.TemporaryDirectory() as folder:
        times = Path(folder, "times.json")
        for number in range(int(rounds)):
            for kind in sorted(seen, reverse=bool(number % 2)):
                argv = [sys.executable, __file__, "--run", kind, str(times), *what]
                done = subprocess.run(argv, env=os.environ | environment, capture_output=True, check=False)
                seen[kind].append(json.loads(times.read_text()))
                codes[kind].add(done.returncode)
    made = {"codes": {kind: sorted(found) for kind, found in codes.items()}}
    for i, name in enumerate(("wall", "cpu")):
        ratios = sorted(w[i] / p[i] for w, p in zip(seen["watched"], seen["plain"], strict=True))
        made[name] = {kind: round(statistics.median(one[i] for one in found), 2) for kind, found in seen.items()}
        made[name]["ratio"] = [round(ratio, 2) for ratio in (statistics.median(ratios), ratios[0], ratios[-1])]
    print(json.dumps(made))


if __name__ == "__main__":
    if sys.argv[1] == "--run":
        run(*sys.argv[2:])
    else:
        main()
