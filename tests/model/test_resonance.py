"""Resonance: FFT equals recurrence equals direct sum; causal, where a circular product is not; exact far out."""

from __future__ import annotations

import cmath
import itertools
import math

import pytest
import torch

from lmcore.model.config import ModelConfig
from lmcore.model.resonance import Resonance, fft_size
from lmcore.model.rotary import Positions


def make(dtype=torch.float64, kernels=2, resonators=5, d=8):
    config = ModelConfig(
        vocab_size=9,
        d_model=d,
        num_layers=1,
        num_heads=2,
        pattern="F",
        context_length=64,
        resonance={"num_kernels": kernels, "num_resonators": resonators},
    )
    mixer = Resonance(config)
    for module in mixer.modules():
        if hasattr(module, "reset"):
            module.reset(torch.Generator().manual_seed(0), 0.3)
    with torch.no_grad():
        mixer.phase.normal_(generator=torch.Generator().manual_seed(1))
    return mixer.to(dtype)


def where(start, stop):
    index = torch.arange(start, stop)[None]
    return Positions.make(index, head_dim=4, theta=1e4, dtype=torch.float64, ragged=False)


def kernel_by_definition(mixer, h, steps):
    values = []
    for t in range(steps):
        total = 0.0
        for j in range(mixer.resonators):
            rate = math.exp(mixer.log_decay[h, j].item())
            power = cmath.exp(complex(-rate, math.exp(mixer.log_angle[h, j].item())) * t)
            size = mixer.magnitude[h, j].item() * math.sqrt(-math.expm1(-2 * rate))
            total += (size * cmath.exp(1j * mixer.phase[h, j].item()) * power).real
        values.append(total)
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("steps", [1, 2, 17, 64, 65])
def test_kernel_and_convolution_equal_their_definition(steps):
    mixer = make()
    kernel = mixer.kernel(steps, torch.float64)
    v = torch.randn(3, 2, 4, steps, dtype=torch.float64)
    y = mixer._convolve(v)
    for h in range(2):
        direct = kernel_by_definition(mixer, h, steps)
        torch.testing.assert_close(kernel[h], direct, atol=1e-12, rtol=0)
        for t in range(steps):
            expected = (v[:, h, :, : t + 1].flip(-1) * direct[: t + 1]).sum(-1)
            torch.testing.assert_close(y[:, h, :, t], expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize(("dtype", "gate"), [(torch.float64, 1e-12), (torch.float32, 1e-4)])
def test_fft_equals_recurrence_equals_chunks(dtype, gate):
    mixer = make(dtype)
    x = torch.randn(2, 90, 8, dtype=dtype)
    with torch.no_grad():
        whole = mixer(x, where(0, 90))[0]
        for cuts in (list(range(91)), [0, 33, 34, 90], [0, 90]):
            state, parts = mixer.init_state(2, 90, dtype, x.device), []
            for start, stop in itertools.pairwise(cuts):
                y, state, _ = mixer(x[:, start:stop], where(start, stop), state)
                parts.append(y)
            torch.testing.assert_close(torch.cat(parts, 1), whole, atol=gate, rtol=0)


def leak(function, steps=64, at=10):
    """The largest influence of inputs after position `at` on the output at `at`."""
    x = torch.randn(1, steps, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).requires_grad_()
    gradient = torch.autograd.grad(function(x)[0, at].sum(), x)[0]
    return gradient[0, at + 1 :].abs().max().item()


def test_ours_is_causal_and_the_circular_layer_is_not():
    mixer = make()
    assert leak(lambda x: mixer(x, where(0, 64))[0]) < 1e-13

    def circular(x):  # irfft(rfft(x) W): a filter of T points wraps around
        weight = torch.randn(33, 8, dtype=torch.complex128, generator=torch.Generator().manual_seed(3))
        return x + torch.fft.irfft(torch.fft.rfft(x, dim=1) * weight, n=64, dim=1)

    assert leak(circular) > 0.05


def test_position_32768_is_as_exact_as_position_1():
    mixer = make()
    exact = mixer.kernel(32_768, torch.float64)
    single = mixer.float().kernel(32_768, torch.float32)
    assert single.dtype == torch.float32
    assert (single.double() - exact)[:, -1000:].abs().max() < 1e-6
    assert (single.double() - exact).abs().max() < 1e-5


def test_gradient_reaches_every_oscillator_and_is_the_numerical_one():
    mixer = make(resonators=2)
    randomise_inputs = torch.randn(1, 7, 8, dtype=torch.float64)
    names = ["log_decay", "log_angle", "magnitude", "phase", "D"]

    def loss(*values):
        parameters = dict(zip(names, values, strict=True))
        return torch.func.functional_call(mixer, parameters, (randomise_inputs, where(0, 7)))[0].square().sum()

    values = tuple(mixer.get_parameter(name).detach().clone().requires_grad_() for name in names)
    assert torch.autograd.gradcheck(loss, values, atol=1e-6)


def test_parameters_are_real_and_begin_with_memories_up_to_the_context():
    mixer = make(torch.float32)
    assert all(not p.is_complex() for p in mixer.parameters())
    memory = (-mixer.log_decay).exp()
    assert 1 <= memory.min() <= memory.max() <= 64
    assert math.pi / 64 <= mixer.log_angle.exp().min() * 1.0001 <= mixer.log_angle.exp().max() <= math.pi + 1e-5


def test_fft_sizes_are_sufficient_and_smooth():
    for needed in [1, 2, 3, 33, 127, 129, 2047, 4095, 65_535]:
        size = fft_size(needed)
        assert needed <= size <= 2 * needed
        rest = size
        for prime in (2, 3, 5):
            while rest % prime == 0:
                rest //= prime
        assert rest == 1
