"""What a model costs before it is built: exact parameters, operations per token, caches; and what devices can do.

Symbols: d width, H/G heads/kv heads of size K, f feed-forward width, E experts of width fe with k per token, di inner
width of Mamba with h heads, N state size, Q chunk, J oscillators, n taps of a convolution, V padded vocabulary, T
length.

    part             parameters                                     forward operations per token
    attention        w = d (H + 2G) K + d gate + H K d, 2K norms    2 w + 2 (T + 1) H K            (causal)
    window of size S the same                                       2 w + 4 m H K, m = mean of min(t, S) over t = 1 .. T
    dense            3 d f                                          6 d f
    experts          E 3 d fe + d E (+ shared 3 d fs)               2 (k 3 d fe + d E + 3 d fs)
    Mamba-2          d (2 di + 2 G N + h) + di d + small parts      2 w + 2 n (di + 2 G N) + 2 Q (G N + di) + 4 N di
    routed Mamba     E (d 2 di + di d) + d (2 G N + h) + d E + ...  the same with k experts, + 2 d E
    resonance        3 d^2 + n d + d + 4 H J                        6 d^2 + 2 n d + FFTs 5 F log2(F) d / T + 3 F d / T
    depth routing    + d + d u + u + 1, u = max(8, d / 2)           share * block(share T) + 2 (d + d u + u)
    head ahead j     block (+ 2 d^2 + 2 d, sequential)              (T - j) / T (block + 4 d^2 + 2 d V)
    norms; head      d each; d V (0 if tied)                        0; 2 d V

Training costs three times the forward pass; operations that are recomputed are not counted. Norms, activations and
softmax are left out, as everywhere; the kernel of a resonance layer (shared by the rows of a batch) and the products of
depth routing's gather are below a thousandth. "PaLM-style" figures (6 per matrix parameter, 12 H K T per attention
layer, no causal discount; arXiv:2204.02311) are given beside the exact ones because others quote them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

from lmcore.config import same_name
from lmcore.model.attention import MARGIN
from lmcore.model.config import LayerKind, ModelConfig
from lmcore.model.resonance import fft_size

CHINCHILLA = 20.0
"""Tokens per parameter of compute-optimal training (arXiv:2203.15556)."""

# ---------------------------------------------------------------------------------------- parameters and operations


@dataclass(frozen=True)
class Part:
    """A kind of module, summed over the model."""

    name: str
    parameters: int = 0
    active: int = 0
    """Parameters that one token meets (of experts only the chosen)."""
    matrices: float = 0.0
    """Parameters that one token is multiplied with, on average over the sequence."""
    flops: float = 0.0
    """Operations of the forward pass per token of the sequence."""
    palm: float = 0.0
    """PaLM-style attention operations of a training step per token: 12 H K T per layer."""
    training_only: bool = False

    def times(self, share: float) -> Part:
        """The part, met by a share of the tokens only."""
        return replace(self, matrices=self.matrices * share, flops=self.flops * share, palm=self.palm * share)


@dataclass(frozen=True)
class ModelPlan:
    """Counts of one architecture at one sequence length."""

    length: int
    parts: tuple[Part, ...]
    embedding: int
    """Parameters of the input embedding (of the head too when tied)."""
    cache_bytes: int
    """Decoding state of one sequence of `length` tokens, in 2-byte numbers where it may be."""

    @property
    def parameters(self) -> int:
        return sum(part.parameters for part in self.parts)

    @property
    def active(self) -> int:
        return sum(part.active for part in self.parts)

    @property
    def forward_flops(self) -> float:
        """Per token, of evaluation and prefill: without the heads that serve training only."""
        return sum(part.flops for part in self.parts if not part.training_only)

    @property
    def train_flops(self) -> float:
        """Per token, of a forward and backward pass."""
        return 3 * sum(part.flops for part in self.parts)

    @property
    def palm_flops(self) -> float:
        """Per token, of a training step, in the convention 6 N + 12 L H K T."""
        return sum(6 * part.matrices + part.palm for part in self.parts)

    @property
    def scaling_parameters(self) -> int:
        """Parameters of hidden matrices and head: the size that lmcore.optim.scale reckons with."""
        head = next(part for part in self.parts if part.name == "head")
        return round(head.matrices) + sum(p.parameters for p in self.parts if p.name not in ("embedding", "head"))


def plan_model(config: ModelConfig, *, length: int | None = None) -> ModelPlan:
    """Count parameters and operations of `config` for sequences of `length` tokens (default: context_length)."""
    length = config.context_length if length is None else length
    d, vocab = config.d_model, config.padded_vocab
    tied = config.tie_embeddings
    found = [
        Part("embedding", vocab * d, vocab * d),
        *(part for kind in config.layers for part in _layer(config, kind, length)),
        Part("norms", d, d),
        *(part for depth in range(1, config.mtp.depths + 1) for part in _ahead(config, depth, length)),
        Part("head", 0 if tied else vocab * d, 0 if tied else vocab * d, vocab * d, 2 * vocab * d),
    ]
    return ModelPlan(length, tuple(_summed(found)), vocab * d, cache_bytes(config, length))


def _summed(parts: Iterable[Part]) -> list[Part]:
    total: dict[tuple[str, bool], Part] = {}
    for part in parts:
        key = (part.name, part.training_only)
        if key not in total:
            total[key] = part
            continue
        before = total[key]
        total[key] = replace(
            before,
            parameters=before.parameters + part.parameters,
            active=before.active + part.active,
            matrices=before.matrices + part.matrices,
            flops=before.flops + part.flops,
            palm=before.palm + part.palm,
        )
    return list(total.values())


def _layer(c: ModelConfig, kind: LayerKind, length: int) -> list[Part]:
    d = c.d_model
    if kind.depth == "m":
        inside = max(1, math.ceil(c.mod.capacity * length))
        hidden = max(8, d // 2)
        routing = d + d * hidden + hidden
        block = [part.times(inside / length) for part in _layer(c, kind._replace(depth="-"), inside)]
        return [*block, Part("depth routing", routing + 1, routing + 1, routing, 2 * routing)]
    norms = d if kind.ffn == "-" else 2 * d
    return [_mixer(c, kind.mixer, length), *_feed_forward(c, kind.ffn), Part("norms", norms, norms)]


def _mixer(c: ModelConfig, letter: str, length: int) -> Part:
    d = c.d_model
    if letter in "AW":
        heads = c.num_heads * c.head_dim
        weights = d * (heads + 2 * c.num_kv_heads * c.head_dim + c.gate_dim) + heads * d
        norms = 2 * c.head_dim if c.qk_norm else 0
        window = min(c.window, length) if letter == "W" else length
        seen = (window * (window + 1) / 2 + (length - window) * window) / length  # keys per query, on average
        name = "attention" if letter == "A" else "window attention"
        flops = 2 * weights + 4 * seen * heads
        return Part(name, weights + norms, weights + norms, weights, flops, 12 * heads * window)
    if letter in "MR":
        m, inner = c.mamba, c.mamba_inner
        shared = 2 * m.num_groups * m.d_state
        channels = inner + shared
        small = channels * (m.conv_width + 1) + 3 * c.mamba_heads + inner
        large, fixed = d * 2 * inner + inner * d, d * (shared + c.mamba_heads)
        padded = math.ceil(length / m.chunk_size) * m.chunk_size / length
        scan = padded * (2 * m.chunk_size * (shared // 2 + inner) + 4 * m.d_state * inner)
        router = d * m.num_experts if letter == "R" else 0
        copies, used = (m.num_experts, m.top_k) if letter == "R" else (1, 1)
        matrices = used * large + fixed + router
        return Part(
            "Mamba" if letter == "M" else "routed Mamba",
            copies * large + fixed + router + small,
            matrices + small,
            matrices,
            2 * matrices + 2 * m.conv_width * channels + scan,
        )
    r, points = c.resonance, fft_size(2 * length - 1)
    matrices = 3 * d * d
    total = matrices + d * r.conv_width + d + 4 * r.num_kernels * r.num_resonators
    transforms = d * (5 * points * math.log2(points) + 3 * points) / length
    return Part("resonance", total, total, matrices, 2 * matrices + 2 * d * r.conv_width + transforms)


def _feed_forward(c: ModelConfig, letter: str) -> list[Part]:
    d = c.d_model
    if letter == "-":
        return []
    if letter == "d":
        weights = 3 * d * c.d_ff
        return [Part("dense", weights, weights, weights, 2 * weights)]
    one = 3 * d * c.moe.d_expert
    always = d * c.moe.num_experts + c.moe.num_shared * one
    used = c.moe.top_k * one + always
    return [Part("experts", c.moe.num_experts * one + always, used, used, 2 * used)]


def _ahead(c: ModelConfig, depth: int, length: int) -> list[Part]:
    """Head `depth` of multi-token prediction, used while training only. It shares embedding and output head."""
    d, sequential = c.d_model, c.mtp.kind == "sequential"
    inside = length - depth if sequential else length
    parts = [part.times(inside / length) for part in _layer(c, c.mtp_layer, inside)]
    if sequential:
        share = inside / length
        parts.append(Part("project", 2 * d * d + 2 * d, 2 * d * d + 2 * d, 2 * d * d * share, 4 * d * d * share))
    head = d * c.padded_vocab * (length - depth) / length
    parts.append(Part("head", 0, 0, head, 2 * head))
    whole = _summed(replace(part, name="heads ahead") for part in parts)[0]
    return [replace(whole, training_only=True)]


def cache_bytes(config: ModelConfig, length: int, itemsize: int = 2) -> int:
    """Bytes of `LanguageModel.init_state(1, length)`: caches in numbers of `itemsize` bytes, sums in fp32."""
    total = 0
    for kind in config.layers:
        if kind.mixer in "AW":
            slots = min(length, config.window + MARGIN) if kind.mixer == "W" else length
            total += 2 * config.num_kv_heads * config.head_dim * (slots + 1) * itemsize
            total += 4 * (slots + 1) + 8 if kind.mixer == "W" else 0
        elif kind.mixer in "MR":
            m, inner = config.mamba, config.mamba_inner
            total += inner * m.d_state * 4
            total += (inner + 2 * m.num_groups * m.d_state) * (m.conv_width - 1) * itemsize
        else:
            r, d = config.resonance, config.d_model
            total += d * r.num_resonators * 8 + d * (r.conv_width - 1) * itemsize
    return total


# ---------------------------------------------------------------------------------------- devices


@dataclass(frozen=True)
class Device:
    """What a device can do: dense bf16 operations per second (no sparsity) and bytes of memory."""

    name: str
    peak_flops: float
    memory: int
    source: str = "data sheet"


_DATA_SHEETS: tuple[tuple[str, float, int], ...] = (
    # name as the driver reports it (the longest match counts), TFLOP/s, GB
    ("H100 NVL", 835, 94),
    ("H100 PCIe", 756, 80),
    ("H100", 989, 80),
    ("H200 NVL", 836, 141),
    ("H200", 989, 141),
    ("A100-SXM4-40GB", 312, 40),
    ("A100-PCIE-40GB", 312, 40),
    ("A100", 312, 80),
    ("B200", 2250, 180),
    ("L40S", 362, 48),
    ("L4", 121, 24),
    ("RTX 4090", 165, 24),
    ("RTX 3090", 71, 24),
)


def known_device(name: str) -> Device | None:
    """The data sheet of a GPU by (part of) its name; None for one that is not listed: nothing is guessed."""
    wanted = f" {_plain(name)} "
    typed = same_name(name, known_device_names())
    fits = [row for row in _DATA_SHEETS if row[0] == typed or (not typed and f" {_plain(row[0])} " in wanted)]
    if not fits:
        return None
    best = max(fits, key=lambda row: len(row[0]))
    return Device(best[0], best[1] * 1e12, best[2] * 10**9)


def known_device_names() -> list[str]:
    """Names that `known_device` finds."""
    return [name for name, _, _ in _DATA_SHEETS]


def _plain(name: str) -> str:
    return " ".join(name.lower().replace("-", " ").replace("_", " ").split())


def measure_peak(device: torch.device, dtype: torch.dtype, *, seconds: float = 0.3) -> float:
    """Operations per second of a large matrix product: the best of several, so that a busy machine matters less."""
    size = 1024 if device.type == "cpu" else 8192
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best, began = math.inf, time.perf_counter()
    for turn in range(1000):
        start = time.perf_counter()
        torch.mm(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if turn:  # the first call sets things up
            best = min(best, time.perf_counter() - start)
        if turn > 2 and time.perf_counter() - began > seconds:
            break
    return 2.0 * size**3 / best
