"""Checkpoints: complete or not there, and nothing damaged is ever taken for whole."""

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from math import prod
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save as to_bytes
from safetensors.torch import load_file

from nanogpt_mac.errors import InputError
from nanogpt_mac.gpt.spec import GPTSpec, TrainState
from nanogpt_mac.train import checkpoint

SPEC = GPTSpec(1, 2, 8, 4, 11)
SPEC_SIZE = sum(map(prod, SPEC.shapes().values()))
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


def save(root, state, meta, best):
    with checkpoint.begun(root, state) as complete:
        return complete(meta, best)


@pytest.fixture
def saved(tmp_path):
    save(tmp_path / "ckpt", state(5), META, best=True)
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


def test_files_are_safetensors_own_byte_for_byte_whatever_the_arrays_lie_like(tmp_path):
    """Of several sizes, so that the header's length has any remainder; names that are not in order; views of others."""
    for width in range(1, 9):
        made = state(5)
        made.weights = {f"{n}{'x' * width}": w for n, w in reversed(made.weights.items())}
        moments = {f"exp_avg.{n}": a for n, a in made.exp_avg.items()}
        moments |= {f"exp_avg_sq.{n}": a for n, a in made.exp_avg_sq.items()}
        expected = dict(zip(checkpoint.FILES, map(to_bytes, (made.weights, moments)), strict=True))
        made.exp_avg = {n: np.asfortranarray(a) for n, a in made.exp_avg.items()}
        made.exp_avg_sq = {n: np.stack([a, a], -1)[..., 0] for n, a in made.exp_avg_sq.items()}
        folder = save(tmp_path / str(width), made, META, best=True)
        assert {name: (folder / name).read_bytes() for name in checkpoint.FILES} == expected
        digests = json.loads((folder / "state.json").read_text())["sha256"]
        assert digests == {name: hashlib.sha256(data).hexdigest() for name, data in expected.items()}


def test_arrays_are_written_before_it_is_known_what_they_are_worth(tmp_path):
    with checkpoint.begun(tmp_path, state(5)) as complete:
        (aside,) = tmp_path.iterdir()
        deadline = time.monotonic() + 60
        while sum(p.stat().st_size for p in aside.iterdir()) < 4 * 3 * SPEC_SIZE:
            assert time.monotonic() < deadline
        assert not (aside / "state.json").exists()
        complete(META, False)
        assert checkpoint.load(tmp_path / "last")[1].iteration == 5


@pytest.mark.parametrize("ending", [None, RuntimeError, KeyboardInterrupt])
def test_a_checkpoint_that_is_not_completed_leaves_nothing_and_loses_nothing(saved, monkeypatch, ending):
    """Nor do its threads outlive it: here they are held up until it is given up."""
    given_up, written, fsync = threading.Event(), [], os.fsync

    def slow(descriptor):
        assert given_up.wait(60)
        fsync(descriptor)
        written.append(descriptor)

    monkeypatch.setattr(os, "fsync", slow)
    before, timer = threading.active_count(), threading.Timer(0.1, given_up.set)
    with nullcontext() if ending is None else pytest.raises(ending), checkpoint.begun(saved.parent, state(6)):
        timer.start()
        if ending:
            raise ending
    timer.join()
    assert (len(written), threading.active_count()) == (2, before)
    assert sorted(p.name for p in saved.parent.iterdir()) == ["best", "iter-00000005", "last"]
    assert checkpoint.load(saved)[1].iteration == 5


def test_a_kill_between_arrays_and_state_leaves_the_former_checkpoint(saved, tmp_path):
    """SIGKILL, after which nothing is tidied up, while both arrays are on the disk and nothing else is."""
    code = f"""if True:
        import os, sys; sys.path[:0] = {sys.path!r}
        from nanogpt_mac.gpt.spec import GPTSpec, TrainState
        from nanogpt_mac.train import checkpoint
        checkpoint.files.write = lambda path, data: os.kill(os.getpid(), 9)
        state = TrainState.fresh({SPEC!r}.init_weights(6))
        state.iteration = 6
        with checkpoint.begun(checkpoint.Path({str(saved.parent)!r}), state) as complete:
            complete({META!r}, True)"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    (aside,) = saved.parent.glob(".*")
    assert sorted(p.name for p in aside.iterdir()) == sorted(checkpoint.FILES)
    for which in ("last", "best"):
        assert checkpoint.load(checkpoint.find(str(tmp_path), which))[1].iteration == 5


def test_last_and_best_are_kept_and_the_rest_removed(tmp_path):
    root = tmp_path / "ckpt"
    for iteration, best in [(1, True), (2, True), (3, False), (4, False)]:
        save(root, state(iteration), META, best)
    assert (root / "last").readlink().name == "iter-00000004"
    assert (root / "best").readlink().name == "iter-00000002"
    assert sorted(p.name for p in root.glob("[!.]*")) == ["best", "iter-00000002", "iter-00000004", "last"]
    deadline = time.monotonic() + 60
    while list(root.glob(".*")):  # the others, until a thread has removed them
        assert time.monotonic() < deadline


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
    save(root, state(1), META, best=True)

    class Killed(BaseException):
        pass

    def kill(*_args, **_keys):
        raise Killed

    where = {
        "write": (os, "fsync"),
        "rename": (type(root), "rename"),
        "link": (type(root), "replace"),
        "prune": (checkpoint, "_remove_behind"),
    }
    with monkeypatch.context() as patch:
        patch.setattr(*where[moment], kill)
        with pytest.raises(Killed):
            save(root, state(2), META, best=True)
    _, loaded, _ = checkpoint.load(checkpoint.find(str(tmp_path)))
    assert loaded.iteration == (2 if moment == "prune" else 1)
    save(root, state(3), META, best=False)
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


def test_what_is_renamed_is_on_the_disk_before(tmp_path, monkeypatch):
    """Every file whole and synced, then its folder, before the rename; the parent folder before and after the links."""
    root, events = tmp_path / "not" / "there" / "ckpt", []

    def name(status):
        known = [*root.rglob("*"), root]
        return next(p.name for p in known if not p.is_symlink() and os.path.samestat(p.stat(), status))

    fsync = os.fsync

    def synced(descriptor):
        status = os.fstat(descriptor)
        events.append((name(status), status.st_size if name(status).endswith(("json", "safetensors")) else None))
        fsync(descriptor)

    moved = {}
    for method in ("rename", "replace"):
        moved[method] = getattr(type(root), method)

        def move(self, target, method=method):
            events.append((method, target.name if hasattr(target, "name") else target))
            return moved[method](self, target)

        monkeypatch.setattr(type(root), method, move)
    monkeypatch.setattr(os, "fsync", synced)
    before = len(list(Path("/dev/fd").iterdir()))
    folder = save(root, state(5), META, best=True)
    assert len(list(Path("/dev/fd").iterdir())) == before  # a long run makes thousands of checkpoints
    sizes = {p.name: p.stat().st_size for p in folder.iterdir()}
    aside = f".{folder.name}-{os.getpid()}"
    assert dict(events[:3]) == sizes
    assert events[3:] == [
        (aside, None),
        ("rename", folder.name),
        ("ckpt", None),
        ("replace", "last"),
        ("replace", "best"),
        ("ckpt", None),
    ]


def test_the_schema_is_the_first(saved):
    """Checkpoints are kept for years: a change of the number needs a way to read those of before."""
    assert json.loads((saved / "state.json").read_text())["schema"] == 1


def test_a_run_is_opened_whole_unless_its_weights_are_all_that_is_asked_for(saved, tmp_path):
    folder, (spec, loaded, _) = checkpoint.open_run(str(tmp_path))
    assert (folder, spec) == (saved.resolve(), SPEC)
    assert all(loaded.exp_avg[n].any() == w.any() for n, w in loaded.weights.items())
    _, (_, light, _) = checkpoint.open_run(str(tmp_path), weights_only=True)
    assert not any(a.any() for a in light.exp_avg.values())
    assert all((light.weights[n] == w).all() for n, w in loaded.weights.items())


def test_a_checkpoint_that_is_replaced_while_it_is_read_is_looked_for_again(saved, tmp_path, monkeypatch):
    read, tries = checkpoint.load, []

    def replaced(folder, weights_only):
        """The run under way puts a new checkpoint in this one's place, as often as `times` says."""
        tries.append(folder.name)
        if len(tries) <= times:
            save(tmp_path / "ckpt", state(10 * len(tries)), META, best=True)
            raise InputError(f"{folder}: gone")
        return read(folder, weights_only)

    monkeypatch.setattr(checkpoint, "load", replaced)
    times = 4
    _, (_, loaded, _) = checkpoint.open_run(str(tmp_path))
    assert loaded.iteration == 40
    assert tries == ["iter-00000005", *(f"iter-000000{i}0" for i in range(1, 5))]
    tries.clear()
    times = 99
    with pytest.raises(InputError, match="replaced faster than they can be read"):
        checkpoint.open_run(str(tmp_path))
    assert len(tries) == 5


def test_a_damaged_checkpoint_is_not_read_again(saved, tmp_path, monkeypatch):
    (saved / "moments.safetensors").unlink()
    read, tries = checkpoint.load, []
    monkeypatch.setattr(checkpoint, "load", lambda *arguments: tries.append(1) or read(*arguments))
    with pytest.raises(InputError, match=r"moments\.safetensors: not readable"):
        checkpoint.open_run(str(tmp_path))
    assert len(tries) == 1


@pytest.mark.parametrize("kind", ["weights", "exp_avg", "exp_avg_sq"])
def test_tensors_of_another_model_are_refused_wherever_they_are(tmp_path, kind):
    made = state(5)
    other = {n: w[:1].copy() if n.endswith("wte.weight") else w for n, w in getattr(made, kind).items()}
    setattr(made, kind, other)
    folder = save(tmp_path, made, META, best=False)
    file = "weights" if kind == "weights" else "moments"
    with pytest.raises(InputError, match=rf"{file}\.safetensors.*transformer\.wte\.weight is float32"):
        checkpoint.load(folder, weights_only=kind == "weights")


@pytest.mark.parametrize("file", [*checkpoint.FILES, "state.json"])
def test_a_full_disk_leaves_the_former_checkpoint_and_names_the_file(saved, tmp_path, monkeypatch, file):
    fsync = os.fsync

    def full(descriptor):
        status = os.fstat(descriptor)
        if any(os.path.samestat(path.stat(), status) for path in tmp_path.glob(f"ckpt/.*/{file}")):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device") as error:
        save(tmp_path / "ckpt", state(6), META, best=True)
    assert error.value.filename.endswith(f"/{file}")
    assert sorted(p.name for p in (tmp_path / "ckpt").iterdir()) == ["best", "iter-00000005", "last"]
