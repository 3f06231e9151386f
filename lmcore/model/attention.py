"""Grouped-query attention with a fused projection, QK-norm, rotary positions, an output gate and a sliding window.

    [q | k | v | g] = x W_qkvg                        one matrix product; H query heads share G key/value heads
    q, k <- rope(rmsnorm(q)), rope(rmsnorm(k))        QK-norm per channel, before the rotation (arXiv:2302.05442)
    y_h = softmax(q_h K_g(h)^T / sqrt(K) + causal) V_g(h),   g(h) = h // (H / G)      GQA (arXiv:2305.13245)
    y <- y * sigmoid(g)                               gate G1, one number per head or per channel (arXiv:2505.06708)
    out = y W_out

A window w lets a query at position m see positions m-w+1 .. m. While training, windows are computed block by block
(each block of w queries against its own and the previous block), so the cost is linear in length.

Shapes: B batch, T time, D width, H query heads, G key/value heads, K head size, S cache slots.

The cache: slots carry their own position, so rows of different length, padding, gaps left by depth routing and rollback
need no special case. While all rows are aligned (one position per slot) no position is stored and no mask is built. A
window needs a ring of window + MARGIN slots only; a rollback of up to MARGIN tokens finds its slots untouched.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmcore.model.config import ModelConfig
from lmcore.model.kernels import flash_attention, has_flash_attention, has_norm_rotate, norm_rotate
from lmcore.model.layers import Linear, RMSNorm, by_hand, inverse_rms, normalized_gradient, wide
from lmcore.model.rotary import Positions, rotate, turn
from lmcore.model.state import MixerState

MARGIN = 64
"""Slots of a window's ring beyond the window: the longest chunk that is written before it is attended to."""

SHORT, BLOCK = 512, 128
"""Compiled for a CPU in bf16, plain products in blocks of queries beat the fused kernel up to this length: 5.7 ms
against 11.6 forward and backward for (8, 3, 256, 64), 23 against 51 for (4, 8, 512, 64), 47 against 63 at 1,024."""


_HAS_AMX = torch.cpu._is_amx_tile_supported()


@dataclass
class KVCache(MixerState):
    """Keys and values of one layer.

    k, v: (B, G, S + 1, K); the last slot is scrap for padding.
    used: slots that may hold something (over all rows).
    positions: (B, S + 1) int32, -1 = empty; None while aligned: slot i holds position i.
    lengths: (B,) tokens written per row; None while aligned.
    """

    k: Tensor
    v: Tensor
    used: int = 0
    positions: Tensor | None = None
    lengths: Tensor | None = None

    def select(self, rows: Tensor) -> KVCache:
        """The cache of the given rows; slots that none of them uses count as free again."""
        chosen = super().select(rows)
        return chosen if chosen.lengths is None else replace(chosen, used=chosen._most())

    @classmethod
    def concatenate(cls, states: Sequence[KVCache]) -> KVCache:
        """Rows of several caches; they stay aligned when they all are, and equally long."""
        first = states[0]
        if all(s.positions is None and s.used == first.used for s in states):
            return super().concatenate(states)
        joined = super().concatenate([s.unaligned() for s in states])
        return replace(joined, used=joined._most())

    def _most(self) -> int:
        assert self.lengths is not None
        return min(int(self.lengths.max()), self.slots)

    @property
    def slots(self) -> int:
        return self.k.shape[2] - 1

    def unaligned(self) -> KVCache:
        """The same cache with explicit positions."""
        if self.positions is not None:
            return self
        batch, slot = self.k.shape[0], torch.arange(self.slots + 1, device=self.k.device, dtype=torch.int32)
        positions = torch.where(slot < self.used, slot, -1).expand(batch, -1)
        lengths = torch.full((batch,), self.used, device=self.k.device, dtype=torch.long)
        return replace(self, positions=positions, lengths=lengths)

    def keep(self, before: KVCache, count: Tensor) -> KVCache:
        """Forget all but the first count[b] tokens of row b written since the older cache `before`."""
        if before.positions is None and bool((count == count[0]).all()):
            return replace(self, used=before.used + int(count[0]), positions=None, lengths=None)
        old, new = before.unaligned(), self.unaligned()
        assert old.lengths is not None
        assert new.lengths is not None
        assert new.positions is not None
        slot = torch.arange(self.slots + 1, device=self.k.device)
        written = (slot - old.lengths[:, None]) % self.slots  # as which token since then; large for older slots
        stale = (written >= count[:, None]) & (written < (new.lengths - old.lengths)[:, None])
        return replace(new, positions=new.positions.masked_fill(stale, -1), lengths=old.lengths + count)

    def write(self, k: Tensor, v: Tensor, index: Tensor, *, ring: bool) -> KVCache:
        """Store the tokens of a chunk. k, v: (B, G, T, K); index: (B, T) positions, padding (-1) last in each row."""
        assert self.positions is not None
        assert self.lengths is not None
        batch, steps = index.shape
        t = torch.arange(steps, device=index.device)
        valid = index >= 0
        count = valid.sum(1)
        slot = self.lengths[:, None] + t
        if ring:  # of a chunk longer than the ring only the end survives
            keep = valid & (t >= count[:, None] - self.slots)
            slot = slot % self.slots
        else:
            keep = valid & (slot < self.slots)
        slot = torch.where(keep, slot, self.slots)
        row = torch.arange(batch, device=index.device)[:, None]
        self.k[row, :, slot] = k.transpose(1, 2).to(self.k.dtype)
        self.v[row, :, slot] = v.transpose(1, 2).to(self.v.dtype)
        positions = self.positions.scatter(1, slot, torch.where(keep, index, -1).to(torch.int32))
        used = min(self.used + steps, self.slots)
        return replace(self, used=used, positions=positions, lengths=self.lengths + count)


class Attention(nn.Module):
    """The mixers A (window 0) and W. y, state, aux = mixer(x, positions, state)."""

    def __init__(self, config: ModelConfig, *, window: int = 0) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.gate, self.eps, self.window = config.gate, config.norm_eps, window
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        self.sizes = (q + kv, kv, config.gate_dim)
        self.qkv = Linear(config.d_model, sum(self.sizes), splits=(q, kv, kv, config.gate_dim))
        self.q_norm = RMSNorm(self.head_dim, self.eps) if config.qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, self.eps) if config.qk_norm else None
        self.out = Linear(q, config.d_model, scale=(2 * config.num_layers) ** -0.5)

    def init_state(self, batch: int, max_length: int, dtype: torch.dtype, device: torch.device) -> KVCache:
        """An empty cache for `max_length` positions (a window needs fewer slots)."""
        slots = min(max_length, self.window + MARGIN) if self.window else max_length
        shape = (batch, self.kv_heads, slots + 1, self.head_dim)
        cache = KVCache(torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device))
        return cache.unaligned() if self.window else cache

    def forward(
        self, x: Tensor, positions: Positions, state: KVCache | None = None
    ) -> tuple[Tensor, KVCache | None, tuple[()]]:
        """x: (B, T, D) -> (B, T, D)."""
        q, k, v, gate = self.project(x, positions)
        if state is None:
            y = self._whole(q, k, v, positions)
        else:
            y, state = self._cached(q, k, v, positions, state)
        y = y.transpose(1, 2)  # (B, T, H, K)
        if self.gate == "headwise":
            y = y * gate.sigmoid()[..., None]
        elif self.gate == "elementwise":
            y = y * gate.unflatten(-1, (self.heads, self.head_dim)).sigmoid()
        return self.out(y.flatten(-2)), state, ()

    def project(self, x: Tensor, positions: Positions) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q (B, H, T, K), k and v (B, G, T, K), gate (B, T, gate rows): normalised and rotated."""
        rows = self.qkv(x)
        gains = None
        if self.q_norm is not None and self.k_norm is not None:
            gains = torch.cat([self.q_norm.weight.expand(self.heads, -1), self.k_norm.weight.expand(self.kv_heads, -1)])
            if has_norm_rotate(rows, self.head_dim):
                heads = self.heads, self.kv_heads
                return norm_rotate(rows, gains.float(), positions.cos, positions.sin, self.eps, heads)
        qk, v, gate = rows.split(self.sizes, -1)
        qk = qk.unflatten(-1, (self.heads + self.kv_heads, self.head_dim))  # one norm and one rotation for both
        if gains is not None:
            gains = gains.to(qk.dtype)
            if by_hand(qk):
                qk = _NormRotate.apply(qk, gains, positions.cos, positions.sin, self.eps)  # type: ignore[no-untyped-call]
            else:
                qk = rotate(F.rms_norm(qk, (self.head_dim,), None, self.eps) * gains, positions)
        else:
            qk = rotate(qk, positions)
        q, k = qk.transpose(1, 2).split([self.heads, self.kv_heads], 1)
        return q, k, v.unflatten(-1, (self.kv_heads, self.head_dim)).transpose(1, 2), gate

    def sink(self, x: Tensor, positions: Positions) -> Tensor:
        """Mean attention of all queries but the first to the first token of a sequence; x: (B, T, D) -> a number."""
        q, k, _, _ = self.project(x, positions)
        k = k.repeat_interleave(self.heads // self.kv_heads, 1)
        acc = wide(q.dtype)
        index = positions.index.expand(x.shape[0], -1)
        mask = self._visible(index, index)
        means = []
        for head in range(self.heads):  # one head at a time: T x T scores
            scores = (q[:, head] @ k[:, head].mT).to(acc) * self.head_dim**-0.5
            shares = scores.masked_fill(~mask[:, 0], -torch.inf).softmax(-1)
            means.append(shares[:, 1:, 0].mean())
        return torch.stack(means).mean()

    # ------------------------------------------------------------------ a whole sequence

    def _whole(self, q: Tensor, k: Tensor, v: Tensor, positions: Positions) -> Tensor:
        """Causal attention of a chunk to itself. Padding at the end of a row is seen by padding only."""
        if self.window and positions.ragged:  # depth routing leaves gaps; a window counts positions, not tokens
            index = positions.index.expand(q.shape[0], -1)
            return self._sdpa(q, k, v, mask=self._visible(index, index))
        if self.window and q.shape[2] > self.window:
            return self._windowed(q, k, v)
        if torch.compiler.is_compiling() and self._products_are_faster(q):
            return self._in_products(q, k, v)
        return self._sdpa(q, k, v, causal=True)

    def _products_are_faster(self, q: Tensor) -> bool:
        # With AMX the compiled graph of these products gives NaN (torch 2.13), and the eager one does not.
        sound = q.device.type == "cpu" and not _HAS_AMX
        short = sound and q.dtype == torch.bfloat16 and q.shape[2] <= SHORT
        return short and self.heads == self.kv_heads and not self.window

    def _in_products(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Blocks of queries against all keys up to their end, as the equation says; holds the weights, T x T / 2."""
        steps, made = q.shape[2], []
        position = torch.arange(steps, device=q.device)
        for start in range(0, steps, BLOCK):
            stop = min(start + BLOCK, steps)
            scores = (q[:, :, start:stop] @ k[:, :, :stop].mT).to(wide(q.dtype)) * self.head_dim**-0.5
            scores = scores.masked_fill(position[:stop] > position[start:stop, None], -torch.inf)
            made.append(scores.softmax(-1).to(v.dtype) @ v[:, :, :stop])
        return torch.cat(made, 2)

    def _windowed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Blocks of `window` queries: the first sees itself causally, every other one itself and the block before."""
        w, steps = self.window, q.shape[2]
        q, k, v = (F.pad(t, (0, 0, 0, -steps % w)).unflatten(2, (-1, w)) for t in (q, k, v))  # (B, heads, n, w, K)
        first = self._sdpa(q[:, :, 0], k[:, :, 0], v[:, :, 0], causal=True)
        pairs_k, pairs_v = (torch.cat([t[:, :, :-1], t[:, :, 1:]], 3) for t in (k, v))  # (B, G, n-1, 2w, K)
        i, j = torch.arange(w, device=q.device)[:, None], torch.arange(-w, w, device=q.device)
        mask = (j <= i) & (j > i - w)
        batch = q.shape[0]
        rest = self._sdpa(*(t.transpose(1, 2).flatten(0, 1) for t in (q[:, :, 1:], pairs_k, pairs_v)), mask=mask)
        rest = rest.unflatten(0, (batch, -1)).transpose(1, 2).flatten(2, 3)
        return torch.cat([first, rest], 2)[:, :, :steps]

    def _sdpa(self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, mask: Tensor | None = None) -> Tensor:
        grouped = self.heads != self.kv_heads
        if causal and has_flash_attention(q):
            return flash_attention(q, k, v)
        if q.is_cuda:
            q, k, v = (_aligned(t) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped)

    # ------------------------------------------------------------------ with a cache

    def _cached(self, q: Tensor, k: Tensor, v: Tensor, positions: Positions, cache: KVCache) -> tuple[Tensor, KVCache]:
        steps = q.shape[2]
        if not positions.ragged and cache.positions is None:
            start, stop = cache.used, cache.used + steps
            cache.k[:, :, start:stop] = k
            cache.v[:, :, start:stop] = v
            old, cache = cache, replace(cache, used=stop)
            if start == 0:
                return self._whole(q, k, v, positions), cache
            mask = None if steps == 1 else torch.ones(steps, stop, dtype=torch.bool, device=q.device).tril(start)
            return self._attend(q, old.k[:, :, :stop], old.v[:, :, :stop], mask), cache
        batch = q.shape[0]
        index, cache = positions.index.expand(batch, -1), cache.unaligned()
        if cache.used == 0:
            return self._whole(q, k, v, positions), cache.write(k, v, index, ring=bool(self.window))
        if self.window and steps > MARGIN:  # writing first would overwrite what the chunk's first tokens must see
            assert cache.positions is not None
            n = cache.used
            keys, values = torch.cat([cache.k[:, :, :n], k], 2), torch.cat([cache.v[:, :, :n], v], 2)
            at = torch.cat([cache.positions[:, :n], index.to(torch.int32)], 1)
            return self._attend(q, keys, values, self._visible(at, index)), cache.write(k, v, index, ring=True)
        cache = cache.write(k, v, index, ring=bool(self.window))
        assert cache.positions is not None
        n = cache.used
        mask = self._visible(cache.positions[:, :n], index)
        return self._attend(q, cache.k[:, :, :n], cache.v[:, :, :n], mask), cache

    def _visible(self, slots: Tensor, queries: Tensor) -> Tensor:
        """(B, 1, T, n): which slots (by position) each query may see. Padding sees all: a row of -inf would be NaN."""
        s, m = slots[:, None, None, :], queries[:, None, :, None]
        visible = (s >= 0) & (s <= m)
        if self.window:
            visible &= s > m - self.window
        return visible | (m < 0)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        k, v = k.to(q.dtype), v.to(q.dtype)
        if q.shape[2] > 1 or q.device.type != "cpu":
            return self._sdpa(q, k, v, mask=mask)
        # One query on a CPU: two small products beat the fused kernel (bf16, 1024 slots: 0.06 ms against 0.35 ms).
        q = q.unflatten(1, (self.kv_heads, -1)).squeeze(3)  # (B, G, H/G, K)
        scores = (q @ k.mT).to(wide(q.dtype)) * self.head_dim**-0.5
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        y: Tensor = scores.softmax(-1).to(v.dtype) @ v
        return y.flatten(1, 2)[:, :, None]


def _aligned(x: Tensor) -> Tensor:
    """x with rows that begin at multiples of 16 bytes, as cuDNN's attention expects without looking: v beside a gate of
    one number per head is else read wrongly in bf16."""
    fits = all(stride * x.element_size() % 16 == 0 for stride in x.stride()[:-1])
    return x if fits else x.contiguous()


class _NormRotate(torch.autograd.Function):
    """QK-norm and rotation of heads (B, T, H, K) in one: 4.9 ms for 8.6 ms, forward and backward, of (8, 256, 6, 64) in
    fp32 on one AVX2 core. The derivative of a rotation is the rotation back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gains: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
        xw = x.to(wide(x.dtype))
        inverse = inverse_rms(xw, eps)
        ctx.save_for_backward(x, gains, inverse, cos, sin)
        return turn((xw * inverse).mul_(gains).to(x.dtype), cos, sin)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, gains, inverse, cos, sin = ctx.saved_tensors
        acc = inverse.dtype
        g = turn(upstream[0], cos, sin, back=True).to(acc)
        gx, gn = normalized_gradient(x.to(acc), inverse, gains.to(acc), g)
        return gx.to(x.dtype), gn.flatten(0, 1).sum(0).to(gains.dtype), None, None, None
