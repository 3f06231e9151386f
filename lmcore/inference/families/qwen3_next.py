"""qwen3_next without its linear attention: QK-norm, an output gate per element, a shared expert behind its own gate.
T/models/qwen3_next/{configuration,modeling}_qwen3_next.py.

    our headwise gate    becomes an elementwise one
    RMSNorm              stored as w - 1
    shared expert        their gate for it stays at sigmoid(0) = 1/2, and the down_proj is doubled
"""

from __future__ import annotations

from typing import Any

from lmcore.inference.families import keys, qwen3_moe, tensors
from lmcore.inference.families.family import Family
from lmcore.inference.families.keys import COUNT, TEXT, Reading, inert, list_of, null_or, read
from lmcore.model.config import LayerKind, ModelConfig

KEYS = (
    keys.decoder(
        vocab_size=151_936,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=48,
        num_attention_heads=16,
        num_key_value_heads=2,
        head_dim=256,
        max_position_embeddings=32_768,
    )
    | keys.sparse_keys(
        num_experts=512,
        num_experts_per_tok=10,
        moe_intermediate_size=512,
        norm_topk_prob=True,
    )
    | {
        "partial_rotary_factor": read(keys.number(whole_too=True), 0.25),
        "shared_expert_intermediate_size": read(COUNT, 512),
        "layer_types": read(null_or(list_of(TEXT)), None),
        "full_attention_interval": read(COUNT, 4),
        **{f"linear_{name}": inert(COUNT) for name in ("conv_kernel_dim", "key_head_dim", "value_head_dim")},
        **{f"linear_num_{name}_heads": inert(COUNT) for name in ("key", "value")},
    }
)


def settings(reading: Reading) -> dict[str, Any]:
    """Full attention in every layer, rotated as a whole."""
    kinds = reading["layer_types"]
    if kinds is None:
        interval = reading["full_attention_interval"]
        layers = range(reading["num_hidden_layers"])
        kinds = ["full_attention" if (i + 1) % interval == 0 else "linear_attention" for i in layers]
    keys.layer_letters(reading, "layer_types", kinds, {"full_attention": "A"})
    inside = (reading["rope_scaling"] or reading["rope_parameters"] or {}).get("partial_rotary_factor")
    if inside is None and reading["partial_rotary_factor"] != 1.0:
        reading.refuse("partial_rotary_factor", reading["partial_rotary_factor"])
    ffn = keys.sparse_layers(reading)
    if "e" in ffn["ffn"]:
        keys.require_choice(reading, "num_experts")
        ffn["moe.num_shared"] = shared_experts(
            reading, "shared_expert_intermediate_size", reading["moe_intermediate_size"]
        )
    return keys.heads(reading) | ffn | {"pattern": "A", "gate": "elementwise", "qk_norm": True}


def shared_experts(reading: Reading, key: str, width: int) -> int:
    """How many of our shared experts have the width that `key` says; a narrow one that is none counts as 0."""
    total = reading[key]
    if total % width == 0:
        return int(total // width)
    if total != tensors.EMPTY_SHARED:
        reading.refuse(key, total, f"not a multiple of the experts' width {width}")
    return 0


def config(ours: ModelConfig) -> dict[str, Any]:
    """Angles, kinds of layers, width of the shared expert."""
    return (
        keys.write_rope(ours.rope_theta, partial_rotary_factor=1.0)
        | keys.write_sparse_layers("".join(kind.ffn for kind in ours.layers))
        | {
            "layer_types": ["full_attention"] * ours.num_layers,
            "shared_expert_intermediate_size": ours.moe.num_shared * ours.moe.d_expert or tensors.EMPTY_SHARED,
        }
    )


def layer(ours: ModelConfig, kind: LayerKind, here: str, there: str) -> tensors.Rules:
    """One layer."""
    width, moe = ours.d_model, ours.moe
    yield tensors.norm(f"{here}mixer_norm.weight", f"{there}input_layernorm.weight", width, -1.0)
    yield from tensors.attention(ours, f"{here}mixer.", f"{there}self_attn.", -1.0)
    yield tensors.norm(f"{here}ffn_norm.weight", f"{there}post_attention_layernorm.weight", width, -1.0)
    here, there = f"{here}ffn.", f"{there}mlp."
    if kind.ffn == "d":
        yield from tensors.dense(here, there, width, ours.d_ff)
        return
    yield from tensors.experts(ours, here, there)
    shared = moe.num_shared * moe.d_expert
    if shared:
        yield from tensors.dense(f"{here}shared.", f"{there}shared_expert.", width, shared, 2.0)
    else:
        yield from tensors.no_dense(f"{there}shared_expert.", width, tensors.EMPTY_SHARED)
    yield tensors.zeros(f"{there}shared_expert_gate.weight", (1, width))


def obstacles(ours: ModelConfig, biased: bool) -> list[str]:
    """Softmax scores only."""
    has_experts = any(kind.ffn == "e" for kind in ours.layers)
    return qwen3_moe.softmax_obstacles(ours, biased) if has_experts else []


FAMILY = Family(
    name="qwen3_next",
    architecture="Qwen3NextForCausalLM",
    mixers="A",
    ffns="de",
    keys=KEYS,
    settings=settings,
    config=config,
    rules=lambda ours: tensors.decoder(ours, layer, shift=-1.0),
    qk_norm=True,
    gated=True,
    obstacles=obstacles,
)
