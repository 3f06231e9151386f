"""From a token to its document, and back: stream position -> segment -> shard offset -> index -> source file and row.

    StreamDocuments   all documents of a stream with their positions, built from the indexes
    Locator           one position or document at a time, reading only the index that is needed

A document that runs over shards is one document. Where a view cuts a document (a split by rows), its parts count as
documents of their own that are not `whole`.
"""

from __future__ import annotations

import functools
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lmcore.data import shard as shards
from lmcore.data.manifest import PLAN, Manifest
from lmcore.data.sources import shown
from lmcore.data.split import first_pieces, piece_ends
from lmcore.data.stream import TokenStream
from lmcore.errors import Exit, LmError


@dataclass(frozen=True)
class StreamDocuments:
    """The documents of a stream in order: arrays of equal length."""

    starts: npt.NDArray[np.int64]
    """Stream position of the first token."""
    lengths: npt.NDArray[np.int64]
    """Tokens, EOS included."""
    units: npt.NDArray[np.uint32]
    rows: npt.NDArray[np.uint32]
    hashes: npt.NDArray[np.uint64]
    sizes: npt.NDArray[np.int64]
    """UTF-8 bytes of the whole document's text, also where only a part of it lies in the stream."""
    whole: npt.NDArray[np.bool_]
    """False for a part of a document (cut by a split by rows, or by the end of a partial view)."""

    @classmethod
    def build(cls, path: Path, manifest: Manifest, documents: dict[int, npt.NDArray[np.void]]) -> StreamDocuments:
        """documents: the verified index of every shard."""
        columns: dict[str, list[npt.NDArray[Any]]] = {
            k: [] for k in ("low", "length", "begin", "unit", "row", "hash", "size")
        }
        position = 0
        by_shard: dict[int, list[tuple[int, int, int]]] = {}
        for shard, start, stop in manifest.segments:
            by_shard.setdefault(shard, []).append((start, stop, position))
            position += stop - start
        for shard, ranges_ in by_shard.items():
            entry, index = manifest.shards[shard], documents[shard]
            ranges = np.array(ranges_, np.int64)
            starts, ends = index["start"].astype(np.int64), piece_ends(index, entry)
            first = np.searchsorted(ends, ranges[:, 0], "right")
            count = np.searchsorted(starts, ranges[:, 1], "left") - first
            which = np.repeat(np.arange(len(ranges)), count)
            piece = first[which] + (np.arange(len(which)) - np.repeat(np.cumsum(count) - count, count))
            low, high = np.maximum(starts[piece], ranges[which, 0]), np.minimum(ends[piece], ranges[which, 1])
            columns["low"].append(ranges[which, 2] + low - ranges[which, 0])
            columns["length"].append(high - low)
            columns["begin"].append(first_pieces(index, entry)[piece] & (low == starts[piece]))
            columns["unit"].append(index["unit"][piece])
            columns["row"].append(index["row"][piece])
            columns["hash"].append(index["hash"][piece])
            columns["size"].append(index["bytes"][piece])
        joined = {name: np.concatenate(parts) for name, parts in columns.items()}
        if np.any(joined["low"][1:] < joined["low"][:-1]):  # never so in a set: its shards are in stream order
            order = np.argsort(joined["low"], kind="stable")
            joined = {name: column[order] for name, column in joined.items()}
        # A piece that begins nothing and follows a piece of the same document belongs to it.
        same = np.ones(len(joined["low"]), np.bool_)
        for name in ("unit", "row", "hash"):
            same[1:] &= joined[name][1:] == joined[name][:-1]
        same[:1] = False
        heads = np.flatnonzero(joined["begin"] | ~same)
        lengths = np.add.reduceat(joined["length"], heads) if len(heads) else np.empty(0, np.int64)
        whole = joined["begin"][heads].copy()
        if manifest.split is not None and manifest.split.get("by") == "rows":
            whole[:] = False
        return cls(
            joined["low"][heads],
            lengths,
            joined["unit"][heads],
            joined["row"][heads],
            joined["hash"][heads],
            joined["size"][heads].astype(np.int64),
            whole,
        )


@dataclass(frozen=True)
class Origin:
    """Where a token comes from. Stream positions are half-open: start <= position < stop."""

    position: int
    shard: str
    offset: int
    """Flat offset of the token in its shard."""
    start: int
    stop: int
    """The document's tokens in the stream, EOS included."""
    token_in_document: int
    unit: int
    row: int
    """The document's record inside its source file."""
    hash: str
    """blake2b-8 of the text, as 16 hex digits of the little-endian number."""
    source: str
    """The file (or dataset file) of the plan; empty when the plan is not at hand."""


class Locator:
    """Provenance of a stream that has document indexes."""

    def __init__(self, stream: TokenStream) -> None:
        """Raises LmError (65) for arrays and for sets without a document index."""
        if stream.manifest is None or stream.path is None:
            raise LmError("an array has no documents.", code=Exit.DATA)
        if any(entry.docs_sha256 is None for entry in stream.manifest.shards):
            raise LmError(
                f"{stream.path}: this data was adopted without a document index, so its tokens cannot be traced.",
                code=Exit.DATA,
            )
        self.stream, self.manifest, self.path = stream, stream.manifest, stream.path

    @functools.cached_property
    def documents(self) -> StreamDocuments:
        directory = shards.open_directory(self.path)
        try:
            found = {
                number: shards.sound_documents(directory, entry, parent=self.manifest.kind == "view")
                for number, entry in enumerate(self.manifest.shards)
            }
        finally:
            os.close(directory)
        return StreamDocuments.build(self.path, self.manifest, found)

    @functools.cached_property
    def sources(self) -> list[str]:
        """Name of each unit of the plan, in order; empty when there is no plan."""
        from lmcore.data.plan import read_plan

        for folder in (self.path, self.path.resolve().parent):
            if (folder / PLAN).is_file():
                return [shown(unit.path) for unit in read_plan(folder).units]
        files = self.manifest.source.get("files")  # adopted data has no plan
        return [str(file) for file in files] if isinstance(files, list) else []

    def source_text(self, origin: Origin) -> bytes | None:
        """The document's text, read again from its source file; None when the plan or the file is not at hand."""
        from lmcore.data.plan import read_plan
        from lmcore.data.readers import read_document

        for folder in (self.path, self.path.resolve().parent):
            if (folder / PLAN).is_file():
                try:
                    plan = read_plan(folder)
                    return read_document(plan.units, plan.request.text_column, origin.unit, origin.row)
                except LmError:
                    return None
        return None

    def at(self, position: int) -> Origin:
        """The origin of the token at a stream position."""
        if not 0 <= position < self.stream.n_tokens:
            raise LmError(f"token {position:,}: the stream has tokens 0 to {self.stream.n_tokens - 1:,}.")
        documents = self.documents
        k = int(np.searchsorted(documents.starts, position, "right")) - 1
        shard, offset = self.stream.locate(position)
        start = int(documents.starts[k])
        unit = int(documents.units[k])
        return Origin(
            position,
            self.manifest.shards[shard].name,
            offset,
            start,
            start + int(documents.lengths[k]),
            position - start,
            unit,
            int(documents.rows[k]),
            f"{int(documents.hashes[k]):016x}",
            self.sources[unit] if unit < len(self.sources) else "",
        )

    def in_window(self, start: int, length: int) -> list[Origin]:
        """One origin per document that has tokens in the window, on the ring."""
        n = self.stream.n_tokens
        found: list[Origin] = []
        position, left = start % n, min(length, n)
        while left > 0:
            origin = self.at(position)
            found.append(origin)
            step = min(origin.stop - position, left)
            left -= step
            position = (position + step) % n
        return found

    def by_hash(self, content_hash: str) -> list[Origin]:
        """All places of a document, by its hash as `at` shows it."""
        try:
            wanted = np.uint64(int(content_hash, 16))
        except (ValueError, OverflowError):
            raise LmError(f"{content_hash!r} is not a content hash (16 hex digits).") from None
        return [self.at(int(s)) for s in self.documents.starts[self.documents.hashes == wanted]]

    def by_text(self, text: bytes) -> list[Origin]:
        """All places of the document with exactly this text."""
        return self.by_hash(f"{content_hash(text):016x}")

    def by_source(self, name: str, row: int) -> list[Origin]:
        """All places of record `row` of a source file (the full name, or its end)."""
        units = [k for k, unit in enumerate(self.sources) if unit == name or unit.endswith("/" + name)]
        d = self.documents
        places = np.flatnonzero(np.isin(d.units, units) & (d.rows == row))
        return [self.at(int(d.starts[k])) for k in places]


def content_hash(text: bytes) -> int:
    """blake2b with 8 bytes of digest over the raw UTF-8 text, as a little-endian number."""
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")
