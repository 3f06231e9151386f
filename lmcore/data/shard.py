"""One shard: a real NPY v1.0 file of tokens, and the index of the documents in it; opening both safely.

    shard-00000.npy        header of exactly 128 bytes, then (rows, seq_len) of '<u2' or '<u4', C order
    shard-00000.docs.npy   1-D structured array of `DOCUMENT`, one record per document piece, sorted by start

Headers are compared byte for byte with the header that the manifest implies, so a hostile header is never parsed. The
tokens of a shard are one flat sequence; rows exist for plain readers only. The last shard of a set is padded with EOS
to a full row, and the pad lies outside every segment of the manifest.

Left out: which shards form a set (manifest.py), reading across shards (stream.py).
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from lmcore.errors import Exit, LmError, from_os_error

if TYPE_CHECKING:
    from lmcore.data.manifest import ShardEntry

Tokens = npt.NDArray[np.uint16] | npt.NDArray[np.uint32]

HEADER_BYTES = 128
MIN_SEQ_LEN, MAX_SEQ_LEN = 2_048, 32_768

DOCUMENT = np.dtype(
    [
        ("start", "<u4"),  # offset in the shard's flat tokens
        ("unit", "<u4"),  # index of the source unit in plan.json
        ("row", "<u4"),  # index of the document inside its unit
        ("hash", "<u8"),  # blake2b-8 of the raw UTF-8 text
        ("bytes", "<u4"),  # UTF-8 bytes of the text; 0 for a piece continued from the shard before
    ]
)
"""A document that runs on from the shard before has a record with start 0, the same unit/row/hash and bytes 0."""


def token_dtype(max_id: int) -> np.dtype[np.uint16] | np.dtype[np.uint32]:
    """'<u2' when every id fits, else '<u4'."""
    return np.dtype("<u2") if max_id < 1 << 16 else np.dtype("<u4")


def npy_header(dtype: np.dtype[np.generic], shape: tuple[int, ...]) -> bytes:
    """The NPY v1.0 header of a C-order array, padded to 128 bytes (longer for the document index's field list)."""
    descr = np.lib.format.dtype_to_descr(dtype)
    text = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape!r}, }}"
    total = -(-(10 + len(text) + 1) // HEADER_BYTES) * HEADER_BYTES
    body = text + " " * (total - 10 - len(text) - 1) + "\n"
    return b"\x93NUMPY\x01\x00" + (total - 10).to_bytes(2, "little") + body.encode("latin1")


def npy_chunks(array: npt.NDArray[np.generic]) -> tuple[list[bytes | memoryview], int]:
    """(chunks, size in bytes) of the NPY file of `array`, for storage.write_file: no copy of the data is made."""
    array = np.ascontiguousarray(array)
    header = npy_header(array.dtype, array.shape)
    if not array.nbytes:
        return [header], len(header)
    return [header, array.reshape(-1).view(np.uint8).data], len(header) + array.nbytes


def shard_name(index: int) -> str:
    """3 -> 'shard-00003'. Names do not carry the total, so that appending renames nothing."""
    return f"shard-{index:05d}"


# ---------------------------------------------------------------------------------------- reading


class ShardFile:
    """A kept read-only descriptor of a listed file, closed when the last reference goes.

    Opened by a plain name relative to a directory descriptor. A link is followed, but only to a regular file of the
    listed size: it is trusted for its content alone (`verify`), wherever it points.
    """

    __slots__ = ("__weakref__", "descriptor", "key", "label", "linked", "size")

    def __init__(self, directory: int, name: str, size: int | None, *, parent: bool = False) -> None:
        """size: the bytes that the manifest promises (None: any). parent: look in the parent directory when absent.

        Raises LmError (65) for whatever is not a regular file of that size.
        """
        self.descriptor = -1
        self.label, self.linked = _describe(directory, name)
        flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC  # non-blocking: opening a FIFO must not hang
        try:
            try:
                self.descriptor = os.open(name, flags, dir_fd=directory)
            except FileNotFoundError:
                if not parent or self.linked:
                    raise
                self.descriptor = os.open(os.path.join(os.pardir, name), flags, dir_fd=directory)
                self.linked = True
            info = os.fstat(self.descriptor)
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                raise  # says nothing about the file
            gone = error.errno == errno.ENOENT
            what = ("the link leads nowhere" if self.linked else "is missing") if gone else f"{error.strerror}"
            raise LmError(f"{self.label}: {what}.", code=Exit.DATA) from None
        if not stat.S_ISREG(info.st_mode):
            raise LmError(f"{self.label}: not a regular file.", code=Exit.DATA)
        if size is not None and info.st_size != size:
            raise LmError(
                f"{self.label}: {info.st_size:,} bytes, the manifest says {size:,}.",
                hint="Find all faults with: lm validate",
                code=Exit.DATA,
            )
        self.size = info.st_size
        # More than (device, inode), so that a reused inode or a rewritten file is hashed again.
        self.key = (info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns)

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        """close: bound here, since at the interpreter's exit the module may be gone first."""
        if getattr(self, "descriptor", -1) >= 0:
            close(self.descriptor)

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill `buffer` from byte `offset`; a short file is an LmError, never a signal."""
        count = os.preadv(self.descriptor, [buffer], offset)
        while count < len(buffer):
            more = os.preadv(self.descriptor, [buffer[count:]], offset + count)
            if more == 0:
                raise LmError(
                    f"{self.label}: ends at byte {offset + count:,}; it was cut while in use.", code=Exit.DATA
                )
            count += more

    def require_header(self, header: bytes) -> None:
        """Compare the first bytes with the header that the manifest implies; a foreign header is never parsed."""
        if os.pread(self.descriptor, len(header), 0) != header:
            raise LmError(f"{self.label}: the NPY header is not what the manifest implies.", code=Exit.DATA)

    def sha256(self, on_chunk: Callable[[memoryview], None] | None = None) -> str:
        """Hash of the whole file through this very descriptor; `on_chunk` sees every chunk of it on the way."""
        digest = hashlib.sha256()
        buffer = memoryview(bytearray(min(_CHUNK, max(self.size, 1))))
        offset = 0
        while count := os.preadv(self.descriptor, [buffer], offset):
            digest.update(buffer[:count])
            if on_chunk is not None:
                on_chunk(buffer[:count])
            offset += count
        return digest.hexdigest()

    def verify(self, sha256: str) -> None:
        """Hash the content once per process and compare; the hash of foreign content is not shown."""
        if _VERIFIED.get(self.key) == sha256:
            return
        if self.sha256() != sha256:
            raise LmError(
                f"{self.label}: the content is not what the manifest lists (sha256 differs).",
                hint="Find all faults with: lm validate",
                code=Exit.DATA,
            )
        _VERIFIED[self.key] = sha256


_CHUNK = 1 << 20
_VERIFIED: dict[tuple[int, ...], str] = {}
"""Files that this process has hashed."""


def remember(file: ShardFile, sha256: str) -> None:
    """Somebody hashed this file already (validate reads every byte anyway)."""
    _VERIFIED[file.key] = sha256


def is_known(file: ShardFile, sha256: str | None = None) -> bool:
    """Whether this process has hashed the file (and found this hash)."""
    known = _VERIFIED.get(file.key)
    return known is not None and sha256 in (None, known)


def read_documents(directory: int, entry: ShardEntry, *, parent: bool = False) -> npt.NDArray[np.void]:
    """The document index of a shard, verified by hash: 1-D array of `DOCUMENT`."""
    if entry.docs_sha256 is None:
        raise LmError(f"{entry.name}: this set has no document index (adopted data).", code=Exit.DATA)
    header = npy_header(DOCUMENT, (entry.docs_records,))
    size = len(header) + entry.docs_records * DOCUMENT.itemsize
    file = ShardFile(directory, f"{entry.name}.docs.npy", size, parent=parent)
    file.require_header(header)
    file.verify(entry.docs_sha256)
    documents = np.empty(entry.docs_records, DOCUMENT)
    if entry.docs_records:
        file.read_into(memoryview(documents.view(np.uint8).data), len(header))
    return documents


def sound_documents(directory: int, entry: ShardEntry, *, parent: bool = False) -> npt.NDArray[np.void]:
    """`read_documents` for whoever builds on it: the records begin at 0, ascend, and stay inside of the tokens."""
    documents = read_documents(directory, entry, parent=parent)
    starts = documents["start"].astype(np.int64)
    inside = len(starts) > 0 and starts[0] == 0 and starts[-1] < entry.n_tokens and bool(np.all(np.diff(starts) > 0))
    if not inside and (len(starts) or entry.n_tokens):
        raise LmError(
            f"{entry.name}.docs.npy: its documents do not ascend from 0 to the {entry.n_tokens:,} tokens of the shard.",
            hint="Find all faults with: lm validate",
            code=Exit.DATA,
        )
    return documents


def open_directory(path: str | os.PathLike[str]) -> int:
    """A descriptor of a directory, for opening listed names relative to it. The caller closes it."""
    try:
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise from_os_error(error, path, "read") from error


def _describe(directory: int, name: str) -> tuple[str, bool]:
    """('shard-00000.npy (a link to ../shard-00000.npy)', True)."""
    try:
        if stat.S_ISLNK(os.lstat(name, dir_fd=directory).st_mode):
            return f"{name} (a link to {os.readlink(name, dir_fd=directory)})", True
    except OSError:
        pass
    return name, False
