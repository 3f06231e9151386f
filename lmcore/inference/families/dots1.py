"""dots1: qwen3 with experts: sigmoid scores, selection bias, shared experts, scaled routing.
T/models/dots1/{configuration,modeling}_dots1.py."""

from __future__ import annotations

from typing import Any

from lmcore.inference.families import keys, tensors
from lmcore.inference.families.family import Family
from lmcore.inference.families.keys import (
    COUNT,
    FLAG,
    MOST_EXPERTS,
    TEXT,
    Reading,
    fixed,
    inert,
    list_of,
    null_or,
    number,
    read,
    unless_set,
    whole,
)
from lmcore.model.config import LayerKind, ModelConfig

KEYS = keys.decoder(
    vocab_size=152_064,
    hidden_size=4608,
    intermediate_size=10_944,
    num_hidden_layers=62,
    num_attention_heads=32,
    num_key_value_heads=32,
    null_heads=True,
    max_position_embeddings=2048,
) | {
    "n_routed_experts": read(whole(1, MOST_EXPERTS), None, "moe.num_experts"),
    "n_shared_experts": read(whole(1, MOST_EXPERTS), None),
    "num_experts_per_tok": read(COUNT, None, "moe.top_k"),
    "moe_intermediate_size": read(COUNT, 1408, "moe.d_expert"),
    "norm_topk_prob": read(FLAG, False, "moe.route_norm"),
    "routed_scaling_factor": read(number(high=1e6), 1.0, "moe.route_scale"),
    "first_k_dense_replace": read(whole(0), 0),
    "n_group": fixed(1),
    "topk_group": fixed(1),
    "output_router_logits": fixed(False, written=False),
    "sliding_window": read(null_or(COUNT), 4096),
    "max_window_layers": read(whole(0), 62),
    "layer_types": read(null_or(list_of(TEXT)), None),
    # Not of this class, but in files.
    "use_sliding_window": inert(FLAG),  # it asks for sliding_window only
    "moe_layer_freq": unless_set(1),
    "pretraining_tp": inert(COUNT),
    "scoring_func": unless_set("noaux_tc", "sigmoid"),
}


def settings(reading: Reading) -> dict[str, Any]:
    """Dense layers first, then experts."""
    for key in ("n_routed_experts", "n_shared_experts", "num_experts_per_tok"):
        if reading[key] is None:
            raise reading.wrong(key, None, COUNT)
    dense, layers = reading["first_k_dense_replace"], reading["num_hidden_layers"]
    ffns = "".join("d" if i < dense else "e" for i in range(layers))
    if "e" in ffns:
        keys.require_choice(reading, "n_routed_experts")
        if reading["n_routed_experts"] < 2:
            reading.refuse("n_routed_experts", reading["n_routed_experts"], "its class judges a group by its best two")
    return (
        keys.heads(reading)
        | keys.windows(reading, reading["sliding_window"])
        | keys.experts(reading, ffns, bias_rate=1e-3, score="sigmoid", num_shared=reading["n_shared_experts"])
        | {"qk_norm": True}
    )


def config(ours: ModelConfig) -> dict[str, Any]:
    """Angles, windows and the number of dense layers."""
    letters = "".join(kind.mixer for kind in ours.layers)
    return (
        keys.write_rope(ours.rope_theta)
        | keys.write_windows(letters, ours.window)
        | {
            "n_shared_experts": max(1, ours.moe.num_shared),
            "first_k_dense_replace": sum(kind.ffn == "d" for kind in ours.layers),
        }
    )


def layer(ours: ModelConfig, kind: LayerKind, here: str, there: str) -> tensors.Rules:
    """One layer. Their class insists on a shared expert: zeros where we have none."""
    width, moe = ours.d_model, ours.moe
    yield tensors.norm(f"{here}mixer_norm.weight", f"{there}input_layernorm.weight", width)
    yield from tensors.attention(ours, f"{here}mixer.", f"{there}self_attn.")
    yield tensors.norm(f"{here}ffn_norm.weight", f"{there}post_attention_layernorm.weight", width)
    here, there = f"{here}ffn.", f"{there}mlp."
    if kind.ffn == "d":
        yield from tensors.dense(here, there, width, ours.d_ff)
        return
    yield from tensors.experts(ours, here, there)
    yield tensors.same(f"{here}router.bias", f"{there}gate.e_score_correction_bias", (moe.num_experts,))
    if moe.num_shared:
        yield from tensors.dense(f"{here}shared.", f"{there}shared_experts.", width, moe.num_shared * moe.d_expert)
    else:
        yield from tensors.no_dense(f"{there}shared_experts.", width, moe.d_expert)


def obstacles(ours: ModelConfig, biased: bool) -> list[str]:
    """Its scores are sigmoids, its dense layers come first, and its groups want two experts."""
    ffns = [kind.ffn for kind in ours.layers]
    if "e" not in ffns:
        return []
    found = []
    if ours.moe.score != "sigmoid":
        found.append(f"moe.score: {ours.moe.score}")
    if ours.moe.num_experts < 2:
        found.append(f"moe.num_experts: {ours.moe.num_experts} (its class chooses groups by their best two)")
    if ffns != sorted(ffns):
        found.append("dense layers after expert layers (ffn)")
    return found


FAMILY = Family(
    name="dots1",
    architecture="Dots1ForCausalLM",
    mixers="AW",
    ffns="de",
    keys=KEYS,
    aliases={"num_local_experts": "n_routed_experts"},
    settings=settings,
    config=config,
    rules=lambda ours: tensors.decoder(ours, layer),
    qk_norm=True,
    obstacles=obstacles,
)
