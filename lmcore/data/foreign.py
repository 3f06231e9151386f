"""Token data of other programs: recognised by content, opened as arrays, checked as far as it can be.

    npy      folder (or file) of NumPy arrays of integers, one or two dimensions
    raw      headerless little-endian ids: nanoGPT's train.bin, and memmaps that only bear the name .npy
    llm.c    256 int32 of header (magic 20240520 for 16-bit ids, 20240801 for 32-bit), then ids
    megatron NAME.bin with NAME.idx: magic MMIDIDX, version 1, dtype code, sequence lengths, byte offsets, document ends
    ds       datatrove: NAME.ds of ids, NAME.ds.index of document ends (u64), NAME.ds.metadata with the size of an id
    table    a column of lists of ids in parquet or Arrow files: a row is a document
    pt       tensors saved by torch, read by a child process under limits: nothing inside the file is run

Whether headerless ids have 2, 4 or 8 bytes is read from the ids of all files together, and only where one reading is
plausible and no other; else it is asked. Pickles and other files beside the ids are named, never opened. Documents
without tokens are none.

Left out: making a shard set of it (adopt.py); how .pt files are read (tensor_file.py).
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lmcore.data.content import ARROW, PARQUET, content_of
from lmcore.data.findings import Finding
from lmcore.data.sources import format_of_name
from lmcore.data.tensor_file import Refused, TensorIds, find_ids, new_copy
from lmcore.errors import Exit, LmError, from_os_error, quoted

LLMC_HEADER = 256 * 4
_LLMC_WIDTH = {20240520: 2, 20240801: 4}
_MEGATRON_MAGIC = b"MMIDIDX\x00\x00"
_MEGATRON_DTYPES = {1: "|u1", 2: "|i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
_NPY_MAGIC = b"\x93NUMPY"
_PICKLED = (
    b"\x95",
    b"\x8a",
    b"\x8c",
    b"}",
    b"]",
    b")",
    b"(",
    b"c",
    b"K",
    b"M",
    b"J",
    b"X",
    b"N",
    b"G",
    b"U",
    b"q",
    b".",
)
_TENSORS = (".pt", ".pth")
_TABLES = (".parquet", ".arrow")
_SUFFIXES = (".npy", ".bin", ".ds", *_TABLES, *_TENSORS)
_GROUP = re.compile(r"(?:^|[^a-z])(train|val|valid|validation|test)(?:[^a-z]|$)")


_BLANK = b"\t\n\f\r"
_MAY_BE_IDS = re.compile("UTF-|one JSON|a JSON|an HTML|an XML|a table")  # bytes of ids can be any text


class Unreadable(Exception):
    """A foreign file that cannot be read; `code` is the finding, `widths` the readings to choose from."""

    def __init__(self, code: str, message: str, widths: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.code, self.message, self.widths = code, message, widths


@dataclass
class ForeignFile:
    """One file of ids."""

    path: Path
    kind: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    offset: int = 0
    """Bytes before the first id."""
    lengths: npt.NDArray[np.int64] | None = None
    """Tokens per document, when the format says so; they add up to the number of ids."""
    notes: list[Finding] = field(default_factory=list)
    data: Path | None = None
    """Where the ids are when not in `path` itself."""

    rows: npt.NDArray[np.int64] | None = None
    """Number of each of these documents in the file, where some hold no token and are left out."""
    empty: int = 0
    """Documents of the format that hold no token; they are not in `lengths`."""

    @property
    def n_tokens(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def row_length(self) -> int | None:
        """T of an (N, T) array."""
        return self.shape[1] if len(self.shape) == 2 else None

    def array(self) -> npt.NDArray[Any]:
        """All ids as a flat array, mapped."""
        return np.memmap(self.data or self.path, self.dtype, "r", self.offset, (self.n_tokens,)).view(np.ndarray)

    def blocks(self, size: int = 1 << 22) -> Iterator[npt.NDArray[Any]]:
        array = self.array()
        for start in range(0, len(array), size):
            yield array[start : start + size]


@dataclass
class Foreign:
    """Files that belong together, in the order of their names."""

    path: Path
    files: list[ForeignFile]
    faults: list[Finding]
    """Files that could not be read."""
    remarks: list[str] = field(default_factory=list)
    """What was left out, and how headerless ids were read."""

    @property
    def kinds(self) -> str:
        return ", ".join(sorted({file.kind for file in self.files}))

    @property
    def n_tokens(self) -> int:
        return sum(file.n_tokens for file in self.files)

    def groups(self) -> dict[str, list[ForeignFile]]:
        """Files by what their names say they are for: train, val, test; all under "" when the names say nothing."""
        found: dict[str, list[ForeignFile]] = {}
        for file in self.files:
            match = _GROUP.search(file.path.name.lower())
            name = {"valid": "val", "validation": "val"}.get(match[1], match[1]) if match else ""
            found.setdefault(name, []).append(file)
        if len(found) > 2 and "" in found:
            said = ", ".join(sorted(name for name in found if name))
            stray = found[""][0].path.name
            self.remarks.append(f"files named for {said} become one set, because {stray} is named for none of them")
        return found if len(found) > 1 and "" not in found else {"": self.files}


def recognise(path: Path, width: int | None = None, column: str | None = None) -> Foreign:
    """Look at a file or folder of token data.

    width: bytes per id of headerless files; None looks at the content. column: of tables, the one with the ids; None
    takes the usual name, or the only one. Faults are collected, not raised.
    """
    result = Foreign(path, [], [])
    names = _token_files(path, result.remarks) if path.is_dir() else [path]
    tensors = find_ids([name for name in names if name.suffix in _TENSORS and name.is_file()])
    found: list[ForeignFile] = []
    for name in names:
        try:
            found.append(_open_tensor(name, tensors[name]) if name in tensors else _open(name, column, width))
        except Unreadable as error:
            result.faults.append(_fault(path, name, error))
        except OSError as error:
            raise from_os_error(error, name, "read") from error
    raw = [file for file in found if file.kind == "raw"]
    if raw:
        try:
            _set_width(raw, width, result.remarks)
        except Unreadable as error:
            result.faults.append(_fault(path, raw[0].path, error))
            found = [file for file in found if file.kind != "raw"]
        except OSError as error:
            raise from_os_error(error, raw[0].path, "read") from error
    result.files = [file for file in found if file.n_tokens]
    empty = sum(file.empty for file in found)
    if empty:
        result.remarks.append(f"{empty:,} documents hold no token and are left out")
    if len(result.files) < len(found):
        without = next(file.path.name for file in found if not file.n_tokens)
        result.remarks.append(
            f"{len(found) - len(result.files)} files hold no token and are left out, such as {without}"
        )
        if not result.files and not result.faults:
            result.faults.append(Finding("V205", str(path), "there is not one token"))
    return result


def _fault(asked: Path, file: Path, error: Unreadable) -> Finding:
    if not error.widths:
        return Finding(error.code, str(file), error.message)
    choices = " or ".join(f"--width {width}" for width in error.widths)
    command = f"lm import {quoted(asked)} --out shards/NAME --width {error.widths[0]}"
    return Finding(error.code, str(file), f"{error.message}; say which it is: {choices}", command)


def _token_files(folder: Path, remarks: list[str]) -> list[Path]:
    """The files of a folder that may hold ids, in the order of their names; the others are remarked on."""
    entries = sorted(folder.iterdir(), key=_natural)
    names = [p for p in entries if p.suffix in _SUFFIXES and not p.is_dir()]
    pickles = [p for p in entries if p.suffix in (".pkl", ".pickle")]
    if not names:
        return pickles  # each of them a fault
    if pickles:
        what = "vocabulary" if any(p.name.startswith("meta") for p in pickles) else "content"
        remarks.append(
            f"{', '.join(p.name for p in pickles[:3])}: a pickle is never opened, so the {what} in it is not read"
        )
    companions = {p.with_suffix(".idx") for p in names} | {
        p.with_name(p.name + end) for p in names for end in (".index", ".metadata")
    }
    others = [p for p in entries if p not in {*names, *pickles, *companions} and not p.name.startswith(".")]
    if others:
        more = f" and {len(others) - 5} more" if len(others) > 5 else ""
        remarks.append(f"left out: {', '.join(p.name + '/' * p.is_dir() for p in others[:5])}{more}")
    return names


def _natural(path: Path) -> list[tuple[int, Any]]:
    """part-2 before part-10."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in re.split(r"(\d+)", path.name) if part]


def _open(path: Path, column: str | None, width: int | None) -> ForeignFile:
    if not path.is_file():
        raise Unreadable("V205", "not a regular file")
    with open(path, "rb") as file:
        head = file.read(LLMC_HEADER)
    size = path.stat().st_size
    content = content_of(head, whole=False)
    if content.kind in (PARQUET, ARROW) and not content.compression:
        return _open_table(path, content.kind, column)
    if format_of_name(path.name) is not None:
        raise Unreadable("V200", f"text, not token ids; make tokens of it: lm tokenize {quoted(path)}")
    if path.suffix in (".pkl", ".pickle") or _is_pickle(head):
        raise Unreadable("V206", "a pickle is not opened; save the ids with numpy.save")
    if head.startswith(_NPY_MAGIC):
        return _open_npy(path)
    if len(head) >= 12 and struct.unpack("<i", head[:4])[0] in _LLMC_WIDTH and path.suffix == ".bin":
        return _open_llmc(path, head, size)
    if path.suffix == ".bin" and path.with_suffix(".idx").is_file():
        return _open_megatron(path, size)
    if path.suffix == ".ds":
        return _open_datatrove(path, size)
    if content.compression or (content.kind and not content.is_carried and not _MAY_BE_IDS.match(content.kind)):
        what = f"{content.compression} data" if content.compression else content.kind
        raise Unreadable("V204", f"{what}, not token ids")
    is_text = size >= 8 and not any(byte < 32 and byte not in _BLANK for byte in head)
    if width is None and content.kind and is_text and not content.kind.startswith("UTF-"):
        advice = "" if content.is_markup else f"; make tokens of it: lm tokenize {quoted(path)}"
        raise Unreadable("V200", f"text, not token ids{advice}")
    notes = []
    if path.suffix == ".npy":
        notes.append(Finding("V202", str(path), "no NPY header; read as plain little-endian ids"))
    return ForeignFile(path, "raw", np.dtype("u1"), (_whole(path, size, 1),), notes=notes)


def _is_pickle(head: bytes) -> bool:
    """The mark of protocols 2 to 5 and an opcode that begins one; an id may have the first byte alone."""
    return head[:1] == b"\x80" and head[1:2] in (b"\2", b"\3", b"\4", b"\5") and head[2:3] in _PICKLED


def _whole(path: Path, size: int, width: int) -> int:
    if size == 0:
        raise Unreadable("V205", "the file is empty")
    if size % width:
        raise Unreadable("V205", f"{size:,} bytes are no whole number of {width}-byte ids")
    return size // width


# ---------------------------------------------------------------------------------------- headerless ids

_SAMPLES, _SAMPLE_BYTES, _SAMPLED_FILES = 8, 1 << 17, 16
_EVIDENCE = 64
"""So many ids that could as well lie at another place, and none does: one in 2^64 by chance."""
_FEW = 32  # 65,536 times this is beyond the vocabularies that there are


def _set_width(files: list[ForeignFile], width: int | None, remarks: list[str]) -> None:
    """Give headerless files the dtype of their ids: the width that was named, or the only plausible one."""
    if width is None:
        width = _plausible_width(files)
        remarks.append(f"headerless ids, of {width} bytes each by what they hold (--width says otherwise)")
    for file in files:
        count = _whole(file.path, file.n_tokens, width)
        file.dtype, file.shape = np.dtype(f"<u{width}"), (count,)


def _plausible_width(files: list[ForeignFile]) -> int:
    """Bytes per id of files that were written alike. Raises Unreadable where several readings are plausible or none.

    Ids of 32 bits have an upper half that is zero, or small for vocabularies beyond 65,536; read as 16 bits, every
    second id would be that half, and ids above it would stand at the other places only, which ids of 16 bits do not.
    """
    sizes = [file.n_tokens for file in files]
    if any(size % 2 for size in sizes):
        bad = next(file for file in files if file.n_tokens % 2)
        raise Unreadable("V205", f"{bad.path.name}: {bad.n_tokens:,} bytes are no whole number of 2-byte or wider ids")
    sample = b"".join(_sample(file.path, file.n_tokens) for file in files[:_SAMPLED_FILES])
    halves = np.frombuffer(sample[: len(sample) // 2 * 2], "<u2")
    quads = halves[: len(halves) // 2 * 2]
    low, high = quads[0::2], quads[1::2]
    if any(size % 4 for size in sizes) or int(high.max()) >= _FEW:
        if len(low) and int(low.max()) < _FEW and np.count_nonzero(high > low.max()) >= _EVIDENCE:
            raise _not_clear(sample, "they look like big-endian ids of 4 bytes; save them little-endian", (2,))
        if _looks_swapped(halves):
            raise _not_clear(sample, "they look like big-endian ids of 2 bytes; save them little-endian", (2,))
        if _looks_like_bytes(sample):
            raise _not_clear(sample, "their bytes look like ids of one byte each", (1, 2))
        return 2
    above = int(np.count_nonzero(low > high.max()))
    is_wide = not high.any() or (float((high == 0).mean()) > 0.5 and int(low.max()) >= 1 << 14)
    if above < _EVIDENCE or not is_wide:
        raise _not_clear(sample, "two readings are plausible", (2, 4))
    if all(size % 8 == 0 for size in sizes):
        words = np.frombuffer(sample[: len(sample) // 8 * 8], "<u4")
        if not words[1::2].any():
            if np.count_nonzero(words[0::2]) < _EVIDENCE:
                raise _not_clear(sample, "two readings are plausible", (4, 8))
            return 8
    return 4


def _sample(path: Path, size: int) -> bytes:
    """Some stretches of a file, or all of a small one; each begins where an id of any width may begin."""
    if size <= _SAMPLES * _SAMPLE_BYTES:
        return path.read_bytes()[: size // 2 * 2]
    with open(path, "rb") as file:
        parts = []
        for k in range(_SAMPLES):
            file.seek((size - _SAMPLE_BYTES) * k // (_SAMPLES - 1) // 8 * 8)
            parts.append(file.read(_SAMPLE_BYTES))
    return b"".join(parts)


def _looks_swapped(ids: npt.NDArray[np.uint16]) -> bool:
    """Frequent ids are small in every vocabulary: ids of up to 255 have an empty upper byte, swapped an empty lower
    one."""
    ids = ids[ids != 0]
    if len(ids) < _EVIDENCE:
        return False
    lower, upper = float(((ids & 255) == 0).mean()), float((ids < 256).mean())
    return lower > 0.1 and lower > 4 * upper


def _looks_like_bytes(sample: bytes) -> bool:
    """Whether the bytes at even and at odd places are distributed alike, as ids of two bytes are not."""
    raw = np.frombuffer(sample, np.uint8)
    if len(raw) < 2048:
        return False
    even, odd = (np.bincount(part, minlength=256) / len(part) for part in (raw[0::2], raw[1::2]))
    both = (even + odd) / 2
    entropy = float(-(both[both > 0] * np.log2(both[both > 0])).sum())
    return float(np.abs(even - odd).sum()) < 0.1 and entropy < 7.5


def _not_clear(sample: bytes, why: str, widths: tuple[int, ...]) -> Unreadable:
    said = []
    for width in widths:
        ids = np.frombuffer(sample[: len(sample) // width * width], f"<u{width}")
        said.append(f"{len(ids):,} ids of {width} bytes up to {int(ids.max()):,}")
    return Unreadable("V207", f"{why} ({', or '.join(said)})", widths)


# ---------------------------------------------------------------------------------------- files with a header


def _open_npy(path: Path) -> ForeignFile:
    try:
        with open(path, "rb") as file:
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, fortran, dtype = read(file)
            offset = file.tell()
    except OSError:
        raise
    except Exception as error:  # whatever NumPy's parser meets in a damaged header, its warnings included
        said = " ".join(str(error).split())[:160]
        raise Unreadable("V205", f"the NPY header cannot be read ({said})") from None
    if dtype.hasobject:
        raise Unreadable("V206", "an array of Python objects is a pickle and is not opened")
    if dtype.kind not in "ui" or dtype.itemsize > 8:
        raise Unreadable("V204", f"holds {dtype}, not integers")
    if dtype.byteorder == ">":
        raise Unreadable("V204", f"big-endian {dtype}; save it little-endian")
    if fortran and len(shape) > 1:
        raise Unreadable("V204", "the array is in Fortran order; save it in C order")
    if len(shape) not in (1, 2) or any(n < 1 for n in shape):
        raise Unreadable("V204", f"the shape {shape} is neither (N,) nor (N, T)")
    expected = offset + int(np.prod(shape, dtype=object)) * dtype.itemsize
    if path.stat().st_size != expected:
        raise Unreadable("V205", f"{path.stat().st_size:,} bytes; the header says {expected:,}")
    return ForeignFile(path, "npy", dtype, tuple(int(n) for n in shape), offset)


def _open_llmc(path: Path, head: bytes, size: int) -> ForeignFile:
    magic, version, count = struct.unpack("<3i", head[:12])
    width = _LLMC_WIDTH[magic]
    if len(head) < LLMC_HEADER or count < 1 or size != LLMC_HEADER + count * width:
        raise Unreadable("V205", f"{size:,} bytes; the header (version {version}) says {count:,} ids of {width} bytes")
    return ForeignFile(path, "llm.c", np.dtype(f"<u{width}"), (count,), LLMC_HEADER)


def _open_megatron(path: Path, size: int) -> ForeignFile:
    raw = path.with_suffix(".idx").read_bytes()
    if not raw.startswith(_MEGATRON_MAGIC) or len(raw) < 34:
        raise Unreadable("V205", "the .idx beside it does not start with MMIDIDX")
    version, code, sequences, documents = struct.unpack("<QBQQ", raw[9:34])
    if version != 1 or code not in _MEGATRON_DTYPES:
        raise Unreadable(
            "V205", f"the .idx has version {version} and dtype code {code}; known are version 1 and integers"
        )
    if len(raw) < 34 + 12 * sequences + 8 * documents:
        raise Unreadable("V205", f"the .idx is too short for {sequences:,} sequences and {documents:,} documents")
    dtype = np.dtype(_MEGATRON_DTYPES[code])
    borders = [34, 34 + 4 * sequences, 34 + 12 * sequences, 34 + 12 * sequences + 8 * documents]
    sizes, pointers, ends = (
        np.frombuffer(raw[begin:end], kind).astype(np.int64)
        for begin, end, kind in zip(borders, borders[1:], ("<i4", "<i8", "<i8"), strict=False)
    )
    expected = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)])
    if np.any(sizes < 0) or not np.array_equal(pointers, expected[:-1] * dtype.itemsize):
        raise Unreadable("V205", "the sequences of the .idx do not follow each other without gaps")
    if size != expected[-1] * dtype.itemsize:
        raise Unreadable("V205", f"{size:,} bytes; the .idx says {expected[-1] * dtype.itemsize:,}")
    if not len(ends) or ends[0] != 0 or ends[-1] != sequences or np.any(np.diff(ends) < 0):
        raise Unreadable("V205", "the document borders of the .idx are not ascending from 0 to the last sequence")
    return _documents(ForeignFile(path, "megatron", dtype, (int(expected[-1]),)), expected[ends])


def _documents(file: ForeignFile, borders: npt.NDArray[np.int64]) -> ForeignFile:
    """A file with the documents between borders that do not descend; those without a token are counted apart."""
    lengths = np.diff(borders)
    file.rows = np.flatnonzero(lengths)
    file.lengths, file.empty = lengths[file.rows], len(lengths) - len(file.rows)
    return file


def _open_datatrove(path: Path, size: int) -> ForeignFile:
    metadata, index = path.with_name(path.name + ".metadata"), path.with_name(path.name + ".index")
    ends = np.fromfile(index, "<u8") if index.is_file() else None
    if ends is not None and index.stat().st_size % 8:
        raise Unreadable("V205", f"{index.name} is no whole number of document ends")
    has_documents = ends is not None and len(ends) > 0
    if metadata.is_file():
        with open(metadata, "rb") as file:
            text = file.readline(4096).decode("utf-8", "replace").rpartition("|")[2].strip()
        if text not in ("1", "2", "4", "8"):
            raise Unreadable("V205", f"{metadata.name} does not say the size of an id ({text!r:.40})")
        width = int(text)
    elif (
        ends is not None
        and has_documents
        and ends[-1]
        and size % int(ends[-1]) == 0
        and size // int(ends[-1]) in (1, 2, 4, 8)
    ):
        width = size // int(ends[-1])
    else:
        width = _plausible_width([ForeignFile(path, "ds", np.dtype("u1"), (_whole(path, size, 1),))])
    count = _whole(path, size, width) if size or ends is None else 0  # files of nothing agree
    file_ = ForeignFile(path, "ds", np.dtype(f"<u{width}"), (count,))
    if ends is None:
        return file_
    if int(ends[-1] if has_documents else 0) != count or np.any(ends[1:] < ends[:-1]):
        raise Unreadable("V205", f"the document ends of {index.name} do not rise to the {count:,} ids of the file")
    return _documents(file_, np.concatenate([np.zeros(1, np.int64), ends.astype(np.int64)]))


# ---------------------------------------------------------------------------------------- tables

_USUAL_COLUMNS = ("input_ids", "tokens", "token_ids", "ids")


def _open_table(path: Path, kind: str, column: str | None) -> ForeignFile:
    """A column of lists of ids, written out flat beside the temporary copies of tensors; a null row holds no token."""
    import pyarrow as pa
    import pyarrow.compute as pc

    from lmcore.data import columns, readers
    from lmcore.data.sources import Reading, local_unit

    unit = local_unit(path, Reading("parquet" if kind == PARQUET else "arrow"))
    try:
        schema = readers.schema_of(unit)
        lists = [name for name, found in columns.walk(schema) if columns.holds_ids(found)]
        usual = [name for name in _USUAL_COLUMNS if name in lists] or lists[: len(lists) == 1]
        name = column or (usual[0] if usual else None)
        if name is None:
            said = f"several columns of ids ({', '.join(lists)}); name one: --column {lists[0]}" if lists else ""
            text = f"text, not token ids; make tokens of it: lm tokenize {quoted(path)}"
            raise Unreadable("V204" if lists else "V200", said or text)
        if name not in lists:
            found = columns.find(schema, name)
            raise Unreadable(
                "V204", f"the column '{name}' holds {found}, not lists of ids" if found else f"no '{name}'"
            )
        lengths: list[npt.NDArray[np.int64]] = []
        with new_copy() as file:
            for batch in readers.batches_of(unit, name):
                array = columns.values(batch, name)
                counts = pc.fill_null(pc.list_value_length(array), 0)
                ids = array.flatten()
                if pa.types.is_dictionary(ids.type):
                    ids = ids.dictionary_decode()
                if ids.null_count:
                    raise Unreadable("V204", f"the column '{name}' holds lists with nulls in them")
                if len(ids) and (pc.min(ids).as_py() < 0 or pc.max(ids).as_py() >= 1 << 32):
                    raise Unreadable("V204", f"the column '{name}' holds numbers that are no token ids")
                file.write(np.asarray(ids).astype("<u4").tobytes())
                lengths.append(np.asarray(counts).astype(np.int64))
    except LmError as error:
        raise Unreadable("V205", error.message.removeprefix(f"{unit.path}: ").rstrip(".")) from None
    borders = np.concatenate([np.zeros(1, np.int64), np.cumsum(np.concatenate([*lengths, np.zeros(0, np.int64)]))])
    return _documents(ForeignFile(path, kind, np.dtype("<u4"), (int(borders[-1]),), data=Path(file.name)), borders)


def _open_tensor(path: Path, found: TensorIds | Refused) -> ForeignFile:
    if isinstance(found, Refused):
        raise Unreadable(found.code, found.message)
    return ForeignFile(path, "pt", np.dtype(found.dtype), found.shape, found.offset, data=found.path)


def id_range(file: ForeignFile) -> tuple[int, int]:
    """(smallest, largest) id of a file."""
    low, high = 2**63, -(2**63)
    for block in file.blocks():
        low, high = min(low, int(block.min())), max(high, int(block.max()))
    return low, high


def require_readable(foreign: Foreign) -> None:
    """Raise (65) the first fault of what is about to be adopted."""
    if foreign.faults:
        fault = foreign.faults[0]
        more = f" (and {len(foreign.faults) - 1} more)" if len(foreign.faults) > 1 else ""
        hint = fault.repair or f"See: lm validate {quoted(foreign.path)}"
        raise LmError(f"{fault.where}: {fault.message}{more}.", hint=hint, code=Exit.DATA)
    if not foreign.files:
        raise LmError(
            f"{foreign.path}: no token data that is known.",
            hint="Known are .npy, .pt, .bin (nanoGPT, llm.c, Megatron with .idx), .ds, .parquet and .arrow files.",
            code=Exit.DATA,
        )
