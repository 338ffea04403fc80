"""How many of this machine's cores are ours."""

import os


def usable() -> int:
    """Cores that this process may run on: fewer than there are under taskset, in a container, in a batch system."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
