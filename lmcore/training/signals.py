"""Signals and the clock: why a run should stop, asked between two pieces of work.

The first SIGINT, SIGTERM or SIGUSR1 only sets a flag; the loop finishes its step, saves and leaves. The second one of
any kind ends the process at once, which is safe because every file on disk is complete or absent. A launcher of several
processes repeats what it receives itself, so there a repetition within a second is an echo and does not count.
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

from lmcore import interrupt

ECHO_S = 1.0
_CAUGHT = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Stop:
    """Whether the run should stop, and why. Polled by the loop; `number` is 0 until a signal has come."""

    def __init__(
        self,
        max_minutes: float | None = None,
        *,
        told: Callable[[str], None] | None = None,
        echoed: bool = False,
    ) -> None:
        """max_minutes: leave before this much time is over. told: receives one sentence at the first signal. echoed:
        whether a launcher sends every signal a second time."""
        self.number = 0
        self._echo_until = 0.0
        self._echoed = echoed
        self.reserve_s = 0.0
        """Time that saving takes; subtracted from the limit. The loop updates it after every save."""
        self._deadline = None if max_minutes is None else time.monotonic() + 60 * max_minutes
        # The thread that speaks exists from the beginning: a handler runs between two bytecodes of the main thread,
        # which may be inside the console's own lock, and starting a thread can wait for ever when memory has run out.
        self._words: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        if told is not None:
            threading.Thread(target=_speak, args=(self._words, told), name="signals", daemon=True).start()

    def reason(self) -> str:
        """ "" to go on; otherwise "signal" or "time"."""
        if self.number:
            return "signal"
        if self._deadline is not None and time.monotonic() + self.reserve_s >= self._deadline:
            return "time"
        return ""

    def receive(self, number: int, _frame: FrameType | None = None) -> None:
        """The signal handler."""
        interrupt.answered()
        if number == self.number and time.monotonic() < self._echo_until:
            return
        if self.number:  # the second time: now
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        self.number = number
        self._echo_until = time.monotonic() + (ECHO_S if self._echoed else 0.0)
        name = signal.Signals(number).name
        self._words.put(f"{name}: finishing the step, then saving (again to stop at once without saving)")

    def close(self) -> None:
        """No more signals are expected."""
        self._words.put(None)


def _speak(words: queue.SimpleQueue[str | None], told: Callable[[str], None]) -> None:
    for text in iter(words.get, None):
        told(text)


@contextlib.contextmanager
def caught(stop: Stop) -> Iterator[None]:
    """Route SIGINT, SIGTERM and SIGUSR1 to `stop`. Outside the main thread, where Python allows no handler, do
    nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        stop.close()
        return
    before = {number: signal.signal(number, stop.receive) for number in _CAUGHT}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        stop.close()
