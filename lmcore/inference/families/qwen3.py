"""qwen3: attention with QK-norm, windows in any layers, dense. T/models/qwen3/{configuration,modeling}_qwen3.py."""

from __future__ import annotations

from typing import Any

from lmcore.inference.families import keys, llama, tensors
from lmcore.inference.families.family import Family
from lmcore.inference.families.keys import COUNT, FLAG, TEXT, Reading, list_of, null_or, read, whole
from lmcore.model.config import ModelConfig

KEYS = keys.decoder(
    vocab_size=151_936,
    hidden_size=4096,
    intermediate_size=22_016,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=32,
    null_heads=True,
    head_dim=128,
    max_position_embeddings=32_768,
) | {
    "use_sliding_window": read(FLAG, False),
    "sliding_window": read(null_or(COUNT), 4096),
    "max_window_layers": read(whole(0), 28),
    "layer_types": read(null_or(list_of(TEXT)), None),
}


def settings(reading: Reading) -> dict[str, Any]:
    """The window counts only where use_sliding_window says so."""
    window = reading["sliding_window"] if reading["use_sliding_window"] else None
    return keys.heads(reading) | keys.windows(reading, window) | {"ffn": "d", "qk_norm": True}


def config(ours: ModelConfig) -> dict[str, Any]:
    """Angles and windows."""
    letters = "".join(kind.mixer for kind in ours.layers)
    windows = {"use_sliding_window": "W" in letters} | keys.write_windows(letters, ours.window)
    return keys.write_rope(ours.rope_theta) | windows


FAMILY = Family(
    name="qwen3",
    architecture="Qwen3ForCausalLM",
    mixers="AW",
    ffns="d",
    keys=KEYS,
    settings=settings,
    config=config,
    rules=lambda ours: tensors.decoder(ours, llama.layer),
    qk_norm=True,
)
