"""lmshards.json, which an export tells its origin with: written by export.py, read here, checked, by all who ask."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from lmcore import storage
from lmcore.config import build
from lmcore.errors import Exit, LmError

FORMAT = "lmshards-export/1"
PROVENANCE = "lmshards.json"
_MOST_BYTES = 16 << 20

Count = Annotated[int, Field(ge=0, lt=1 << 63)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Recorded(BaseModel):
    """Base of what is read back from a record: strict types, further keys are left alone."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True, allow_inf_nan=False)


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
    checkpoints: list[CheckpointRecord] = []
    data: list[DataRecord] = []
    files: dict[str, FileRecord] = {}


R = TypeVar("R", bound=Recorded)


def read_provenance(path: Path) -> Provenance:
    """Raises LmError (65) when the file is no such record."""
    return as_record(Provenance, storage.read_json(path, limit=_MOST_BYTES), str(path))


def as_record(model: type[R], value: Any, where: str) -> R:
    """A value that was read, as what it should be; LmError (65) in one sentence when it is not."""
    if not isinstance(value, dict):
        raise LmError(f"{where}: an object is expected.", code=Exit.DATA)
    try:
        return build(model, value)
    except LmError as error:
        raise LmError(f"{where}: {error.message.splitlines()[0]}", code=Exit.DATA) from error
