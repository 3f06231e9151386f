"""Equal or refused: whatever a config.json says, an import computes what transformers computes, or is refused by name.

For a small model of each family every key (those that transformers writes, those of its class, and some that only
others write) is changed, dropped and written in older ways, and the tensors are changed, too. Each time our logits are
transformers' own, at a length beyond every window, or an LmError is raised. Where transformers itself cannot build or
run the model, an LmError is asked for.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import random
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from lmcore.errors import LmError
from lmcore.inference import families
from lmcore.model.config import ModelConfig
from lmcore.model.model import LanguageModel
from lmcore.training import tensors
from lmcore.training.checkpoint import model_tensors

transformers = pytest.importorskip("transformers")

VOCABULARY, LENGTH, WINDOW = 64, 40, 8
TOKENS = torch.randint(0, VOCABULARY, (1, LENGTH), generator=torch.Generator().manual_seed(1))
MOE = {"num_experts": 4, "top_k": 2, "d_expert": 16, "bias_rate": 0.0, "balance_weight": 0.01, "z_weight": 0.0}
MAMBA = {"d_state": 8, "head_dim": 8, "num_groups": 2, "chunk_size": 16}
ROWS: dict[str, dict[str, Any]] = {
    "llama": {"qk_norm": False},
    "mistral": {"qk_norm": False, "pattern": "W", "window": WINDOW},
    "qwen3": {"pattern": "AW", "window": WINDOW},
    "qwen3_moe": {"ffn": "de", "moe": MOE, "pattern": "W", "window": WINDOW, "tie_embeddings": False},
    "dots1": {
        "ffn": "de",
        "pattern": "WA",
        "window": WINDOW,
        "moe": MOE | {"score": "sigmoid", "num_shared": 1, "bias_rate": 1e-3, "route_scale": 1.5},
    },
    "qwen3_next": {"gate": "elementwise", "ffn": "ed", "moe": MOE | {"num_shared": 1}},
    "granitemoehybrid": {"pattern": "AM", "qk_norm": False, "mamba": MAMBA},
    "granitemoehybrid-experts": {
        "pattern": "MA",
        "qk_norm": False,
        "ffn": "e",
        "moe": MOE | {"num_shared": 1},
        "mamba": MAMBA,
    },
    "mamba2": {"pattern": "M", "ffn": "-", "mamba": MAMBA, "tie_embeddings": False},
}
FOREIGN: dict[str, Any] = {
    "rope_scaling": {"type": "linear", "factor": 2.0},
    "rope_theta": 500.0,
    "partial_rotary_factor": 0.5,
    "use_sliding_window": True,
    "sliding_window": WINDOW,
    "max_window_layers": 1,
    "layer_types": ["sliding_attention", "full_attention"],
    "full_attention_interval": 1,
    "attention_bias": True,
    "mlp_bias": True,
    "qk_layernorm": True,
    "logits_scaling": 2.0,
    "final_logit_softcapping": 30.0,
    "attn_logit_softcapping": 30.0,
    "query_pre_attn_scalar": 4,
    "rope_interleaved": True,
    "no_rope_layers": [0, 1],
    "per_layer_config": {"0": {"head_dim": 4}},
    "num_local_experts": 8,
    "num_experts": 8,
    "n_group": 2,
    "decoder_sparse_step": 2,
    "mlp_only_layers": [1],
    "time_step_limit": [0.0, 0.1],
    "quantization_config": {"quant_method": "fp8"},
    "auto_map": {"AutoModelForCausalLM": "modeling.Other"},
    "attn_implementation": "eager",
    "is_causal": False,
    "torch_dtype": "bfloat16",
    "torchscript": True,
    "tie_encoder_decoder": True,
    "is_decoder": True,
    "num_nextn_predict_layers": 1,
    "head_dim": 16,
    "layers_block_type": ["mamba", "attention"],
    "num_labels": 3,
    "pretraining_tp": 2,
    "temperature": 0.5,
    "unheard_of": None,
}
"""Keys that other families, older versions and other programs write, with a value that means something there."""
ROPES: list[dict[str, Any]] = [
    {"rope_scaling": {"type": "linear", "factor": 4.0}},
    {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    {"rope_scaling": {"type": "dynamic", "factor": 4.0}},
    {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}},
    {"rope_scaling": {"rope_type": "default", "rope_theta": 77.0}},
    {"rope_scaling": {"type": "default"}},
    {"rope_scaling": {}},
    {"rope_scaling": {"rope_type": None}},
    {"rope_scaling": {"rope_type": "default", "type": "linear", "factor": 2.0}},
    {"rope_parameters": {"rope_type": "default"}, "rope_theta": 77.0},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 77.0}, "rope_theta": 500.0},
    {"rope_parameters": {"rope_type": "default", "rope_theta": None}},
    {"rope_parameters": {"rope_theta": 77}},
    {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 77.0}}},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 77.0, "partial_rotary_factor": 0.5}},
    {"rope_parameters": None, "rope_theta": 77.0},
    {"rope_parameters": None, "rope_theta": None},
    {"rope_parameters": None},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 77.0}, "rope_scaling": {"type": "linear", "factor": 2}},
    {"partial_rotary_factor": None},
]
"""Angles in every way of writing them."""

ALIASES = {"torch_dtype": "dtype"}
FULL, SLIDING = "full_attention", "sliding_attention"
WINDOWS: dict[str, list[Any]] = {
    "use_sliding_window": ["absent", True, False],
    "sliding_window": ["absent", None, WINDOW],
    "max_window_layers": ["absent", 0, 1, 2],
    "layer_types": ["absent", None, [FULL, SLIDING], [SLIDING, SLIDING]],
}
SPARSE: dict[str, list[Any]] = {
    "decoder_sparse_step": ["absent", 1, 2, 3],
    "mlp_only_layers": ["absent", None, [], [0], [1], [0, 1], [5]],
}

Settings = dict[str, Any]


@pytest.fixture(scope="module", autouse=True)
def quiet() -> Iterator[None]:
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@cache
def model_of(row: str) -> LanguageModel:
    """A small model in which every tensor has something to say."""
    defaults: Settings = {"d_model": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "d_ff": 48}
    config = ModelConfig(
        vocab_size=VOCABULARY, context_length=64, rope_theta=1234.0, norm_eps=1e-6, **(defaults | ROWS[row])
    )
    model = LanguageModel(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in model_tensors(model).items():
            if tensor.ndim > 1:
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * (1.0 if "embedding" in name else 0.2))
            elif name.endswith("router.bias") and config.moe.score == "softmax":
                tensor.zero_()
            else:
                tensor.add_(0.3 * torch.randn(tensor.shape, generator=generator))
    return model


def family_of(row: str) -> str:
    return row.partition("-")[0]


@cache
def their_tensors(row: str) -> dict[str, torch.Tensor]:
    model = model_of(row)
    return families.to_hf_tensors(model_tensors(model), model.config, family_of(row))


@cache
def written_by_them(row: str) -> str:
    """config.json as transformers 5 writes it."""
    config = transformers.AutoConfig.for_model(**families.to_hf_config(model_of(row).config, family_of(row)))
    return json.dumps(json.loads(config.to_json_string(use_diff=False)))


def older(config: Settings) -> Settings:
    """The same as transformers 4 writes it."""
    rope = config.pop("rope_parameters", None)
    if rope:
        config |= {"rope_theta": rope["rope_theta"], "rope_scaling": None}
        if "partial_rotary_factor" in rope:
            config["partial_rotary_factor"] = rope["partial_rotary_factor"]
    for key in ("id2label", "label2id", "output_hidden_states", "return_dict", "problem_type"):
        config.pop(key, None)
    config["torch_dtype"] = config.pop("dtype", None) or "float32"
    return config


def write(folder: Path, config: Settings, weights: dict[str, torch.Tensor] | None) -> None:
    (folder / "config.json").write_text(json.dumps(config))
    if weights is not None:
        chunks, _ = tensors.tensor_chunks(weights, {"format": "pt"})
        (folder / "model.safetensors").write_bytes(b"".join(bytes(chunk) for chunk in chunks))


def ours(config: Settings, weights: dict[str, torch.Tensor]) -> torch.Tensor | None:
    """Our logits, None when the model is refused. Anything but an LmError is a fault."""
    try:
        family, found = families.from_hf_config(config, "config.json")
        converted = families.from_hf_tensors(weights, found, family, "model")
    except LmError as error:
        told = error.message
    else:
        return logits(found, converted)
    assert len(told) < 1500
    assert "\n" not in told
    assert "pydantic" not in told
    return None


def logits(config: ModelConfig, converted: dict[str, torch.Tensor]) -> torch.Tensor:
    model = LanguageModel(config).eval()
    model.load_state_dict(converted, strict=False)
    with torch.no_grad():
        return model(TOKENS)


def theirs(folder: Path) -> torch.Tensor | str:
    """transformers' logits, or why there are none."""
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, trust_remote_code=False
        )
        with torch.no_grad():
            return model.eval()(TOKENS).logits
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def verdict(a: torch.Tensor, b: torch.Tensor | str) -> str:
    """Empty when two results are equal."""
    if isinstance(b, str):
        return f"imported, but transformers cannot run it: {b[:200]}"
    if a.shape != b.shape:
        return f"shapes {tuple(a.shape)} and {tuple(b.shape)}"
    difference = float((a - b).abs().max() / b.abs().max())
    return "" if difference < 1e-4 else f"relative difference {difference:.1e}"


# ---------------------------------------------------------------------------------------- changes of keys


def other_values(value: Any) -> Iterator[Any]:
    """A value and what somebody might write in its place."""
    yield from (None, True, False, 0, 1, 2, -1, 0.0, 0.5, 1.0, 10**12, 10**400, 1e308, float("nan"), float("inf"))
    yield from ("", "other", "auto", "silu", "gelu", [], {}, [value], {"a": value}, [[[]]], [0, None])
    if type(value) in (int, float):
        yield from (value + 1, value * 2, -value, float(value), str(value))
    if isinstance(value, str):
        yield value.upper()
    if isinstance(value, list):
        yield [int(v) if v == 0 else v for v in value]
        yield from (value[:-1], value + value[:1], value[::-1], [*value[:-1], None], [*value[:-1], "chunked_attention"])
        yield from ([kind] * len(value) for kind in ("full_attention", "sliding_attention", "mamba", "attention"))
    if isinstance(value, dict):
        yield value | {"unheard_of": 1}


def changes(row: str) -> list[tuple[str, Settings]]:
    """(what was done, config.json) of every change of every key."""
    found: list[tuple[str, Settings]] = []
    base: Settings = json.loads(written_by_them(row))
    for style, sound in (("", base), ("older: ", older(copy.deepcopy(base)))):
        found.append((f"{style}as it is", sound))
        known = {field.name for field in dataclasses.fields(transformers.AutoConfig.for_model(family_of(row)))}
        for key in sorted({*sound, *FOREIGN, *known, *families.keys_of(family_of(row))} - {"model_type"}):
            if key in sound:
                found.append((f"{style}without {key}", {k: v for k, v in sound.items() if k != key}))
            before = sound.get(key, FOREIGN.get(key))
            for value in (*other_values(before), *([FOREIGN[key]] if key in FOREIGN else [])):
                found.append((f"{style}{key} = {str(value)[:80]}", sound | {key: value}))
        for settings in (*ROPES, *together(WINDOWS, row), *together(SPARSE, row)):
            changed = copy.deepcopy(sound | settings)
            found.append((f"{style}{settings}", {k: v for k, v in changed.items() if v != "absent"}))
        found.append((f"{style}without all", {"model_type": sound["model_type"]}))
    return found


def together(choices: dict[str, list[Any]], row: str) -> list[Settings]:
    """Every combination of values of keys that act together, in the families that know one of the keys."""
    if not choices.keys() & families.keys_of(family_of(row)).keys():
        return []
    return [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]


def violations(row: str, chosen: list[tuple[str, Settings]], folder: Path) -> list[str]:
    """Changes after which we compute something else than transformers."""
    weights, found = their_tensors(row), []
    write(folder, chosen[0][1], weights)
    for what, config in chosen:
        result = ours(config, weights)
        if result is None:
            continue
        write(folder, config, None)
        if fault := verdict(result, theirs(folder)):
            found.append(f"{what}: {fault}")
    return found


@pytest.mark.parametrize("row", ROWS)
def test_a_changed_key_is_refused_or_computed_as_transformers_does(row: str, tmp_path: Path) -> None:
    everything = changes(row)
    refused = [ours(config, their_tensors(row)) is None for _, config in everything[:: 1 + len(everything) // 400]]
    assert 0.5 < sum(refused) / len(refused) < 1
    rng = random.Random(row)
    windows_and_angles = [c for c in everything if "window" in c[0] or "layer_types" in c[0] or "rope" in c[0]]
    chosen = [everything[0], *rng.sample(everything, 16), *rng.sample(windows_and_angles, 8)]
    faults = violations(row, chosen, tmp_path)
    assert not faults, "\n".join(faults)
    assert ours(everything[0][1], their_tensors(row)) is not None


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS)
def test_every_changed_key_is_refused_or_computed_as_transformers_does(row: str, tmp_path: Path) -> None:
    faults = violations(row, changes(row), tmp_path)
    assert not faults, "\n".join(faults)


# ---------------------------------------------------------------------------------------- defaults


@pytest.mark.parametrize("family", families.FAMILIES)
def test_an_absent_key_means_what_it_means_in_their_class(family: str) -> None:
    """Windows of 4,096 tokens, heads of 128, eight groups: small inputs would not show them."""
    declared = families.keys_of(family)
    for field in dataclasses.fields(type(transformers.AutoConfig.for_model(family))):
        if field.name in ("rope_parameters", "tokenizer_class"):
            continue
        key = declared[field.name] if field.name in declared else declared[ALIASES[field.name]]
        if key.kind is not None and key.default is None and not key.ours:
            assert field.name not in ("sliding_window", "layer_types") or field.default is None
            continue  # inert: whatever its absence means changes nothing
        expected = list(field.default) if isinstance(field.default, tuple) else field.default
        assert key.default == expected, field.name
        assert type(key.default) is type(expected), field.name


# ---------------------------------------------------------------------------------------- changes of tensors


def tensor_changes(row: str) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """(what was done, tensors)."""
    sound = their_tensors(row)
    for name, tensor in sound.items():
        yield f"without {name}", {n: t for n, t in sound.items() if n != name}
        for what, other in {
            "a row less": tensor[:-1],
            "a row more": torch.cat([tensor, tensor[:1]]),
            "transposed": tensor.t() if tensor.ndim == 2 else tensor[None],
            "flat": tensor.reshape(-1),
            "nothing": tensor.new_zeros(0),
            "a scalar": tensor.new_zeros(()),
            "bf16": tensor.bfloat16(),
            "fp16": tensor.half(),
            "fp64": tensor.double(),
            "int32": tensor.int(),
            "bool": tensor.bool(),
        }.items():
            yield f"{name}: {what}", sound | {name: other.contiguous()}
        if name.endswith("proj.weight"):
            bias = name.removesuffix("weight") + "bias"
            yield f"with {bias}", sound | {bias: torch.ones(tensor.shape[0])}
    head, embedding = "lm_head.weight", next(n for n in sound if "embed" in n)
    yield "with the same head", sound | {head: sound[embedding].clone()}
    yield "with another head", sound | {head: sound[embedding] + 1}
    yield "with a short head", sound | {head: sound[embedding][:-1].contiguous()}
    yield "with a rotary buffer", sound | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    yield "without a prefix", {name.partition(".")[2]: tensor for name, tensor in sound.items()}
    yield "nothing at all", {}


def tensor_violations(row: str, chosen: list[tuple[str, dict[str, torch.Tensor]]], folder: Path) -> list[str]:
    config, found = json.loads(written_by_them(row)), []
    for tied in (True, False):
        for what, weights in chosen:
            result = ours(config | {"tie_word_embeddings": tied}, weights)
            if result is None:
                continue
            write(folder, config | {"tie_word_embeddings": tied}, weights)
            if fault := verdict(result, theirs(folder)):
                found.append(f"{what}, tied {tied}: {fault}")
    return found


@pytest.mark.parametrize("row", ROWS)
def test_changed_tensors_are_refused_or_used_as_transformers_does(row: str, tmp_path: Path) -> None:
    everything = list(tensor_changes(row))
    faults = tensor_violations(row, [*random.Random(row).sample(everything, 8), *everything[-6:]], tmp_path)
    assert not faults, "\n".join(faults)


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS)
def test_every_changed_tensor_is_refused_or_used_as_transformers_does(row: str, tmp_path: Path) -> None:
    faults = tensor_violations(row, list(tensor_changes(row)), tmp_path)
    assert not faults, "\n".join(faults)
