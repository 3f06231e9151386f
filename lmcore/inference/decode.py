"""One token per row, fast: what generation spends its time in.

`Decoder(model)(tokens, state)` equals `model(tokens, state=state)[:, -1]` for one token per row; the model's own code
is the reference that it is tested against. Two things make it faster, most of all on a CPU:

    packed weights    matrices are laid out once for the matrix kernels of oneDNN (fp32: 2.3 to 3 times faster than
                      plain products for 16 rows, 1.2 to 2 times for one; AMD EPYC, torch 2.13), at the price of a
                      second copy
    fewer operations  attention, dense feed-forwards and the head run as about 20 calls per layer instead of 50: gains
                      of QK-norm, rotation and 1/sqrt(K) are multiplied beforehand, masks are made once per pass

Layers of other kinds run as they are, with packed matrices inside. Positions, caches and lengths are kept as the model
keeps them, so that prefill, decoding and speculation can take turns on one state.

Shapes: B rows, D width, H query heads, G key/value heads, K head size, L layers, n cache slots in use.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmcore.errors import LmError
from lmcore.model.attention import Attention, KVCache
from lmcore.model.block import Block
from lmcore.model.feedforward import SwiGLU
from lmcore.model.layers import Linear, wide
from lmcore.model.model import LanguageModel
from lmcore.model.state import DecodeState

PACK_LIMIT = 8 << 30
"""Bytes of weights above which no second copy is made."""


class PackedLinear(nn.Module):
    """A Linear without bias whose weight lies as oneDNN wants it."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, None, "none", [], "")  # type: ignore[no-any-return]


class PlainLinear(nn.Module):
    """The same where packing is not possible."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = weight.detach()

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class Decoder:
    """Logits (B, V) of the next token of each row, for a model in evaluation mode whose weights do not change."""

    def __init__(self, model: LanguageModel) -> None:
        self.model = model
        config, weight = model.config, model.embedding.weight
        self.dtype = model.compute_dtype or weight.dtype
        self.packs = can_pack(model)
        # Depth routing computes on any number of tokens, none among them, which oneDNN refuses.
        packed = [self.packs and isinstance(block, Block) for block in model.blocks]
        self.blocks = [_packed_copy(block) if pack else block for block, pack in zip(model.blocks, packed, strict=True)]
        self.ahead = [_packed_copy(head) if self.packs else head for head in model.mtp]
        self.head = self._linear(model.head_weight[: config.vocab_size])
        self.fast = [_is_plain(block) for block in self.blocks]
        self.rope: tuple[Tensor, Tensor] | None = None
        self.gains: list[Tensor | None] = []
        self.parts: list[dict[str, Any]] = []
        for block in self.blocks:
            self.parts.append(self._parts(block) if _is_plain(block) else {})

    @classmethod
    def of(cls, model: LanguageModel) -> Decoder:
        """The decoder of a model, made anew only when its weights have changed since the last call."""
        try:
            key = (model.compute_dtype, *((p.data_ptr(), p._version, p.dtype) for p in model.parameters()))
        except RuntimeError:  # tensors made in inference mode do not count their changes
            return cls(model)
        kept = model.__dict__.get("_decoder")
        if kept is None or kept[0] != key:
            kept = model.__dict__["_decoder"] = (key, cls(model))
        return kept[1]

    def __call__(self, tokens: Tensor, state: DecodeState) -> Tensor:
        """tokens: (B,) or (B, 1) ids -> logits (B, vocab_size) in fp32 or better; `state` is advanced."""
        tokens = tokens.view(-1)
        model, config = self.model, self.model.config
        ragged = state.lengths is not None
        positions = None if all(self.fast) else model._positions(tokens[:, None], None, state)
        if positions is None:
            self._advance(state)
        x = F.embedding(tokens, model.embedding.weight).to(self.dtype)  # (B, D)
        where = state.lengths - 1 if state.lengths is not None else torch.tensor([state.length - 1], device=x.device)
        cos, sin = (table[where] for table in self._rope(state.max_length, x.device))  # (B or 1, K)
        shared: _Ragged | None = None
        for index, (block, parts) in enumerate(zip(self.blocks, self.parts, strict=True)):
            if not parts:
                y, state.layers[index], _ = block(x[:, None], positions, state.layers[index])
                x = y[:, 0]
                continue
            h = F.rms_norm(x, (config.d_model,), parts["mixer_norm"], config.norm_eps)
            z = parts["qkv"](h)
            cache: KVCache = state.layers[index]
            if (ragged or cache.positions is not None) and shared is None:
                shared = _Ragged(cache.unaligned(), where.expand(len(tokens)), config.num_kv_heads, x.dtype)
            y, state.layers[index] = self._attend(z, cos, sin, cache, parts, shared)
            x = x + parts["out"](y)
            if "w13" in parts:
                h = F.rms_norm(x, (config.d_model,), parts["ffn_norm"], config.norm_eps)
                a, b = parts["w13"](h).chunk(2, -1)
                x = x + parts["w2"](F.silu(a) * b)
            elif block.ffn is not None:
                y = block.ffn(block.ffn_norm(x[:, None]))  # type: ignore[operator]
                x = x + (y[0] if isinstance(y, tuple) else y)[:, 0]
        logits: Tensor = self.head(F.rms_norm(x, (config.d_model,), model.norm.weight.to(x.dtype), config.norm_eps))
        return logits.to(wide(logits.dtype))

    def read(self, tokens: Tensor, state: DecodeState | None = None) -> Tensor:
        """tokens: (B, T) ids -> hidden states (B, T, D); `model.trunk(tokens, state=state)` with packed weights."""
        positions = self.model._positions(tokens, None, state)
        x: Tensor = self.model.embedding(tokens, self.model.compute_dtype)
        for index, block in enumerate(self.blocks):
            x, after, _ = block(x, positions, None if state is None else state.layers[index])
            if state is not None:
                state.layers[index] = after
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states (..., D) -> (..., vocab_size) in fp32 or better; `model.logits` with packed weights."""
        logits: Tensor = self.head(self.model.norm(hidden))
        return logits.to(wide(logits.dtype))

    # ------------------------------------------------------------------ private

    def _linear(self, weight: Tensor) -> nn.Module:
        weight = weight.to(self.dtype)
        return PackedLinear(weight) if self.packs else PlainLinear(weight)

    def _parts(self, block: Any) -> dict[str, Any]:
        """What a plain layer needs, in the compute dtype."""
        mixer: Attention = block.mixer
        heads, groups, size = mixer.heads, mixer.kv_heads, mixer.head_dim
        acc = wide(self.dtype)
        gains = torch.ones(heads + groups, size, dtype=acc, device=self.model.embedding.weight.device)
        if mixer.q_norm is not None and mixer.k_norm is not None:
            gains[:heads], gains[heads:] = mixer.q_norm.weight.to(acc), mixer.k_norm.weight.to(acc)
        gains[:heads] *= size**-0.5
        parts: dict[str, Any] = {
            "mixer_norm": block.mixer_norm.weight.detach().to(self.dtype),
            "qkv": mixer.qkv if self.packs else self._linear(mixer.qkv.weight),
            "out": mixer.out if self.packs else self._linear(mixer.out.weight),
            "gains": gains,
            "swapped": gains.roll(size // 2, -1),
            "normed": mixer.q_norm is not None,
            "gate": mixer.gate,
        }
        if isinstance(block.ffn, SwiGLU):
            parts |= {
                "ffn_norm": block.ffn_norm.weight.detach().to(self.dtype),
                "w13": block.ffn.w13 if self.packs else self._linear(block.ffn.w13.weight),
                "w2": block.ffn.w2 if self.packs else self._linear(block.ffn.w2.weight),
            }
        return parts

    def _advance(self, state: DecodeState) -> None:
        """What the model does to the counters of a state for one token per row."""
        if state.lengths is not None:
            state.lengths = state.lengths + 1
        elif state.length + 1 > state.max_length:
            raise LmError(f"The state has room for {state.max_length} tokens; {state.length + 1} are needed.")
        state.length += 1

    def _rope(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """cos and signed sin of all positions, (length, K): rotated = u cos + roll(u, K/2) sin."""
        if self.rope is None or len(self.rope[0]) < length:
            config = self.model.config
            kind = torch.float32 if device.type == "mps" else torch.float64
            rates = config.rope_theta ** (
                -torch.arange(0, config.head_dim, 2, device=device, dtype=kind) / config.head_dim
            )
            angles = torch.arange(length, device=device, dtype=kind)[:, None] * rates
            cos, sin = angles.cos(), angles.sin()
            acc = wide(self.dtype)
            self.rope = torch.cat([cos, cos], -1).to(acc), torch.cat([-sin, sin], -1).to(acc)
        return self.rope

    def _attend(
        self, z: Tensor, cos: Tensor, sin: Tensor, cache: KVCache, parts: dict[str, Any], shared: _Ragged | None
    ) -> tuple[Tensor, KVCache]:
        """z: (B, rows of qkv and gate) -> (B, H K) before the output matrix, and the cache with one more token."""
        config = self.model.config
        heads, groups, size = config.num_heads, config.num_kv_heads, config.head_dim
        batch, qk, kv = z.shape[0], (heads + groups) * size, groups * size
        n = z[:, :qk].view(batch, heads + groups, size)
        if parts["normed"]:
            n = F.rms_norm(n, (size,), None, config.norm_eps)
        gains, swapped = (parts["gains"] * cos[:, None]).to(n.dtype), (parts["swapped"] * sin[:, None]).to(n.dtype)
        n = torch.addcmul(n * gains, n.roll(size // 2, -1), swapped)
        v = z[:, qk : qk + kv].view(batch, groups, size)
        if shared is None:
            slot = cache.used
            cache.k[:, :, slot] = n[:, heads:]
            cache.v[:, :, slot] = v
            cache = KVCache(cache.k, cache.v, slot + 1)
        else:
            shared.write(cache.k, n[:, heads:])
            shared.write(cache.v, v)
            cache = KVCache(cache.k, cache.v, shared.used, shared.positions, shared.lengths)
        keys, values = (t[:, :, : cache.used].flatten(0, 1).to(n.dtype) for t in (cache.k, cache.v))  # (B G, n, K)
        scores = torch.bmm(n[:, :heads].reshape(batch * groups, -1, size), keys.mT)  # (B G, H/G, n)
        if shared is not None:
            scores = scores + shared.mask
        shares = scores.to(wide(scores.dtype)).softmax(-1).to(n.dtype)
        y = torch.bmm(shares, values).view(batch, heads, size)
        gate = z[:, qk + kv :]
        if parts["gate"] == "headwise":
            y = y * gate.sigmoid()[..., None]
        elif parts["gate"] == "elementwise":
            y = y * gate.view_as(y).sigmoid()
        return y.reshape(batch, -1), cache


class _Ragged:
    """Rows of different length: slots, positions and mask of one pass, the same for all full-attention layers."""

    def __init__(self, cache: KVCache, where: Tensor, groups: int, dtype: torch.dtype) -> None:
        assert cache.positions is not None
        assert cache.lengths is not None
        self.slot = cache.lengths  # (B,)
        self.rows = torch.arange(len(where), device=where.device)
        self.used = min(cache.used + 1, cache.slots)
        self.positions = cache.positions.index_put((self.rows, self.slot), where.to(torch.int32))
        self.lengths = cache.lengths + 1
        seen = self.positions[:, : self.used] >= 0
        mask = torch.zeros(seen.shape, dtype=dtype, device=where.device).masked_fill(~seen, -torch.inf)
        self.mask = mask.repeat_interleave(groups, 0)[:, None]  # (B G, 1, n)

    def write(self, cache: Tensor, values: Tensor) -> None:
        cache[self.rows, :, self.slot] = values.to(cache.dtype)


def can_pack(model: LanguageModel) -> bool:
    """Whether the matrices of a model can be laid out for oneDNN."""
    dtype = model.compute_dtype or model.embedding.weight.dtype
    if model.embedding.weight.device.type != "cpu" or dtype not in (torch.float32, torch.bfloat16):
        return False
    if sum(p.numel() * dtype.itemsize for p in model.parameters()) > PACK_LIMIT:
        return False
    try:
        weight = torch.ones(16, 16, dtype=dtype)
        found = PackedLinear(weight)(torch.ones(1, 16, dtype=dtype))
        return bool((found == 16).all())
    except (AttributeError, RuntimeError):  # a build without oneDNN, or another signature of the operator
        return False


def _is_plain(block: Any) -> bool:
    """Full attention at every token."""
    return isinstance(block, Block) and isinstance(block.mixer, Attention) and not block.mixer.window


def _packed_copy(block: nn.Module) -> nn.Module:
    """The block with shared parameters, except that its Linear modules are packed."""
    shared: dict[int, Any] = {id(t): t for t in (*block.parameters(), *block.buffers())}
    clone = copy.deepcopy(block, shared)
    for parent in list(clone.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, Linear):
                setattr(parent, name, PackedLinear(child.weight))
    return clone
