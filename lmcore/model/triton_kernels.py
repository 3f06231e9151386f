"""Kernels for CUDA devices in Triton: chains of small operations, each in the fewest passes over the memory.

    softmax_gradient_    losses and gradient of a chunk of logits, written over the logits
    norm_rotate          QK-norm and rotary positions, from the rows of the fused projection
    norm_rotate_back     its derivative, into the rows of the projection's gradient
    swiglu, swiglu_back  the gate of the feed-forward; its derivative makes the product again on the way

Sums are formed in fp32 in an order that depends on the shapes alone, without atomic additions and without tuning at run
time, so that a step has the same bits whenever it is computed again. `kernels` says when they are used; only there is
this module imported, for it needs the package `triton`, which comes with torch where there are CUDA devices.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lmcore.model.loss import IGNORE

SOFTMAX_BLOCK, SOFTMAX_WARPS = 2048, 8
"""Logits of one row that a program holds at a time."""
ROTATE_TOKENS, ROTATE_WARPS = 64, 4
"""Tokens of one head in a program."""
GATE_BLOCK, GATE_WARPS = 2048, 4
"""Columns of one row in a program."""


_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _add_exp(x, highest, total):
    """The highest of x and what came before, and the sum of 2^(x - highest), per lane (arXiv:1805.02867)."""
    above = x - highest
    less = tl.exp2(-tl.abs(above))  # the one power for either case
    return tl.maximum(highest, x), tl.where(above > 0, total * less + 1.0, total + less)


@triton.jit
def _softmax_gradient(
    z_rows,
    targets,
    losses,
    vocab_size: tl.constexpr,
    width: tl.constexpr,
    ignore: tl.constexpr,
    gradients: tl.constexpr,
    block: tl.constexpr,
):
    """One row of logits. Read twice: the second time from its end, which is still in the second-level cache."""
    row = tl.program_id(0)
    z = z_rows + row.to(tl.int64) * width
    target = tl.load(targets + row)
    valid = target != ignore
    column = tl.arange(0, block)
    highest = tl.full((block,), -1e30, tl.float32)  # a finite one: -inf less -inf is no number
    total = tl.zeros((block,), tl.float32)
    full: tl.constexpr = vocab_size // block * block
    for start in range(0, full, block):
        x = tl.load(z + start + column).to(tl.float32) * _LOG2_E
        highest, total = _add_exp(x, highest, total)
    if full < vocab_size:
        at = full + column
        x = tl.load(z + at, mask=at < vocab_size, other=-float("inf")).to(tl.float32) * _LOG2_E
        highest, total = _add_exp(x, highest, total)
    chosen = tl.load(z + tl.where(valid, target, 0)).to(tl.float32)
    top = tl.max(highest, 0)
    log_total = tl.log2(tl.sum(total * tl.exp2(highest - top), 0)) + top
    tl.store(losses + row, tl.where(valid, log_total * _LN_2 - chosen, 0.0))
    if gradients:
        tl.debug_barrier()  # every warp has read its logits, `chosen` too, before one is overwritten
        blocks: tl.constexpr = (width + block - 1) // block
        for i in range(blocks):
            at = (blocks - 1 - i) * block + column
            logit = tl.load(z + at, mask=at < vocab_size, other=-float("inf"), eviction_policy="evict_first")
            g = tl.exp2(logit.to(tl.float32) * _LOG2_E - log_total) - tl.where(at == target, 1.0, 0.0)
            g = tl.where(valid, g, 0.0).to(z_rows.dtype.element_ty)
            tl.store(z + at, g, mask=at < width, eviction_policy="evict_first")


def softmax_gradient_(z: Tensor, targets: Tensor, vocab_size: int, gradients: bool) -> Tensor:
    """Losses (n,) in fp32 of logits z (n, V'), which become their gradient if asked (see `loss.softmax_gradient`)."""
    assert z.is_contiguous()
    losses = torch.empty(len(z), dtype=torch.float32, device=z.device)
    _softmax_gradient[(len(z),)](
        z,
        targets,
        losses,
        vocab_size,
        z.shape[1],
        ignore=IGNORE,
        gradients=gradients,
        block=SOFTMAX_BLOCK,
        num_warps=SOFTMAX_WARPS,
    )
    return losses


@triton.jit
def _read(at, live):
    return tl.load(at, mask=live[:, None], other=0.0).to(tl.float32)


@triton.jit
def _angles(cos, sin, token, live, steps, stride, half: tl.constexpr):
    """(tokens, K/2) of both tables; stride: of the rows of a batch, 0 where all share one."""
    at = ((token // steps) * stride + (token % steps) * half)[:, None] + tl.arange(0, half)[None, :]
    return _read(cos + at, live), _read(sin + at, live)


@triton.jit
def _normalized(at, live, eps, half: tl.constexpr):
    """Both halves of a head at `at`, divided by the root of its mean square, and one over that root."""
    u = _read(at, live)
    v = _read(at + half, live)
    inverse = tl.rsqrt(tl.sum(u * u + v * v, 1) / (2 * half) + eps)[:, None]
    return u * inverse, v * inverse, inverse


@triton.jit
def _gain(gains, head, half: tl.constexpr):
    at = gains + head * 2 * half + tl.arange(0, half)
    return tl.load(at)[None, :], tl.load(at + half)[None, :]


@triton.jit
def _norm_rotate(
    x,
    gains,
    cos,
    sin,
    q,
    k,
    eps,
    tokens,
    steps,
    width,
    angle_stride,
    query_heads: tl.constexpr,
    kv_heads: tl.constexpr,
    half: tl.constexpr,
    block: tl.constexpr,
):
    """One head of a block of tokens."""
    head = tl.program_id(1)
    token = tl.program_id(0) * block + tl.arange(0, block)
    live = token < tokens
    lane = tl.arange(0, half)
    at = x + (token.to(tl.int64) * width + head * 2 * half)[:, None] + lane[None, :]
    u, v, _ = _normalized(at, live, eps, half)
    gain_u, gain_v = _gain(gains, head, half)
    u = u * gain_u
    v = v * gain_v
    c, s = _angles(cos, sin, token, live, steps, angle_stride, half)
    if head < query_heads:
        to = q + (token.to(tl.int64) * query_heads + head)[:, None] * 2 * half + lane[None, :]
    else:
        to = k + (token.to(tl.int64) * kv_heads + head - query_heads)[:, None] * 2 * half + lane[None, :]
    tl.store(to, (u * c - v * s).to(q.dtype.element_ty), mask=live[:, None])
    tl.store(to + half, (v * c + u * s).to(q.dtype.element_ty), mask=live[:, None])


@triton.jit
def _norm_rotate_back(
    x,
    gains,
    cos,
    sin,
    gq,
    gk,
    gv,
    out,
    gain_parts,
    eps,
    tokens,
    steps,
    width,
    angle_stride,
    gq_b,
    gq_h,
    gq_t,
    gk_b,
    gk_h,
    gk_t,
    gv_b,
    gv_h,
    gv_t,
    query_heads: tl.constexpr,
    kv_heads: tl.constexpr,
    half: tl.constexpr,
    block: tl.constexpr,
):
    """One head of a block of tokens; the heads of v are copied to their place."""
    head = tl.program_id(1)
    token = tl.program_id(0) * block + tl.arange(0, block)
    live = token < tokens
    lane = tl.arange(0, half)
    b = (token // steps).to(tl.int64)
    t = (token % steps).to(tl.int64)
    if head < query_heads:
        source = gq + (b * gq_b + t * gq_t + head * gq_h)[:, None] + lane[None, :]
    elif head < query_heads + kv_heads:
        source = gk + (b * gk_b + t * gk_t + (head - query_heads) * gk_h)[:, None] + lane[None, :]
    else:
        source = gv + (b * gv_b + t * gv_t + (head - query_heads - kv_heads) * gv_h)[:, None] + lane[None, :]
    g_u = _read(source, live)
    g_v = _read(source + half, live)
    place = (token.to(tl.int64) * width + head * 2 * half)[:, None] + lane[None, :]
    if head < query_heads + kv_heads:
        c, s = _angles(cos, sin, token, live, steps, angle_stride, half)
        ru = g_u * c + g_v * s  # rotated back
        rv = g_v * c - g_u * s
        u, v, inverse = _normalized(x + place, live, eps, half)
        part = gain_parts + (tl.program_id(0) * (query_heads + kv_heads) + head) * 2 * half + lane
        tl.store(part, tl.sum(ru * u, 0))
        tl.store(part + half, tl.sum(rv * v, 0))
        gain_u, gain_v = _gain(gains, head, half)
        ru = ru * gain_u
        rv = rv * gain_v
        mean = (tl.sum(ru * u + rv * v, 1) / (2 * half))[:, None]
        g_u = (ru - u * mean) * inverse
        g_v = (rv - v * mean) * inverse
    tl.store(out + place, g_u.to(out.dtype.element_ty), mask=live[:, None])
    tl.store(out + place + half, g_v.to(out.dtype.element_ty), mask=live[:, None])


def norm_rotate(
    x: Tensor, gains: Tensor, cos: Tensor, sin: Tensor, eps: float, query_heads: int
) -> tuple[Tensor, Tensor]:
    """q (B, T, H, K) and k (B, T, G, K) of x (B, T, >= (H + G) K); gains (H + G, K); cos, sin (B or 1, T, 1, K/2)."""
    batch, steps, width = x.shape
    heads, size = gains.shape
    kv_heads = heads - query_heads
    q = x.new_empty(batch, steps, query_heads, size)
    k = x.new_empty(batch, steps, kv_heads, size)
    tokens = batch * steps
    _norm_rotate[(triton.cdiv(tokens, ROTATE_TOKENS), heads)](
        x.contiguous(),
        gains,
        cos,
        sin,
        q,
        k,
        eps,
        tokens,
        steps,
        width,
        _angle_stride(cos),
        query_heads=query_heads,
        kv_heads=kv_heads,
        half=size // 2,
        block=ROTATE_TOKENS,
        num_warps=ROTATE_WARPS,
    )
    return q, k


def norm_rotate_back(
    x: Tensor, gains: Tensor, cos: Tensor, sin: Tensor, eps: float, gq: Tensor, gk: Tensor, gv: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the gains, from those of q (B, H, T, K), k and v. Columns behind v stay unwritten."""
    batch, steps, width = x.shape
    heads, size = gains.shape
    tokens = batch * steps
    gq, gk, gv = (g if g.stride(-1) == 1 else g.contiguous() for g in (gq, gk, gv))
    x = x.contiguous()
    out = torch.empty_like(x)
    blocks = triton.cdiv(tokens, ROTATE_TOKENS)
    parts = torch.empty(blocks, heads, size, dtype=torch.float32, device=x.device)
    _norm_rotate_back[(blocks, heads + gv.shape[1])](
        x,
        gains,
        cos,
        sin,
        gq,
        gk,
        gv,
        out,
        parts,
        eps,
        tokens,
        steps,
        width,
        _angle_stride(cos),
        *gq.stride()[:3],
        *gk.stride()[:3],
        *gv.stride()[:3],
        query_heads=gq.shape[1],
        kv_heads=gk.shape[1],
        half=size // 2,
        block=ROTATE_TOKENS,
        num_warps=ROTATE_WARPS,
    )
    return out, parts.sum(0)


def _angle_stride(table: Tensor) -> int:
    assert table.is_contiguous()
    return table[0].numel() if len(table) > 1 else 0


@triton.jit
def _swiglu(x, out, width, block: tl.constexpr):
    """A part of a row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * block + tl.arange(0, block)
    live = column < width
    a = tl.load(x + row * 2 * width + column, mask=live, other=0.0).to(tl.float32)
    b = tl.load(x + row * 2 * width + width + column, mask=live, other=0.0).to(tl.float32)
    tl.store(out + row * width + column, (a * tl.sigmoid(a) * b).to(out.dtype.element_ty), mask=live)


@triton.jit
def _swiglu_back(x, g, out, product, width, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * block + tl.arange(0, block)
    live = column < width
    a = tl.load(x + row * 2 * width + column, mask=live, other=0.0).to(tl.float32)
    b = tl.load(x + row * 2 * width + width + column, mask=live, other=0.0).to(tl.float32)
    up = tl.load(g + row * width + column, mask=live, other=0.0).to(tl.float32)
    s = tl.sigmoid(a)
    silu = a * s
    kind = out.dtype.element_ty
    tl.store(product + row * width + column, (silu * b).to(kind), mask=live)
    tl.store(out + row * 2 * width + column, (up * b * s * (1.0 + a * (1.0 - s))).to(kind), mask=live)
    tl.store(out + row * 2 * width + width + column, (up * silu).to(kind), mask=live)


def swiglu(x: Tensor) -> Tensor:
    """SiLU(a) * b for x = [a | b] of shape (..., 2 F) -> (..., F)."""
    width = x.shape[-1] // 2
    out = x.new_empty(*x.shape[:-1], width)
    grid = (out.numel() // width, triton.cdiv(width, GATE_BLOCK))
    _swiglu[grid](x.contiguous(), out, width, block=GATE_BLOCK, num_warps=GATE_WARPS)
    return out


def swiglu_back(x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """(gradient of x, the product itself) from x (..., 2 F) and the product's gradient (..., F)."""
    width = g.shape[-1]
    x, g = x.contiguous(), g.contiguous()
    out, product = torch.empty_like(x), torch.empty_like(g)
    grid = (g.numel() // width, triton.cdiv(width, GATE_BLOCK))
    _swiglu_back[grid](x, g, out, product, width, block=GATE_BLOCK, num_warps=GATE_WARPS)
    return out, product
