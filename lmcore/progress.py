"""How the library speaks while it works: it never prints, it tells a `Progress`.

A command passes one in (tools/ui.py draws a bar on a terminal and plain lines elsewhere); a program that uses the
library passes none and hears nothing, or collects the notes itself.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol


class Progress(Protocol):
    """Receives what a long-running function has to say. Calls may come from the working thread only."""

    def start(self, task: str, total: float | None, unit: str) -> None:
        """A phase begins: `total` units of work ("bytes", "tokens", "shards"), None when unknown."""

    def advance(self, amount: float) -> None:
        """`amount` more units of the current phase are done."""

    def finish(self) -> None:
        """The current phase is over."""

    def note(self, message: str) -> None:
        """Something worth a line."""

    def warn(self, message: str) -> None:
        """Something survived that the user should know."""


class Silent:
    """The Progress of a caller that does not listen."""

    def start(self, task: str, total: float | None, unit: str) -> None: ...

    def advance(self, amount: float) -> None: ...

    def finish(self) -> None: ...

    def note(self, message: str) -> None: ...

    def warn(self, message: str) -> None: ...


class Notes(Silent):
    """Keeps what is said for whoever wants to tell it later."""

    def __init__(self, said: Iterable[str] = ()) -> None:
        self.said = list(said)

    def note(self, message: str) -> None:
        self.said.append(message)

    def warn(self, message: str) -> None:
        self.said.append(message)


SILENT = Silent()
