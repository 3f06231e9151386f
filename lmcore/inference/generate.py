"""Text from a model: prompts in, pieces of text out while they arise.

    for chunk in generate(loaded, ["def "], SamplingConfig(temperature=0.8)):
        print(chunk.text, end="", flush=True)

Each text ("row") is prefilled alone, then decodes together with the others, one token per pass, at its own position in
its own cache slots; a row that ends gives its place to the next one that waits. What a row says depends on (seed,
prompt, sample) only, not on its neighbours: the arithmetic per row is the same, its random numbers are keyed
(sampling.py). A matrix product may round differently for another number of rows, so a near-tie can still fall
otherwise in low precision; in float64 the texts are identical.

A text that reaches the context length of the training goes on by one of three rules (`overflow`):

    slide    the cache is rebuilt from the last half of the context, and the text goes on (default)
    stop     the text ends there (finish "context")
    extend   positions simply grow, beyond what the model has seen in training

A prompt that is longer keeps its last tokens so that room is left ("slide"), or is refused ("stop"). Models without
full attention (windows, states of fixed size) have no such limit.

B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from lmcore.errors import Exit, LmError
from lmcore.inference.decode import Decoder
from lmcore.inference.sampling import SamplingConfig, Uniforms, next_tokens
from lmcore.inference.speculate import Speculator
from lmcore.inference.text import TextStream
from lmcore.model.state import DecodeState
from lmcore.progress import SILENT, Progress

if TYPE_CHECKING:
    from lmcore.data.tokenizer import Tokenizer
    from lmcore.model.model import LanguageModel
    from lmcore.training.checkpoint import LoadedModel

Overflow = Literal["slide", "stop", "extend"]
Finish = Literal["eos", "stop", "length", "context"]
PREFILL_TOKENS = 2_048  # a long prompt is read in pieces of this size


@dataclass(frozen=True)
class TokenLogprob:
    """Log-probability (nats) of a generated token under the model itself, and the likeliest tokens at its place."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Chunk:
    """What one pass added to one text."""

    prompt: int
    """Index of the prompt."""
    sample: int
    text: str
    """Text that is now certain; may be empty (half a character, the beginning of a stop text)."""
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    finish: Finish | None
    """Set on the last chunk of a text: end-of-text token, stop text, max_tokens, or the end of the context."""


@dataclass
class Completion:
    """A text, finished when `finish` is set."""

    prompt: int
    sample: int
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish: Finish | None = None


class Collector:
    """Puts the chunks of interleaved texts together."""

    def __init__(self) -> None:
        self._texts: dict[tuple[int, int], Completion] = {}

    def add(self, chunk: Chunk) -> None:
        text = self._texts.setdefault((chunk.prompt, chunk.sample), Completion(chunk.prompt, chunk.sample))
        text.text += chunk.text
        text.tokens += chunk.tokens
        text.logprobs += chunk.logprobs
        text.finish = chunk.finish

    def finished(self, prompt: int, sample: int) -> Completion | None:
        """The text of a prompt and sample once it is finished."""
        text = self._texts.get((prompt, sample))
        return text if text is not None and text.finish is not None else None

    def in_order(self) -> list[Completion]:
        """All texts by prompt, then sample."""
        return [self._texts[key] for key in sorted(self._texts)]


def complete(
    loaded: LoadedModel,
    prompts: Sequence[str | Sequence[int]],
    config: SamplingConfig | None = None,
    *,
    batch_size: int = 16,
    overflow: Overflow = "slide",
    speculate: bool = False,
    control: bool = False,
    progress: Progress = SILENT,
) -> list[Completion]:
    """All texts at once, in the order of the prompts, then of the samples. See `generate`."""
    collector = Collector()
    for chunk in generate(
        loaded,
        prompts,
        config,
        batch_size=batch_size,
        overflow=overflow,
        speculate=speculate,
        control=control,
        progress=progress,
    ):
        collector.add(chunk)
    return collector.in_order()


def generate(
    loaded: LoadedModel,
    prompts: Sequence[str | Sequence[int]],
    config: SamplingConfig | None = None,
    *,
    batch_size: int = 16,
    overflow: Overflow = "slide",
    speculate: bool = False,
    control: bool = False,
    progress: Progress = SILENT,
) -> Iterator[Chunk]:
    """Continue every prompt; yields chunks as they arise, those of different texts interleaved.

    prompts: texts, or token ids. A text is given to the model as documents were in training (`Tokenizer.opening`), and
    an empty one starts at the beginning of a document. control: the text of a control token in a prompt is that token,
    not text. batch_size: rows that decode together. speculate: one text at a time, with drafts of the multi-token heads
    if the model has some. Raises LmError when the model has no tokenizer, a prompt is too long for `overflow="stop"`,
    or the model gives no finite logits.
    """
    if loaded.tokenizer is None:
        raise LmError(
            f"{loaded.path}: this model has no tokenizer, so it cannot read or write text.",
            hint="Its data were adopted without one: lm import DATA --out DIR --tokenizer PATH",
        )
    config = config or SamplingConfig()
    tokenizer = loaded.tokenizer
    size = loaded.model.config.vocab_size
    encoded = [_encode(tokenizer, prompt, size, control=control) for prompt in prompts]
    engine = _Engine(loaded.model, config, encoded, overflow)
    waiting = deque(
        _Row(
            index,
            sample,
            list(ids),
            Uniforms(config.seed, ids, sample),
            TextStream(tokenizer.speller(ids), config.stop),
        )
        for index, ids in enumerate(encoded)
        for sample in range(config.samples)
    )
    eos_id = None if config.ignore_eos else tokenizer.eos_id
    progress.start("generate", float(len(waiting)), "texts")
    try:
        while speculate and waiting and loaded.model.mtp:
            yield from _speculate(engine, waiting.popleft(), eos_id)
            progress.advance(1)
        while engine.exchange(waiting, batch_size):
            for row, token, logprob in engine.step():
                chunk = row.accept(token, logprob, eos_id, config.max_tokens, engine.stops_at)
                if chunk.finish is not None:
                    progress.advance(1)
                yield chunk
    finally:
        progress.finish()


# ---------------------------------------------------------------------------------------- rows


@dataclass
class _Row:
    """One text in the making."""

    prompt: int
    sample: int
    context: list[int]
    """Prompt and generated tokens."""
    uniforms: Uniforms
    stream: TextStream
    generated: int = 0
    position: int = 0
    """Tokens in the cache: the position of the next one that the model reads."""
    finish: Finish | None = None

    def accept(
        self, token: int, logprob: TokenLogprob | None, eos_id: int | None, max_tokens: int, stops_at: int | None
    ) -> Chunk:
        """Add a drawn token; `stops_at` is the number of tokens at which a text must end."""
        self.context.append(token)
        self.generated += 1
        text = self.stream.push(token)
        if token == eos_id:
            self.finish = "eos"
        elif self.stream.stopped:
            self.finish = "stop"
        elif self.generated >= max_tokens:
            self.finish = "length"
        elif len(self.context) == stops_at:
            self.finish = "context"
        if self.finish is not None:
            text += self.stream.finish()
        return Chunk(self.prompt, self.sample, text, (token,), () if logprob is None else (logprob,), self.finish)


class _Engine:
    """The rows that decode together and their states.

    Between two passes every row has read all of its tokens but the last one; the common pass reads that one and gives
    the logits of the next. New rows join without a special case: they are prefilled up to their last token.
    """

    def __init__(
        self, model: LanguageModel, config: SamplingConfig, prompts: Sequence[Sequence[int]], overflow: Overflow
    ) -> None:
        self.model = model
        self.config = config
        self.decoder = Decoder.of(model)
        self.rows: list[_Row] = []
        self.device = next(model.parameters()).device
        self.limit: int | None = None
        """Positions that the cache may hold; None when nothing bounds them."""
        longest = max((len(ids) for ids in prompts), default=1)
        # Window layers see relative positions that the training has seen; only full attention meets unknown ones.
        if overflow != "extend" and any(layer.mixer == "A" for layer in model.config.layers):
            self.limit = model.config.context_length
            if overflow == "stop" and longest >= self.limit:
                raise LmError(
                    f"the prompt has {longest:,} tokens, the model was trained with a context of {self.limit:,}.",
                    hint="Shorten it, or let the context slide with: --overflow slide",
                )
        self.stops_at = self.limit if overflow == "stop" else None
        needed = longest + config.max_tokens
        self.capacity = needed if self.limit is None else min(needed, self.limit)
        self.state: DecodeState | None = None
        self.seen: Tensor | None = None

    @torch.inference_mode()
    def exchange(self, waiting: deque[_Row], batch_size: int) -> bool:
        """Let finished rows go and waiting ones in. A row whose cache is full goes too and comes back at once, with the
        last half of its text in a fresh cache. False when no row is left."""
        staying = [i for i, row in enumerate(self.rows) if row.finish is None and row.position != self.limit]
        again = [row for row in self.rows if row.finish is None and row.position == self.limit]
        places = batch_size - len(staying) - len(again)
        new = [waiting.popleft() for _ in range(min(len(waiting), places))]
        if len(staying) < len(self.rows) or new:
            states: list[DecodeState] = []
            if state := self.state if staying else None:
                kept = torch.tensor(staying, device=self.device)
                states.append(state.select(kept) if len(staying) < len(self.rows) else state)
            arriving, more = self._prefill(again, new)
            states += more
            self.rows = [self.rows[i] for i in staying] + arriving
            self.state = states[0] if len(states) == 1 else DecodeState.concatenate(states) if states else None
            self.seen = self._seen() if self.config.repetition_penalty != 1.0 else None
        return bool(self.rows)

    @torch.inference_mode()
    def step(self) -> list[tuple[_Row, int, TokenLogprob | None]]:
        """Read the last token of every row and draw the next one."""
        tokens = torch.tensor([row.context[-1] for row in self.rows], device=self.device)
        assert self.state is not None
        logits = self.decoder(tokens, self.state)  # (B, V)
        for row in self.rows:
            row.position += 1
        return self.draw(logits)

    def draw(self, logits: Tensor) -> list[tuple[_Row, int, TokenLogprob | None]]:
        """Draw the next token of every row from its logits (B, V)."""
        config = self.config
        if not bool(torch.isfinite(logits.amax(-1)).all()):
            raise LmError(
                "the model gives no finite logits: its weights are damaged, or the training diverged.",
                code=Exit.DIVERGED,
            )
        uniforms = [] if config.greedy else [row.uniforms(len(row.context)) for row in self.rows]
        drawn = next_tokens(logits, config, uniforms, self.seen)
        if self.seen is not None:
            self.seen[torch.arange(len(drawn), device=self.device), drawn] = True
        logprobs: Sequence[TokenLogprob | None] = [None] * len(self.rows)
        if config.logprobs is not None:
            logprobs = _logprobs(logits, drawn, config.logprobs)
        return list(zip(self.rows, drawn.tolist(), logprobs, strict=True))

    def _prefill(self, again: Sequence[_Row], new: Sequence[_Row]) -> tuple[list[_Row], list[DecodeState]]:
        """Read the tokens of rows except the last ones. Rows that read equally much are read together, samples of one
        prompt once. Returns the rows in the order of the states' rows."""
        groups: dict[int, dict[tuple[int, ...], list[_Row]]] = {}
        half = (self.limit or 0) // 2
        for rows, reserve in ((again, half), (new, min(self.config.max_tokens, half))):
            for row in rows:
                read = self._window(row.context[:-1], reserve)
                row.position = len(read)
                groups.setdefault(len(read), {}).setdefault(tuple(read), []).append(row)
        ordered: list[_Row] = []
        states: list[DecodeState] = []
        for length, texts in groups.items():
            tokens = torch.tensor(list(texts), dtype=torch.long, device=self.device)
            state = self.model.init_state(len(texts), self.capacity)
            for begin in range(0, length, step := max(1, PREFILL_TOKENS // len(texts))):
                self.decoder.read(tokens[:, begin : begin + step], state)
            copies = [index for index, rows in enumerate(texts.values()) for _ in rows]
            if len(copies) > len(texts):
                state = state.select(torch.tensor(copies, device=self.device))
            ordered += [row for rows in texts.values() for row in rows]
            states.append(state)
        return ordered, states

    def _window(self, read: list[int], reserve: int) -> list[int]:
        """Of a text that does not fit the cache, the last tokens, so that `reserve` positions stay free."""
        if self.limit is None or len(read) < self.limit:
            return read
        return read[len(read) - (self.limit - max(1, reserve)) :]

    def _seen(self) -> Tensor:
        seen = torch.zeros(len(self.rows), self.model.config.vocab_size, dtype=torch.bool, device=self.device)
        for index, row in enumerate(self.rows):
            seen[index, torch.tensor(row.context, device=self.device)] = True
        return seen


# ---------------------------------------------------------------------------------------- private


@torch.inference_mode()
def _speculate(engine: _Engine, row: _Row, eos_id: int | None) -> Iterator[Chunk]:
    """One text with drafts (speculate.py): the same text as without."""
    config = engine.config

    def guess(logits: Tensor, place: int) -> Tensor:
        uniforms = [] if config.greedy else [row.uniforms(place)]
        return next_tokens(logits, config, uniforms, engine.seen)

    engine.rows = [row]
    engine.seen = engine._seen() if config.repetition_penalty != 1.0 else None
    speculator = Speculator(engine.model, engine.decoder, guess)
    half = (engine.limit or 0) // 2
    reserve = min(config.max_tokens, half)
    started = False
    while row.finish is None:
        if not started or speculator.position == engine.limit:
            read = engine._window(row.context[:-1], reserve if not started else half)
            speculator.start(row.context, read, engine.capacity, PREFILL_TOKENS)
            started = True
        room = config.max_tokens - row.generated
        if engine.limit is not None:
            room = min(room, engine.limit - speculator.position)
        for logits in speculator.settle(row.context, room):
            ((_, token, logprob),) = engine.draw(logits)
            yield row.accept(token, logprob, eos_id, config.max_tokens, engine.stops_at)
            if row.finish is not None:
                break
    engine.rows = []


def _encode(tokenizer: Tokenizer, prompt: str | Sequence[int], vocab_size: int, *, control: bool = False) -> list[int]:
    if isinstance(prompt, str):
        ids = [*tokenizer.opening, *tokenizer.encode(prompt, control=control)]
    else:
        ids = [int(token) for token in prompt]
    if not ids:
        ids = [tokenizer.eos_id]  # a document ends here, so another begins
    wrong = next((token for token in ids if not 0 <= token < vocab_size), None)
    if wrong is not None:
        raise LmError(f"the prompt holds the token id {wrong:,}; the vocabulary ends at {vocab_size - 1:,}.")
    return ids


def _logprobs(logits: Tensor, drawn: Tensor, count: int) -> list[TokenLogprob]:
    values = logits.float().log_softmax(-1)
    chosen = values.gather(-1, drawn[:, None]).squeeze(-1).tolist()
    top = values.topk(min(count, values.shape[-1]), -1)
    return [
        TokenLogprob(token, logprob, tuple(zip(ids, best, strict=True)))
        for token, logprob, ids, best in zip(
            drawn.tolist(), chosen, top.indices.tolist(), top.values.tolist(), strict=True
        )
    ]
