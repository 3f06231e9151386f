"""Rotary position embedding (RoPE, arXiv:2104.09864), and how large its base must be (arXiv:2405.14591).

A head of size K is K/2 planes; plane i of a query or key at position m is rotated by the angle m * theta_i:

    theta_i = base^(-2i / K),   (u, v) -> (u cos - v sin, v cos + u sin)

so that the dot product of a query at m and a key at n depends on m - n alone. The planes are (i, i + K/2): the
half-split layout of Llama and GPT-NeoX. Angles are computed in float64 (float32 is off by 3.5e-4 rad at position
32767), once per forward pass for all layers.

The base sets how far attention can tell similar from dissimilar tokens: sum_i cos(m theta_i) >= 0 must hold at every
distance m < context. `auto_theta` evaluates that condition exactly; it is not monotone in the base.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

SMALLEST_THETA = 10_000.0
_GRID = 1.17  # ratio between candidates
_LARGEST_THETA = 1e9


@dataclass
class Positions:
    """Where the tokens of a chunk stand, and the rotations that follow; made once per forward pass.

    index: (B or 1, T) positions; -1 marks padding, and the real tokens of a row come before its padding.
    cos, sin: (B or 1, T, 1, K/2) in the compute dtype.
    ragged: whether rows may differ or hold padding. False means that all rows are index[0], contiguous.
    """

    index: Tensor
    cos: Tensor
    sin: Tensor
    ragged: bool

    @classmethod
    def make(cls, index: Tensor, *, head_dim: int, theta: float, dtype: torch.dtype, ragged: bool) -> Positions:
        """The rotations of `index` for heads of `head_dim`."""
        wide = torch.float32 if index.device.type == "mps" else torch.float64  # mps has no float64
        rates = theta ** (-torch.arange(0, head_dim, 2, device=index.device, dtype=wide) / head_dim)
        angles = index.to(wide)[..., None, None] * rates
        return cls(index, angles.cos().to(dtype), angles.sin().to(dtype), ragged)

    def gather(self, rows: Tensor, index: Tensor) -> Positions:
        """The positions `index` (B, n) of the given chunk where `rows` (B, n) is true, padding elsewhere."""
        chosen = self.index.expand(index.shape[0], -1).gather(1, index)

        def take(table: Tensor) -> Tensor:
            table = table.expand(index.shape[0], -1, -1, -1)
            return table.gather(1, index[..., None, None].expand(-1, -1, 1, table.shape[-1]))

        return Positions(torch.where(rows, chosen, -1), take(self.cos), take(self.sin), True)

    def shift_end(self, count: int) -> Positions:
        """All but the last `count` positions."""
        stop = self.index.shape[1] - count
        return Positions(self.index[:, :stop], self.cos[:, :stop], self.sin[:, :stop], self.ragged)

    @property
    def valid(self) -> Tensor:
        """(B or 1, T) bool: False at padding."""
        return self.index >= 0


def rotate(x: Tensor, positions: Positions) -> Tensor:
    """Rotate heads x (B, T, H, K) to their positions."""
    u, v = x.chunk(2, -1)
    cos, sin = positions.cos, positions.sin
    return torch.cat([u * cos - v * sin, v * cos + u * sin], -1)


def turn(x: Tensor, cos: Tensor, sin: Tensor, *, back: bool = False) -> Tensor:
    """`rotate` (back: by the opposite angles) without a record for autograd, in four passes over the memory."""
    sign = -1.0 if back else 1.0
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    (u, v), (first, second) = x.chunk(2, -1), out.chunk(2, -1)
    torch.mul(u, cos, out=first).addcmul_(v, sin, value=-sign)
    torch.mul(v, cos, out=second).addcmul_(u, sin, value=sign)
    return out


@functools.lru_cache
def auto_theta(head_dim: int, context_length: int) -> float:
    """The smallest base >= 10,000 on a grid (ratio 1.17, two digits) that passes `separates` for this context."""
    theta = SMALLEST_THETA
    while theta <= _LARGEST_THETA:
        candidate = float(f"{theta:.1e}")
        if separates(candidate, head_dim, context_length):
            return candidate
        theta *= _GRID
    return float(f"{max(SMALLEST_THETA, 0.0424 * context_length**1.628):.1e}")  # the paper's fit; tiny heads only


def separates(theta: float, head_dim: int, context_length: int) -> bool:
    """Whether sum_i cos(m theta_i) >= 0 for all 0 <= m < context_length, evaluated exactly."""
    rates = theta ** (-np.arange(0, head_dim, 2) / head_dim)
    block = max(64, (1 << 18) // head_dim)
    for start in range(0, context_length, block):
        m = np.arange(start, min(start + block, context_length))
        if np.cos(m[:, None] * rates).sum(1).min() < -1e-9:
            return False
    return True
