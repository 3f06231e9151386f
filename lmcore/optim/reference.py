"""Muon in a few lines: the documentation of muon.py, and the oracle of its tests.

One matrix, one step, no batching, in the precision of its arguments:

    m <- mu m + (1 - mu) G                    momentum
    u  = (1 - mu) G + mu m                    Nesterov (else u = m)
    X  = polar factor of u, nearly            `iterate` below; exactly U V^T of the SVD u = U S V^T
    p <- p - lr wd p - lr s X                 decoupled decay (cautious: only where X p >= 0), shape factor s

Muon gives every singular direction of the momentum the same length: it is steepest descent under the spectral norm.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lmcore.optim.orthogonalize import Coefficients, coefficients


def polar_factor(matrix: Tensor) -> Tensor:
    """U V^T of the singular value decomposition: the orthogonal matrix nearest to `matrix` (rows, cols)."""
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    factor: Tensor = u @ vh
    return factor


def iterate(matrix: Tensor, steps: Sequence[Coefficients], margin: float = 1.0) -> Tensor:
    """X <- a X + (b A + c A^2) X with A = X X^T, started from the matrix divided by its Frobenius norm (rows, cols)."""
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    norm: Tensor = torch.linalg.matrix_norm(x)
    x = x / (margin * norm).clamp(min=1e-7)
    for a, b, c in steps:
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x


def muon_reference(
    parameter: Tensor,
    gradient: Tensor,
    buffer: Tensor,
    *,
    lr: float,
    weight_decay: float = 0.0,
    momentum: float = 0.95,
    nesterov: bool = True,
    method: str = "polar-express",
    scale: str = "original",
    cautious: bool = False,
) -> tuple[Tensor, Tensor]:
    """New (parameter, buffer) after one step; nothing is changed in place. All (rows = out, cols = in)."""
    buffer = momentum * buffer + (1 - momentum) * gradient
    u = (1 - momentum) * gradient + momentum * buffer if nesterov else buffer
    x = iterate(u, *coefficients(method))
    rows, cols = parameter.shape
    s = max(1.0, rows / cols) ** 0.5 if scale == "original" else 0.2 * max(rows, cols) ** 0.5
    decayed = (x * parameter >= 0).to(parameter.dtype) if cautious else 1.0
    return parameter - lr * weight_decay * decayed * parameter - lr * s * x, buffer


def normuon_reference(x: Tensor, second_moment: Tensor, beta2: float) -> tuple[Tensor, Tensor]:
    """NorMuon's rescaling of an orthogonalised matrix: one second moment per index of its longer side, norm kept.

    x (rows, cols); second_moment (max(rows, cols),). Returns the rescaled x and the new second moment.
    """
    rows, cols = x.shape
    along = 1 if rows >= cols else 0
    second_moment = beta2 * second_moment + (1 - beta2) * x.square().mean(along)
    y = x * second_moment.clamp(min=1e-10).rsqrt().unsqueeze(along)
    norm_before, norm_after = torch.linalg.matrix_norm(x), torch.linalg.matrix_norm(y)
    rescaled: Tensor = y * norm_before / norm_after.clamp(min=1e-10)
    return rescaled, second_moment
