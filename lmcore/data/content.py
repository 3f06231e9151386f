"""What a file is, by its first bytes. Names are only asked where the bytes leave it open (sources.py)."""

from __future__ import annotations

import io
import json
import re
import zlib
from dataclasses import dataclass

import zstandard

from lmcore.data.json_lines import BOM, is_blank, lines_of

HEAD_BYTES = 64 << 10
"""Bytes to look at; of compressed data, both before and after decompression."""
_ZSTD_WINDOW = 1 << 27

TEXT, JSONL, PARQUET, ARROW = "text", "jsonl", "parquet", "arrow"

_COMPRESSED = {b"\x1f\x8b\x08": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}
_CARRIED = {b"PAR1": PARQUET, b"ARROW1\0\0": ARROW}
_FOREIGN = {
    b"%PDF-": "a PDF document",
    b"{\\rtf": "an RTF document",
    b"%!PS": "a PostScript document",
    b"\xd0\xcf\x11\xe0": "an Office document",
    b"PK\x03\x04": "a zip archive (as .docx, .epub, .npz and .pt files are)",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive",
    b"Rar!\x1a": "a rar archive",
    b"\xfd7zXZ\0": "xz data",
    b"\x04\x22\x4d\x18": "lz4 data",
    b"WARC/": "a WARC web archive",
    b"\x93NUMPY": "a NumPy array",
    b"SQLite format 3\0": "an SQLite database",
    b"Obj\x01": "an Avro file",
    b"\x89HDF": "an HDF5 file",
    b"MMIDIDX": "an index of Megatron",
    b"\x89PNG": "an image",
    b"\xff\xd8\xff": "an image",
    b"GIF87a": "an image",
    b"GIF89a": "an image",
    b"\x7fELF": "a program",
    b"version https://git-lfs": "a pointer of Git LFS, not the file itself (git lfs pull fetches it)",
    b"\xff\xfe\0\0": "UTF-32 text",
    b"\0\0\xfe\xff": "UTF-32 text",
    b"\xff\xfe": "UTF-16 text",
    b"\xfe\xff": "UTF-16 text",
}


@dataclass(frozen=True)
class Content:
    """kind: text, jsonl, parquet, arrow, "" for bytes that say nothing, or the name of what is not read here."""

    kind: str
    compression: str = ""
    is_markup: bool = False
    """Text that is mostly not prose: HTML, XML, a table."""
    keys: tuple[str, ...] = ()
    """Of JSON lines: the keys of the first object."""

    @property
    def is_carried(self) -> bool:
        return self.kind in (TEXT, JSONL, PARQUET, ARROW)


def content_of(head: bytes, *, whole: bool, column: str = "text") -> Content:
    """Recognise the first bytes of a file. whole: they are all of it. column: where its text would be, which tells a
    table from prose."""
    compression = next((name for magic, name in _COMPRESSED.items() if head.startswith(magic)), "")
    if compression:
        inner = _decompress(head, compression)
        whole, head = False, inner
        if any(head.startswith(magic) for magic in _COMPRESSED):
            return Content("data that is compressed twice", compression)
    for magic, kind in _CARRIED.items():
        if head.startswith(magic):
            return Content(kind, compression)
    if _is_arrow_stream(head):
        return Content(ARROW, compression)
    for magic, kind in _FOREIGN.items():
        if head.startswith(magic):
            return Content(kind, compression)
    if head[257:262] == b"ustar":
        return Content("a tar archive", compression)
    if head.startswith(b"BZh") and head[4:10] == b"1AY&SY":
        return Content("bzip2 data", compression)
    if head.count(b"\0") * 4 > len(head) and len(head) >= 8:
        even, odd = (half.count(b"\0") / len(half) for half in (head[0::2], head[1::2]))
        if max(even, odd) > 0.7 and min(even, odd) < 0.1:
            return Content("UTF-16 text without a byte-order mark", compression)
    if not _is_utf8(head, whole):
        return Content("", compression)
    return _text_content(head.replace(BOM, b""), whole, compression, column)


def _decompress(head: bytes, compression: str) -> bytes:
    """What the first bytes of compressed data begin with; as much as there is when they are broken."""
    try:
        if compression == "gzip":
            return zlib.decompressobj(wbits=31).decompress(head, HEAD_BYTES)
        reader = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW).stream_reader(io.BytesIO(head))
        parts: list[bytes] = []
        try:
            while sum(map(len, parts)) < HEAD_BYTES and (part := reader.read(4096)):
                parts.append(part)
        except zstandard.ZstdError:
            pass
        return b"".join(parts)
    except (zlib.error, zstandard.ZstdError, MemoryError):
        return b""


def _is_arrow_stream(head: bytes) -> bool:
    """A continuation mark, then the length of a message whose table starts inside of it."""
    if not head.startswith(b"\xff\xff\xff\xff") or len(head) < 12:
        return False
    length, root = int.from_bytes(head[4:8], "little"), int.from_bytes(head[8:12], "little")
    return 0 < root < length < 1 << 28


def _is_utf8(head: bytes, whole: bool) -> bool:
    try:
        head.decode()
        return True
    except UnicodeDecodeError as error:
        return not whole and error.start >= len(head) - 3


def _text_content(head: bytes, whole: bool, compression: str, column: str) -> Content:
    text = head.lstrip()
    lowered = text[:64].lower()
    if lowered.startswith((b"<!doctype html", b"<html")):
        return Content("an HTML page", compression, is_markup=True)
    if lowered.startswith(b"<?xml"):
        return Content("an XML document", compression, is_markup=True)
    if text[:1] in (b"{", b"[", b'"'):
        return _json_content(text, whole, compression)
    first = text.split(b"\n", 1)[0]
    for mark, name in ((b",", "a table of comma-separated values"), (b"\t", "a table of tab-separated values")):
        fields = [field.strip().strip(b'"') for field in first.split(mark)]
        if len(fields) > 1 and column.encode() in fields:
            return Content(name, compression, is_markup=True)
    return Content(TEXT, compression)


_OPEN_OBJECT = re.compile(rb'\{\s*"')


def _json_content(text: bytes, whole: bool, compression: str) -> Content:
    """Text that begins like JSON. Lines of objects, lists or texts are JSON lines, also when some of them are broken:
    it is for the reader to name the broken one."""
    lines = lines_of(text)
    if not whole and len(lines) > 1 and not text.endswith(b"\n"):
        lines = lines[:-1]  # cut by the end of the head
    lines = [line for line in lines if not is_blank(line)]
    decoder = json.JSONDecoder()
    found: list[object] = []
    for line in lines[:200]:
        shown = line.decode("utf-8", "replace").strip()
        try:
            found.append(decoder.raw_decode(shown)[0])
        except (ValueError, RecursionError):
            found.append(None)
    objects = [value for value in found if isinstance(value, dict)]
    lists = sum(isinstance(value, list) for value in found)
    if re.match(rb'\[\s*\{\s*"', text) and not 1 < lists == len(found):
        return Content("one JSON array", compression, is_markup=True)
    if isinstance(found[0], dict) or 2 * len(objects) >= len(found):
        return Content(JSONL, compression, keys=tuple(objects[0]) if objects else ())
    if all(isinstance(value, dict | list | str) for value in found):
        return Content(JSONL, compression)
    if re.match(rb'\{\s*\n\s*"', text):
        return Content("a JSON object over several lines", compression, is_markup=True)
    if all(_OPEN_OBJECT.match(line.strip()) for line in lines):
        return Content(JSONL, compression)  # a line longer than the head, or objects that are all broken
    return Content(TEXT, compression)
