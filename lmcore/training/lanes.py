"""Gradients summed in a fixed order, whatever the number of ranks.

Floating-point addition is not associative, so a sum over micro-batches and ranks usually depends on how many ranks
there are. Here the rows of a step are cut into S lanes (a power of two). Inside a lane micro-batches accumulate in
order; between lanes partial sums are merged as a binary tree over the lane number: locally by a binary counter, across
ranks by a butterfly (parallel.py). Rank r of W owns lanes r S/W .. (r+1) S/W - 1, so the tree is the same for every W.

    lanes      0   1   2   3   4   5   6   7
                \\ /     \\ /     \\ /     \\ /         on the rank that owns both, else between two ranks
                 \\_______/       \\_______/
                      \\_______________/

Gradients live in flat buffers, so that a merge and an exchange are one operation; `p.grad` are views into the live one.
At most log2(S/W) + 1 buffers exist.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lmcore.training.parallel import World


class LaneSum:
    """Sums gradients and a vector of scalars over lanes and ranks."""

    def __init__(self, parameters: Sequence[Tensor], world: World, *, exact: bool) -> None:
        """parameters: those whose `.grad` is accumulated by backward, all of one device."""
        self.parameters = list(parameters)
        self._world, self._exact = world, exact
        self._free: list[_Buffer] = []
        self._stack: list[tuple[int, _Buffer, Tensor]] = []
        self._live = self._take()

    def begin(self) -> None:
        """A new step: forget everything and point every `.grad` into a zeroed buffer."""
        self._free.extend(buffer for _, buffer, _ in self._stack)
        self._stack.clear()
        self._live.attach(self.parameters)

    def end_lane(self, scalars: Tensor) -> None:
        """A lane is complete: merge its sum with those of its neighbours. scalars: (n,) fp64, summed the same way."""
        level, buffer = 0, self._live
        while self._stack and self._stack[-1][0] == level:
            _, other, others = self._stack.pop()
            buffer.flat.add_(other.flat)
            scalars = others + scalars
            self._free.append(other)
            level += 1
        self._stack.append((level, buffer, scalars))
        self._live = self._take()
        self._live.attach(self.parameters)

    def finish(self) -> Tensor:
        """All lanes of this rank are complete: sum over the ranks; `.grad` hold the result. Returns the scalars."""
        assert len(self._stack) == 1, "the number of lanes of a rank is a power of two"
        _, buffer, scalars = self._stack.pop()
        self._free.append(self._live)
        self._live = buffer
        if self._exact:
            self._world.butterfly_sum_(buffer.flat, scalars)
        else:
            self._world.sum_(buffer.flat, scalars)
        buffer.point(self.parameters)
        return scalars

    def scale_(self, factor: float) -> None:
        """Multiply all gradients."""
        self._live.flat.mul_(factor)

    def _take(self) -> _Buffer:
        return self._free.pop() if self._free else _Buffer(self.parameters)


class _Buffer:
    """One flat gradient and its views."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        sizes = [p.numel() for p in parameters]
        self.flat = torch.zeros(sum(sizes), dtype=parameters[0].dtype, device=parameters[0].device)
        pieces = self.flat.split(sizes)
        self.views = [piece.view(p.shape) for piece, p in zip(pieces, parameters, strict=True)]

    def attach(self, parameters: Sequence[Tensor]) -> None:
        self.flat.zero_()
        self.point(parameters)

    def point(self, parameters: Sequence[Tensor]) -> None:
        for parameter, view in zip(parameters, self.views, strict=True):
            parameter.grad = view


def choose_lanes(rows: int, world_size: int, wanted: int | None = None) -> int:
    """The number of lanes: `wanted`, or the largest power of two up to 8 (or up to the number of ranks) that
    divides."""
    lanes = 1
    limit = wanted or max(8, world_size)
    while lanes * 2 <= limit and rows % (lanes * 2) == 0:
        lanes *= 2
    return lanes
