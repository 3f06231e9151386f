"""The loss: stable cross-entropy, the output head fused with it, and how several losses travel together.

    loss_i = logsumexp(z_i) - z_i[y_i],    d loss_i / d z_i = softmax(z_i) - onehot(y_i)

Every term is a (sum, count, weight): a step is the sum over all valid targets of all micro-batches and devices,
divided once by their global count. A mean of means would weigh a short micro-batch's tokens more (7 + 2 tokens: the
gradient is 25 % off).

At 32,768 tokens and 50,304 ids the logits alone are 6.6 GB in fp32. `head_cross_entropy` then works in chunks:
gradients are formed in the forward pass, and a backward only scales them, so no more than one chunk of logits exists
at a time. Rows of the weight beyond the true vocabulary are masked: they get no probability and exactly zero gradient.

torch's own `F.linear_cross_entropy` is not used: in 2.13 its scalar reductions are wrong in bf16 on CPUs (9.19 for
10.87).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lmcore.model.kernels import has_kernels
from lmcore.model.layers import wide

IGNORE = -100
"""A target that is not counted."""

CHUNK_BYTES = {"cpu": 8 << 20, "mps": 512 << 20}
"""Bytes of fp32 logits in one chunk, by device type. On a CPU a chunk that fits the cache is faster than all logits at
once (4096 tokens, width 256, 8192 ids, 2 cores, torch 2.13: bf16 120 ms against 267, fp32 349 against 496)."""
OTHER_CHUNK_BYTES = 1 << 30
"""With half of it, summing the gradient of the head over the chunks takes 3 % of a step of 124M on an H200."""
_TILE = 256
"""Chunks on an accelerator are multiples of this many tokens, as its matrix products are cut into tiles."""
COMPILED_BYTES = 16 << 20
"""The same for a model compiled as one graph, on a CPU. Logits of 32 MiB or more are mapped anew by glibc each time,
and the page faults cost more than the product: 25 ms instead of 16 (2,048 tokens, width 192, 8,192 ids, bf16)."""
UNROLLED = 8
"""Most chunks in such a graph, which holds each of them."""


@dataclass(frozen=True)
class Term:
    """One loss: its sum, what the sum is divided by, and its weight in the objective."""

    sum: Tensor
    count: Tensor | int
    weight: float = 1.0


@dataclass
class Losses:
    """What `LanguageModel.loss` returns. `terms["main"]` is the cross-entropy of the next token in nats."""

    terms: dict[str, Term]
    metrics: dict[str, Tensor] = field(default_factory=dict)
    """Detached values worth a log line, such as expert utilisation."""
    rows: Tensor | None = None
    """(B,) fp32 sums of the main loss per row, detached; only when `LanguageModel.keep_row_losses` is set."""

    @property
    def main(self) -> Term:
        return self.terms["main"]

    @property
    def aux(self) -> dict[str, Term]:
        """All terms but the main one."""
        return {name: term for name, term in self.terms.items() if name != "main"}

    def objective(self, counts: Mapping[str, int | Tensor] | None = None) -> Tensor:
        """The number to differentiate: sum over terms of weight * sum / count.

        counts: the global count of each term over the whole step (see `LanguageModel.term_counts`); without it each
        term is divided by its own.
        """
        total: Tensor | None = None
        for name, term in self.terms.items():
            if term.weight == 0:
                continue
            count = term.count if counts is None else counts[name]
            part = term.weight * term.sum / (count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1))
            total = part if total is None else total + part
        assert total is not None
        return total


def cross_entropy(logits: Tensor, targets: Tensor, ignore_index: int = IGNORE) -> Tensor:
    """Mean cross-entropy in nats over the targets that are not `ignore_index` (0 when there are none).

    logits: (..., V) of any floating dtype, however large; targets: (...) ids. Computed in fp32 or better.
    """
    logits = logits.to(wide(logits.dtype))
    valid = targets != ignore_index
    shifted = logits - logits.detach().amax(-1, keepdim=True)  # exp cannot overflow
    chosen = shifted.gather(-1, targets.where(valid, 0)[..., None])[..., 0]
    losses = shifted.exp().sum(-1).log() - chosen
    return losses.where(valid, 0.0).sum() / valid.sum().clamp(min=1)


def head_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    vocab_size: int,
    *,
    chunk: int | None = None,
    fused: bool = False,
) -> tuple[Tensor, Tensor]:
    """Output head and cross-entropy: (sum over valid targets, their count).

    hidden: (..., D) in the compute dtype; weight: (V', D) with V' >= vocab_size; targets: (...) ids or IGNORE.
    chunk: tokens per chunk; 0 = all logits at once; None = chosen by size. fused: let torch.compile make one kernel of
    the arithmetic between the products of a chunk (see `softmax_gradient`).
    """
    total, count, _ = _head(hidden, weight, targets, vocab_size, chunk, False, fused)
    return total, count


def head_cross_entropy_each(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    vocab_size: int,
    *,
    chunk: int | None = None,
    fused: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same and, third, the loss of each target (in its shape, detached, 0 where it is not counted)."""
    total, count, each = _head(hidden, weight, targets, vocab_size, chunk, True, fused)
    assert each is not None
    return total, count, each.detach().reshape(targets.shape)


def _head(
    hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, chunk: int | None, each: bool, fused: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    hidden, targets = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    tokens, rows = hidden.shape[0], weight.shape[0]
    if chunk is None:
        chunk = chunk_for(tokens, rows, hidden.device.type)
        if fused and not chunk:
            chunk = tokens
    if chunk:
        gradients = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
        return _ChunkedHead.apply(hidden, weight, targets, vocab_size, chunk, gradients, each, fused)  # type: ignore[no-any-return, no-untyped-call]
    logits = F.linear(hidden, weight.to(hidden.dtype))[:, :vocab_size]
    logits = logits.to(wide(logits.dtype))
    count = (targets != IGNORE).sum()
    if not each:
        return F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum"), count, None
    losses = F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="none")
    return losses.sum(), count, losses


def chunk_for(tokens: int, rows: int, device: str) -> int:
    """Tokens per chunk for logits of (tokens, rows) on a device type; 0: all at once."""
    if torch.compiler.is_compiling():
        size = max(128, COMPILED_BYTES // (rows * 4), -(-tokens // UNROLLED))
        return size if tokens > size else 0
    limit = CHUNK_BYTES.get(device, OTHER_CHUNK_BYTES)
    if tokens * rows * 4 <= 2 * limit:
        return 0
    chunk = max(128, limit // (rows * 4))
    return chunk // _TILE * _TILE if device != "cpu" and chunk > _TILE else chunk


def softmax_gradient(z: Tensor, targets: Tensor, vocab_size: int, gradients: bool) -> tuple[Tensor, Tensor | None]:
    """Losses (n,) in fp32 or better of logits z (n, V') and, if asked, their gradient (n, V') in the dtype of z.

    Written for torch.compile, which makes one kernel of it: that reads the logits of a row for the sum, and again for
    the gradient that it writes. Operation by operation, as on a CPU, a GPU passes ten times over fp32.
    """
    acc = wide(z.dtype)
    column = torch.arange(z.shape[1], device=z.device)
    valid = targets != IGNORE
    zw = z.to(acc).where(column < vocab_size, -torch.inf)
    highest = zw.amax(-1, keepdim=True)
    total = (zw - highest).exp().sum(-1, keepdim=True).log() + highest
    chosen = z.gather(1, targets.where(valid, 0)[:, None]).to(acc)
    losses = (total - chosen)[:, 0] * valid
    if not gradients:
        return losses, None
    g = ((zw - total).exp() - (column == targets[:, None]).to(acc)) * valid[:, None]
    return losses, g.to(z.dtype)


def softmax_gradient_(z: Tensor, targets: Tensor, vocab_size: int, gradients: bool) -> tuple[Tensor, Tensor | None]:
    """The same, on a CUDA device in one kernel that writes the gradient over the logits."""
    if not has_kernels(z):
        return softmax_gradient(z, targets, vocab_size, gradients)
    from lmcore.model.triton_kernels import softmax_gradient_ as kernel

    losses = kernel(z, targets, vocab_size, gradients)
    return losses, z if gradients else None


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total (m, n) += a^T b for a (k, m) and b (k, n), summed in the dtype of `total`."""
    if a.dtype == total.dtype:
        total.addmm_(a.mT, b)
    elif a.is_cuda:  # the product itself adds in fp32; a sum of its own takes 3 % of a step of 124M on an H200
        torch.addmm(total, a.mT, b, out_dtype=total.dtype, out=total)
    else:
        total += a.mT @ b


class _ChunkedHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w: Tensor,
        targets: Tensor,
        vocab_size: int,
        chunk: int,
        gradients: bool,
        each: bool,
        fused: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        way = _fused_chunks if fused else _chunks
        total, single, gx, gw = way(x, w, targets, vocab_size, chunk, gradients)
        ctx.save_for_backward(gx, None if gw is None else gw.to(w.dtype))
        count = (targets != IGNORE).sum()
        if not each:
            ctx.mark_non_differentiable(count)
            return total, count, None
        losses = torch.cat(single)
        ctx.mark_non_differentiable(count, losses)
        return total, count, losses

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        gx, gw = ctx.saved_tensors
        scale = upstream[0]
        return (
            gx * scale.to(gx.dtype) if ctx.needs_input_grad[0] else None,
            gw * scale.to(gw.dtype) if ctx.needs_input_grad[1] else None,
            None,
            None,
            None,
            None,
            None,
            None,
        )


_Chunks = tuple[Tensor, list[Tensor], Tensor | None, Tensor | None]
"""Sum of the losses, losses of each chunk (n,), gradient of x and, in fp32 or better, of w (None: not asked)."""


def _chunks(x: Tensor, w: Tensor, targets: Tensor, vocab_size: int, chunk: int, gradients: bool) -> _Chunks:
    """Chunk by chunk, operation by operation."""
    acc = wide(x.dtype)
    wc = w.to(x.dtype)
    total = torch.zeros((), dtype=acc, device=x.device)
    gx = torch.empty_like(x) if gradients else None
    gw = torch.zeros(w.shape, dtype=acc, device=w.device) if gradients else None
    single: list[Tensor] = []
    # One buffer for the logits of every chunk, turned in place into their gradient: exp is taken once, and no pages
    # are mapped anew for each chunk (2048 tokens, width 192, 8192 ids, fp32, one thread: 281 ms against 390).
    buffer = torch.empty(min(chunk, len(x)), w.shape[0], dtype=acc, device=x.device)
    for xc, tc, gxc in zip(
        x.split(chunk), targets.split(chunk), gx.split(chunk) if gx is not None else [None] * len(x), strict=False
    ):
        z = buffer[: len(xc)]
        if x.dtype == acc:
            torch.mm(xc, wc.mT, out=z)
        else:
            z.copy_(torch.mm(xc, wc.mT))
        z[:, vocab_size:] = -torch.inf
        valid = tc != IGNORE
        y = tc.where(valid, 0)[:, None]
        highest = z.amax(-1, keepdim=True)
        chosen = z.gather(1, y)
        z.sub_(highest).exp_()  # at most 1
        sums = z.sum(-1, keepdim=True)
        losses = (sums.log() + highest - chosen)[:, 0] * valid
        total += losses.sum()
        single.append(losses)
        if gxc is not None and gw is not None:
            z.mul_(valid[:, None] / sums)
            z.scatter_add_(1, y, -valid[:, None].to(acc))
            g = z.to(x.dtype)
            torch.mm(g, wc, out=gxc)
            add_product(gw, g, xc)
            del g  # else it lives on beside that of the next chunk
    return total, single, gx, gw


def _fused_chunks(x: Tensor, w: Tensor, targets: Tensor, vocab_size: int, chunk: int, gradients: bool) -> _Chunks:
    """The same with the arithmetic between the products in one kernel."""
    # Inside a graph that is compiled as a whole the arithmetic is fused with the rest.
    kernel = softmax_gradient if torch.compiler.is_compiling() else softmax_gradient_
    acc = wide(x.dtype)
    wc = w.to(x.dtype)
    total = torch.zeros((), dtype=acc, device=x.device)
    gx: list[Tensor] = []
    gw = torch.zeros(w.shape, dtype=acc, device=w.device) if gradients else None
    single: list[Tensor] = []
    for xc, tc in zip(x.split(chunk), targets.split(chunk), strict=True):
        losses, g = kernel(torch.mm(xc, wc.mT), tc, vocab_size, gradients)
        total = total + losses.sum()
        single.append(losses)
        if g is not None and gw is not None:
            gx.append(torch.mm(g, wc))
            add_product(gw, g, xc)
        del g  # or it lives until the next chunk has its own
    return total, single, torch.cat(gx) if gradients else None, gw
