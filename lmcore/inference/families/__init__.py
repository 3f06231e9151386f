"""Our models as architectures of Hugging Face transformers, and back: configuration and weights, nothing else.

    family            carries
    llama             attention without QK-norm, dense
    mistral           the same with one window in all layers
    qwen3             attention with QK-norm, windows in any layers, dense
    qwen3_moe         the same with experts: softmax scores, no shared expert, no selection bias; one window or none
    dots1             qwen3 with experts: sigmoid scores, selection bias, shared experts, scaled routing
    qwen3_next        attention with QK-norm and output gate (headwise gates become elementwise ones), shared experts
    granitemoehybrid  attention and Mamba-2 in any layers (one attention layer at least), without QK-norm; dense, or
                      softmax experts normalised over the chosen ones, shared experts
    mamba2            Mamba-2 only, without feed-forwards

One file per family; `family.py` says what a family is, `keys.py` how a config.json is read, `tensors.py` how weights
are moved. "T/" in their docstrings is the directory of transformers (5.23), whose classes are what equal means.

Routed Mamba, resonance, Mixture-of-Depths and multi-token heads exist nowhere else; `obstacles` names what stands in
the way of each family. Weights are moved and split, never changed, so the logits are equal up to rounding. Padding rows
of the vocabulary are left out, so that no impossible token can be drawn.

Settings of ours that only training looks at have no place in a config.json (TRAINING_ONLY). An export's lmshards.json
holds the whole configuration.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from lmcore import config as configuration
from lmcore.errors import Exit, LmError
from lmcore.inference.families import (
    dots1,
    granitemoehybrid,
    llama,
    mamba2,
    mistral,
    qwen3,
    qwen3_moe,
    qwen3_next,
)
from lmcore.inference.families.family import Family
from lmcore.inference.families.keys import Key, Reading, shown
from lmcore.inference.families.tensors import Rule, Shape
from lmcore.model.config import ModelConfig

_TABLE: dict[str, Family] = {
    module.FAMILY.name: module.FAMILY
    for module in (llama, mistral, qwen3, qwen3_moe, dots1, qwen3_next, granitemoehybrid, mamba2)
}

FAMILIES = tuple(_TABLE)
"""In the order in which they are tried: the simplest architecture that carries a model is the best known one."""

TRAINING_ONLY = frozenset(
    ["dropout", "moe.bias_rate", "moe.z_weight", "moe.balance_weight", "moe.capacity_factor", "mamba.kernels"]
)
"""Settings of ours that change nothing that a trained model computes. A family that has a place for one uses it."""

_EXPERT_ROW_BYTES = 16  # rows of matrices in their grouped product are multiples of it

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def keys_of(family: str) -> Mapping[str, Key]:
    """The keys that may stand in a family's config.json."""
    return _TABLE[family].keys


class TensorLike(Protocol):
    """A tensor, or what the header of a file says of one."""

    @property
    def shape(self) -> Sequence[int]: ...
    @property
    def dtype(self) -> torch.dtype: ...


# ---------------------------------------------------------------------------------------- which family


def obstacles(
    config: ModelConfig, family: str, *, biased: bool = False, drop_mtp: bool = False, item_size: int = 4
) -> list[str]:
    """What keeps a family from carrying a model, in the names of our settings; empty when it can.

    biased: whether some router's selection bias is not zero. item_size: bytes of a number of the weights.
    """
    row, found = _TABLE[family], []
    mixers = {layer.mixer for layer in config.layers}
    ffns = {layer.ffn for layer in config.layers}
    for letter, name in (("R", "routed Mamba (pattern R)"), ("F", "resonance (pattern F)")):
        if letter in mixers:
            found.append(name)
    if any(layer.depth == "m" for layer in config.layers):
        found.append("Mixture-of-Depths (depth m)")
    if config.mtp.depths and not drop_mtp:
        found.append("multi-token heads (mtp; --drop-mtp leaves them out, the model itself does not depend on them)")
    found += [f"pattern {letter}" for letter in sorted(mixers - set(row.mixers) - {"R", "F"})]
    found += [f"ffn {letter}" for letter in sorted(ffns - set(row.ffns))]
    if mixers & set("AW"):
        if config.qk_norm != row.qk_norm:
            found.append(f"qk_norm: {'true' if config.qk_norm else 'false'}")
        if (config.gate != "none") != row.gated:
            found.append(f"gate: {config.gate}")
    multiple = _EXPERT_ROW_BYTES // item_size
    odd = [
        f"{n}: {size}"
        for n, size in (("moe.d_expert", config.moe.d_expert), ("d_model", config.d_model))
        if size % multiple
    ]
    if "e" in ffns and odd:
        found.append(f"{odd[0]} (beside experts it must be a multiple of {multiple} there, in this number format)")
    return found + row.obstacles(config, biased)


def choose(config: ModelConfig, *, biased: bool = False, drop_mtp: bool = False, item_size: int = 4) -> str:
    """The first family that carries a model; LmError (2) that names the obstacles of the nearest one."""
    reasons = {
        name: obstacles(config, name, biased=biased, drop_mtp=drop_mtp, item_size=item_size) for name in FAMILIES
    }
    for name, found in reasons.items():
        if not found:
            return name
    # A missing kind of layer weighs more than any setting.
    nearest = min(
        FAMILIES, key=lambda name: (sum(r.startswith(("pattern ", "ffn ")) for r in reasons[name]), len(reasons[name]))
    )
    raise _refusal(nearest, reasons[nearest], "no family of transformers carries this model; the nearest, ")


def require(
    config: ModelConfig, family: str, *, biased: bool = False, drop_mtp: bool = False, item_size: int = 4
) -> None:
    """LmError (2) when a family does not exist or cannot carry a model."""
    if family not in FAMILIES:
        raise LmError(f"{family}: no family of this name is known.", hint=f"Choose one of: {', '.join(FAMILIES)}.")
    if found := obstacles(config, family, biased=biased, drop_mtp=drop_mtp, item_size=item_size):
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
    row = _TABLE[family]
    values: dict[str, Any] = {"architectures": [row.architecture], "model_type": family, "use_cache": True}
    if "attention_dropout" in row.keys:
        values["attention_dropout"] = 0.0
    for key, spec in row.keys.items():
        if spec.ours:
            values[key] = _setting(config, spec.ours)
        elif spec.written and spec.only is not None:
            values[key] = spec.only[0]
    return values | row.config(config)


def from_hf_config(hf: Mapping[str, Any], where: str) -> tuple[str, ModelConfig]:
    """(family, our configuration) of a config.json.

    LmError that names every key and value that we cannot carry (2), or the one that no such model can have (65).
    """
    named = hf.get("model_type")
    row = _TABLE.get(named) if isinstance(named, str) else None
    if row is None:
        raise LmError(
            f"{where}: the architecture {shown(named)} cannot be imported.",
            hint=f"These can: {', '.join(FAMILIES)}.",
        )
    reading = Reading(_without_aliases(hf, row, where), row.keys, where)
    settings = {spec.ours: reading[key] for key, spec in row.keys.items() if spec.ours}
    settings |= row.settings(reading)
    pad = reading["pad_token_id"]
    if pad is not None and pad >= reading["vocab_size"]:
        reading.refuse("pad_token_id", pad, f"vocab_size is {reading['vocab_size']}")
    reading.check(row.name)
    try:
        return row.name, configuration.build(ModelConfig, _nested(settings))
    except LmError as error:
        raise LmError(f"{where}: {_in_their_names(error.message, row)}", code=Exit.DATA) from error


def _without_aliases(hf: Mapping[str, Any], row: Family, where: str) -> dict[str, Any]:
    """The same keys under one name each; two that say different things are refused."""
    found = dict(hf)
    for alias, key in row.aliases.items():
        if alias not in found:
            continue
        value = found.pop(alias)
        if key in found and found[key] != value:
            raise LmError(f"{where}: {key} is {shown(found[key])}, but {alias} is {shown(value)}.")
        found[key] = value
    return found


def _setting(config: ModelConfig, name: str) -> Any:
    value: Any = config
    for part in name.split("."):
        value = getattr(value, part)
    return value


def _nested(settings: Mapping[str, Any]) -> dict[str, Any]:
    """{"moe.top_k": 2} -> {"moe": {"top_k": 2}}."""
    result: dict[str, Any] = {}
    for name, value in settings.items():
        section, _, leaf = name.rpartition(".")
        (result.setdefault(section, {}) if section else result)[leaf] = value
    return result


def _in_their_names(sentence: str, row: Family) -> str:
    """A sentence of ours about settings, with the names of their keys."""
    theirs = {spec.ours: key for key, spec in row.keys.items() if spec.ours}
    return re.sub(r"[a-z_]+(?:\.[a-z_]+)?", lambda match: theirs.get(match[0], match[0]), sentence)


# ---------------------------------------------------------------------------------------- weights


def to_hf_tensors(tensors: Mapping[str, Tensor], config: ModelConfig, family: str) -> dict[str, Tensor]:
    """Our tensors by name -> theirs. Multi-token heads and zero selection biases are left out."""
    result: dict[str, Tensor] = {}
    for rule in _TABLE[family].rules(config):
        parts = rule.split(tensors[rule.ours]) if rule.ours else rule.split(torch.empty(0))
        result |= dict(zip(rule.theirs, parts, strict=True))
    return {name: tensor.contiguous() for name, tensor in result.items()}


def check_tensors(found: Mapping[str, TensorLike], config: ModelConfig, family: str, where: str) -> list[Rule]:
    """The rules by which tensors of these names, shapes and types become ours; nothing of them is read.

    LmError: 65 for a missing, misshapen or mistyped tensor, 2 for one that we have no place for.
    """
    unknown = {name for name in found if not name.endswith(".rotary_emb.inv_freq")}  # never read by their classes
    rules: list[Rule] = []
    for rule in _TABLE[family].rules(config):
        for name, shape in rule.theirs.items():
            _check(found, name, shape, where)
            unknown.discard(name)
        rules.append(rule)
    if config.tie_embeddings and "lm_head.weight" in unknown:
        _check(found, "lm_head.weight", next(iter(rules[0].theirs.values())), where)
        unknown.discard("lm_head.weight")
    if unknown:
        first = shown(min(unknown))
        raise LmError(f"{where}: the tensor {first} has no place in our model ({len(unknown)} such).")
    return rules


def _check(found: Mapping[str, TensorLike], name: str, shape: Shape, where: str) -> None:
    if name not in found:
        raise LmError(f"{where}: the tensor {name} is missing.", code=Exit.DATA)
    entry = found[name]
    if tuple(entry.shape) != shape:
        raise LmError(
            f"{where}: the tensor {name} has the shape {list(entry.shape)}, config.json implies {list(shape)}.",
            code=Exit.DATA,
        )
    if entry.dtype not in _FLOATS:
        kind = str(entry.dtype).removeprefix("torch.")
        raise LmError(f"{where}: the tensor {name} holds {kind}, not floating-point numbers.", code=Exit.DATA)


def from_hf_tensors(theirs: Mapping[str, Tensor], config: ModelConfig, family: str, where: str) -> dict[str, Tensor]:
    """Their tensors by name -> ours, in fp32. LmError as from `check_tensors`, and (2) for a head beside a tied
    embedding that is another one, and for numbers where our models have none."""
    result: dict[str, Tensor] = {}
    rules = check_tensors(theirs, config, family, where)
    for rule in rules:
        parts = [theirs[name].float() for name in rule.theirs]
        if rule.ours:
            result[rule.ours] = rule.join(parts)
        elif any(bool(part.any()) for part in parts):
            raise LmError(f"{where}: {list(rule.theirs)[-1]} is not zero, and our models have no place for it.")
    if config.tie_embeddings and "lm_head.weight" in theirs:
        (embedding,) = rules[0].theirs
        if not torch.equal(theirs["lm_head.weight"].float(), theirs[embedding].float()):
            raise LmError(
                f"{where}: lm_head.weight is not {embedding}, though tie_word_embeddings says that they are one.",
                hint='Write "tie_word_embeddings": false into config.json to keep both.',
            )
    return result
