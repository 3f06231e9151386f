"""Whatever our configuration says, an export computes the same in transformers, or is refused by name.

Every setting of ModelConfig and its sections is changed in a model of each family, and the model is given to every
family that takes it. Its folder must load in transformers, give our logits, and continue a text as we do with the cache
that transformers takes by itself. Read back, every setting is what it was, unless only training looks at it, or no
layer of the model does.
"""

from __future__ import annotations

import json
import random
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lmcore.config import leaves
from lmcore.errors import LmError
from lmcore.inference import families
from lmcore.model.config import ModelConfig
from lmcore.model.model import LanguageModel
from lmcore.training import tensors
from lmcore.training.checkpoint import model_tensors

transformers = pytest.importorskip("transformers")

Settings = dict[str, Any]
BASE: Settings = {
    "vocab_size": 60,
    "d_model": 32,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "d_ff": 48,
    "context_length": 64,
    "rope_theta": 1234.0,
    "window": 8,
    "moe": {"num_experts": 4, "top_k": 2, "d_expert": 16, "bias_rate": 0.0},
    "mamba": {"d_state": 8, "head_dim": 8, "chunk_size": 16},
}
STARTS: dict[str, Settings] = {
    "llama": {"qk_norm": False},
    "mistral": {"qk_norm": False, "pattern": "W"},
    "qwen3": {},
    "qwen3_moe": {"ffn": "de"},
    "dots1": {"ffn": "de", "moe": {"score": "sigmoid", "num_shared": 1}},
    "qwen3_next": {"gate": "elementwise", "ffn": "e"},
    "granitemoehybrid": {"pattern": "AM", "qk_norm": False},
    "granitemoehybrid-experts": {"pattern": "MA", "qk_norm": False, "ffn": "e"},
    "mamba2": {"pattern": "M", "ffn": "-"},
}
LETTERS: dict[str, list[str]] = {
    "pattern": ["A", "W", "AW", "WA", "M", "AM", "MA", "R", "F"],
    "ffn": ["d", "e", "de", "ed", "-", "d-"],
    "depth": ["-", "m", "-m"],
    "gate": ["none", "headwise", "elementwise"],
    "moe.score": ["softmax", "sigmoid"],
    "mamba.kernels": ["torch", "fla"],
    "mtp.kind": ["sequential", "parallel"],
    "moe.route_norm": [True, False],  # type: ignore[list-item]
}
TOKENS = torch.randint(0, 60, (1, 30), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module", autouse=True)
def quiet() -> Iterator[None]:
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def merged(*parts: Settings) -> Settings:
    result: Settings = {}
    for part in parts:
        for key, value in part.items():
            result[key] = {**result.get(key, {}), **value} if isinstance(value, dict) else value
    return result


def setting(config: ModelConfig, name: str) -> Any:
    value: Any = config
    for part in name.split("."):
        value = getattr(value, part)
    return value


def changed(start: str) -> Iterator[tuple[str, ModelConfig]]:
    """(what was changed, configuration) of every change of every setting that is a valid one."""
    sound = ModelConfig.model_validate(merged(BASE, STARTS[start]))
    yield "as it is", sound
    for name in leaves(ModelConfig):
        before = setting(sound, name)
        if name in LETTERS:
            values: list[Any] = LETTERS[name]
        elif isinstance(before, bool):
            values = [not before]
        elif isinstance(before, int):
            values = [0, 1, 2, 3, before + 1, before * 2]
        else:
            values = [before * 2, 0.0, 0.25, 1.0]
        section, _, leaf = name.rpartition(".")
        for value in values:
            change = {section: {leaf: value}} if section else {leaf: value}
            try:
                yield f"{name} = {value}", ModelConfig.model_validate(merged(BASE, STARTS[start], change))
            except ValueError:
                continue


def build(config: ModelConfig) -> LanguageModel:
    model = LanguageModel(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in model_tensors(model).items():
            if name.endswith("router.bias") and config.moe.score == "softmax":
                tensor.zero_()
            elif tensor.ndim > 1:
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * (1.0 if "embedding" in name else 0.2))
            else:
                tensor.add_(0.3 * torch.randn(tensor.shape, generator=generator))
    return model


def unused(config: ModelConfig, name: str) -> bool:
    """Whether no layer of a model looks at a setting."""
    mixers, ffns = {k.mixer for k in config.layers}, {k.ffn for k in config.layers}
    section = name.partition(".")[0]
    return (
        section in ("resonance", "mod", "mtp")  # exported only where no layer has one, or left out on request
        or name in ("mamba.num_experts", "mamba.top_k", "mamba.balance_weight")  # routed Mamba's
        or (section == "mamba" and "M" not in mixers)
        or (section == "moe" and "e" not in ffns)
        or (name == "window" and "W" not in mixers)
        or (name == "d_ff" and "d" not in ffns)
        or (
            name in ("num_heads", "num_kv_heads", "head_dim", "rope_theta", "qk_norm", "gate")
            and not mixers & set("AW")
        )
    )


def lost(config: ModelConfig, back: ModelConfig, family: str) -> list[str]:
    """Settings that a round trip loses though somebody looks at them."""
    found = [] if config.layers == back.layers else ["layers"]
    for name in leaves(ModelConfig):
        if name in ("pattern", "ffn", "depth") or unused(config, name):
            continue
        if name in families.TRAINING_ONLY and (name != "moe.balance_weight" or family == "dots1"):
            continue
        if name == "gate" and config.gate == "headwise":  # becomes an elementwise one of the same rows
            continue
        if name == "moe.num_shared" and family == "dots1" and config.moe.num_shared == 0:  # one that is zero
            continue
        if setting(config, name) != setting(back, name):
            found.append(f"{name}: {setting(config, name)} comes back as {setting(back, name)}")
    return found


def fault(config: ModelConfig, family: str, folder: Path) -> str:
    """What is wrong with an export, empty when nothing is or when it is refused."""
    biased = config.moe.score == "sigmoid"
    try:
        families.require(config, family, biased=biased, drop_mtp=True)
        model = build(config)
    except LmError:
        return ""
    tokens = TOKENS % config.vocab_size
    hf, weights = families.to_hf_config(config, family), families.to_hf_tensors(model_tensors(model), config, family)
    (folder / "config.json").write_text(json.dumps(hf))
    chunks, _ = tensors.tensor_chunks(weights, {"format": "pt"})
    (folder / "model.safetensors").write_bytes(b"".join(bytes(chunk) for chunk in chunks))
    try:
        other, told = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, output_loading_info=True
        )
        with torch.no_grad():
            theirs = other.eval()(tokens).logits
            text = other.generate(tokens[:, :12], max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    except Exception as error:
        return f"transformers cannot run it: {type(error).__name__}: {error}"
    if any(told.values()):
        return f"tensors: {told}"
    with torch.no_grad():
        ours = model(tokens)
        continued = tokens[:, :12]
        for _ in range(8):
            continued = torch.cat([continued, model(continued)[:, -1:].argmax(-1)], 1)
    difference = float((ours - theirs).abs().max() / theirs.abs().max())
    if not difference < 1e-4:
        return f"relative difference {difference:.1e}"
    if continued.tolist() != text.tolist():
        return "another continuation with its cache"
    name, back = families.from_hf_config(hf, "config.json")
    return "; ".join(lost(config, back, name))


def faults(start: str, chosen: list[tuple[str, ModelConfig]], folder: Path) -> list[str]:
    found = []
    for what, config in chosen:
        for family in families.FAMILIES:
            if problem := fault(config, family, folder):
                found.append(f"{what} as {family}: {problem}")
    return found


@pytest.mark.parametrize("start", STARTS)
def test_an_export_computes_the_same_or_is_refused(start: str, tmp_path: Path) -> None:
    everything = list(changed(start))
    chosen = [everything[0], *random.Random(start).sample(everything, 12)]
    assert families.choose(everything[0][1], biased=start == "dots1") == start.partition("-")[0]
    found = faults(start, chosen, tmp_path)
    assert not found, "\n".join(found)


@pytest.mark.slow
@pytest.mark.parametrize("start", STARTS)
def test_every_export_computes_the_same_or_is_refused(start: str, tmp_path: Path) -> None:
    found = faults(start, list(changed(start)), tmp_path)
    assert not found, "\n".join(found)
