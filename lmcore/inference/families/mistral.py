"""mistral: llama with one window in all layers or in none. T/models/mistral/{configuration,modeling}_mistral.py."""

from __future__ import annotations

from typing import Any

from lmcore.inference.families import keys, llama, tensors
from lmcore.inference.families.family import Family
from lmcore.inference.families.keys import COUNT, Reading, null_or, read, unless_set
from lmcore.model.config import ModelConfig

KEYS = keys.decoder(
    vocab_size=32_000,
    hidden_size=4096,
    intermediate_size=14_336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    null_head_dim=True,
    max_position_embeddings=131_072,
) | {
    "sliding_window": read(null_or(COUNT), 4096),
    # Not of this class, which has no biases.
    "attention_bias": unless_set(False),
    "mlp_bias": unless_set(False),
}


def settings(reading: Reading) -> dict[str, Any]:
    """A window acts in every layer; null means none."""
    window = reading["sliding_window"]
    return keys.heads(reading) | {
        "pattern": "A" if window is None else "W",
        "window": window or 0,
        "ffn": "d",
        "qk_norm": False,
    }


def config(ours: ModelConfig) -> dict[str, Any]:
    """Angles and window."""
    window = ours.window if ours.layers[0].mixer == "W" else None
    return keys.write_rope(ours.rope_theta) | {"sliding_window": window}


def obstacles(ours: ModelConfig, biased: bool) -> list[str]:
    """One window for all layers."""
    return ["windows in some layers only (pattern)"] if len({kind.mixer for kind in ours.layers}) > 1 else []


FAMILY = Family(
    name="mistral",
    architecture="MistralForCausalLM",
    mixers="AW",
    ffns="d",
    keys=KEYS,
    settings=settings,
    config=config,
    rules=lambda ours: tensors.decoder(ours, llama.layer),
    obstacles=obstacles,
)
