"""The language model: embedding, trunk of blocks, final norm, head; its loss, its decoding state and its parameter
table.

    model = LanguageModel(ModelConfig(vocab_size=256, d_model=128, num_layers=4, num_heads=4))
    logits = model(tokens)                                  # (B, T) ids -> (B, T, vocab_size), fp32 or better
    losses = model.loss(inputs, targets)                    # (B, T) ids each; losses.objective().backward()

    state = model.init_state(batch_size=1, max_length=512)
    logits = model(prompt, state=state)                     # then model(next_token, state=state), and so on

Weights stay in the dtype of the parameters. `model.compute_dtype` (None: that of the parameters) is the dtype of the
residual stream and so of every matrix product; norms, softmax, routing, scans, FFTs and the loss are in fp32 or
better. Dropout draws from torch's default generator of the device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lmcore.errors import LmError
from lmcore.model.block import Aux, Block
from lmcore.model.config import ModelConfig
from lmcore.model.layers import Embedding, Linear, RMSNorm, wide
from lmcore.model.loss import Losses, Term, head_cross_entropy
from lmcore.model.parameters import Owner, ParameterInfo, Role, parameter_table, refuse_meta
from lmcore.model.rotary import Positions
from lmcore.model.state import DecodeState


class LanguageModel(nn.Module):
    """A decoder built from a ModelConfig. Initialised from seed 0 unless it lies on the meta device."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        if config.vocab_size == 0:
            raise LmError("model.vocab_size is 0: give the number of ids of the tokenizer.")
        self.config = config
        self.compute_dtype: torch.dtype | None = None
        self.checkpoint_every = 0
        tied = config.tie_embeddings
        self.embedding = Embedding(
            config.vocab_size, config.padded_vocab, config.d_model, role=Role.TIED if tied else Role.EMBEDDING
        )
        self.dropout = nn.Dropout(config.dropout) if config.dropout else None
        self.blocks = nn.ModuleList(Block(config, kind) for kind in config.layers)
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.head = None if tied else Linear(config.d_model, config.padded_vocab, role=Role.HEAD)
        if not self.embedding.weight.is_meta:
            self.init_weights(0)

    # ------------------------------------------------------------------ weights

    def init_weights(self, seed: int) -> None:
        """Draw all weights anew; the same seed gives the same model on every device."""
        refuse_meta(self)
        generator = torch.Generator().manual_seed(seed)
        for module in self.modules():
            if isinstance(module, Owner):
                module.reset(generator, self.config.init_std)

    def parameter_table(self) -> list[ParameterInfo]:
        """Every parameter once, with the role that its owner declares."""
        return parameter_table(self)

    @property
    def head_weight(self) -> Tensor:
        """(padded vocabulary, D)."""
        return self.embedding.weight if self.head is None else self.head.weight

    # ------------------------------------------------------------------ forward

    def forward(self, tokens: Tensor, positions: Tensor | None = None, state: DecodeState | None = None) -> Tensor:
        """Logits (B, T, vocab_size) of the token after each of `tokens` (B, T), in fp32 or better. See `trunk`."""
        return self.logits(self.trunk(tokens, positions, state))

    def trunk(self, tokens: Tensor, positions: Tensor | None = None, state: DecodeState | None = None) -> Tensor:
        """Hidden states (B, T, D) before the final norm.

        positions: (B, T) ints when rows differ in length: -1 marks padding, which comes last in each row. None: the
        chunk continues each row where it stands. state: from `init_state`; it is advanced past the chunk. None: start
        empty, keep nothing.
        """
        return self._run(tokens, self._positions(tokens, positions, state), state)[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """Head of hidden states (..., D) from `trunk` -> (..., vocab_size) in fp32 or better."""
        hidden = self.norm(hidden)
        logits = F.linear(hidden, self.head_weight.to(hidden.dtype))[..., : self.config.vocab_size]
        return logits.to(wide(logits.dtype))

    def _run(self, tokens: Tensor, positions: Positions, state: DecodeState | None) -> tuple[Tensor, Aux]:
        x = self.embedding(tokens, self.compute_dtype)
        if self.dropout is not None:
            x = self.dropout(x)
        aux: Aux = ()
        for i, block in enumerate(self.blocks):
            if state is not None:
                x, state.layers[i], more = block(x, positions, state.layers[i])
            elif self.checkpoint_every and i % self.checkpoint_every == 0 and torch.is_grad_enabled():
                x, _, more = checkpoint(block, x, positions, use_reentrant=False)
            else:
                x, _, more = block(x, positions)
            aux += more
        return x, aux

    def _positions(self, tokens: Tensor, index: Tensor | None, state: DecodeState | None) -> Positions:
        """The positions of a chunk; advances the counters of `state`."""
        steps, ragged = tokens.shape[1], index is not None
        if index is None:
            index = torch.arange(steps, device=tokens.device)[None]
            if state is not None and state.lengths is not None:
                index, ragged = state.lengths[:, None] + index, True
            elif state is not None and state.length:
                index = index + state.length
        if state is not None:
            if not ragged and state.length + steps > state.max_length:
                raise LmError(f"The state has room for {state.max_length} tokens; {state.length + steps} are needed.")
            if ragged:
                before = state.lengths
                if before is None:
                    before = torch.full((tokens.shape[0],), state.length, device=tokens.device)
                state.lengths = torch.maximum(before, index.amax(1) + 1)
            state.length += steps
        return Positions.make(
            index,
            head_dim=self.config.head_dim,
            theta=self.config.rope_theta,
            dtype=self.compute_dtype or self.embedding.weight.dtype,
            ragged=ragged,
        )

    # ------------------------------------------------------------------ decoding state

    def init_state(
        self,
        batch_size: int,
        max_length: int,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> DecodeState:
        """An empty state with room for `max_length` positions per row.

        dtype: of the attention caches and convolution tails (None: the compute dtype); recurrent sums stay in fp32 or
        better.
        """
        dtype = dtype or self.compute_dtype or self.embedding.weight.dtype
        device = torch.device(device) if device is not None else self.embedding.weight.device
        layers = [block.init_state(batch_size, max_length, dtype, device) for block in self.blocks]  # type: ignore[operator]
        return DecodeState(layers, 0, None, max_length)

    # ------------------------------------------------------------------ loss

    def loss(self, inputs: Tensor, targets: Tensor) -> Losses:
        """The losses of a micro-batch. inputs, targets: (B, T) ids; a target of -100 is not counted."""
        positions = self._positions(inputs, None, None)
        hidden, _ = self._run(inputs, positions, None)
        total, count = self._head_loss(hidden, targets)
        return Losses({"main": Term(total, count)})

    def term_counts(self, batch_size: int, length: int) -> dict[str, int]:
        """The count of each term of `loss` for a (batch_size, length) micro-batch without masked targets.

        Known before the forward pass, so that a step can be divided by its global counts before any backward.
        """
        return {"main": batch_size * length}

    def _head_loss(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return head_cross_entropy(self.norm(hidden), self.head_weight, targets, self.config.vocab_size)


def count_parameters(parameters: Sequence[ParameterInfo]) -> int:
    """Numbers held by the given parameters."""
    return sum(info.parameter.numel() for info in parameters)
