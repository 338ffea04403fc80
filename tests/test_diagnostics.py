"""What a command says of mistakes and of failures: one line each, and the exit code behind it."""

import errno
import re

import pytest

from nanogpt_mac import supervise
from nanogpt_mac.backends.kinds import KINDS

BACKENDS = sorted(("auto", *KINDS))
MISTAKES = [
    (["max_itters=5"], r"max_itters=5: there is no such key; did you mean max_iters"),
    (["model.n_hed=3"], r"model.n_hed=3: there is no such key; did you mean model.n_head"),
    (["n_head=3"], r"n_head=3: written as for nanoGPT; use: python train\.py model\.n_head=3"),
    (["+extra=1"], r"extra=1: there is no such key"),
    (["foo.bar=1"], r"foo\.bar=1: there is no such key"),
    (["backend=tpu"], f"backend=tpu: use one of {', '.join(sorted(('auto', *KINDS)))}"),
    (["data=enwik8"], r"data=enwik8: use one of .*shakespeare_char"),
    (["experiment=fast"], r"experiment=fast: use one of .*quick, smoke"),
    (["max_iters=abc"], r"max_iters=abc: use a whole number$"),
    (["max_iters=1.5"], r"max_iters=1\.5: use a whole number$"),
    (["model.bias=perhaps"], r"model\.bias=perhaps: use true or false$"),
    (["model.bias=2"], r"model\.bias=2: use true or false$"),
    (["model.bias=null"], r"model\.bias=null: use a value other than null$"),
    (["backend.own_kernels=-1"], r"backend\.own_kernels=-1: use true or false$"),
    (["learning_rate=fast"], r"learning_rate=fast: use a number$"),
    (["max_iters"], r"max_iters"),
    (["model=[1"], r"model=\[1"),
]


@pytest.mark.parametrize(("overrides", "line"), MISTAKES)
def test_a_mistake_is_one_line_with_the_key_the_value_and_what_is_allowed(compose, tmp_path, overrides, line):
    code, config, err = compose(*overrides)
    assert (code, config) == (2, None)
    assert re.fullmatch(rf"train\.py: .*{line}.*\n", err), err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("group", "name", "extra"), [("launcher", "ray", "ray"), ("sweeper", "optuna", "sweep")])
def test_a_plugin_that_is_not_installed_names_its_extra(compose, monkeypatch, group, name, extra):
    from hydra.core.config_store import ConfigStore

    node = ConfigStore.instance().repo["hydra"][group]
    monkeypatch.delitem(node, f"{name}.yaml", raising=False)
    code, _, err = compose("-m", f"hydra/{group}={name}", "seed=1,2")
    assert code == 2
    assert err == f"train.py: hydra/{group}={name}: needs pip install 'nanogpt-mac[{extra}]'\n"


def test_sample_needs_a_run(compose):
    code, _, err = compose(command="sample")
    assert (code, err) == (2, "train.py: run: must be given (run=...)\n")


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Unable to allocate 298. GiB for an array with shape (200000, 200000) and data type float64"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("[metal::malloc] Attempting to allocate 99 bytes. Insufficient Memory (00000008)"),
        RuntimeError("MPS backend out of memory (MPS allocated: 1 GB). Use PYTORCH_MPS_HIGH_WATERMARK_RATIO=0.0 to"),
        RuntimeError("std::bad_alloc"),
    ],
)
def test_memory_that_runs_out_is_one_line_with_what_to_lower(compose, error):
    def task(config):
        raise error

    code, _, said = compose("experiment=smoke", task=task)
    assert code == 1
    assert re.fullmatch(
        r"train\.py: out of memory \(.*\); use batch_size below 4 or model\.block_size below 32\n", said
    )
    assert "WATERMARK" not in said
    assert supervise._why(1, said, {})[0] == "oom"


def test_another_fault_keeps_its_traceback(compose):
    def task(config):
        raise RuntimeError("the size of tensor a must match")

    with pytest.raises(RuntimeError, match="the size of tensor a must match"):
        compose(task=task)


def test_a_full_disk_is_one_line_with_the_folder(compose, tmp_path):
    def task(config):
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "runs/x/metrics.jsonl"))

    code, _, said = compose(task=task)
    assert (code, said) == (
        1,
        f"train.py: {tmp_path}: No space left on device; make room there, or name another folder "
        "(run_dir=...), and start again\n",
    )
