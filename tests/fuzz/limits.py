"""What reading a damaged file may take: five seconds and 500 MB."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SECONDS, BYTES = 5, 500 << 20


class OutOfTime(BaseException):
    """No reader may catch it."""


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """Raises OutOfTime after five seconds, AssertionError when more than 500 MB were added at any moment."""
    before = _memory("VmRSS") if _reset_peak() else None

    def stop(number: int, frame: Any) -> None:
        raise OutOfTime(f"more than {SECONDS} s")

    assert threading.current_thread() is threading.main_thread()
    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
    if before is not None:
        added = _memory("VmHWM") - before
        assert added < BYTES, f"{added >> 20} MB of memory"


def _reset_peak() -> bool:
    """Begin the high-water mark of this process anew; False where the system cannot."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _memory(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) << 10
    return 0
