"""Training without shards: batches straight from text, tokenized while the model trains.

The documents of a plan, in plan order and each ended by EOS, form one endless token stream (behind the last document
the first follows again: the next epoch). Window k holds the tokens [k T, k T + T], so every token is a target once per
epoch. Blocks of `window` consecutive windows are permuted by a counter-based generator:

    sample g  ->  block b = g // window  ->  window b * window + permutation(seed, b)[g % window]

A batch is therefore a pure function of (plan, tokenizer, seed, window, sample index), as it is for shards (sampler.py);
only the cost of reaching a sample differs. The state that is saved is a place to start reading: going on from it, from
another one, or from the beginning of the corpus gives the same batches, and any number of ranks may ask for their
parts.

Left out: exact duplicates and limits, which need the whole corpus (make shards for that), and mixtures.
"""

from __future__ import annotations

import collections
import contextlib
import hashlib
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import ConfigDict, Field

from lmcore import storage
from lmcore.data.documents import filter_lengths
from lmcore.data.encoder import Backend, Encoded
from lmcore.data.manifest import PLAN
from lmcore.data.pipeline import read_ahead
from lmcore.data.plan import Plan, TokenizeConfig
from lmcore.data.readers import Place, read
from lmcore.data.shard import token_dtype
from lmcore.data.tokenization import available_cores, encode_all, freeze_plan, resume_plan
from lmcore.data.tokenizer import Tokenizer
from lmcore.errors import Exit, LmError
from lmcore.progress import SILENT, Progress
from lmcore.records import Count, Recorded, as_record


class StreamPlace(Recorded):
    """Where a block begins: what has to be read again to make it. A part of a checkpoint's state.json."""

    model_config = ConfigDict(extra="forbid")

    block: Count = 0
    epoch: Count = 0
    unit: Count = 0
    piece: Count = 0
    base: Count = 0
    row: int = Field(default=-1, ge=-1, lt=1 << 62)
    """Document that holds the first token of the block; -1 at the beginning of an epoch."""
    token: Count = 0
    """Tokens of that document that belong to earlier blocks."""


@dataclass(frozen=True)
class _Block:
    place: StreamPlace
    tokens: npt.NDArray[Any]  # (window * context_length + 1,)
    n_bytes: int
    busy_s: float
    """Time that making it took, without the time that nobody wanted it."""


class TextStream:
    """Batches from text. Make one with `open`; call `batch` with ascending sample indices."""

    def __init__(
        self,
        plan: Plan,
        tokenizer: Tokenizer,
        *,
        context_length: int,
        seed: int = 0,
        window: int = 2048,
        workers: int = 0,
        backend: Backend = "auto",
        progress: Progress = SILENT,
    ) -> None:
        """window: samples that are shuffled together (memory: window * context_length tokens, three times)."""
        request = plan.request
        if request.dedup or request.max_documents or request.max_tokens or request.parts:
            raise LmError(
                "A stream cannot drop duplicates, stop early or be cut into parts.", hint="Make shards: lm tokenize"
            )
        if context_length < 1 or window < 1:
            raise LmError(f"context_length ({context_length}) and window ({window}) must be at least 1.")
        self.plan, self.tokenizer = plan, tokenizer
        self.context_length, self.seed, self.window = context_length, seed, window
        self.dtype = token_dtype(tokenizer.max_id)
        self.max_id = tokenizer.max_id
        self.backend = ""
        self._workers, self._backend, self._progress = workers or available_cores(), backend, progress
        self._start = StreamPlace()
        self._block: _Block | None = None
        self._order: npt.NDArray[np.intp] = np.zeros(0, np.intp)
        self._blocks: Generator[_Block] | None = None
        self._wait_s = self._busy_s = 0.0
        self._tokens = self._text_bytes = 0

    @classmethod
    def open(
        cls,
        config: TokenizeConfig,
        directory: str | Path,
        *,
        context_length: int,
        seed: int = 0,
        window: int = 2048,
        workers: int = 0,
        backend: Backend = "auto",
        progress: Progress = SILENT,
    ) -> TextStream:
        """The stream of a source. `directory` (a folder of the run) keeps plan.json and tokenizer.json: the first call
        freezes them there, a later one finds the same files and the same commit. Raises what `tokenize` raises."""
        directory = storage.make_directory(directory)
        if (directory / PLAN).exists():
            plan, tokenizer = resume_plan(directory, config)
        else:
            plan, tokenizer = freeze_plan(directory, config, workers=workers, progress=progress)
        return cls(
            plan,
            tokenizer,
            context_length=context_length,
            seed=seed,
            window=window,
            workers=workers,
            backend=backend,
            progress=progress,
        )

    @property
    def dataset_id(self) -> str:
        """Identity of the endless stream: the pinned files, how documents are chosen, the tokenizer."""
        request = self.plan.request
        identity = {
            "units": [unit.to_json() for unit in self.plan.units],
            "text_column": request.text_column,
            "min_chars": request.min_chars,
            "max_chars": request.max_chars,
            "on_bad_doc": request.on_bad_doc,
            "tokenizer": self.tokenizer.sha256,
        }
        return hashlib.sha256(storage.canonical_json(identity)).hexdigest()

    # ------------------------------------------------------------------------------------ batches

    def batch(self, first_sample: int, count: int) -> npt.NDArray[Any]:
        """Samples [first_sample, first_sample + count) as a (count, context_length + 1) array in the stored dtype.

        Asking for later samples skips what lies between; asking for earlier ones starts reading anew.
        """
        length = self.context_length
        out = np.empty((count, length + 1), self.dtype)
        began = time.monotonic()
        for index in range(count):
            block, within = divmod(first_sample + index, self.window)
            if self._block is None or self._block.place.block != block:
                self._seek(block)
            assert self._block is not None
            at = int(self._order[within]) * length
            out[index] = self._block.tokens[at : at + length + 1]
        self._wait_s += time.monotonic() - began
        return out

    def _seek(self, block: int) -> None:
        if self._blocks is None or (self._block is not None and self._block.place.block > block):
            self.close()
            if self._start.block > block:
                self._start = StreamPlace()
            self._blocks = read_ahead([self._make_blocks], threads=1, depth=1)
        for made in self._blocks:
            self._tokens += len(made.tokens) - 1
            self._text_bytes += made.n_bytes
            self._busy_s += made.busy_s
            if made.place.block == block:
                self._block = made
                words = np.random.Philox(key=[self.seed & (2**64 - 1), block]).random_raw(self.window)
                self._order = np.argsort(words, kind="stable")
                return
        raise AssertionError("the stream is endless")

    # ------------------------------------------------------------------------------------ state

    def state(self) -> dict[str, Any]:
        """Where to start reading for the samples asked for last: small, JSON. It is a shortcut and decides nothing."""
        return (self._block.place if self._block is not None else self._start).model_dump()

    def load_state(self, state: dict[str, Any] | StreamPlace) -> None:
        """Start reading where an earlier stream of the same plan, tokenizer, context length and window was. Raises
        LmError (65) for what is no such place."""
        place = state if isinstance(state, StreamPlace) else as_record(StreamPlace, state, "The state of a text stream")
        if place.unit >= len(self.plan.units):
            raise LmError(
                f"The state of a text stream: file {place.unit:,} of {len(self.plan.units):,}.", code=Exit.DATA
            )
        self.close()
        self._block = None
        self._start = place

    @property
    def epoch(self) -> int:
        """Times the corpus was gone through before the block in use."""
        return self._block.place.epoch if self._block is not None else self._start.epoch

    def throughput(self) -> dict[str, float]:
        """How fast text became tokens while somebody waited for them (the thread that works ahead stands still when it
        is far enough ahead), and how long `batch` kept its caller waiting: near zero when tokenizing keeps up."""
        busy = max(self._busy_s, 1e-9)
        return {
            "wait_s": self._wait_s,
            "tokens": self._tokens,
            "tokens_per_s": self._tokens / busy,
            "text_mb_per_s": self._text_bytes / 1e6 / busy,
            "epoch": self.epoch,
        }

    def close(self) -> None:
        """Stop the threads; the next `batch` starts them again."""
        if self._blocks is not None:
            self._blocks.close()
            self._blocks = None

    def __enter__(self) -> TextStream:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # ------------------------------------------------------------------------------------ making blocks

    def _make_blocks(self) -> Iterator[_Block]:
        step = self.window * self.context_length
        place = self._start
        held: collections.deque[_Piece] = collections.deque()
        have = text_bytes = 0
        number = place.block
        began = time.monotonic()
        with contextlib.closing(self._pieces(place)) as pieces:
            for piece in pieces:
                held.append(piece)
                have += len(piece.ids)
                text_bytes += piece.n_bytes
                while have > step:
                    begin = held[0].place_of_first(number)
                    flat = np.concatenate([part.ids for part in held])
                    yield _Block(begin, flat[: step + 1], text_bytes, time.monotonic() - began)
                    began = time.monotonic()
                    number, have, text_bytes = number + 1, have - step, 0
                    drop = step
                    while drop and len(held[0].ids) <= drop:
                        drop -= len(held.popleft().ids)
                    if drop:
                        held[0] = held[0].after(drop)

    def _pieces(self, start: StreamPlace) -> Generator[_Piece]:
        """Encoded batches from `start` on, epoch after epoch, without the tokens before it."""
        request = self.plan.request
        epoch = start.epoch
        at = start
        while True:
            found = 0
            raw = read(
                self.plan.units,
                request.text_column,
                start=Place(at.unit, at.piece, at.base),
                on_bad=request.on_bad_doc,
                threads=self._workers,
            )
            with contextlib.closing(raw):
                kept = (filter_lengths(batch, request.min_chars, request.max_chars) for batch in raw)
                stage, batches = encode_all(kept, self.tokenizer, self._backend, self._workers, self._progress)
                self.backend = stage.record.name
                with contextlib.closing(batches):
                    for batch in batches:
                        piece = _Piece(epoch, batch, 0, len(batch.ids), batch.documents.n_bytes)
                        if at.row >= 0:
                            piece = piece.after(piece.tokens_before(at))
                        if len(piece.ids):
                            found += len(piece.ids)
                            yield piece
            if not found and at == StreamPlace(epoch=epoch, block=at.block):
                raise LmError("No text to train on: every record was dropped or empty.", code=Exit.DATA)
            epoch += 1
            at = StreamPlace(epoch=epoch)


@dataclass(frozen=True)
class _Piece:
    """The tokens [begin, end) of an encoded batch."""

    epoch: int
    batch: Encoded
    begin: int
    end: int
    n_bytes: int

    @property
    def ids(self) -> npt.NDArray[Any]:
        return self.batch.ids[self.begin : self.end]

    def after(self, count: int) -> _Piece:
        return _Piece(self.epoch, self.batch, self.begin + count, self.end, self.n_bytes)

    def place_of_first(self, block: int) -> StreamPlace:
        documents = self.batch.documents
        index = int(np.searchsorted(self.batch.offsets, self.begin, "right")) - 1
        unit = int(documents.units[index])
        own = documents.unit == unit
        return StreamPlace(
            block=block,
            epoch=self.epoch,
            unit=unit,
            piece=documents.piece if own else 0,
            base=documents.base if own else 0,
            row=int(documents.rows[index]),
            token=self.begin - int(self.batch.offsets[index]),
        )

    def tokens_before(self, place: StreamPlace) -> int:
        """Tokens of the batch that lie before a place."""
        documents = self.batch.documents
        units, rows = documents.units, documents.rows
        before = int(np.count_nonzero((units < place.unit) | ((units == place.unit) & (rows < place.row))))
        tokens = int(self.batch.offsets[before])
        if before < len(units) and (int(units[before]), int(rows[before])) == (place.unit, place.row):
            tokens += place.token
        return tokens
