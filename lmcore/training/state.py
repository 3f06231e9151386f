"""state.json of a checkpoint: where a run stands, beside its weights and the optimizer's state.

    read_state(folder) -> RunState        checked as a whole; the only way in for every reader
    RunState(...).to_json()               what the loop, and an import, write

Keys that a reader does not know are kept. Everything but the step may be absent: imported models have no guard, and
runs of earlier versions did not record all of it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field

from lmcore.data.streaming import StreamPlace
from lmcore.errors import Exit, LmError
from lmcore.records import Count, Recorded, Scalar, Sha256, read_record
from lmcore.training import checkpoint
from lmcore.training.guards import GuardState, ScaleState

Id = Annotated[int, Field(ge=0, lt=1 << 32)]


class SourceState(Recorded):
    """A set that the run was trained on, or is validated on."""

    path: str = ""
    weight: float = Field(default=1.0, gt=0, le=1e30)
    dataset_id: str | None = None


class SourceLoss(Recorded):
    """Validation loss on one of several sets."""

    loss: float | None = None
    bits_per_byte: float | None = None


class Validation(Recorded):
    """The last validation."""

    loss: float | None = None
    bits_per_byte: float | None = None
    sources: dict[str, SourceLoss] | None = None


class ImportedFrom(Recorded):
    """The model of another program that the run began as."""

    path: str = ""
    family: str | None = None
    config_sha256: Sha256 | None = None
    weights: dict[str, Sha256] = Field(default_factory=dict)


class RunState(Recorded):
    """The content of state.json."""

    model_config = ConfigDict(extra="allow")

    step: Count
    samples: Count | None = None
    tokens: Count | None = None
    optimizer: str | None = None
    """Fingerprint of the optimizer's groups."""
    guard: GuardState = GuardState()
    loss_scale: ScaleState | None = None
    rollbacks: Count = 0
    eager: bool = False
    """Whether the run goes on without the compiler, which was found wrong."""
    validation: Validation | None = None
    validated_at: int | None = Field(default=None, ge=-1, lt=1 << 62)
    fingerprint: dict[str, Scalar] = Field(default_factory=dict)
    """What the bits of a run depend on beside its configuration."""
    world_size: Count | None = None
    source_state: StreamPlace | None = None
    """Where a run on text starts reading again."""
    opening: list[Id] | None = None
    """Ids in front of every document; None where that was not recorded."""
    dataset_id: str | None = None
    sources: list[SourceState] = Field(default_factory=list)
    val: list[SourceState] = Field(default_factory=list)
    tokenizer_sha256: str | None = None
    imported_from: ImportedFrom | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values, as they were given or read."""
        return self.model_dump(mode="json", exclude_unset=True)

    @property
    def validated(self) -> bool:
        """Whether the last validation saw these weights (older runs do not say, and saved behind it)."""
        return self.validated_at is None or self.validated_at >= self.step

    @property
    def results(self) -> dict[str, Any]:
        """The last validation as plain values."""
        return self.to_json().get("validation") or {}


def read_state(folder: Path) -> RunState:
    """The state in a checkpoint. Raises LmError (65) when it is none, or that of another step."""
    path = folder / checkpoint.STATE
    state = read_record(RunState, path, follow_links=False)
    if checkpoint.step_of(folder) not in (None, state.step):
        raise LmError(f"{path}: the state of step {state.step:,} in a checkpoint of another one.", code=Exit.DATA)
    return state
