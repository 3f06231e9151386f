"""The small parts: linear map, RMSNorm, embedding. Shapes: B batch, T time, D width.

Weights are kept in their own precision (the fp32 master) and cast to the input's dtype at use, so the dtype that
enters the trunk is the dtype in which it computes; there is no autocast, and what needs fp32 or better says so itself.

RMSNorm (arXiv:1910.07467): y = w * x / sqrt(mean(x^2) + eps), statistics in fp32 or better. On a CPU torch has no
kernel for it and records eight operations; training there takes the derivative by hand, from x and the root alone:

    n = x / r,   dy/dx: (w g - n mean(w g n)) / r,   dy/dw: sum of g n                          r the root above
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmcore.model.parameters import Owner, Role, fill_normal


class Linear(Owner):
    """y = x W^T without bias. weight: (out, in).

    splits: row counts when several maps are fused into one; role: what the weight is; scale: factor of the initial
    standard deviation.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        splits: tuple[int, ...] = (),
        role: Role = Role.MATRIX,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        splits = tuple(rows for rows in splits if rows)
        assert not splits or sum(splits) == out_features
        self.in_features, self.out_features = in_features, out_features
        self.splits, self.role, self.scale = splits, role, scale
        self.weight = nn.Parameter(torch.empty(out_features, in_features))

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out) in the dtype of x."""
        return F.linear(x, self.weight.to(x.dtype))

    def own_parameters(self) -> Iterator[tuple[str, Role, tuple[int, ...], bool]]:
        yield "weight", self.role, self.splits, True

    def reset(self, generator: torch.Generator, std: float) -> None:
        fill_normal(self.weight, std * self.scale, generator)

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}" + (f", splits {self.splits}" if self.splits else "")


class RMSNorm(Owner):
    """Root-mean-square normalisation over the last dimension with a learned gain."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.size, self.eps = size, eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        """(..., size) -> (..., size) in the dtype of x; the mean of squares is formed in fp32 or better."""
        weight = self.weight.to(x.dtype)
        if by_hand(x):
            return _Norm.apply(x, weight, self.eps)  # type: ignore[no-any-return, no-untyped-call]
        return F.rms_norm(x, (self.size,), weight, self.eps)

    def own_parameters(self) -> Iterator[tuple[str, Role, tuple[int, ...], bool]]:
        yield "weight", Role.NORM, (), False

    def reset(self, generator: torch.Generator, std: float) -> None:
        nn.init.ones_(self.weight)

    def extra_repr(self) -> str:
        return f"{self.size}, eps {self.eps:g}"


BY_HAND = {"cpu"}
"""Device types on which derivatives that are written out pay."""


def by_hand(x: Tensor) -> bool:
    """Whether a derivative that is written out pays: in training on a CPU, unless a compiler fuses the operations."""
    return (
        x.device.type in BY_HAND and x.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling()
    )


def inverse_rms(x: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean(x^2) + eps) over the last dimension, kept as one; x in fp32 or better."""
    norm: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()


def normalized_gradient(x: Tensor, inverse: Tensor, gain: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """(gradient of x, products to be summed into that of the gain) of y = gain x inverse; all in fp32 or better."""
    n = x * inverse
    gn = g * n
    mean = (gn * gain).sum(-1, keepdim=True).div_(-x.shape[-1])
    return (g * gain).addcmul_(n, mean).mul_(inverse), gn


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        acc = wide(x.dtype)
        xw = x.to(acc)
        inverse = inverse_rms(xw, eps)
        ctx.save_for_backward(x, weight, inverse)
        return (xw * inverse).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        acc = inverse.dtype
        gx, gn = normalized_gradient(x.to(acc), inverse, weight.to(acc), upstream[0].to(acc))
        return gx.to(x.dtype), gn.flatten(0, -2).sum(0).to(weight.dtype), None


class Embedding(Owner):
    """Rows for token ids; rows from vocab_size on are padding: zero at the start, never looked up, never predicted."""

    def __init__(self, vocab_size: int, padded_vocab: int, d_model: int, *, role: Role) -> None:
        super().__init__()
        self.vocab_size, self.role = vocab_size, role
        self.weight = nn.Parameter(torch.empty(padded_vocab, d_model))

    def forward(self, tokens: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """(B, T) ids -> (B, T, D) in `dtype` (None: that of the weight)."""
        return F.embedding(tokens, self.weight).to(dtype or self.weight.dtype)

    def own_parameters(self) -> Iterator[tuple[str, Role, tuple[int, ...], bool]]:
        yield "weight", self.role, (), True

    def reset(self, generator: torch.Generator, std: float) -> None:
        fill_normal(self.weight, std, generator)
        with torch.no_grad():
            self.weight[self.vocab_size :].zero_()

    def extra_repr(self) -> str:
        return f"{self.vocab_size} of {self.weight.shape[0]} rows, {self.role}"


def wide(dtype: torch.dtype) -> torch.dtype:
    """fp32, or float64 when the input is: the precision of statistics, routing, scans and losses."""
    return torch.promote_types(dtype, torch.float32)
