"""Checkpoints: a folder of safetensors and JSON, complete or not there at all, read and written by every back end.

<run>/ckpt/iter-00000250/weights.safetensors   float32, canonical names
                         moments.safetensors   exp_avg.<name>, exp_avg_sq.<name>
                         state.json            everything else, with the two files' sha256
<run>/ckpt/last, best                          symbolic links, replaced in one step
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from nanogpt_mac.errors import InputError
from nanogpt_mac.gpt.spec import GPTSpec, TrainState

SCHEMA = 1
FILES = ("weights.safetensors", "moments.safetensors")
COUNTERS = ("iteration", "optimizer_steps", "loss_scale", "scale_growth")
META = {"schema": int, "spec": dict, "config": dict, "corpus": dict, "encoder": dict, "sha256": dict}


def save(root: Path, state: TrainState, meta: dict[str, Any], best: bool) -> Path:
    """Write `state` and `meta` under `root` (a run's ckpt/), point `last`, and `best` if it is, at them.

    A kill at any moment leaves the former `last` and `best` whole: the folder is written aside, synced and renamed,
    and each link is replaced by one rename.
    """
    from safetensors.numpy import save as to_bytes

    root.mkdir(parents=True, exist_ok=True)
    folder = root / f"iter-{state.iteration:08d}"
    if not folder.exists():
        aside = root / f".{folder.name}-{os.getpid()}"
        aside.mkdir()
        moments = {f"exp_avg.{n}": a for n, a in state.exp_avg.items()}
        moments |= {f"exp_avg_sq.{n}": a for n, a in state.exp_avg_sq.items()}
        digests = {}
        for name, arrays in zip(FILES, (state.weights, moments), strict=True):
            data = to_bytes(arrays)
            digests[name] = hashlib.sha256(data).hexdigest()
            _write(aside / name, data)
        counters = {key: getattr(state, key) for key in COUNTERS}
        document = {"schema": SCHEMA, **meta, **counters, "sha256": digests}
        _write(aside / "state.json", json.dumps(document, indent=1).encode())
        _sync_folder(aside)
        aside.rename(folder)
        _sync_folder(root)
    for link in ("last", "best") if best else ("last",):
        _point(root / link, folder.name)
    _sync_folder(root)
    kept = {(root / link).resolve().name for link in ("last", "best")}
    for old in root.glob("iter-*"):
        if old.name not in kept:
            shutil.rmtree(old)
    return folder


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _point(link: Path, target: str) -> None:
    aside = link.with_name(f".{link.name}-{os.getpid()}")
    aside.unlink(missing_ok=True)
    aside.symlink_to(target)
    aside.replace(link)


def find(run: str, which: str = "last") -> Path:
    """The checkpoint folder that `run` names: a run's folder (its `last` or `best`) or a checkpoint itself."""
    folder = Path(run)
    if not folder.exists():
        raise InputError(f"run={run}: there is no such folder; allowed is a run's folder or a checkpoint's")
    candidates = (folder, folder / "ckpt" / which, folder / which)
    for candidate in candidates:
        if (candidate / "state.json").is_file():
            return candidate.resolve()  # a run under way may move `last` on at any moment
    raise InputError(f"run={run}: holds no checkpoint (no ckpt/{which}/state.json)")


def read_meta(folder: Path) -> dict[str, Any]:
    """state.json of a checkpoint; InputError when it cannot be one."""
    path = folder / "state.json"
    try:
        meta = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not a readable checkpoint: {_first_line(error)}") from error
    if not isinstance(meta, dict) or meta.get("schema") != SCHEMA:
        raise InputError(f"{path}: not a checkpoint of schema {SCHEMA}")
    for key, kind in META.items():
        if not isinstance(meta.get(key), kind):
            raise InputError(f"{path}: damaged: {key} is missing or no {kind.__name__}")
    return meta


def read_spec(folder: Path, meta: dict[str, Any]) -> GPTSpec:
    """The model that a checkpoint holds."""
    names = {f.name for f in fields(GPTSpec)}
    try:
        return GPTSpec(**{key: value for key, value in meta["spec"].items() if key in names})
    except TypeError as error:
        raise InputError(f"{folder / 'state.json'}: damaged: spec: {_first_line(error)}") from error


def open_run(
    run: str, which: str = "last", weights_only: bool = False
) -> tuple[Path, tuple[GPTSpec, TrainState, dict[str, Any]]]:
    """`find` and `load`, once more where a run under way has replaced the checkpoint in between."""
    for _ in range(5):
        folder = find(run, which)
        try:
            return folder, load(folder, weights_only)
        except InputError:
            if (folder / "state.json").exists():
                raise
    raise InputError(f"run={run}: its checkpoints are replaced faster than they can be read")


def load(folder: Path, weights_only: bool = False) -> tuple[GPTSpec, TrainState, dict[str, Any]]:
    """Read a checkpoint whole, checking digests, names, shapes and values; InputError names what is wrong.

    With `weights_only` the moments are not read and come back as zeros.
    """
    meta = read_meta(folder)
    spec = read_spec(folder, meta)
    weights = _arrays(folder, "weights.safetensors", meta)
    spec.check(weights, str(folder / "weights.safetensors"))
    state = TrainState.fresh(weights)
    if not weights_only:
        moments = _arrays(folder, "moments.safetensors", meta)
        for kind in ("exp_avg", "exp_avg_sq"):
            prefix = f"{kind}."
            part = {name.removeprefix(prefix): a for name, a in moments.items() if name.startswith(prefix)}
            spec.check(part, f"{folder / 'moments.safetensors'} ({kind})")
            setattr(state, kind, part)
    for key in COUNTERS:
        value = meta.get(key)
        kinds = int | float if key == "loss_scale" else int
        if not isinstance(value, kinds) or isinstance(value, bool) or not 0 <= value < float("inf"):
            raise InputError(f"{folder / 'state.json'}: damaged: {key}={value!r}")
        setattr(state, key, value)
    best = meta.get("best_val_loss")
    if best is not None and not isinstance(best, int | float):
        raise InputError(f"{folder / 'state.json'}: damaged: best_val_loss={best!r}")
    return spec, state, meta


def _arrays(folder: Path, name: str, meta: dict[str, Any]) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError
    from safetensors.numpy import load as from_bytes

    path = folder / name
    try:
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != meta["sha256"].get(name):
            raise InputError(f"{path}: its sha256 is not the one that state.json records; the file was cut or altered")
        return from_bytes(data)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: not readable: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
