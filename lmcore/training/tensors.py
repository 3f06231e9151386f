"""Tensors on disk: the safetensors format, written and read by ourselves.

    8 bytes        length of the header, little endian
    header         JSON: {name: {"dtype": "F32", "shape": [2, 3], "data_offsets": [start, stop]}}, padded with spaces
    data           raw little-endian tensors, the widest item size first, so that every offset stays aligned

Why not the library's `save_file`: it does not fsync, and our bytes should pass once through the durable writer, which
hashes them on the way. Why not its `load_file`: a memory map of a file that another process truncates kills Python with
SIGBUS, and names, shapes and dtypes should be compared before anything is allocated. Any safetensors reader opens the
files; the tests use the library as oracle.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from lmcore import storage
from lmcore.errors import Exit, LmError, from_os_error

MAX_HEADER_BYTES = 16 << 20
_COPY_BYTES = 64 << 20
_MOST_DIMENSIONS = 16  # their product must not take time of its own

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies in a file, as its header says."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    """Byte offset from the beginning of the file."""
    bytes: int


def tensor_chunks(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> tuple[Iterator[storage.Buffer], int]:
    """(chunks, size in bytes) of a safetensors file, for storage.write_file.

    Tensors on a device are copied to the host one at a time, while the file is written. Order and bytes depend on the
    content only.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name in order:
        tensor = tensors[name]
        if tensor.dtype not in _NAMES:
            raise LmError(
                f"{name} has the type {str(tensor.dtype).removeprefix('torch.')}, which a checkpoint cannot hold.",
                hint="torch.view_as_real turns a complex tensor into a real one.",
            )
        size = tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    head = len(raw).to_bytes(8, "little") + raw

    def chunks() -> Iterator[storage.Buffer]:
        yield head
        for name in order:
            if tensors[name].numel():
                flat = tensors[name].detach().contiguous().reshape(-1).cpu().view(torch.uint8).numpy()
                for start in range(0, flat.nbytes, _COPY_BYTES):
                    yield flat[start : start + _COPY_BYTES].data

    return chunks(), len(head) + offset


def read_header(file: IO[bytes], size: int, path: str) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """(entries, metadata) of a safetensors file of `size` bytes; LmError (65) when the header does not fit the file."""

    def broken(why: str) -> LmError:
        return LmError(f"{path}: not a sound safetensors file ({why}).", code=Exit.DATA)

    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > min(MAX_HEADER_BYTES, size - 8):
        raise broken(f"the header says {length:,} bytes, the file has {size:,}")
    try:
        header = json.loads(file.read(length))
    except (ValueError, RecursionError) as error:
        raise broken("the header is not JSON") from error
    if not isinstance(header, dict):
        raise broken("the header is not an object")
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise broken("its metadata are not texts by name")
    entries: dict[str, TensorEntry] = {}
    for name, item in header.items():
        shown = repr(name[:100])
        try:
            dtype, shape = _DTYPES[item["dtype"]], tuple(item["shape"])
            start, stop = item["data_offsets"]
            numbers = (*shape, start, stop)
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise broken(f"the entry of {shown} is incomplete or of an unknown type") from error
        if len(shape) > _MOST_DIMENSIONS or not all(type(n) is int and 0 <= n < 1 << 48 for n in numbers):
            raise broken(f"the entry of {shown} has an impossible number")
        count = math.prod(shape)
        if stop - start != count * dtype.itemsize or 8 + length + stop > size:
            raise broken(f"the entry of {shown} does not fit its shape or the file")
        entries[name] = TensorEntry(dtype, shape, 8 + length + start, stop - start)
    spans = sorted((e.start, e.start + e.bytes) for e in entries.values() if e.bytes)
    at = 8 + length
    for start, stop in spans:
        if start != at:
            raise broken("the tensors overlap or leave holes")
        at = stop
    if at != size:
        raise broken(f"{size - at:,} bytes belong to no tensor")
    return entries, metadata


def read_tensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """All tensors of a safetensors file, on the CPU. Raises LmError (65) for a broken file; links are not followed."""
    try:
        with open_plain(path) as file:
            entries, _ = read_header(file, os.fstat(file.fileno()).st_size, os.fspath(path))
            return {name: read_tensor(file, entry, os.fspath(path)) for name, entry in entries.items()}
    except OSError as error:
        raise from_os_error(error, path, "read") from error


def read_tensor(file: IO[bytes], entry: TensorEntry, path: str) -> Tensor:
    """One tensor of an opened file."""
    tensor = torch.empty(entry.shape, dtype=entry.dtype)
    if entry.bytes:
        view = tensor.reshape(-1).view(torch.uint8).numpy().data
        file.seek(entry.start)
        while view:
            count = file.readinto(view)  # type: ignore[attr-defined]
            if not count:
                raise LmError(f"{path}: the file ended early.", code=Exit.DATA)
            view = view[count:]
    return tensor


def open_plain(path: str | os.PathLike[str], *, directory: int | None = None) -> IO[bytes]:
    """Open a regular file for reading without following a link, relative to a directory descriptor if one is given."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise LmError(f"{Path(path)}: not a regular file.", code=Exit.DATA)
        return open(descriptor, "rb", buffering=0)
    except BaseException:
        os.close(descriptor)
        raise
