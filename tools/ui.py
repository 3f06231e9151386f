"""The console: stdout is data, stderr is talk.

On a terminal there are Rich tables, colours and progress bars; elsewhere plain lines. `--json` prints exactly one JSON
document on stdout. Text that comes from files (names, documents, errors about them) is escaped before it reaches a
terminal, so that data cannot drive it.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import signal
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

    from lmcore.progress import Progress

# ---------------------------------------------------------------------------------------- shared options

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.", rich_help_panel="Output")]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        "-s",
        metavar="KEY=VALUE",
        help="Any setting, such as --set model.num_layers=6; may be given several times.",
        rich_help_panel="Run",
        show_default=False,
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.", rich_help_panel="Output")]

# ---------------------------------------------------------------------------------------- streams


class _Descriptor(io.FileIO):
    """A standard descriptor whose reader may leave: what is written then goes nowhere, and the command goes on."""

    broken = False

    def write(self, data: Any) -> int:
        try:
            return super().write(data) or 0
        except OSError as error:  # a full disk is said once, by whoever catches it
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
            if not isinstance(error, BrokenPipeError):
                raise
            self.broken = True
            return len(data)


def open_streams() -> None:
    """Make stdout and stderr take any text in any locale, closed or not: what their encoding lacks is escaped.

    Done once, at the entry of the program; a test that calls `main` has streams of its own.
    """
    for number, name in ((1, "stdout"), (2, "stderr")):
        before = getattr(sys, name)  # None when it was closed
        stream = io.TextIOWrapper(
            io.BufferedWriter(_Descriptor(number, "w", closefd=False)),
            encoding=before.encoding if before is not None else "utf-8",
            errors="backslashreplace",
            line_buffering=before is not None and before.line_buffering,
        )
        setattr(sys, name, stream)
    if sys.stdin is None:
        sys.stdin = open(os.devnull)


def typed_text(argument: str) -> str:
    """Text of the command line as the person meant it. Where the locale knows no such characters, Python hands over
    their bytes as halves of surrogate pairs."""
    return os.fsencode(argument).decode(errors="replace") if _SURROGATE.search(argument) else argument


_SURROGATE = re.compile("[\ud800-\udfff]")

# ---------------------------------------------------------------------------------------- writing


def stderr() -> Console:
    """The console for talk. Made on demand: importing Rich costs time that `--help` does not have."""
    from rich.console import Console

    return Console(stderr=True, highlight=False)


def plain(text: str) -> str:
    """Escape control characters (newlines and tabs excepted), so that text from data cannot drive a terminal."""
    return "".join(
        c if c in "\n\t" or (c.isprintable() and not 0x7F <= ord(c) < 0xA0) else f"\\x{ord(c):02x}" for c in text
    )


def emit_json(document: Any) -> None:
    """Print the one JSON document of a `--json` command."""
    text = json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False, default=str)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:  # escaped by the rules of JSON
        text = json.dumps(document, indent=1, allow_nan=False, default=str)
    _write(text + "\n")


def emit(text: str = "") -> None:
    """Print a line of data on stdout."""
    _write((plain(text) if sys.stdout.isatty() else text) + "\n")


def emit_piece(text: str) -> None:
    """Print a piece of a line of data at once: text that streams."""
    _write(plain(text) if sys.stdout.isatty() else text)
    if getattr(getattr(getattr(sys.stdout, "buffer", None), "raw", None), "broken", False):
        sys.exit(0)  # `lm generate ... | head -1`: nobody reads the rest


def _write(text: str) -> None:
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:  # here and not in `main`: Typer would make an exit status of 1 of it
        leave_quietly_on_closed_pipe()


def say(text: str) -> None:
    """Print a line of talk on stderr."""
    sys.stderr.write(plain(text) + "\n")
    sys.stderr.flush()


def print_error(message: str, hint: str = "") -> None:
    """An error as people see it: `error: what is wrong`, then the next step on its own line."""
    colour = sys.stderr.isatty() and "NO_COLOR" not in os.environ
    red, reset = ("\033[1;31m", "\033[0m") if colour else ("", "")
    sys.stderr.write(f"{red}error:{reset} {plain(message)}\n")
    if hint:
        sys.stderr.write(f"  {plain(hint)}\n")
    sys.stderr.flush()


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]], *, title: str = "", right: Sequence[str] = ()) -> None:
    """Print a table on stdout; the columns named in `right` are right-aligned (numbers)."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    drawn = Table(title=title or None, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        drawn.add_column(column, justify="right" if column in right else "left", overflow="fold")
    for row in rows:
        drawn.add_row(*(Text(plain(str(cell))) for cell in row))
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 140)
    console.print(drawn)


# ---------------------------------------------------------------------------------------- progress


@contextlib.contextmanager
def progress(quiet: bool = False) -> Iterator[Progress]:
    """A Progress for the library: a bar on a terminal, a plain line every few seconds elsewhere, silence if quiet."""
    if quiet:
        from lmcore.progress import SILENT

        yield SILENT
    elif sys.stderr.isatty():
        bar = _Bar()
        try:
            yield bar
        finally:
            bar.finish()
    else:
        yield _Lines()


class _Lines:
    """Plain lines with a time stamp, at most one every five seconds per phase."""

    EVERY_S = 5.0

    def start(self, task: str, total: float | None, unit: str) -> None:
        self.task, self.total, self.unit, self.done = task, total, unit, 0.0
        self.began = self.told = time.monotonic()

    def advance(self, amount: float) -> None:
        self.done += amount
        now = time.monotonic()
        if now - self.told >= self.EVERY_S:
            self.told = now
            share = f" ({100 * self.done / self.total:.0f} %)" if self.total else ""
            rate = self.done / max(now - self.began, 1e-9)
            self.note(f"{self.task}: {_amount(self.done, self.unit)}{share}, {_amount(rate, self.unit)}/s")

    def finish(self) -> None: ...

    def note(self, message: str) -> None:
        say(f"{time.strftime('%H:%M:%S')} {message}")

    def warn(self, message: str) -> None:
        say(f"{time.strftime('%H:%M:%S')} warning: {message}")


class _Bar:
    """A Rich progress bar on stderr."""

    def __init__(self) -> None:
        self._console = stderr()
        self._progress: RichProgress | None = None
        self._task: TaskID | None = None
        self._unit = ""

    def start(self, task: str, total: float | None, unit: str) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self.finish()
        self._unit = unit
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[status]}"),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
        )
        self._progress.start()
        self._task = self._progress.add_task(plain(task), total=total, status="")

    def advance(self, amount: float) -> None:
        if self._progress is None or self._task is None:
            return
        self._progress.advance(self._task, amount)
        state = self._progress.tasks[0]
        speed = f"{_amount(state.speed, self._unit)}/s" if state.speed else ""
        self._progress.update(self._task, status=f"{_amount(state.completed, self._unit)} {speed}")

    def finish(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = self._task = None

    def note(self, message: str) -> None:
        self._console.print(plain(message), markup=False)

    def warn(self, message: str) -> None:
        self._console.print(f"warning: {plain(message)}", style="yellow", markup=False)


def _amount(value: float, unit: str) -> str:
    if unit == "bytes":
        from lmcore.storage import format_bytes

        return format_bytes(value)
    return f"{short_number(value)} {unit}"


def short_number(value: float) -> str:
    """12345678 -> '12.3M'."""
    for limit, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= limit:
            return f"{value / (1e3 if suffix == 'k' else limit):.1f}{suffix}"
    return f"{value:,.0f}"


# ---------------------------------------------------------------------------------------- leaving


def leave_quietly_on_closed_pipe() -> None:
    """`lm ... | head -1` is not an error: point stdout at nothing and end with 0."""
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(0)


def die_by_signal(number: int) -> None:
    """End as the signal would have ended us, so that shells and schedulers see the truth (130, 143)."""
    sys.stdout.flush()
    sys.stderr.flush()
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    time.sleep(5)
    sys.exit(128 + number)
