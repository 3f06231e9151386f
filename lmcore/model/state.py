"""What generation carries from one chunk of tokens to the next.

Every mixer obeys one law: running it over a ++ b equals running it over a, then over b with the state that a left. A
state is functional: a mixer returns a new one and leaves the old as it was, so keeping a reference is a snapshot and
putting it back is a rollback. The one exception is memory: the buffers of an attention cache are written in place, at
slots that the older snapshot does not count as used.

Rows of a batch may differ in length. A chunk then comes with explicit positions, -1 marking padding; the real tokens of
a row come before its padding. Padding changes no state.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

S = TypeVar("S", bound="MixerState")


@dataclass
class MixerState:
    """Base of the states of mixers: dataclasses whose tensors have the batch as their first dimension."""

    def select(self: S, rows: Tensor) -> S:
        """The state of a batch made of the given rows (an index may repeat)."""
        return dataclasses.replace(self, **{name: t.index_select(0, rows) for name, t in self._tensors()})

    @classmethod
    def concatenate(cls: type[S], states: Sequence[S]) -> S:
        """The state of the batches one after the other; all must have the same capacity."""
        first = states[0]
        joined = {name: torch.cat([getattr(s, name) for s in states]) for name, _ in first._tensors()}
        return dataclasses.replace(first, **joined)

    def _tensors(self) -> list[tuple[str, Tensor]]:
        return [(f.name, value) for f in dataclasses.fields(self) if isinstance(value := getattr(self, f.name), Tensor)]


@dataclass
class DecodeState:
    """The state of a whole model: one entry per layer, and how far each row has come.

    length: tokens consumed while all rows were aligned; afterwards an upper bound over rows.
    lengths: (B,) the next position of each row; None while the rows are aligned.
    max_length: room of the attention caches.
    """

    layers: list[Any]
    length: int
    lengths: Tensor | None
    max_length: int

    def snapshot(self) -> DecodeState:
        """A state to come back to: `restore` puts it back after any number of further chunks."""
        return dataclasses.replace(self, layers=list(self.layers))

    def restore(self, snapshot: DecodeState) -> None:
        """Return to a snapshot of this state."""
        self.layers, self.length, self.lengths = list(snapshot.layers), snapshot.length, snapshot.lengths

    def select(self, rows: Tensor) -> DecodeState:
        """The state of a batch made of the given rows; shares no memory with this one."""
        return DecodeState(
            [layer.select(rows) for layer in self.layers],
            self.length,
            None if self.lengths is None else self.lengths.index_select(0, rows),
            self.max_length,
        )

    @staticmethod
    def concatenate(states: Sequence[DecodeState]) -> DecodeState:
        """The rows of several states of one model as one batch; their max_length must be equal."""
        aligned = all(s.lengths is None and s.length == states[0].length for s in states)
        layers = [type(parts[0]).concatenate(parts) for parts in zip(*(s.layers for s in states), strict=True)]
        lengths = None if aligned else torch.cat([_row_lengths(s) for s in states])
        return DecodeState(layers, max(s.length for s in states), lengths, states[0].max_length)


def _row_lengths(state: DecodeState) -> Tensor:
    if state.lengths is not None:
        return state.lengths
    some: Tensor = state.layers[0]._tensors()[0][1]
    return torch.full((some.shape[0],), state.length, device=some.device)
