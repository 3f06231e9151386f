"""Shards from tokens that exist already: views with shards of their own, and adopted data that must be converted.

Tokens come in blocks of any size, documents as one record each (`LENGTHS`); out come `shard-00000.npy`, ... of equal
size and their document indexes. Call inside `storage.commit_directory`: the set appears as a whole.

Left out: making tokens from text (writer.py does that, with a journal).
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lmcore import storage
from lmcore.data.manifest import ShardEntry
from lmcore.data.shard import DOCUMENT, npy_chunks, shard_name
from lmcore.errors import Exit, LmError

SHARD_BYTES = 128 << 20

LENGTHS = np.dtype([("length", "<i8"), ("unit", "<u4"), ("row", "<u4"), ("hash", "<u8"), ("bytes", "<u4")])
"""A document in stream order: its tokens (EOS included) and where it came from."""


def write_shards(
    folder: Path,
    blocks: Iterable[npt.NDArray[Any]],
    *,
    dtype: np.dtype[Any],
    seq_len: int,
    pad_id: int,
    documents: npt.NDArray[np.void] | None = None,
    rows: int | None = None,
) -> list[ShardEntry]:
    """Write the concatenation of `blocks` into shards of `rows` rows (default: 128 MiB) inside `folder`.

    documents: `LENGTHS` records whose lengths add up to the number of tokens; None writes no index. The last row is
    padded with `pad_id`. Raises LmError (65) for an id that the dtype cannot hold.
    """
    rows = rows or max(1, SHARD_BYTES // (seq_len * dtype.itemsize))
    flat = np.empty(rows * seq_len, dtype)
    ends = np.cumsum(documents["length"]) if documents is not None else None
    entries: list[ShardEntry] = []
    filled = written = 0

    def commit() -> None:
        nonlocal filled, written
        name = shard_name(len(entries))
        used = -(-filled // seq_len)
        flat[filled : used * seq_len] = pad_id
        chunks, size = npy_chunks(flat[: used * seq_len].reshape(used, seq_len))
        digest = storage.create_file(folder / f"{name}.npy", chunks, size=size)
        extra: dict[str, Any] = {}
        n_docs = 0
        if documents is not None and ends is not None:
            records, first_offset = index_records(documents, ends, written, written + filled)
            n_docs = len(records) - (first_offset > 0)
            chunks, size = npy_chunks(records)
            docs = storage.create_file(folder / f"{name}.docs.npy", chunks, size=size)
            extra = {
                "docs_sha256": docs.sha256,
                "docs_records": len(records),
                "first_doc_offset": first_offset,
            }
        entries.append(
            ShardEntry(
                name=name,
                rows=used,
                n_tokens=filled,
                n_docs=n_docs,
                max_id=int(flat[:filled].max()),
                bytes=digest.bytes,
                sha256=digest.sha256,
                **extra,
            )
        )
        written += filled
        filled = 0

    for block in blocks:
        if block.size and (int(block.min()) < 0 or int(block.max()) > np.iinfo(dtype).max):
            raise LmError(
                f"the ids reach from {block.min()} to {block.max()}; {dtype} cannot hold them.", code=Exit.DATA
            )
        while block.size:
            take = min(block.size, flat.size - filled)
            flat[filled : filled + take] = block[:take]
            filled += take
            block = block[take:]
            if filled == flat.size:
                commit()
    if filled:
        commit()
    if documents is not None and int(documents["length"].sum()) != written:
        raise ValueError(f"documents of {int(documents['length'].sum())} tokens for a stream of {written}")
    return entries


def index_records(
    documents: npt.NDArray[np.void], ends: npt.NDArray[np.int64], begin: int, end: int
) -> tuple[npt.NDArray[np.void], int]:
    """(document index of the shard with stream positions begin .. end-1, tokens of its first document before it)."""
    first = int(np.searchsorted(ends, begin, "right"))
    last = int(np.searchsorted(ends, end, "left")) + 1
    part = documents[first:last]
    starts = ends[first:last] - part["length"]
    records = np.empty(len(part), DOCUMENT)
    for name in ("unit", "row", "hash", "bytes"):
        records[name] = part[name]
    records["start"] = np.maximum(starts - begin, 0)
    offset = max(begin - int(starts[0]), 0) if len(part) else 0
    if offset:
        records["bytes"][0] = 0
    return records, offset
