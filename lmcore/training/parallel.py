"""The ranks of a run: torch.distributed as it is, started by torchrun, and the few exchanges that the loop needs.

A world of one needs no process group and costs nothing. Objects are never pickled between ranks: what is exchanged are
tensors.

When a rank dies or hangs, the others notice: at once when its connections close, else after `train.dist_timeout_s`.
They leave with one sentence and exit code 74, torchrun ends what is left, and the same command continues from the last
checkpoint. Set-up, compiling and saving may keep one rank busy for long; there the patience is PATIENCE_S.
"""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from lmcore.errors import Exit, LmError
from lmcore.model.model import LanguageModel
from lmcore.optim.sharding import PATIENCE_S

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class World:
    """Who this process is among the processes of the run."""

    rank: int = 0
    size: int = 1
    device: torch.device = _CPU
    timeout_s: float = 120.0
    """How long this rank waits for another one between two steps."""

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
                    if tensor.is_cpu:  # gloo lets messages between two ranks wait for ever
                        item.wait(datetime.timedelta(seconds=self.timeout_s))
                    else:
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

    def settle(self) -> None:
        """Wait for all ranks as long as it takes; from here on they are expected to keep in step."""
        if self.size > 1:
            dist.barrier()
            _wait_at_most(self.timeout_s)

    @contextlib.contextmanager
    def patiently(self) -> Iterator[None]:
        """Some rank does something long here; the others wait for it at the end."""
        if self.size > 1:
            _wait_at_most(max(PATIENCE_S, self.timeout_s))
        yield
        self.settle()


@contextlib.contextmanager
def joined(device: torch.device, *, timeout_s: float = World.timeout_s) -> Iterator[World]:
    """The world that torchrun describes in the environment; a world of one without it.

    It begins patient, until `settle`. LmError (74) when another rank ends or does not answer in time.
    """
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
    try:
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            timeout=datetime.timedelta(seconds=max(PATIENCE_S, timeout_s)),
        )
        try:
            yield World(rank, size, device, timeout_s)
        finally:
            dist.destroy_process_group()
    except RuntimeError as error:
        told = _lost_rank(error, rank, size, timeout_s)
        if told is None:
            raise
        raise told from error


def _wait_at_most(seconds: float) -> None:
    from torch.distributed.distributed_c10d import _set_pg_timeout

    _set_pg_timeout(datetime.timedelta(seconds=seconds))


_GONE = ("connection closed", "connection reset", "connection refused", "broken pipe", "connectfull", "remote process")
_SILENT = ("timed out", "timeout", "timeout caused")


def _lost_rank(error: RuntimeError, rank: int, size: int, timeout_s: float) -> LmError | None:
    """What an error of torch.distributed says about the other ranks; None for an error that is about something else."""
    text = str(error)
    if not isinstance(error, dist.DistError) and "gloo" not in text and "NCCL" not in text:
        return None
    lower = text.lower()
    if any(word in lower for word in _GONE):
        what = "another process of this run has ended"
    elif any(word in lower for word in _SILENT):
        what = f"another process of this run does not answer (train.dist_timeout_s = {timeout_s:g})"
    else:
        what = f"the processes of this run have lost each other ({text.splitlines()[0][:200]})"
    return LmError(
        f"rank {rank} of {size}: {what}.",
        hint="The cause is in what that process said. The same command goes on from the last checkpoint.",
        code=Exit.IO,
    )


# ---------------------------------------------------------------------------------------- sharded weights


def shard_model(model: LanguageModel, world: World) -> None:
    """Divide the weights between the ranks (FSDP2): block by block, embedding and head with the rest.

    Parameters become DTensors, cut along their first dimension; a block is whole only while it computes. Gradients are
    summed, not averaged. Every forward and backward is from now on a collective call.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(world.device.type, (world.size,))
    single = {p for p in model.parameters() if p.ndim == 0}  # a number cannot be cut: every rank keeps it
    for parameter in single:
        parameter.data = parameter.data.to(world.device)
    for block in (*model.blocks, *model.mtp):
        fully_shard(block, mesh=mesh, ignored_params=single)
    fully_shard(model, mesh=mesh, ignored_params=single)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    for method in ("loss", "trunk"):
        register_fsdp_forward_method(model, method)


def gathered(tensors: Mapping[str, Tensor], world: World) -> dict[str, Tensor]:
    """Whole tensors in main memory on the main rank, nothing elsewhere, one after the other. Collective."""
    whole: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        if world.main:
            whole[name] = full.detach().cpu()
    return whole


def world_size() -> int:
    """The number of ranks that torchrun started, 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def launched() -> bool:
    """Whether a launcher such as torchrun started this process."""
    return "RANK" in os.environ


def is_main() -> bool:
    """Whether this process is the one that talks."""
    return int(os.environ.get("RANK", "0")) == 0
