"""Multi-token prediction: heads that look further ahead, for a richer loss and for drafts while generating.

With h the trunk's output and t the tokens, head k at position i predicts t_{i+k+1}:

    sequential   h^k_i = Block_k(M_k [RMSNorm(h^{k-1}_i) ; RMSNorm(Emb(t_{i+k}))]),  h^0 = h     DeepSeek-V3,
    arXiv:2412.19437 parallel     h^k_i = Block_k(h_i)
    arXiv:2404.19737

All heads share the embedding, the final norm and the output head. The loss is main + weight / depths * sum_k CE_k;
each depth loses one position of the sequence. (Gloeckle et al. take a layer off the trunk for every head; here the
trunk is whole.)

Drafting (self-speculation). After a pass of the trunk up to position p and a choice of t_{p+1}, the heads draft
t_{p+2}, ... The trunk then reads t_{p+1} and the drafts in one pass and keeps those that it would have chosen itself,
so the result is that of the trunk alone. `Drafter` keeps the heads' states in step; `LanguageModel.keep_prefix` takes
the refused drafts out of the trunk's state; `accept_drafts` is the rule of arXiv:2211.17192, under which samples keep
the trunk's distribution.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lmcore.model.block import Aux, Block
from lmcore.model.config import ModelConfig
from lmcore.model.layers import Linear, RMSNorm
from lmcore.model.rotary import Positions

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from lmcore.model.model import LanguageModel
    from lmcore.model.state import DecodeState


class SequentialHead(nn.Module):
    """One depth of the sequential kind: sees the hidden state and the next token's embedding."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.hidden_norm = RMSNorm(config.d_model, config.norm_eps)
        self.token_norm = RMSNorm(config.d_model, config.norm_eps)
        self.project = Linear(2 * config.d_model, config.d_model)
        self.block = Block(config, config.mtp_layer)

    def forward(
        self, hidden: Tensor, embedded: Tensor, positions: Positions, state: Any = None
    ) -> tuple[Tensor, Any, Aux]:
        """hidden, embedded: (B, T, D) -> (B, T, D)."""
        x = self.project(torch.cat([self.hidden_norm(hidden), self.token_norm(embedded)], -1))
        return self.block(x, positions, state)  # type: ignore[no-any-return]


class ParallelHead(nn.Module):
    """One depth of the parallel kind: a block of its own on the trunk."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.block = Block(config, config.mtp_layer)

    def forward(
        self, hidden: Tensor, embedded: Tensor | None, positions: Positions, state: Any = None
    ) -> tuple[Tensor, Any, Aux]:
        """hidden: (B, T, D) -> (B, T, D)."""
        return self.block(hidden, positions, state)  # type: ignore[no-any-return]


class Drafter:
    """The heads of a model while it generates; all rows of the batch move together.

    commit(hidden, following)  after every pass of the trunk: its output at n new positions and the n tokens that
    follow them,
                               all of them settled;
    propose(pick)              (B, depths) drafts for the tokens after the last settled one.
    """

    def __init__(
        self,
        model: LanguageModel,
        batch_size: int,
        max_length: int,
        *,
        logits: Callable[[Tensor], Tensor] | None = None,
        heads: Sequence[nn.Module] | None = None,
    ) -> None:
        """logits, heads: faster forms of `model.logits` and `model.mtp`, when there are some."""
        self.model = model
        self.logits = logits or model.logits
        self.heads = heads
        self.states = model.init_draft_states(batch_size, max_length)
        self.tails: list[Tensor] = []  # the newest settled output of each depth, and of the trunk
        self.parallel = model.config.mtp.kind == "parallel"

    def commit(self, hidden: Tensor, following: Tensor) -> None:
        """hidden: (B, n, D) from `trunk`; following: (B, n), the token after each of these positions."""
        tails = [hidden[:, -1:]]
        rows = hidden
        for depth, state in enumerate(self.states, 1):
            if depth > 1 and not self.parallel:
                # Depth k at position i needs t_{i+k}: it is one settled position behind depth k-1.
                rows = rows[:, :-1] if not self.tails else torch.cat([self.tails[depth - 1], rows[:, :-1]], 1)
            if rows.shape[1] == 0:
                tails.append(rows)
                continue
            source = hidden if self.parallel else rows
            tokens = following[:, following.shape[1] - source.shape[1] :]
            rows = self._read(depth, source, tokens, state)
            tails.append(rows[:, -1:])
        self.tails = tails

    def propose(self, pick: Callable[[Tensor], Tensor]) -> Tensor:
        """Drafts (B, depths). pick: logits (B, vocab_size) -> token ids (B,)."""
        drafts = [pick(self.logits(self.tails[1][:, -1]))]
        outer = self.tails[1]  # depth k-1 at its rows that depth k has not read: one settled, then provisional ones
        for depth, state in enumerate(self.states[1:], 2):
            if self.parallel:
                drafts.append(pick(self.logits(self.tails[depth][:, -1])))
                continue
            before = state.snapshot()
            new = self._read(depth, outer, torch.stack(drafts, 1), state)
            state.restore(before)
            drafts.append(pick(self.logits(new[:, -1])))
            outer = torch.cat([self.tails[depth], new], 1)
        return torch.stack(drafts, 1)

    def _read(self, depth: int, hidden: Tensor, tokens: Tensor, state: DecodeState) -> Tensor:
        head = None if self.heads is None else self.heads[depth - 1]
        return self.model.mtp_hidden(depth, hidden, tokens, state=state, head=head)


def accept_drafts(
    target: Tensor, draft: Tensor, drafts: Tensor, generator: torch.Generator | None = None
) -> tuple[int, Tensor]:
    """Speculative sampling: how many drafts stand, and the token after them; together distributed as the target.

    target: (n + 1, V) probabilities of the model at the drafted positions and the one after; draft: (n, V)
    probabilities that the drafts were drawn from; drafts: (n,) ids. A draft x stands with probability min(1, p(x) /
    q(x)); the first one refused is replaced by a draw from max(p - q, 0), and if all stand one more is drawn from p.
    """
    n = drafts.shape[0]
    uniform = torch.rand(n, generator=generator, device=target.device, dtype=target.dtype)
    for i in range(n):
        x = drafts[i]
        if uniform[i] * draft[i, x] >= target[i, x]:
            rest = (target[i] - draft[i]).clamp(min=0)
            rest = rest if rest.sum() > 0 else target[i]
            return i, torch.multinomial(rest, 1, generator=generator)[0]
    return n, torch.multinomial(target[n], 1, generator=generator)[0]
