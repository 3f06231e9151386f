"""Where text comes from: what a user names becomes an ordered list of units.

A `Unit` is one file, local or behind a URL, in one of four formats; its place in the list is what the document index
and the journal call `unit`. The list is frozen in plan.json, so it holds what is needed to notice a changed file: size
and a fingerprint of a few kilobytes (the footer of a parquet file covers its statistics; elsewhere head and tail).

    text     a file is a document             jsonl     a line is a document
    python   the same, decoded as PEP 263     parquet   a row is a document
             says                             rows      what only `datasets` can read: a row is a document

Text and JSONL may be compressed (.gz, .zst). A folder is searched for the known endings in the order of its paths; when
it holds JSONL or parquet, text files beside them (a README) are left out. Hub names are resolved by hub.py, reading
is in readers.py.
"""

from __future__ import annotations

import glob
import hashlib
import os
import sys
import sysconfig
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

from lmcore.errors import Exit, LmError, from_os_error

Format = Literal["text", "python", "jsonl", "parquet", "rows"]

ENDINGS: dict[str, Format] = {
    ".txt": "text",
    ".text": "text",
    ".md": "text",
    ".rst": "text",
    ".py": "python",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
}
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
_FINGERPRINT_BYTES = 64 << 10
_NOT_STDLIB = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}


@dataclass(frozen=True)
class Unit:
    """One file of the plan."""

    path: str
    """Absolute local path or URL (hf://, s3://, https://)."""
    format: Format
    size: int
    """Bytes as stored; -1 when unknown."""
    compression: str = ""
    fingerprint: str = ""
    """Hash of a few kilobytes of a local file; empty where the URL itself is pinned."""

    @property
    def is_remote(self) -> bool:
        return "://" in self.path

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Unit:
        raw = value.get("path_hex")
        path = value["path"] if raw is None else os.fsdecode(bytes.fromhex(raw))
        return cls(path, value["format"], value["size"], value["compression"], value["fingerprint"])

    def to_json(self) -> dict[str, Any]:
        """JSON of this unit; a path that is no UTF-8 is there twice, for people and as bytes."""
        value = asdict(self) | {"path": shown(self.path)}
        return value if value["path"] == self.path else value | {"path_hex": os.fsencode(self.path).hex()}


@dataclass(frozen=True)
class Source:
    """What a plan freezes about the origin of the text."""

    description: dict[str, Any]
    """Goes into the manifest: kind, names, revision."""
    units: tuple[Unit, ...]
    notes: tuple[str, ...] = ()
    """What the user should know about the choice of files."""


# ---------------------------------------------------------------------------------------- resolving


def resolve(dataset: str | None, paths: Sequence[str], *, spool: Path | None = None) -> Source:
    """Units behind `--dataset NAME` or behind files, folders, globs and URLs. `spool` holds a copy of standard input
    when `-` is among the paths. Raises LmError: 2 for what does not exist or cannot be used."""
    if dataset == "stdlib":
        return _stdlib()
    if dataset is not None:
        from lmcore.data import hub

        return hub.resolve(dataset)
    return _files(paths, spool)


def _stdlib() -> Source:
    """The `.py` sources of the running interpreter's standard library, without its tests."""
    root = Path(sysconfig.get_path("stdlib"))
    found = (p for p in root.rglob("*.py") if not _NOT_STDLIB & set(p.relative_to(root).parts) and p.is_file())
    units = tuple(_local_unit(p) for p in sorted(found, key=lambda p: p.relative_to(root).as_posix()))
    if not units:
        raise LmError(
            f"{root}: this Python was installed without the sources of its standard library.",
            hint="Tokenize files of your own: lm tokenize PATH",
            code=Exit.DATA,
        )
    version = ".".join(map(str, sys.version_info[:3]))
    return Source({"kind": "stdlib", "python": version, "root": shown(root)}, units)


def _files(paths: Sequence[str], spool: Path | None) -> Source:
    units: list[Unit] = []
    notes: list[str] = []
    for path in paths:
        if path == "-":
            if spool is None:
                raise LmError("-: standard input can only be tokenized into a new shard set.")
            units.append(_local_unit(spool))
        elif "://" in path:
            units.extend(_remote(path))
        else:
            units.extend(_local(path, notes))
    seen: set[str] = set()
    unique = [unit for unit in units if not (unit.path in seen or seen.add(unit.path))]  # type: ignore[func-returns-value]
    if len(unique) < len(units):
        notes.append(f"{len(units) - len(unique)} files were named twice and count once.")
    kind = "stdin" if list(paths) == ["-"] else "files"
    return Source({"kind": kind, "paths": [shown(path) for path in paths]}, tuple(unique), tuple(notes))


def _local(path: str, notes: list[str]) -> list[Unit]:
    given = Path(path).expanduser()
    if given.is_dir():
        return _folder(given, notes)
    if given.exists():
        return [_local_unit(given)]
    if glob.has_magic(path):
        matches = [Path(p) for p in sorted(glob.glob(str(given), recursive=True))]
        files = [p for p in matches if p.is_file()]
        if files:
            return [_local_unit(p) for p in files]
        raise LmError(f"{shown(path)}: no file matches this pattern.")
    hint = f"Did you mean the dataset on the Hub? lm tokenize --dataset {path}" if path.count("/") == 1 else ""
    raise LmError(f"{shown(path)}: no such file or directory.", hint=hint)


def _folder(root: Path, notes: list[str]) -> list[Unit]:
    found: list[Path] = []
    for folder, folders, files in os.walk(root, onerror=_raise):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "__pycache__")
        found.extend(Path(folder, name) for name in files if not name.startswith("."))
    found.sort(key=lambda p: os.fsencode(p.relative_to(root)))
    known = [p for p in found if _format_of(p) is not None and p.is_file()]
    if not known:
        raise LmError(
            f"{shown(root)}: no text here ({len(found)} files, none ending in {_known_endings()}).",
            code=Exit.DATA,
        )
    records = [p for p in known if _format_of(p)[0] in ("jsonl", "parquet")]  # type: ignore[index]
    if records and len(records) < len(known):
        notes.append(
            f"{shown(root)}: {len(known) - len(records)} text files beside the JSONL and parquet files are left out."
        )
    chosen = records or known
    if len(known) < len(found):
        notes.append(f"{shown(root)}: {len(found) - len(known)} files of other kinds are left out.")
    return [_local_unit(p) for p in chosen]


def _raise(error: OSError) -> None:
    raise from_os_error(error, error.filename or "", "read")


def _local_unit(path: Path) -> Unit:
    kind = _format_of(path)
    if kind is None:
        raise LmError(
            f"{shown(path)}: the kind of this file is not known; known endings are {_known_endings()}.",
            hint="Rename it, or pipe it: lm tokenize - < FILE",
        )
    try:
        size = path.stat().st_size
        return Unit(os.path.abspath(path), kind[0], size, kind[1], fingerprint(path, size))
    except OSError as error:
        raise from_os_error(error, shown(path), "read") from error


def _remote(url: str) -> list[Unit]:
    """Files behind an fsspec URL: one file, a glob or a folder."""
    from lmcore.data import hub

    return hub.list_url(url)


def _format_of(path: Path) -> tuple[Format, str] | None:
    """(format, compression) by the endings of a name, None when unknown."""
    name = path.name.lower()
    compression = ""
    for ending, kind in COMPRESSIONS.items():
        if name.endswith(ending):
            name, compression = name[: -len(ending)], kind
    found = ENDINGS.get(os.path.splitext(name)[1])
    if found is None or (compression and found == "parquet"):
        return None
    return found, compression


def format_of_name(name: str) -> tuple[Format, str] | None:
    """(format, compression) by the endings of a path or URL."""
    return _format_of(Path(name.split("?")[0]))


def _known_endings() -> str:
    return " ".join(ENDINGS) + " (text and .jsonl also .gz .zst)"


def shown(path: str | Path) -> str:
    """A path as it can be printed and kept as JSON: bytes that are no UTF-8 are escaped."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


# ---------------------------------------------------------------------------------------- looking into files


def fingerprint(path: Path, size: int) -> str:
    """Hash of the size and of 64 KiB at each end: enough to notice that a file was replaced."""
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        digest.update(file.read(_FINGERPRINT_BYTES))
        if size > _FINGERPRINT_BYTES:
            file.seek(max(size - _FINGERPRINT_BYTES, _FINGERPRINT_BYTES))
            digest.update(file.read(_FINGERPRINT_BYTES))
    return digest.hexdigest()[:16]


def open_unit(unit: Unit) -> BinaryIO:
    """Open the stored bytes of a unit, local or remote; a local file whose size changed is refused (65)."""
    if unit.is_remote:
        from lmcore.data import hub

        return hub.open_url(unit.path)
    try:
        file = open(unit.path, "rb")
    except OSError as error:
        raise from_os_error(error, shown(unit.path), "read") from error
    size = os.fstat(file.fileno()).st_size
    if size != unit.size:
        file.close()
        raise LmError(
            f"{shown(unit.path)}: {size:,} bytes, but {unit.size:,} when the plan was made; the file was changed.",
            hint="Restore it, or tokenize into a new directory.",
            code=Exit.DATA,
        )
    return file


def check_schema(path: str, schema: Any, column: str) -> None:
    """Refuse (2) an Arrow schema without a text column of this name."""
    import pyarrow as pa

    if schema.get_field_index(column) < 0:
        texts = [field.name for field in schema if _is_text(field.type)]
        hint = f"Use: --text-column {texts[0]}" if texts else "None of them holds text."
        raise LmError(f"{shown(path)}: no column '{column}'; it has {', '.join(schema.names)}.", hint=hint)
    kind = schema.field(column).type
    if not (_is_text(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
        raise LmError(f"{shown(path)}: the column '{column}' holds {kind}, not text.")


def _is_text(kind: Any) -> bool:
    import pyarrow as pa

    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def broken_parquet(unit: Unit, error: BaseException) -> LmError:
    """A parquet file that cannot be parsed."""
    return LmError(f"{shown(unit.path)}: not a readable parquet file ({str(error).strip()}).", code=Exit.DATA)


def total_size(units: Iterable[Unit]) -> int:
    """Stored bytes of all units; unknown sizes count as nothing."""
    return sum(max(unit.size, 0) for unit in units)
