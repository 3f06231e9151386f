"""mamba2: Mamba-2 only, without feed-forwards. T/models/mamba2/{configuration,modeling}_mamba2.py.

Groups of heads are normed one by one, as transformers 5.23 does; older versions may norm over the whole width.
"""

from __future__ import annotations

import math
from typing import Any

from lmcore.inference.families import tensors
from lmcore.inference.families.family import Family
from lmcore.inference.families.keys import (
    COMMON,
    COUNT,
    FLAG,
    MOST_LAYERS,
    TEXT,
    Key,
    Kind,
    Reading,
    fixed,
    inert,
    number,
    read,
    unless_set,
    whole,
    zero_or,
)
from lmcore.model.config import LayerKind, ModelConfig


def time_step_limit() -> Key:
    """Bounds of the step size: none but 0 is ours. Files say infinity as a number or as transformers 5 writes it."""
    return Key(None, [0.0, math.inf], only=([0.0, math.inf], [0.0, {"__float__": "Infinity"}], (0.0, math.inf)))


KEYS = COMMON | {
    "vocab_size": read(COUNT, 32_768, "vocab_size"),
    "hidden_size": read(COUNT, 4096, "d_model"),
    "num_hidden_layers": read(whole(1, MOST_LAYERS), 64, "num_layers"),
    "initializer_range": read(number(), 0.1, "init_std"),
    "layer_norm_epsilon": read(number(), 1e-5, "norm_eps"),
    "tie_word_embeddings": read(FLAG, False, "tie_embeddings"),
    "num_heads": read(COUNT, 128),
    "head_dim": read(COUNT, 64, "mamba.head_dim"),
    "state_size": read(COUNT, 128, "mamba.d_state"),
    "expand": read(COUNT, 2, "mamba.expand"),
    "n_groups": read(COUNT, 8, "mamba.num_groups"),
    "conv_kernel": read(whole(2), 4, "mamba.conv_width"),
    "chunk_size": read(whole(1, 4096), 256, "mamba.chunk_size"),
    # Not of this class, whose models know no length; ours are trained with one.
    "max_position_embeddings": read(COUNT, 2048, "context_length"),
    "hidden_act": fixed("silu", "swish"),
    "use_bias": fixed(False),
    "use_conv_bias": fixed(True),
    "time_step_limit": time_step_limit(),
    "residual_in_fp32": inert(FLAG),
    # Not of this class, but in released files: it always norms, after the gate, whatever the second says.
    "rms_norm": unless_set(True),
    "norm_before_gate": inert(FLAG),
    "intermediate_size": inert(COUNT),
    "time_step_init_scheme": inert(TEXT),
    "time_step_scale": inert(number(high=1e6)),
    # How a new model is drawn.
    "rescale_prenorm_residual": fixed(False, written=False),  # true: transformers scales what it has loaded
    "time_step_rank": inert(Kind(lambda v: v == "auto" or COUNT.holds(v), f'"auto" or {COUNT.says}')),
    "time_step_min": inert(number(high=1e6)),
    "time_step_max": inert(number(high=1e6)),
    "time_step_floor": inert(zero_or(number(high=1e6))),
}


def settings(reading: Reading) -> dict[str, Any]:
    """Their class counts heads twice."""
    inner, count, size = reading["hidden_size"] * reading["expand"], reading["num_heads"], reading["head_dim"]
    if count * size != inner:
        reading.refuse("num_heads", count, f"times head_dim {size} is not hidden_size * expand {inner}")
    check_groups(reading, "n_groups", count)
    return {"pattern": "M", "ffn": "-", "qk_norm": False, "num_heads": 1}


def check_groups(reading: Reading, key: str, heads: int) -> None:
    """Groups hold equally many heads."""
    if heads % reading[key]:
        reading.refuse(key, reading[key], f"the number of heads, {heads}, is not a multiple of it")


def config(ours: ModelConfig) -> dict[str, Any]:
    """The number of heads, and norms as older versions name them."""
    return {"num_heads": ours.mamba_heads, "rms_norm": True, "residual_in_fp32": False}


def layer(ours: ModelConfig, kind: LayerKind, here: str, there: str) -> tensors.Rules:
    """One layer."""
    yield tensors.norm(f"{here}mixer_norm.weight", f"{there}norm.weight", ours.d_model)
    yield from tensors.mamba(ours, f"{here}mixer.", f"{there}mixer.")


FAMILY = Family(
    name="mamba2",
    architecture="Mamba2ForCausalLM",
    mixers="M",
    ffns="-",
    keys=KEYS,
    settings=settings,
    config=config,
    rules=lambda ours: tensors.decoder(ours, layer, root="backbone.", embedding="embeddings", final="norm_f"),
)
