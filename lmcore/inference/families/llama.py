"""llama: attention without QK-norm, dense. T/models/llama/{configuration,modeling}_llama.py."""

from __future__ import annotations

from typing import Any

from lmcore.inference.families import keys, tensors
from lmcore.inference.families.family import Family
from lmcore.inference.families.keys import COUNT, FLAG, Reading, fixed, inert, null_or, unless_set
from lmcore.model.config import LayerKind, ModelConfig

KEYS = keys.decoder(
    vocab_size=32_000,
    hidden_size=4096,
    intermediate_size=11_008,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=None,
    null_heads=True,
    null_head_dim=True,
    max_position_embeddings=2048,
) | {
    "mlp_bias": fixed(False),
    "pretraining_tp": inert(null_or(COUNT)),
    # Not of this class, which looks at none of them; written by programs whose models are otherwise the same.
    "sliding_window": unless_set(None),
    "use_sliding_window": unless_set(False),
    "rope_interleaved": unless_set(False),
    "is_llama_config": inert(FLAG),
    "max_sequence_length": inert(COUNT),
}


def settings(reading: Reading) -> dict[str, Any]:
    """Their class wants heads that divide the width, whatever head_dim says."""
    width, count = reading["hidden_size"], reading["num_attention_heads"]
    if width % count:
        reading.refuse("hidden_size", width, f"not a multiple of num_attention_heads {count}")
    return keys.heads(reading) | {"pattern": "A", "ffn": "d", "qk_norm": False}


def config(ours: ModelConfig) -> dict[str, Any]:
    """The angles."""
    return keys.write_rope(ours.rope_theta)


def layer(ours: ModelConfig, kind: LayerKind, here: str, there: str) -> tensors.Rules:
    """One layer."""
    yield tensors.norm(f"{here}mixer_norm.weight", f"{there}input_layernorm.weight", ours.d_model)
    yield from tensors.attention(ours, f"{here}mixer.", f"{there}self_attn.")
    yield tensors.norm(f"{here}ffn_norm.weight", f"{there}post_attention_layernorm.weight", ours.d_model)
    yield from tensors.dense(f"{here}ffn.", f"{there}mlp.", ours.d_model, ours.d_ff)


def obstacles(ours: ModelConfig, biased: bool) -> list[str]:
    """Their class refuses to be built then."""
    odd = ours.d_model % ours.num_heads
    return [f"d_model {ours.d_model} (not a multiple of num_heads {ours.num_heads})"] if odd else []


FAMILY = Family(
    name="llama",
    architecture="LlamaForCausalLM",
    mixers="A",
    ffns="d",
    keys=KEYS,
    settings=settings,
    config=config,
    rules=lambda ours: tensors.decoder(ours, layer),
    obstacles=obstacles,
)
