"""What the loopback stand-ins share: a server on a free port that notes its requests and makes faults, and `lm` in a
process of its own, because the client libraries read their environment when they are imported."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import ClassVar, Self

ROOT = Path(__file__).parents[2]


class StandIn:
    """A server while the context lasts. `requests` lists (method, path, range) of everything that was asked.

    A download of more than `cut_after` bytes loses its connection after that many; there are at most `max_faults`
    faults, those of a subclass among them. Requests go to `handler`, which knows this object as `standin`.
    """

    handler: ClassVar[type[Handler]]

    def __init__(self, root: Path, *, cut_after: int = 0, max_faults: int = 1 << 30) -> None:
        self.root, self.cut_after = root, cut_after
        self.requests: list[tuple[str, str, str | None]] = []
        self.faults, self._max_faults = 0, max_faults
        self._lock = threading.Lock()
        handler = type("BoundHandler", (self.handler,), {"standin": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def note(self, method: str, path: str, wanted: str | None) -> None:
        with self._lock:
            self.requests.append((method, path, wanted))

    def cuts(self, size: int) -> bool:
        """Whether a download of this size is the one to be cut."""
        with self._lock:
            return self._fault(0 < self.cut_after < size)

    def _fault(self, due: bool) -> bool:
        """Count a fault that is due, unless there were enough. Call with the lock held."""
        due = due and self.faults < self._max_faults
        self.faults += due
        return due


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    standin: StandIn

    def answer(self, status: int, body: bytes, headers: dict[str, str], *, download: bool = False) -> None:
        """A whole answer, or a download that announces all of it and ends after `cut_after` bytes."""
        cut = download and self.command == "GET" and self.standin.cuts(len(body))
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(body[: self.standin.cut_after] if cut else body)
        if cut:
            self.wfile.flush()
            self.close_connection = True

    def log_message(self, format: str, *arguments: object) -> None:
        """Nothing on stderr."""


def run_lm(
    folder: Path, arguments: tuple[object, ...], environment: dict[str, str], *, without: str | tuple[str, ...]
) -> subprocess.CompletedProcess[str]:
    """`lm` in this folder, with this environment over the one here less the variables that begin with `without`."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(without)}
    path = os.pathsep.join([str(ROOT), *filter(None, [inherited.get("PYTHONPATH")])])
    return subprocess.run(
        [sys.executable, "-m", "lmcore", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=folder,
        check=False,
        env={**inherited, "PYTHONPATH": path, **environment},
    )
