"""lmshards.json, which an export tells its origin with: written by export.py, read here, checked, by all who ask."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from lmcore.records import Count, Recorded, Sha256, read_record

FORMAT = "lmshards-export/1"
PROVENANCE = "lmshards.json"
_MOST_BYTES = 16 << 20


class FileRecord(Recorded):
    """A file beside the record."""

    bytes: Count
    sha256: Sha256


class CheckpointRecord(Recorded):
    """A checkpoint behind the weights."""

    path: str = ""
    step: Count | None = None
    id: str | None = None


class DataRecord(Recorded):
    """A set that the model was trained on."""

    path: str = ""
    weight: float = 1.0
    dataset_id: str | None = None


class Provenance(Recorded):
    """What an export says of itself."""

    family: str | None = None
    dtype: str | None = None
    step: Count | None = None
    tokens: Count | None = None
    checkpoints: list[CheckpointRecord] = Field(default_factory=list)
    data: list[DataRecord] = Field(default_factory=list)
    files: dict[str, FileRecord] = Field(default_factory=dict)


def read_provenance(path: Path) -> Provenance:
    """Raises LmError (65) when the file is no such record."""
    return read_record(Provenance, path, limit=_MOST_BYTES)
