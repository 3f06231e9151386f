"""A loopback stand-in for the Hub: serves a folder as repositories to the real client libraries, faults on request.

    ROOT/datasets/ORG/NAME/...                 datasets
    ROOT/datasets/ORG/NAME@converted/...       what the Hub made of a dataset: its branch refs/convert/parquet
    ROOT/models/ORG/NAME/tokenizer.json        models

    with HubStandIn(root, fail_every=3) as hub:
        subprocess.run(..., env={"HF_ENDPOINT": hub.endpoint, "HF_HOME": fresh_directory})

The client libraries read HF_ENDPOINT when they are imported, so the code under test runs in a process of its own. What
a request looks like was learned from the clients themselves; routes they do not need are 404.

Faults: every `fail_every`-th download is answered with 503; a download of more than `cut_after` bytes loses its
connection after that many. Together they happen at most `max_faults` times.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

FILE = re.compile(r"/(datasets/)?([^/]+/[^/]+|[^/]+)/resolve/([^/]+|refs/[^/]+/[^/]+)/(.+)")
CONVERTED = "refs/convert/parquet"
API = re.compile(r"/api/(datasets|models)/([^/]+/[^/]+|[^/]+?)(?:/(revision|tree|paths-info)/(.+))?")


class Repository:
    """One folder: its files, and a commit that changes with them."""

    def __init__(self, root: Path) -> None:
        self.files = {path.relative_to(root).as_posix(): path for path in sorted(root.rglob("*")) if path.is_file()}
        self.commit = self._digest(f"{name} {path.stat().st_size}" for name, path in self.files.items())

    @staticmethod
    def _digest(lines: Any) -> str:
        return hashlib.sha1("\n".join(lines).encode()).hexdigest()

    def object_id(self, name: str) -> str:
        return self._digest([name])

    def entry(self, name: str) -> dict[str, Any]:
        if name in self.files:
            size = self.files[name].stat().st_size
            return {"type": "file", "path": name, "oid": self.object_id(name), "size": size}
        return {"type": "directory", "path": name, "oid": self.object_id(name), "size": 0}

    def has_folder(self, name: str) -> bool:
        return not name or any(file.startswith(f"{name}/") for file in self.files)

    def tree(self, folder: str, recursive: bool) -> list[dict[str, Any]]:
        inside = f"{folder}/" if folder else ""
        found = set()
        for file in self.files:
            if file.startswith(inside):
                parts = file[len(inside) :].split("/")
                depths = range(1, len(parts) + 1) if recursive else [1]
                found.update(inside + "/".join(parts[:depth]) for depth in depths)
        return [self.entry(name) for name in sorted(found)]


class HubStandIn:
    """The server. `requests` lists (method, path, range) of everything that was asked."""

    def __init__(
        self, root: Path, *, fail_every: int = 0, cut_after: int = 0, max_faults: int = 1 << 30, page: int = 1000
    ) -> None:
        self.root, self.fail_every, self.cut_after, self.page = root, fail_every, cut_after, page
        self.requests: list[tuple[str, str, str | None]] = []
        self.faults = 0
        self._max_faults, self._downloads = max_faults, 0
        self._lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> HubStandIn:
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def repository(self, kind: str, name: str, revision: str = "main") -> Repository | None:
        """The repository, or its conversion when the revision is that of the conversion."""
        if (self.root / kind / f"{name}@converted").is_dir():
            converted = Repository(self.root / kind / f"{name}@converted")
            if revision in (CONVERTED, converted.commit):
                return converted
        folder = self.root / kind / name
        return Repository(folder) if folder.is_dir() else None

    def note(self, method: str, path: str, wanted: str | None) -> None:
        with self._lock:
            self.requests.append((method, path, wanted))

    def fails(self) -> bool:
        """Whether this download is the one to be refused."""
        with self._lock:
            self._downloads += 1
            due = bool(self.fail_every) and self._downloads % self.fail_every == 0
            return self._fault(due)

    def cuts(self, size: int) -> bool:
        with self._lock:
            return self._fault(0 < self.cut_after < size)

    def _fault(self, due: bool) -> bool:
        if due and self.faults < self._max_faults:
            self.faults += 1
            return True
        return False


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubStandIn

    def log_message(self, format: str, *arguments: Any) -> None: ...

    def do_GET(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length).decode()
        url = urlsplit(self.path)
        path, query = unquote(url.path), parse_qs(url.query)
        self.hub.note(self.command, self.path, self.headers.get("Range"))
        if match := FILE.fullmatch(path):
            self._file("datasets" if match[1] else "models", match[2], match[3], match[4])
        elif match := API.fullmatch(path):
            self._api(match[1], match[2], match[3], match[4] or "", query, body)
        else:
            self._missing("NotFound")

    do_HEAD = do_POST = do_GET

    def _answer(self, code: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(code)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, value: Any, headers: dict[str, str] | None = None) -> None:
        self._answer(200, json.dumps(value).encode(), headers or {})

    def _missing(self, what: str, headers: dict[str, str] | None = None) -> None:
        self._answer(404, b"{}", {"X-Error-Code": what, "X-Error-Message": what, **(headers or {})})

    def _api(self, kind: str, name: str, verb: str | None, rest: str, query: dict[str, list[str]], body: str) -> None:
        revision, _, inside = rest.partition("/")
        if rest.startswith(CONVERTED):
            revision, inside = CONVERTED, rest.removeprefix(CONVERTED)
        repository = self.hub.repository(kind, name, revision)
        if repository is None:
            return self._missing("RepoNotFound")
        if verb is not None and revision not in ("main", CONVERTED, repository.commit):
            return self._missing("RevisionNotFound")
        if verb in (None, "revision"):
            siblings = [{"rfilename": file} for file in repository.files]
            return self._json(
                {"id": name, "sha": repository.commit, "private": False, "tags": [], "siblings": siblings}
            )
        if verb == "paths-info":
            wanted = parse_qs(body).get("paths") or json.loads(body or "{}").get("paths", [])
            known = [path.strip("/") for path in wanted]
            return self._json([repository.entry(p) for p in known if p in repository.files or repository.has_folder(p)])
        folder = inside.strip("/")
        if not repository.has_folder(folder):
            return self._missing("EntryNotFound")
        entries = repository.tree(folder, query.get("recursive", ["false"])[0].lower() in ("true", "1"))
        start = int(query.get("cursor", ["0"])[0])
        headers = {}
        if start + self.hub.page < len(entries):
            rest_of_query = "&".join(f"{key}={values[0]}" for key, values in query.items() if key != "cursor")
            link = f"{self.hub.endpoint}{urlsplit(self.path).path}?{rest_of_query}&cursor={start + self.hub.page}"
            headers["Link"] = f'<{link}>; rel="next"'
        return self._json(entries[start : start + self.hub.page], headers)

    def _file(self, kind: str, name: str, revision: str, file: str) -> None:
        repository = self.hub.repository(kind, name, revision)
        if repository is None:
            return self._missing("RepoNotFound")
        if revision not in ("main", CONVERTED, repository.commit):
            return self._missing("RevisionNotFound")
        headers = {"X-Repo-Commit": repository.commit, "Accept-Ranges": "bytes"}
        if file not in repository.files:
            return self._missing("EntryNotFound", headers)
        if self.command == "GET" and self.hub.fails():
            return self._answer(503, b"{}", {})
        raw = repository.files[file].read_bytes()
        code, begin, end = 200, 0, len(raw)
        if wanted := re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range") or ""):
            begin = int(wanted[1]) if wanted[1] else max(0, len(raw) - int(wanted[2]))
            end = min(int(wanted[2]) + 1, len(raw)) if wanted[1] and wanted[2] else len(raw)
            code = 206
            headers["Content-Range"] = f"bytes {begin}-{end - 1}/{len(raw)}"
        headers |= {"ETag": f'"{repository.object_id(file)}"', "Content-Type": "application/octet-stream"}
        part = raw[begin:end]
        if self.command == "GET" and self.hub.cuts(len(part)):
            self.send_response(code)
            for key, value in {**headers, "Content-Length": str(len(part))}.items():
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(part[: self.hub.cut_after])
            self.wfile.flush()
            self.close_connection = True
            self.connection.close()
            return None
        return self._answer(code, part, headers)
