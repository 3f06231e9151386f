"""Resonance: causal mixing by a learned bank of damped oscillators, through FFTs while training.

    y = (k * u)_t + D u_t,    k_t = Re sum_j c_j lambda_j^t,    lambda_j = exp(-e^nu_j + i theta_j)
    c_j = m_j e^{i phi_j} sqrt(1 - |lambda_j|^2)                 (the root gives every oscillator unit energy)
    u = SiLU(causal_conv(x W_u)),   out = (RMSNorm(y) * SiLU(x W_g)) W_out

The spectrum of k is sum_j c_j / (1 - lambda_j e^{-iw}): resonances at the angles theta_j, of width about e^nu_j. It is
a diagonal state-space model (S4D, arXiv:2206.11893; LRU, arXiv:2303.06349) whose kernel is computed in the time domain.

Training: a linear convolution by FFTs of at least 2T - 1 points, O(T log T). The zero padding is what makes it causal;
a circular product irfft(rfft(x) W) of T points, as "frequency-domain layers" are often written, lets every position see
the whole sequence, and a language model with it reads its own targets.

Decoding: s <- lambda s + u,  y = Re(c . s): O(J) per channel and token, whatever the context.

Powers lambda^t for t < T are never stored as a (J, T) table: with t = i S + j, S = ceil(sqrt(T)), lambda^t is a
product of two small tables, and every sum over oscillators or over time becomes a matrix product. Their angles are
reduced in float64, so position 32,768 is as exact as position 1. FFTs and states are fp32 or better; the parameters
are real.

A document boundary cannot reset this state (a selective model such as Mamba can learn to).

Shapes: B batch, T time, D width, H kernels of P = D/H channels each, J oscillators per kernel.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmcore.model.config import ModelConfig
from lmcore.model.conv import CausalConv
from lmcore.model.layers import Linear, wide
from lmcore.model.parameters import Owner, Role, fill_uniform
from lmcore.model.rotary import Positions
from lmcore.model.state import MixerState


@dataclass
class ResonanceState(MixerState):
    """conv: (B, taps - 1, D) last inputs; swing: (B, H, P, J) complex: how every oscillator swings."""

    conv: Tensor
    swing: Tensor


class Resonance(Owner):
    """The mixer F. y, state, aux = mixer(x, positions, state)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        r, d = config.resonance, config.d_model
        self.kernels, self.resonators, self.eps = r.num_kernels, r.num_resonators, config.norm_eps
        self.longest = config.context_length
        self.in_proj = Linear(d, 2 * d, splits=(d, d))
        self.conv = CausalConv(d, r.conv_width, bias=False)
        shape = (self.kernels, self.resonators)
        self.log_decay = nn.Parameter(torch.empty(shape))  # nu
        self.log_angle = nn.Parameter(torch.empty(shape))  # ln theta: slow oscillators need small steps
        self.magnitude = nn.Parameter(torch.empty(shape))  # m
        self.phase = nn.Parameter(torch.empty(shape))  # phi
        self.D = nn.Parameter(torch.empty(d))
        self.out = Linear(d, d, scale=(2 * config.num_layers) ** -0.5)

    def init_state(self, batch: int, max_length: int, dtype: torch.dtype, device: torch.device) -> ResonanceState:
        """The state before the first token; its size does not depend on max_length."""
        channels = self.D.shape[0] // self.kernels
        double = wide(self.log_angle.dtype) == torch.float64
        shape = (batch, self.kernels, channels, self.resonators)
        swing = torch.zeros(shape, dtype=torch.complex128 if double else torch.complex64, device=device)
        return ResonanceState(self.conv.init_tail(batch, dtype, device), swing)

    def forward(
        self, x: Tensor, positions: Positions, state: ResonanceState | None = None
    ) -> tuple[Tensor, ResonanceState | None, tuple[()]]:
        """x: (B, T, D) -> (B, T, D)."""
        u, gate = self.in_proj(x).chunk(2, -1)
        u, tail = self.conv(u, positions, None if state is None else state.conv)
        u = F.silu(u)
        acc = wide(x.dtype)
        v = u.to(acc).unflatten(-1, (self.kernels, -1)).movedim(1, 3)  # (B, H, P, T)
        if state is None:
            y = self._convolve(v)
        else:
            assert tail is not None
            y, swing = self._continue(v, positions, state.swing)
            state = ResonanceState(tail, swing)
        y = y.movedim(3, 1).flatten(2).to(x.dtype) + self.D.to(x.dtype) * u
        y = F.rms_norm(y, y.shape[-1:], None, self.eps)
        return self.out(y * F.silu(gate)), state, ()

    # ------------------------------------------------------------------ the oscillators

    def oscillators(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Decay rates e^nu, angles theta, and the real and imaginary parts of c, each (H, J) in `dtype`."""
        rate = self.log_decay.to(dtype).exp()
        size = self.magnitude.to(dtype) * (-torch.expm1(-2 * rate)).sqrt()
        phase = self.phase.to(dtype)
        return rate, self.log_angle.to(dtype).exp(), size * phase.cos(), size * phase.sin()

    def kernel(self, steps: int, dtype: torch.dtype) -> Tensor:
        """k_t for t < steps: (H, steps) in `dtype`."""
        rate, angle, re, im = self.oscillators(_exact(dtype, self.log_angle.device))
        high, low = _powers(rate, angle, steps)
        left = torch.complex(re, im)[:, None] * high  # (H, I, J)
        left, low = left.to(_complex(dtype)), low.to(_complex(dtype))
        product = torch.cat([left.real, -left.imag], -1) @ torch.cat([low.real, low.imag], -1).mT
        return product.flatten(1)[:, :steps]

    # ------------------------------------------------------------------ training

    def _convolve(self, v: Tensor) -> Tensor:
        """(B, H, P, T) -> (B, H, P, T): the causal convolution with k."""
        steps = v.shape[-1]
        n = fft_size(2 * steps - 1)
        spectrum = torch.fft.rfft(self.kernel(steps, v.dtype), n=n)[:, None]
        y: Tensor = torch.fft.irfft(torch.fft.rfft(v, n=n) * spectrum, n=n)[..., :steps]
        return y

    # ------------------------------------------------------------------ with a state

    def _continue(self, v: Tensor, positions: Positions, swing: Tensor) -> tuple[Tensor, Tensor]:
        steps = v.shape[-1]
        rate, angle, re, im = self.oscillators(_exact(v.dtype, v.device))
        c = torch.complex(re, im)[:, None].to(swing.dtype)  # (H, 1, J)
        real = positions.valid[:, None, None, :] if positions.ragged else None
        if steps == 1:
            turned = torch.polar((-rate).exp(), angle).to(swing.dtype)[:, None] * swing + v.to(swing.dtype)
            new = turned if real is None else torch.where(real, turned, swing)
            return (c * turned).sum(-1).real[..., None], new
        high, low = (t.to(swing.dtype) for t in _powers(rate, angle, steps))
        # The response to what was swinging before: Re sum_j c_j lambda_j^(t+1) s_j.
        first = torch.polar((-rate).exp(), angle).to(swing.dtype)[:, None] * c * swing  # (B, H, P, J)
        echo = (first[..., None, :] * high[:, None]) @ low.mT[:, None]  # (B, H, P, I, S)
        y = self._convolve(v) + echo.real.flatten(3)[..., :steps]
        # s <- lambda^n s + sum_t lambda^(n-1-t) u_t, over the n real tokens of each row.
        if real is None:
            age, backwards = torch.full((), steps, device=v.device), v.flip(-1)
        else:
            age = positions.valid.expand(v.shape[0], -1).sum(1)[:, None, None]  # (B, 1, 1)
            index = age[..., None] - 1 - torch.arange(steps, device=v.device)
            backwards = v.gather(-1, index.clamp(min=0).expand_as(v)) * (index >= 0)
        padded = F.pad(backwards, (0, high.shape[1] * low.shape[1] - steps)).unflatten(-1, (high.shape[1], -1))
        added = ((padded.to(swing.dtype) @ low[:, None]) * high[:, None]).sum(-2)  # (B, H, P, J)
        turn = torch.polar((-rate * age).exp(), angle * age).to(swing.dtype)
        return y, (turn[:, None] if real is None else turn[:, :, None]) * swing + added

    def own_parameters(self) -> Iterator[tuple[str, Role, tuple[int, ...], bool]]:
        for name in ("log_decay", "log_angle", "magnitude", "phase", "D"):
            yield name, Role.SCALAR, (), False

    def reset(self, generator: torch.Generator, std: float) -> None:
        """Memories log-uniform from 1 to context_length tokens, angles log-uniform from pi/context_length to pi."""
        span = math.log(max(self.longest, 2))
        fill_uniform(self.log_decay, -span, 0.0, generator)
        fill_uniform(self.log_angle, math.log(math.pi) - span, math.log(math.pi), generator)
        nn.init.constant_(self.magnitude, self.resonators**-0.5)
        nn.init.zeros_(self.phase)
        nn.init.ones_(self.D)


def _exact(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Large angles need float64; mps has none."""
    return dtype if device.type == "mps" else torch.float64


def _complex(dtype: torch.dtype) -> torch.dtype:
    return torch.complex128 if dtype == torch.float64 else torch.complex64


def _powers(rate: Tensor, angle: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """lambda^(iS) as (H, I, J) and lambda^j as (H, S, J) with I S >= steps."""
    stride = math.isqrt(max(steps - 1, 0)) + 1
    rows = -(-steps // stride)
    i = torch.arange(rows, device=rate.device, dtype=rate.dtype)[:, None] * stride
    j = torch.arange(stride, device=rate.device, dtype=rate.dtype)[:, None]
    high, low = (torch.polar((-rate[:, None] * t).exp(), angle[:, None] * t) for t in (i, j))
    return high, low


def fft_size(needed: int) -> int:
    """The smallest n >= needed without prime factors above 5: such FFTs are fast."""
    best = 1 << max(needed - 1, 1).bit_length()
    for five in (1, 5, 25, 125):
        for three in (1, 3, 9, 27):
            odd = five * three
            best = min(best, odd << max(-(-needed // odd) - 1, 0).bit_length())
    return best
