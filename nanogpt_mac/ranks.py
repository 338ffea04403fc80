"""Whether a launcher (torchrun, mpirun, srun, mlx.launch) has started several of this process."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from nanogpt_mac.errors import InputError

SIZES = (  # of all processes; 1 is a launcher that started one, as submitit's does
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "OMPI_COMM_WORLD_SIZE",
    "PMI_SIZE",
    "PMIX_SIZE",
    "MV2_COMM_WORLD_SIZE",
    "MLX_WORLD_SIZE",
    "SLURM_STEP_NUM_TASKS",  # of this srun; SLURM_NTASKS is what the job may start, and its script is one process
    "SUBMITIT_LOCAL_NTASKS",
)
RANKS = ("RANK", "LOCAL_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK", "SLURM_PROCID", "MLX_RANK")


def refuse_several(environment: Mapping[str, str] | None = None) -> None:
    """InputError where this process is one of several: each would train the same run."""
    environment = os.environ if environment is None else environment
    for names, least in ((SIZES, 2), (RANKS, 1)):
        for name in names:
            if _number(environment.get(name)) >= least:
                raise _refusal(name, environment[name])
    hosts = environment.get("MLX_HOSTFILE")
    alone = hosts is not None and _hosts(hosts) == 1
    if "MLX_RANK" in environment and "MLX_WORLD_SIZE" not in environment and not alone:
        raise _refusal("MLX_RANK", environment["MLX_RANK"])


def _refusal(name: str, value: str) -> InputError:
    return InputError(
        f"{name}={value}: one of several processes, and a run is one process so far; start it without a launcher, as "
        "python SCRIPT KEY=VALUE..."
    )


def _number(text: str | None) -> int:
    return int(text) if text is not None and text.isdecimal() else 0


def _hosts(path: str) -> int:
    try:
        return len(json.loads(Path(path).read_text()))
    except (OSError, ValueError, TypeError):
        return 0
