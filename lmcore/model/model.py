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

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lmcore.errors import LmError
from lmcore.model.attention import Attention, KVCache
from lmcore.model.block import Aux, Block
from lmcore.model.config import ModelConfig
from lmcore.model.depth import DepthRouted, DepthStats, Mode
from lmcore.model.layers import Embedding, Linear, RMSNorm, wide
from lmcore.model.loss import Losses, Term, head_cross_entropy, head_cross_entropy_each
from lmcore.model.moe import load_metrics
from lmcore.model.mtp import ParallelHead, SequentialHead
from lmcore.model.parameters import Owner, ParameterInfo, Role, parameter_table, refuse_meta
from lmcore.model.rotary import Positions
from lmcore.model.routing import Router, RouterStats
from lmcore.model.state import DecodeState


class LanguageModel(nn.Module):
    """A decoder built from a ModelConfig. Initialised from `seed` unless it lies on the meta device."""

    def __init__(self, config: ModelConfig, *, seed: int = 0) -> None:
        super().__init__()
        if config.vocab_size == 0:
            raise LmError("model.vocab_size is 0: give the number of ids of the tokenizer.")
        self.config = config
        self.compute_dtype: torch.dtype | None = None
        self.checkpoint_every = 0
        self.fused_head = False
        """Whether the loss uses compiled kernels, apart from the compilation of the blocks (see loss.py)."""
        self.keep_row_losses = False
        """Whether `loss` also reports the loss of each row (Losses.rows)."""
        tied = config.tie_embeddings
        self.embedding = Embedding(
            config.vocab_size, config.padded_vocab, config.d_model, role=Role.TIED if tied else Role.EMBEDDING
        )
        self.dropout = nn.Dropout(config.dropout) if config.dropout else None
        self.blocks = nn.ModuleList(
            DepthRouted(config, kind) if kind.depth == "m" else Block(config, kind) for kind in config.layers
        )
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.head = None if tied else Linear(config.d_model, config.padded_vocab, role=Role.HEAD)
        head = SequentialHead if config.mtp.kind == "sequential" else ParallelHead
        self.mtp = nn.ModuleList(head(config) for _ in range(config.mtp.depths))
        self.sum_over_ranks: Callable[[Tensor], None] | None = None
        if not self.embedding.weight.is_meta:
            self.init_weights(seed)

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
        """Logits (B, T, vocab_size) of the token after each of `tokens` (B, T), in fp32 or better. See `trunk`.

        Raises LmError for an id beyond the vocabulary (on a CPU; elsewhere looking at ids would wait for the device).
        """
        if tokens.device.type == "cpu" and not torch.compiler.is_compiling() and tokens.numel():
            low, high = (int(value) for value in tokens.aminmax())
            if low < 0 or high >= self.config.vocab_size:
                wrong = low if low < 0 else high
                raise LmError(f"the id {wrong:,} is given to a model with ids 0 to {self.config.vocab_size - 1:,}.")
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

    def _run(self, tokens: Tensor, positions: Positions, state: DecodeState | None) -> tuple[Tensor, Reports]:
        x = self.embedding(tokens, self.compute_dtype)
        if self.dropout is not None:
            x = self.dropout(x)
        reports: list[tuple[nn.Module, Aux]] = []
        for i, block in enumerate(self.blocks):
            if state is not None:
                x, state.layers[i], aux = block(x, positions, state.layers[i])
            elif self.checkpoint_every and i % self.checkpoint_every == 0 and torch.is_grad_enabled():
                x, _, aux = checkpoint(block, x, positions, use_reentrant=False)
            else:
                x, _, aux = block(x, positions)
            reports.append((block, aux))
        return x, reports

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

    def init_draft_states(self, batch_size: int, max_length: int) -> list[DecodeState]:
        """Empty states of the heads for multi-token prediction, one per depth; they advance with `mtp_hidden`."""
        dtype, device = self.compute_dtype or self.embedding.weight.dtype, self.embedding.weight.device
        return [
            DecodeState([head.block.init_state(batch_size, max_length, dtype, device)], 0, None, max_length)  # type: ignore[union-attr, operator]
            for head in self.mtp
        ]

    def mtp_hidden(
        self,
        depth: int,
        hidden: Tensor,
        tokens: Tensor,
        positions: Tensor | None = None,
        state: DecodeState | None = None,
        head: nn.Module | None = None,
    ) -> Tensor:
        """Output (B, T, D) of head `depth` (1 = the token after the next); `logits` turns it into predictions.

        hidden: (B, T, D) of depth - 1 (0 = `trunk`) at T positions; for the parallel kind always of the trunk.
        tokens: (B, T), at each position i the token i + depth (the parallel kind does not read it).
        head: computes in place of `mtp[depth - 1]`.
        """
        where = self._positions(tokens, positions, state)
        embedded = self.embedding(tokens, hidden.dtype)
        before = None if state is None else state.layers[0]
        output, after, _ = (head or self.mtp[depth - 1])(hidden, embedded, where, before)
        if state is not None:
            state.layers[0] = after
        return output  # type: ignore[no-any-return]

    def keep_prefix(self, state: DecodeState, snapshot: DecodeState, tokens: Tensor, count: Tensor) -> bool:
        """Rewind `state` to what it would be had only the first count[b] of `tokens` (B, n) been read since `snapshot`.

        count: (B,). Attention caches forget the rest; recurrent states cannot be rewound, so if there are any the
        state goes back to the snapshot and reads the kept tokens again. Returns whether that second pass was needed.
        """
        if all(isinstance(layer, KVCache) for layer in state.layers) and "m" not in self.config.depth:
            state.layers = [now.keep(then, count) for now, then in zip(state.layers, snapshot.layers, strict=True)]
            even = snapshot.lengths is None and bool((count == count[0]).all())
            base = snapshot.length if snapshot.lengths is None else snapshot.lengths
            state.lengths = None if even else base + count
            state.length = snapshot.length + int(count.max())
            return False
        state.restore(snapshot)
        most = int(count.max())
        if most:
            t = torch.arange(most, device=tokens.device)
            base = snapshot.length if snapshot.lengths is None else snapshot.lengths[:, None]
            even = snapshot.lengths is None and bool((count == most).all())
            index = None if even else torch.where(t < count[:, None], base + t, -1)
            self.trunk(tokens[:, :most], index, state)
        return True

    # ------------------------------------------------------------------ loss

    def loss(self, inputs: Tensor, targets: Tensor) -> Losses:
        """The losses of a micro-batch. inputs, targets: (B, T) ids; a target of -100 is not counted.

        While training also the terms that the configuration asks for: `mtp_k`, the loss of the k-th head ahead;
        `balance`, `z` and `rom_balance` of the routers; `mod`, the loss of the causal predictors of depth routing.
        """
        if inputs.shape[1] <= len(self.mtp):
            raise LmError(f"Sequences of {inputs.shape[1]} tokens are too short for {len(self.mtp)} heads ahead.")
        positions = self._positions(inputs, None, None)
        hidden, reports = self._run(inputs, positions, None)
        rows = None
        if self.keep_row_losses:
            total, count, each = head_cross_entropy_each(
                self.norm(hidden), self.head_weight, targets, self.config.vocab_size, fused=self.fused_head
            )
            terms, rows = {"main": Term(total, count)}, each.sum(1).float()
        else:
            terms = {"main": Term(*self._head_loss(hidden, targets))}
        if not self.training:
            return Losses(terms, rows=rows)
        for k, head in enumerate(self.mtp, 1):
            if self.config.mtp.kind == "sequential":
                hidden = hidden[:, :-1]
                embedded = self.embedding(inputs[:, k:], hidden.dtype)
                hidden, _, aux = self._checkpointed(head, hidden, embedded, positions.shift_end(k))
                ahead = hidden
            else:
                ahead, _, aux = self._checkpointed(head, hidden, None, positions)
                ahead = ahead[:, :-k]
            terms[f"mtp_{k}"] = Term(*self._head_loss(ahead, targets[:, k:]), self.config.mtp.weight / len(self.mtp))
            reports.append((head, aux))
        metrics = self._router_terms(reports, terms)
        return Losses(terms, metrics, rows)

    def term_counts(self, batch_size: int, length: int) -> dict[str, int]:
        """The count of each term of `loss` for a (batch_size, length) training micro-batch without masked targets.

        Known before the forward pass, so that a step can be divided by its global counts before any backward.
        """
        counts = {"main": batch_size * length}
        for k in range(1, len(self.mtp) + 1):
            counts[f"mtp_{k}"] = batch_size * (length - k)
        for block in (*self.blocks, *self.mtp):
            tokens = length
            if isinstance(block, DepthRouted):
                counts["mod"] = counts.get("mod", 0) + batch_size * length
                tokens = max(1, math.ceil(block.capacity * length))
            elif isinstance(block, SequentialHead):
                tokens = length - (list(self.mtp).index(block) + 1)
            for router in routers_of(block):
                for name in router.weights:
                    counts[name] = counts.get(name, 0) + batch_size * tokens
        return counts

    def _router_terms(self, reports: Reports, terms: dict[str, Term]) -> dict[str, Tensor]:
        """Add the terms of all routers to `terms`; returns metrics."""
        routed: list[tuple[Router, RouterStats]] = []
        depth: list[DepthStats] = []
        for module, aux in reports:
            seen = [report for report in aux if isinstance(report, RouterStats)]
            routed += zip(routers_of(module), seen, strict=True) if seen else []
            depth += [report for report in aux if isinstance(report, DepthStats)]
        loads = [router.seen_load + stats.counts for router, stats in routed]
        if self.sum_over_ranks is not None and loads:
            together = torch.cat(loads)
            self.sum_over_ranks(together)
            loads = list(together.split([len(load) for load in loads]))
        for (router, stats), load in zip(routed, loads, strict=True):
            router.add_load(stats.counts)
            for name, (total, tokens, weight) in router.terms(stats, load).items():
                terms[name] = _add(terms.get(name), Term(total, tokens, weight))
        for predictor in depth:
            term = Term(predictor.loss, predictor.tokens, self.config.mod.predictor_weight)
            terms["mod"] = _add(terms.get("mod"), term)
        if not depth:
            return {}
        agreed = torch.stack([predictor.agreed for predictor in depth]).sum()
        return {"mod/agreement": agreed / sum(predictor.tokens for predictor in depth)}

    def _checkpointed(self, module: nn.Module, *inputs: Any) -> Any:
        if self.checkpoint_every and torch.is_grad_enabled():
            return checkpoint(module, *inputs, use_reentrant=False)
        return module(*inputs)

    def _head_loss(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return head_cross_entropy(
            self.norm(hidden), self.head_weight, targets, self.config.vocab_size, fused=self.fused_head
        )

    # ------------------------------------------------------------------ between steps

    def begin_accumulation(self) -> None:
        """Start a group of micro-batches whose balance loss counts expert load together (a step, or a part of it)."""
        for router in self.routers:
            router.seen_load.zero_()

    def reset_load(self) -> None:
        """Forget the expert load counted since the last step, as after a pass that was no part of the training."""
        for router in self.routers:
            router.step_load.zero_()
            router.seen_load.zero_()

    @torch.no_grad()
    def after_step(self, all_reduce: Callable[[Tensor], Any] | None = None) -> dict[str, Tensor]:
        """Call once after each optimizer step: moves the selection biases of experts and reports their utilisation.

        all_reduce: sums an int64 tensor in place over all devices. Returns (routers,) tensors: `router/entropy` (of
        the load, / ln E; 1 is even), `router/cv` (standard deviation / mean), `router/max_load` (largest / mean) and
        `router/dead` (share of experts without a token).
        """
        routers = self.routers
        if not routers:
            return {}
        together = torch.cat([router.step_load for router in routers])
        if all_reduce is not None:
            all_reduce(together)
        loads = list(together.split([router.num_experts for router in routers]))
        metrics = {f"router/{name}": value for name, value in load_metrics(loads).items()}
        for router, load in zip(routers, loads, strict=True):
            router.step_load.copy_(load)
            router.update_bias()
        return metrics

    @property
    def routers(self) -> list[Router]:
        """All routers to experts, in the order of the layers."""
        return routers_of(self)

    def set_depth_mode(self, mode: Mode) -> None:
        """How Mixture-of-Depths layers choose: auto (topk while training, else causal), topk or causal.

        Only causal is a language model; a loss in topk mode looks at the future and is worth reporting beside it.
        """
        for block in self.blocks:
            if isinstance(block, DepthRouted):
                block.mode = mode

    @torch.no_grad()
    def attention_sinks(self, tokens: Tensor) -> Tensor:
        """How much attention goes to the first position: the mean over heads, rows and queries but the first.

        tokens: (B, T) ids, T >= 2. Returns (attention layers,); for T random positions it would be about ln(T) / T.
        """
        found: list[Tensor] = []

        def look(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            assert isinstance(module, Attention)
            found.append(module.sink(arguments[0], arguments[1]))

        hooks = [m.register_forward_pre_hook(look) for m in self.blocks.modules() if isinstance(m, Attention)]
        try:
            self.trunk(tokens)
        finally:
            for hook in hooks:
                hook.remove()
        return torch.stack(found) if found else torch.empty(0)


Reports = list[tuple[nn.Module, Aux]]
"""What each block reported."""


def routers_of(module: nn.Module) -> list[Router]:
    """The routers to experts inside a module, in the order in which they report."""
    return [m for m in module.modules() if isinstance(m, Router)]


def _add(term: Term | None, more: Term) -> Term:
    """Terms of several layers as one: its value is the mean over tokens and layers, its weight the sum."""
    if term is None:
        return more
    return Term(term.sum + more.sum, term.count + more.count, term.weight + more.weight)


def count_parameters(parameters: Sequence[ParameterInfo]) -> int:
    """Numbers held by the given parameters."""
    return sum(info.parameter.numel() for info in parameters)
