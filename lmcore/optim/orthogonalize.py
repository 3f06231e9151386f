"""Replacing a matrix by (nearly) its polar factor, with matrix products only.

For X = U S V^T of full rank the polar factor is U V^T. An odd polynomial a x + b x^3 + c x^5, applied to a matrix as
a X + (b A + c A^2) X with A = X X^T, acts on the singular values alone; composing a few of them drives every singular
value in (0, 1] towards 1:

    polar-express   five polynomials, each the best possible after the ones before (arXiv:2505.16932); 0.86 .. 1.14
                    for a 512 x 2048 Gaussian matrix
    newton-schulz   one polynomial five times (https://kellerjordan.github.io/posts/muon); 0.74 .. 1.13

The Gram form iterates on R = X X^T, which is smaller than X when X is long, and multiplies X only twice. It needs
8 n^2 m + 28 n^3 operations for an n x m matrix (n <= m) instead of 20 n^2 m + 10 n^3, so it pays above m = 1.5 n. It
squares the condition number: in bfloat16 it breaks (singular values up to 13), so it is used in fp32 and fp64 only.
"""

from __future__ import annotations

import functools
from typing import Literal

import torch
from torch import Tensor

from lmcore.errors import LmError

Method = Literal["polar-express", "newton-schulz"]
Coefficients = tuple[float, float, float]

POLAR_EXPRESS: tuple[Coefficients, ...] = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
NEWTON_SCHULZ: tuple[Coefficients, ...] = ((3.4445, -4.7750, 2.0315),) * 5

SMALLEST_NORM = 1e-7
"""A matrix of smaller Frobenius norm is not blown up to full size: an expert that no token reaches comes to rest."""

GRAM_FROM = 2.0
"""The Gram form is used from this ratio of long to short side: above break-even (1.5), where the gain is sure."""

GRAM_RESTART = 2
"""Steps after which the Gram form multiplies X and starts afresh, before rounding in R has grown."""


def coefficients(method: str) -> tuple[tuple[Coefficients, ...], float]:
    """The polynomials of a method, and the margin by which the Frobenius norm is divided beforehand."""
    if method == "polar-express":
        return POLAR_EXPRESS, 1.02
    if method == "newton-schulz":
        return NEWTON_SCHULZ, 1.0
    raise LmError(f"'{method}' is no way to orthogonalise; there are polar-express and newton-schulz.")


@functools.cache
def iteration_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """bfloat16 where the device multiplies it natively, else the matrix's own precision (at least fp32).

    The iteration corrects itself, so bfloat16 costs no quality. Float16 is never chosen: it has too little range, and
    on CPUs it is 30 to 70 times slower.
    """
    if dtype == torch.float64:
        return dtype
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    if device.type == "cpu":
        native = [getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")]
        if any(test is not None and test() for test in native):
            return torch.bfloat16
    return torch.float32


def orthogonalize(
    matrices: Tensor, *, method: str = "polar-express", dtype: torch.dtype | None = None, gram: bool | None = None
) -> Tensor:
    """Nearly the polar factor of every matrix of a batch (..., rows, cols).

    dtype: precision of the iteration and of the result; None chooses (`iteration_dtype`). gram: use the Gram form;
    None chooses it for long matrices on a CPU in fp32 or fp64. A batch gives the same bits as its matrices one by one.
    """
    steps, margin = coefficients(method)
    dtype = dtype or iteration_dtype(matrices.device, matrices.dtype)
    if matrices.shape[-2] > matrices.shape[-1]:
        return orthogonalize(matrices.mT, method=method, dtype=dtype, gram=gram).mT
    x = matrices.to(torch.promote_types(matrices.dtype, torch.float32))
    x = (x / (margin * frobenius_norm(x)).clamp(min=SMALLEST_NORM)).to(dtype)
    if gram is None:
        long = x.shape[-1] >= GRAM_FROM * x.shape[-2]
        gram = long and dtype in (torch.float32, torch.float64) and x.device.type == "cpu"
    batch = x.reshape(-1, *x.shape[-2:]).contiguous()
    batch = _gram_form(batch, steps) if gram else _plain_form(batch, steps)
    return batch.view(x.shape)


def frobenius_norm(matrices: Tensor) -> Tensor:
    """(..., rows, cols) -> (..., 1, 1). Row by row: torch's fp32 sum over a whole large tensor is up to 1 % off."""
    norm: Tensor = torch.linalg.vector_norm(
        torch.linalg.vector_norm(matrices, dim=-1, keepdim=True), dim=-2, keepdim=True
    )
    return norm


def _plain_form(x: Tensor, steps: tuple[Coefficients, ...]) -> Tensor:
    """x (K, n, m), n <= m."""
    for a, b, c in steps:
        gram = torch.bmm(x, x.mT)  # (K, n, n)
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x


def _gram_form(x: Tensor, steps: tuple[Coefficients, ...]) -> Tensor:
    """The same on R = X X^T: with P = a + b R + c R^2 a step is X <- P X and R <- P R P; the P are gathered in Q."""
    for block in (steps[:GRAM_RESTART], steps[GRAM_RESTART:]):
        r = torch.bmm(x, x.mT)  # (K, n, n)
        identity = torch.eye(r.shape[-1], dtype=r.dtype, device=r.device)
        q = identity.expand_as(r)
        for index, (a, b, c) in enumerate(block):
            p = torch.baddbmm(r, r, r, beta=b, alpha=c) + a * identity
            q = torch.bmm(q, p) if index else p
            if index + 1 < len(block):
                r = torch.bmm(torch.bmm(p, r), p)
        x = torch.bmm(q, x)
    return x
