"""Mixture-of-Depths: a block that only some tokens enter (arXiv:2404.02258).

    x_i <- x_i + g_i (block(X)_i - x_i)  for the chosen tokens i,   unchanged for the others;   X = the chosen tokens
    g_i = 2 sigmoid(w . x_i)             equal to 1 at w = 0, so the router learns through the output

Training chooses the ceil(capacity T) largest w . x of each sequence. That looks at the future: a later token can push
an earlier one out. Perplexity measured that way is not a language model's. A small predictor therefore learns, from x
alone and without sending gradients back, which tokens will be chosen; evaluation and generation choose by it, token by
token, causally. Both modes can be asked for (`mode`), so that both losses can be reported.

The block sees the chosen tokens only: they keep their true positions, skipped tokens never enter its caches or states,
and a recurrent mixer inside counts its time in chosen tokens.

Shapes: B batch, T time, D width, n chosen tokens.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmcore.model.block import Aux, Block
from lmcore.model.config import LayerKind, ModelConfig
from lmcore.model.layers import Linear, wide
from lmcore.model.parameters import Owner, Role
from lmcore.model.rotary import Positions

Mode = Literal["auto", "topk", "causal"]


class DepthStats(NamedTuple):
    """What the predictor of one block did in one training pass, summed over tokens."""

    loss: Tensor
    """Its binary cross-entropy against the choice of the router, in nats."""
    agreed: Tensor
    """Tokens on which predictor and router agree."""
    tokens: int


class DepthRouted(nn.Module):
    """x, state, aux = module(x, positions, state). mode: auto = topk while training, causal otherwise."""

    def __init__(self, config: ModelConfig, kind: LayerKind) -> None:
        super().__init__()
        d, hidden = config.d_model, max(8, config.d_model // 2)
        self.capacity = config.mod.capacity
        self.mode: Mode = "auto"
        self.block = Block(config, kind)
        self.router = Linear(d, 1, role=Role.ROUTER)
        self.predictor_in = Linear(d, hidden, role=Role.ROUTER)
        self.predictor_out = Linear(hidden, 1, role=Role.ROUTER)
        self.predictor_bias = Bias()

    def init_state(self, batch: int, max_length: int, dtype: torch.dtype, device: torch.device) -> Any:
        return self.block.init_state(batch, max_length, dtype, device)

    def forward(self, x: Tensor, positions: Positions, state: Any = None) -> tuple[Tensor, Any, Aux]:
        """x: (B, T, D) -> (B, T, D)."""
        exact = x.to(wide(x.dtype))
        logit = self.router(exact)[..., 0]
        gain = 2 * logit.sigmoid().to(x.dtype)
        if state is None and (self.mode == "topk" or (self.mode == "auto" and self.training)):
            return self._by_router(x, exact, positions, logit, gain)
        chosen = (self.predict(exact) > 0) & positions.valid
        # The chosen tokens of each row first, in order; the rest of the row is padding to the block.
        counts = chosen.sum(1)
        most = 1 if x.shape[1] == 1 else int(counts.max())
        if most == 0:
            return x, state, ()
        index = (~chosen).to(torch.uint8).argsort(dim=1, stable=True)[:, :most]
        rows = torch.arange(most, device=x.device) < counts[:, None]
        inside = take(x, index)
        y, state, _ = self.block(inside, positions.gather(rows, index), state)
        change = take(gain[..., None], index) * (y - inside) * rows[..., None]
        return x.scatter_add(1, index[..., None].expand_as(change), change), state, ()

    def predict(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T) logits of being chosen, each from its own token."""
        hidden = F.silu(self.predictor_in(x))
        return self.predictor_bias(self.predictor_out(hidden)[..., 0])  # type: ignore[no-any-return]

    def _by_router(
        self, x: Tensor, exact: Tensor, positions: Positions, logit: Tensor, gain: Tensor
    ) -> tuple[Tensor, None, Aux]:
        batch, steps, _ = x.shape
        n = max(1, math.ceil(self.capacity * steps))
        # Equal tokens have equal logits before any mixer. The earlier one wins, on every device; topk promises nothing.
        order = logit.detach().sort(stable=True, dim=-1, descending=True).indices
        index = order[:, :n].sort(-1).values
        inside = take(x, index)
        everywhere = torch.ones_like(index, dtype=torch.bool)
        y, _, aux = self.block(inside, positions.gather(everywhere, index), None)
        change = take(gain[..., None], index) * (y - inside)
        out = x.scatter_add(1, index[..., None].expand_as(change), change)
        target = torch.zeros_like(logit).scatter(1, index, 1.0).detach()
        prediction = self.predict(exact.detach())
        loss = F.binary_cross_entropy_with_logits(prediction, target, reduction="sum")
        agreed = ((prediction > 0) == (target > 0)).sum()
        return out, None, (*aux, DepthStats(loss, agreed, batch * steps))


class Bias(Owner):
    """One number added."""

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.value.to(x.dtype)

    def own_parameters(self) -> Any:
        yield "value", Role.SCALAR, (), False

    def reset(self, generator: torch.Generator, std: float) -> None:
        nn.init.zeros_(self.value)


def take(x: Tensor, index: Tensor) -> Tensor:
    """x: (B, T, D), index: (B, n) -> (B, n, D)."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))
