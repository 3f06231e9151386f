"""What one architecture of transformers is to us."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lmcore.inference.families.keys import Key, Reading
from lmcore.inference.families.tensors import Rules
from lmcore.model.config import ModelConfig


def _none(config: ModelConfig, biased: bool) -> list[str]:
    return []


@dataclass(frozen=True)
class Family:
    """A row of the table: layers that it can hold, keys, what is derived from them, tensors."""

    name: str
    """Its model_type."""
    architecture: str
    mixers: str
    """Letters of `pattern` that it carries."""
    ffns: str
    """Letters of `ffn` that it carries."""
    keys: Mapping[str, Key]
    settings: Callable[[Reading], dict[str, Any]]
    """Settings of ours (dotted names) that are not one of their keys each; refuses what we cannot carry."""
    config: Callable[[ModelConfig], dict[str, Any]]
    """Their keys that are not one setting of ours each."""
    rules: Callable[[ModelConfig], Rules]
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Other names of keys."""
    qk_norm: bool = False
    """Whether its attention has QK-norm."""
    gated: bool = False
    """Whether its attention has an output gate."""
    obstacles: Callable[[ModelConfig, bool], list[str]] = _none
    """What else keeps it from carrying a model, in the names of our settings; the flag: selection biases not zero."""
