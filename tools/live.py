"""What a training run looks like while it runs: one live view on a terminal, one plain line per interval elsewhere."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import ui

if TYPE_CHECKING:
    from lmcore.training.observe import Observer, RunInfo


@contextlib.contextmanager
def watch(*, quiet: bool = False) -> Iterator[Observer]:
    """An Observer for `lmcore.training.loop.train`."""
    if quiet:
        from lmcore.training.observe import SILENT

        yield SILENT
        return
    yield Lines()


class Lines:
    """One line per interval, with a time stamp."""

    def __init__(self) -> None:
        self._pace = Pace()
        self._info: RunInfo | None = None

    def started(self, info: RunInfo) -> None:
        self._info = info
        self._pace.start(info)
        for line in summary(info):
            ui.say(line)

    def phase(self, text: str) -> None:
        if text == "compiling":
            self.note("compiling (Ctrl-C acts once this is over) ...")

    def step(self, record: dict[str, Any]) -> None:
        assert self._info is not None
        self._pace.step(record)
        if record["step"] % self._info.log_every == 0 or record["step"] == self._info.first_step + 1:
            self.note(step_line(record, self._info, self._pace))

    def validated(self, record: dict[str, Any]) -> None:
        self.note(validation_line(record))

    def saved(self, step: int, path: Path, seconds: float) -> None:
        self.note(f"checkpoint {path} ({seconds:.1f} s)")

    def note(self, message: str) -> None:
        ui.say(f"{time.strftime('%H:%M:%S')} {message}")

    def warn(self, message: str) -> None:
        ui.say(f"{time.strftime('%H:%M:%S')} warning: {message}")


class Pace:
    """Smoothed loss, speed and the time that is left."""

    def __init__(self) -> None:
        self.loss: float | None = None
        self.losses: list[float] = []
        self._times: list[float] = []
        self._total = self._left = 0

    def start(self, info: RunInfo) -> None:
        self._total = info.total_steps

    def step(self, record: dict[str, Any]) -> None:
        loss = record["loss"]
        if loss is not None:
            self.loss = loss if self.loss is None else 0.9 * self.loss + 0.1 * loss
            self.losses.append(loss)
        self._times = [*self._times[-49:], record["time"]["step_s"]]
        self._left = self._total - record["step"]

    @property
    def step_s(self) -> float:
        """Median time of the last steps; the first ones are slow and soon forgotten."""
        ordered = sorted(self._times)
        return ordered[len(ordered) // 2] if ordered else 0.0

    @property
    def eta_s(self) -> float:
        return self._left * self.step_s


def summary(info: RunInfo) -> list[str]:
    """The first lines of a run."""
    what = "continues" if info.first_step else "new run"
    ranks = f", {info.world_size} ranks" if info.world_size > 1 else ""
    lines = [
        f"{info.run_dir}: {what}, step {info.first_step:,} of {info.total_steps:,}, "
        f"{ui.short_number(info.total_steps * info.batch_tokens)} tokens "
        f"({info.total_steps * info.batch_tokens / max(info.train_tokens, 1):.1f} epochs of "
        f"{ui.short_number(info.train_tokens)})",
        f"model: {ui.short_number(info.parameters)} parameters, context {info.context_length:,}; "
        f"batch {info.batch_tokens:,} tokens",
        f"machine: {info.device}{ranks}, {info.dtype} ({info.dtype_reason})"
        f"{', torch.compile' if info.compiled else ''}",
    ]
    for row in info.groups:
        lines.append(
            f"  {row['group']:<12} {row['optimizer']:<9} {row['tensors']:>4} tensors "
            f"{ui.short_number(row['parameters']):>8} parameters  lr {row['lr']:<9.3g} "
            f"weight decay {row['weight_decay']:g}"
        )
    return lines


def step_line(record: dict[str, Any], info: RunInfo, pace: Pace) -> str:
    width = len(f"{info.total_steps:,}")
    loss = f"{record['loss']:.4f}" if record["loss"] is not None else "not finite"
    norm = f"{record['grad_norm']:.2f}" if record["grad_norm"] is not None else "not finite"
    return (
        f"step {record['step']:>{width},}/{info.total_steps:,}  loss {loss}  lr {record['lr']:.2e}  grad {norm}  "
        f"{ui.short_number(info.batch_tokens / max(pace.step_s, 1e-9))} tok/s  left {duration(pace.eta_s)}"
    )


def validation_line(record: dict[str, Any]) -> str:
    text = f"validation at step {record['step']:,}: loss {record['loss']:.4f}"
    if record.get("bits_per_byte") is not None:
        text += f", {record['bits_per_byte']:.4f} bits per byte"
    for name, found in record.get("sources", {}).items():
        text += f"; {name} {found['loss']:.4f}"
    return text


def duration(seconds: float) -> str:
    """75 -> '1m15s'."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{rest:02}s" if minutes else f"{rest}s"
