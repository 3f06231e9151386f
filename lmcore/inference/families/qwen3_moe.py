"""qwen3_moe: qwen3 with experts (softmax scores, no shared expert, no selection bias) and one window in all layers or
in none. T/models/qwen3_moe/{configuration,modeling}_qwen3_moe.py."""

from __future__ import annotations

from typing import Any

from lmcore.inference.families import keys, tensors
from lmcore.inference.families.family import Family
from lmcore.inference.families.keys import COUNT, FLAG, Reading, inert, null_or, read, unless_set, whole
from lmcore.model.config import LayerKind, ModelConfig

KEYS = (
    keys.decoder(
        vocab_size=151_936,
        hidden_size=2048,
        intermediate_size=6144,
        num_hidden_layers=24,
        num_attention_heads=32,
        num_key_value_heads=4,
        max_position_embeddings=32_768,
    )
    | keys.sparse_keys(
        num_experts=128,
        num_experts_per_tok=8,
        moe_intermediate_size=768,
        norm_topk_prob=False,
    )
    | {
        "use_sliding_window": read(FLAG, False),
        "sliding_window": read(null_or(COUNT), 4096),
        # Not of this class, but in released files.
        "max_window_layers": inert(whole(0)),
        "qkv_bias": unless_set(False),
        "shared_expert_intermediate_size": unless_set(0),
        "use_qk_norm": unless_set(True),
    }
)


def settings(reading: Reading) -> dict[str, Any]:
    """A window acts in every layer."""
    window = reading["sliding_window"] if reading["use_sliding_window"] else None
    ffn = keys.sparse_layers(reading)
    if "e" in ffn["ffn"]:
        keys.require_choice(reading, "num_experts")
    return (
        keys.heads(reading) | ffn | {"pattern": "A" if window is None else "W", "window": window or 0, "qk_norm": True}
    )


def config(ours: ModelConfig) -> dict[str, Any]:
    """Angles, window and which layers are dense."""
    windowed = ours.layers[0].mixer == "W"
    return (
        keys.write_rope(ours.rope_theta)
        | keys.write_sparse_layers("".join(kind.ffn for kind in ours.layers))
        | {"use_sliding_window": windowed, "sliding_window": ours.window if windowed else None}
    )


def layer(ours: ModelConfig, kind: LayerKind, here: str, there: str) -> tensors.Rules:
    """One layer."""
    yield tensors.norm(f"{here}mixer_norm.weight", f"{there}input_layernorm.weight", ours.d_model)
    yield from tensors.attention(ours, f"{here}mixer.", f"{there}self_attn.")
    yield tensors.norm(f"{here}ffn_norm.weight", f"{there}post_attention_layernorm.weight", ours.d_model)
    if kind.ffn == "e":
        yield from tensors.experts(ours, f"{here}ffn.", f"{there}mlp.")
    else:
        yield from tensors.dense(f"{here}ffn.", f"{there}mlp.", ours.d_model, ours.d_ff)


def softmax_obstacles(ours: ModelConfig, biased: bool) -> list[str]:
    """What no family with softmax scores has a place for."""
    moe, found = ours.moe, []
    if moe.score != "softmax":
        found.append(f"moe.score: {moe.score}")
    if biased:
        found.append("a selection bias that is not zero (moe.bias_rate; train with 0, or with moe.score: sigmoid)")
    if moe.route_scale != 1.0:
        found.append(f"moe.route_scale: {moe.route_scale:g}")
    return found


def obstacles(ours: ModelConfig, biased: bool) -> list[str]:
    """One window for all layers; no shared experts."""
    found = ["windows in some layers only (pattern)"] if len({kind.mixer for kind in ours.layers}) > 1 else []
    if all(kind.ffn != "e" for kind in ours.layers):
        return found
    if ours.moe.num_shared:
        found.append(f"moe.num_shared: {ours.moe.num_shared}")
    return found + softmax_obstacles(ours, biased)


FAMILY = Family(
    name="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    mixers="AW",
    ffns="de",
    keys=KEYS,
    aliases={"num_local_experts": "num_experts"},
    settings=settings,
    config=config,
    rules=lambda ours: tensors.decoder(ours, layer),
    qk_norm=True,
    obstacles=obstacles,
)
