"""Is this data what it says it is? Every check from cheap to dear, all findings listed, none of them the last.

    quick     manifest, presence, sizes, headers, document indexes, tokenizer, segments, views
    default   + sha256 of every shard, ids below the vocabulary and EOS against the document index in the same pass;
              equal shards and rows; statistics; a sample of documents decoded and hashed
    deep      + every document decoded and hashed, periodic rows, n-gram overlap of held-out views with train

The strongest check needs no trust in anything but the text: for a byte-level tokenizer the bytes behind a document's
tokens must hash to the content hash that the index took from the source.

A pass reads each shard once, through the descriptor whose size and header were checked, in chunks that stay in the
cache while they are hashed and scanned; shards go to threads, because hashing runs outside the interpreter lock.

Left out: what the codes mean (findings.py), foreign data (adopt.py), mending (repair in tokenization.py).
"""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from lmcore import storage
from lmcore.data import shard as shards
from lmcore.data.findings import Finding
from lmcore.data.manifest import (
    FORMAT,
    JOURNAL,
    MANIFEST,
    PLAN,
    TOKENIZER,
    Manifest,
    ShardEntry,
    dataset_identity,
    read_manifest,
)
from lmcore.data.shard import DOCUMENT, HEADER_BYTES, ShardFile, npy_header
from lmcore.data.split import document_hashes, first_pieces, piece_ends, split_command
from lmcore.data.statistics import ROW, Statistics, statistics
from lmcore.data.writer import read_journal
from lmcore.errors import LmError, quoted
from lmcore.progress import SILENT, Progress

Level = Literal["quick", "default", "deep"]
Documents = npt.NDArray[np.void]

_CHUNK = 1 << 20  # bytes that are hashed and scanned together; stays in the second-level cache
_MAX_ROW_BYTES = 32 << 30  # of a larger set only the first shards are searched for equal rows
_SHOWN = 20  # findings of one code per set; the rest is counted


@dataclass
class SetReport:
    """One set, view or foreign folder."""

    path: Path
    kind: str
    n_tokens: int = 0
    n_docs: int = 0
    n_bytes: int = 0
    n_shards: int = 0
    dataset_id: str = ""
    tokenizer: str = ""
    statistics: Statistics | None = None


@dataclass
class Report:
    """Everything that `validate` found."""

    path: Path
    level: str
    sets: list[SetReport] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    more: dict[str, int] = field(default_factory=dict)
    """Findings beyond the first twenty of a code, by code."""
    scanned_bytes: int = 0

    @property
    def errors(self) -> int:
        return sum(f.severity == "error" for f in self.findings)

    @property
    def ok(self) -> bool:
        return self.errors == 0

    def add(self, code: str, where: Path | str, message: str, repair: str = "") -> None:
        if sum(f.code == code for f in self.findings) >= _SHOWN:
            self.more[code] = self.more.get(code, 0) + 1
        else:
            self.findings.append(Finding(code, str(where), message, repair))


def validate(
    path: str | os.PathLike[str], level: Level = "default", *, workers: int | None = None, progress: Progress = SILENT
) -> Report:
    """Check a set, a view, a folder of sets, or foreign token data. Never raises for bad data: that is a finding.

    Raises LmError (2) when the path does not exist.
    """
    path = Path(path)
    if not path.exists():
        raise LmError(f"{path}: no such file or directory.", hint="Make a shard set with: lm tokenize --dataset stdlib")
    report = Report(path, level)
    workers = workers or os.cpu_count() or 1
    for place in _places(path):
        if (place / MANIFEST).exists() or os.path.lexists(place / MANIFEST):
            _validate_set(place, level, workers, report, progress)
        elif (place / PLAN).exists():
            report.sets.append(SetReport(place, "unfinished"))
            report.add("V003", place, "there is a plan but no manifest", "lm tokenize (the same command again)")
        else:
            from lmcore.data.adopt import validate_foreign

            validate_foreign(place, level, report, progress)
    return report


def _places(path: Path) -> list[Path]:
    """The path itself, or the sets inside it when it is a folder of sets."""
    if not path.is_dir() or os.path.lexists(path / MANIFEST) or (path / PLAN).exists():
        return [path]
    inside = [
        p for p in sorted(path.iterdir()) if p.is_dir() and (os.path.lexists(p / MANIFEST) or (p / PLAN).exists())
    ]
    return inside or [path]


def repair(report: Report, *, progress: Progress = SILENT) -> list[str]:
    """Make the shards with faults again from their plans; returns what was repaired.

    Raises LmError when a set has no plan (adopted data), or the source is not what it was.
    """
    from lmcore.data.repair import retokenize

    wanted: dict[Path, set[str]] = {}
    for finding in report.findings:
        if finding.repair.startswith("--repair "):
            folder = Path(finding.where).parent
            if read_manifest(folder).kind == "view":
                folder = folder.resolve().parent  # a view's shards are those of its set
            wanted.setdefault(folder, set()).add(finding.repair.removeprefix("--repair "))
    done = []
    for folder, names in sorted(wanted.items()):
        numbers = {entry.name: number for number, entry in enumerate(read_manifest(folder).shards)}
        retokenize(folder, sorted(numbers[name] for name in names), progress=progress)
        done += [str(folder / name) for name in sorted(names)]
    return done


# ---------------------------------------------------------------------------------------- one set or view


def _validate_set(path: Path, level: Level, workers: int, report: Report, progress: Progress) -> None:
    entry = SetReport(path, "set")
    report.sets.append(entry)
    manifest = _check_manifest(path, report)
    if manifest is None:
        return
    entry.kind = manifest.kind
    entry.n_tokens, entry.n_docs, entry.n_bytes = manifest.n_tokens, manifest.n_docs, manifest.n_bytes
    entry.n_shards, entry.dataset_id = len(manifest.shards), manifest.dataset_id
    entry.tokenizer = manifest.tokenizer.name if manifest.tokenizer else ""
    errors = report.errors
    row_keys: npt.NDArray[np.uint64] | None = None
    _check_listing(path, manifest, report)
    _check_segments(path, manifest, report)
    tokenizer = _check_tokenizer(path, manifest, report)
    sound, documents = _check_files(path, manifest, report)
    if level != "quick":
        row_keys = _scan(path, manifest, sound, documents, workers, report, progress)
        _check_equal_shards(path, manifest, report)
    if level != "quick" and report.errors == errors:
        deep = level == "deep"
        entry.statistics = statistics(path, manifest, documents, tokenizer, deep, row_keys, report.add, progress)
    if manifest.kind == "set" and manifest.split is None:
        _check_views(path, manifest, report)
    elif (path.resolve().parent / MANIFEST).is_file():
        _check_siblings(path, report)


def _check_manifest(path: Path, report: Report) -> Manifest | None:
    """The manifest as far as it can be used; what is wrong with it is reported."""
    where = path / MANIFEST
    try:
        return read_manifest(path)
    except LmError as error:
        message = error.message.removeprefix(f"{where}: ")
    try:
        raw = storage.read_json(where)
    except LmError:
        raw = None
    found = raw.get("format") if isinstance(raw, dict) else None
    if isinstance(found, str) and found.startswith("lmshards/") and found != FORMAT:
        report.add("V002", where, message)
        return None
    if isinstance(raw, dict):
        try:
            manifest = Manifest.model_validate(raw)
            if dataset_identity(raw) != manifest.dataset_id:
                report.add("V004", where, message)
                return manifest  # the rest can still be checked
        except (ValueError, KeyError, TypeError):
            pass
    report.add("V001", where, message)
    return None


def _check_listing(path: Path, manifest: Manifest, report: Report) -> None:
    listed = {f"{entry.name}.npy" for entry in manifest.shards}
    listed |= {f"{entry.name}.docs.npy" for entry in manifest.shards}
    for name in sorted(os.listdir(path)):
        if name.startswith((storage.TEMPORARY, storage.DELETED)):
            report.add("V017", path / name, "left by a run that was killed")
        elif name.endswith((".npy", ".bin", ".pt")) and name not in listed:
            report.add("V011", path / name, "not listed in the manifest, never read")
    if manifest.kind != "set" or not (path / JOURNAL).is_file():
        return
    by_name = {entry.name: entry.sha256 for entry in manifest.shards}
    try:
        journal = read_journal(path)
    except LmError as error:
        report.add("V070", path / JOURNAL, error.message.removeprefix(f"{path / JOURNAL}:"))
        return
    for line in journal:
        if by_name.get(line.entry.name, line.entry.sha256) != line.entry.sha256:
            report.add("V070", path / JOURNAL, f"records another sha256 for {line.entry.name} than the manifest")


def _check_segments(path: Path, manifest: Manifest, report: Report) -> None:
    if manifest.kind == "set":
        whole = [(number, 0, entry.n_tokens) for number, entry in enumerate(manifest.shards)]
        if [tuple(s) for s in manifest.segments] != whole:
            report.add("V050", path / MANIFEST, "the segments are not all tokens of all shards in order")
    else:
        table = np.array(sorted(manifest.segments), np.int64).reshape(-1, 3)
        same = table[1:, 0] == table[:-1, 0]
        overlap = np.flatnonzero(same & (table[1:, 1] < table[:-1, 2]))
        for k in overlap.tolist():
            name = manifest.shards[int(table[k, 0])].name
            report.add("V052", path / MANIFEST, f"{name}: tokens from {table[k + 1, 1]:,} on are in two segments")


def _check_tokenizer(path: Path, manifest: Manifest, report: Report) -> Any:
    """The tokenizer beside the set, or None when there is none or it is not the right one."""
    entry = manifest.tokenizer
    if entry is None:
        return None
    from lmcore.data.tokenizer import Tokenizer

    file = path / TOKENIZER
    if not file.exists() and manifest.kind == "view":
        file = path.resolve().parent / TOKENIZER
    if not file.is_file():
        report.add("V040", path / TOKENIZER, "missing (or a link that leads nowhere)")
        return None
    try:
        tokenizer = Tokenizer.from_file(file)
    except LmError as error:
        report.add("V041", file, error.message.removeprefix(f"{file}: "))
        return None
    if tokenizer.sha256 != entry.sha256:
        report.add("V041", file, f"sha256 {tokenizer.sha256[:16]}..., the manifest names {entry.sha256[:16]}...")
        return None
    if tokenizer.vocab_size != entry.vocab_size or not 0 <= entry.eos_id < entry.vocab_size:
        report.add(
            "V042",
            path / MANIFEST,
            f"vocab_size {entry.vocab_size:,}, eos_id {entry.eos_id:,}; tokenizer.json has {tokenizer.vocab_size:,} "
            f"ids",
        )
    return tokenizer


# ---------------------------------------------------------------------------------------- files


def _check_files(path: Path, manifest: Manifest, report: Report) -> tuple[list[int], dict[int, Documents]]:
    """Check presence, size and header of shards and read document indexes: (sound shards, their indexes)."""
    sound: list[int] = []
    documents: dict[int, Documents] = {}
    view = manifest.kind == "view"
    vocab = manifest.tokenizer.vocab_size if manifest.tokenizer else 1 << 32
    dtype = np.dtype("<u2" if manifest.dtype == "uint16" else "<u4")
    directory = shards.open_directory(path)
    try:
        for number, entry in enumerate(manifest.shards):
            if entry.max_id >= vocab:
                report.add("V020", path / f"{entry.name}.npy", f"id {entry.max_id:,}, the vocabulary has {vocab:,}")
            implied = HEADER_BYTES + entry.rows * manifest.seq_len * dtype.itemsize
            if entry.bytes != implied:
                report.add(
                    "V012",
                    path / MANIFEST,
                    f"{entry.name}: listed with {entry.bytes:,} bytes; its rows make {implied:,}",
                )
                continue
            file = _open(directory, path, f"{entry.name}.npy", entry.bytes, view, report, "V010", "V012", "V016")
            if file is not None:
                try:
                    file.require_header(npy_header(dtype, (entry.rows, manifest.seq_len)))
                except LmError as error:
                    report.add("V013", path / f"{entry.name}.npy", error.message.partition(": ")[2], _repair(entry))
                else:
                    sound.append(number)
            if entry.docs_sha256 is not None:
                found = _read_index(directory, path, entry, view, report)
                if found is not None:
                    documents[number] = found
    finally:
        os.close(directory)
    _check_indexes(path, manifest, documents, report)
    return sound, documents


def _open(
    directory: int,
    path: Path,
    name: str,
    size: int | None,
    view: bool,
    report: Report,
    missing: str,
    wrong: str,
    odd: str,
) -> ShardFile | None:
    try:
        file = ShardFile(directory, name, None, parent=view)
    except LmError as error:
        message = error.message.removeprefix(f"{name}: ")
        gone = message.endswith(("is missing.", "leads nowhere."))
        report.add(missing if gone else odd, path / name, message, _repair_name(name))
        return None
    if size is not None and file.size != size:
        report.add(wrong, path / name, f"{file.size:,} bytes, the manifest says {size:,}", _repair_name(name))
        return None
    return file


def _read_index(directory: int, path: Path, entry: ShardEntry, view: bool, report: Report) -> Documents | None:
    name = f"{entry.name}.docs.npy"
    header = npy_header(DOCUMENT, (entry.docs_records,))
    size = len(header) + entry.docs_records * DOCUMENT.itemsize
    if _open(directory, path, name, size, view, report, "V030", "V031", "V016") is None:
        return None
    try:
        return shards.read_documents(directory, entry, parent=view)
    except LmError as error:
        report.add("V031", path / name, error.message.partition(": ")[2], _repair(entry))
        return None


def _check_indexes(path: Path, manifest: Manifest, documents: dict[int, Documents], report: Report) -> None:
    """Each index by itself, and a document that runs from shard to shard."""
    is_set = manifest.kind == "set"
    n_docs = n_bytes = 0
    before: tuple[int, Documents, int] | None = None  # number, index, tokens of its last document so far
    for number, index in sorted(documents.items()):
        entry = manifest.shards[number]
        where = path / f"{entry.name}.docs.npy"
        starts = index["start"].astype(np.int64)
        if not len(index) or starts[0] != 0 or np.any(np.diff(starts) <= 0) or starts[-1] >= entry.n_tokens:
            report.add("V033", where, f"starts must rise strictly from 0 to below {entry.n_tokens:,}")
            documents.pop(number)
            before = None
            continue
        begins = first_pieces(index, entry)
        if int(begins.sum()) != entry.n_docs:
            report.add("V033", where, f"{int(begins.sum()):,} documents start here, the manifest says {entry.n_docs:,}")
        n_docs += int(begins.sum())
        n_bytes += int(index["bytes"].astype(np.int64).sum())
        if entry.first_doc_offset and index["bytes"][0] != 0:
            report.add("V033", where, "a continued document must count no bytes again")
        follows = before is not None and before[0] == number - 1 and is_set
        if is_set and number == 0 and entry.first_doc_offset:
            report.add("V033", where, "the first shard cannot continue a document")
        if follows and before is not None and entry.first_doc_offset:
            last = before[1][-1]
            if any(last[c] != index[0][c] for c in ("unit", "row", "hash")) or before[2] != entry.first_doc_offset:
                report.add("V033", where, "continues another document than the one that the shard before ends with")
        length = entry.n_tokens - int(starts[-1])
        if len(index) == 1:
            length += entry.first_doc_offset
        before = (number, index, length)
    if is_set and len(documents) == len(manifest.shards):
        for name, found, said in (("n_docs", n_docs, manifest.n_docs), ("n_bytes", n_bytes, manifest.n_bytes)):
            if found != said:
                report.add("V051", path / MANIFEST, f"{name} is {said:,}, the shards add up to {found:,}")


def _repair(entry: ShardEntry) -> str:
    return f"--repair {entry.name}"


def _repair_name(name: str) -> str:
    return f"--repair {name.removesuffix('.npy').removesuffix('.docs')}"


# ---------------------------------------------------------------------------------------- the pass over the bytes


@dataclass
class Scan:
    """What one pass over a shard found."""

    sha256: str = ""
    max_id: int = 0
    first_bad_eos: int = -1
    """Position of the first EOS that is no document end, or document end without EOS; -1 when there is none."""
    bad_pad: int = -1
    wrong_eos: int = 0
    row_keys: list[npt.NDArray[np.uint64]] = field(default_factory=list)
    """A key of the first 32 tokens of every 512, for finding equal rows."""


def scan_shard(
    file: ShardFile,
    dtype: np.dtype[Any],
    n_tokens: int,
    eos_id: int | None,
    ends: npt.NDArray[np.int64] | None,
    free_end: bool,
    keep_rows: bool,
) -> Scan:
    """Hash a shard and examine its tokens in one pass.

    ends: positions that must hold EOS, ascending, and no other may; None when there is no index. free_end: the last
    true token may or may not be EOS (the shard that follows is not known).
    """
    scan = Scan()
    digest = hashlib.sha256()
    buffer = np.empty(_CHUNK, np.uint8)
    view = memoryview(buffer.data)
    tokens = buffer.view(dtype)
    head = os.pread(file.descriptor, HEADER_BYTES, 0)
    digest.update(head)
    offset, base, size = HEADER_BYTES, 0, dtype.itemsize
    largest = 0
    hits = np.empty(len(tokens), np.bool_)
    if hasattr(os, "posix_fadvise"):  # the kernel reads ahead while this thread hashes
        os.posix_fadvise(file.descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)
    while count := os.preadv(file.descriptor, [view], offset):
        while count % size and (more := os.preadv(file.descriptor, [view[count:]], offset + count)):
            count += more
        digest.update(view[:count])
        part = tokens[: count // size]
        true = part[: max(0, min(len(part), n_tokens - base))]
        if len(true):
            largest = max(largest, int(true.max()))
        rows = len(true) // ROW
        if keep_rows and rows:
            scan.row_keys.append(_row_keys(true[: rows * ROW].reshape(rows, ROW)))
        if eos_id is not None:
            pad = part[len(true) :]
            if len(pad) and scan.bad_pad < 0 and np.any(pad != eos_id):
                scan.bad_pad = base + len(true) + int(np.flatnonzero(pad != eos_id)[0])
            if ends is not None and len(true):
                _compare_eos(scan, true, base, eos_id, ends, n_tokens - 1 if free_end else -1, hits[: len(true)])
        offset += count
        base += len(part)
    scan.sha256, scan.max_id = digest.hexdigest(), largest
    return scan


def _row_keys(rows: npt.NDArray[Any]) -> npt.NDArray[np.uint64]:
    """A linear hash modulo 2^64 of the first 32 tokens; rows with equal keys are compared later."""
    words = np.ascontiguousarray(rows[:, :32]).view(np.uint64)
    key: npt.NDArray[np.uint64] = words @ _FACTORS[: words.shape[1]]
    return key


_FACTORS = (np.arange(1, 17, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)) | np.uint64(1)


def _compare_eos(
    scan: Scan,
    tokens: npt.NDArray[Any],
    base: int,
    eos_id: int,
    ends: npt.NDArray[np.int64],
    free: int,
    hits: npt.NDArray[np.bool_],
) -> None:
    """hits: scratch space of the length of `tokens`."""
    low, high = np.searchsorted(ends, [base, base + len(tokens)])
    expected = ends[low:high] - base
    np.equal(tokens, eos_id, out=hits)
    if base <= free < base + len(tokens):
        hits[free - base] = False
    present = hits[expected]
    hits[expected] = False
    if bool(present.all()) and not hits.any():  # any() takes half the time of counting
        return
    odd = np.union1d(expected[~present], np.flatnonzero(hits))
    scan.wrong_eos += len(odd)
    if scan.first_bad_eos < 0:
        scan.first_bad_eos = base + int(odd[0])


def _scan(
    path: Path,
    manifest: Manifest,
    sound: list[int],
    documents: dict[int, Documents],
    workers: int,
    report: Report,
    progress: Progress,
) -> npt.NDArray[np.uint64] | None:
    """Read all sound shards; returns the keys of the set's rows while they line up with the stream."""
    dtype = np.dtype("<u2" if manifest.dtype == "uint16" else "<u4")
    row_keys: list[npt.NDArray[np.uint64]] = []
    aligned = manifest.kind == "set" and all(entry.n_tokens % ROW == 0 for entry in manifest.shards[:-1])
    eos = manifest.tokenizer.eos_id if manifest.tokenizer else None
    vocab = manifest.tokenizer.vocab_size if manifest.tokenizer else 1 << 32
    by_hash = {entry.sha256: entry.name for entry in manifest.shards}
    total = sum(manifest.shards[number].bytes for number in sound)
    progress.start(f"reading {path.name or path}", total, "bytes")
    directory = shards.open_directory(path)

    def work(number: int) -> tuple[int, Scan]:
        entry = manifest.shards[number]
        file = ShardFile(directory, f"{entry.name}.npy", entry.bytes, parent=manifest.kind == "view")
        ends, free = _document_ends(manifest, number, documents.get(number))
        keep = aligned and number < _MAX_ROW_BYTES // entry.bytes
        scan = scan_shard(file, dtype, entry.n_tokens, eos, ends, free, keep)
        if scan.sha256 == entry.sha256:
            shards.remember(file, entry.sha256)
        return number, scan

    with ThreadPoolExecutor(workers) as pool:
        for number, scan in pool.map(work, sound):
            entry = manifest.shards[number]
            where = path / f"{entry.name}.npy"
            progress.advance(entry.bytes)
            report.scanned_bytes += entry.bytes
            row_keys += scan.row_keys
            if scan.sha256 != entry.sha256:
                other = by_hash.get(scan.sha256)
                if other is not None and other != entry.name:
                    report.add("V015", where, f"has the content of {other}")
                    continue
                report.add("V014", where, "sha256 differs from the manifest", _repair(entry))
            if scan.max_id >= vocab:
                report.add("V020", where, f"id {scan.max_id:,}, the vocabulary has {vocab:,}", _repair(entry))
            if scan.sha256 == entry.sha256 and scan.max_id != entry.max_id:
                report.add("V021", path / MANIFEST, f"{entry.name}: max_id {entry.max_id:,}, found {scan.max_id:,}")
            if scan.bad_pad >= 0:
                report.add("V022", where, f"the pad at token {scan.bad_pad:,} is not EOS ({eos})", _repair(entry))
            if scan.wrong_eos:
                report.add(
                    "V023",
                    where,
                    f"{scan.wrong_eos:,} EOS and document ends disagree, the first at token {scan.first_bad_eos:,}",
                    _repair(entry),
                )
    os.close(directory)
    progress.finish()
    if not aligned or len(sound) < len(manifest.shards):
        return None
    return np.concatenate(row_keys) if row_keys else np.empty(0, np.uint64)


def _document_ends(
    manifest: Manifest, number: int, index: Documents | None
) -> tuple[npt.NDArray[np.int64] | None, bool]:
    """(positions in the shard that must hold EOS, whether the last token is free because the next shard is unknown)."""
    if index is None or (manifest.split is not None and manifest.split.get("by") == "rows"):
        return None, False  # a cut by rows ends documents where it pleases
    entry = manifest.shards[number]
    ends = piece_ends(index, entry) - 1
    if manifest.kind == "view":
        return ends[:-1], True
    if number + 1 == len(manifest.shards) and manifest.source.get("open_end"):
        return ends[:-1], True  # adopted data may lack the last EOS
    runs_on = number + 1 < len(manifest.shards) and manifest.shards[number + 1].first_doc_offset > 0
    return (ends[:-1] if runs_on else ends), False


def _check_equal_shards(path: Path, manifest: Manifest, report: Report) -> None:
    first: dict[str, str] = {}
    for entry in manifest.shards:
        other = first.setdefault(entry.sha256, entry.name)
        if other != entry.name:
            report.add("V101", path / f"{entry.name}.npy", f"holds the same bytes as {other}")


# ---------------------------------------------------------------------------------------- views


def _views(path: Path, parent: Manifest, report: Report | None) -> list[tuple[Path, Manifest]]:
    """The views inside a set. With a report, what is wrong with each of them is added to it."""
    result = []
    for folder in sorted(path.iterdir()):
        if not folder.is_dir() or folder.is_symlink() or not os.path.lexists(folder / MANIFEST):
            continue
        if folder.name.startswith((storage.TEMPORARY, storage.DELETED)):
            continue
        if report is not None:
            found = _check_manifest(folder, report)
        else:
            try:
                found = read_manifest(folder)
            except LmError:
                found = None
        if found is None or found.split is None:
            continue
        result.append((folder, found))
        if report is not None and found.split.get("parent") != parent.dataset_id:
            report.add("V063", folder, "made from another state of the set", f"lm split {quoted(path)} --replace")
        if report is not None and found.kind == "view":
            _check_view_files(folder, found, parent, report)
    return result


def _check_view_files(folder: Path, view: Manifest, parent: Manifest, report: Report) -> None:
    """Links that lead to the set's own files were checked with them; anything else is checked here."""
    again = split_command(folder.parent, parent, view.split or {})
    _check_segments(folder, view, report)
    here, above = shards.open_directory(folder), shards.open_directory(folder.parent)
    try:
        for entry in view.shards:
            for name, sha256 in ((f"{entry.name}.npy", entry.sha256), (f"{entry.name}.docs.npy", entry.docs_sha256)):
                if sha256 is None:
                    continue
                try:
                    of_set: ShardFile | None = ShardFile(above, name, None)
                except LmError:
                    of_set = None
                try:
                    file = ShardFile(here, name, None, parent=True)
                except LmError as error:
                    message = error.message.partition(": ")[2]
                    gone = message.endswith(("is missing.", "leads nowhere."))
                    if of_set is not None:
                        report.add("V010" if gone else "V016", folder / name, message, again)
                    continue
                if of_set is not None and of_set.key == file.key:
                    continue
                try:
                    file.verify(sha256)
                except LmError:
                    report.add(
                        "V014",
                        folder / name,
                        "leads to other content than listed",
                        f"lm split {quoted(folder.parent)} --replace",
                    )
    finally:
        os.close(here)
        os.close(above)


def _check_views(path: Path, parent: Manifest, report: Report) -> None:
    """Disjoint in tokens and documents, complete, and of this set."""
    views = [(f, v) for f, v in _views(path, parent, report) if v.split and v.split.get("parent") == parent.dataset_id]
    _check_disjoint(path, parent, views, report)


def _check_siblings(path: Path, report: Report) -> None:
    """A view by itself: does it share anything with the other views of its set?"""
    above = path.resolve().parent
    try:
        parent = read_manifest(above)
    except LmError:
        return
    views = [(f, v) for f, v in _views(above, parent, None) if v.split and v.split.get("parent") == parent.dataset_id]
    if any(folder == path.resolve() for folder, _ in views):
        _check_disjoint(above, parent, views, report)


def _check_disjoint(path: Path, parent: Manifest, views: list[tuple[Path, Manifest]], report: Report) -> None:
    if not views:
        return
    again = f"lm split {quoted(path)} --replace"
    number_of = {entry.sha256: number for number, entry in reversed([*enumerate(parent.shards)])}
    rows: list[tuple[int, int, int, int]] = []
    linked = [(k, folder, view) for k, (folder, view) in enumerate(views) if view.kind == "view"]
    by_name = {entry.name: number for number, entry in enumerate(parent.shards)}
    for k, _, view in linked:
        for shard, start, stop in view.segments:
            entry = view.shards[shard]
            number = by_name.get(entry.name)
            if number is None or parent.shards[number].sha256 != entry.sha256:
                number = number_of.get(entry.sha256)
            if number is None:
                report.add("V063", views[k][0], f"{entry.name} is not a shard of {path}", again)
                break
            rows.append((number, start, stop, k))
    table = np.array(sorted(rows), np.int64).reshape(-1, 4)
    clash = (table[1:, 0] == table[:-1, 0]) & (table[1:, 1] < table[:-1, 2]) & (table[1:, 3] != table[:-1, 3])
    for k in np.flatnonzero(clash).tolist():
        a, b = views[int(table[k, 3])][0].name, views[int(table[k + 1, 3])][0].name
        name = parent.shards[int(table[k, 0])].name
        report.add(
            "V060",
            path,
            f"{a} and {b} both hold tokens of {name} from {table[k + 1, 1]:,} on",
            f"lm split {quoted(path)} --replace",
        )
    covered = int((table[:, 2] - table[:, 1]).sum())
    if len(linked) == len(views) > 1 and not clash.any() and covered < parent.n_tokens:
        report.add("V061", path, f"{parent.n_tokens - covered:,} tokens are in no view", again)
    _check_common_documents(path, parent, views, report)


def _check_common_documents(path: Path, parent: Manifest, views: list[tuple[Path, Manifest]], report: Report) -> None:
    sides = []
    for folder, view in views:
        try:
            hashes = document_hashes(folder, view)
        except LmError:
            return  # reported as a damaged index already
        if hashes is None:
            return
        sides.append(hashes)
    cut = any(view.split and view.split.get("by") == "rows" for _, view in views)
    for a in range(len(views)):
        for b in range(a + 1, len(views)):
            common = len(np.intersect1d(sides[a], sides[b], assume_unique=True))
            if common:
                report.add(
                    "V064" if cut else "V062",
                    path,
                    f"{views[a][0].name} and {views[b][0].name} have {common:,} documents in common",
                    f"lm split {quoted(path)} --by document --replace",
                )
