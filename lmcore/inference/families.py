"""Our models as architectures of Hugging Face transformers, and back: configuration and weights, nothing else.

    family            carries
    llama             attention without QK-norm, dense
    qwen3             attention with QK-norm, sliding windows in any layers, dense
    qwen3_moe         the same with experts: softmax scores, no shared expert, no selection bias
    dots1             the same with sigmoid scores, selection bias, shared experts, scaled routing
    qwen3_next        attention with QK-norm and output gate (headwise gates become elementwise ones), shared experts
    granitemoehybrid  attention and Mamba-2 in any layers, without QK-norm; dense, or softmax experts normalised over
                      the chosen ones, shared experts
    mamba2            Mamba-2 only, without feed-forwards

Routed Mamba, resonance, Mixture-of-Depths and multi-token heads exist nowhere else; `obstacles` names what stands in
the way of each family. Weights are moved and split, never changed, so the logits are equal up to rounding:

    q_proj, k_proj, v_proj    rows of our fused qkv; rotary planes are (i, i + K/2) in both
    gate (qwen3_next)         rows of q_proj, interleaved per head: [query K rows, gate K rows]
    RMSNorm (qwen3_next)      stored as w - 1
    shared expert             where a family insists on one: zeros; where it insists on a gate for it (qwen3_next):
                              gate weights 0, so sigmoid = 1/2, and a doubled down_proj
    vocabulary                padding rows are left out, so that no impossible token can be drawn

One list of `Rule`s per model says which of our tensors are which of theirs; export applies it forwards, import
backwards.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lmcore.errors import Exit, LmError
from lmcore.model.config import LayerKind, ModelConfig

FAMILIES = ("llama", "qwen3", "qwen3_moe", "dots1", "qwen3_next", "granitemoehybrid", "mamba2")
"""In the order in which they are tried: the simplest architecture that carries a model is the best known one."""

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "dots1": "Dots1ForCausalLM",
    "qwen3_next": "Qwen3NextForCausalLM",
    "granitemoehybrid": "GraniteMoeHybridForCausalLM",
    "mamba2": "Mamba2ForCausalLM",
}

_ALIASES = {"mistral": "llama"}
"""Read like another family; what differs is checked when the configuration is read."""

_EMPTY_SHARED = 8  # width of a shared expert that a family insists on and that does nothing

Split = Callable[[Tensor], list[Tensor]]
Join = Callable[[list[Tensor]], Tensor]


@dataclass(frozen=True)
class Rule:
    """One of our tensors and the tensors of theirs that hold the same numbers."""

    ours: str
    theirs: tuple[str, ...]
    split: Split = field(repr=False)
    join: Join = field(repr=False)


# ---------------------------------------------------------------------------------------- which family


def obstacles(config: ModelConfig, family: str, *, biased: bool = False, drop_mtp: bool = False) -> list[str]:
    """What keeps a family from carrying a model, in the names of our settings; empty when it can.

    biased: whether some router's selection bias is not zero.
    """
    found = []
    mixers = {layer.mixer for layer in config.layers}
    ffns = {layer.ffn for layer in config.layers}
    for letter, name in (("R", "routed Mamba (pattern R)"), ("F", "resonance (pattern F)")):
        if letter in mixers:
            found.append(name)
    if any(layer.depth == "m" for layer in config.layers):
        found.append("Mixture-of-Depths (depth m)")
    if config.mtp.depths and not drop_mtp:
        found.append("multi-token heads (mtp; --drop-mtp leaves them out, the model itself does not depend on them)")
    found += [f"pattern {letter}" for letter in sorted(mixers - set(_MIXERS[family]) - {"R", "F"})]
    found += [f"ffn {letter}" for letter in sorted(ffns - set(_FFNS[family]))]
    if mixers & set("AW"):
        if family in ("llama", "granitemoehybrid") and config.qk_norm:
            found.append("qk_norm: true")
        if family in ("qwen3", "qwen3_moe", "dots1", "qwen3_next") and not config.qk_norm:
            found.append("qk_norm: false")
        if family == "qwen3_next" and config.gate == "none":
            found.append("gate: none")
        if family != "qwen3_next" and config.gate != "none":
            found.append(f"gate: {config.gate}")
        if family == "granitemoehybrid" and config.head_dim * config.num_heads != config.d_model:
            found.append(f"head_dim {config.head_dim} (d_model / num_heads is {config.d_model / config.num_heads:g})")
    if mixers & set("M") and config.mamba.num_groups != 1:
        found.append(f"mamba.num_groups {config.mamba.num_groups}")
    if "e" in ffns and family in ("qwen3_moe", "dots1", "qwen3_next", "granitemoehybrid"):
        found += _expert_obstacles(config, family, biased)
    return found


_MIXERS = {
    "llama": "A",
    "qwen3": "AW",
    "qwen3_moe": "A",
    "dots1": "AW",
    "qwen3_next": "A",
    "granitemoehybrid": "AM",
    "mamba2": "M",
}
_FFNS = {
    "llama": "d",
    "qwen3": "d",
    "qwen3_moe": "de",
    "dots1": "de",
    "qwen3_next": "de",
    "granitemoehybrid": "de",
    "mamba2": "-",
}


def _expert_obstacles(config: ModelConfig, family: str, biased: bool) -> list[str]:
    moe, found = config.moe, []
    ffns = [layer.ffn for layer in config.layers]
    if (moe.score == "sigmoid") != (family == "dots1"):
        found.append(f"moe.score: {moe.score}")
    if biased and family != "dots1":
        found.append("a selection bias that is not zero (moe.bias_rate; train with 0, or with moe.score: sigmoid)")
    if moe.route_scale != 1.0 and family != "dots1":
        found.append(f"moe.route_scale: {moe.route_scale:g}")
    if moe.num_shared and family == "qwen3_moe":
        found.append(f"moe.num_shared: {moe.num_shared}")
    if family == "granitemoehybrid" and not moe.route_norm and moe.top_k > 1:
        found.append("moe.route_norm: false")
    if family == "granitemoehybrid" and moe.top_k == 1:
        found.append("moe.top_k: 1 (its only expert would get the weight 1)")
    if family == "granitemoehybrid" and "d" in ffns:
        found.append("dense layers beside expert layers (ffn)")
    if family == "dots1" and ffns != sorted(ffns):
        found.append("dense layers after expert layers (ffn)")
    return found


def choose(config: ModelConfig, *, biased: bool = False, drop_mtp: bool = False) -> str:
    """The first family that carries a model; LmError (2) that names the obstacles of the nearest one."""
    reasons = {name: obstacles(config, name, biased=biased, drop_mtp=drop_mtp) for name in FAMILIES}
    for name, found in reasons.items():
        if not found:
            return name
    # A missing kind of layer weighs more than any setting.
    nearest = min(
        FAMILIES, key=lambda name: (sum(r.startswith(("pattern ", "ffn ")) for r in reasons[name]), len(reasons[name]))
    )
    raise _refusal(nearest, reasons[nearest], "no family of transformers carries this model; the nearest, ")


def require(config: ModelConfig, family: str, *, biased: bool = False, drop_mtp: bool = False) -> None:
    """LmError (2) when a family does not exist or cannot carry a model."""
    if family not in FAMILIES:
        raise LmError(f"{family}: no family of this name is known.", hint=f"Choose one of: {', '.join(FAMILIES)}.")
    if found := obstacles(config, family, biased=biased, drop_mtp=drop_mtp):
        raise _refusal(family, found, "")


def _refusal(family: str, found: Sequence[str], before: str) -> LmError:
    return LmError(
        f"{before}{family}{',' if before else ''} has no place for: {'; '.join(found)}.",
        hint="The checkpoint itself is safetensors and JSON: lm export RUN --out FILE --format safetensors writes it "
        "as one file.",
    )


# ---------------------------------------------------------------------------------------- configuration


def to_hf_config(config: ModelConfig, family: str) -> dict[str, Any]:
    """config.json of a family for a model that it carries."""
    mixers = [layer.mixer for layer in config.layers]
    common: dict[str, Any] = {
        "architectures": [ARCHITECTURES[family]],
        "model_type": family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.num_layers,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.init_std,
        "use_cache": True,
    }
    if family == "mamba2":
        return common | {
            "layer_norm_epsilon": config.norm_eps,
            "num_heads": config.mamba_heads,
            "head_dim": config.mamba.head_dim,
            "state_size": config.mamba.d_state,
            "expand": config.mamba.expand,
            "n_groups": config.mamba.num_groups,
            "conv_kernel": config.mamba.conv_width,
            "chunk_size": config.mamba.chunk_size,
            "use_conv_bias": True,
            "use_bias": False,
            "rms_norm": True,
            "residual_in_fp32": False,
            "hidden_act": "silu",
        }
    partial = {"partial_rotary_factor": 1.0} if family == "qwen3_next" else {}
    common |= {
        "intermediate_size": config.d_ff,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.context_length,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,  # where readers before transformers 5 look
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta} | partial,
        "attention_bias": False,
        "attention_dropout": 0.0,
    } | partial
    if family == "llama":
        return common | {"mlp_bias": False}
    if family == "granitemoehybrid":
        return common | _granite_config(config, mixers)
    if "W" in mixers or family == "dots1":
        kinds = {"A": "full_attention", "W": "sliding_attention"}
        common["layer_types"] = [kinds[mixer] for mixer in mixers]
    if "W" in mixers:
        common |= {"use_sliding_window": True, "sliding_window": config.window, "max_window_layers": 0}
    if family == "qwen3_next":
        common["layer_types"] = ["full_attention"] * config.num_layers
    if family in ("qwen3_moe", "qwen3_next"):
        common |= {
            "num_experts": config.moe.num_experts,
            "num_experts_per_tok": config.moe.top_k,
            "moe_intermediate_size": config.moe.d_expert,
            "norm_topk_prob": bool(config.moe.route_norm),
            "decoder_sparse_step": 1,
            "mlp_only_layers": [i for i, layer in enumerate(config.layers) if layer.ffn == "d"],
            "router_aux_loss_coef": config.moe.balance_weight,
        }
    if family == "qwen3_next":
        common["shared_expert_intermediate_size"] = config.moe.num_shared * config.moe.d_expert or _EMPTY_SHARED
    if family == "dots1":
        common |= {
            "n_routed_experts": config.moe.num_experts,
            "n_shared_experts": max(1, config.moe.num_shared),
            "num_experts_per_tok": config.moe.top_k,
            "moe_intermediate_size": config.moe.d_expert,
            "norm_topk_prob": bool(config.moe.route_norm),
            "routed_scaling_factor": config.moe.route_scale,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": sum(layer.ffn == "d" for layer in config.layers),
        }
    return common


def _granite_config(config: ModelConfig, mixers: Sequence[str]) -> dict[str, Any]:
    experts = any(layer.ffn == "e" for layer in config.layers)
    shared = (config.moe.num_shared * config.moe.d_expert or _EMPTY_SHARED) if experts else config.d_ff
    values: dict[str, Any] = {
        # The names of older versions, which newer ones translate.
        "layer_types": ["mamba" if mixer == "M" else "attention" for mixer in mixers],
        "position_embedding_type": "rope",
        "attention_multiplier": config.head_dim**-0.5,
        "embedding_multiplier": 1.0,
        "logits_scaling": 1.0,
        "residual_multiplier": 1.0,
        "num_local_experts": config.moe.num_experts if experts else 0,
        "num_experts_per_tok": config.moe.top_k if experts else 0,
        "intermediate_size": config.moe.d_expert if experts else config.d_ff,
        "shared_intermediate_size": shared,
        "mamba_conv_bias": True,
        "mamba_proj_bias": False,
    }
    if "M" in mixers:
        values |= {
            "mamba_n_heads": config.mamba_heads,
            "mamba_d_head": config.mamba.head_dim,
            "mamba_n_groups": config.mamba.num_groups,
            "mamba_d_state": config.mamba.d_state,
            "mamba_d_conv": config.mamba.conv_width,
            "mamba_expand": config.mamba.expand,
            "mamba_chunk_size": config.mamba.chunk_size,
        }
    else:  # no such layer, but the class checks the numbers
        values |= {"mamba_n_heads": 1, "mamba_d_head": config.d_model, "mamba_expand": 1}
    return values


def from_hf_config(hf: Mapping[str, Any], where: str) -> tuple[str, ModelConfig]:
    """(family, our configuration) of a config.json; LmError (2) that names every setting that we cannot carry."""
    named = str(hf.get("model_type"))
    family = _ALIASES.get(named, named)
    if family not in FAMILIES:
        raise LmError(
            f"{where}: the architecture {named} cannot be imported.",
            hint=f"These can: {', '.join([*FAMILIES, *_ALIASES])}.",
        )
    problems = _foreign_settings(hf, family)
    if problems:
        raise LmError(f"{where}: settings that our {family} models do not have: {'; '.join(problems)}.")
    try:
        config = ModelConfig.model_validate(_ours(hf, family))
    except (KeyError, TypeError, ValueError) as error:
        raise LmError(f"{where}: not a usable configuration ({error}).", code=Exit.DATA) from error
    return family, config


def _foreign_settings(hf: Mapping[str, Any], family: str) -> list[str]:
    """Settings of a config.json that change the mathematics into something that we do not compute."""
    expected: dict[str, Any] = {
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "attention_multiplier": None,
        "use_bias": False,
        "use_conv_bias": True,
        "mamba_conv_bias": True,
        "mamba_proj_bias": False,
        "embedding_multiplier": 1.0,
        "logits_scaling": 1.0,
        "residual_multiplier": 1.0,
        "n_group": 1,
        "decoder_sparse_step": 1,
        "head_dim": None,
    }
    found = []
    for key, value in expected.items():
        if value is not None and hf.get(key, value) not in (value, None):
            found.append(f"{key}: {hf[key]}")
    rope = _rope(hf)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", None) or (hf.get("rope_scaling") or {}).get("rope_type", "default") != "default":
        found.append(f"rope_type: {kind if kind != 'default' else hf['rope_scaling'].get('rope_type')}")
    share = rope.get("partial_rotary_factor", hf.get("partial_rotary_factor", 0.25 if family == "qwen3_next" else 1.0))
    if share != 1.0:
        found.append(f"partial_rotary_factor: {share}")
    if family == "llama" and hf.get("sliding_window"):
        found.append(f"sliding_window: {hf['sliding_window']}")
    if family == "qwen3_moe" and hf.get("use_sliding_window"):
        found.append("use_sliding_window: true")
    if family == "qwen3_next" and set(hf.get("layer_types") or ["linear_attention"]) != {"full_attention"}:
        found.append("linear_attention layers")
    if family == "granitemoehybrid":
        heads, width = hf.get("num_attention_heads", 1), hf.get("hidden_size", 1)
        if abs(float(hf.get("attention_multiplier", 1.0)) * (width // heads) ** 0.5 - 1) > 1e-6:
            found.append(f"attention_multiplier: {hf.get('attention_multiplier', 1.0)}")
        if hf.get("position_embedding_type") != "rope":
            found.append(f"position_embedding_type: {hf.get('position_embedding_type')}")
    if family == "mamba2" and hf.get("n_groups", 8) != 1:
        found.append(f"n_groups: {hf.get('n_groups', 8)} (its norm has groups)")
    if family == "granitemoehybrid" and hf.get("mamba_n_groups", 1) != 1:
        found.append(f"mamba_n_groups: {hf['mamba_n_groups']} (its norm has groups)")
    return found


def _rope(hf: Mapping[str, Any]) -> dict[str, Any]:
    return dict(hf.get("rope_parameters") or {})


def _ours(hf: Mapping[str, Any], family: str) -> dict[str, Any]:
    """Our settings for a config.json that `_foreign_settings` accepts."""
    layers = int(hf["num_hidden_layers"])
    values: dict[str, Any] = {
        "vocab_size": hf["vocab_size"],
        "d_model": hf["hidden_size"],
        "num_layers": layers,
        "tie_embeddings": bool(hf.get("tie_word_embeddings", False)),
        "init_std": hf.get("initializer_range", 0.02),
    }
    if family == "mamba2":
        return values | {
            "pattern": "M",
            "ffn": "-",
            "norm_eps": hf.get("layer_norm_epsilon", 1e-5),
            "qk_norm": False,
            "num_heads": 1,
            "mamba": {
                "d_state": hf.get("state_size", 128),
                "head_dim": hf.get("head_dim", 64),
                "expand": hf.get("expand", 2),
                "conv_width": hf.get("conv_kernel", 4),
            },
        }
    heads = int(hf["num_attention_heads"])
    values |= {
        "num_heads": heads,
        "num_kv_heads": hf.get("num_key_value_heads") or heads,
        "head_dim": hf.get("head_dim") or hf["hidden_size"] // heads,
        "d_ff": hf["intermediate_size"],
        "context_length": hf.get("max_position_embeddings", 2048),
        "rope_theta": _rope(hf).get("rope_theta", hf.get("rope_theta", 10_000.0)),
        "norm_eps": hf.get("rms_norm_eps", 1e-6),
        "qk_norm": family in ("qwen3", "qwen3_moe", "dots1", "qwen3_next"),
        "gate": "elementwise" if family == "qwen3_next" else "none",
    }
    if family in ("qwen3", "dots1"):
        kinds = hf.get("layer_types") or []
        if "sliding_attention" in kinds and hf.get("sliding_window"):
            values |= {
                "pattern": "".join("W" if kind == "sliding_attention" else "A" for kind in kinds),
                "window": hf["sliding_window"],
            }
    if family in ("qwen3_moe", "qwen3_next"):
        dense = set(hf.get("mlp_only_layers") or ())
        width = hf["moe_intermediate_size"]
        values["ffn"] = "".join("d" if i in dense else "e" for i in range(layers))
        values["moe"] = {
            "num_experts": hf.get("num_experts", hf.get("num_local_experts")),
            "top_k": hf["num_experts_per_tok"],
            "d_expert": width,
            "route_norm": bool(hf.get("norm_topk_prob", family == "qwen3_next")),
            "num_shared": hf.get("shared_expert_intermediate_size", 0) // width if family == "qwen3_next" else 0,
        }
    if family == "dots1":
        values["ffn"] = "".join("d" if i < (hf.get("first_k_dense_replace") or 0) else "e" for i in range(layers))
        values["moe"] = {
            "num_experts": hf["n_routed_experts"],
            "top_k": hf["num_experts_per_tok"],
            "d_expert": hf["moe_intermediate_size"],
            "route_norm": bool(hf.get("norm_topk_prob", False)),
            "route_scale": hf.get("routed_scaling_factor", 1.0),
            "score": "sigmoid",
            "num_shared": hf.get("n_shared_experts") or 0,
        }
    if family == "granitemoehybrid":
        kinds = hf.get("layer_types") or ["mamba"] * layers
        values["pattern"] = "".join("M" if kind in ("mamba", "linear_attention") else "A" for kind in kinds)
        experts = hf.get("num_local_experts", 8)
        values["d_ff"] = hf["shared_intermediate_size"]
        values["head_dim"] = hf["hidden_size"] // heads
        if "M" in values["pattern"]:
            inner = hf.get("mamba_expand", 2) * hf["hidden_size"]
            values["mamba"] = {
                "d_state": hf.get("mamba_d_state", 256),
                "head_dim": inner // hf.get("mamba_n_heads", 128),
                "expand": hf.get("mamba_expand", 2),
                "conv_width": hf.get("mamba_d_conv", 4),
            }
        if experts:
            width = hf["intermediate_size"]
            values["ffn"] = "e"
            values["moe"] = {
                "num_experts": experts,
                "top_k": hf["num_experts_per_tok"],
                "d_expert": width,
                "route_norm": True,
                "num_shared": hf["shared_intermediate_size"] // width,
            }
    # A scaffold of one letter per layer shortens to its period.
    for key in ("pattern", "ffn"):
        if key in values:
            values[key] = _period(values[key])
    if "moe" in values:
        values["moe"] |= {"bias_rate": 0.0 if family != "dots1" else 1e-3}
    return values


def _period(letters: str) -> str:
    """'AMAM' -> 'AM': the shortest string that tiles to the same layers."""
    for length in range(1, len(letters)):
        if all(letters[i] == letters[i % length] for i in range(len(letters))):
            return letters[:length]
    return letters


# ---------------------------------------------------------------------------------------- weights


def to_hf_tensors(tensors: Mapping[str, Tensor], config: ModelConfig, family: str) -> dict[str, Tensor]:
    """Our tensors by name -> theirs. Multi-token heads and zero selection biases are left out."""
    result: dict[str, Tensor] = {}
    for rule in rules(config, family):
        parts = rule.split(tensors[rule.ours]) if rule.ours else rule.split(torch.empty(0))
        result |= dict(zip(rule.theirs, parts, strict=True))
    return {name: tensor.contiguous() for name, tensor in result.items()}


def from_hf_tensors(theirs: Mapping[str, Tensor], config: ModelConfig, family: str, where: str) -> dict[str, Tensor]:
    """Their tensors by name -> ours, in fp32. LmError (65) for a missing, misshapen or unknown tensor."""
    result: dict[str, Tensor] = {}
    used: set[str] = set()
    for rule in rules(config, family):
        missing = next((name for name in rule.theirs if name not in theirs), None)
        if missing is not None:
            raise LmError(f"{where}: the tensor {missing} is missing.", code=Exit.DATA)
        used.update(rule.theirs)
        if rule.ours:
            result[rule.ours] = rule.join([theirs[name].float() for name in rule.theirs])
        elif any(bool(theirs[name].any()) for name in rule.theirs):
            raise LmError(f"{where}: {rule.theirs[-1]} is not zero, and our models have no place for it.")
    unknown = sorted(name for name in set(theirs) - used if not name.endswith("rotary_emb.inv_freq"))
    if config.tie_embeddings and "lm_head.weight" in unknown:
        unknown.remove("lm_head.weight")
    if unknown:
        raise LmError(f"{where}: the tensor {unknown[0]} has no place in our model ({len(unknown)} such).")
    return result


def rules(config: ModelConfig, family: str) -> list[Rule]:
    """Which of our tensors are which of theirs."""
    root = "backbone." if family == "mamba2" else "model."
    shift = -1.0 if family == "qwen3_next" else 0.0
    vocabulary, rest = config.vocab_size, config.padded_vocab - config.vocab_size

    def rows(tensor: Tensor) -> list[Tensor]:
        return [tensor[:vocabulary]]

    def padded(parts: list[Tensor]) -> Tensor:
        return torch.cat([parts[0], parts[0].new_zeros(rest, parts[0].shape[1])])

    embedding, final = ("embeddings", "norm_f") if family == "mamba2" else ("embed_tokens", "norm")
    found = [Rule("embedding.weight", (f"{root}{embedding}.weight",), rows, padded)]
    for index, layer in enumerate(config.layers):
        found += _layer_rules(config, family, layer, f"blocks.{index}.", f"{root}layers.{index}.")
    found.append(_norm("norm.weight", f"{root}{final}.weight", shift))
    if not config.tie_embeddings:
        found.append(Rule("head.weight", ("lm_head.weight",), rows, padded))
    return found


def _layer_rules(config: ModelConfig, family: str, layer: LayerKind, ours: str, theirs: str) -> list[Rule]:
    shift = -1.0 if family == "qwen3_next" else 0.0
    norm = "norm" if family == "mamba2" else "input_layernorm"
    found = [_norm(f"{ours}mixer_norm.weight", f"{theirs}{norm}.weight", shift)]
    if layer.mixer == "M":
        found += _mamba_rules(f"{ours}mixer.", f"{theirs}{'mixer' if family == 'mamba2' else 'mamba'}.")
    else:
        found += _attention_rules(config, family, f"{ours}mixer.", f"{theirs}self_attn.", shift)
    if layer.ffn != "-":
        found.append(_norm(f"{ours}ffn_norm.weight", f"{theirs}post_attention_layernorm.weight", shift))
    if layer.ffn == "d":
        if family == "granitemoehybrid":
            found.append(_same(f"{ours}ffn.w13.weight", f"{theirs}shared_mlp.input_linear.weight"))
            found.append(_same(f"{ours}ffn.w2.weight", f"{theirs}shared_mlp.output_linear.weight"))
        else:
            found += _dense_rules(f"{ours}ffn.", f"{theirs}mlp.")
    elif layer.ffn == "e":
        found += _expert_rules(config, family, f"{ours}ffn.", theirs)
    return found


def _attention_rules(config: ModelConfig, family: str, ours: str, theirs: str, shift: float) -> list[Rule]:
    heads, size = config.num_heads, config.head_dim
    q, kv, gate = heads * size, config.num_kv_heads * size, config.gate_dim
    names = tuple(f"{theirs}{name}_proj.weight" for name in "qkv")

    def split(tensor: Tensor) -> list[Tensor]:
        parts = list(tensor.split([q, kv, kv, gate] if gate else [q, kv, kv]))
        if gate:
            width = tensor.shape[1]
            gates = parts.pop().view(heads, gate // heads, width).expand(heads, size, width)
            parts[0] = torch.cat([parts[0].view(heads, size, width), gates], 1).reshape(2 * q, width)
        return parts

    def join(parts: list[Tensor]) -> Tensor:
        if gate:
            query, gates = parts[0].view(heads, 2, size, -1).unbind(1)
            parts = [query.reshape(q, -1), *parts[1:], gates.reshape(q, -1)]
        return torch.cat(parts)

    found = [Rule(f"{ours}qkv.weight", names, split, join), _same(f"{ours}out.weight", f"{theirs}o_proj.weight")]
    if config.qk_norm:
        found += [_norm(f"{ours}{name}_norm.weight", f"{theirs}{name}_norm.weight", shift) for name in "qk"]
    return found


def _mamba_rules(ours: str, theirs: str) -> list[Rule]:
    return [
        _same(f"{ours}in_proj.weight", f"{theirs}in_proj.weight"),
        _same(f"{ours}out.weight", f"{theirs}out_proj.weight"),
        _same(f"{ours}norm.weight", f"{theirs}norm.weight"),
        Rule(f"{ours}conv.weight", (f"{theirs}conv1d.weight",), lambda t: [t[:, None]], lambda p: p[0][:, 0]),
        _same(f"{ours}conv.bias", f"{theirs}conv1d.bias"),
        *(_same(ours + name, theirs + name) for name in ("A_log", "D", "dt_bias")),
    ]


def _dense_rules(ours: str, theirs: str, factor: float = 1.0) -> list[Rule]:
    """SwiGLU; `factor` multiplies what comes out of it."""
    return [
        Rule(
            f"{ours}w13.weight",
            (f"{theirs}gate_proj.weight", f"{theirs}up_proj.weight"),
            lambda t: list(t.chunk(2)),
            torch.cat,
        ),
        Rule(f"{ours}w2.weight", (f"{theirs}down_proj.weight",), lambda t: [t * factor], lambda p: p[0] / factor),
    ]


def _expert_rules(config: ModelConfig, family: str, ours: str, theirs: str) -> list[Rule]:
    moe, width = config.moe, config.d_model
    if family == "granitemoehybrid":
        found = [
            _same(f"{ours}router.weight", f"{theirs}block_sparse_moe.router.layer.weight"),
            _same(f"{ours}w13.weight", f"{theirs}block_sparse_moe.input_linear.weight"),
            _same(f"{ours}w2.weight", f"{theirs}block_sparse_moe.output_linear.weight"),
        ]
        names = (f"{theirs}shared_mlp.input_linear.weight", f"{theirs}shared_mlp.output_linear.weight")
        if moe.num_shared:
            return [
                *found,
                _same(f"{ours}shared.w13.weight", names[0]),
                _same(f"{ours}shared.w2.weight", names[1]),
            ]
        return [*found, _zeros(names[0], (2 * _EMPTY_SHARED, width)), _zeros(names[1], (width, _EMPTY_SHARED))]
    theirs += "mlp."
    experts = range(moe.num_experts)
    found = [
        _same(f"{ours}router.weight", f"{theirs}gate.weight"),
        Rule(
            f"{ours}w13.weight",
            tuple(f"{theirs}experts.{e}.{name}_proj.weight" for e in experts for name in ("gate", "up")),
            lambda t: [half for matrix in t for half in matrix.chunk(2)],
            lambda p: torch.cat(p).view(moe.num_experts, 2 * moe.d_expert, width),
        ),
        Rule(
            f"{ours}w2.weight",
            tuple(f"{theirs}experts.{e}.down_proj.weight" for e in experts),
            lambda t: list(t.unbind()),
            torch.stack,
        ),
    ]
    if family == "dots1":
        found.append(_same(f"{ours}router.bias", f"{theirs}gate.e_score_correction_bias"))
    if family in ("dots1", "qwen3_next"):
        place = f"{theirs}shared_expert{'s' if family == 'dots1' else ''}."
        if moe.num_shared:
            # The gate of qwen3_next is sigmoid(0) = 1/2.
            found += _dense_rules(f"{ours}shared.", place, 2.0 if family == "qwen3_next" else 1.0)
        else:
            hidden = moe.d_expert if family == "dots1" else _EMPTY_SHARED
            for name, shape in (("gate", (hidden, width)), ("up", (hidden, width)), ("down", (width, hidden))):
                found.append(_zeros(f"{place}{name}_proj.weight", shape))
        if family == "qwen3_next":
            found.append(_zeros(f"{theirs}shared_expert_gate.weight", (1, width)))
    return found


def _same(ours: str, theirs: str) -> Rule:
    return Rule(ours, (theirs,), lambda t: [t], lambda p: p[0])


def _norm(ours: str, theirs: str, shift: float) -> Rule:
    return Rule(ours, (theirs,), lambda t: [t + shift], lambda p: p[0] - shift)


def _zeros(theirs: str, shape: tuple[int, ...]) -> Rule:
    """A tensor that a family insists on and that does nothing."""
    return Rule("", (theirs,), lambda t: [torch.zeros(shape)], lambda p: p[0])
