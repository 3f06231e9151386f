"""A loopback stand-in for S3: serves the folders of a root as buckets to the real client, with faults on request.

    with S3StandIn(root, cut_after=20_000, max_faults=5) as s3:
        subprocess.run(..., env={"AWS_ENDPOINT_URL": s3.endpoint, "AWS_ACCESS_KEY_ID": "x", ...})

What is served: ListObjectsV2 with a delimiter, HeadObject, GetObject with a range. Signatures are not checked. A
download of more than `cut_after` bytes loses its connection after that many, at most `max_faults` times.
"""

from __future__ import annotations

import re
from urllib.parse import parse_qs, quote, unquote, urlsplit

from standin import Handler, StandIn

DATE = "2026-01-01T00:00:00.000Z"


class _Handler(Handler):
    standin: S3StandIn

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        self.standin.note(self.command, parts.path, self.headers.get("Range"))
        bucket, _, key = unquote(parts.path).strip("/").partition("/")
        query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        file = self.standin.root / bucket / key
        if not (self.standin.root / bucket).is_dir():
            self._answer(404, self._error("NoSuchBucket", "The specified bucket does not exist"))
        elif "list-type" in query:
            listing = self.standin.listing(bucket, query.get("prefix", ""), query.get("delimiter", ""))
            self._answer(200, listing.encode())
        elif not key or not file.is_file():
            self._answer(404, self._error("NoSuchKey", "The specified key does not exist."))
        else:
            self._send(file.read_bytes())

    do_HEAD = do_GET

    def _send(self, data: bytes) -> None:
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if wanted is None:
            self._answer(200, data, download=True)
            return
        first = int(wanted[1])
        part = data[first : int(wanted[2]) + 1 if wanted[2] else len(data)]
        place = f"bytes {first}-{first + len(part) - 1}/{len(data)}"
        self._answer(206, part, {"Content-Range": place}, download=True)

    def _answer(
        self, status: int, body: bytes, headers: dict[str, str] | None = None, *, download: bool = False
    ) -> None:
        kind = "application/xml" if body.startswith(b"<") else "binary/octet-stream"
        own = {"Content-Type": kind, "Accept-Ranges": "bytes", "ETag": '"x"'}
        own["Last-Modified"] = "Thu, 01 Jan 2026 00:00:00 GMT"
        self.answer(status, body, own | (headers or {}), download=download)

    @staticmethod
    def _error(code: str, message: str) -> bytes:
        return f"<Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()


class S3StandIn(StandIn):
    handler = _Handler

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
