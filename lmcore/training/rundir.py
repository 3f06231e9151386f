"""The run directory: one configuration, one log, its checkpoints, one process at a time.

    runs/NAME/
      config.yaml        the resolved configuration, written once; what was overridden later is in run.jsonl
      tokenizer.json     exact copy of the tokenizer of the data
      metrics.jsonl      one line per step, plus one per validation; cut back to the checkpoint when a run is continued
      run.jsonl          what happened: starts, resumes with what changed, signals, skipped steps, rollbacks
      checkpoints/       see checkpoint.py

The directory is locked (flock) while a run writes; a second one is refused with 75.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from pydantic import Field

from lmcore import storage
from lmcore.errors import Exit, LmError, from_os_error
from lmcore.records import Count, Recorded, Sha256, as_record
from lmcore.training import checkpoint
from lmcore.training.config import RunConfig, read_run_config

CONFIG, TOKENIZER, METRICS, EVENTS = "config.yaml", "tokenizer.json", "metrics.jsonl", "run.jsonl"


class Length(Recorded):
    """A length that was given in hours, and what it was on that machine."""

    hours: float
    tokens: int = Field(ge=1, lt=1 << 62)


class FirstWeights(Recorded):
    """The checkpoint that a run began with."""

    checkpoint: str
    model_sha256: Sha256


class Start(Recorded):
    """The event that says how a run began."""

    length: Length | None = None
    weights: FirstWeights | None = None


class StepTime(Recorded):
    """What a step cost."""

    step_s: float = Field(ge=0)
    tokens_per_s: float = Field(ge=0)
    peak_bytes: int | None = None


class TrainingLine(Recorded):
    """What readers use of a step's line in metrics.jsonl. The loss is None where it was not finite."""

    step: Count
    tokens: Count
    loss: float | None
    lr: float
    time: StepTime


class ValidationLine(Recorded):
    """What readers use of a validation's line in metrics.jsonl."""

    step: Count
    loss: float | None
    bits_per_byte: float | None = None


_LINES: dict[str, type[Recorded]] = {"train": TrainingLine, "val": ValidationLine}


class RunDirectory:
    """The files of one run. Open with `opened`, which holds the lock."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.checkpoints = self.path / checkpoint.CHECKPOINTS
        self._metrics: IO[bytes] | None = None

    # ------------------------------------------------------------------------------------ configuration

    def config(self) -> RunConfig | None:
        """The configuration of an existing run, None for a new directory."""
        path = self.path / CONFIG
        return read_run_config(path) if path.is_file() else None

    def create(self, config: RunConfig, tokenizer: bytes | None) -> None:
        """Write what a new run needs; config.yaml last, since it makes the directory a run."""
        storage.make_directory(self.checkpoints)
        if tokenizer is not None:
            storage.write_file(self.path / TOKENIZER, tokenizer)
        self.write_config(config)

    def write_config(self, config: RunConfig) -> None:
        """Replace config.yaml (a run that is continued with other settings)."""
        storage.write_file(self.path / CONFIG, config.to_yaml().encode())

    # ------------------------------------------------------------------------------------ logs

    def event(self, kind: str, **fields: Any) -> None:
        """Append to run.jsonl, durably."""
        storage.append_json_line(
            self.path / EVENTS, {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "event": kind, **fields}
        )

    def events(self) -> list[dict[str, Any]]:
        """All events so far."""
        return storage.read_json_lines(self.path / EVENTS)

    def log(self, record: Mapping[str, Any]) -> None:
        """Append a line to metrics.jsonl. It is durable after the next `flush`, which a checkpoint waits for."""
        if self._metrics is None:
            try:
                self._metrics = open(self.path / METRICS, "ab", buffering=0)
            except OSError as error:
                raise from_os_error(error, self.path / METRICS, "write") from error
        line = json.dumps(record, separators=(",", ":"), allow_nan=False).encode() + b"\n"
        try:
            if self._metrics.write(line) != len(line):
                raise LmError(f"{self.path / METRICS}: the disk is full.", code=Exit.IO)
        except OSError as error:
            raise from_os_error(error, self.path / METRICS, "write") from error

    def flush(self) -> None:
        """Make metrics.jsonl durable."""
        if self._metrics is not None:
            try:
                os.fsync(self._metrics.fileno())
            except OSError as error:
                raise from_os_error(error, self.path / METRICS, "write") from error

    def cut_metrics(self, step: int) -> None:
        """Drop the lines of steps after `step`, and a torn last line: the run continues from there."""
        path = self.path / METRICS
        if not path.is_file():
            return
        self.close()
        raw = path.read_bytes()
        lines = raw.split(b"\n")[:-1]
        kept = [line for line in lines if _is_up_to(line, step)]
        if len(kept) != len(lines) or not raw.endswith(b"\n"):
            storage.write_file(path, b"".join(line + b"\n" for line in kept))

    def metrics(self) -> list[dict[str, Any]]:
        """All lines of metrics.jsonl."""
        return read_metrics(self.path)

    def close(self) -> None:
        """Close the log."""
        if self._metrics is not None:
            self._metrics.close()
            self._metrics = None


@contextlib.contextmanager
def opened(path: str | os.PathLike[str], *, lock: bool = True) -> Iterator[RunDirectory]:
    """A run directory for writing: locked, and swept of what a crashed run left behind."""
    run = RunDirectory(path)
    with contextlib.ExitStack() as stack:
        if lock:
            stack.enter_context(storage.lock_directory(run.path, "lm train"))
            for folder in (run.path, run.checkpoints):
                if folder.is_dir():
                    storage.sweep(folder)
        stack.callback(run.close)
        yield run


def read_metrics(run: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl, each checked; a torn last line is left out, as are lines of other kinds."""
    path = Path(run) / METRICS
    lines = []
    for number, line in enumerate(storage.read_json_lines(path), 1):
        kind = line.get("kind")
        if isinstance(kind, str) and kind in _LINES:
            as_record(_LINES[kind], line, f"{path}:{number}")
            lines.append(line)
    return lines


def read_start(run: str | os.PathLike[str]) -> Start:
    """How a run began, as its run.jsonl tells."""
    path = Path(run) / EVENTS
    events = storage.read_json_lines(path)
    last: dict[str, Any] = next((event for event in reversed(events) if event.get("event") == "start"), {})
    return as_record(Start, last, f"{path}: the event 'start'")


def _is_up_to(line: bytes, last: int) -> bool:
    value = storage.json_line(line)
    step = value.get("step") if value is not None else None
    return isinstance(step, int) and step <= last
