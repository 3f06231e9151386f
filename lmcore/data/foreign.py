"""Token data of other programs: recognised by content, opened as arrays, checked as far as it can be.

    npy      folder (or file) of NumPy arrays of integers, one or two dimensions
    raw      headerless little-endian ids: nanoGPT's train.bin, and memmaps that only bear the name .npy
    llm.c    256 int32 of header (magic 20240520 for 16-bit ids, 20240801 for 32-bit), then ids
    megatron NAME.bin with NAME.idx: magic MMIDIDX, version 1, dtype code, sequence lengths, byte offsets, document ends
    ds       datatrove: NAME.ds of ids, NAME.ds.index of document ends (u64), NAME.ds.metadata with the size of an id
    pt       tensors saved by torch, read by a child process under limits: nothing inside the file is run

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

from lmcore.data.findings import Finding
from lmcore.data.sources import format_of_name
from lmcore.data.tensor_file import Refused, TensorIds, find_ids
from lmcore.errors import Exit, LmError, from_os_error

LLMC_HEADER = 256 * 4
_LLMC_WIDTH = {20240520: 2, 20240801: 4}
_MEGATRON_MAGIC = b"MMIDIDX\x00\x00"
_MEGATRON_DTYPES = {1: "|u1", 2: "|i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
_NPY_MAGIC = b"\x93NUMPY"
_TENSORS = (".pt", ".pth")
_SUFFIXES = (".npy", ".bin", ".ds", *_TENSORS)
_GROUP = re.compile(r"(?:^|[^a-z])(train|val|valid|validation|test)(?:[^a-z]|$)")


class Unreadable(Exception):
    """A foreign file that cannot be read; `code` is the finding."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code, self.message = code, message


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
        return found if len(found) > 1 and "" not in found else {"": self.files}


def recognise(path: Path, width: int | None = None) -> Foreign:
    """Look at a file or folder of token data.

    width: bytes per id of headerless files; None looks at the content. Faults are collected, not raised.
    """
    if path.is_dir():
        names = [p for p in sorted(path.iterdir(), key=_natural) if p.suffix in _SUFFIXES or p.suffix == ".pkl"]
    else:
        names = [path]
    result = Foreign(path, [], [])
    tensors = find_ids([name for name in names if name.suffix in _TENSORS and name.is_file()])
    for name in names:
        try:
            result.files.append(_open_tensor(name, tensors[name]) if name in tensors else _open(name, width))
        except Unreadable as error:
            result.faults.append(Finding(error.code, str(name), error.message))
        except OSError as error:
            raise from_os_error(error, name, "read") from error
    return result


def _natural(path: Path) -> list[tuple[int, Any]]:
    """part-2 before part-10."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in re.split(r"(\d+)", path.name) if part]


def _open(path: Path, width: int | None) -> ForeignFile:
    if not path.is_file():
        raise Unreadable("V205", "not a regular file")
    with open(path, "rb") as file:
        head = file.read(LLMC_HEADER)
    size = path.stat().st_size
    if format_of_name(path.name) is not None:
        raise Unreadable("V200", f"text, not token ids; make tokens of it: lm tokenize {path}")
    if path.suffix == ".pkl" or head[:1] == b"\x80":
        raise Unreadable("V206", "a pickle is not opened; save the ids with numpy.save")
    if head.startswith(_NPY_MAGIC):
        return _open_npy(path)
    if len(head) >= 12 and struct.unpack("<i", head[:4])[0] in _LLMC_WIDTH and path.suffix == ".bin":
        return _open_llmc(path, head, size)
    if path.suffix == ".bin" and path.with_suffix(".idx").is_file():
        return _open_megatron(path, size)
    if path.suffix == ".ds":
        return _open_datatrove(path, size)
    notes = []
    if path.suffix == ".npy":
        notes.append(Finding("V202", str(path), "no NPY header; read as plain little-endian ids"))
    width = width or _guess_width(path, size)
    return ForeignFile(path, "raw", np.dtype(f"<u{width}"), (_whole(path, size, width),), notes=notes)


def _whole(path: Path, size: int, width: int) -> int:
    if size == 0:
        raise Unreadable("V205", "the file is empty")
    if size % width:
        raise Unreadable("V205", f"{size:,} bytes are no whole number of {width}-byte ids")
    return size // width


def _guess_width(path: Path, size: int) -> int:
    """32-bit ids read as 16 bit have a nearly empty upper half; 16-bit ids read as 32 bit do not."""
    if size % 4:
        return 2
    upper = np.fromfile(path, "<u2", min(size // 2, 1 << 19))[1::2]
    return 4 if upper.size and float((upper < 32).mean()) > 0.99 and float((upper == 0).mean()) > 0.5 else 2


def _open_npy(path: Path) -> ForeignFile:
    try:
        with open(path, "rb") as file:
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, fortran, dtype = read(file)
            offset = file.tell()
    except (ValueError, OSError, EOFError) as error:
        raise Unreadable("V205", f"the NPY header cannot be read ({error})") from None
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
    sizes = np.frombuffer(raw, "<i4", sequences, 34).astype(np.int64)
    pointers = np.frombuffer(raw, "<i8", sequences, 34 + 4 * sequences)
    ends = np.frombuffer(raw, "<i8", documents, 34 + 12 * sequences)
    expected = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)])
    if np.any(sizes < 0) or not np.array_equal(pointers, expected[:-1] * dtype.itemsize):
        raise Unreadable("V205", "the sequences of the .idx do not follow each other without gaps")
    if size != expected[-1] * dtype.itemsize:
        raise Unreadable("V205", f"{size:,} bytes; the .idx says {expected[-1] * dtype.itemsize:,}")
    if not len(ends) or ends[0] != 0 or ends[-1] != sequences or np.any(np.diff(ends) < 0):
        raise Unreadable("V205", "the document borders of the .idx are not ascending from 0 to the last sequence")
    lengths = np.diff(expected[ends])
    return ForeignFile(path, "megatron", dtype, (int(expected[-1]),), lengths=lengths[lengths > 0])


def _open_datatrove(path: Path, size: int) -> ForeignFile:
    metadata, index = path.with_name(path.name + ".metadata"), path.with_name(path.name + ".index")
    width = 2
    if metadata.is_file():
        first = metadata.read_text(encoding="utf-8", errors="replace").split("\n")[0]
        text = first.rpartition("|")[2].strip()
        width = int(text) if text in ("2", "4") else 2
    else:
        width = _guess_width(path, size)
    count = _whole(path, size, width)
    lengths = None
    if index.is_file():
        ends = np.fromfile(index, "<u8").astype(np.int64)
        if not len(ends) or ends[-1] != count or np.any(np.diff(ends) <= 0) or ends[0] <= 0:
            raise Unreadable("V205", f"the document ends of {index.name} do not rise to the {count:,} ids of the file")
        lengths = np.diff(np.concatenate([np.zeros(1, np.int64), ends]))
    return ForeignFile(path, "ds", np.dtype(f"<u{width}"), (count,), lengths=lengths)


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
        raise LmError(f"{fault.where}: {fault.message}{more}.", hint=f"See: lm validate {foreign.path}", code=Exit.DATA)
    if not foreign.files:
        raise LmError(
            f"{foreign.path}: no token data that is known.",
            hint="Known are .npy, .pt, .bin (nanoGPT, llm.c, Megatron with .idx) and .ds files.",
            code=Exit.DATA,
        )
