"""The manifest of a shard set or of a view: what the bytes are, and the identity that binds a run to them.

A set's `manifest.json` is written last, so its existence means that the set is complete. A view (`lm split`) has a
manifest of the same form whose shard names are links and whose segments select tokens of them. Everything that defines
the token stream is hashed into `dataset_id`; time, host, worker count, backend and split rule stay outside, so that the
same tokens always have the same identity.

    segments   [[shard index, start, stop], ...]   half-open flat offsets, in stream order, neighbours merged

The stream of a set or view is the concatenation of its segments (stream.py). The format's home is docs/format.md.
"""

from __future__ import annotations

import hashlib
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, ValidationInfo, field_validator, model_validator

from lmcore import storage
from lmcore.config import Config
from lmcore.data.shard import MAX_SEQ_LEN
from lmcore.errors import Exit, LmError, quoted
from lmcore.records import MAX_DEPTH, Count, Recorded, as_record, too_deep

FORMAT = "lmshards/1"
MANIFEST = "manifest.json"
PLAN = "plan.json"
JOURNAL = "journal.jsonl"
TOKENIZER = "tokenizer.json"
MAX_SHARDS = 10_000_000
_READABLE_SEGMENTS = 10_000  # beyond this the manifest is written without line breaks

_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}")
_SHA256 = r"^[0-9a-f]{64}$"
Positive = Annotated[Count, Field(ge=1)]
_Offset = Annotated[int, Field(strict=True, gt=-(1 << 62), lt=1 << 62)]
Id = Annotated[int, Field(strict=True, ge=0, lt=1 << 32)]


class ShardEntry(Config):
    """One shard as the manifest lists it. Names are stems: `NAME.npy` and `NAME.docs.npy`."""

    name: str
    rows: Positive
    n_tokens: Positive
    """True tokens, the pad of the last row excluded."""
    n_docs: Count
    """Documents that start in this shard (0 also when there is no document index)."""
    max_id: Id
    bytes: Positive
    """Size of NAME.npy, header included."""
    sha256: str = Field(pattern=_SHA256)
    docs_sha256: str | None = Field(default=None, pattern=_SHA256)
    """None when the set has no document index (adopted data)."""
    docs_records: Count = 0
    """Records in NAME.docs.npy, a continued piece included."""
    first_doc_offset: Count = 0
    """Tokens of the first document that lie in earlier shards."""

    @field_validator("name")
    @classmethod
    def _plain(cls, name: str) -> str:
        if not _PLAIN_NAME.fullmatch(name):
            raise ValueError("a shard name must be a plain file name")
        return name


class TokenizerEntry(Config):
    """The tokenizer that made the tokens; its exact copy lies beside the manifest."""

    name: str
    sha256: str = Field(pattern=_SHA256)
    """Hash of the canonical tokenizer.json: the identity of the vocabulary."""
    vocab_size: Annotated[int, Field(strict=True, ge=1, le=1 << 32)]
    """Ids are below this, added tokens included."""
    eos_id: Id
    bos_id: Id | None = None
    pad_id: Id | None = None


class _Source(Recorded):
    """What readers use of `source`."""

    kind: str | None = None
    files: list[str] | Count | None = None
    document_hash: str | None = None
    open_end: bool = False


class _Filters(Recorded):
    """What readers use of `filters`."""

    dropped: dict[str, Count] = Field(default_factory=dict)


class _Split(Recorded):
    """What readers use of `split`."""

    by: str | None = None
    parent: str | None = None
    view: str | None = None
    leakage: str | None = None
    fractions: dict[str, float] = Field(default_factory=dict)
    documents: dict[str, Count] = Field(default_factory=dict)
    link: str | None = None


class _Backend(Recorded):
    """What readers use of `backend`."""

    name: str = ""


_NOTES: dict[str, type[Recorded]] = {"source": _Source, "filters": _Filters, "split": _Split, "backend": _Backend}
"""Sections that are kept as they are; what is known of them is checked."""


class Manifest(Config):
    """manifest.json of a set or of a view."""

    format: Literal["lmshards/1"] = "lmshards/1"
    kind: Literal["set", "view"] = "set"
    tokenizer: TokenizerEntry | None = None
    """None for adopted data whose tokenizer is unknown."""
    dtype: Literal["uint16", "uint32"]
    seq_len: Annotated[int, Field(strict=True, ge=1, le=MAX_SEQ_LEN)]
    packing: Literal["stream"] = "stream"
    shards: tuple[ShardEntry, ...] = Field(min_length=1, max_length=MAX_SHARDS)
    segments: tuple[tuple[_Offset, _Offset, _Offset], ...]
    n_tokens: Positive
    n_docs: Count
    n_bytes: Count
    """UTF-8 bytes of the text behind the segments; 0 when unknown."""
    dataset_id: str = Field(pattern=_SHA256)
    source: dict[str, Any] = Field(default_factory=dict)
    """Where the text came from: kind, files or repository and commit, text column."""
    filters: dict[str, Any] = Field(default_factory=dict)
    """Filters and the number of dropped documents by reason."""
    split: dict[str, Any] | None = None
    """Views only: parent dataset_id, rule, fraction, view name, leakage."""
    backend: dict[str, Any] = Field(default_factory=dict)
    created_by: dict[str, Any] = Field(default_factory=dict)
    """Version, time, host: never part of the identity."""

    @field_validator("source", "filters", "split", "backend", "created_by", mode="before")
    @classmethod
    def _known(cls, value: Any, info: ValidationInfo) -> Any:
        if too_deep(value):
            raise ValueError(f"nested more than {MAX_DEPTH} levels deep")
        if isinstance(value, dict) and info.field_name in _NOTES:
            try:
                as_record(_NOTES[info.field_name], value, "")
            except LmError as error:
                raise ValueError(error.message.removeprefix(": ")) from None
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Manifest:
        total = 0
        for shard, start, stop in self.segments:
            if not 0 <= shard < len(self.shards) or not 0 <= start < stop <= self.shards[shard].n_tokens:
                raise ValueError(f"the segment [{shard}, {start}, {stop}] lies outside its shard")
            total += stop - start
        if total != self.n_tokens:
            raise ValueError(f"the segments hold {total:,} tokens, n_tokens says {self.n_tokens:,}")
        if len({shard.name for shard in self.shards}) != len(self.shards):
            raise ValueError("a shard name appears twice")
        for shard_ in self.shards:
            if shard_.n_tokens > shard_.rows * self.seq_len:
                raise ValueError(f"{shard_.name}: more tokens than rows x seq_len")
        return self

    def identity(self) -> str:
        """dataset_id as computed from the content: sha256 over the canonical JSON of what defines the token stream."""
        # Without a dump of the whole: a view may have a million segments.
        return dataset_identity(
            {
                "tokenizer": self.tokenizer.model_dump(mode="json") if self.tokenizer else None,
                "dtype": self.dtype,
                "seq_len": self.seq_len,
                "packing": self.packing,
                "shards": [shard.model_dump(mode="json") for shard in self.shards],
                "segments": self.segments,
            }
        )


def dataset_identity(manifest: dict[str, Any]) -> str:
    """sha256 over the identity part of a manifest (a dict of JSON values)."""
    tokenizer = manifest.get("tokenizer")
    identity = {
        "format": FORMAT,
        "tokenizer": {key: tokenizer[key] for key in ("sha256", "eos_id", "bos_id")} if tokenizer else None,
        "dtype": manifest["dtype"],
        "seq_len": manifest["seq_len"],
        "packing": manifest["packing"],
        "shards": [[s["name"], s["rows"], s["sha256"], s["docs_sha256"]] for s in manifest["shards"]],
        "segments": [list(segment) for segment in manifest["segments"]],
    }
    return hashlib.sha256(storage.canonical_json(identity)).hexdigest()


def make_manifest(**fields: Any) -> Manifest:
    """A Manifest with its dataset_id filled in."""
    draft = Manifest(**fields, dataset_id="0" * 64)
    return Manifest.model_validate(draft.model_dump(mode="json") | {"dataset_id": draft.identity()})


def created_by(command: str) -> dict[str, Any]:
    """Who wrote an artefact: never part of an identity."""
    try:
        number = version("lmshards")
    except PackageNotFoundError:
        number = "unknown"
    return {"name": "lmshards", "version": number, "command": command}


def write_manifest(directory: str | Path, manifest: Manifest) -> None:
    """Commit the manifest: the last write of a set."""
    value = manifest.model_dump(mode="json")
    if len(manifest.segments) <= _READABLE_SEGMENTS:
        storage.write_json(Path(directory) / MANIFEST, value)
    else:  # half the size, and nobody reads so many numbers
        storage.write_file(Path(directory) / MANIFEST, storage.canonical_json(value) + b"\n")


def read_manifest(directory: str | Path) -> Manifest:
    """Read and check a manifest; every fault is an LmError (65) that names the file."""
    path = Path(directory) / MANIFEST
    if not path.is_file():
        raise _missing(Path(directory))
    raw = storage.read_json(path, follow_links=False)
    found = raw.get("format") if isinstance(raw, dict) else None
    if found != FORMAT:
        newer = isinstance(found, str) and found.startswith("lmshards/")
        hint = "Update lmshards to read it." if newer else "Restore the file from a copy, or make the set again."
        shown = repr(found)[:60] if isinstance(found, str) else "not given"
        raise LmError(f"{path}: the format is {shown}; this version reads {FORMAT}.", hint=hint, code=Exit.DATA)
    try:
        manifest = Manifest.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])[:120]
        message = str(first["msg"]).removeprefix("Value error, ")[:300]
        raise LmError(f"{path}: {where + ': ' if where else ''}{message}.", code=Exit.DATA) from None
    if manifest.identity() != manifest.dataset_id:
        raise LmError(f"{path}: the content does not match its dataset_id; the file was edited.", code=Exit.DATA)
    return manifest


def merge_segments(segments: list[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """Join neighbours: [(0, 0, 5), (0, 5, 9)] -> [(0, 0, 9)]; empty ones vanish. The stream stays the same."""
    merged: list[tuple[int, int, int]] = []
    for shard, start, stop in segments:
        if start == stop:
            continue
        if merged and merged[-1][0] == shard and merged[-1][2] == start:
            merged[-1] = (shard, merged[-1][1], stop)
        else:
            merged.append((shard, start, stop))
    return merged


def _missing(directory: Path) -> LmError:
    if not directory.exists():
        return LmError(f"{directory}: no such shard set.", hint="Make one with: lm tokenize --dataset stdlib")
    if (directory / PLAN).is_file():
        return LmError(
            f"{directory}: this shard set is not finished (no manifest.json yet).",
            hint="Run the same 'lm tokenize' command again to finish it.",
            code=Exit.DATA,
        )
    return LmError(
        f"{directory}: no manifest.json here, so this is not a shard set.",
        hint=f"Adopt a folder of .npy files with: lm import {quoted(directory)} --out shards/NAME",
        code=Exit.DATA,
    )
