"""A file behind http:// or https:// as a seekable stream, with the standard library alone.

One request is kept open while the reader goes on reading; a seek, or a connection that breaks, opens another one at
the place (a `Range`). Servers that know no ranges can be read from the beginning only. Proxies are those of the
environment.

Left out: folders and globs, which the web has not; retries of a server that does not answer (readers.py).
"""

from __future__ import annotations

import http.client
import io
import urllib.error
import urllib.request
from typing import Any, BinaryIO, cast

from lmcore.errors import Exit, LmError

TIMEOUT_S = 30.0
_RECONNECTS = 5
_GONE = {401: "access is refused", 403: "access is refused", 404: "no such file", 410: "no such file"}


def open_http(url: str) -> BinaryIO:
    """The bytes behind a URL, buffered. LmError (2) when the server says that there are none to be had."""
    return cast("BinaryIO", io.BufferedReader(_HttpFile(url), 1 << 20))


def http_size(url: str, timeout_s: float) -> int:
    """Bytes behind a URL, -1 when the server does not tell. LmError (2) for what is not there, OSError for a server
    that does not answer."""
    with _ask(urllib.request.Request(url, method="HEAD"), timeout_s) as answer:
        return int(answer.headers.get("Content-Length") or -1)


def _ask(request: urllib.request.Request, timeout_s: float) -> Any:
    try:
        return urllib.request.urlopen(request, timeout=timeout_s)
    except urllib.error.HTTPError as error:
        if error.code in _GONE:
            raise LmError(f"{request.full_url}: {_GONE[error.code]} ({error.code} {error.reason}).") from error
        raise
    except ValueError as error:
        raise LmError(f"{request.full_url}: not a URL ({error}).") from error


class _HttpFile(io.RawIOBase):
    def __init__(self, url: str) -> None:
        super().__init__()
        self._url, self._place = url, 0
        self._size = http_size(url, TIMEOUT_S)
        self._answer: Any = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence == io.SEEK_END and self._size < 0:
            raise OSError(f"{self._url}: the server does not tell the size of the file")
        place = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}[whence]
        if place != self._place:
            self._drop()
        self._place = place
        return place

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        if self._size >= 0:
            view = view[: max(0, self._size - self._place)]
        for left in range(_RECONNECTS, -1, -1):
            if not len(view):
                return 0
            try:
                if self._answer is None:
                    self._answer = self._open()
                count = int(self._answer.readinto(view))
                if count or self._size < 0:
                    self._place += count
                    return count
                problem: Exception = EOFError("the connection ended early")
            except (OSError, http.client.HTTPException) as error:
                problem = error
            self._drop()
            if not left:
                raise OSError(f"{self._url}: {problem}") from problem
        raise AssertionError("unreachable")

    def _open(self) -> Any:
        request = urllib.request.Request(self._url)
        if self._place:
            request.add_header("Range", f"bytes={self._place}-")
        answer = _ask(request, TIMEOUT_S)
        if self._place and answer.status != 206:
            answer.close()
            raise LmError(
                f"{self._url}: the server cannot send a file from the middle.",
                hint="Download the file and tokenize it from there.",
                code=Exit.IO,
            )
        return answer

    def _drop(self) -> None:
        if self._answer is not None:
            self._answer.close()
            self._answer = None

    def close(self) -> None:
        self._drop()
        super().close()
