"""Who updates what, when a run has several ranks (ZeRO stage 1).

Every rank holds all weights and the full summed gradients. The update and the optimizer state are divided: each rank
updates its pieces and then sends them to the others. A piece is a whole Muon matrix, a range of experts, or a range of
rows of an AdamW tensor; since none of these changes the bits of a result, a run gives the same weights on one rank and
on many. Tensors of fewer than SMALLEST elements are updated by every rank: sending them would cost more.

The division depends on the shapes and the number of ranks alone, so nobody has to be told.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass

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


def divide(groups: Sequence[Group], size: int) -> dict[str, list[Piece]]:
    """Parameter name -> its pieces in order, for `size` ranks; the work is balanced greedily, largest piece first."""
    pieces: dict[str, list[Piece]] = {}
    loads = [0.0] * size
    work: list[tuple[float, int, Group, ParameterRow]] = []
    for group in groups:
        for row in group.rows:
            work.append((_cost(group, row), len(work), group, row))
    for cost, _, group, row in sorted(work, key=lambda item: (-item[0], item[1])):
        length = len(row.parameter) if row.parameter.ndim else 1
        if size == 1 or row.parameter.numel() < SMALLEST:
            pieces[row.name] = [Piece(row, 0, length, None)]
        elif _divisible(group, row) and length >= size:
            bounds = [length * rank // size for rank in range(size + 1)]
            pieces[row.name] = [Piece(row, bounds[r], bounds[r + 1], r) for r in range(size)]
            loads = [load + cost / size for load in loads]
        else:
            owner = loads.index(min(loads))
            pieces[row.name] = [Piece(row, 0, length, owner)]
            loads[owner] += cost
    return pieces


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


def _finished(work: dist.Work | None) -> None:
    """Wait for a message between two ranks; gloo alone would wait for ever for one that hangs."""
    assert work is not None
    work.wait(datetime.timedelta(seconds=PATIENCE_S))
