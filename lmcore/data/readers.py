"""From units to batches of documents, in plan order, read ahead on threads.

Every unit falls into pieces: the places where reading can start again, and what one thread reads at a time.

    text, python       one piece; small files are read together
    text with marks    about 8 MiB of documents, one after the other; small files are read together, too
    jsonl              the lines that begin in one 8 MiB range of the file
    jsonl.gz, .zst     about 8 MiB of decompressed lines, one after the other (a stream has no middle)
    parquet            a row group
    arrow              a record batch
    rows               4,096 rows

JSONL is parsed by Arrow where it can be (no Python object per line); a block that Arrow refuses, or in which it does
not see one object with a text on every line, is parsed again line by line (json_lines.py), which is also what finds the
line to complain about: both give the same documents. Decompressed sizes are bounded: a bomb is refused by name.
"""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import json
import time
import tokenize
import zlib
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import pyarrow as pa
import pyarrow.json
import pyarrow.parquet as pq
import zstandard

from lmcore.data import columns, json_lines, separators
from lmcore.data.documents import BadRecord, Documents, DocumentsBuilder, Drop, check_size
from lmcore.data.pipeline import read_ahead
from lmcore.data.sources import Reading, Unit, broken_parquet, local_unit, open_unit, shown
from lmcore.data.tokenizer import repair
from lmcore.errors import Exit, LmError, from_os_error

OnBad = Literal["stop", "skip", "repair"]
Task = Callable[[], Iterator[Documents]]

BLOCK_BYTES = 8 << 20  # of JSONL
BATCH_BYTES = 4 << 20  # of text handed on at once
_GROUP_FILES, _GROUP_BYTES = 256, 1 << 20
_ROWS_PER_PIECE = 4096

BOMB_RATIO = 1000
"""A compressed file may grow this much ..."""
_BOMB_FREE_BYTES = 16 << 20  # ... once it has given this many bytes
_ZSTD_WINDOW = 1 << 27

_WHOLE_BYTES = 32 << 20
_LOCAL_THREADS, _REMOTE_THREADS = 2, 16
_RETRY_WAITS_S = (0.5, 1.0, 2.0, 4.0, 8.0)


@dataclass(frozen=True)
class Place:
    """Where reading starts: a unit, a piece of it, and the rows of the unit before that piece."""

    unit: int = 0
    piece: int = 0
    base: int = 0


START = Place()


def read(
    units: Sequence[Unit],
    text_column: str,
    *,
    start: Place = START,
    stop: Place | None = None,
    on_bad: OnBad = "stop",
    threads: int = 2,
) -> Generator[Documents]:
    """Batches of the documents from `start` to before `stop` (default: the end), in order, with rows numbered inside
    their unit. Raises LmError (65) at the record that cannot be read, unless `on_bad` says otherwise."""
    tasks = _tasks(units, text_column, start, stop or Place(len(units)), on_bad, threads)
    threads = reading_threads(units, threads)
    unit, piece, base, records = start.unit, start.piece, start.base, 0
    try:
        for batch in read_ahead(tasks, threads=threads):
            if batch.unit != unit:
                unit, piece, base, records = batch.unit, 0, 0, 0
            if batch.piece != piece:
                piece, base, records = batch.piece, base + records, 0
            records += batch.n_records
            yield batch.moved(base)
    except BadRecord as bad:
        raise _as_error(units, bad, base + records if bad.unit == unit else 0) from None


def check_columns(units: Sequence[Unit], text_column: str) -> None:
    """Refuse (2) parquet and Arrow files without this text column before anything is written. On this machine all files
    are looked at, elsewhere the first."""
    tables = [unit for unit in units if unit.format in ("parquet", "arrow")]
    local = [unit for unit in tables if not unit.is_remote]
    for unit in local or tables[:1]:
        if unit.format == "parquet":
            _check_parquet(unit, parquet_metadata(unit), text_column)
        else:
            for _ in itertools.islice(_arrow_batches(unit, text_column), 1):
                pass


def json_records(path: str | Path) -> Iterator[tuple[int, Any]]:
    """(number of the line, value) of every line of a file of JSON lines, compressed or not. Raises LmError."""
    unit = local_unit(Path(path), Reading(format="jsonl"))
    with open_unit(unit) as file:
        chunks = _decompressed(unit, file) if unit.compression else iter(lambda: file.read(1 << 20), b"")
        try:
            yield from json_lines.records(_line_blocks(unit, chunks))
        except json_lines.BadLine as error:
            raise LmError(f"{shown(path)}:{error}.", code=Exit.DATA) from None
        except OSError as error:
            raise from_os_error(error, shown(path), "read") from error


def read_document(units: Sequence[Unit], text_column: str, unit: int, row: int) -> bytes | None:
    """The text of one record, None when it holds none: provenance for people. Reads from the start of the unit's
    piece where the format allows it, from the start of the unit elsewhere."""
    if not 0 <= unit < len(units):
        raise LmError(f"there is no file number {unit:,} in the plan, which has {len(units):,}.", code=Exit.DATA)
    start, stop = _piece_with(units[unit], unit, row), Place(unit + 1)
    for batch in read(units, text_column, start=start, stop=stop, on_bad="skip"):
        found = np.flatnonzero((batch.units == unit) & (batch.rows == row))
        if len(found):
            return batch.text(int(found[0]))
        if len(batch) and int(batch.rows[-1]) > row and int(batch.units[-1]) == unit:
            return None
    return None


def _piece_with(unit: Unit, number: int, row: int) -> Place:
    if unit.format != "parquet":
        return Place(number)
    metadata = parquet_metadata(unit)
    base = 0
    for group in range(metadata.num_row_groups):
        rows = metadata.row_group(group).num_rows
        if row < base + rows:
            return Place(number, group, base)
        base += rows
    return Place(number)


def _as_error(units: Sequence[Unit], bad: BadRecord, base: int) -> LmError:
    unit = units[bad.unit]
    where = shown(unit.path)
    if unit.format == "jsonl":
        where += f":{base + bad.row + 1}"
    elif unit.format in ("parquet", "arrow", "rows"):
        where += f": row {base + bad.row}"
    elif unit.separators:
        where += f": document {base + bad.row + 1}"
    hint = "Mend it, or count such records and go on: --on-bad-doc skip"
    name = Path(unit.path).name.lower()
    if unit.format == "jsonl" and (name.startswith("stdin.") or not name.endswith((".jsonl", ".ndjson"))):
        hint += ". If it is no JSON: --format text"
    if bad.reason == Drop.BAD_UTF8:
        hint = "Convert it to UTF-8, or go on: --on-bad-doc skip (drop it) or repair (replace the bytes by U+FFFD)"
    return LmError(f"{where}: {bad.message}.", hint=hint, code=Exit.DATA)


# ---------------------------------------------------------------------------------------- tasks


def reading_threads(units: Sequence[Unit], workers: int) -> int:
    """Threads that read ahead: a few for a disk, more for a network, whose delays they hide."""
    if any(unit.is_remote for unit in units):
        return max(_REMOTE_THREADS, workers)
    return max(1, min(workers, _LOCAL_THREADS))


def _retrying(units: Sequence[Unit], number: int, make: Task) -> Iterator[Documents]:
    """A task on a remote unit: what breaks on the way is read again from its beginning, without what was delivered."""
    delivered = 0
    for wait_s in (*_RETRY_WAITS_S, None):
        try:
            for index, batch in enumerate(make()):
                if index >= delivered:
                    yield batch
                    delivered += 1
            return
        except (LmError, BadRecord, GeneratorExit):
            raise
        except Exception as error:  # every transport has its own
            if wait_s is None:
                raise _not_delivered(units[number], error) from error
            time.sleep(wait_s)


def _not_delivered(unit: Unit, error: Exception) -> LmError:
    text = " ".join(str(error).split())[:200] or type(error).__name__
    return LmError(
        f"{shown(unit.path)}: could not be read after {len(_RETRY_WAITS_S) + 1} attempts ({text}).",
        hint="Run the same command again to continue.",
        code=Exit.IO,
    )


def _tasks(
    units: Sequence[Unit], column: str, start: Place, stop: Place, on_bad: OnBad, threads: int
) -> Iterator[Task]:
    """What the reading threads do, in order: one task per piece, or per group of small text files."""
    group: list[int] = []
    group_bytes = 0
    for number in range(start.unit, stop.unit + (stop.piece > 0)):
        unit = units[number]
        is_whole = unit.format in ("text", "python") and not _is_streamed(unit)
        if is_whole:
            group.append(number)
            group_bytes += max(unit.size, 0)
            if len(group) < _GROUP_FILES and group_bytes < _GROUP_BYTES:
                continue
        if group:
            yield _task(units, group[0], functools.partial(_read_texts, units, tuple(group), on_bad))
            group, group_bytes = [], 0
        if not is_whole:
            first = start.piece if number == start.unit else 0
            last = stop.piece if number == stop.unit else None
            for make in _piece_tasks(units, number, first, last, column, on_bad):
                yield _task(units, number, make)
    if group:
        yield _task(units, group[0], functools.partial(_read_texts, units, tuple(group), on_bad))


def _is_streamed(unit: Unit) -> bool:
    """Whether a text file with marks is read in pieces: a small one is read whole, together with its neighbours."""
    return bool(unit.separators) and (bool(unit.compression) or not 0 <= unit.size <= _GROUP_BYTES)


def _task(units: Sequence[Unit], number: int, make: Task) -> Task:
    return functools.partial(_retrying, units, number, make) if units[number].is_remote else make


def _piece_tasks(
    units: Sequence[Unit], number: int, first: int, last: int | None, column: str, on_bad: OnBad
) -> Iterator[Task]:
    """Pieces first .. last-1 of a unit (to its end when last is None, as always where `pieces` sees but one)."""
    unit = units[number]
    if unit.format == "parquet" and unit.is_remote and 0 <= unit.size <= _WHOLE_BYTES:
        yield functools.partial(_read_whole_parquet, unit, number, first, last, column, on_bad)
    elif unit.format == "parquet":
        metadata = parquet_metadata(unit)
        _check_parquet(unit, metadata, column)
        for piece in range(first, metadata.num_row_groups if last is None else last):
            yield functools.partial(_read_row_group, unit, number, piece, metadata, column, on_bad)
    elif unit.format == "jsonl" and not unit.compression and unit.size >= 0:
        for piece in range(first, _ranges(unit) if last is None else last):
            yield functools.partial(_read_range, unit, number, piece, column, on_bad)
    elif unit.format == "jsonl":
        yield functools.partial(_read_stream, unit, number, first, column, on_bad)
    elif unit.format == "arrow":
        yield functools.partial(_read_arrow, unit, number, first, column, on_bad)
    elif unit.format == "text":
        yield functools.partial(_read_divided, unit, number, first, on_bad)
    else:
        yield functools.partial(_read_rows, unit, number, first, column, on_bad)


def _ranges(unit: Unit) -> int:
    return max(1, -(-unit.size // BLOCK_BYTES))


def pieces(unit: Unit) -> list[int]:
    """Bytes of the pieces at which a unit can be cut for two machines: one number where it cannot."""
    if unit.format == "parquet":
        metadata = parquet_metadata(unit)
        return [metadata.row_group(k).total_byte_size for k in range(metadata.num_row_groups)] or [1]
    if unit.format == "jsonl" and not unit.compression and not unit.is_remote:
        return [BLOCK_BYTES] * (_ranges(unit) - 1) + [unit.size - BLOCK_BYTES * (_ranges(unit) - 1)]
    return [max(unit.size, 1)]


def rows_before(unit: Unit, piece: int) -> int:
    """Records of the unit before a piece (`Place.base`): from the footer of parquet, by counting lines in JSONL."""
    if piece == 0:
        return 0
    if unit.format == "parquet":
        metadata = parquet_metadata(unit)
        return sum(metadata.row_group(k).num_rows for k in range(piece))
    # A line that begins before byte b begins at 0 or behind a newline before byte b - 1.
    left = piece * BLOCK_BYTES - 1
    lines = 1
    with open_unit(unit) as file:
        while left and (chunk := file.read(min(left, 1 << 20))):
            lines += chunk.count(b"\n")
            left -= len(chunk)
    return lines


# ---------------------------------------------------------------------------------------- text


def _read_texts(units: Sequence[Unit], numbers: Sequence[int], on_bad: OnBad) -> Iterator[Documents]:
    """Whole files, one document each."""
    builder = DocumentsBuilder(numbers[0])
    owners: list[int] = []
    for number in numbers:
        unit = units[number]
        with open_unit(unit) as file:
            raw = _read_all(unit, file)
        builder.unit = number
        if unit.separators:
            texts = separators.split([raw], unit.separators, shown(unit.path))
            owners += [number] * _add_divided(texts, builder, on_bad, first_row=0)
        elif (text := _text_of(unit, raw, on_bad, builder)) is not None:
            builder.add(0, text)
            owners.append(number)
    builder.unit, builder.n_records = numbers[0], 0
    batch = builder.build()
    batch.units[:] = owners
    yield batch


def _add_divided(texts: Iterator[bytes], builder: DocumentsBuilder, on_bad: OnBad, *, first_row: int) -> int:
    """Add what stands between the marks of a file; returns how many documents came of it. What is empty is none, but it
    has a number."""
    before = len(builder.texts)
    for row, raw in enumerate(texts, first_row):
        builder.n_records += 1
        raw = raw.removeprefix(json_lines.BOM)
        if raw and (text := _valid(raw, row, row, on_bad, builder)) is not None:
            builder.add(row, text)
    return len(builder.texts) - before


def _read_divided(unit: Unit, number: int, first: int, on_bad: OnBad) -> Iterator[Documents]:
    """The documents between the marks of a large text file, from piece `first` on. A piece ends behind the document
    that brings it to BLOCK_BYTES."""
    with open_unit(unit) as file:
        try:
            chunks = _decompressed(unit, file) if unit.compression else iter(lambda: file.read(1 << 20), b"")
            texts = separators.split(chunks, unit.separators, shown(unit.path))
            for piece in itertools.count():
                taken, size = [], 0
                for text in texts:
                    taken.append(text)
                    size += len(text)
                    if size >= BLOCK_BYTES:
                        break
                if not taken:
                    return
                if piece >= first:
                    builder = DocumentsBuilder(number, piece)
                    _add_divided(iter(taken), builder, on_bad, first_row=0)
                    yield builder.build()
        except OSError as error:
            raise _read_error(unit, error) from error


def _text_of(unit: Unit, raw: bytes, on_bad: OnBad, builder: DocumentsBuilder) -> bytes | None:
    raw = raw.removeprefix(json_lines.BOM)
    if unit.format == "python":
        try:
            encoding, _ = tokenize.detect_encoding(io.BytesIO(raw).readline)
            return raw.decode().encode() if encoding == "utf-8" else raw.decode(encoding).encode()
        except (SyntaxError, UnicodeDecodeError, LookupError):
            # The standard library carries a few files with broken encodings on purpose; they are counted.
            builder.drop(0, Drop.BAD_UTF8)
            return None
    return _valid(raw, 0, 0, on_bad, builder)


def _valid(raw: bytes, row: int, later: int, on_bad: OnBad, builder: DocumentsBuilder) -> bytes | None:
    """The text if it is UTF-8, else what `on_bad` says. `later`: the row counted from the last batch."""
    try:
        raw.decode()
        return raw
    except UnicodeDecodeError as error:
        if on_bad == "repair":
            builder.repaired += 1
            return raw.decode("utf-8", "replace").encode()
        if on_bad == "skip":
            builder.drop(row, Drop.BAD_UTF8)
            return None
        raise BadRecord(builder.unit, later, Drop.BAD_UTF8, f"not UTF-8 text (byte {error.start:,})") from None


def _read_error(unit: Unit, error: OSError) -> Exception:
    """What to raise for a failed read: a sentence for a file on this machine, the error itself where it is retried."""
    return error if unit.is_remote else from_os_error(error, shown(unit.path), "read")


def _read_all(unit: Unit, file: BinaryIO) -> bytes:
    if not unit.compression:
        check_size(shown(unit.path), unit.size)
        try:
            return file.read()
        except OSError as error:
            raise _read_error(unit, error) from error
    parts: list[bytes] = []
    total = 0
    for part in _decompressed(unit, file):
        total += len(part)
        check_size(shown(unit.path), total)
        parts.append(part)
    return b"".join(parts)


def beginning(unit: Unit, size: int) -> tuple[bytes, bool]:
    """(at most the first `size` bytes of a text file, decompressed; whether that is all). Raises LmError."""
    with open_unit(unit) as file:
        held = b""
        try:
            for chunk in _decompressed(unit, file) if unit.compression else iter(lambda: file.read(size + 1), b""):
                held += chunk
                if len(held) > size:
                    return held[:size], False
        except OSError as error:
            raise _read_error(unit, error) from error
    return held, True


# ---------------------------------------------------------------------------------------- decompression


def _decompressed(unit: Unit, file: BinaryIO) -> Iterator[bytes]:
    """Decompressed chunks of about 1 MiB; refuses bombs and truncated streams (65)."""
    name = shown(unit.path)
    stored = max(unit.size, 1)
    total = 0
    try:
        for chunk in _gunzip(file) if unit.compression == "gzip" else _unzstd(file):
            total += len(chunk)
            if unit.size >= 0 and total > _BOMB_FREE_BYTES and total > BOMB_RATIO * stored:
                raise LmError(
                    f"{name}: grows to more than {BOMB_RATIO} times its size; this looks like a decompression bomb.",
                    hint="If it is meant, decompress it first.",
                    code=Exit.DATA,
                )
            yield chunk
    except (zlib.error, zstandard.ZstdError, EOFError) as error:
        raise LmError(f"{name}: broken {unit.compression} data ({error}).", code=Exit.DATA) from error
    except OSError as error:
        raise _read_error(unit, error) from error


def _gunzip(file: BinaryIO) -> Iterator[bytes]:
    decoder = zlib.decompressobj(wbits=31)
    fed = False
    while data := file.read(256 << 10):
        while data:
            if decoder.eof:  # the next member of a concatenated file
                decoder, fed = zlib.decompressobj(wbits=31), False
            out = decoder.decompress(data, 1 << 20)
            fed = True
            data = decoder.unused_data if decoder.eof else decoder.unconsumed_tail
            if decoder.eof and not data.strip(b"\0"):
                data = b""  # padding behind the last member
            if out:
                yield out
    if fed and not decoder.eof:
        if out := decoder.flush():
            yield out
        if not decoder.eof:
            raise EOFError("the file ends in the middle")


def _unzstd(file: BinaryIO) -> Iterator[bytes]:
    # One frame after the other by hand: the reader of the library takes a truncated frame for the end. A bomb turns the
    # 4 KiB that go in at once into 128 MiB at most.
    context = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW)
    decoder = context.decompressobj()
    fed = False
    while data := file.read(4 << 10):
        while data:
            if decoder.eof:
                decoder, fed = context.decompressobj(), False
            out = decoder.decompress(data)
            fed = True
            data = decoder.unused_data if decoder.eof else b""
            if out:
                yield out
    if fed and not decoder.eof:
        raise EOFError("the file ends in the middle")


# ---------------------------------------------------------------------------------------- jsonl


def _read_range(unit: Unit, number: int, piece: int, column: str, on_bad: OnBad) -> Iterator[Documents]:
    """The lines that begin in [piece, piece + 1) * BLOCK_BYTES."""
    with open_unit(unit) as file:
        try:
            begin, end = piece * BLOCK_BYTES, (piece + 1) * BLOCK_BYTES
            if begin:
                file.seek(begin - 1)  # a line begins here if the byte before is a newline
                file.readline()
            else:
                file.seek(0)
            place = file.tell()
            block = file.read(end - place) if place < end else b""
            if block and not block.endswith(b"\n"):
                block += _rest_of_line(unit, file)
        except OSError as error:
            raise _read_error(unit, error) from error
    if block:
        yield from _parse_block(unit, number, piece, block, column, on_bad)


def _rest_of_line(unit: Unit, file: BinaryIO) -> bytes:
    parts: list[bytes] = []
    total = 0
    while part := file.readline(1 << 20):
        parts.append(part)
        total += len(part)
        check_size(shown(unit.path), total)
        if part.endswith(b"\n"):
            break
    return b"".join(parts)


def _read_stream(unit: Unit, number: int, first: int, column: str, on_bad: OnBad) -> Iterator[Documents]:
    """Blocks of whole lines of a decompressed stream, from block `first` on."""
    with open_unit(unit) as file:
        chunks = _decompressed(unit, file) if unit.compression else iter(lambda: file.read(1 << 20), b"")
        for piece, block in enumerate(_line_blocks(unit, chunks)):
            if piece >= first:
                yield from _parse_block(unit, number, piece, block, column, on_bad)


def _line_blocks(unit: Unit, chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Whole lines, cut at the first newline after BLOCK_BYTES: does not depend on the size of the chunks."""
    held = bytearray()
    searched = BLOCK_BYTES  # a cut may not come earlier
    for chunk in chunks:
        held += chunk
        while len(held) > searched:
            cut = held.find(b"\n", searched)
            if cut < 0:
                searched = len(held)
                check_size(shown(unit.path), searched)
                break
            yield bytes(held[: cut + 1])
            del held[: cut + 1]
            searched = BLOCK_BYTES
    if held:
        yield bytes(held)


def _parse_block(unit: Unit, number: int, piece: int, block: bytes, column: str, on_bad: OnBad) -> Iterator[Documents]:
    fast = _parse_by_arrow(block, column)
    if fast is not None:
        yield _from_arrow(fast, number, piece, 0)
        return
    builder = DocumentsBuilder(number, piece)
    for row, line in enumerate(json_lines.lines_of(block)):
        builder.n_records += 1
        if json_lines.is_blank(line):
            continue  # a blank line is no record, but it has a number
        reason, message, text = _text_in_line(line, column, on_bad, builder)
        if not message:
            builder.add(row, text)
            continue
        if on_bad != "skip":
            raise BadRecord(number, row, reason, message)
        builder.drop(row, reason)
    yield builder.build()


def _text_in_line(line: bytes, column: str, on_bad: OnBad, builder: DocumentsBuilder) -> tuple[Drop, str, bytes]:
    """(reason, complaint, text): the complaint is empty when the text is there."""
    try:
        try:
            value = json_lines.parse_line(line)
        except json_lines.BadLine as error:
            if error.is_text or on_bad != "repair":
                raise
            value = json_lines.parse_line(line, errors="replace")
            builder.repaired += 1
    except json_lines.BadLine as error:
        return Drop.BAD_JSON if error.is_text else Drop.BAD_UTF8, str(error), b""
    except RecursionError:
        fast = _parse_by_arrow(line.strip().removeprefix(json_lines.BOM), column)  # it has no limit of depth
        if fast is not None:
            return Drop.BAD_JSON, "", fast[0].as_py().encode()
        return Drop.BAD_JSON, "not valid JSON (nested too deeply)", b""
    if not isinstance(value, dict):
        return Drop.BAD_JSON, f"an object is expected, not a {type(value).__name__}", b""
    text = value.get(column)
    if column not in value and "." in column:
        text = _nested(value, column.split("."))
    if isinstance(text, str):
        return Drop.BAD_JSON, "", repair(text).encode()
    if column in value:
        return Drop.NO_TEXT, f"'{column}' is {json.dumps(text)[:40]}, not text", b""
    texts = [key for key, item in value.items() if isinstance(item, str)]
    more = f" (--text-column {columns.listed(texts[:1])}?)" if texts else ""
    return Drop.NO_TEXT, f"no '{column}' here; it has {columns.listed(value)}{more}", b""


def _nested(value: Any, path: list[str]) -> Any:
    """What a dotted name leads to, None where it leads nowhere."""
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _parse_by_arrow(block: bytes, column: str) -> Any | None:
    """The text column of a block of JSON lines as an Arrow array, or None when it is not plain to see that every line
    is one object with a text."""
    block = block.removeprefix(json_lines.BOM)
    lines = block.count(b"\n") + (not block.endswith(b"\n"))
    # Between two closed objects stands a line end and nothing else: then no object spans lines, and no line is blank.
    if not block.startswith(b"{") or block.count(b"}\n{") + block.count(b"}\r\n{") != lines - 1:
        return None
    try:
        table = pyarrow.json.read_json(
            pa.BufferReader(block),
            read_options=pyarrow.json.ReadOptions(use_threads=False, block_size=len(block) + 1),
            parse_options=pyarrow.json.ParseOptions(
                explicit_schema=pa.schema([(column, pa.large_string())]), unexpected_field_behavior="ignore"
            ),
        )
        array = table.column(0).combine_chunks()
        if isinstance(array, pa.ChunkedArray):
            array = array.chunk(0)
        if len(array) != lines or array.null_count:
            return None
        array.validate(full=True)
        _whole_block_is_utf8(block)
    except (pa.ArrowException, IndexError):
        return None
    return array


def _whole_block_is_utf8(block: bytes) -> None:
    """Raise ArrowInvalid where not: Arrow looks only at the column that it was asked for."""
    offsets = np.array([0, len(block)], np.int64)
    pa.Array.from_buffers(pa.large_string(), 1, [None, pa.py_buffer(offsets), pa.py_buffer(block)]).validate(full=True)


# ---------------------------------------------------------------------------------------- parquet


def parquet_metadata(unit: Unit) -> Any:
    """The footer of a parquet file."""
    for wait_s in (*_RETRY_WAITS_S, None):
        try:
            with _open_parquet(unit) as file:
                return pq.ParquetFile(file).metadata
        except LmError:
            raise
        except Exception as error:  # every transport has its own
            if not unit.is_remote:
                raise broken_parquet(unit, error) from error
            if wait_s is None:
                raise _not_delivered(unit, error) from error
            time.sleep(wait_s)
    raise AssertionError("unreachable")


def _check_parquet(unit: Unit, metadata: Any, column: str) -> None:
    columns.check_schema(shown(unit.path), _parquet_schema(unit, metadata), column)


def _parquet_schema(unit: Unit, metadata: Any) -> Any:
    try:
        return metadata.schema.to_arrow_schema()
    except (pa.ArrowException, ValueError, OSError) as error:
        raise broken_parquet(unit, error) from error


def _open_parquet(unit: Unit) -> Any:
    """A file for Arrow: read by Arrow itself where it is on this machine, outside the interpreter lock."""
    file = open_unit(unit)
    if unit.is_remote:
        return file
    file.close()  # it was opened for its checks
    return pa.OSFile(unit.path)


def _read_whole_parquet(
    unit: Unit, number: int, first: int, last: int | None, column: str, on_bad: OnBad
) -> Iterator[Documents]:
    """Row groups first .. last-1: a small remote file, whose footer is fetched on the reading thread, too."""
    metadata = parquet_metadata(unit)
    _check_parquet(unit, metadata, column)
    for piece in range(first, metadata.num_row_groups if last is None else last):
        yield from _read_row_group(unit, number, piece, metadata, column, on_bad)


def _read_row_group(
    unit: Unit, number: int, piece: int, metadata: Any, column: str, on_bad: OnBad
) -> Iterator[Documents]:
    group = metadata.row_group(piece)
    per_row = max(1, group.total_byte_size // max(1, group.num_rows))
    rows_at_once = int(min(max(1, BATCH_BYTES // per_row), 65_536))
    row = 0
    try:
        with _open_parquet(unit) as file:
            parquet = pq.ParquetFile(file, metadata=metadata, pre_buffer=unit.is_remote)
            for batch in parquet.iter_batches(
                row_groups=[piece], columns=[column], batch_size=rows_at_once, use_threads=False
            ):
                yield _documents_of(columns.texts(batch, column), number, piece, row, column, on_bad)
                row += len(batch)
    except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
        if unit.is_remote:
            raise  # tried again
        raise broken_parquet(unit, error) from error


# ---------------------------------------------------------------------------------------- arrow


def schema_of(unit: Unit) -> Any:
    """The Arrow schema of a parquet or Arrow file."""
    if unit.format == "parquet":
        return _parquet_schema(unit, parquet_metadata(unit))
    with _reading_arrow(unit), _open_parquet(unit) as file:
        is_file = file.read(8) == b"ARROW1\0\0"
        file.seek(0)
        return (pa.ipc.open_file(file) if is_file else pa.ipc.open_stream(file)).schema


def batches_of(unit: Unit, column: str) -> Iterator[Any]:
    """Record batches with a column, whatever its type, of a parquet or Arrow file on this machine."""
    if unit.format == "arrow":
        yield from _arrow_batches(unit, column, check=False)
        return
    metadata = parquet_metadata(unit)
    try:
        with _open_parquet(unit) as file:
            yield from pq.ParquetFile(file, metadata=metadata).iter_batches(columns=[column], use_threads=False)
    except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
        raise broken_parquet(unit, error) from error


@contextlib.contextmanager
def _reading_arrow(unit: Unit) -> Iterator[None]:
    """What Arrow raises about a file becomes one sentence; what a network breaks is tried again."""
    try:
        yield
    except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
        if unit.is_remote and isinstance(error, OSError):
            raise  # tried again
        if isinstance(error, OSError) and error.errno is not None:
            raise _read_error(unit, error) from error
        said = " ".join(str(error).split())[:200]
        raise LmError(f"{shown(unit.path)}: not a readable Arrow file ({said}).", code=Exit.DATA) from error


def _arrow_batches(unit: Unit, column: str, *, check: bool = True) -> Iterator[Any]:
    """The record batches of an Arrow file or stream, checked for the column of text; only it is read where the file
    allows."""
    with _reading_arrow(unit), _open_parquet(unit) as file:
        is_file = file.read(8) == b"ARROW1\0\0"
        file.seek(0)
        schema = (pa.ipc.open_file(file) if is_file else pa.ipc.open_stream(file)).schema
        if check:
            columns.check_schema(shown(unit.path), schema, column)
        path = columns.path_of(schema, column)
        assert path is not None
        wanted = pa.ipc.IpcReadOptions(included_fields=[schema.get_field_index(path[0])], use_threads=False)
        file.seek(0)
        reader = pa.ipc.open_file(file, options=wanted) if is_file else pa.ipc.open_stream(file, options=wanted)
        for batch in map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader:
            _refuse_damaged(batch)
            yield batch


def _refuse_damaged(batch: Any) -> None:
    """Raise ArrowInvalid for offsets or indices that lead outside; text that is no UTF-8 is the reader's business."""
    try:
        batch.validate(full=True)
    except pa.ArrowInvalid as error:
        if "UTF8" not in str(error):
            raise


def _read_arrow(unit: Unit, number: int, first: int, column: str, on_bad: OnBad) -> Iterator[Documents]:
    for piece, batch in enumerate(_arrow_batches(unit, column)):
        if piece < first:
            continue
        if not len(batch):
            yield DocumentsBuilder(number, piece).build()
        rows = max(1, int(BATCH_BYTES * len(batch) // max(1, batch.nbytes)))
        for row in range(0, len(batch), rows):
            array = columns.texts(batch.slice(row, rows), column)
            yield _documents_of(array, number, piece, row, column, on_bad)


# ---------------------------------------------------------------------------------------- columns of text


def _documents_of(array: Any, unit: int, piece: int, row: int, column: str, on_bad: OnBad) -> Documents:
    """A batch from an Arrow array: as it is when every value is valid text, value by value otherwise."""
    try:
        if array.null_count:
            raise pa.ArrowInvalid("nulls")
        if array.type in (pa.binary(), pa.large_binary()):
            array = array.cast(pa.large_string())
        array.validate(full=True)
        return _from_arrow(array, unit, piece, row)
    except pa.ArrowInvalid:
        pass
    builder = DocumentsBuilder(unit, piece)
    for index, value in enumerate(array.cast(pa.large_binary()).to_pylist()):
        builder.n_records += 1
        if value is None:
            if on_bad != "skip":
                raise BadRecord(unit, index, Drop.NO_TEXT, f"'{column}' is null")
            builder.drop(row + index, Drop.NO_TEXT)
        elif (text := _valid(value, row + index, index, on_bad, builder)) is not None:
            builder.add(row + index, text)
    return builder.build()


def _from_arrow(array: Any, unit: int, piece: int, row: int) -> Documents:
    """A batch that shares the memory of an array of text without nulls."""
    count = len(array)
    _, offsets, data = array.buffers()
    width = np.int64 if array.type == pa.large_string() else np.int32
    starts = np.frombuffer(offsets, width)[array.offset : array.offset + count + 1].astype(np.int64)
    first, last = int(starts[0]), int(starts[-1])
    return Documents(
        np.frombuffer(data, np.uint8)[first:last] if data is not None and last > first else np.zeros(0, np.uint8),
        starts - first,
        np.full(count, unit, np.uint32),
        np.arange(row, row + count, dtype=np.int64),
        unit,
        piece,
        0,
        count,
    )


# ---------------------------------------------------------------------------------------- rows


def _read_rows(unit: Unit, number: int, first: int, column: str, on_bad: OnBad) -> Iterator[Documents]:
    """What only `datasets` can read, a fixed number of rows per piece."""
    from lmcore.data import hub

    piece = first
    builder = DocumentsBuilder(number, piece)
    for value in hub.iterate_rows(unit.path, column, skip=first * _ROWS_PER_PIECE):
        row = builder.n_records
        builder.n_records += 1
        if isinstance(value, str):
            builder.add(row, repair(value).encode())
        elif on_bad == "skip":
            builder.drop(row, Drop.NO_TEXT)
        else:
            raise BadRecord(number, row, Drop.NO_TEXT, f"'{column}' is {value!r:.40}, not text")
        if builder.n_records == _ROWS_PER_PIECE:
            yield builder.build()
            piece += 1
            builder = DocumentsBuilder(number, piece)
    if builder.n_records:
        yield builder.build()
