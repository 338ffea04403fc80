"""Whether a launcher has started several of this process, and which of them this one is."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from zlib import crc32

from nanogpt_mac import files
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
TORCHRUN, MLX = "torchrun", "mlx.launch"
STARTED_BY = {TORCHRUN: "torchrun --nproc_per_node={}", MLX: "mlx.launch -n {} --python PYTHON"}


def command(launcher: str, size: int) -> list[str]:
    """What stands before a script to start it so many times on this machine, with this Python."""
    if launcher == TORCHRUN:
        return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={size}"]
    return [str(Path(sys.executable).with_name("mlx.launch")), "-n", str(size), "--python", sys.executable]


@dataclass(frozen=True)
class Launched:
    """This process among those that a launcher started."""

    launcher: str = ""
    rank: int = 0
    size: int = 1
    local: int = 0  # this process among those of this machine
    here: int = 1  # processes on this machine, where the launcher says it
    address: str = "127.0.0.1"  # where rank 0 can be reached
    restarts: int = 0  # how often torchrun has started all of them anew

    @property
    def speaks(self) -> bool:
        """Whether what is wrong with a command line is for this one to say: one of each machine does."""
        return self.local == 0


def launched(environment: Mapping[str, str] | None = None) -> Launched:
    """What torchrun's or mlx.launch's variables say. InputError for another launcher of several processes."""
    given = os.environ if environment is None else environment
    if {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= given.keys() and _number(given["WORLD_SIZE"]):
        rank, size, local = (_number(given.get(key)) for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
        here, restarts = (_number(given.get(key)) for key in ("LOCAL_WORLD_SIZE", "TORCHELASTIC_RESTART_COUNT"))
        return Launched(TORCHRUN, rank, size, local, here, given["MASTER_ADDR"], restarts)
    if "MLX_RANK" in given and (found := _of_mlx(given)) is not None:
        return found
    refuse_several(environment)
    return Launched()


def says(text: str, unless_any: bool = False) -> bool:
    """Whether `text` is for this process to say: the first of a machine's ranks that comes with it, so that it is said
    once, whichever ranks it is true of. `unless_any`: only where none of them has said anything. A process that was
    started by hand, with a launcher's variables, speaks for itself."""
    try:
        if launched().size == 1 or not {"TORCHELASTIC_RUN_ID", "MLX_RANK"} & os.environ.keys():
            return True
        folder = shared_folder()
        if unless_any and any(folder.glob("said-*")):
            return False
        (folder / f"said-{crc32(text.encode()):08x}").touch(exist_ok=False)
    except (InputError, OSError) as error:  # another launcher; no folder can be made
        return not isinstance(error, FileExistsError)
    return True


def shared_folder() -> Path:
    """Where the processes that one launcher has started on this machine leave each other word."""
    import psutil

    parent = psutil.Process(os.getppid())
    folder = files.cache_folder("launched", f"{parent.pid}-{parent.create_time():.0f}")
    folder.mkdir(parents=True, exist_ok=True)
    for other in folder.parent.iterdir():
        if not psutil.pid_exists(int(other.name.partition("-")[0])):
            files.remove(other)
    return folder


def _of_mlx(given: Mapping[str, str]) -> Launched | None:
    """mlx.launch has a file of all hosts (ring), one of their links (JACCL), or says how many there are (NCCL)."""
    rank = _number(given["MLX_RANK"])
    if hosts := _listed(given.get("MLX_HOSTFILE")):
        where = [str(host[0] if isinstance(host, list) else host).rpartition(":")[0] for host in hosts]
        local, here = where[:rank].count(where[rank]), where.count(where[rank])
        return Launched(MLX, rank, len(hosts), local, here, where[0]) if len(hosts) > 1 else None
    links = _listed(given.get("MLX_IBV_DEVICES"))
    size = len(links) or _number(given.get("MLX_WORLD_SIZE"))
    address = given.get("NCCL_HOST_IP") or given.get("MLX_JACCL_COORDINATOR", "127.0.0.1").rpartition(":")[0]
    return Launched(MLX, rank, size, 0 if links else rank, address=address) if size > 1 else None


def refuse_several(environment: Mapping[str, str] | None = None) -> None:
    """InputError where this process is one of several: each would do the same work."""
    environment = os.environ if environment is None else environment
    for names, least in ((SIZES, 2), (RANKS, 1)):
        for name in names:
            if _number(environment.get(name)) >= least:
                raise _refusal(name, environment[name])
    if "MLX_RANK" in environment and "MLX_WORLD_SIZE" not in environment and not _alone(environment):
        raise _refusal("MLX_RANK", environment["MLX_RANK"])


def _refusal(name: str, value: str) -> InputError:
    return InputError(
        f"{name}={value}: one of several processes; only a run of train.py may be several, started by torchrun or "
        "mlx.launch. Start this without a launcher, as python SCRIPT KEY=VALUE..."
    )


def _alone(given: Mapping[str, str]) -> bool:
    """Whether mlx.launch has one host: it then writes an empty file."""
    path = Path(given.get("MLX_HOSTFILE") or "none")
    return path.is_file() and (not path.read_text().strip() or len(_listed(str(path))) == 1)


def _number(text: str | None) -> int:
    return int(text) if text is not None and text.isdecimal() else 0


def _listed(path: str | None) -> list[object]:
    """The list in a file of mlx.launch; empty where there is none."""
    try:
        found = json.loads(Path(path).read_text()) if path else []
    except (OSError, ValueError):
        return []
    return found if isinstance(found, list) else []
