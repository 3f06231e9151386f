"""From logits to the next token: temperature, filters, and a draw that is a pure function of its key.

The order of the steps is the usual one, that of the logits processors of `transformers` (the tests compare with them):

    repetition penalty -> temperature -> top-k -> top-p -> min-p -> renormalise -> draw

Equal logits stay or go together, so that no draw depends on the order in which a sort leaves them. For top-k and min-p
that is what `transformers` does. Its top-p keeps only some of the tokens that are equally likely at the border; here
all of them stay. Greedy, and so top-k 1, takes the first of equally likely tokens.

A draw turns a uniform number u into the first token, in the order of ids, whose cumulative probability exceeds u. The
number u comes from a hash of (seed, prompt, sample, position), not from a generator with a state: the same seed gives
the same text whatever else is in the batch and in which order the prompts came.

B batch, V vocabulary.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from lmcore.config import Config

_TOP_P_PREFIX = 512  # top-p first looks at this many likeliest tokens; a full sort of the vocabulary is rarely needed


class SamplingConfig(Config):
    """How text is drawn from a model."""

    max_tokens: Annotated[int, Field(ge=1)] = 256
    """Tokens to generate at most, per sample."""
    temperature: Annotated[float, Field(ge=0)] = 0.8
    """Divides the logits; 0 takes the likeliest token every time (greedy)."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """Only the k likeliest tokens can be drawn, and those as likely as the k-th; 0 means all, 1 is greedy."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Only the fewest tokens whose probabilities reach this sum can be drawn, and those as likely as the last."""
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Only tokens at least this fraction as likely as the likeliest can be drawn."""
    repetition_penalty: Annotated[float, Field(gt=0)] = 1.0
    """Above 1, tokens that the prompt or the text already holds become less likely (CTRL, arXiv:1909.05858)."""
    stop: tuple[str, ...] = ()
    """Texts that end a sample; they are not part of it."""
    ignore_eos: bool = False
    """Go on after the end-of-text token."""
    seed: int = 0
    """Same seed, same text."""
    samples: Annotated[int, Field(ge=1)] = 1
    """Texts per prompt."""
    logprobs: Annotated[int, Field(ge=0, le=100)] | None = None
    """None: no log-probabilities. n: that of each token and of the n likeliest ones, before any of the steps above."""

    @property
    def greedy(self) -> bool:
        """True when no random number is needed."""
        return self.temperature == 0 or self.top_k == 1


def filtered(logits: Tensor, config: SamplingConfig, seen: Tensor | None = None) -> Tensor:
    """Logits (B, V) -> fp32 logits (B, V) after every step; tokens that cannot be drawn are -inf.

    seen: bool (B, V), the tokens that count for the repetition penalty. Greedy decoding keeps the likeliest token only.
    """
    logits = logits.float()
    if config.repetition_penalty != 1.0 and seen is not None:
        penalised = torch.where(logits > 0, logits / config.repetition_penalty, logits * config.repetition_penalty)
        logits = torch.where(seen, penalised, logits)
    if config.greedy:
        best = logits.argmax(-1, keepdim=True)
        return torch.full_like(logits, -torch.inf).scatter_(-1, best, 0.0)
    if config.temperature != 1.0:
        # Subtracting the maximum first keeps a tiny temperature from overflowing.
        logits = (logits - logits.amax(-1, keepdim=True)) / config.temperature
    if 0 < config.top_k < logits.shape[-1]:
        kth = logits.topk(config.top_k, -1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if config.top_p < 1.0:
        logits = logits.masked_fill(logits < _top_p_threshold(logits, config.top_p), -torch.inf)
    if config.min_p > 0.0:
        probabilities = logits.softmax(-1)
        limit = config.min_p * probabilities.amax(-1, keepdim=True)
        logits = logits.masked_fill(probabilities < limit, -torch.inf)
    return logits


def draw(probabilities: Tensor, uniforms: Sequence[float]) -> Tensor:
    """Probabilities (B, V) and one number in [0, 1) per row -> token ids (B,): the inverse of the cumulative sum.

    The rows need not sum to one. A token of probability zero is never drawn.
    """
    cumulative = probabilities.double().cumsum(-1)
    targets = torch.tensor(uniforms, dtype=torch.float64, device=probabilities.device)[:, None] * cumulative[:, -1:]
    ids = torch.searchsorted(cumulative, targets, right=True).squeeze(-1)
    # u so close to 1 that u * total rounds to the total: the last token that has any probability.
    last = torch.searchsorted(cumulative, cumulative[:, -1:].contiguous()).squeeze(-1)
    return torch.minimum(ids, last)


def next_tokens(
    logits: Tensor, config: SamplingConfig, uniforms: Sequence[float], seen: Tensor | None = None
) -> Tensor:
    """Logits (B, V) -> token ids (B,)."""
    if config.greedy:
        if config.repetition_penalty != 1.0:
            return filtered(logits, config, seen).argmax(-1)
        return logits.argmax(-1)
    return draw(filtered(logits, config, seen).softmax(-1), uniforms)


def distribution(logits: Tensor, config: SamplingConfig, seen: Tensor | None = None) -> Tensor:
    """Logits (B, V) -> the probabilities (B, V) that `next_tokens` draws from."""
    return filtered(logits, config, seen).softmax(-1)


class Uniforms:
    """The random numbers of one text: u(position) in [0, 1), a pure function of (seed, prompt, sample, position, use).

    `use` tells independent draws at one position apart (speculative decoding needs three).
    """

    def __init__(self, seed: int, prompt: Sequence[int], sample: int) -> None:
        key = hashlib.blake2b(digest_size=32)
        key.update(str((seed, sample)).encode())
        key.update(struct.pack(f"<{len(prompt)}I", *prompt))
        self._key = key.digest()

    def __call__(self, position: int, use: int = 0) -> float:
        digest = hashlib.blake2b(struct.pack("<QQ", position, use), key=self._key, digest_size=8).digest()
        return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def _top_p_threshold(logits: Tensor, top_p: float) -> Tensor:
    """(B, V) -> (B, 1): the smallest logit that stays, so that the kept tokens are the fewest that reach `top_p`."""
    size = logits.shape[-1]
    log_total = logits.logsumexp(-1, keepdim=True)
    for count in (min(_TOP_P_PREFIX, size), size):
        ordered = logits.topk(count, -1).values
        before = (ordered - log_total).exp().cumsum(-1).roll(1, -1)
        before[:, 0] = 0.0  # the likeliest token always stays
        kept = before < top_p
        if count == size or not bool(kept[:, -1].any()):
            break
    return ordered.masked_fill(~kept, torch.inf).amin(-1, keepdim=True)
