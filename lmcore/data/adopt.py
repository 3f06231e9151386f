"""`lm import`: foreign token data becomes a shard set, by links where the bytes allow it, by conversion where not.

A file is linked when it is, byte for byte, what this format would write: NPY v1.0 with a 128-byte header, C order,
(rows, seq_len) of '<u2' or '<u4'. numpy.save writes exactly that. Everything else is copied once into new shards.

Documents come from the format (Megatron, datatrove) or, when the tokenizer is known, from the EOS in the tokens; then
the set can be split by document and traced. Documents that the format knows but that no EOS ends get one. A document's
hash is that of its text where the tokenizer can give the exact bytes back, else that of its ids (the manifest's source
says which).

Left out: reading foreign files (foreign.py).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from lmcore import storage
from lmcore.data import foreign as other
from lmcore.data.findings import Finding
from lmcore.data.foreign import Foreign, ForeignFile
from lmcore.data.manifest import MANIFEST, TOKENIZER, Manifest, ShardEntry, created_by, make_manifest
from lmcore.data.rewrite import LENGTHS, index_records, write_shards
from lmcore.data.shard import HEADER_BYTES, MAX_SEQ_LEN, npy_chunks, npy_header, shard_name, token_dtype
from lmcore.errors import Exit, LmError, from_os_error, quoted
from lmcore.progress import SILENT, Progress

if TYPE_CHECKING:
    from lmcore.data.tokenizer import Tokenizer
    from lmcore.data.validate import Report

DEFAULT_SEQ_LEN = 2048


@dataclass
class AdoptReport:
    """One adopted set."""

    path: Path
    n_tokens: int
    n_docs: int
    linked: int
    """Files that were linked; no byte of them was copied."""
    converted: int
    dataset_id: str
    kinds: str
    warnings: list[str] = field(default_factory=list)


def adopt(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    tokenizer: Tokenizer | None = None,
    width: int | None = None,
    column: str | None = None,
    seq_len: int | None = None,
    copy: bool = False,
    progress: Progress = SILENT,
) -> list[AdoptReport]:
    """Make a shard set `out` of foreign data; several sets `out/train`, `out/val` when the file names say so.

    tokenizer: the one that made the ids, if it is known. width: 1, 2, 4 or 8 bytes per id of headerless files. column:
    the one with the ids in parquet and Arrow files (default: input_ids and other usual names, or the only one).
    seq_len: row length of converted shards (default: the data's own, else 2,048). copy: convert where a link would do.
    Raises LmError (65) for data that is not sound, (73) when `out` holds something already.
    """
    path, out = Path(path), Path(out)
    if not path.exists():
        raise LmError(f"{path}: no such file or directory.")
    if (path / MANIFEST).exists():
        raise LmError(f"{path}: this is a shard set already.", hint=f"Check it with: lm validate {quoted(path)}")
    if width not in (None, 1, 2, 4, 8):
        raise LmError(f"width={width}: ids have 1, 2, 4 or 8 bytes.")
    found = other.recognise(path, width, column)
    other.require_readable(found)
    reports = [
        _adopt_group(found, files, out / name if name else out, tokenizer, seq_len, copy, progress)
        for name, files in found.groups().items()
    ]
    reports[0].warnings += [remark + "." for remark in found.remarks]
    return reports


def _adopt_group(
    found: Foreign,
    files: list[ForeignFile],
    out: Path,
    tokenizer: Tokenizer | None,
    seq_len: int | None,
    copy: bool,
    progress: Progress,
) -> AdoptReport:
    progress.start(f"reading {found.path.name}", sum(f.n_tokens for f in files), "tokens")
    high = 0
    for file in files:
        low, top = other.id_range(file)
        progress.advance(file.n_tokens)
        if low < 0 or top >= 1 << 32:
            raise LmError(f"{file.path}: ids from {low:,} to {top:,} are no token ids.", code=Exit.DATA)
        if tokenizer is not None and top >= tokenizer.vocab_size:
            raise LmError(
                f"{file.path}: holds the id {top:,}, the tokenizer {tokenizer.name} has {tokenizer.vocab_size:,}.",
                hint="Name the tokenizer that made the ids, or the right --width for headerless files.",
                code=Exit.DATA,
            )
        high = max(high, top)
    progress.finish()
    link = not copy and seq_len is None and _linkable(files)
    row_lengths = {file.row_length for file in files}
    if seq_len is None:
        own = next(iter(row_lengths)) if len(row_lengths) == 1 else None
        seq_len = own if own is not None and own <= MAX_SEQ_LEN else DEFAULT_SEQ_LEN
    dtype = files[0].dtype if link else token_dtype(max(high, tokenizer.max_id if tokenizer else high))
    documents, hashed, unended = _documents(files, tokenizer, progress)
    if not link:
        storage.require_free_space(out, found.n_tokens * dtype.itemsize, "the converted shards")
    with storage.commit_directory(out) as folder:
        if tokenizer is not None:
            storage.create_file(folder / TOKENIZER, tokenizer.to_json())
        if link:
            entries = _link(files, folder, out, documents, progress)
        else:
            progress.start("converting", sum(f.n_tokens for f in files), "tokens")
            entries = write_shards(
                folder,
                _blocks(files, unended, tokenizer.eos_id if tokenizer else 0, progress),
                dtype=dtype,
                seq_len=seq_len,
                pad_id=tokenizer.eos_id if tokenizer else 0,
                documents=documents,
            )
            progress.finish()
        n_bytes = int(documents["bytes"].astype(np.int64).sum()) if documents is not None else 0
        source = {
            "kind": "import",
            "format": ", ".join(sorted({file.kind for file in files})),
            "files": [str(file.path.resolve()) for file in files],
            "document_hash": hashed,
            "open_end": tokenizer is not None and not unended and _last_id(files[-1]) != tokenizer.eos_id,
        }
        manifest = _manifest(entries, dtype, seq_len, tokenizer, documents, n_bytes, source)
        storage.create_file(folder / MANIFEST, storage.canonical_json(manifest.model_dump(mode="json")) + b"\n")
    report = AdoptReport(
        out,
        manifest.n_tokens,
        manifest.n_docs,
        len(files) if link else 0,
        0 if link else len(files),
        manifest.dataset_id,
        str(source["format"]),
    )
    if tokenizer is None:
        report.warnings.append(
            "the tokenizer is unknown: evaluation gives the loss only, and text cannot be generated. Name it with "
            "--tokenizer."
        )
    if unended:
        report.warnings.append("no EOS ended the documents: one was added to each, as everywhere in this format.")
    if documents is None:
        report.warnings.append("there are no document borders: the set can be split by shard or rows only.")
    return report


def _manifest(
    entries: Sequence[ShardEntry],
    dtype: np.dtype[Any],
    seq_len: int,
    tokenizer: Tokenizer | None,
    documents: npt.NDArray[np.void] | None,
    n_bytes: int,
    source: dict[str, Any],
) -> Manifest:
    return make_manifest(
        tokenizer=tokenizer.entry() if tokenizer else None,
        dtype=np.dtype(dtype).name,
        seq_len=seq_len,
        shards=tuple(entries),
        segments=tuple((number, 0, entry.n_tokens) for number, entry in enumerate(entries)),
        n_tokens=sum(entry.n_tokens for entry in entries),
        n_docs=len(documents) if documents is not None else 0,
        n_bytes=n_bytes,
        source=source,
        created_by=created_by("lm import"),
    )


# ---------------------------------------------------------------------------------------- links


def _linkable(files: list[ForeignFile]) -> bool:
    first = files[0]
    return all(
        file.kind == "npy"
        and file.dtype.str in ("<u2", "<u4")
        and (file.dtype, file.row_length) == (first.dtype, first.row_length)
        and file.row_length is not None
        and file.row_length <= MAX_SEQ_LEN
        and file.offset == HEADER_BYTES
        and _head(file.path) == npy_header(file.dtype, file.shape)
        for file in files
    )


def _head(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(HEADER_BYTES)


def _link(
    files: list[ForeignFile],
    folder: Path,
    out: Path,
    documents: npt.NDArray[np.void] | None,
    progress: Progress,
) -> list[ShardEntry]:
    progress.start("hashing", sum(file.path.stat().st_size for file in files), "bytes")
    entries = []
    ends = np.cumsum(documents["length"]) if documents is not None else None
    begin = 0
    home = out.resolve()
    for number, file in enumerate(files):
        name = shard_name(number)
        try:
            os.symlink(os.path.relpath(file.path.resolve(), home), folder / f"{name}.npy")
        except OSError as error:
            raise from_os_error(error, out / f"{name}.npy", "link") from error
        extra: dict[str, Any] = {}
        if documents is not None and ends is not None:
            records, offset = index_records(documents, ends, begin, begin + file.n_tokens)
            chunks, size = npy_chunks(records)
            digest = storage.create_file(folder / f"{name}.docs.npy", chunks, size=size)
            extra = {
                "docs_sha256": digest.sha256,
                "docs_records": len(records),
                "first_doc_offset": offset,
                "n_docs": len(records) - (offset > 0),
            }
        begin += file.n_tokens
        entries.append(
            ShardEntry(
                name=name,
                rows=file.shape[0],
                n_tokens=file.n_tokens,
                max_id=other.id_range(file)[1],
                bytes=file.path.stat().st_size,
                sha256=storage.sha256_file(file.path, progress.advance),
                **({"n_docs": 0} | extra),
            )
        )
    progress.finish()
    return entries


def _blocks(files: list[ForeignFile], unended: bool, eos_id: int, progress: Progress) -> Iterator[npt.NDArray[Any]]:
    for file in files:
        if unended and file.lengths is not None:
            ends = np.cumsum(file.lengths)
            array = file.array()
            for first in range(0, len(ends), 4096):
                stops = ends[first : first + 4096]
                begin = int(ends[first] - file.lengths[first])
                yield np.insert(array[begin : int(stops[-1])], stops - begin, eos_id)
                progress.advance(int(stops[-1]) - begin)
        else:
            for block in file.blocks():
                yield block
                progress.advance(len(block))


# ---------------------------------------------------------------------------------------- documents


def _documents(
    files: list[ForeignFile], tokenizer: Tokenizer | None, progress: Progress
) -> tuple[npt.NDArray[np.void] | None, str | None, bool]:
    """(`LENGTHS` records of all documents or None, what was hashed: "text" or "tokens", whether EOS must be added)."""
    formatted = all(file.lengths is not None for file in files)
    if not formatted and tokenizer is None:
        return None, None, False
    unended = (
        formatted
        and tokenizer is not None
        and not any(np.any(b == tokenizer.eos_id) for f in files for b in f.blocks())
    )
    exact = tokenizer is not None and tokenizer.lossless
    table = np.array([*tokenizer.token_bytes()], object) if tokenizer is not None and exact else None
    eos_id = tokenizer.eos_id if tokenizer is not None else -1
    parts: list[npt.NDArray[np.void]] = []
    progress.start("documents", sum(file.n_tokens for file in files), "tokens")
    carried, origin = np.empty(0, files[0].dtype), (0, 0)  # a document that runs on into the next file
    for unit, file in enumerate(files):
        array = file.array()
        by_eos = tokenizer is not None and not unended
        lengths = _lengths_by_eos(array, eos_id) if by_eos else file.lengths
        assert lengths is not None
        runs_on = by_eos and unit + 1 < len(files) and array[-1] != eos_id
        part = np.zeros(len(lengths) - runs_on, LENGTHS)
        part["length"], part["unit"] = lengths[: len(part)] + unended, unit
        part["row"] = np.arange(len(part)) if by_eos or file.rows is None else file.rows
        stop = 0
        for k, length in enumerate(lengths.tolist()):
            start, stop = stop, stop + length
            ids = array[start:stop]
            if k == len(part):
                origin = origin if len(carried) and k == 0 else (unit, k)
                carried = np.concatenate([carried, ids])
                break
            if k == 0 and len(carried):
                ids = np.concatenate([carried, ids])
                part[0] = (len(ids), *origin, 0, 0)
                carried = carried[:0]
            if len(ids) and ids[-1] == eos_id:
                ids = ids[:-1]
            if table is not None:
                text = b"".join(table[ids].tolist())
                part["bytes"][k] = len(text)
            else:
                text = ids.astype("<u4").tobytes()
            part["hash"][k] = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")
        parts.append(part)
        progress.advance(file.n_tokens)
    progress.finish()
    return np.concatenate(parts), "text" if exact else "tokens", unended


def _lengths_by_eos(array: npt.NDArray[Any], eos_id: int) -> npt.NDArray[np.int64]:
    """Every EOS ends a document; ids behind the last one are a document without an end."""
    ends = np.concatenate(
        [np.flatnonzero(array[k : k + (1 << 22)] == eos_id) + k + 1 for k in range(0, len(array), 1 << 22)]
    )
    if not len(ends) or ends[-1] != len(array):
        ends = np.append(ends, len(array))
    return np.diff(np.concatenate([np.zeros(1, np.int64), ends.astype(np.int64)]))


def _last_id(file: ForeignFile) -> int:
    return int(file.array()[-1])


# ---------------------------------------------------------------------------------------- validation


def validate_foreign(path: Path, level: str, report: Report, progress: Progress) -> None:
    """What can be said of foreign data: readable, integers, of one form; and how to adopt it."""
    from lmcore.data.validate import SetReport

    found = other.recognise(path)
    entry = SetReport(path, f"foreign: {found.kinds}" if found.files else "unknown", n_tokens=found.n_tokens)
    entry.n_shards = len(found.files)
    report.sets.append(entry)
    for fault in found.faults:
        report.add(fault.code, fault.where, fault.message, fault.repair)
    if not found.files:
        if not found.faults:
            report.add("V200", path, "no manifest.json and no token data that is known")
        return
    for file in found.files:
        for note in file.notes:
            report.add(note.code, note.where, note.message)
    forms = {(file.kind, file.dtype.str, file.row_length) for file in found.files}
    if len(forms) > 1:
        said = "; ".join(sorted(f"{kind} {dtype} rows of {row or 'any length'}" for kind, dtype, row in forms))
        report.add("V203", path, f"the files differ in form: {said}")
    progress.start(f"reading {path.name}", found.n_tokens, "tokens")
    for file in found.files:
        if file.lengths is not None:
            entry.n_docs += len(file.lengths)
        if level != "quick":
            low, high = other.id_range(file)
            report.scanned_bytes += file.n_tokens * file.dtype.itemsize
            if low < 0 or high >= 1 << 32:
                report.add("V204", file.path, f"ids from {low:,} to {high:,} are no token ids")
        progress.advance(file.n_tokens)
    progress.finish()
    if level != "quick":
        _smells(found, report)
    how = "linked, no byte copied" if _linkable(found.files) else "converted"
    report.findings.append(
        Finding(
            "V201",
            str(path),
            "; ".join([f"{found.kinds} data, would be {how}", *found.remarks]),
            f"lm import {quoted(path)} --out shards/NAME",
        )
    )


def _smells(found: Foreign, report: Report) -> None:
    sample = np.concatenate([file.array()[: 1 << 20].astype(np.int64) for file in found.files[:8]])
    ids, counts = np.unique(sample, return_counts=True)
    share = counts / counts.sum()
    entropy = float(-(share * np.log2(share)).sum())
    ceiling = float(np.log2(min(int(ids.max()) + 1, len(sample))))
    if len(sample) > 10_000 and ceiling >= 8 and entropy > 0.97 * ceiling:
        report.add("V104", found.path, f"entropy {entropy:.2f} of at most {ceiling:.2f} bits per token")
    if len(sample) > 1000 and float(share.max()) > 1 / 3:
        report.add("V105", found.path, f"id {int(ids[share.argmax()])} takes {100 * share.max():.0f} % of the sample")
