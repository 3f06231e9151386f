"""Norms whose derivative is written out: equal to what autograd makes of torch's own, and the numerical gradient."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lmcore.model.attention import _NormRotate
from lmcore.model.layers import RMSNorm, _Norm, by_hand
from lmcore.model.rotary import Positions, rotate, turn

EPS = 1e-5


def gaussian(*shape, dtype=torch.float64, scale=1.0):
    return (scale * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))).to(
        dtype
    )


def positions(steps, dtype=torch.float64):
    return Positions.make(torch.arange(steps)[None], head_dim=8, theta=100.0, dtype=dtype, ragged=False)


def fused(x, gains, where):
    return _NormRotate.apply(x, gains, where.cos, where.sin, EPS)


def plain(x, gains, where):
    return rotate(F.rms_norm(x, (8,), None, EPS) * gains, where)


def test_the_derivatives_are_the_numerical_ones():
    x, gain = gaussian(2, 3, 8).requires_grad_(), gaussian(8).requires_grad_()
    assert torch.autograd.gradcheck(lambda *a: _Norm.apply(*a, EPS), (x, gain))
    heads, gains = gaussian(2, 3, 3, 8).requires_grad_(), gaussian(3, 8).requires_grad_()
    assert torch.autograd.gradcheck(lambda *a: fused(*a, positions(3)), (heads, gains))


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_no_less_exact_than_autograd_of_the_plain_way(dtype, scale):
    """Error against fp64 at most that of the plain operations in the same precision, and a rounding of the result."""
    x, gain, g = gaussian(4, 33, 64, scale=scale), gaussian(64), gaussian(4, 33, 64)
    heads, gains, gh = gaussian(4, 33, 3, 8, scale=scale), gaussian(3, 8), gaussian(4, 33, 3, 8)

    def results(norm, attend, dtype):
        found = []
        for function, inputs, upstream in ((norm, (x, gain), g), (attend, (heads, gains), gh)):
            leaves = [t.to(dtype, copy=True).requires_grad_() for t in inputs]
            y = function(*leaves)
            y.backward(upstream.to(dtype))
            found += [y.detach().double(), *(leaf.grad.double() for leaf in leaves)]
        return found

    def ours(dtype):
        where = positions(33, dtype)
        return results(lambda a, w: _Norm.apply(a, w, EPS), lambda a, w: fused(a, w, where), dtype)

    def theirs(dtype):
        where = positions(33, dtype)
        return results(lambda a, w: F.rms_norm(a, (64,), w, EPS), lambda a, w: plain(a, w, where), dtype)

    for got, reference, truth in zip(ours(dtype), theirs(dtype), theirs(torch.float64), strict=True):
        size = truth.norm()
        rounding = 4 * torch.finfo(dtype).eps * size
        assert (got - truth).norm() <= (reference - truth).norm() + rounding


def test_turn_is_rotate_and_turns_back():
    x, where = gaussian(2, 5, 3, 8), positions(5)
    turned = turn(x, where.cos, where.sin)
    torch.testing.assert_close(turned, rotate(x, where), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(turn(turned, where.cos, where.sin, back=True), x, rtol=1e-12, atol=1e-12)


def test_used_in_training_only():
    norm, x = RMSNorm(8, EPS), gaussian(2, 8, dtype=torch.float32)
    assert not by_hand(x)
    trained = norm(x.requires_grad_())
    assert type(trained.grad_fn).__name__ == "_NormBackward"
    with torch.no_grad():
        torch.testing.assert_close(norm(x), trained.detach(), rtol=1e-6, atol=1e-6)
