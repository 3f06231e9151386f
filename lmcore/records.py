"""What is read back from JSON files: each kind is a typed record, checked as a whole before anything looks at it.

A record is a pydantic model over `Recorded`. Who owns a kind of file owns its record and the one function that reads it
(`read_record`); behind that there are no unchecked values. Configurations, which people write, are lmcore/config.py's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from lmcore import storage
from lmcore.config import build
from lmcore.errors import Exit, LmError

Count = Annotated[int, Field(strict=True, ge=0, lt=1 << 62)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Scalar = str | int | float | bool | None
MAX_DEPTH = 20


class Recorded(BaseModel):
    """Base of what is read back from a record: strict types, further keys are left alone."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True, allow_inf_nan=False)


R = TypeVar("R", bound=Recorded)


def read_record(model: type[R], path: Path, *, limit: int = 64 << 20, follow_links: bool = True) -> R:
    """The record in a JSON file of at most `limit` bytes. Raises LmError (65) when it is no such record."""
    return as_record(model, storage.read_json(path, limit=limit, follow_links=follow_links), str(path))


def as_record(model: type[R], value: Any, where: str) -> R:
    """A value that was read, as what it should be; LmError (65) in one sentence when it is not."""
    if not isinstance(value, dict):
        raise LmError(f"{where}: an object is expected.", code=Exit.DATA)
    if too_deep(value):
        raise LmError(f"{where}: nested more than {MAX_DEPTH} levels deep.", code=Exit.DATA)
    try:
        return build(model, value)
    except LmError as error:
        raise LmError(f"{where}: {error.message.splitlines()[0]}", code=Exit.DATA) from error


def too_deep(value: Any, most: int = MAX_DEPTH) -> bool:
    """Whether lists and objects lie more than `most` levels inside of each other."""
    layer, depth = [value], 0
    while layer:
        depth += 1
        if depth > most:
            return True
        inner = [item.values() if isinstance(item, dict) else item for item in layer if isinstance(item, dict | list)]
        layer = [item for items in inner for item in items]
    return False


__all__ = ["MAX_DEPTH", "Count", "Recorded", "Scalar", "Sha256", "as_record", "read_record", "too_deep"]
