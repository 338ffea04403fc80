"""Checkpoints: complete or not there, and nothing damaged is ever taken for whole."""

import json
import os

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from nanogpt_mac.errors import InputError
from nanogpt_mac.gpt.spec import GPTSpec, TrainState
from nanogpt_mac.train import checkpoint

SPEC = GPTSpec(1, 2, 8, 4, 11)
META = {
    "spec": {"n_layer": 1, "n_head": 2, "n_embd": 8, "block_size": 4, "vocab_size": 11},
    "config": {},
    "corpus": {},
    "encoder": {},
}


def state(iteration):
    made = TrainState.fresh(SPEC.init_weights(iteration))
    made.exp_avg = {n: w * 2 for n, w in made.weights.items()}
    made.exp_avg_sq = {n: w**2 for n, w in made.weights.items()}
    made.iteration, made.optimizer_steps, made.loss_scale, made.scale_growth = iteration, iteration - 1, 512.0, 7
    return made


@pytest.fixture
def saved(tmp_path):
    checkpoint.save(tmp_path / "ckpt", state(5), META, best=True)
    return tmp_path / "ckpt" / "last"


def test_a_checkpoint_comes_back_whole(saved):
    spec, loaded, _ = checkpoint.load(saved)
    expected = state(5)
    assert spec == SPEC
    for kind in ("weights", "exp_avg", "exp_avg_sq"):
        for name, array in getattr(expected, kind).items():
            np.testing.assert_array_equal(getattr(loaded, kind)[name], array)
    for key in checkpoint.COUNTERS:
        assert getattr(loaded, key) == getattr(expected, key)


def test_weights_are_plain_safetensors_that_torch_reads(saved):
    tensors = load_file(saved / "weights.safetensors")
    assert {n: tuple(t.shape) for n, t in tensors.items()} == SPEC.shapes()
    assert all(t.dtype == torch.float32 for t in tensors.values())


def test_last_and_best_are_kept_and_the_rest_removed(tmp_path):
    root = tmp_path / "ckpt"
    for iteration, best in [(1, True), (2, True), (3, False), (4, False)]:
        checkpoint.save(root, state(iteration), META, best)
    assert (root / "last").readlink().name == "iter-00000004"
    assert (root / "best").readlink().name == "iter-00000002"
    assert sorted(p.name for p in root.iterdir()) == ["best", "iter-00000002", "iter-00000004", "last"]


@pytest.mark.parametrize("name", ["weights.safetensors", "moments.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "gone"])
def test_a_damaged_file_is_named(saved, name, damage):
    path = saved / name
    data = bytearray(path.read_bytes())
    if damage == "gone":
        path.unlink()
    else:
        data[len(data) // 2] ^= 255
        path.write_bytes({"cut": data[: len(data) // 2], "flip": data, "empty": b""}[damage])
    with pytest.raises(InputError, match=name) as raised:
        checkpoint.load(checkpoint.find(str(saved)) if path.name != "state.json" else saved)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "change",
    [
        {"schema": 99},
        {"spec": None},
        {"spec": {"n_layer": 1}},
        {"spec": META["spec"] | {"n_layer": 2}},
        {"spec": META["spec"] | {"n_embd": "8"}},
        {"iteration": -1},
        {"iteration": 14.5},
        {"loss_scale": float("inf")},
        {"best_val_loss": "low"},
        {"loss_scale": "much"},
        {"sha256": {}},
    ],
)
def test_a_state_that_does_not_fit_is_refused(saved, change):
    document = json.loads((saved / "state.json").read_text()) | change
    (saved / "state.json").write_text(json.dumps(document))
    with pytest.raises(InputError, match=r"state\.json|safetensors") as raised:
        checkpoint.load(saved)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("moment", ["write", "rename", "link", "prune"])
def test_a_kill_at_any_step_leaves_the_former_checkpoint(tmp_path, monkeypatch, moment):
    """The process stops dead (an exception that nothing handles) in the middle of the second save."""
    root = tmp_path / "ckpt"
    checkpoint.save(root, state(1), META, best=True)

    class Killed(BaseException):
        pass

    def kill(*_args, **_keys):
        raise Killed

    where = {
        "write": (os, "fsync"),
        "rename": (type(root), "rename"),
        "link": (type(root), "replace"),
        "prune": (checkpoint.shutil, "rmtree"),
    }
    with monkeypatch.context() as patch:
        patch.setattr(*where[moment], kill)
        with pytest.raises(Killed):
            checkpoint.save(root, state(2), META, best=True)
    _, loaded, _ = checkpoint.load(checkpoint.find(str(tmp_path)))
    assert loaded.iteration == (2 if moment == "prune" else 1)
    checkpoint.save(root, state(3), META, best=False)
    assert checkpoint.load(root / "last")[1].iteration == 3


def test_find_takes_a_run_a_checkpoint_or_says_what_is_missing(saved, tmp_path):
    run = saved.parent.parent
    assert checkpoint.find(str(run)) == (run / "ckpt" / "last").resolve()
    assert checkpoint.find(str(run), "best") == (run / "ckpt" / "best").resolve()
    assert checkpoint.find(str(saved)) == saved.resolve()
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no checkpoint"):
        checkpoint.find(str(tmp_path / "empty"))
    with pytest.raises(InputError, match="there is no such folder"):
        checkpoint.find(str(tmp_path / "nowhere"))
