"""Documents on their way to the encoder: many texts in one buffer, without a Python string for each.

A `Documents` batch is what a source yields: UTF-8 bytes and offsets, laid out as Arrow does it, so that a parquet
column passes through without a copy. A batch belongs to one piece of one unit (sources.py, readers.py), or to several
whole units of one document each; `units` and `rows` say where every text came from. Records that gave no document are
in `drops`.

    record   what the source counts: a parquet row, a line of a JSONL file, a text file
    row      the record's number inside its unit (file), from 0; dropped records keep their number
"""

from __future__ import annotations

import dataclasses
import enum
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from lmcore.errors import Exit, LmError

MAX_DOCUMENT_BYTES = 512 << 20
"""A longer document is refused: its text and its ids must fit in memory (and `bytes` of the index in 32 bits)."""


class Drop(enum.IntEnum):
    """Why a record gave no document. The names are the keys of the manifest's `filters.dropped`."""

    EMPTY = 0
    SHORT = 1
    LONG = 2
    DUPLICATE = 3
    BAD_JSON = 4
    NO_TEXT = 5
    BAD_UTF8 = 6


@dataclass(frozen=True)
class Documents:
    """A batch of n texts. data: UTF-8; text k is data[offsets[k]:offsets[k + 1]]."""

    data: npt.NDArray[np.uint8]
    offsets: npt.NDArray[np.int64]  # (n + 1,)
    units: npt.NDArray[np.uint32]  # (n,)
    rows: npt.NDArray[np.int64]  # (n,), ascending inside a unit
    unit: int
    """The unit that the batch belongs to, or the first of several whole ones."""
    piece: int
    """Number of the piece inside its unit: where reading can start again."""
    base: int
    """Rows of the unit before this piece."""
    n_records: int
    """Records read for this batch, dropped ones included; 0 for a batch of several whole units."""
    drops: tuple[tuple[int, int, Drop], ...] = ()
    """(unit, row, reason) of records without a document, in order."""
    repaired: int = 0
    """Documents whose invalid UTF-8 was replaced by U+FFFD."""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def n_bytes(self) -> int:
        """Bytes of text in the batch."""
        return int(self.offsets[-1] - self.offsets[0])

    def text(self, index: int) -> bytes:
        """The UTF-8 bytes of one document."""
        return self.data[self.offsets[index] : self.offsets[index + 1]].tobytes()

    def moved(self, rows: int) -> Documents:
        """The same batch `rows` records further down its unit."""
        if not rows:
            return self
        drops = tuple((unit, row + rows, reason) for unit, row, reason in self.drops)
        return dataclasses.replace(self, rows=self.rows + rows, base=self.base + rows, drops=drops)


@dataclass
class DocumentsBuilder:
    """Collects single texts of one piece into a batch."""

    unit: int
    piece: int = 0
    base: int = 0
    texts: list[bytes] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    drops: list[tuple[int, int, Drop]] = field(default_factory=list)
    n_records: int = 0
    repaired: int = 0
    n_bytes: int = 0

    def add(self, row: int, text: bytes) -> None:
        self.texts.append(text)
        self.rows.append(row)
        self.n_bytes += len(text)

    def drop(self, row: int, reason: Drop) -> None:
        self.drops.append((self.unit, row, reason))

    def build(self) -> Documents:
        data, offsets = join(self.texts)
        return Documents(
            data,
            offsets,
            np.full(len(self.texts), self.unit, np.uint32),
            np.array(self.rows, np.int64),
            self.unit,
            self.piece,
            self.base,
            self.n_records,
            tuple(self.drops),
            self.repaired,
        )


def join(texts: list[bytes]) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """[b"ab", b"c"] -> (the bytes of abc, [0, 2, 3])."""
    offsets = np.zeros(len(texts) + 1, np.int64)
    np.cumsum([len(text) for text in texts], out=offsets[1:])
    return np.frombuffer(b"".join(texts), np.uint8), offsets


class BadRecord(Exception):
    """A record that a source cannot read; the one who knows the file turns it into an LmError.

    row: number of the record after the last batch of its unit. unit: number of the file in the plan.
    """

    def __init__(self, unit: int, row: int, reason: Drop, message: str) -> None:
        super().__init__(message)
        self.unit, self.row, self.reason, self.message = unit, row, reason, message


def check_size(name: str, size: int) -> None:
    """Refuse a document that cannot be held in memory."""
    if size > MAX_DOCUMENT_BYTES:
        raise LmError(
            f"{name}: one document of {size:,} bytes; the limit is {MAX_DOCUMENT_BYTES:,}.",
            hint="Cut it into several documents: a .jsonl file with one per line, or a text file and --separator.",
            code=Exit.DATA,
        )


def filter_lengths(batch: Documents, min_chars: int, max_chars: int | None) -> Documents:
    """Drop empty texts and those outside min_chars..max_chars (characters, not bytes), counted by reason."""
    lengths = np.diff(batch.offsets)
    empty = lengths == 0
    short = long = np.zeros(len(batch), bool)
    if (min_chars > 1 or max_chars is not None) and len(batch):
        starts = np.concatenate([[0], np.cumsum((batch.data & 0xC0) != 0x80)])  # characters before each byte
        characters = starts[batch.offsets[1:]] - starts[batch.offsets[:-1]]
        short = (characters < min_chars) & ~empty
        if max_chars is not None:
            long = characters > max_chars
    lost = empty | short | long
    if not lost.any():
        return batch
    reasons = np.select([empty, short], [int(Drop.EMPTY), int(Drop.SHORT)], int(Drop.LONG))
    drops = [(int(batch.units[k]), int(batch.rows[k]), Drop(int(reasons[k]))) for k in np.flatnonzero(lost)]
    kept = np.flatnonzero(~lost)
    data, offsets = join([batch.text(int(k)) for k in kept])
    return dataclasses.replace(
        batch,
        data=data,
        offsets=offsets,
        units=batch.units[kept],
        rows=batch.rows[kept],
        drops=tuple(sorted([*batch.drops, *drops])),
    )
