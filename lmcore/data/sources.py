"""Where text comes from: what a user names becomes an ordered list of units.

A `Unit` is one file, local or behind a URL, in one of five formats; its place in the list is what the document index
and the journal call `unit`. The list is frozen in plan.json, so it holds what is needed to notice a changed file: size
and a fingerprint of a few kilobytes (the footer of a parquet file covers its statistics; elsewhere head and tail).

    text     a file is a document, or many    jsonl     a line is a document
             where it is to be divided        parquet   a row is a document
    python   a file, decoded as PEP 263       arrow     a row is a document (IPC files and streams)
             says                             rows      what only `datasets` can read: a row is a document

What a file on this machine is, its first bytes say (content.py); its name decides where they leave it open, and
`--format` where both do. Text and JSON lines may be compressed (gzip, zstd). A folder is searched for the known endings
in the order of its paths, links are followed and nothing is read twice; when it holds JSON lines or parquet, text files
beside them (a README) are left out; what is left out is named by kind. Hub names are resolved by hub.py, reading is in
readers.py.
"""

from __future__ import annotations

import collections
import fnmatch
import glob
import hashlib
import os
import re
import stat
import sys
import sysconfig
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, get_args

from lmcore.data.content import HEAD_BYTES, JSONL, TEXT, Content, content_of
from lmcore.errors import Exit, LmError, from_os_error, quoted

Format = Literal["text", "python", "jsonl", "parquet", "arrow", "rows"]
FormatChoice = Literal["auto", "text", "jsonl", "parquet", "arrow"]

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
_RECORDS = ("", ".json", ".jsonlines", ".ldjson", ".jl", ".arrow", ".feather")
"""Endings that do not say what a file is, but that a folder looks into when it holds no known records."""
_MARKUP = (".csv", ".tsv", ".html", ".htm", ".xhtml", ".xml", ".svg", ".ipynb")
_FINGERPRINT_BYTES = 64 << 10
_NOT_STDLIB = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}


@dataclass(frozen=True)
class Reading:
    """How the user wants files to be read."""

    format: FormatChoice = "auto"
    column: str = "text"
    """Where the text of records is."""


AUTO = Reading()


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
    separators: tuple[str, ...] = ()
    """Marks between the documents of a text file (separators.py); none: the file is one document."""

    @property
    def is_remote(self) -> bool:
        return "://" in self.path

    @classmethod
    def from_json(cls, value: Any) -> Unit:
        """A unit of a plan. Raises ValueError for what is none."""
        if not isinstance(value, dict):
            raise ValueError("a unit is no object")
        path: Any
        form: Any
        fingerprint: Any
        size, marks = value.get("size"), value.get("separators", [])
        keys = ("path", "format", "compression", "fingerprint")
        path, form, compression, fingerprint = (value.get(key) for key in keys)
        raw = value.get("path_hex", "")
        if (
            not all(isinstance(text, str) for text in (path, form, compression, fingerprint, raw))
            or type(size) is not int
        ):
            raise ValueError("a unit with a wrong type")
        path = os.fsdecode(bytes.fromhex(raw)) if raw else path
        if not path or "\0" in path or not -1 <= size < 1 << 62:
            raise ValueError(f"a unit with the path {path!r:.60} and {size} bytes")
        if form not in get_args(Format) or compression not in ("", *COMPRESSIONS.values()):
            raise ValueError(f"a unit of the kind {form!r:.40} {compression!r:.40}")
        if not isinstance(marks, list) or not all(isinstance(m, str) and len(m) > 1 and m[0] in "=+" for m in marks):
            raise ValueError("a unit with separators that are none")
        return cls(path, form, size, compression, fingerprint, tuple(marks))

    def to_json(self) -> dict[str, Any]:
        """JSON of this unit; a path that is no UTF-8 is there twice, for people and as bytes."""
        value = asdict(self) | {"path": shown(self.path), "separators": list(self.separators)}
        if not self.separators:
            del value["separators"]
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


def resolve(dataset: str | None, paths: Sequence[str], *, spool: Path | None = None, reading: Reading = AUTO) -> Source:
    """Units behind `--dataset NAME` or behind files, folders, globs and URLs. `spool` holds a copy of standard input
    when `-` is among the paths. Raises LmError: 2 for what does not exist or cannot be used."""
    if dataset == "stdlib":
        return _stdlib()
    if dataset is not None:
        from lmcore.data import hub

        return hub.resolve(dataset)
    return _files(paths, spool, reading)


def _stdlib() -> Source:
    """The `.py` sources of the running interpreter's standard library, without its tests."""
    root = Path(sysconfig.get_path("stdlib"))
    found = (p for p in root.rglob("*.py") if not _NOT_STDLIB & set(p.relative_to(root).parts) and p.is_file())
    units = tuple(local_unit(p) for p in sorted(found, key=lambda p: p.relative_to(root).as_posix()))
    if not units:
        raise LmError(
            f"{root}: this Python was installed without the sources of its standard library.",
            hint="Tokenize files of your own: lm tokenize PATH",
            code=Exit.DATA,
        )
    version = ".".join(map(str, sys.version_info[:3]))
    return Source({"kind": "stdlib", "python": version, "root": shown(root)}, units)


def _files(paths: Sequence[str], spool: Path | None, reading: Reading) -> Source:
    units: list[Unit] = []
    notes: list[str] = []
    for path in paths:
        if path == "-":
            if spool is None:
                raise LmError("-: standard input can only be tokenized into a new shard set.")
            units.append(local_unit(spool, reading))
            notes.append(f"standard input: {_described(units[-1], reading)}.")
        elif "://" in path:
            units.extend(_remote(path, notes, reading))
        else:
            units.extend(_local(path, notes, reading))
    seen: set[str] = set()
    unique = [unit for unit in units if not (unit.path in seen or seen.add(unit.path))]  # type: ignore[func-returns-value]
    if len(unique) < len(units):
        notes.append(f"{len(units) - len(unique)} files were named twice and count once.")
    unique = _each_once(unique, notes)
    kind = "stdin" if list(paths) == ["-"] else "files"
    return Source({"kind": kind, "paths": [shown(path) for path in paths]}, tuple(unique), tuple(notes))


def _each_once(units: Sequence[Unit], notes: list[str]) -> list[Unit]:
    """Without files that links lead to a second time; of a file and links to it, the file stays."""
    places: dict[tuple[int, int], list[Unit]] = {}
    for unit in units:
        if not unit.is_remote:
            info = os.stat(unit.path)
            places.setdefault((info.st_dev, info.st_ino), []).append(unit)
    doubles: set[str] = set()
    for (_, inode), group in places.items():
        if inode and len(group) > 1:
            kept = next((unit for unit in group if not os.path.islink(unit.path)), group[0])
            doubles.update(unit.path for unit in group if unit is not kept)
    if doubles:
        example = shown(next(unit.path for unit in units if unit.path in doubles))
        notes.append(f"links lead to {len(doubles)} files a second time (such as {example}); they are read once.")
    return [unit for unit in units if unit.path not in doubles]


def _local(path: str, notes: list[str], reading: Reading) -> list[Unit]:
    given = Path(os.path.expanduser(path))
    if given.is_dir():
        return _folder(given, notes, reading)
    if os.path.lexists(given):
        unit = local_unit(given, reading)
        if reading.format == "auto" and _format_of(given) is None:
            notes.append(f"{shown(path)}: {_described(unit, reading)}.")
        return [unit]
    if glob.has_magic(path):
        return _matches(path, str(given), notes, reading)
    hint = f"Did you mean the dataset on the Hub? lm tokenize --dataset {quoted(path)}" if path.count("/") == 1 else ""
    raise LmError(f"{shown(path)}: no such file or directory.", hint=hint)


def _matches(path: str, pattern: str, notes: list[str], reading: Reading) -> list[Unit]:
    """Files that match; folders that match are searched, as they are when a shell expands the pattern. What ** goes
    through is walked like a folder: through links, and nothing twice."""
    above, deep, below = pattern.partition("**")
    if deep:
        wanted = re.compile(_expression(below))
        matches = []
        for folder in glob.glob(above or "."):
            walked = _walk(Path(folder)) if os.path.isdir(folder) else _Found([], [], [], 0)
            matches += [p for p in walked.files if wanted.fullmatch("/" + p.relative_to(folder).as_posix())]
            if walked.repeated:
                notes.append(_repeated(Path(folder), walked))
    else:
        matches = [Path(p) for p in glob.glob(pattern)]
    units: list[Unit] = []
    for match in sorted(matches, key=str):
        units.extend(_folder(match, notes, reading) if match.is_dir() else [local_unit(match, reading)])
    if not units:
        raise LmError(f"{shown(path)}: no file matches this pattern.")
    return units


def _expression(below: str) -> str:
    """A regular expression for what follows a ** in a pattern, as it stands in a path behind the folder."""
    parts = ["(?:/[^/]+)*"]
    for part in [part for part in below.split("/") if part] or ["*"]:
        parts.append("(?:/[^/]+)*" if part == "**" else "/(?!\\.)" + fnmatch.translate(part).replace(".*", "[^/]*"))
    return "".join(part.replace("\\Z", "") for part in parts)


def _folder(root: Path, notes: list[str], reading: Reading) -> list[Unit]:
    found = _walk(root)
    if found.repeated:
        notes.append(_repeated(root, found))
    chosen, beside = _choose(root, found, reading)
    if not chosen:
        left = _kinds(found.files, found)
        raise LmError(
            f"{shown(root)}: no text here ({left or 'no files'}; known are {_known_endings()}).",
            hint="To read every file of text as it is, whatever its ending: --format text" if found.files else "",
            code=Exit.DATA,
        )
    if beside:
        notes.append(f"{shown(root)}: {len(beside)} text files beside the JSONL and parquet files are left out.")
    taken = {*chosen, *beside}
    if left := _kinds([p for p in found.files if p not in taken], found):
        notes.append(f"{shown(root)}: left out: {left}.")
    return [local_unit(p, reading) for p in chosen]


def _repeated(root: Path, found: _Found) -> str:
    return (
        f"{shown(root)}: links lead to {len(found.repeated)} folders that are read already (such as "
        f"{shown(found.repeated[0])}); they are read once."
    )


@dataclass
class _Found:
    """What a walk through a folder met."""

    files: list[Path]
    """Regular files, links to them, and links that lead nowhere, in the order of their paths."""
    others: list[Path]
    """Pipes, sockets, devices."""
    repeated: list[Path]
    """Links to folders that are read under another name."""
    hidden: int


def _walk(root: Path) -> _Found:
    """Everything below a folder, folders behind links included; what begins with a dot is counted only. Real folders
    come before linked ones, so that what a link leads to a second time keeps its own name."""
    found = _Found([], [], [], 0)
    home = os.path.realpath(root)
    seen: set[tuple[int, int]] = set()
    links: list[Path] = []

    def enter(top: Path) -> None:
        waiting = [top]
        while waiting:
            folder = waiting.pop()
            try:
                with os.scandir(folder) as entries:
                    for entry in entries:
                        path = folder / entry.name
                        if entry.name.startswith(".") or entry.name == "__pycache__":
                            found.hidden += 1
                        elif entry.is_dir():
                            (links if entry.is_symlink() else waiting).append(path)
                        elif entry.is_file() or entry.is_symlink():
                            found.files.append(path)
                        else:
                            found.others.append(path)
            except OSError as error:
                raise from_os_error(error, shown(error.filename or folder), "read") from error
            seen.add(_identity(folder))

    enter(root)
    while links:
        links.sort()
        link = links.pop(0)
        identity, target = _identity(link), os.path.realpath(link)
        if identity in seen or (home + os.sep).startswith(target.rstrip(os.sep) + os.sep):
            found.repeated.append(link)
            continue
        enter(link)
    found.files.sort(key=lambda p: os.fsencode(p.relative_to(root)))
    return found


def _identity(folder: Path) -> tuple[int, int]:
    try:
        info = os.stat(folder)
    except OSError as error:
        raise from_os_error(error, shown(folder), "read") from error
    return info.st_dev, info.st_ino


def _choose(root: Path, found: _Found, reading: Reading) -> tuple[list[Path], list[Path]]:
    """(files to read, text files that are left out because of them). Without a known ending a file is looked into; it
    counts when it holds records with the text and there are none that say so by their names."""
    if reading.format != "auto":
        return [p for p in found.files if _is_named(p, reading) or _fits(_content(p, reading), reading.format)], []
    known = [p for p in found.files if _format_of(p) is not None]
    for path in known:
        _refuse_dangling(path)
    records = [p for p in known if _format_of(p)[0] in ("jsonl", "parquet")]  # type: ignore[index]
    text = [p for p in known if p not in set(records)]
    if not records:
        unsaid = [p for p in found.files if _format_of(p) is None and _bare_ending(p) in _RECORDS and p.exists()]
        records = [p for p in unsaid if _holds_records(_content(p, reading), reading)]
    return (records, text) if records else (known, [])


def _is_named(path: Path, reading: Reading) -> bool:
    """Whether the name of a file says the format that was asked for."""
    named = _format_of(path)
    return named is not None and named[0] == reading.format


def _fits(content: Content, form: str) -> bool:
    """Whether a file can be read in a format that was asked for."""
    return content.kind == form or (form == "text" and (content.kind == JSONL or content.is_markup))


def _holds_records(content: Content, reading: Reading) -> bool:
    return content.kind in ("parquet", "arrow") or (
        content.kind == JSONL and (reading.column in content.keys or reading.column.partition(".")[0] in content.keys)
    )


def _kinds(files: Sequence[Path], found: _Found) -> str:
    """'3 .csv, 1 without an ending, 2 hidden': files by their endings, the most frequent first."""
    counts = collections.Counter(
        "links that lead nowhere" if not p.exists() else p.suffix.lower() or "without an ending" for p in files
    )
    counts["pipes or devices"] = len(found.others)
    counts["hidden"] = found.hidden
    ordered = sorted((pair for pair in counts.items() if pair[1]), key=lambda pair: (pair[0] == "hidden", -pair[1]))
    more = f" and {len(ordered) - 8} more kinds" if len(ordered) > 8 else ""
    return ", ".join(f"{count:,} {shown(kind)}" for kind, count in ordered[:8]) + more


def local_unit(path: Path, reading: Reading = AUTO) -> Unit:
    """A file on this machine. Raises LmError for what cannot be read (2, 65, 74) and for kinds that are not carried."""
    _refuse_dangling(path)
    try:
        info = os.stat(path)
        if not stat.S_ISREG(info.st_mode):
            raise LmError(f"{shown(path)}: not a regular file.", hint="Pipe what it gives: lm tokenize - < FILE")
        with open(path, "rb") as file:
            head = file.read(HEAD_BYTES)
        content = content_of(head, whole=len(head) == info.st_size, column=reading.column)
        kind, compression = _kind_of(path, content, reading)
        return Unit(os.path.abspath(path), kind, info.st_size, compression, fingerprint(path, info.st_size))
    except OSError as error:
        raise from_os_error(error, shown(path), "read") from error


def _refuse_dangling(path: Path) -> None:
    if os.path.islink(path) and not os.path.exists(path):
        target = os.path.realpath(path)
        raise LmError(f"{shown(path)}: a link to {shown(target)}, which is not there.", code=Exit.DATA)


def _content(path: Path, reading: Reading) -> Content:
    if not path.exists():
        return Content("")
    try:
        with open(path, "rb") as file:
            head = file.read(HEAD_BYTES)
    except OSError as error:
        raise from_os_error(error, shown(path), "read") from error
    return content_of(head, whole=len(head) < HEAD_BYTES, column=reading.column)


_AS_TEXT = "To read it as plain text, as it is: --format text"
_EXTRACT = "Take its text out first, into JSON lines or parquet with one document per record"


def _kind_of(path: Path, content: Content, reading: Reading, url: str = "") -> tuple[Format, str]:
    """(format, compression) of a file: by its content, then by its name; refused by name where neither tells."""
    where, ending = url or shown(path), _bare_ending(path)
    named = ENDINGS.get(ending)
    compression = content.compression
    if not compression and not content.kind and (said := COMPRESSIONS.get(path.suffix.lower())):
        raise LmError(f"{where}: broken {said} data (it does not begin as such).", code=Exit.DATA)
    if reading.format != "auto" or content.kind in ("parquet", "arrow") or named == "parquet":
        asked: Format = reading.format if reading.format != "auto" else "parquet"
        if reading.format == "auto" and content.kind == "arrow":
            asked = "arrow"
        if compression and asked in ("parquet", "arrow"):
            raise LmError(f"{where}: {asked} data compressed once more are not read.", hint="Decompress it first.")
        if content.kind.startswith("UTF-"):
            raise _not_utf8(where, content)
        return asked, compression
    if named == "python":
        return "python", compression
    if content.kind.startswith("UTF-"):
        raise _not_utf8(where, content)
    prose = content.kind in ("", TEXT) or (content.is_markup and "JSON" not in content.kind)
    if named == "text" and (prose or (content.kind == JSONL and ending in (".md", ".rst"))):
        return "text", compression
    if named == "text" and content.kind == JSONL:
        raise LmError(
            f"{where}: named as text, but it holds JSON lines.",
            hint="Say how to read it: --format jsonl (one document per line) or --format text (as it is)",
        )
    if content.kind == JSONL or (named == "jsonl" and prose):
        return "jsonl", compression
    if content.kind == TEXT and not ending:
        return "text", compression
    if content.kind == "one JSON array":
        hint = "Write one object per line, for example with: jq -c '.[]' IN.json > OUT.jsonl"
    elif content.kind.startswith("a JSON object"):
        hint = "Write one object per line, for example with: jq -c . IN.json > OUT.jsonl"
    elif content.is_markup or ending in _MARKUP:
        hint = f"{_EXTRACT}. {_AS_TEXT} (markup included)"
    elif content.kind == TEXT:
        hint = _AS_TEXT
    else:
        hint = f"{_EXTRACT}."
    what = content.kind if content.kind and content.kind != TEXT else f"a {ending} file" if ending in _MARKUP else ""
    said = f"this is {what}, which is not read here" if what else "the kind of this file is not known"
    raise LmError(f"{where}: {said}; known are {_known_endings()}.", hint=hint)


def _not_utf8(where: str, content: Content) -> LmError:
    encoding = content.kind.split()[0]
    return LmError(
        f"{where}: {content.kind}; text must be UTF-8.",
        hint=f"Convert it: iconv -f {encoding} -t UTF-8 IN > OUT",
        code=Exit.DATA,
    )


def _described(unit: Unit, reading: Reading) -> str:
    """'JSON lines, the text under "text"', for a note."""
    packed = f" ({unit.compression})" if unit.compression else ""
    if unit.format in ("text", "python"):
        return f"plain text{packed}"
    names = {"jsonl": "JSON lines", "parquet": "a parquet file", "arrow": "an Arrow file"}
    return f"{names[unit.format]}{packed}, the text in '{reading.column}'"


def _remote(url: str, notes: list[str], reading: Reading) -> list[Unit]:
    """Files behind an fsspec URL: one file, a glob or a folder."""
    from lmcore.data import hub

    return hub.list_url(url, notes, reading)


def _bare_ending(path: Path) -> str:
    """The last ending of a name in lower case, that of a compression apart; none for a number (part.0001)."""
    name = path.name.lower()
    for ending in (*COMPRESSIONS, ".gzip", ".zstd"):
        name = name.removesuffix(ending)
    ending = os.path.splitext(name)[1]
    return "" if ending[1:].isdigit() or not ending[1:] else ending


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


def remote_kind(name: str, head: bytes, reading: Reading) -> tuple[Format, str]:
    """(format, compression) of a file elsewhere whose name does not say it, by its first bytes."""
    content = content_of(head, whole=len(head) < HEAD_BYTES, column=reading.column)
    return _kind_of(Path(name.split("?")[0]), content, reading, name)


def kind_of_stream(head: bytes, reading: Reading) -> tuple[Format, str]:
    """(format, compression) of standard input, by its first bytes (all of them when they are at most HEAD_BYTES)."""
    content = content_of(head[:HEAD_BYTES], whole=len(head) <= HEAD_BYTES, column=reading.column)
    return _kind_of(Path("standard input"), content, reading)


def _known_endings() -> str:
    return " ".join(ENDINGS) + " (text and .jsonl also .gz .zst), and Arrow and JSON lines under any name"


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


def broken_parquet(unit: Unit, error: BaseException) -> LmError:
    """A parquet file that cannot be parsed."""
    return LmError(f"{shown(unit.path)}: not a readable parquet file ({str(error).strip()}).", code=Exit.DATA)


def total_size(units: Iterable[Unit]) -> int:
    """Stored bytes of all units; unknown sizes count as nothing."""
    return sum(max(unit.size, 0) for unit in units)
