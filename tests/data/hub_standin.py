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
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from standin import Handler, StandIn

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


class _Handler(Handler):
    standin: HubStandIn

    def do_GET(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length).decode()
        url = urlsplit(self.path)
        path, query = unquote(url.path), parse_qs(url.query)
        self.standin.note(self.command, self.path, self.headers.get("Range"))
        if match := FILE.fullmatch(path):
            self._file("datasets" if match[1] else "models", match[2], match[3], match[4])
        elif match := API.fullmatch(path):
            self._api(match[1], match[2], match[3], match[4] or "", query, body)
        else:
            self._missing("NotFound")

    do_HEAD = do_POST = do_GET

    def _answer(self, code: int, body: bytes, headers: dict[str, str], *, download: bool = False) -> None:
        self.answer(code, body, {"Content-Type": "application/json", **headers}, download=download)

    def _json(self, value: Any, headers: dict[str, str] | None = None) -> None:
        self._answer(200, json.dumps(value).encode(), headers or {})

    def _missing(self, what: str, headers: dict[str, str] | None = None) -> None:
        self._answer(404, b"{}", {"X-Error-Code": what, "X-Error-Message": what, **(headers or {})})

    def _api(self, kind: str, name: str, verb: str | None, rest: str, query: dict[str, list[str]], body: str) -> None:
        revision, _, inside = rest.partition("/")
        if rest.startswith(CONVERTED):
            revision, inside = CONVERTED, rest.removeprefix(CONVERTED)
        repository = self.standin.repository(kind, name, revision)
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
        if start + self.standin.page < len(entries):
            rest_of_query = "&".join(f"{key}={values[0]}" for key, values in query.items() if key != "cursor")
            address = f"{self.standin.endpoint}{urlsplit(self.path).path}"
            headers["Link"] = f'<{address}?{rest_of_query}&cursor={start + self.standin.page}>; rel="next"'
        return self._json(entries[start : start + self.standin.page], headers)

    def _file(self, kind: str, name: str, revision: str, file: str) -> None:
        repository = self.standin.repository(kind, name, revision)
        if repository is None:
            return self._missing("RepoNotFound")
        if revision not in ("main", CONVERTED, repository.commit):
            return self._missing("RevisionNotFound")
        headers = {"X-Repo-Commit": repository.commit, "Accept-Ranges": "bytes"}
        if file not in repository.files:
            return self._missing("EntryNotFound", headers)
        if self.command == "GET" and self.standin.fails():
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
        return self._answer(code, part, headers, download=True)


class HubStandIn(StandIn):
    handler = _Handler

    def __init__(
        self, root: Path, *, fail_every: int = 0, cut_after: int = 0, max_faults: int = 1 << 30, page: int = 1000
    ) -> None:
        super().__init__(root, cut_after=cut_after, max_faults=max_faults)
        self.fail_every, self.page, self._downloads = fail_every, page, 0

    def repository(self, kind: str, name: str, revision: str = "main") -> Repository | None:
        """The repository, or its conversion when the revision is that of the conversion."""
        if (self.root / kind / f"{name}@converted").is_dir():
            converted = Repository(self.root / kind / f"{name}@converted")
            if revision in (CONVERTED, converted.commit):
                return converted
        folder = self.root / kind / name
        return Repository(folder) if folder.is_dir() else None

    def fails(self) -> bool:
        """Whether this download is the one to be refused."""
        with self._lock:
            self._downloads += 1
            return self._fault(bool(self.fail_every) and self._downloads % self.fail_every == 0)
