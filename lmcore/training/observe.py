"""What a run tells whoever watches: the console, a live view, a test. The loop calls an `Observer`; it never prints."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True)
class RunInfo:
    """What is known before the first step."""

    run_dir: Path
    total_steps: int
    first_step: int
    """Steps that were done before (0 for a new run)."""
    batch_tokens: int
    context_length: int
    device: str
    dtype: str
    dtype_reason: str
    compiled: bool
    world_size: int
    parameters: int
    active_parameters: int
    peak_flops: float
    """Of all ranks together; 0 when unknown."""
    peak_source: str
    train_flops: float
    """Operations of forward and backward per token."""
    train_tokens: int
    """Tokens of the training data."""
    groups: list[dict[str, Any]]
    """Rows of the optimizer's table."""
    lines: list[str] = field(default_factory=list)
    """The summary in words, for consoles."""
    log_every: int = 10


class Observer(Protocol):
    """Receives the events of a run, on the main rank only."""

    def started(self, info: RunInfo) -> None:
        """The model is built; the first step comes next."""

    def phase(self, text: str) -> None:
        """Something that takes time begins (compiling, validating, saving); "" when it is over."""

    def step(self, record: dict[str, Any]) -> None:
        """A step is done. The record is the line of metrics.jsonl."""

    def validated(self, record: dict[str, Any]) -> None:
        """A validation is done."""

    def saved(self, step: int, path: Path, seconds: float) -> None:
        """A checkpoint is on disk and verified."""

    def note(self, message: str) -> None:
        """Something worth a line."""

    def warn(self, message: str) -> None:
        """Something survived that the user should know."""


class Silent:
    """The Observer of a caller that does not listen."""

    def started(self, info: RunInfo) -> None: ...

    def phase(self, text: str) -> None: ...

    def step(self, record: dict[str, Any]) -> None: ...

    def validated(self, record: dict[str, Any]) -> None: ...

    def saved(self, step: int, path: Path, seconds: float) -> None: ...

    def note(self, message: str) -> None: ...

    def warn(self, message: str) -> None: ...


SILENT = Silent()
