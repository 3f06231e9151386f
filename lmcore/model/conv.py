"""Short causal depthwise convolution, the local half of Mamba and resonance mixers.

    y_t[c] = b[c] + sum_{j=0}^{K-1} w[c, K-1-j] x_{t-j}[c]

What a later chunk needs is the last K-1 inputs. Written as K shifted products: a depthwise `conv1d` is slower on CPUs
(2x at width 512, forward and backward, torch 2.13).

Shapes: B batch, T time, C channels, K taps.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmcore.model.parameters import Owner, Role, fill_uniform
from lmcore.model.rotary import Positions


class CausalConv(Owner):
    """y, tail = conv(x, positions, tail)."""

    def __init__(self, channels: int, width: int, *, bias: bool) -> None:
        super().__init__()
        self.width = width
        self.weight = nn.Parameter(torch.empty(channels, width))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None

    def init_tail(self, batch: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """(B, K-1, C) zeros: nothing came before."""
        return torch.zeros(batch, self.width - 1, self.weight.shape[0], dtype=dtype, device=device)

    def forward(self, x: Tensor, positions: Positions, tail: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """x: (B, T, C) -> (B, T, C). tail: the last K-1 inputs (B, K-1, C); None = start empty and keep nothing."""
        steps, before = x.shape[1], self.width - 1
        h = F.pad(x, (0, 0, before, 0)) if tail is None else torch.cat([tail.to(x.dtype), x], 1)
        weight = self.weight.to(x.dtype)
        y = h[:, :steps] * weight[:, 0]
        if self.bias is not None:
            y = y + self.bias.to(x.dtype)
        for j in range(1, self.width):
            y = torch.addcmul(y, h[:, j : j + steps], weight[:, j])
        if tail is not None:
            tail = last_inputs(h, positions, steps, before).to(tail.dtype)
        return y, tail

    def own_parameters(self) -> Iterator[tuple[str, Role, tuple[int, ...], bool]]:
        yield "weight", Role.CONV, (), False
        if self.bias is not None:
            yield "bias", Role.SCALAR, (), False

    def reset(self, generator: torch.Generator, std: float) -> None:
        fill_uniform(self.weight, -(self.width**-0.5), self.width**-0.5, generator)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


def last_inputs(h: Tensor, positions: Positions, steps: int, count: int) -> Tensor:
    """The last `count` real rows of h (B, count + T, C): padding at the end of a row is skipped. A fresh tensor."""
    if not positions.ragged:
        return h[:, steps:].clone()
    end = positions.valid.expand(h.shape[0], -1).sum(1)
    index = end[:, None] + torch.arange(count, device=h.device)
    return h.gather(1, index[..., None].expand(-1, -1, h.shape[2]))
