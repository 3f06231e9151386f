"""Gradients summed in a fixed order, whatever the number of ranks.

Floating-point addition is not associative, so a sum over micro-batches and ranks usually depends on how many ranks
there are. Here the rows of a step are cut into S lanes (a power of two). Inside a lane micro-batches accumulate in
order; between lanes partial sums are merged as a binary tree over the lane number: locally by a binary counter, across
ranks by a butterfly (parallel.py). Rank r of W owns lanes r S/W .. (r+1) S/W - 1, so the tree is the same for every W.

    lanes      0   1   2   3   4   5   6   7
                \\ /     \\ /     \\ /     \\ /         on the rank that owns both, else between two ranks
                 \\_______/       \\_______/
                      \\_______________/

The gradients of a lane are the tensors that backward made: nothing is zeroed or copied, a merge is one addition. At
most log2(S/W) + 1 sets of gradients exist. Between ranks large ones are exchanged where they are, piece by piece, small
ones together in a buffer of BUCKET_BYTES, so that the exchange needs no copy of all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from lmcore.optim.sharding import local
from lmcore.training.parallel import World

MAX_LANES = 4
"""More lanes allow more ranks, and cost an addition of all gradients each."""
BUCKET_BYTES = 8 << 20
"""The size of a message between ranks. Smaller gradients are exchanged together, as a message costs time of its own;
larger messages leave the caches of a CPU (benchmarks/exchange.py)."""


class LaneSum:
    """Sums gradients and a vector of scalars over lanes and ranks."""

    def __init__(self, parameters: Sequence[Tensor], world: World, *, exact: bool) -> None:
        """parameters: those whose `.grad` is accumulated by backward, all of one device and dtype."""
        self.parameters = list(parameters)
        self._world, self._exact = world, exact
        self._stack: list[tuple[int, list[Tensor], Tensor]] = []

    def begin(self) -> None:
        """A new step: forget all gradients."""
        self._stack.clear()
        for parameter in self.parameters:
            parameter.grad = None

    def end_lane(self, scalars: Tensor) -> None:
        """A lane is complete: merge its sum with those of its neighbours. scalars: (n,) fp64, summed the same way."""
        level, gradients = 0, []
        for parameter in self.parameters:
            gradients.append(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
            parameter.grad = None
        while self._stack and self._stack[-1][0] == level:
            _, others, before = self._stack.pop()
            torch._foreach_add_(gradients, others)
            scalars = before + scalars
            level += 1
        self._stack.append((level, gradients, scalars))

    def finish(self) -> Tensor:
        """All lanes of this rank are complete: sum over the ranks; `.grad` hold the result. Returns the scalars."""
        assert len(self._stack) == 1, "the number of lanes of a rank is a power of two"
        _, gradients, scalars = self._stack.pop()
        if self._world.size > 1:
            sum_ = self._world.butterfly_sum_ if self._exact else self._world.sum_
            sum_(scalars)
            for bucket in _buckets(gradients):
                _sum_together(bucket, sum_)
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        return scalars

    def scale_(self, factor: float) -> None:
        """Multiply all gradients."""
        torch._foreach_mul_([p.grad for p in self.parameters if p.grad is not None], factor)


class ShardedSum:
    """The same for sharded parameters: FSDP2 has summed the gradients over the ranks at every backward already."""

    def __init__(self, parameters: Sequence[Tensor], world: World) -> None:
        self.parameters = list(parameters)
        self._world = world
        self._scalars: Tensor | None = None

    def begin(self) -> None:
        """A new step: forget all gradients."""
        self._scalars = None
        for parameter in self.parameters:
            parameter.grad = None

    def end_lane(self, scalars: Tensor) -> None:
        """A lane is complete; its gradients stay where they are."""
        self._scalars = scalars if self._scalars is None else self._scalars + scalars

    def finish(self) -> Tensor:
        """The scalars summed over the ranks, and the gradients of parameters that every rank keeps whole."""
        assert self._scalars is not None
        kept = [p.grad for p in self.parameters if p.grad is not None and local(p.grad) is p.grad]
        self._world.sum_(self._scalars, *kept)
        return self._scalars

    def scale_(self, factor: float) -> None:
        """Multiply all gradients."""
        torch._foreach_mul_([local(p.grad) for p in self.parameters if p.grad is not None], factor)


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """The tensors, each once: large ones alone, small ones in groups of about BUCKET_BYTES."""
    group: list[Tensor] = []
    for tensor in tensors:
        if tensor.nbytes >= BUCKET_BYTES:
            yield [tensor]
            continue
        group.append(tensor)
        if sum(t.nbytes for t in group) >= BUCKET_BYTES:
            yield group
            group = []
    if group:
        yield group


def _sum_together(tensors: Sequence[Tensor], sum_: Callable[[Tensor], None]) -> None:
    """Sum some tensors of one dtype over the ranks, in place."""
    if len(tensors) == 1 and tensors[0].is_contiguous():
        for piece in tensors[0].view(-1).split(BUCKET_BYTES // tensors[0].element_size()):
            sum_(piece)
        return
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    sum_(flat)
    pieces = flat.split([tensor.numel() for tensor in tensors])
    torch._foreach_copy_(list(tensors), [piece.view(t.shape) for piece, t in zip(pieces, tensors, strict=True)])


def choose_lanes(rows: int, world_size: int, wanted: int | None = None) -> int:
    """The number of lanes: `wanted`, or the largest power of two up to MAX_LANES (or up to the number of ranks) that
    divides."""
    lanes = 1
    limit = wanted or max(MAX_LANES, world_size)
    while lanes * 2 <= limit and rows % (lanes * 2) == 0:
        lanes *= 2
    return lanes
