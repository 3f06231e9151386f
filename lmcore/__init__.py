"""lmcore: the library under the `lm` tools.

The names below load on first use, so that importing lmcore costs nothing:

    from lmcore import get_batch, TokenStream, Muon, save_checkpoint, load_checkpoint, LanguageModel, ModelConfig
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lmcore.data.sampler import get_batch
    from lmcore.data.stream import TokenStream
    from lmcore.data.tokenizer import Tokenizer
    from lmcore.errors import LmError
    from lmcore.model.config import ModelConfig
    from lmcore.model.loss import cross_entropy
    from lmcore.model.model import LanguageModel
    from lmcore.optim.clip import clip_gradients
    from lmcore.optim.muon import Muon
    from lmcore.optim.schedule import cosine_with_warmup
    from lmcore.training.checkpoint import load_checkpoint, save_checkpoint

_HOMES = {
    "get_batch": "lmcore.data.sampler",
    "TokenStream": "lmcore.data.stream",
    "Tokenizer": "lmcore.data.tokenizer",
    "LmError": "lmcore.errors",
    "ModelConfig": "lmcore.model.config",
    "LanguageModel": "lmcore.model.model",
    "cross_entropy": "lmcore.model.loss",
    "clip_gradients": "lmcore.optim.clip",
    "Muon": "lmcore.optim.muon",
    "cosine_with_warmup": "lmcore.optim.schedule",
    "load_checkpoint": "lmcore.training.checkpoint",
    "save_checkpoint": "lmcore.training.checkpoint",
}

__all__ = [
    "LanguageModel",
    "LmError",
    "ModelConfig",
    "Muon",
    "TokenStream",
    "Tokenizer",
    "clip_gradients",
    "cosine_with_warmup",
    "cross_entropy",
    "get_batch",
    "load_checkpoint",
    "save_checkpoint",
]

# In a source checkout the commands lie in ../tools; in an installed wheel they are lmcore/tools and nothing is added.
_here = Path(__file__).parent
if not (_here / "tools").exists() and (_here.parent / "tools" / "cli.py").exists():
    __path__.append(str(_here.parent))


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'lmcore' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
