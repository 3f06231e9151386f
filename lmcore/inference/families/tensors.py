"""Which of our tensors are which of theirs: a list of `Rule`s, which export applies forwards and import backwards.

Each rule knows the shapes of their tensors, so that a file is compared by its header, before a tensor is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lmcore.model.config import LayerKind, ModelConfig

EMPTY_SHARED = 8  # width of a shared expert that a family insists on and that does nothing

Shape = tuple[int, ...]
Split = Callable[[Tensor], list[Tensor]]
Join = Callable[[list[Tensor]], Tensor]


@dataclass(frozen=True)
class Rule:
    """One of our tensors and the tensors of theirs that hold the same numbers."""

    ours: str
    """Empty for tensors that they insist on and that must be zero."""
    theirs: Mapping[str, Shape]
    split: Split = field(repr=False)
    join: Join = field(repr=False)


Rules = Iterator[Rule]
LayerRules = Callable[[ModelConfig, LayerKind, str, str], Rules]
"""(config, kind of the layer, prefix of ours, prefix of theirs)."""


def decoder(
    config: ModelConfig,
    layer_rules: LayerRules,
    *,
    root: str = "model.",
    embedding: str = "embed_tokens",
    final: str = "norm",
    shift: float = 0.0,
) -> Rules:
    """Embedding, layers, last norm and head; made one by one, as the number of layers may be a lie."""
    vocabulary, rest, width = config.vocab_size, config.padded_vocab - config.vocab_size, config.d_model

    def rows(ours: str, theirs: str) -> Rule:
        return Rule(
            ours,
            {theirs: (vocabulary, width)},
            lambda t: [t[:vocabulary]],
            lambda p: torch.cat([p[0], p[0].new_zeros(rest, width)]),
        )

    yield rows("embedding.weight", f"{root}{embedding}.weight")
    for index, layer in enumerate(config.layers):
        yield from layer_rules(config, layer, f"blocks.{index}.", f"{root}layers.{index}.")
    yield norm("norm.weight", f"{root}{final}.weight", width, shift)
    if not config.tie_embeddings:
        yield rows("head.weight", "lm_head.weight")


def attention(config: ModelConfig, ours: str, theirs: str, shift: float = 0.0) -> Rules:
    """Fused qkv of ours; an output gate lies in rows of their q_proj, per head: [query K rows, gate K rows]."""
    heads, size, width = config.num_heads, config.head_dim, config.d_model
    q, kv, gate = heads * size, config.num_kv_heads * size, config.gate_dim

    def split(tensor: Tensor) -> list[Tensor]:
        parts = list(tensor.split([q, kv, kv, gate] if gate else [q, kv, kv]))
        if gate:
            gates = parts.pop().view(heads, gate // heads, width).expand(heads, size, width)
            parts[0] = torch.cat([parts[0].view(heads, size, width), gates], 1).reshape(2 * q, width)
        return parts

    def join(parts: list[Tensor]) -> Tensor:
        if gate:
            query, gates = parts[0].view(heads, 2, size, width).unbind(1)
            parts = [query.reshape(q, width), *parts[1:], gates.reshape(q, width)]
        return torch.cat(parts)

    shapes = {"q": (2 * q if gate else q, width), "k": (kv, width), "v": (kv, width)}
    yield Rule(f"{ours}qkv.weight", {f"{theirs}{n}_proj.weight": s for n, s in shapes.items()}, split, join)
    yield same(f"{ours}out.weight", f"{theirs}o_proj.weight", (width, q))
    if config.qk_norm:
        for name in "qk":
            yield norm(f"{ours}{name}_norm.weight", f"{theirs}{name}_norm.weight", size, shift)


def mamba(config: ModelConfig, ours: str, theirs: str) -> Rules:
    """Mamba-2: one input projection of gate, x, B, C and dt in both."""
    inner, heads, width = config.mamba_inner, config.mamba_heads, config.d_model
    channels = inner + 2 * config.mamba.num_groups * config.mamba.d_state
    taps = config.mamba.conv_width
    yield same(f"{ours}in_proj.weight", f"{theirs}in_proj.weight", (inner + channels + heads, width))
    yield same(f"{ours}out.weight", f"{theirs}out_proj.weight", (width, inner))
    yield same(f"{ours}norm.weight", f"{theirs}norm.weight", (inner,))
    yield Rule(
        f"{ours}conv.weight",
        {f"{theirs}conv1d.weight": (channels, 1, taps)},
        lambda t: [t[:, None]],
        lambda p: p[0][:, 0],
    )
    yield same(f"{ours}conv.bias", f"{theirs}conv1d.bias", (channels,))
    for name in ("A_log", "D", "dt_bias"):
        yield same(ours + name, theirs + name, (heads,))


def dense(ours: str, theirs: str, width: int, hidden: int, factor: float = 1.0) -> Rules:
    """SwiGLU; `factor` multiplies what comes out of it."""
    yield Rule(
        f"{ours}w13.weight",
        {f"{theirs}gate_proj.weight": (hidden, width), f"{theirs}up_proj.weight": (hidden, width)},
        lambda t: list(t.chunk(2)),
        torch.cat,
    )
    yield Rule(
        f"{ours}w2.weight",
        {f"{theirs}down_proj.weight": (width, hidden)},
        lambda t: [t * factor],
        lambda p: p[0] / factor,
    )


def no_dense(theirs: str, width: int, hidden: int) -> Rules:
    """A SwiGLU that does nothing."""
    for name, shape in (("gate", (hidden, width)), ("up", (hidden, width)), ("down", (width, hidden))):
        yield zeros(f"{theirs}{name}_proj.weight", shape)


def experts(config: ModelConfig, ours: str, theirs: str) -> Rules:
    """A router and routed experts, each of theirs with matrices of its own."""
    count, hidden, width = config.moe.num_experts, config.moe.d_expert, config.d_model
    yield same(f"{ours}router.weight", f"{theirs}gate.weight", (count, width))
    yield Rule(
        f"{ours}w13.weight",
        {f"{theirs}experts.{e}.{name}_proj.weight": (hidden, width) for e in range(count) for name in ("gate", "up")},
        lambda t: [half for matrix in t for half in matrix.chunk(2)],
        lambda p: torch.cat(p).view(count, 2 * hidden, width),
    )
    yield Rule(
        f"{ours}w2.weight",
        {f"{theirs}experts.{e}.down_proj.weight": (width, hidden) for e in range(count)},
        lambda t: list(t.unbind()),
        torch.stack,
    )


def same(ours: str, theirs: str, shape: Shape) -> Rule:
    """The same tensor under another name."""
    return Rule(ours, {theirs: shape}, lambda t: [t], lambda p: p[0])


def norm(ours: str, theirs: str, size: int, shift: float = 0.0) -> Rule:
    """A gain, which some store with 1 taken away (shift -1)."""
    return Rule(ours, {theirs: (size,)}, lambda t: [t + shift], lambda p: p[0] - shift)


def zeros(theirs: str, shape: Shape) -> Rule:
    """A tensor that a family insists on and that does nothing."""
    return Rule("", {theirs: shape}, lambda t: [torch.zeros(shape)], lambda p: p[0])
