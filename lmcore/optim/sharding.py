"""Who updates what, when a run has several ranks.

Usually (ZeRO stage 1) every rank holds all weights and the full summed gradients. The update and the optimizer state
are divided: each rank updates its pieces and then sends them to the others. A piece is a whole Muon matrix, a range of
experts, or a range of rows of an AdamW tensor; since none of these changes the bits of a result, a run gives the same
weights on one rank and on many. Tensors of fewer than SMALLEST elements are updated by every rank: sending them would
cost more.

When the weights themselves are sharded (FSDP2: every tensor is a DTensor, cut along its first dimension), a rank
updates the rows that it holds. Rows of an AdamW tensor and experts stay where they are; a Muon matrix has one owner, to
which its gradient and its rows travel, and which sends the updated rows back. So every matrix is orthogonalised whole,
and the arithmetic is that of one rank.

The division depends on the shapes and the number of ranks alone, so nobody has to be told.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from lmcore.optim.groups import Group, ParameterRow

SMALLEST = 1024
PATIENCE_S = 1800.0
"""How long a rank waits for another one while the state is collected."""
SPLIT_ROWS_FROM = 1 << 16
_OPERATIONS_PER_ELEMENT = 200
"""What reading and writing an element costs, in operations of a matrix product."""


@dataclass(frozen=True)
class Ranks:
    """This rank and the number of ranks of the default process group of torch.distributed."""

    rank: int = 0
    size: int = 1
    sharded: bool = False
    """Whether the parameters are DTensors, each rank holding a range of rows."""
    timeout_s: float = PATIENCE_S
    """How long to wait for another rank in a step."""


@dataclass(frozen=True)
class Piece:
    """Rows start .. stop-1 (along the first dimension) of a parameter; owner None: every rank."""

    row: ParameterRow
    start: int
    stop: int
    owner: int | None

    def of(self, tensor: Tensor) -> Tensor:
        """The piece of a complete tensor that is divided like the parameter (a view)."""
        return tensor if self.whole else tensor[self.start : self.stop]

    @property
    def whole(self) -> bool:
        return self.stop - self.start == (len(self.row.parameter) if self.row.parameter.ndim else 1)


def local(tensor: Tensor) -> Tensor:
    """The rows of a sharded tensor that this rank holds (a view); any other tensor itself."""
    to_local = getattr(tensor, "to_local", None)  # a DTensor, without the import that makes one
    return tensor if to_local is None else to_local()


def rows_of(length: int, rank: int, size: int) -> tuple[int, int]:
    """First row and end of the rows that a rank holds of a tensor that FSDP2 cut into `size` parts; may be none."""
    share = -(-length // size)
    return min(rank * share, length), min((rank + 1) * share, length)


def divide(groups: Sequence[Group], size: int, *, sharded: bool = False) -> dict[str, list[Piece]]:
    """Parameter name -> its pieces in order, for `size` ranks; the work is balanced greedily, largest piece first."""
    pieces: dict[str, list[Piece]] = {}
    loads = [0.0] * size
    work: list[tuple[float, int, Group, ParameterRow]] = []
    for group in groups:
        for row in group.rows:
            work.append((_cost(group, row), len(work), group, row))
    for cost, _, group, row in sorted(work, key=lambda item: (-item[0], item[1])):
        length = len(row.parameter) if row.parameter.ndim else 1
        if sharded and row.parameter.ndim == 0:
            pieces[row.name] = [Piece(row, 0, 1, None)]
        elif sharded and not travels(group, row):
            ranges = [(*rows_of(length, rank, size), rank) for rank in range(size)]
            pieces[row.name] = [Piece(row, start, stop, rank) for start, stop, rank in ranges if start < stop]
        elif not sharded and (size == 1 or row.parameter.numel() < SMALLEST):
            pieces[row.name] = [Piece(row, 0, length, None)]
        elif not sharded and _divisible(group, row) and length >= size:
            bounds = [length * rank // size for rank in range(size + 1)]
            pieces[row.name] = [Piece(row, bounds[r], bounds[r + 1], r) for r in range(size)]
            loads = [load + cost / size for load in loads]
        else:
            owner = loads.index(min(loads))
            pieces[row.name] = [Piece(row, 0, length, owner)]
            loads[owner] += cost
    return pieces


def travels(group: Group, row: ParameterRow) -> bool:
    """Whether a sharded tensor must come together to be updated."""
    return group.kind == "muon" and row.parameter.ndim == 2


def _divisible(group: Group, row: ParameterRow) -> bool:
    """Experts are matrices of their own; rows of an AdamW tensor do not know each other. 8-bit blocks cross rows."""
    if group.kind == "muon":
        return row.parameter.ndim == 3
    return group.kind == "adamw" and row.parameter.numel() >= SPLIT_ROWS_FROM


def _cost(group: Group, row: ParameterRow) -> float:
    cost = float(_OPERATIONS_PER_ELEMENT * row.parameter.numel())
    if group.kind == "muon":
        for matrices in group.layout(row).matrices(row.parameter.detach()):
            count, rows, cols = matrices.shape
            short, long = min(rows, cols), max(rows, cols)
            cost += count * (20 * short * short * long + 10 * short**3)
    return cost


def gather(pieces: Sequence[Piece], tensors: Sequence[Tensor], ranks: Ranks) -> list[Tensor | None]:
    """Sharded tensors, each made whole at the owner of its piece; None at the other ranks. Collective."""
    wholes: list[Tensor | None] = []
    messages: list[dist.P2POp] = []
    for piece, tensor in zip(pieces, tensors, strict=True):
        assert piece.owner is not None
        mine = local(tensor.detach())
        if piece.owner != ranks.rank:
            if len(mine):
                messages.append(dist.P2POp(dist.isend, mine.contiguous(), piece.owner))
            wholes.append(None)
            continue
        whole = torch.empty(tensor.shape, dtype=mine.dtype, device=mine.device)
        for rank in range(ranks.size):
            start, stop = rows_of(len(whole), rank, ranks.size)
            if rank == ranks.rank:
                whole[start:stop] = mine
            elif start < stop:
                messages.append(dist.P2POp(dist.irecv, whole[start:stop], rank))
        wholes.append(whole)
    _exchange(messages, ranks)
    return wholes


def scatter(pieces: Sequence[Piece], wholes: Sequence[Tensor | None], ranks: Ranks) -> None:
    """The other way round: the owners' whole tensors go back into the sharded parameters of the pieces. Collective."""
    messages: list[dist.P2POp] = []
    for piece, whole in zip(pieces, wholes, strict=True):
        assert piece.owner is not None
        mine = local(piece.row.parameter.detach())
        if whole is None:
            if len(mine):
                messages.append(dist.P2POp(dist.irecv, mine, piece.owner))
            continue
        for rank in range(ranks.size):
            start, stop = rows_of(len(whole), rank, ranks.size)
            if rank == ranks.rank:
                mine.copy_(whole[start:stop])
            elif start < stop:
                messages.append(dist.P2POp(dist.isend, whole[start:stop], rank))
    _exchange(messages, ranks)


def _exchange(messages: list[dist.P2POp], ranks: Ranks) -> None:
    for work in dist.batch_isend_irecv(messages) if messages else ():
        if messages[0].tensor.is_cpu:
            _finished(work, ranks.timeout_s)
        else:
            work.wait()


def send_pieces(pieces: Sequence[Piece]) -> list[dist.Work]:
    """Start sending every piece from its owner to all ranks, in place; wait for the result before using the weights."""
    works = []
    for piece in pieces:
        if piece.owner is not None:
            work = dist.broadcast(piece.of(piece.row.parameter.detach()), piece.owner, async_op=True)
            if work is not None:
                works.append(work)
    return works


def collect(pieces: Sequence[Piece], states: Sequence[Tensor | None], template: Tensor, ranks: Ranks) -> Tensor | None:
    """The complete state tensor of a parameter on rank 0 (in main memory), None elsewhere. Collective.

    states: this rank's tensor per piece, None where it owns none; template: shape and dtype of the whole.
    """
    whole = template.new_empty(template.shape, device="cpu") if ranks.rank == 0 else None
    for piece, state in zip(pieces, states, strict=True):
        if ranks.rank == 0:
            assert whole is not None
            target = piece.of(whole)
            if state is None:
                assert piece.owner is not None
                received = template.new_empty(target.shape, device=piece.row.parameter.device)
                _finished(dist.irecv(received, piece.owner))
                state = received
            target.copy_(state)
        elif piece.owner == ranks.rank:
            assert state is not None
            _finished(dist.isend(state.contiguous(), 0))
    return whole


def _finished(work: dist.Work | None, seconds: float = PATIENCE_S) -> None:
    """Wait for a message between two ranks; gloo alone would wait for ever for one that hangs."""
    assert work is not None
    work.wait(datetime.timedelta(seconds=seconds))
