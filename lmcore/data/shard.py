"""One shard: a real NPY v1.0 file of tokens, and the index of the documents in it.

    shard-00000.npy        header of exactly 128 bytes, then (rows, seq_len) of '<u2' or '<u4', C order
    shard-00000.docs.npy   1-D structured array of `DOCUMENT`, one record per document piece, sorted by start

Headers are compared byte for byte with the header that the manifest implies, so a hostile header is never parsed. The
tokens of a shard are one flat sequence; rows exist for plain readers only. The last shard of a set is padded with EOS to
a full row, and the pad lies outside every segment of the manifest.

Left out: which shards form a set (manifest.py), reading across shards (stream.py).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

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
