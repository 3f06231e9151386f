"""The one writer of a shard set: token batches in plan order in, committed shards out.

A shard is committed in this order, each step durable before the next begins:

    shard-00003.npy, shard-00003.docs.npy    temporary, fsync, rename, fsync of the directory
    journal.jsonl                            one line: what the manifest will say, and the cursor

The cursor names the first token that is not committed: (unit, row, token) of a document, with the piece where reading
must start again and the number of dropped documents so far. Whoever finds the journal continues there and writes the
same bytes, because a shard depends only on the order of the tokens. Shards are written on a thread of their own while
the next one fills, never more than one at a time.
"""

from __future__ import annotations

import collections
import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import Field

from lmcore import storage
from lmcore.data.documents import Documents, Drop
from lmcore.data.encoder import Encoded
from lmcore.data.manifest import JOURNAL, ShardEntry
from lmcore.data.readers import Place
from lmcore.data.shard import (
    DOCUMENT,
    Tokens,
    npy_chunks,
    npy_header,
    open_directory,
    shard_name,
    sound_documents,
)
from lmcore.errors import Exit, LmError
from lmcore.records import Count, Recorded, as_record


@dataclass(frozen=True)
class Cursor:
    """The first token that is not committed, and where to read in order to meet it again."""

    place: Place
    row: int
    """The document that holds the last committed token; -1 at the start of a set."""
    token: int
    """Committed tokens of that document; may be all of them."""
    dropped: dict[str, int]
    """Records without a document up to here, by reason."""

    def to_json(self) -> dict[str, Any]:
        place = self.place
        return {
            "unit": place.unit,
            "piece": place.piece,
            "base": place.base,
            "row": self.row,
            "token": self.token,
            "dropped": self.dropped,
        }


@dataclass(frozen=True)
class Committed:
    """One line of the journal."""

    entry: ShardEntry
    n_bytes: int
    """UTF-8 bytes of the documents that start in the shard."""
    cursor: Cursor

    def to_json(self) -> dict[str, Any]:
        return {
            "shard": self.entry.model_dump(mode="json"),
            "n_bytes": self.n_bytes,
            "cursor": self.cursor.to_json(),
        }


class _CursorRecord(Recorded):
    """A cursor as the journal holds it."""

    unit: Count
    piece: Count
    base: Count
    row: int = Field(ge=-1, lt=1 << 62)
    token: Count
    dropped: dict[str, Count]


class _Line(Recorded):
    """A line of the journal."""

    shard: ShardEntry
    n_bytes: Count
    cursor: _CursorRecord

    def committed(self) -> Committed:
        at = self.cursor
        return Committed(
            self.shard, self.n_bytes, Cursor(Place(at.unit, at.piece, at.base), at.row, at.token, dict(at.dropped))
        )


def read_journal(directory: Path) -> list[Committed]:
    """The committed shards of a set, in order. Raises LmError (65) when a line is not ours or a shard is not next."""
    path = directory / JOURNAL
    committed: list[Committed] = []
    for number, value in enumerate(storage.read_json_lines(path)):
        where = f"{path}:{number + 1}"
        try:
            line = as_record(_Line, value, where).committed()
        except LmError as error:
            raise _damaged(error.message.removesuffix(".")) from None
        if line.entry.name != shard_name(number):
            raise _damaged(f"{where}: names {line.entry.name} where {shard_name(number)} comes next")
        committed.append(line)
    return committed


def _require_cursor(directory: Path, last: Committed, stop: Place) -> None:
    """The index of a shard knows which document its last token belongs to: the cursor behind it must say the same."""
    cursor = last.cursor
    if cursor.row < 0:  # nothing is left to read
        if cursor.place != stop:
            raise _damaged(f"{directory / JOURNAL}: its last line ends elsewhere than the plan")
        return
    folder = open_directory(directory)
    try:
        index = sound_documents(folder, last.entry)
    finally:
        os.close(folder)
    tokens = last.entry.n_tokens - int(index["start"][-1]) + (last.entry.first_doc_offset if len(index) == 1 else 0)
    if (cursor.place.unit, cursor.row, cursor.token) != (int(index["unit"][-1]), int(index["row"][-1]), tokens):
        raise _damaged(f"{directory / JOURNAL}: its last line and {last.entry.name}.docs.npy end at different places")


def _damaged(what: str) -> LmError:
    return LmError(f"{what}.", hint="Delete the set and run lm tokenize again.", code=Exit.DATA)


def recover(directory: Path, stop: Place) -> list[Committed]:
    """Bring a set back to its last commit: sweep temporaries, drop a torn journal line and shards that the journal does
    not name, check that the named ones are there. stop: where the plan ends. Call while holding the set's lock."""
    storage.sweep(directory)
    committed = read_journal(directory)
    path = directory / JOURNAL
    lines = [storage.canonical_json(line.to_json()) + b"\n" for line in committed]
    if path.exists():
        if path.read_bytes() != b"".join(lines):
            storage.write_file(path, b"".join(lines))
        else:
            storage.fsync_file(path)  # the last line may be visible only, and the manifest must not come before it
            storage.fsync_directory(directory)
    expected: dict[str, int | None] = {}
    for line in committed:
        expected[f"{line.entry.name}.npy"] = line.entry.bytes
        expected[f"{line.entry.name}.docs.npy"] = None
    for file in directory.glob("shard-*.npy"):
        if file.name not in expected:
            file.unlink()
    for name, size in expected.items():
        file = directory / name
        found = file.stat().st_size if file.is_file() else None
        if found is None or (size is not None and found != size):
            what = "is missing" if found is None else f"has {found:,} bytes, the journal says {size:,}"
            raise LmError(
                f"{file}: this committed shard {what}.",
                hint="Restore the file, or delete the set and run lm tokenize again.",
                code=Exit.DATA,
            )
    if committed:
        _require_cursor(directory, committed[-1], stop)
    return committed


class SetWriter:
    """Fills shards and commits them. Use as a context manager: leaving it waits for the write under way.

    only: commit just the shards with these numbers (repair), count the others; the journal is then left alone.
    """

    def __init__(
        self,
        directory: Path,
        *,
        dtype: np.dtype[Any],
        seq_len: int,
        rows: int,
        eos_id: int,
        committed: Sequence[Committed] = (),
        only: frozenset[int] | None = None,
    ) -> None:
        self.directory, self.dtype, self.seq_len, self.eos_id, self.only = directory, dtype, seq_len, eos_id, only
        self.capacity = rows * seq_len
        self.committed = list(committed)
        self.dropped: collections.Counter[str] = collections.Counter()
        self.settled: Cursor | None = None
        if self.committed:
            self.settled = self.committed[-1].cursor
            self.dropped.update(self.settled.dropped)
        self._next = len(self.committed)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="commit")
        self._writing: Future[None] | None = None
        self._begin_shard()

    def __enter__(self) -> SetWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._pool.shutdown(wait=True)

    @property
    def place(self) -> Place:
        """Where reading must start for the next token."""
        return self.settled.place if self.settled else Place()

    @property
    def begun(self) -> int:
        """Shards that are committed or being written."""
        return self._next

    @property
    def cursor_token(self) -> int:
        """Committed tokens of the document at the cursor of the run that is continued."""
        return self.settled.token if self.settled is not None else 0

    # ------------------------------------------------------------------------------------ filling

    def add(
        self,
        batch: Encoded,
        keep: npt.NDArray[np.bool_],
        duplicates: npt.NDArray[np.bool_],
        *,
        last: tuple[int, int] | None = None,
    ) -> None:
        """Append the documents of a batch that `keep` marks. `duplicates` are counted as dropped at their place;
        what was dropped behind the document `last` is not counted."""
        documents = batch.documents
        keep = keep & ~self.settled_before(documents.units, documents.rows)
        drops = sorted(self._new_drops(documents, duplicates))
        if last is not None:
            drops = [drop for drop in drops if drop[:2] < last]
        kept = np.flatnonzero(keep)
        ids, offsets = _select(batch, keep, kept)
        units, rows, sizes = documents.units[kept], documents.rows[kept], batch.sizes[kept]
        before = [_position(units, rows, unit, row) for unit, row, _ in drops]  # documents before each drop
        at = 0
        if len(kept) and self.settled is not None and self._is_settled(int(units[0]), int(rows[0])):
            at = self.settled.token  # only the document at the cursor can be settled and not wholly before it
        elif not len(kept):
            self._count(drops)
            return
        counted = 0
        while at < len(ids):
            take = min(self.capacity - self._filled, len(ids) - at)
            first = int(np.searchsorted(offsets, at, "right")) - 1
            end = int(np.searchsorted(offsets, at + take, "left")) - 1  # the document of the last token taken
            records = np.empty(end + 1 - first, DOCUMENT)
            records["start"] = np.maximum(offsets[first : end + 1] - at, 0) + self._filled
            records["unit"] = units[first : end + 1]
            records["row"] = rows[first : end + 1]
            records["hash"] = batch.hashes[kept[first : end + 1]]
            records["bytes"] = sizes[first : end + 1]
            begun = slice(first, end + 1)
            if at > offsets[first]:
                records["bytes"][0] = 0
                self._first_doc_offset = at - int(offsets[first])
                begun = slice(first + 1, end + 1)
            self._records.append(records)
            self._shard_docs += begun.stop - begun.start
            self._shard_bytes += int(sizes[begun].sum())
            self._tokens.append(ids[at : at + take])
            self._filled += take
            at += take
            if self._filled == self.capacity:
                past = counted
                while past < len(drops) and before[past] <= end:
                    past += 1
                self._count(drops[counted:past])
                counted = past
                unit = int(units[end])
                own = documents.unit == unit
                place = Place(unit, documents.piece if own else 0, documents.base if own else 0)
                self._commit(self._cursor(place, int(rows[end]), at - int(offsets[end])))
        self._count(drops[counted:])

    def settled_before(self, units: npt.NDArray[np.uint32], rows: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Which documents lie wholly before the cursor of the run that is continued."""
        if self.settled is None:
            return np.zeros(len(units), bool)
        unit, row = self.settled.place.unit, self.settled.row
        return np.asarray((units < unit) | ((units == unit) & (rows < row)))

    def at_cursor(self, units: npt.NDArray[np.uint32], rows: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Which document is the one at that cursor: committed in part, or just to its end."""
        if self.settled is None:
            return np.zeros(len(units), bool)
        return np.asarray((units == self.settled.place.unit) & (rows == self.settled.row))

    def _is_settled(self, unit: int, row: int) -> bool:
        return self.settled is not None and (unit, row) <= (self.settled.place.unit, self.settled.row)

    def _new_drops(self, documents: Documents, duplicates: npt.NDArray[np.bool_]) -> list[tuple[int, int, Drop]]:
        drops = list(documents.drops)
        for index in np.flatnonzero(duplicates):
            drops.append((int(documents.units[index]), int(documents.rows[index]), Drop.DUPLICATE))
        return [drop for drop in drops if not self._is_settled(drop[0], drop[1])]

    def _count(self, drops: Sequence[tuple[int, int, Drop]]) -> None:
        self.dropped.update(reason.name.lower() for _, _, reason in drops)

    def _cursor(self, place: Place, row: int, token: int) -> Cursor:
        return Cursor(place, row, token, dict(sorted(self.dropped.items())))

    # ------------------------------------------------------------------------------------ committing

    def finish(self, end: Place) -> list[Committed]:
        """Commit the last, partial shard, whose cursor says that nothing is left to read, and wait for every write."""
        if self._filled:
            self._commit(self._cursor(end, -1, 0))
        self.wait()
        return self.committed

    def wait(self) -> None:
        """Wait for the shard that is being written; raises what went wrong there."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def _begin_shard(self) -> None:
        self._tokens: list[Tokens] = []  # the batches themselves, not a copy of them
        self._records: list[npt.NDArray[Any]] = []
        self._filled = self._first_doc_offset = self._shard_docs = self._shard_bytes = 0

    def _commit(self, cursor: Cursor) -> None:
        self.wait()
        number, self._next = self._next, self._next + 1
        if self.only is None or number in self.only:
            rows = -(-self._filled // self.seq_len)
            pad = np.full(rows * self.seq_len - self._filled, self.eos_id, self.dtype)
            shard = _Shard(
                number,
                rows,
                [*self._tokens, pad],
                self._filled,
                np.concatenate(self._records),
                self._shard_docs,
                self._shard_bytes,
                self._first_doc_offset,
            )
            self._writing = self._pool.submit(self._write, shard, cursor)
        self._begin_shard()

    def _write(self, shard: _Shard, cursor: Cursor) -> None:
        name = shard_name(shard.number)
        header = npy_header(self.dtype, (shard.rows, self.seq_len))
        size = len(header) + shard.rows * self.seq_len * self.dtype.itemsize
        chunks: list[storage.Buffer] = [header, *(part.view(np.uint8).data for part in shard.tokens)]
        digest = storage.write_file(self.directory / f"{name}.npy", chunks, size=size, cached=False)
        index_chunks, index_size = npy_chunks(shard.records)
        index = storage.write_file(self.directory / f"{name}.docs.npy", index_chunks, size=index_size)
        entry = ShardEntry(
            name=name,
            rows=shard.rows,
            n_tokens=shard.n_tokens,
            n_docs=shard.n_docs,
            max_id=max(int(part.max()) for part in shard.tokens if len(part)),
            bytes=digest.bytes,
            sha256=digest.sha256,
            docs_sha256=index.sha256,
            docs_records=len(shard.records),
            first_doc_offset=shard.first_doc_offset,
        )
        line = Committed(entry, shard.n_bytes, cursor)
        if self.only is None:
            storage.append_json_line(self.directory / JOURNAL, line.to_json())
        self.committed.append(line)


@dataclass(frozen=True)
class _Shard:
    number: int
    rows: int
    tokens: list[Tokens]  # one after the other; with the pad rows * seq_len of them
    n_tokens: int
    records: npt.NDArray[Any]  # of DOCUMENT
    n_docs: int
    n_bytes: int
    first_doc_offset: int


def _select(
    batch: Encoded, keep: npt.NDArray[np.bool_], kept: npt.NDArray[np.intp]
) -> tuple[Tokens, npt.NDArray[np.int64]]:
    """(ids, offsets) of the kept documents; the batch's own arrays when that is all of them."""
    if keep.all():
        return batch.ids, batch.offsets
    lengths = np.diff(batch.offsets)
    offsets = np.zeros(len(kept) + 1, np.int64)
    np.cumsum(lengths[kept], out=offsets[1:])
    return batch.ids[np.repeat(keep, lengths)], offsets


def _position(units: npt.NDArray[np.uint32], rows: npt.NDArray[np.int64], unit: int, row: int) -> int:
    """How many of the (ascending) documents come before (unit, row)."""
    return int(np.count_nonzero((units < unit) | ((units == unit) & (rows < row))))
