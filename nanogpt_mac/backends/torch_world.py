"""Ranks by torch.distributed: NCCL between GPUs, gloo between everything else."""

from __future__ import annotations

import gc
import math
import time
from datetime import timedelta
from importlib.util import find_spec

import torch
import torch.distributed as dist
from torch import Tensor

from nanogpt_mac.backends.world import TIMED, Ranks
from nanogpt_mac.errors import InputError, reason
from nanogpt_mac.ranks import Launched

PATIENCE = timedelta(minutes=20)  # guard.py ends a run long before


class TorchWorld(Ranks):
    """What crosses are parts of a flat tensor. Numbers of the host go by gloo, so that they wait for no device."""

    @classmethod
    def join(cls, launched: Launched, device: str) -> TorchWorld:
        gpu = device == "cuda"
        if gpu:
            visible = torch.cuda.device_count()
            if launched.here > visible > 1:
                raise InputError(
                    f"backend=cuda: {launched.here} processes on a machine of {visible} GPUs; start one a GPU "
                    f"(torchrun --nproc_per_node={visible})"
                )
            torch.cuda.set_device(launched.local % visible)
        try:
            store, rank, size = next(iter(dist.rendezvous("env://", timeout=PATIENCE)))
            # torchrun keeps its store when it starts the ranks anew, and gloo would find the addresses of the dead.
            store = dist.PrefixStore(f"start-{launched.restarts}", store)
            by = "cpu:gloo,cuda:nccl" if gpu else "gloo"
            dist.init_process_group(by, timeout=PATIENCE, store=store, rank=rank, world_size=size)
        except (RuntimeError, ValueError) as error:
            raise InputError(f"rank {launched.rank} cannot reach the others: {reason(error)}") from error
        found = cls(launched.rank, launched.size, "nccl" if gpu else "gloo", survives=not gpu)
        if device == "mps":
            found.bucket = math.inf  # gloo does not know it: each part would wait for the device and stop its queue
        if gpu and find_spec("triton") is None:
            found.unmeasured = "the package triton, whose kernel reads the GPU's clock, is not installed"
        return found

    def gather(self, text: str) -> list[str]:
        found: list[str] = [""] * self.size
        dist.all_gather_object(found, text)
        return found

    def mean(self, value: float) -> float:
        sums = torch.tensor([value, self.asked], dtype=torch.float64)
        dist.all_reduce(sums)
        self.heard(float(sums[1]))
        return float(sums[0]) / self.size

    def begin(self, flat: Tensor) -> None:
        """Begin to make a flat tensor the mean over ranks, in its place."""
        gpu = flat.device.type == "cuda"  # then NCCL's own stream, part of a CUDA graph where one is being recorded
        here = flat if gpu else flat.cpu()  # itself, but for MPS
        work = dist.all_reduce(here, dist.ReduceOp.AVG if gpu else dist.ReduceOp.SUM, async_op=True)
        self.under_way.append((work, here, flat))

    def finish(self) -> Tensor:
        """Wait for all that has begun; how long that took, in ms, a tensor of the device (); NaN where none can say."""
        sums, self.under_way = self.under_way, []
        flat, begin = sums[0][2], time.perf_counter()
        if self.by == "gloo":
            for work, here, there in sums:
                work.wait()
                there.copy_(here.mul_(1 / self.size))
            return flat.new_tensor((time.perf_counter() - begin) * 1e3)
        before = _now(flat)
        for work, *_ in sums:
            work.wait()  # the device does, not the host
        return (_now(flat) - before)[0] / 1e6

    def device(self) -> str:
        return str(torch.cuda.get_device_properties().uuid) if self.by == "nccl" else ""

    def sum_ms(self, count: int) -> list[float]:
        gpu = self.by == "nccl"
        flat, times = torch.zeros(count, device="cuda" if gpu else "cpu"), []
        for _ in range(1 + TIMED):
            dist.all_reduce(torch.zeros(1))
            begin = time.perf_counter()
            dist.all_reduce(flat)
            if gpu:
                torch.cuda.synchronize()
            times.append((time.perf_counter() - begin) * 1e3)
        return times[1:]

    def close(self) -> None:
        gc.collect()  # NCCL waits for the end of every CUDA graph that has recorded a sum
        dist.destroy_process_group()


def _now(like: Tensor) -> Tensor:
    """When a GPU comes to this, in ns of its own clock, (1,), in every replay of a CUDA graph; NaN without Triton."""
    if find_spec("triton") is None:
        return like.new_full((1,), math.nan)
    from nanogpt_mac.gpt.triton_kernels import now

    time = like.new_empty(1, dtype=torch.int64)
    now[(1,)](time)
    return time
