"""One layer: pre-norm residual branches around a mixer and a feed-forward.

    x <- x + dropout(mixer(rmsnorm(x)))
    x <- x + dropout(ffn(rmsnorm(x)))

`mixer_for` and `feed_forward_for` are the only places that map letters of the configuration to modules. What a router
has to say (see routing.py) is returned beside the output, never kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lmcore.model.attention import Attention
from lmcore.model.config import LayerKind, ModelConfig
from lmcore.model.feedforward import SwiGLU
from lmcore.model.layers import RMSNorm
from lmcore.model.mamba import Mamba
from lmcore.model.moe import MoE
from lmcore.model.resonance import Resonance
from lmcore.model.rotary import Positions

Aux = tuple[Any, ...]
"""What the routers of a layer report, in the order of the modules."""


def mixer_for(config: ModelConfig, letter: str) -> nn.Module:
    """The sequence mixer of a pattern letter."""
    if letter == "A":
        return Attention(config)
    if letter == "W":
        return Attention(config, window=config.window)
    if letter == "M":
        return Mamba(config)
    if letter == "R":
        return Mamba(config, routed=True)
    assert letter == "F"
    return Resonance(config)


def feed_forward_for(config: ModelConfig, letter: str) -> nn.Module | None:
    """The feed-forward of a letter; None for "-"."""
    if letter == "d":
        return SwiGLU(config.d_model, config.d_ff, residual_scale=(2 * config.num_layers) ** -0.5)
    if letter == "e":
        return MoE(config, residual_scale=(2 * config.num_layers) ** -0.5)
    return None


class Block(nn.Module):
    """x, state, aux = block(x, positions, state)."""

    def __init__(self, config: ModelConfig, kind: LayerKind) -> None:
        super().__init__()
        self.mixer_norm = RMSNorm(config.d_model, config.norm_eps)
        self.mixer = mixer_for(config, kind.mixer)
        self.ffn = feed_forward_for(config, kind.ffn)
        self.ffn_norm = RMSNorm(config.d_model, config.norm_eps) if self.ffn is not None else None
        self.dropout = nn.Dropout(config.dropout) if config.dropout else None

    def init_state(self, batch: int, max_length: int, dtype: torch.dtype, device: torch.device) -> Any:
        return self.mixer.init_state(batch, max_length, dtype, device)  # type: ignore[operator]

    def forward(self, x: Tensor, positions: Positions, state: Any = None) -> tuple[Tensor, Any, Aux]:
        """x: (B, T, D) -> (B, T, D)."""
        y, state, aux = self.mixer(self.mixer_norm(x), positions, state)
        x = x + (y if self.dropout is None else self.dropout(y))
        if self.ffn is not None and self.ffn_norm is not None:
            y = self.ffn(self.ffn_norm(x))
            if isinstance(self.ffn, MoE):
                y, stats = y
                aux = (*aux, stats)
            x = x + (y if self.dropout is None else self.dropout(y))
        return x, state, aux
