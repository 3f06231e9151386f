"""The ranks of a run: torch.distributed as it is, started by torchrun, and the few exchanges that the loop needs.

A world of one needs no process group and costs nothing. Objects are never pickled between ranks: what is exchanged are
tensors.

When a rank dies or hangs, the others notice: at once when its connections close, else after `train.dist_timeout_s`.
They leave with one sentence and exit code 74, torchrun ends what is left, and the same command continues from the last
checkpoint. Set-up, compiling and saving may keep one rank busy for long; there the patience is PATIENCE_S.

Ranks may stand on machines that share no disk, so nobody takes for granted that they would train the same run: what
each of them found is compared before anything is written (`agreeing`), and what one of them refuses, all refuse.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import itertools
import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

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
            store=PrefixStore(f"group {next(_numbers)}", _meeting_place()),
            rank=rank,
            world_size=size,
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


# ---------------------------------------------------------------------------------------- agreement

_LAST_WORDS_S = 2.0
_numbers = itertools.count()
"""Every rank comes to the same places in the same order."""


@functools.cache
def _meeting_place() -> Store:
    """Where ranks that are not connected yet leave words for each other: torchrun's store, or one that rank 0 holds."""
    store: Store
    store, _, _ = next(rendezvous("env://", timeout=datetime.timedelta(seconds=PATIENCE_S)))
    return store


@contextlib.contextmanager
def agreeing() -> Iterator[dict[str, str]]:
    """What is done inside must come out alike on all ranks. Collective; nothing inside may wait for another rank.

    facts: what -> a phrase about this rank ("would begin at step 4"), to be the same on all of them.
    LmError (2) on every rank that names the first one whose facts are not those of the main rank; an LmError inside, on
    any rank, is raised on all of them. Only the main rank's is to be shown: the others are marked as `told`.
    """
    facts: dict[str, str] = {}
    size = world_size()
    if size == 1:
        yield facts
        return
    rank, number = int(os.environ["RANK"]), next(_numbers)
    try:
        place = PrefixStore(f"agreement {number}", _meeting_place())
        refused = None
        try:
            yield facts
        except LmError as error:
            refused = error
        except BaseException as error:  # a bug, or Ctrl-C: this rank leaves with it, the others with this
            ended = _json(LmError(f"ended by {type(error).__name__}.", code=Exit.BUG))
            for key in (f"rank {rank}", "verdict")[: 2 if rank == 0 else 1]:
                place.set(key, ended)
            raise
        place.set(f"rank {rank}", _json(refused or facts))
        verdict = _verdict(place, size, refused) if rank == 0 else _told(place, rank)
        if verdict is not None:
            raise verdict from refused
    except RuntimeError as error:
        lost = _lost_rank(error, rank, size, PATIENCE_S)
        if lost is None:
            raise
        raise lost from error


def _verdict(place: Store, size: int, refused: LmError | None) -> LmError | None:
    """The main rank judges what all ranks have found."""
    problem = refused or _first_problem(place, size)
    place.set("verdict", _json(problem))
    if problem is not None:  # whoever holds the place leaves last
        with contextlib.suppress(dist.DistStoreError):
            _wait_for(place, [f"rank {rank} knows" for rank in range(1, size)], _LAST_WORDS_S)
    return problem


def _first_problem(place: Store, size: int) -> LmError | None:
    ours = json.loads(place.get("rank 0"))
    for rank in range(1, size):
        _wait_for(place, [f"rank {rank}"])
        theirs = json.loads(place.get(f"rank {rank}"))
        if "message" in theirs:
            return LmError(
                f"rank {rank} of {size}: {theirs['message']}", hint=theirs["hint"], code=Exit(theirs["code"])
            )
        differing = [
            f"{theirs.get(what)}, rank 0 {phrase}" for what, phrase in ours.items() if theirs.get(what) != phrase
        ]
        if differing:
            return LmError(
                f"rank {rank} of {size} {'; '.join(differing[:4])}.",
                hint="All ranks train one run: give every machine the same command, program, data and run directory "
                "(on a shared disk, or a copy). Nothing was written.",
            )
    return None


def _told(place: Store, rank: int) -> LmError | None:
    _wait_for(place, ["verdict"])
    verdict = json.loads(place.get("verdict"))
    place.set(f"rank {rank} knows", "")
    if verdict is None:
        return None
    time.sleep(_LAST_WORDS_S)  # a launcher ends all ranks as soon as one has left: the main rank speaks first
    return LmError(verdict["message"], hint=verdict["hint"], code=Exit(verdict["code"]), told=True)


def _wait_for(place: Store, keys: list[str], patience_s: float = PATIENCE_S) -> None:
    """Ask again and again, so that a signal finds this process awake."""
    deadline, pause = time.monotonic() + patience_s, 0.01
    while not place.check(keys):
        if time.monotonic() > deadline:
            raise dist.DistStoreError("timed out")
        time.sleep(pause)
        pause = min(0.5, 1.2 * pause)


def _json(found: LmError | Mapping[str, str] | None) -> str:
    if isinstance(found, LmError):
        return json.dumps({"message": found.message, "hint": found.hint, "code": int(found.code)})
    return json.dumps(found)


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
