"""The ranks of a run: torch.distributed as it is, started by torchrun, and the few exchanges that the loop needs.

A world of one needs no process group and costs nothing. Objects are never pickled between ranks: what is exchanged are
tensors.
"""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from lmcore.errors import LmError

TIMEOUT_S = 120
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class World:
    """Who this process is among the processes of the run."""

    rank: int = 0
    size: int = 1
    device: torch.device = _CPU

    @property
    def main(self) -> bool:
        """Whether this rank writes the files and talks."""
        return self.rank == 0

    # ------------------------------------------------------------------------------------ exchanges

    def butterfly_sum_(self, *tensors: Tensor) -> None:
        """Sum over the ranks in place, as a binary tree over the rank number: every rank gets the same bits.

        For d = 1, 2, 4, ... each rank exchanges its partial sum with rank XOR d; a + b commutes in IEEE arithmetic, so
        both hold the same bits, and the tree continues the one that each rank made of its own lanes.
        """
        distance = 1
        while distance < self.size:
            partner = self.rank ^ distance
            for tensor in tensors:
                other = torch.empty_like(tensor)
                work = dist.batch_isend_irecv(
                    [dist.P2POp(dist.isend, tensor, partner), dist.P2POp(dist.irecv, other, partner)]
                )
                for item in work:
                    item.wait()
                tensor.add_(other)
            distance *= 2

    def sum_(self, *tensors: Tensor) -> None:
        """Sum over the ranks in place, in whatever order is fast."""
        if self.size > 1:
            for tensor in tensors:
                dist.all_reduce(tensor)

    def maximum(self, value: int) -> int:
        """The largest of the ranks' values."""
        if self.size == 1:
            return value
        tensor = torch.tensor(value, device=self.device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return int(tensor)

    def from_main(self, value: int) -> int:
        """The main rank's value on every rank."""
        if self.size == 1:
            return value
        tensor = torch.tensor(value, device=self.device)
        dist.broadcast(tensor, 0)
        return int(tensor)

    def same_everywhere(self, digest: bytes) -> bool:
        """Whether all ranks hold the same 32 bytes."""
        if self.size == 1:
            return True
        mine = torch.tensor(list(digest), dtype=torch.int64, device=self.device)
        low, high = mine.clone(), mine.clone()
        dist.all_reduce(low, op=dist.ReduceOp.MIN)
        dist.all_reduce(high, op=dist.ReduceOp.MAX)
        return torch.equal(low, high)

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.size > 1:
            dist.barrier()


@contextlib.contextmanager
def joined(device: torch.device) -> Iterator[World]:
    """The world that torchrun describes in the environment; a world of one without it."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1 or "RANK" not in os.environ:
        yield World(device=device)
        return
    rank, local = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", "0"))
    if device.type == "mps":
        raise LmError("torchrun with mps is not possible.", hint="Use --device cpu.")
    if device.type == "cuda":
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    timeout = datetime.timedelta(seconds=float(os.environ.get("LM_DIST_TIMEOUT_S", TIMEOUT_S)))
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timeout)
    try:
        yield World(rank, size, device)
    finally:
        dist.destroy_process_group()


def world_size() -> int:
    """The number of ranks that torchrun started, 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def is_main() -> bool:
    """Whether this process is the one that talks."""
    return int(os.environ.get("RANK", "0")) == 0
