"""A slow count of what leaves the simulated device in a program, by other means than the detector's.

`python program_reference.py ANSWER STEPS MAP PROGRAM ARGUMENTS...` in the program's folder: a dispatch mode sees every
operator that comes out of autograd, and the device itself counts kernels, waits, fallbacks. ANSWER gets JSON: `lines`
(file:line, what, calls), `waits`, `kernels`, `fallback` and `native` calls by operator. Where ANSWER is "-" nothing
looks on: program_overhead.py times that.
"""

import json
import os
import runpy
import sys
import threading
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nanogpt_mac import simulator
from nanogpt_mac.fallbacks.cuda_map import CudaMap

WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive")
INDEXING = ("index", "index_put_", "_index_put_impl_")
MAIN = threading.get_ident()


class Count(TorchDispatchMode):
    def __init__(self, folder):
        super().__init__()
        self.folder, self.lines = folder, Counter()
        self.waits = 0  # of the device, in what was counted

    def line(self):
        if threading.get_ident() != MAIN:
            return "backward"
        frame = sys._getframe(2)
        while frame is not None:
            file = str(Path(frame.f_code.co_filename).absolute())
            if file.startswith(self.folder + os.sep) and file != __file__:
                return f"{os.path.relpath(file, self.folder)}:{frame.f_lineno}"
            frame = frame.f_back
        return None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunction():  # what is done in here is not the program's
            return self.counted(func, args, kwargs or {})

    def counted(self, func, args, kwargs):
        name = func.__name__.partition(".")[0]
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        on_device = any(t.device.type == "mps" for t in given)
        fallbacks, waits = sum(simulator.operators("fallback").values()), simulator.counts().waits
        try:
            result = func(*args, **kwargs)
        except Exception as error:
            if on_device or "MPS" in str(error):
                self.lines[self.line(), "refused"] += 1
            raise
        finally:
            self.waits += simulator.counts().waits - waits
        if sum(simulator.operators("fallback").values()) > fallbacks:
            self.lines[self.line(), "fallback"] += 1
        elif name in ("_to_copy", "copy_"):
            before = given[-1] if name == "_to_copy" else args[1]
            asynchronous = kwargs.get("non_blocking", args[2] if name == "copy_" and len(args) > 2 else False)
            if before.numel() and (before.device.type == "mps") != (result.device.type == "mps"):
                if before.device.type == "mps":
                    self.lines[self.line(), "to host"] += 1
                elif not asynchronous:
                    self.lines[self.line(), "to device"] += 1
        elif on_device and (name in WAITING or (name in INDEXING and any(map(is_mask, args[1])))):
            self.lines[self.line(), "to host"] += 1
        return result


class Below(torch.overrides.TorchFunctionMode):
    """What a dispatch mode is kept from: uploads in `torch.tensor` and of lists as indices, as waits of the device."""

    def __init__(self, count):
        super().__init__()
        self.count = count

    def __torch_function__(self, func, types, args=(), kwargs=None):
        before = simulator.counts().waits - self.count.waits
        try:
            return func(*args, **(kwargs or {}))
        finally:
            unseen = simulator.counts().waits - self.count.waits - before
            if unseen and threading.get_ident() == MAIN:
                self.count.waits += unseen
                self.count.lines[self.count.line(), "to device"] += unseen


def is_mask(index):
    return index is not None and index.dtype in (torch.bool, torch.uint8)


class Mapped(torch.overrides.TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.map = CudaMap()
        self.map.install()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        func, args, kwargs = self.map.mapped(func, args, kwargs or {})
        return func(*args, **kwargs)


def main():
    answer, limit, mapped, *argv = sys.argv[1:]
    simulator.install()
    sys.argv = argv
    sys.path[0] = str(Path.cwd())
    done = [0]

    def stepped(optimizer, args, kwargs):
        done[0] += 1
        if done[0] >= int(limit):
            raise SystemExit(0)

    if int(limit):
        register_optimizer_step_post_hook(stepped)
    if mapped == "cuda":
        Mapped().__enter__()
    count = Count(str(Path.cwd()))
    simulator.reset_counts()
    try:
        with ExitStack() as stack:
            for mode in (Below(count), count) if answer != "-" else ():
                stack.enter_context(mode)
            runpy.run_path(argv[0], run_name="__main__")
    except SystemExit:
        pass
    finally:
        if answer != "-":
            write(answer, count)


def write(answer, count):
    counts = simulator.counts()
    lines = [[line, what, calls] for (line, what), calls in sorted(count.lines.items(), key=str)]
    made = {"lines": lines, "waits": counts.waits, "kernels": counts.kernels}
    made |= {kind: simulator.operators(kind) for kind in ("fallback", "native")}
    Path(answer).write_text(json.dumps(made))


if __name__ == "__main__":
    main()
