"""How well a model predicts held-out tokens: loss, perplexity, bits per byte, each with its standard error.

    loss            nats per token: mean of -log p(token | what came before it in its window), over every target
    perplexity      exp(loss)
    bits per byte   sum of nats / ln 2 / UTF-8 bytes of the same text; comparable between tokenizers

The whole stream is covered: windows of `context_length` inputs lie side by side, so that every token but the very
first is a target exactly once. A `stride` smaller than the context makes the windows overlap; then each token has at
least `context_length - stride` tokens before it (sliding-window evaluation). The last window is moved back to keep its
length. End-of-text tokens are targets too (a model has to know when to stop) and have no bytes, so bits per byte is the
cost of the stream as it is. Bytes are those of the text (lmcore/data/text_bytes.py), never those of decoded strings.

The standard error treats documents as the independent units (tokens of one document are not): with s_d nats and n_d
tokens in document d and r = sum s / sum n, it is sqrt(D / (D-1) * sum (s_d - r n_d)^2) / sum n. Where a stream has no
document ends, windows take the place of documents. Differences between two models are paired by document, which
removes what makes a document easy or hard for both.

    evaluate(loaded, stream)              a loaded checkpoint over a stream
    evaluate_model(model, stream, ...)    the same for a bare model; `max_tokens` picks evenly spread windows
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lmcore.data.text_bytes import Places, TextBytes, text_bytes
from lmcore.data.tokenizer import Tokenizer
from lmcore.errors import Exit, LmError
from lmcore.inference.decode import Decoder
from lmcore.progress import SILENT, Progress

if TYPE_CHECKING:
    from lmcore.data.stream import TokenStream
    from lmcore.model.model import LanguageModel
    from lmcore.training.checkpoint import LoadedModel

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]

BATCH_TOKENS = 8_192  # inputs per forward pass; the result does not depend on it beyond rounding
_LOGITS_AT_ONCE = 1 << 24  # fp32 numbers: 64 MiB


@dataclass(frozen=True)
class PositionLoss:
    """Mean loss of the targets at places `start` .. `stop - 1` of their windows: place p has p + 1 tokens before it."""

    start: int
    stop: int
    loss: float
    stderr: float | None
    tokens: int


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found. Losses are nats per token; None stands for a standard error that one unit cannot give."""

    loss: float
    loss_stderr: float | None
    perplexity: float
    bits_per_byte: float | None
    """None when the bytes of text behind the tokens are unknown."""
    bits_per_byte_stderr: float | None
    tokens: int
    """Targets that were scored."""
    bytes: int
    """UTF-8 bytes of the text behind these targets."""
    units: int
    """Documents (or windows) behind the standard error."""
    unit: str
    context_length: int
    stride: int
    dataset_id: str | None
    by_position: tuple[PositionLoss, ...]
    sums: Floats = field(repr=False, compare=False)
    """(units, 3): nats, tokens and bytes of each unit, in stream order; what paired differences are made of."""

    def summary(self) -> dict[str, Any]:
        """Plain values for JSON."""
        values = {key: value for key, value in vars(self).items() if key not in ("sums", "by_position")}
        return values | {"by_position": [vars(bucket) for bucket in self.by_position]}


@dataclass(frozen=True)
class Difference:
    """Model b minus model a on the same tokens, paired by document: negative means that b is better."""

    loss: float
    loss_stderr: float | None
    bits_per_byte: float | None
    bits_per_byte_stderr: float | None
    better_share: float
    """Share of the units on which b has the lower loss."""


# ---------------------------------------------------------------------------------------- public functions


def evaluate(
    loaded: LoadedModel,
    stream: TokenStream,
    *,
    context_length: int | None = None,
    stride: int | None = None,
    max_tokens: int | None = None,
    batch_tokens: int = BATCH_TOKENS,
    progress: Progress = SILENT,
) -> Evaluation:
    """Evaluate a checkpoint on a stream. The stream must have been made by the tokenizer of the checkpoint.

    context_length: inputs per window, default the length the model was trained with. stride: see the top of the file.
    Raises LmError when the tokenizers differ (65) or the stream is too short.
    """
    refuse_other_tokenizer(loaded, stream)
    tokenizer = loaded.tokenizer
    return evaluate_model(
        loaded.model,
        stream,
        context_length=context_length or loaded.model.config.context_length,
        text_bytes=text_bytes(stream, tokenizer),
        eos_id=None if tokenizer is None else tokenizer.eos_id,
        stride=stride,
        max_tokens=max_tokens,
        batch_tokens=batch_tokens,
        progress=progress,
    )


@torch.no_grad()
def evaluate_model(
    model: LanguageModel,
    stream: TokenStream,
    *,
    context_length: int,
    text_bytes: TextBytes | None = None,
    eos_id: int | None = None,
    stride: int | None = None,
    max_tokens: int | None = None,
    batch_tokens: int = BATCH_TOKENS,
    progress: Progress = SILENT,
) -> Evaluation:
    """Evaluate a model in the mode, dtype and device in which it is; training mode is restored afterwards.

    text_bytes: the bytes of text behind the tokens, for bits per byte. eos_id: ends a document, for the standard error.
    max_tokens: score only about this many targets, in whole windows spread evenly over the stream.
    """
    windows = _windows(len(stream), context_length, stride, max_tokens)
    units = _Units(eos_id if max_tokens is None else None)
    positions = _Positions(windows.length)
    was_training = model.training
    model.eval()
    progress.start("evaluate", float(windows.counts.sum()), "tokens")
    try:
        for starts, tokens, losses, counts in _score(model, stream, windows, batch_tokens):
            if text_bytes is None:
                sizes = np.zeros(tokens.shape)
            else:
                sizes = text_bytes.count(tokens, starts[:, None] + np.arange(1, windows.length + 1))
            for row, count in enumerate(counts):
                units.add(tokens[row, -count:], losses[row, -count:], sizes[row, -count:])
                positions.add(losses[row, -count:])
            progress.advance(float(counts.sum()))
    finally:
        model.train(was_training)
        progress.finish()
    sums = units.result()
    nats, tokens_, bytes_ = sums.sum(0)
    loss = float(nats / tokens_)
    if not math.isfinite(loss):
        raise LmError(f"the loss is {loss}: the model gives no finite probabilities on this data.", code=Exit.DIVERGED)
    return Evaluation(
        loss=loss,
        loss_stderr=_ratio_stderr(sums[:, 0], sums[:, 1]),
        perplexity=math.exp(min(loss, 700.0)),
        bits_per_byte=float(nats / math.log(2) / bytes_) if bytes_ else None,
        bits_per_byte_stderr=_ratio_stderr(sums[:, 0] / math.log(2), sums[:, 2]) if bytes_ else None,
        tokens=int(tokens_),
        bytes=round(bytes_),
        units=len(sums),
        unit=units.unit,
        context_length=windows.length,
        stride=windows.stride,
        dataset_id=stream.dataset_id,
        by_position=positions.result(),
        sums=sums,
    )


def difference(a: Evaluation, b: Evaluation) -> Difference:
    """b - a, paired by unit. Both must come from the same stream, windows and tokenizer."""
    if a.sums.shape != b.sums.shape or not np.array_equal(a.sums[:, 1:], b.sums[:, 1:]):
        raise ValueError("the two evaluations are of different data")
    nats = b.sums[:, 0] - a.sums[:, 0]
    tokens, bytes_ = a.sums[:, 1], a.sums[:, 2]
    has_bytes = bool(bytes_.sum())
    return Difference(
        loss=float(nats.sum() / tokens.sum()),
        loss_stderr=_ratio_stderr(nats, tokens),
        bits_per_byte=float(nats.sum() / math.log(2) / bytes_.sum()) if has_bytes else None,
        bits_per_byte_stderr=_ratio_stderr(nats / math.log(2), bytes_) if has_bytes else None,
        better_share=float((nats < 0).mean()),
    )


def refuse_other_tokenizer(loaded: LoadedModel, stream: TokenStream) -> None:
    """LmError 65 when the stream was made by another tokenizer than the run's, or holds ids beyond the vocabulary."""
    entry = stream.manifest.tokenizer if stream.manifest is not None else None
    own = loaded.tokenizer
    if entry is not None and own is not None and entry.sha256 != own.sha256 and not _gives_the_ids_of(own, stream):
        raise LmError(
            f"{loaded.path} was trained with the tokenizer {own.name} ({own.sha256[:12]}), "
            f"the data were made with {entry.name} ({entry.sha256[:12]}).",
            hint=f"Tokenize the text again with: lm tokenize PATH --tokenizer {loaded.path}/tokenizer.json",
            code=Exit.DATA,
        )
    stream.require_vocabulary(loaded.model.config.vocab_size)


def _gives_the_ids_of(own: Tokenizer, stream: TokenStream) -> bool:
    """Whether the tokenizers differ in what they put around a text alone, as that of an export may."""
    if stream.tokenizer_path is None:
        return False
    other = Tokenizer.from_file(stream.tokenizer_path).definition
    return other | {"post_processor": None} == own.definition | {"post_processor": None}


@torch.no_grad()
def token_losses(model: LanguageModel, tokens: Tensor) -> Tensor:
    """Tokens (B, T+1) -> losses (B, T) in nats, fp32 or better: -log p(tokens[:, t+1] | tokens[:, :t+1]).

    The logits are made a slice at a time, so that memory does not grow with the vocabulary times the window.
    """
    return _losses(model.logits, model.trunk(tokens[:, :-1]), tokens[:, 1:], model.config.vocab_size)


def _losses(logits: Callable[[Tensor], Tensor], hidden: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
    """Trunk output (B, T, D) and targets (B, T) -> losses (B, T) in nats, fp32 or better."""
    flat, wanted = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    rows = max(1, _LOGITS_AT_ONCE // vocab_size)
    parts = [
        torch.nn.functional.cross_entropy(logits(piece), target, reduction="none")
        for piece, target in zip(flat.split(rows), wanted.split(rows), strict=True)
    ]
    return torch.cat(parts).view(targets.shape)


# ---------------------------------------------------------------------------------------- windows


@dataclass(frozen=True)
class _Windows:
    """Where the windows of `length` inputs begin, and how many of their last targets each of them counts."""

    length: int
    stride: int
    starts: npt.NDArray[np.int64]
    counts: npt.NDArray[np.int64]


def _windows(n_tokens: int, context_length: int, stride: int | None, max_tokens: int | None) -> _Windows:
    if n_tokens < 2:
        raise LmError(f"{n_tokens} tokens are too few to evaluate; at least 2 are needed.", code=Exit.DATA)
    length = min(context_length, n_tokens - 1)
    stride = min(stride or length, length)
    starts = np.append(
        np.arange(0, n_tokens - 1 - length, stride), n_tokens - 1 - length
    )  # the last one ends the stream
    counts = np.diff(starts, prepend=starts[0] - length)
    if max_tokens is not None and max_tokens < n_tokens - 1:
        wanted = min(max(1, max_tokens // stride), len(starts))
        chosen = np.arange(wanted) * len(starts) // wanted
        starts, counts = starts[chosen], counts[chosen]
    return _Windows(length, stride, starts, counts)


def _score(
    model: LanguageModel, stream: TokenStream, windows: _Windows, batch_tokens: int
) -> Iterator[tuple[Places, Array, Array, Places]]:
    """Yields (starts (B,), targets (B, T), losses (B, T), counts (B,)) in stream order."""
    device = next(model.parameters()).device
    reader = Decoder.of(model)  # the same model with weights packed for the CPU's matrix kernels
    rows = max(1, batch_tokens // windows.length)
    for first in range(0, len(windows.starts), rows):
        starts = windows.starts[first : first + rows]
        raw = stream.windows(starts, windows.length + 1)
        tokens = torch.from_numpy(raw.astype(np.int64)).to(device)
        hidden = reader.read(tokens[:, :-1])
        losses = _losses(reader.logits, hidden, tokens[:, 1:], model.config.vocab_size).cpu().numpy()
        yield starts, raw[:, 1:], losses, windows.counts[first : first + rows]


# ---------------------------------------------------------------------------------------- sums


class _Units:
    """Sums per document while the targets come in stream order; per call of `add` when no id ends a document."""

    def __init__(self, eos_id: int | None) -> None:
        self._eos_id = eos_id
        self._documents: list[Floats] = []
        self._windows: list[Floats] = []
        self._open = np.zeros(3)

    @property
    def unit(self) -> str:
        return "documents" if len(self._documents) > 1 else "windows"

    def add(self, targets: Array, losses: Array, sizes: Floats) -> None:
        values = np.stack([losses.astype(np.float64), np.ones(len(targets)), sizes], axis=1)
        self._windows.append(values.sum(0))
        if self._eos_id is None:
            return
        ends = np.flatnonzero(targets == self._eos_id) + 1
        pieces = np.split(values, ends)
        for piece in pieces[:-1]:
            self._documents.append(self._open + piece.sum(0))
            self._open = np.zeros(3)
        self._open += pieces[-1].sum(0)

    def result(self) -> Floats:
        if len(self._documents) < 2:
            return np.array(self._windows)
        rest = [self._open] if self._open[1] else []
        return np.array(self._documents + rest)


class _Positions:
    """Loss by the number of tokens that precede the target in its window, in buckets that double in width."""

    def __init__(self, length: int) -> None:
        edges = [0]
        width = 16
        while edges[-1] < length:
            edges.append(min(length, max(width, edges[-1] * 2)))
        self._edges = np.array(edges)
        self._length = length
        # Per bucket, over the windows: sums of s, n, s*s, s*n, n*n, and the number of windows.
        self._moments = np.zeros((len(edges) - 1, 6))

    def add(self, losses: Array) -> None:
        first = self._length - len(losses)
        cumulative = np.concatenate([[0.0], losses.astype(np.float64).cumsum()])
        inside = np.clip(self._edges - first, 0, len(losses))
        s, n = np.diff(cumulative[inside]), np.diff(inside).astype(np.float64)
        self._moments += np.stack([s, n, s * s, s * n, n * n, (n > 0).astype(np.float64)], axis=1)

    def result(self) -> tuple[PositionLoss, ...]:
        buckets = []
        for (start, stop), (s, n, ss, sn, nn, windows) in zip(
            zip(self._edges[:-1], self._edges[1:], strict=True), self._moments, strict=True
        ):
            if n == 0:
                continue
            mean = s / n
            spread = max(0.0, ss - 2 * mean * sn + mean * mean * nn)
            error = math.sqrt(windows / (windows - 1) * spread) / n if windows > 1 else None
            buckets.append(PositionLoss(int(start), int(stop), float(mean), error, int(n)))
        return tuple(buckets)


def _ratio_stderr(numerator: Floats, denominator: Floats) -> float | None:
    """Standard error of sum(numerator) / sum(denominator) over independent units; None for fewer than two."""
    units, total = len(numerator), float(denominator.sum())
    if units < 2 or total == 0:
        return None
    residual = numerator - numerator.sum() / total * denominator
    return math.sqrt(units / (units - 1) * float((residual**2).sum())) / total
