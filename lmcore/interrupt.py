"""SIGINT, SIGTERM and SIGUSR1 from the first line of the program on: one sentence, and an exit code that says the same.

Commands that have something to finish first (a step and its checkpoint, a shard) take the signals over meanwhile. Here
the process ends at once, not by an exception: one that is raised wherever the program happens to be is lost in a
destructor, and comes out of an import as a traceback. Nothing on disk can suffer (lmcore/storage.py).

This module is imported before everything else, so it imports nothing that takes time.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
import threading
import time
from types import FrameType

CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGUSR1: 75}
GRACE_S = 2.0
"""How long the main thread may be out of reach, inside of a library that was not written in Python."""
_answered = 0.0


def install() -> None:
    """Answer the signals of this process, unless it was started to ignore them. In the main thread only."""
    for number in CODES:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, leave)
    atexit.register(_let_finish)
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(reader,), name="interrupt", daemon=True).start()


def answered() -> None:
    """For handlers that stand in the place of `leave` for a while: the signal has come to somebody."""
    global _answered
    _answered = time.monotonic()


def leave(number: int, _frame: FrameType | None = None) -> None:
    """The signal handler: does not return."""
    for other in CODES:
        signal.signal(other, signal.SIG_IGN)
    _end(number)


def _end(number: int) -> None:
    if os.environ.get("RANK", "0") == "0":  # of several ranks the main one speaks
        clear = "\r\x1b[?25h\x1b[K" if _is_terminal() else ""  # a progress bar has hidden the cursor
        with contextlib.suppress(OSError):
            os.write(
                2, f"{clear}stopped by {signal.Signals(number).name}; nothing that was committed is lost.\n".encode()
            )
    storage = sys.modules.get("lmcore.storage")
    with contextlib.suppress(AttributeError):  # it is being imported
        storage.remove_unfinished()  # type: ignore[union-attr]
    os._exit(CODES[signal.Signals(number)])


def _is_terminal() -> bool:
    try:
        return os.isatty(2)
    except OSError:
        return False


def _watch(reader: int) -> None:
    """End the process when a signal came and the main thread has not answered it."""
    while received := os.read(reader, 1):
        number, came = received[0], time.monotonic()
        if number in CODES and signal.getsignal(number) is leave:
            time.sleep(GRACE_S)
            if signal.getsignal(number) is leave and _answered < came - 1.0:  # not by a handler that has left again
                _end(number)


def _let_finish() -> None:
    """The command is over and its result is told: a signal can change nothing any more."""
    with contextlib.suppress(ValueError):
        for number in CODES:
            if signal.getsignal(number) is leave:
                signal.signal(number, signal.SIG_IGN)
