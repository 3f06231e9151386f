"""Parts of a block that have kernels of their own on a CUDA device, as functions with a derivative.

    norm_rotate     n = u / sqrt(mean(u^2) + eps),  q = rotate(w n, m)      per head u of the rows, at position m
    swiglu_down     y = (SiLU(a) * b) W_2
    flash_attention causal attention by FlashAttention-4, for whom the package is there and asked for

The operations that torch has for QK-norm and rotation, and the kernels that its compiler makes of them, pass several
times over queries and keys: 7 % of a step of 124M on an H200. Here the derivative takes gradients of q, k and v to one
gradient of the rows, so that nothing is put together afterwards; it needs the rows alone, which are kept anyway, for v
is a part of them. That of the gate keeps [a | b] and makes the product again while it reads them.

The kernels are operators of torch (`torch.ops.lmshards`), opaque to its compiler; see triton_kernels.py.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

DEVICES = {"cuda"} if find_spec("triton") else set[str]()
"""Device types that have these kernels. Triton comes with torch for CUDA, but not on Windows."""
FLASH_ATTENTION = False
"""Whether FlashAttention-4 is to be used; set by `lmcore.training.device.flash_attention`."""


def has_kernels(x: Tensor) -> bool:
    """Whether there are kernels for the device and the dtype of x."""
    return x.device.type in DEVICES and x.dtype != torch.float64


def has_norm_rotate(rows: Tensor, head_dim: int) -> bool:
    """Whether rows (B, T, ...) with heads of this size can be taken."""
    power_of_two = head_dim & (head_dim - 1) == 0
    return has_kernels(rows) and power_of_two and 16 <= head_dim <= 256


def norm_rotate(
    rows: Tensor, gains: Tensor, cos: Tensor, sin: Tensor, eps: float, heads: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q (B, H, T, K), k and v (B, G, T, K), rest (B, T, n): q and k normalised and rotated, v and rest views of `rows`.

    rows: (B, T, (H + 2 G) K + n), q, k, v and the rest side by side; gains: (H + G, K) fp32; cos, sin:
    (B or 1, T, 1, K/2); heads: (H, G).
    """
    return _NormRotate.apply(rows, gains, cos, sin, eps, heads)  # type: ignore[no-any-return, no-untyped-call]


class _NormRotate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, gains: Tensor, cos: Tensor, sin: Tensor, eps: float, heads: tuple[int, int]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        ctx.save_for_backward(rows, gains, cos, sin)
        ctx.eps = eps
        q, k = torch.ops.lmshards.norm_rotate(rows, gains, cos, sin, eps, heads[0])
        size, kv = gains.shape[1], heads[1]
        _, v, rest = rows.split([sum(heads) * size, kv * size, rows.shape[-1] - (sum(heads) + kv) * size], -1)
        return q.transpose(1, 2), k.transpose(1, 2), v.unflatten(-1, (kv, size)).transpose(1, 2), rest

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        found = torch.ops.lmshards.norm_rotate_back(*ctx.saved_tensors, ctx.eps, *upstream)
        return (*found, None, None, None, None)


@torch.library.custom_op("lmshards::norm_rotate", mutates_args=(), device_types="cuda")
def _forward(
    rows: Tensor, gains: Tensor, cos: Tensor, sin: Tensor, eps: float, query_heads: int
) -> tuple[Tensor, Tensor]:
    """q (B, T, H, K) and k (B, T, G, K)."""
    from lmcore.model import triton_kernels

    return triton_kernels.norm_rotate(rows, gains, cos, sin, eps, query_heads)


@_forward.register_fake
def _(rows: Tensor, gains: Tensor, cos: Tensor, sin: Tensor, eps: float, query_heads: int) -> tuple[Tensor, Tensor]:
    batch, steps, (heads, size) = *rows.shape[:2], gains.shape
    return rows.new_empty(batch, steps, query_heads, size), rows.new_empty(batch, steps, heads - query_heads, size)


@torch.library.custom_op("lmshards::norm_rotate_back", mutates_args=(), device_types="cuda")
def _backward(
    rows: Tensor, gains: Tensor, cos: Tensor, sin: Tensor, eps: float, gq: Tensor, gk: Tensor, gv: Tensor, rest: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of rows and gains from those of the four results."""
    from lmcore.model import triton_kernels

    found, gain = triton_kernels.norm_rotate_back(rows, gains, cos, sin, eps, gq, gk, gv)
    if rest.shape[-1]:
        found[..., -rest.shape[-1] :] = rest
    return found, gain


@_backward.register_fake
def _(
    rows: Tensor, gains: Tensor, cos: Tensor, sin: Tensor, eps: float, gq: Tensor, gk: Tensor, gv: Tensor, rest: Tensor
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(rows), torch.empty_like(gains)


def swiglu_down(x: Tensor, weight: Tensor) -> Tensor:
    """(SiLU(a) * b) W^T for x = [a | b] (..., 2 F) and weight (D, F) in the dtype of x -> (..., D)."""
    return _SwiGLUDown.apply(x, weight)  # type: ignore[no-any-return, no-untyped-call]


class _SwiGLUDown(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(torch.ops.lmshards.swiglu(x), weight)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        g = upstream[0]
        gx, product = torch.ops.lmshards.swiglu_back(x, g @ weight)
        return gx, g.flatten(0, -2).mT @ product.flatten(0, -2)


@torch.library.custom_op("lmshards::swiglu", mutates_args=(), device_types="cuda")
def _gate(x: Tensor) -> Tensor:
    from lmcore.model import triton_kernels

    return triton_kernels.swiglu(x)


@_gate.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], x.shape[-1] // 2)


@torch.library.custom_op("lmshards::swiglu_back", mutates_args=(), device_types="cuda")
def _gate_back(x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient of x (..., 2 F), and the product (..., F)."""
    from lmcore.model import triton_kernels

    return triton_kernels.swiglu_back(x, g)


@_gate_back.register_fake
def _(x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(g)


def has_flash_attention(q: Tensor) -> bool:
    """Whether FlashAttention-4 is asked for and takes this device and dtype."""
    return FLASH_ATTENTION and q.is_cuda and q.dtype in (torch.bfloat16, torch.float16)


def flash_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of q (B, H, T, K) to k and v (B, G, T, K) -> (B, H, T, K).

    cuDNN's kernels, the fastest that torch has, add in any order in the backward pass. With deterministic algorithms
    torch falls back to FlashAttention-2, at half their speed; FlashAttention-4 adds in a fixed order when asked to.
    """
    rows = (t.transpose(1, 2) for t in (q, k, v))
    return _FlashAttention.apply(*rows).transpose(1, 2)  # type: ignore[no-any-return, no-untyped-call]


class _FlashAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        y, lse = torch.ops.lmshards.flash_attention(q, k, v)
        ctx.save_for_backward(q, k, v, y, lse)
        return y  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        return torch.ops.lmshards.flash_attention_back(upstream[0], *ctx.saved_tensors)


@torch.library.custom_op("lmshards::flash_attention", mutates_args=(), device_types="cuda")
def _attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """(B, T, H, K), and the logarithm (B, H, T) of each query's sum, in fp32."""
    from flash_attn.cute import interface

    y, lse = interface._flash_attn_fwd(q, k, v, causal=True, return_lse=True)[:2]
    return y.contiguous(), lse.contiguous()


@_attend.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    batch, steps, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty(batch, heads, steps, dtype=torch.float32)


@torch.library.custom_op("lmshards::flash_attention_back", mutates_args=(), device_types="cuda")
def _attend_back(g: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, each (B, T, heads, K)."""
    from flash_attn.cute import interface

    exact = torch.are_deterministic_algorithms_enabled()
    found = interface._flash_attn_bwd(q, k, v, y, g, lse, causal=True, deterministic=exact)
    gq, gk, gv = (t.contiguous() for t in found[:3])
    return gq, gk, gv


@_attend_back.register_fake
def _(g: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
