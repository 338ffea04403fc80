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
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from nanogpt_mac import files
from nanogpt_mac.errors import InputError, reason
from nanogpt_mac.gpt.spec import GPTSpec, TrainState
from nanogpt_mac.records.base import DamagedError
from nanogpt_mac.records.checkpoint import CheckpointState

FILES = ("weights.safetensors", "moments.safetensors")
COUNTERS = ("iteration", "optimizer_steps", "loss_scale", "scale_growth")


@contextmanager
def begun(root: Path, state: TrainState) -> Iterator[Callable[[Mapping[str, Any], bool], Path]]:
    """Begin to write `state` under `root` (a run's ckpt/); threads write its arrays while the caller does other things.

    The function that is given completes the checkpoint; without it nothing is left. It takes the fields of
    `CheckpointState` that `state` has not, and whether `best` shall point at it, as `last` does then. A kill at any
    moment leaves the former `last` and `best` whole: the folder is written aside, synced and renamed, and each link is
    replaced by one rename.
    """
    root.mkdir(parents=True, exist_ok=True)
    folder = root / f"iter-{state.iteration:08d}"
    aside = root / f".{folder.name}-{os.getpid()}"
    new = not folder.exists()

    def complete(meta: Mapping[str, Any], best: bool) -> Path:
        if new:
            digests = {name: file.result() for name, file in written.items()}
            counters = {key: getattr(state, key) for key in COUNTERS}
            document = CheckpointState(**meta, **counters, sha256=digests).document()
            files.write(aside / "state.json", json.dumps(document, indent=1))
            files.sync_folder(aside)
            aside.rename(folder)
            files.sync_folder(root)
        for link in ("last", "best") if best else ("last",):
            files.point(root / link, folder.name)
        files.sync_folder(root)
        kept = {(root / link).resolve().name for link in ("last", "best")}
        for old in root.glob("iter-*"):
            if old.name not in kept:
                _remove_behind(old)
        return folder

    with files.unfinished(aside):
        with ThreadPoolExecutor(len(FILES)) as pool:
            if new:
                aside.mkdir()
                moments = {f"exp_avg.{n}": a for n, a in state.exp_avg.items()}
                moments |= {f"exp_avg_sq.{n}": a for n, a in state.exp_avg_sq.items()}
                trees = zip(FILES, (state.weights, moments), strict=True)
                written = {name: pool.submit(_write, aside / name, arrays) for name, arrays in trees}
            yield complete
        files.remove(aside)


def _remove_behind(folder: Path) -> None:
    """It is gone at once; what it held is removed by a thread, which takes 30 ms for 128 MB."""
    aside = folder.rename(folder.with_name(f".{folder.name}-{os.getpid()}"))

    def remove() -> None:
        with files.unfinished(aside):  # a signal that ends the process at once removes it
            files.remove(aside)

    threading.Thread(target=remove).start()


def _write(path: Path, arrays: Mapping[str, np.ndarray]) -> str:
    """Write what safetensors' own `save` returns, without its copy and almost without the GIL; the sha256.

    (Its `save_file` raises no OSError on a full disk, and may make a file that only this user can read.)
    """
    raw = {name: np.ascontiguousarray(arrays[name], "<f4") for name in sorted(arrays)}
    header, end = {}, 0
    for name, array in raw.items():
        start, end = end, end + array.nbytes
        header[name] = {"dtype": "F32", "shape": array.shape, "data_offsets": (start, end)}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    front, digest = memoryview(len(text).to_bytes(8, "little") + text), hashlib.sha256()
    with files.synced(path) as file:
        for part in (front, *(array.data for array in raw.values())):
            digest.update(part)
            file.write(part)
    return digest.hexdigest()


def _candidates(folder: Path, which: str = "last") -> tuple[Path, ...]:
    return (folder, folder / "ckpt" / which, folder / which)


def is_ours(folder: Path) -> bool:
    """Whether `folder` is a run's, or a checkpoint."""
    return any((candidate / "state.json").is_file() for candidate in _candidates(folder))


def find(run: str, which: str = "last") -> Path:
    """The checkpoint folder that `run` names: a run's folder (its `last` or `best`) or a checkpoint itself."""
    folder = Path(run)
    if not folder.exists():
        raise InputError(f"run={run}: there is no such folder; give a run's folder or a checkpoint's")
    for candidate in _candidates(folder, which):
        if (candidate / "state.json").is_file():
            return candidate.resolve()  # a run under way may move `last` on at any moment
    raise InputError(f"run={run}: holds no checkpoint (no ckpt/{which}/state.json)")


def read_meta(folder: Path) -> CheckpointState:
    """state.json of a checkpoint; InputError when it cannot be one."""
    try:
        meta = CheckpointState.load(folder / "state.json")
    except (FileNotFoundError, DamagedError) as error:
        raise InputError(f"{folder}/{reason(error)}; use another checkpoint") from error
    if meta.schema_ > CheckpointState.SCHEMA:
        raise InputError(f"{folder}/state.json: schema {meta.schema_}; use the newer version that wrote it")
    return meta


def anchored(path: str | None, folder: Path, meta: CheckpointState) -> str | None:
    """A relative path of a checkpoint's config from where it pointed when the run was made, if it is still there.

    That is the folder in which the run was started; else, where the project was moved since or did not record it, the
    nearest one above the checkpoint that has the path.
    """
    if path is None or Path(path).is_absolute():
        return path
    bases = (*([Path(meta.cwd)] if meta.cwd else []), *folder.parents)
    base = next((base for base in bases if (base / path).exists() or any(base.glob(path))), Path.cwd())
    return path if base == Path.cwd() else str(base / path)


def read_spec(folder: Path, meta: CheckpointState) -> GPTSpec:
    """The model that a checkpoint holds."""
    try:
        return GPTSpec(**{f.name: getattr(meta.spec, f.name) for f in fields(GPTSpec)})
    except InputError as error:
        raise InputError(f"{folder / 'state.json'}: damaged: {error}") from error


def open_run(
    run: str, which: str = "last", weights_only: bool = False
) -> tuple[Path, tuple[GPTSpec, TrainState, CheckpointState]]:
    """`find` and `load`, once more where a run under way has replaced the checkpoint in between."""
    for _ in range(5):
        folder = find(run, which)
        try:
            return folder, load(folder, weights_only)
        except InputError:
            if (folder / "state.json").exists():
                raise
    raise InputError(f"run={run}: its checkpoints are replaced faster than they can be read; stop that run first")


def load(folder: Path, weights_only: bool = False) -> tuple[GPTSpec, TrainState, CheckpointState]:
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
        setattr(state, key, getattr(meta, key))
    return spec, state, meta


def _arrays(folder: Path, name: str, meta: CheckpointState) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError
    from safetensors.numpy import load as from_bytes

    path = folder / name
    try:
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != meta.sha256.get(name):
            raise InputError(f"{path}: its sha256 is not the one that state.json records; the file was cut or altered")
        return from_bytes(data)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: not readable: {reason(error)}") from error
