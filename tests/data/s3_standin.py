"""A loopback stand-in for S3: serves the folders of a root as buckets to the real client, with faults on request.

    with S3StandIn(root, cut_after=20_000, max_faults=5) as s3:
        subprocess.run(..., env={"AWS_ENDPOINT_URL": s3.endpoint, "AWS_ACCESS_KEY_ID": "x", ...})

What is served: ListObjectsV2 with a delimiter, HeadObject, GetObject with a range. Signatures are not checked. A
download of more than `cut_after` bytes loses its connection after that many, at most `max_faults` times.
"""

from __future__ import annotations

import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from urllib.parse import parse_qs, quote, unquote, urlsplit

DATE = "2026-01-01T00:00:00.000Z"


class S3StandIn:
    """The server. `requests` lists (method, path, range) of everything that was asked."""

    def __init__(self, root: Path, *, cut_after: int = 0, max_faults: int = 1 << 30) -> None:
        self.root, self.cut_after, self.max_faults, self.faults = root, cut_after, max_faults, 0
        self.requests: list[tuple[str, str, str | None]] = []
        self._lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"s3": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> S3StandIn:
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def cuts(self, size: int) -> bool:
        with self._lock:
            due = 0 < self.cut_after < size and self.faults < self.max_faults
            self.faults += due
            return due

    def listing(self, bucket: str, prefix: str, delimiter: str) -> str:
        folder = self.root / bucket
        names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
        files, folders = [], set()
        for name in names:
            if not name.startswith(prefix):
                continue
            rest = name[len(prefix) :]
            if delimiter and delimiter in rest:
                folders.add(prefix + rest.split(delimiter)[0] + delimiter)
            else:
                size = (folder / name).stat().st_size
                files.append(
                    f"<Contents><Key>{quote(name)}</Key><LastModified>{DATE}</LastModified><ETag>&quot;{size}&quot;</ETag>"
                    f"<Size>{size}</Size><StorageClass>STANDARD</StorageClass></Contents>"
                )
        files += [f"<CommonPrefixes><Prefix>{quote(name)}</Prefix></CommonPrefixes>" for name in sorted(folders)]
        return (
            f'<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><Name>{bucket}</Name>'
            f"<Prefix>{quote(prefix)}</Prefix><KeyCount>{len(files)}</KeyCount><MaxKeys>1000</MaxKeys>"
            f"<IsTruncated>false</IsTruncated><EncodingType>url</EncodingType>{''.join(files)}</ListBucketResult>"
        )


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    s3: S3StandIn

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        self.s3.requests.append((self.command, parts.path, self.headers.get("Range")))
        bucket, _, key = unquote(parts.path).strip("/").partition("/")
        query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        file = self.s3.root / bucket / key
        if not (self.s3.root / bucket).is_dir():
            self._answer(404, self._error("NoSuchBucket", "The specified bucket does not exist"))
        elif "list-type" in query:
            self._answer(200, self.s3.listing(bucket, query.get("prefix", ""), query.get("delimiter", "")).encode())
        elif not key or not file.is_file():
            self._answer(404, self._error("NoSuchKey", "The specified key does not exist."))
        else:
            self._send(file.read_bytes())

    do_HEAD = do_GET

    def _send(self, data: bytes) -> None:
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if wanted is None:
            self._answer(200, data, cut=self.command == "GET" and self.s3.cuts(len(data)))
            return
        first = int(wanted[1])
        part = data[first : int(wanted[2]) + 1 if wanted[2] else len(data)]
        place = f"bytes {first}-{first + len(part) - 1}/{len(data)}"
        self._answer(206, part, {"Content-Range": place}, cut=self.s3.cuts(len(part)))

    def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None, *, cut: bool = False) -> None:
        self.send_response(status)
        xml = body.startswith(b"<")
        own = {"Content-Type": "application/xml" if xml else "binary/octet-stream", "Accept-Ranges": "bytes"}
        own |= {"Last-Modified": "Thu, 01 Jan 2026 00:00:00 GMT", "ETag": '"x"', "Content-Length": str(len(body))}
        for name, value in (own | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(body[: self.s3.cut_after] if cut else body)
        if cut:
            self.close_connection = True

    @staticmethod
    def _error(code: str, message: str) -> bytes:
        return f"<Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()

    def log_message(self, format: str, *arguments: object) -> None:
        """Nothing on stderr."""
