"""The dense feed-forward: SwiGLU (arXiv:2002.05202).

    [a | b] = x W_13,   y = (SiLU(a) * b) W_2

W_13 fuses gate (w1, the SiLU side) and up (w3) projections. Three matrices of width f have the parameters of a plain
two-matrix feed-forward of width 4 D when f = 8/3 D.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from lmcore.model.kernels import has_kernels, swiglu_down
from lmcore.model.layers import Linear


class SwiGLU(nn.Module):
    """x (..., D) -> (..., D) through width d_ff."""

    def __init__(self, d_model: int, d_ff: int, *, residual_scale: float) -> None:
        super().__init__()
        self.w13 = Linear(d_model, 2 * d_ff, splits=(d_ff, d_ff))
        self.w2 = Linear(d_ff, d_model, scale=residual_scale)

    def forward(self, x: Tensor) -> Tensor:
        both = self.w13(x)
        if has_kernels(both):
            return swiglu_down(both, self.w2.weight.to(both.dtype))
        a, b = both.chunk(2, -1)
        return self.w2(F.silu(a) * b)  # type: ignore[no-any-return]
