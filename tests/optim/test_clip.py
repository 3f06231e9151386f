"""Gradient norms and clipping: torch's as oracle, and what torch gets wrong (NaN)."""

import math

import pytest
import torch

from lmcore.optim.clip import clip_gradients, gradient_norm


def parameters(dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    result = [torch.nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in ((5, 7), (11,), (2, 3, 4))]
    for p in result:
        p.grad = torch.randn(p.shape, generator=generator).to(dtype)
    return [*result, torch.nn.Parameter(torch.zeros(4))]  # the last has no gradient


@pytest.mark.parametrize("max_norm", [0.1, 1.0, 1e9])
def test_clipping_agrees_with_torch(max_norm):
    ours, theirs = parameters(), parameters()
    norm = clip_gradients(ours, max_norm)
    want = torch.nn.utils.clip_grad_norm_(theirs, max_norm)
    torch.testing.assert_close(norm, want)
    for a, b in zip(ours[:-1], theirs[:-1], strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_the_norm_of_a_large_tensor_is_right():
    """Where torch.nn.utils.clip_grad_norm_ is visibly wrong on a CPU."""
    p = torch.nn.Parameter(torch.zeros(5_000_001))
    p.grad = torch.full_like(p, 0.01)
    truth = float(p.grad.double().norm())
    assert float(gradient_norm(p)) == pytest.approx(truth, rel=3e-6)
    assert abs(float(p.grad.norm()) / truth - 1) > 1e-4


def test_small_gradients_keep_their_bits():
    ours = parameters()
    before = [p.grad.clone() for p in ours[:-1]]
    clip_gradients(ours, 1e9)
    assert all(torch.equal(p.grad, g) for p, g in zip(ours[:-1], before, strict=True))


@pytest.mark.parametrize("limit", [None, math.inf])
def test_no_limit_only_measures(limit):
    ours = parameters()
    before = [p.grad.clone() for p in ours[:-1]]
    norm = clip_gradients(ours, limit)
    assert norm == pytest.approx(math.sqrt(sum(float(g.square().sum()) for g in before)), rel=1e-6)
    assert all(torch.equal(p.grad, g) for p, g in zip(ours[:-1], before, strict=True))


@pytest.mark.parametrize("poison", [math.nan, math.inf, 1e38])
def test_a_norm_that_is_not_finite_scales_nothing(poison):
    ours = parameters()
    ours[0].grad[0, 0] = poison
    before = [p.grad.clone() for p in ours[:-1]]
    assert not torch.isfinite(clip_gradients(ours, 1.0))
    for p, g in zip(ours[:-1], before, strict=True):
        torch.testing.assert_close(p.grad, g, equal_nan=True, rtol=0, atol=0)


def test_low_precision_gradients_are_summed_in_fp32():
    p = torch.nn.Parameter(torch.zeros(100_000, dtype=torch.bfloat16))
    p.grad = torch.full_like(p, 0.01)
    assert float(gradient_norm(p)) == pytest.approx(float(p.grad.double().norm()), rel=1e-6)
    assert gradient_norm(p).dtype == torch.float32
    assert gradient_norm(parameters(torch.float64)[:-1]).dtype == torch.float64
    assert gradient_norm([]) == 0
    assert clip_gradients([], 1.0) == 0
