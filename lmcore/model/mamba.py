"""Mamba-2, a selective state space (SSD, arXiv:2405.21060), and routed Mamba (RoM, arXiv:2506.18145).

    [z | x | B | C | dt] = u W_in;   [x | B | C] <- SiLU(causal_conv(.));   dt <- softplus(dt + dt_bias)
    h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T          A = -exp(A_log) < 0, one per head; h: (P, N)
    y_t = h_t C_t + D x_t
    out = RMSNorm(y * SiLU(z)) W_out                     (normalised per group of heads)

The scan is a recurrence over time; while training it is computed in chunks of Q steps with matrix products. With
a_t = dt_t A and s = cumsum(a) inside a chunk:

    y_i = sum_{j <= i} exp(s_i - s_j) (C_i . B_j) x_j    within the chunk
        + exp(s_i) C_i . H                               from the state H before the chunk
    H' = exp(s_Q) H + sum_j exp(s_Q - s_j) x_j B_j^T

The upper triangle is masked before the exponential, not after, or its overflow would make the gradient NaN. A step with
dt = 0 leaves the state as it is: that is how padding is skipped. Everything in this scan is fp32 or better.

Routed Mamba has E experts for the projections to z and x and for the output, one router for all three, and one state:

    [z | x] = sum_{e chosen} u W_in,e;    out = sum_{e chosen} p_e RMSNorm(y * SiLU(z)) W_out,e

The probability weighs once, at the output; it is not normalised (with k = 1 that would stop the router's gradient).

Shapes: B batch, T time, D width, H heads of P channels, N state size, G groups sharing B and C, Q chunk.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmcore.errors import LmError
from lmcore.model.config import ModelConfig
from lmcore.model.conv import CausalConv
from lmcore.model.layers import Linear, RMSNorm, wide
from lmcore.model.parameters import Owner, Role, fill_uniform
from lmcore.model.rotary import Positions
from lmcore.model.routing import ExpertLinear, Router, RouterStats, dispatch
from lmcore.model.state import MixerState

DT_RANGE = (1e-3, 1e-1)
"""Initial time steps are log-uniform in this range: memories of about 10 to 1000 tokens."""


@dataclass
class MambaState(MixerState):
    """conv: (B, taps - 1, channels) last inputs; scan: (B, H, P, N) in fp32 or better."""

    conv: Tensor
    scan: Tensor


class Mamba(Owner):
    """The mixers M and (routed) R. y, state, aux = mixer(x, positions, state)."""

    def __init__(self, config: ModelConfig, *, routed: bool = False) -> None:
        super().__init__()
        m, d = config.mamba, config.d_model
        self.inner, self.heads, self.head_dim = config.mamba_inner, config.mamba_heads, m.head_dim
        self.d_state, self.groups, self.chunk, self.kernels = m.d_state, m.num_groups, m.chunk_size, m.kernels
        shared = (self.groups * self.d_state, self.groups * self.d_state, self.heads)
        scale = (2 * config.num_layers) ** -0.5
        self.router: Router | None = None
        if routed:
            self.router = Router(d, m.num_experts, m.top_k, weights={"rom_balance": m.balance_weight})
            self.expert_in = ExpertLinear(m.num_experts, d, 2 * self.inner, splits=(self.inner, self.inner))
            self.in_proj = Linear(d, sum(shared), splits=shared)
            self.expert_out = ExpertLinear(m.num_experts, self.inner, d, scale=scale)
        else:
            splits = (self.inner, self.inner, *shared)
            self.in_proj = Linear(d, sum(splits), splits=splits)
            self.out = Linear(self.inner, d, scale=scale)
        self.conv = CausalConv(self.inner + 2 * self.groups * self.d_state, m.conv_width, bias=True)
        self.A_log = nn.Parameter(torch.empty(self.heads))
        self.dt_bias = nn.Parameter(torch.empty(self.heads))
        self.D = nn.Parameter(torch.empty(self.heads))
        self.norm = RMSNorm(self.inner, config.norm_eps)

    def init_state(self, batch: int, max_length: int, dtype: torch.dtype, device: torch.device) -> MambaState:
        """The state before the first token; its size does not depend on max_length."""
        shape = (batch, self.heads, self.head_dim, self.d_state)
        scan = torch.zeros(shape, dtype=wide(self.A_log.dtype), device=device)
        return MambaState(self.conv.init_tail(batch, dtype, device), scan)

    def forward(
        self, x: Tensor, positions: Positions, state: MambaState | None = None
    ) -> tuple[Tensor, MambaState | None, tuple[RouterStats, ...]]:
        """x: (B, T, D) -> (B, T, D)."""
        batch, steps, _ = x.shape
        shared = 2 * self.groups * self.d_state
        if self.router is None:
            z, xbc, dt = self.in_proj(x).split([self.inner, self.inner + shared, self.heads], -1)
            aux: tuple[RouterStats, ...] = ()
        else:
            flat = x.flatten(0, 1)
            weights, ids, stats = self.router(flat)
            plan, aux = dispatch(ids, self.router.num_experts), (stats,)
            zx = plan.collect(self.expert_in(plan.spread(flat), plan), torch.ones_like(weights))
            z, u = zx.view(batch, steps, -1).chunk(2, -1)
            bc, dt = self.in_proj(x).split([shared, self.heads], -1)
            xbc = torch.cat([u, bc], -1)

        xbc, tail = self.conv(xbc, positions, None if state is None else state.conv)
        acc = wide(x.dtype)
        u, b, c = F.silu(xbc).split([self.inner, shared // 2, shared // 2], -1)
        u = u.unflatten(-1, (self.heads, self.head_dim))
        b, c = (t.unflatten(-1, (self.groups, self.d_state)) for t in (b, c))
        dt = F.softplus(dt.to(acc) + self.dt_bias.to(acc))
        if positions.ragged:
            dt = dt * positions.valid[..., None]
        y, scan = self._scan(u, dt, b, c, None if state is None else state.scan)
        y = y.to(x.dtype) + self.D.to(x.dtype)[:, None] * u
        y = self._gated_norm(y.flatten(-2) * F.silu(z))
        if self.router is None:
            y = self.out(y)
        else:
            y = plan.collect(self.expert_out(plan.spread(y.flatten(0, 1)), plan), weights).view_as(x)
        if state is not None:
            assert tail is not None
            assert scan is not None
            state = MambaState(tail, scan)
        return y, state, aux

    def _gated_norm(self, y: Tensor) -> Tensor:
        """RMSNorm within each group, as heads that share B and C are normalised together."""
        if self.groups == 1:
            return self.norm(y)  # type: ignore[no-any-return]
        parts = y.unflatten(-1, (self.groups, -1))
        parts = F.rms_norm(parts, parts.shape[-1:], None, self.norm.eps)
        return parts.flatten(-2) * self.norm.weight.to(y.dtype)

    def _scan(self, x: Tensor, dt: Tensor, b: Tensor, c: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor | None]:
        a = -self.A_log.to(dt.dtype).exp()
        if self.kernels != "torch" and x.is_cuda and x.dtype != torch.float64 and x.shape[1] > 1:
            return kernel_scan(self.kernels, x, dt, a, b, c, self.chunk, state)
        x, b, c = (t.to(dt.dtype) for t in (x, b, c))
        if state is not None and x.shape[1] == 1:
            return step(x * dt[..., None], dt * a, b, c, state)
        return chunked_scan(x * dt[..., None], dt * a, b, c, self.chunk, state)

    def own_parameters(self) -> Iterator[tuple[str, Role, tuple[int, ...], bool]]:
        for name in ("A_log", "dt_bias", "D"):
            yield name, Role.SCALAR, (), False

    def reset(self, generator: torch.Generator, std: float) -> None:
        fill_uniform(self.A_log, 1.0, 16.0, generator)
        fill_uniform(self.dt_bias, math.log(DT_RANGE[0]), math.log(DT_RANGE[1]), generator)
        with torch.no_grad():
            self.A_log.log_()
            dt = self.dt_bias.exp().clamp(min=1e-4)
            self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
        nn.init.ones_(self.D)


def step(x: Tensor, a: Tensor, b: Tensor, c: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One token of the recurrence: shapes as in `chunked_scan` with T = 1."""
    b, c = (t[:, 0].repeat_interleave(x.shape[2] // t.shape[2], 1) for t in (b, c))  # (B, H, N)
    state = a[:, 0].exp()[..., None, None] * state + x[:, 0, ..., None] * b[:, :, None]
    return (state @ c[..., None])[:, None, ..., 0], state


def chunked_scan(
    x: Tensor, a: Tensor, b: Tensor, c: Tensor, chunk: int, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """h_t = exp(a_t) h_{t-1} + x_t b_t^T,  y_t = h_t c_t, in chunks.

    x: (B, T, H, P); a: (B, T, H) <= 0; b, c: (B, T, G, N); state: (B, H, P, N) or None for zeros.
    Returns y (B, T, H, P) and the state after the last step.
    """
    batch, steps, heads, channels = x.shape
    groups, size = b.shape[2:]
    pad = -steps % chunk
    if pad:  # steps with a = 0 and x = 0 change nothing
        x, b, c = (F.pad(t, (0, 0, 0, 0, 0, pad)) for t in (x, b, c))
        a = F.pad(a, (0, 0, 0, pad))

    def split(t: Tensor) -> Tensor:  # (B, T, heads, ...) -> (B, chunks, G, heads per group, Q, ...)
        t = t.unflatten(1, (-1, chunk)).unflatten(3, (groups, -1))
        return t.movedim(2, 4)

    x, b, c = split(x), split(b), split(c)
    s = split(a).cumsum(-1)
    lower = torch.ones(chunk, chunk, dtype=torch.bool, device=x.device).tril()
    decay = (s[..., :, None] - s[..., None, :]).masked_fill_(~lower, -torch.inf).exp_()
    y = ((c @ b.mT) * decay) @ x
    end = s[..., -1:]
    added = (x * (end - s).exp()[..., None]).mT @ b  # (B, chunks, G, heads per group, P, N)
    if state is None:
        state = x.new_zeros(batch, heads, channels, size)
    decay, h = end[..., None].exp(), state.unflatten(1, (groups, -1))
    if torch.compiler.is_compiling():  # the graph is planned as a whole and cannot trace the function
        states = [h]
        for i in range(x.shape[1]):
            states.append(decay[:, i] * states[-1] + added[:, i])
        before, h = torch.stack(states[:-1], 1), states[-1]
    else:
        before, h = _Carry.apply(decay, added, h)  # type: ignore[no-untyped-call]
    y = y + (c @ before.mT) * s.exp()[..., None]
    y = y.movedim(4, 2).flatten(3, 4).flatten(1, 2)
    return y[:, :steps], h.flatten(1, 2)


class _Carry(torch.autograd.Function):
    """The states before every chunk and after the last: h_{i+1} = d_i h_i + u_i.

    Backward is the same recurrence from the end: g_i = d_i g_{i+1} + (upstream of h_i), where g_{i+1} is also the
    gradient of u_i. All states are in one tensor each way: autograd's own graph held each of them two or three times,
    as small blocks that tore the heap apart (16 layers at 32,768 tokens: 799 MB resident for 583 MB of tensors).
    """

    @staticmethod
    def forward(ctx: Any, decay: Tensor, added: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """decay: (B, chunks, G, heads per group, 1, 1); added: (B, chunks, G, heads per group, P, N); state: h_0."""
        before = torch.empty_like(added)
        h = state.clone()
        for i in range(added.shape[1]):
            before[:, i] = h
            h.mul_(decay[:, i]).add_(added[:, i])
        ctx.save_for_backward(decay, before)
        return before, h

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, last: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        decay, before = ctx.saved_tensors
        added = torch.empty_like(before)
        g = last.clone()
        for i in reversed(range(before.shape[1])):
            added[:, i] = g
            g.mul_(decay[:, i]).add_(upstream[:, i])
        # The sum over P and N as a product of vectors: no third tensor of this size.
        rows = (before.flatten(0, 3).flatten(1), added.flatten(0, 3).flatten(1))
        return torch.linalg.vecdot(*rows).view_as(decay), added, g


PACKAGES = {
    "mamba-ssm": ("mamba_ssm.ops.triton.ssd_combined", "mamba_chunk_scan_combined"),
    "fla": ("fla.ops.simple_gla", "chunk_simple_gla"),
}
"""Where each choice of `mamba.kernels` finds its function."""


def kernel_scan(
    kernels: str, x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, chunk: int, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`chunked_scan(x dt, dt a, b, c, chunk, state)` by the Triton kernels of a package; a: (H,) < 0.

    x, b and c may be in 16 bits: the kernels multiply in that dtype and sum in fp32. mamba-ssm takes the same
    arguments. fla's simple gated linear attention, S <- exp(g) S + k^T v, y = q S, is the same recurrence with
    q = c, k = b, v = x dt, g = dt a, without its scale, with S = h^T and with q and k for every head.
    """
    module, function = PACKAGES[kernels]
    try:
        scan = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise LmError(
            f"model.mamba.kernels is {kernels}, but {module}.{function} cannot be imported ({error}).",
            hint="Install the package, or set model.mamba.kernels=torch.",
        ) from error
    if kernels == "mamba-ssm":
        size = max(16, 1 << (chunk - 1).bit_length())  # Triton wants powers of two
        y, last = scan(x, dt, a, b, c, chunk_size=size, initial_states=state, return_final_states=True)
        return y, last
    b, c = (t.repeat_interleave(x.shape[2] // t.shape[2], 2) for t in (b, c))
    before = None if state is None else state.mT.contiguous()
    v = (x * dt[..., None]).to(x.dtype)
    y, last = scan(c, b, v, dt * a, scale=1.0, initial_state=before, output_final_state=True)
    return y, last.mT
