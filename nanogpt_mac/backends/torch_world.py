"""Ranks by torch.distributed: NCCL between GPUs, gloo between everything else."""

from __future__ import annotations

import time
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from nanogpt_mac.backends.world import TIMED, World
from nanogpt_mac.errors import InputError, reason
from nanogpt_mac.ranks import Launched

PATIENCE = timedelta(minutes=20)  # guard.py ends a run long before


class TorchWorld(World):
    """What crosses is one flat tensor. Numbers of the host go by gloo, so that they wait for no device."""

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
        return cls(launched.rank, launched.size, "nccl" if gpu else "gloo", survives=not gpu)

    def gather(self, text: str) -> list[str]:
        found: list[str] = [""] * self.size
        dist.all_gather_object(found, text)
        return found

    def mean(self, value: float) -> float:
        sums = torch.tensor([value, self.asked], dtype=torch.float64)
        dist.all_reduce(sums)
        self.heard(float(sums[1]))
        return float(sums[0]) / self.size

    def average(self, flat: Tensor) -> Tensor:
        if flat.device.type == "cuda":  # part of a CUDA graph, where one is being recorded
            dist.all_reduce(flat, dist.ReduceOp.AVG)
            return flat
        begin = time.perf_counter()
        here = flat.cpu()  # itself, but for MPS, which gloo does not know
        dist.all_reduce(here)
        torch.mul(here, 1 / self.size, out=here)
        if here is not flat:
            flat.copy_(here)
        self.waited_ms.append((time.perf_counter() - begin) * 1e3)
        return flat

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
        dist.destroy_process_group()
