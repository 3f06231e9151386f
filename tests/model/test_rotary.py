"""Rotary positions: relative, accurate far out, and a base that separates near from far."""

from __future__ import annotations

import math

import pytest
import torch

from lmcore.model.rotary import Positions, auto_theta, rotate, separates


def rotation(index, head_dim=16, theta=10_000.0, dtype=torch.float64):
    return Positions.make(index, head_dim=head_dim, theta=theta, dtype=dtype, ragged=False)


def test_scores_depend_on_the_distance_alone():
    torch.manual_seed(0)
    q, k = torch.randn(16, dtype=torch.float64), torch.randn(16, dtype=torch.float64)
    at = rotation(torch.arange(0, 40_000, 997)[None])
    steps = at.index.shape[1]
    rotated_q = rotate(q.expand(1, steps, 1, 16), at)[0, :, 0]
    rotated_k = rotate(k.expand(1, steps, 1, 16), at)[0, :, 0]
    scores = rotated_q @ rotated_k.T  # must be a Toeplitz matrix
    for offset in range(-steps + 1, steps):
        diagonal = scores.diagonal(offset)
        assert (diagonal - diagonal[0]).abs().max() < 1e-10


def test_each_plane_is_rotated_by_position_times_rate():
    at = rotation(torch.tensor([[5, 32_767]]), head_dim=4, theta=100.0)
    x = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    y = rotate(x.expand(1, 2, 1, 4), at)[0, :, 0]
    for row, m in enumerate((5, 32_767)):
        for plane, rate in enumerate((1.0, 0.1)):
            turned = complex(x[plane], x[plane + 2]) * complex(math.cos(m * rate), math.sin(m * rate))
            assert abs(complex(y[row, plane], y[row, plane + 2]) - turned) < 1e-9


@pytest.mark.parametrize(("head_dim", "context"), [(64, 2048), (128, 8192), (64, 32_768)])
def test_auto_theta_passes_the_condition_evaluated_by_plain_loops(head_dim, context):
    theta = auto_theta(head_dim, context)
    assert theta >= 10_000
    rates = [theta ** (-2 * i / head_dim) for i in range(head_dim // 2)]
    for m in range(0, context, 61):
        assert sum(math.cos(m * rate) for rate in rates) >= -1e-6
    assert not separates(500.0, head_dim, context)
