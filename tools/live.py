"""What a training run looks like while it runs: one live view on a terminal, one plain line per interval elsewhere."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import ui

if TYPE_CHECKING:
    from lmcore.training.observe import Observer, RunInfo


@contextlib.contextmanager
def watch(*, quiet: bool = False) -> Iterator[Observer]:
    """An Observer for `lmcore.training.loop.train`: a live view on a terminal, lines elsewhere, silence if quiet."""
    if quiet:
        from lmcore.training.observe import SILENT

        yield SILENT
    elif sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
        view = View()
        try:
            yield view
        finally:
            view.close()
    else:
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


class View:
    """One live panel: where the run stands, how it goes, what it costs. Notes and warnings scroll above it."""

    REFRESH_S = 0.25

    def __init__(self) -> None:
        from rich.live import Live

        self._pace = Pace()
        self._info: RunInfo | None = None
        self._record: dict[str, Any] = {}
        self._validation = self._checkpoint = ""
        self._phase = ""
        self._drawn = 0.0
        self._console = ui.stderr()
        self._live = Live(console=self._console, auto_refresh=False, transient=False)

    def started(self, info: RunInfo) -> None:
        self._info = info
        self._pace.start(info)
        for line in summary(info):
            self.note(line)
        self._live.start()

    def close(self) -> None:
        if self._live.is_started:
            self._phase = ""
            self._draw(now=True)
            self._live.stop()

    def phase(self, text: str) -> None:
        self._phase = text
        self._draw(now=True)

    def step(self, record: dict[str, Any]) -> None:
        self._pace.step(record)
        self._record = record
        self._draw()

    def validated(self, record: dict[str, Any]) -> None:
        self._validation = validation_line(record)
        self._draw(now=True)

    def saved(self, step: int, path: Path, seconds: float) -> None:
        self._checkpoint = f"{path.name} ({seconds:.1f} s)"
        self._draw(now=True)

    def note(self, message: str) -> None:
        self._console.print(ui.plain(message), markup=False, soft_wrap=True)

    def warn(self, message: str) -> None:
        self._console.print(f"warning: {ui.plain(message)}", style="yellow", markup=False, soft_wrap=True)

    def _draw(self, now: bool = False) -> None:
        if self._info is None or not self._live.is_started:
            return
        if now or time.monotonic() - self._drawn >= self.REFRESH_S:
            self._drawn = time.monotonic()
            self._live.update(self.render(), refresh=True)

    def render(self) -> Any:
        """The panel as a Rich renderable."""
        from rich import box
        from rich.panel import Panel
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        assert self._info is not None
        info, record, pace = self._info, self._record, self._pace
        done = record.get("step", info.first_step)
        grid = Table.grid(padding=(0, 2))
        grid.add_column(style="dim", justify="right")
        grid.add_column()
        head = Table.grid(padding=(0, 2))
        head.add_row(
            Text(f"{done:,} / {info.total_steps:,}", style="bold"),
            ProgressBar(total=info.total_steps, completed=done, width=40),
            Text(f"left {duration(pace.eta_s)}" if record else "starting"),
            Text(self._phase, style="yellow"),
        )
        grid.add_row("step", head)
        for name, text in figures(record, info, pace):
            grid.add_row(name, Text(ui.plain(text)))
        if self._validation:
            grid.add_row("validation", Text(ui.plain(self._validation.removeprefix("validation "))))
        if self._checkpoint:
            grid.add_row("checkpoint", Text(ui.plain(self._checkpoint)))
        return Panel(grid, title=Text(ui.plain(str(info.run_dir))), box=box.ROUNDED, title_align="left", expand=False)


def figures(record: dict[str, Any], info: RunInfo, pace: Pace) -> list[tuple[str, str]]:
    """(name, text) of each line of the live view."""
    if not record:
        return []
    times = record["time"]
    loss = "not finite" if record["loss"] is None else f"{record['loss']:.4f}"
    smooth = "" if pace.loss is None else f"   smoothed {pace.loss:.4f}"
    norm = "not finite" if record["grad_norm"] is None else f"{record['grad_norm']:.3f}"
    groups = "   ".join(
        f"{name} {value:.3g}" for name, value in record.get("grad_norms", {}).items() if value is not None
    )
    speed = (
        f"{ui.short_number(info.batch_tokens / max(pace.step_s, 1e-9))} tokens/s   {1000 * pace.step_s:,.0f} ms/step"
    )
    if times.get("mfu"):
        speed += f"   MFU {100 * times['mfu']:.0f} % of {info.peak_flops / 1e12:.3g} TFLOP/s ({info.peak_source})"
    epoch = f"epoch {record['epoch']:.2f}   " if "epoch" in record else ""
    lines = [
        ("loss", f"{loss}{smooth}   {sparkline(pace.losses)}"),
        ("lr", f"{record['lr']:.3e}   {epoch}{ui.short_number(record['tokens'])} tokens"),
        ("gradient", f"{norm}   {groups}"),
        ("speed", speed),
        (
            "waiting",
            f"data {100 * times['data_wait_s'] / max(times['step_s'], 1e-9):.1f} %   "
            f"memory {times['peak_bytes'] / 2**30:.2f} GiB",
        ),
    ]
    if "text" in times:
        told = times["text"]
        rate = f"{ui.short_number(told['tokens_per_s'])} tokens/s   {told['text_mb_per_s']:,.1f} MB/s"
        lines.append(("tokenizing", f"{rate} while waited for ({told['wait_s']:,.1f} s so far)"))
    if "shares" in record:
        taken = (f"{n} {100 * share:.1f} % ({record['epochs'][n]:.2f} epochs)" for n, share in record["shares"].items())
        lines.append(("sources", "   ".join(taken)))
    dead = record.get("metrics", {}).get("router/dead")
    if dead:
        entropy = record["metrics"].get("router/entropy", [])
        lines.append(
            ("experts", f"evenness {min(entropy):.2f} to {max(entropy):.2f}   dead {100 * max(dead):.0f} % at worst")
        )
    return lines


def sparkline(values: list[float], width: int = 32) -> str:
    """The course of some values in `width` characters, low to high; each character is a mean."""
    if len(values) < 2:
        return ""
    size = max(1, -(-len(values) // width))
    means = [sum(values[i : i + size]) / len(values[i : i + size]) for i in range(0, len(values), size)]
    low, high = min(means), max(means)
    marks = "\u2581\u2582\u2583\u2584\u2585\u2586\u2587\u2588"
    return "".join(marks[int((len(marks) - 1) * (value - low) / ((high - low) or 1))] for value in means)


class Pace:
    """Smoothed loss, speed and the time that is left. Its size and the cost of a step do not grow with the run."""

    MOST = 1024

    def __init__(self) -> None:
        self.loss: float | None = None
        self.losses: list[float] = []
        """The course of the loss: means over equally many steps each."""
        self._each = 1
        self._pending: list[float] = []
        self._times: list[float] = []
        self._total = self._left = 0

    def start(self, info: RunInfo) -> None:
        self._total = info.total_steps

    def step(self, record: dict[str, Any]) -> None:
        loss = record["loss"]
        if loss is not None:
            self.loss = loss if self.loss is None else 0.9 * self.loss + 0.1 * loss
            self._pending.append(loss)
            if len(self._pending) == self._each:
                self.losses.append(sum(self._pending) / self._each)
                self._pending = []
            if len(self.losses) == self.MOST:
                self.losses = [(a + b) / 2 for a, b in zip(self.losses[::2], self.losses[1::2], strict=True)]
                self._each *= 2
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
        + (
            f"({info.total_steps * info.batch_tokens / info.train_tokens:.1f} epochs of "
            f"{ui.short_number(info.train_tokens)})"
            if info.train_tokens
            else "from text, tokenized on the way"
        ),
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
    told = record["time"].get("text")
    text = f" (text {ui.short_number(told['tokens_per_s'])} tok/s)" if told else ""
    return (
        f"step {record['step']:>{width},}/{info.total_steps:,}  loss {loss}  lr {record['lr']:.2e}  grad {norm}  "
        f"{ui.short_number(info.batch_tokens / max(pace.step_s, 1e-9))} tok/s{text}  left {duration(pace.eta_s)}"
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
