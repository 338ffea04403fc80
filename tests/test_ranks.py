"""A launcher of several processes is refused; of one, or none, it is not."""

import os
import subprocess
import sys

import pytest
from fakes.support import ROOT

from nanogpt_mac import cli, files
from nanogpt_mac.errors import InputError
from nanogpt_mac.ranks import MLX, TORCHRUN, Launched, launched, refuse_several

VARIABLES = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}
STARTED = {"MASTER_ADDR": "one.local", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("environment", "named"),
    [
        (VARIABLES, "WORLD_SIZE=2"),
        ({"RANK": "1"}, "RANK=1"),
        ({"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "0"}, "OMPI_COMM_WORLD_SIZE=4"),
        ({"PMI_SIZE": "2", "PMI_RANK": "0"}, "PMI_SIZE=2"),
        ({"SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0"}, "SLURM_STEP_NUM_TASKS=2"),
        ({"SLURM_NTASKS": "2", "SLURM_PROCID": "1"}, "SLURM_PROCID=1"),
        ({"SUBMITIT_LOCAL_NTASKS": "2"}, "SUBMITIT_LOCAL_NTASKS=2"),
        ({"MLX_RANK": "0", "MLX_HOSTFILE": "two.json"}, "MLX_RANK=0"),
        ({"MLX_RANK": "0", "MLX_WORLD_SIZE": "2"}, "MLX_WORLD_SIZE=2"),
        ({"MLX_RANK": "0"}, "MLX_RANK=0"),
    ],
)
def test_several_are_refused_in_a_line(environment, named, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "two.json").write_text('[["a"], ["b"]]')
    with pytest.raises(InputError, match=f"^{named}: one of several processes"):
        refuse_several(environment)


@pytest.mark.parametrize(
    "environment",
    [
        {},
        VARIABLES | {"WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"},
        {"RANK": "first"},
        {"OMPI_COMM_WORLD_SIZE": "1"},
        {"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_JOB_ID": "7"},  # a job's script, which srun did not start
        {"SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},  # submitit's
        {"MLX_RANK": "0", "MLX_HOSTFILE": "one.json"},
        {"MLX_RANK": "0", "MLX_WORLD_SIZE": "1"},
    ],
)
def test_one_is_one(environment, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "one.json").write_text('[["a"]]')
    refuse_several(environment)


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        ({}, Launched()),
        (
            {**STARTED, "RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"},
            Launched(TORCHRUN, 3, 4, 1, 2, "one.local", 0),
        ),
        (
            {**STARTED, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "TORCHELASTIC_RESTART_COUNT": "2"},
            Launched(TORCHRUN, 0, 1, 0, 0, "one.local", 2),
        ),
        ({"MLX_RANK": "1", "MLX_HOSTFILE": "here.json"}, Launched(MLX, 1, 2, 1, 2, "127.0.0.1")),
        ({"MLX_RANK": "2", "MLX_HOSTFILE": "macs.json"}, Launched(MLX, 2, 3, 1, 2, "10.0.0.1")),
        ({"MLX_RANK": "0", "MLX_HOSTFILE": "empty.json"}, Launched()),
        ({"MLX_RANK": "1", "MLX_WORLD_SIZE": "2", "NCCL_HOST_IP": "10.0.0.3"}, Launched(MLX, 1, 2, 1, 1, "10.0.0.3")),
        (
            {"MLX_RANK": "1", "MLX_IBV_DEVICES": "links.json", "MLX_JACCL_COORDINATOR": "10.0.0.4:32323"},
            Launched(MLX, 1, 2, 0, 1, "10.0.0.4"),
        ),
    ],
)
def test_what_the_launchers_say(environment, found, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here.json").write_text('[["127.0.0.1:32323"], ["127.0.0.1:32324"]]')  # as mlx.launch -n 2 writes it
    (tmp_path / "macs.json").write_text('[["10.0.0.1:1", "10.0.1.1:2"], ["10.0.0.2:3"], ["10.0.0.2:4"]]')
    (tmp_path / "empty.json").write_text("\n")
    (tmp_path / "links.json").write_text('[[null, "rdma_en5"], ["rdma_en5", null]]')
    assert launched(environment) == found
    assert found.speaks is (found.local == 0)


def test_another_launcher_is_refused_where_train_may_be_several():
    with pytest.raises(InputError, match=r"^OMPI_COMM_WORLD_SIZE=2: .*started by torchrun or mlx.launch"):
        launched({"OMPI_COMM_WORLD_SIZE": "2"})


def test_the_commands_refuse_before_they_do_anything(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for command in ("config", "sample", "compare"):
        monkeypatch.setattr(sys, "argv", ["train.py", "run=x"])
        assert cli.main(command, lambda config: pytest.fail("was called")) == 2
        assert capsys.readouterr().err.startswith("train.py: WORLD_SIZE=2: one of several processes")


def test_what_is_wrong_is_said_once_by_whichever_rank_has_it(tmp_path):
    """A mistake of rank 1 alone must be heard; one of all ranks is one line, and who is ended for it adds none."""
    code = (
        "import os, sys; from nanogpt_mac import ranks\n"
        "for text in sys.argv[1:]: print(os.environ['RANK'], text, ranks.says(text))\n"
        "print('ended', ranks.says('terminated', unless_any=True))"
    )
    environment = {**os.environ, **STARTED, "WORLD_SIZE": "2", "XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}

    def rank(number, *texts, **variables):
        variables = {**environment, "RANK": number, "LOCAL_RANK": number, **variables}
        run = subprocess.run([sys.executable, "-c", code, *texts], env=variables, capture_output=True, text=True)
        return run.stdout.splitlines()

    (tmp_path / files.NAME / "launched" / "4194999-1").mkdir(parents=True)  # of a launcher that is gone
    started = {"TORCHELASTIC_RUN_ID": "7"}
    assert rank("1", "all", "one", **started) == ["1 all True", "1 one True", "ended False"]
    assert rank("0", "all", **started) == ["0 all False", "ended False"]
    assert rank("0", "all") == ["0 all True", "ended True"]  # by hand, in a terminal of its own
    (folder,) = (tmp_path / files.NAME / "launched").iterdir()
    assert folder.name.startswith(f"{os.getpid()}-")
