"""A launcher of several processes is refused; of one, or none, it is not."""

import sys

import pytest

from nanogpt_mac import cli
from nanogpt_mac.errors import InputError
from nanogpt_mac.ranks import refuse_several

TORCHRUN = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}


@pytest.mark.parametrize(
    ("environment", "named"),
    [
        (TORCHRUN, "WORLD_SIZE=2"),
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
        TORCHRUN | {"WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"},
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


def test_the_commands_refuse_before_they_do_anything(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for command in ("config", "sample", "compare"):
        monkeypatch.setattr(sys, "argv", ["train.py", "run=x"])
        assert cli.main(command, lambda config: pytest.fail("was called")) == 2
        assert capsys.readouterr().err.startswith("train.py: WORLD_SIZE=2: one of several processes")
