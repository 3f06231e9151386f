"""granitemoehybrid without its multipliers: attention and Mamba-2 in any layers, no QK-norm; dense, or softmax experts
normalised over the chosen ones, shared experts. T/models/granitemoehybrid/{configuration,modeling}_granitemoehybrid.py.

A dense feed-forward is their shared expert without routed ones. At least one layer must be attention: their cache asks
the first such layer for its length. Groups of Mamba heads are normed as in mamba2.py.
"""

from __future__ import annotations

from typing import Any

from lmcore.inference.families import keys, tensors
from lmcore.inference.families.family import Family
from lmcore.inference.families.keys import (
    ANY_NUMBER,
    COUNT,
    MOST_EXPERTS,
    TEXT,
    Reading,
    fixed,
    list_of,
    null_or,
    number,
    read,
    whole,
    zero_or,
)
from lmcore.inference.families.mamba2 import check_groups, time_step_limit
from lmcore.inference.families.qwen3_moe import softmax_obstacles
from lmcore.inference.families.qwen3_next import shared_experts
from lmcore.model.config import LayerKind, ModelConfig

LETTERS = {"attention": "A", "full_attention": "A", "mamba": "M", "linear_attention": "M"}

KEYS = keys.decoder(
    vocab_size=32_000,
    hidden_size=4096,
    intermediate_size=11_008,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=None,
    null_heads=True,
    max_position_embeddings=2048,
) | {
    "intermediate_size": read(COUNT, 11_008),
    "position_embedding_type": fixed("rope", default=None),
    "embedding_multiplier": fixed(1.0, 1),
    "logits_scaling": fixed(1.0, 1),
    "residual_multiplier": fixed(1.0, 1),
    "attention_multiplier": read(ANY_NUMBER, 1.0),
    "num_local_experts": read(whole(0, MOST_EXPERTS), 8),
    "num_experts_per_tok": read(whole(0, MOST_EXPERTS), 2),
    "shared_intermediate_size": read(COUNT, 1024),
    "router_aux_loss_coef": read(zero_or(number(high=1e6)), 0.001),
    "output_router_logits": fixed(False, written=False),
    "layer_types": read(null_or(list_of(TEXT)), None),
    "mamba_n_heads": read(COUNT, 128),
    "mamba_n_groups": read(COUNT, 1),
    "mamba_d_state": read(COUNT, 256),
    "mamba_d_head": read(keys.Kind(lambda v: v == "auto" or COUNT.holds(v), f'"auto" or {COUNT.says}'), "auto"),
    "mamba_d_conv": read(whole(2), 4),
    "mamba_expand": read(COUNT, 2),
    "mamba_chunk_size": read(whole(1, 4096), 256),
    "mamba_conv_bias": fixed(True),
    "mamba_proj_bias": fixed(False),
    "time_step_limit": time_step_limit(),
}


def settings(reading: Reading) -> dict[str, Any]:
    """Mixers by layer; one kind of feed-forward."""
    layers = reading["num_hidden_layers"]
    letters = layer_letters(reading, layers)
    found = keys.heads(reading) | {"pattern": keys.period(letters), "qk_norm": False}
    if abs(reading["attention_multiplier"] * found["head_dim"] ** 0.5 - 1) > 1e-6:
        reading.refuse("attention_multiplier", reading["attention_multiplier"], f"1/sqrt({found['head_dim']}) is ours")
    if reading["num_local_experts"]:
        found |= routed(reading)
    else:
        found |= {"ffn": "d", "d_ff": reading["shared_intermediate_size"]}
    return found | mamba(reading, "M" in letters)


def layer_letters(reading: Reading, layers: int) -> str:
    """A and M; at least one A."""
    kinds = reading["layer_types"]
    kinds = ["linear_attention"] * layers if kinds is None else kinds
    letters = keys.layer_letters(reading, "layer_types", kinds, LETTERS)
    if "A" not in letters:
        reading.refuse("layer_types", "no attention layer", "which its cache asks for")
    return letters


def routed(reading: Reading) -> dict[str, Any]:
    """Experts in every layer."""
    width, chosen = reading["intermediate_size"], reading["num_experts_per_tok"]
    if not 2 <= chosen <= reading["num_local_experts"]:
        why = "an only expert would have the weight 1" if chosen == 1 else "not a number of its experts"
        reading.refuse("num_experts_per_tok", chosen, why)
    return keys.experts(
        reading,
        "e",
        num_experts=reading["num_local_experts"],
        top_k=chosen,
        d_expert=width,
        route_norm=True,
        balance_weight=reading["router_aux_loss_coef"],
        num_shared=shared_experts(reading, "shared_intermediate_size", width),
    )


def mamba(reading: Reading, used: bool) -> dict[str, Any]:
    """The Mamba section; their class checks its numbers whether there is such a layer or not."""
    inner = reading["mamba_expand"] * reading["hidden_size"]
    count, size = reading["mamba_n_heads"], reading["mamba_d_head"]
    if inner % count or size not in ("auto", inner // count):
        reading.refuse("mamba_n_heads", count, f"times mamba_d_head {size} is not mamba_expand * hidden_size {inner}")
    if not used:
        return {}
    check_groups(reading, "mamba_n_groups", count)
    return {
        "mamba.head_dim": max(1, inner // count),
        "mamba.d_state": reading["mamba_d_state"],
        "mamba.expand": reading["mamba_expand"],
        "mamba.conv_width": reading["mamba_d_conv"],
        "mamba.num_groups": reading["mamba_n_groups"],
        "mamba.chunk_size": reading["mamba_chunk_size"],
    }


def config(ours: ModelConfig) -> dict[str, Any]:
    """Angles, kinds of layers, widths."""
    moe, mixers = ours.moe, [kind.mixer for kind in ours.layers]
    routed = any(kind.ffn == "e" for kind in ours.layers)
    values: dict[str, Any] = keys.write_rope(ours.rope_theta) | {
        # The names of older versions, which newer ones translate.
        "layer_types": ["mamba" if mixer == "M" else "attention" for mixer in mixers],
        "attention_multiplier": ours.head_dim**-0.5,
        "num_local_experts": moe.num_experts if routed else 0,
        "num_experts_per_tok": moe.top_k if routed else 0,
        "intermediate_size": moe.d_expert if routed else ours.d_ff,
        "shared_intermediate_size": (moe.num_shared * moe.d_expert or tensors.EMPTY_SHARED) if routed else ours.d_ff,
        "router_aux_loss_coef": moe.balance_weight,
    }
    if "M" not in mixers:  # no such layer, but the class checks the numbers
        return values | {"mamba_n_heads": 1, "mamba_d_head": ours.d_model, "mamba_expand": 1}
    return values | {
        "mamba_n_heads": ours.mamba_heads,
        "mamba_d_head": ours.mamba.head_dim,
        "mamba_n_groups": ours.mamba.num_groups,
        "mamba_d_state": ours.mamba.d_state,
        "mamba_d_conv": ours.mamba.conv_width,
        "mamba_expand": ours.mamba.expand,
        "mamba_chunk_size": ours.mamba.chunk_size,
    }


def layer(ours: ModelConfig, kind: LayerKind, here: str, there: str) -> tensors.Rules:
    """One layer."""
    width, moe = ours.d_model, ours.moe
    yield tensors.norm(f"{here}mixer_norm.weight", f"{there}input_layernorm.weight", width)
    if kind.mixer == "M":
        yield from tensors.mamba(ours, f"{here}mixer.", f"{there}mamba.")
    else:
        yield from tensors.attention(ours, f"{here}mixer.", f"{there}self_attn.")
    yield tensors.norm(f"{here}ffn_norm.weight", f"{there}post_attention_layernorm.weight", width)
    here += "ffn."
    if kind.ffn == "d":
        yield from fused(here, f"{there}shared_mlp.", width, ours.d_ff)
        return
    routed, count, hidden = f"{there}block_sparse_moe.", moe.num_experts, moe.d_expert
    yield tensors.same(f"{here}router.weight", f"{routed}router.layer.weight", (count, width))
    yield tensors.same(f"{here}w13.weight", f"{routed}input_linear.weight", (count, 2 * hidden, width))
    yield tensors.same(f"{here}w2.weight", f"{routed}output_linear.weight", (count, width, hidden))
    if moe.num_shared:
        yield from fused(f"{here}shared.", f"{there}shared_mlp.", width, moe.num_shared * hidden)
    else:
        yield tensors.zeros(f"{there}shared_mlp.input_linear.weight", (2 * tensors.EMPTY_SHARED, width))
        yield tensors.zeros(f"{there}shared_mlp.output_linear.weight", (width, tensors.EMPTY_SHARED))


def fused(ours: str, theirs: str, width: int, hidden: int) -> tensors.Rules:
    """A SwiGLU whose gate and up projections are one matrix in both."""
    yield tensors.same(f"{ours}w13.weight", f"{theirs}input_linear.weight", (2 * hidden, width))
    yield tensors.same(f"{ours}w2.weight", f"{theirs}output_linear.weight", (width, hidden))


def obstacles(ours: ModelConfig, biased: bool) -> list[str]:
    """Heads that fill the width; an attention layer; dense or experts, not both."""
    found = []
    ffns = {kind.ffn for kind in ours.layers}
    if not any(kind.mixer == "A" for kind in ours.layers):
        found.append("no attention layer (pattern; its cache asks for one)")
    if ours.head_dim * ours.num_heads != ours.d_model:
        found.append(f"head_dim {ours.head_dim} (d_model / num_heads is {ours.d_model / ours.num_heads:g})")
    if "e" not in ffns:
        return found
    if not ours.moe.route_norm and ours.moe.top_k > 1:
        found.append("moe.route_norm: false")
    if ours.moe.top_k == 1:
        found.append("moe.top_k: 1 (its only expert would get the weight 1)")
    if "d" in ffns:
        found.append("dense layers beside expert layers (ffn)")
    return found + softmax_obstacles(ours, biased)


FAMILY = Family(
    name="granitemoehybrid",
    architecture="GraniteMoeHybridForCausalLM",
    mixers="AM",
    ffns="de",
    keys=KEYS,
    aliases={"layers_block_type": "layer_types"},
    settings=settings,
    config=config,
    rules=lambda ours: tensors.decoder(ours, layer),
    obstacles=obstacles,
)
