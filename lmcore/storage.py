"""Durable files: the only code of the project that writes what must survive a crash, a kill or a power cut.

Protocol for a file:       temporary in the same directory -> write all -> fsync -> rename -> fsync(directory).
Protocol for a directory:  every file durable inside `.tmp-*` -> fsync(it) -> rename -> fsync(parent).
Protocol for a journal:    append one JSON line -> fsync; a reader ignores a torn last line.

After any crash a path therefore holds the old content, the new content, or nothing; never a mixture. Temporaries start
with `.tmp-`, directories on their way out with `.del-`; whoever holds the directory's lock may sweep both. A failed
fsync is never retried on the same file: the kernel may have dropped the pages, so the caller writes anew.

Left out on purpose: what is inside the files (data/shard.py, training/checkpoint.py).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmcore.errors import Exit, LmError, from_os_error

Buffer = bytes | bytearray | memoryview
PathLike = str | os.PathLike[str]

TEMPORARY = ".tmp-"
DELETED = ".del-"
_READ_BYTES = 1 << 20


@dataclass(frozen=True)
class FileDigest:
    """Size and content hash of a durable file."""

    bytes: int
    sha256: str


# ---------------------------------------------------------------------------------------- writing


def write_file(path: PathLike, chunks: Buffer | Iterable[Buffer], *, size: int | None = None) -> FileDigest:
    """Replace `path` atomically and durably; return size and sha256 of what was written.

    size: the total number of bytes when known; reserves the space first, so that a full disk shows before any byte
    is written. Raises LmError (73 or 74) and leaves no temporary behind.
    """
    path = Path(path)
    temporary = path.with_name(f"{TEMPORARY}{os.getpid()}-{path.name}")
    try:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)  # ours, from a process of the same number that died
        try:
            digest = _create(temporary, chunks, size)
            os.replace(temporary, path)
            fsync_directory(path.parent)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
    except OSError as error:
        raise from_os_error(error, path, "write") from error
    return digest


def create_file(path: PathLike, chunks: Buffer | Iterable[Buffer], *, size: int | None = None) -> FileDigest:
    """Write and fsync a new file in place: for files inside a `.tmp-*` directory that is committed as a whole."""
    try:
        return _create(Path(path), chunks, size)
    except OSError as error:
        raise from_os_error(error, path, "write") from error


def write_json(path: PathLike, value: Any) -> FileDigest:
    """Write `value` as readable JSON, atomically and durably."""
    return write_file(path, (json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n").encode())


def append_json_line(path: PathLike, value: Any) -> None:
    """Append one JSON line and make it durable before returning."""
    line = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode() + b"\n"
    try:
        existed = os.path.lexists(path)
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            start = os.fstat(descriptor).st_size
            try:
                _write_all(descriptor, line)
            except OSError:
                os.ftruncate(descriptor, start)  # a full disk must not leave a torn line for the next append
                raise
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        if not existed:
            fsync_directory(Path(path).parent)
    except OSError as error:
        raise from_os_error(error, path, "write") from error


def read_json_lines(path: PathLike) -> list[dict[str, Any]]:
    """The complete lines of a journal; a torn or unreadable tail is dropped. A missing file is an empty journal."""
    try:
        raw = Path(path).read_bytes()
    except FileNotFoundError:
        return []
    records: list[dict[str, Any]] = []
    for line in raw.split(b"\n")[:-1]:  # what follows the last newline was never completed
        try:
            record = json.loads(line)
        except ValueError:
            break
        if not isinstance(record, dict):
            break
        records.append(record)
    return records


@contextlib.contextmanager
def commit_directory(final: PathLike) -> Iterator[Path]:
    """Build a directory as a whole: yields `.tmp-PID-NAME`, renames it to `final` when the body succeeds.

    Write the files inside with `create_file`. A `final` that already exists is moved aside and removed after the new
    one is in place. On failure the temporary is removed.
    """
    final = Path(final)
    temporary = final.with_name(f"{TEMPORARY}{os.getpid()}-{final.name}")
    try:
        make_directory(final.parent)
        if temporary.exists():
            shutil.rmtree(temporary)
        os.mkdir(temporary)
        try:
            yield temporary
            for folder in [temporary, *(p for p in temporary.rglob("*") if p.is_dir() and not p.is_symlink())]:
                fsync_directory(folder)
            replaced: Path | None = None
            if os.path.lexists(final):
                replaced = final.with_name(f"{DELETED}{os.getpid()}-{final.name}")
                os.rename(final, replaced)
            os.rename(temporary, final)
            fsync_directory(final.parent)
            if replaced is not None:
                shutil.rmtree(replaced)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    except OSError as error:
        raise from_os_error(error, final, "write") from error


def delete_directory(path: PathLike) -> None:
    """Remove a directory so that a crash leaves it whole or marked as deleted, never half there under its name."""
    path = Path(path)
    doomed = path.with_name(f"{DELETED}{os.getpid()}-{path.name}")
    try:
        os.rename(path, doomed)
        fsync_directory(path.parent)
        shutil.rmtree(doomed)
    except OSError as error:
        raise from_os_error(error, path, "delete") from error


def make_directory(path: PathLike) -> Path:
    """Create a directory and its parents durably; existing ones are fine."""
    path = Path(path)
    try:
        missing = [p for p in (path, *path.parents) if not p.exists()]
        for folder in reversed(missing):
            with contextlib.suppress(FileExistsError):
                os.mkdir(folder)
            fsync_directory(folder.parent)
        if not path.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "a file of this name is in the way")
    except OSError as error:
        raise from_os_error(error, path, "create the directory") from error
    return path


def sweep(directory: PathLike) -> None:
    """Remove what crashed writers left behind. Call only while holding the directory's lock."""
    for entry in Path(directory).iterdir():
        if entry.name.startswith((TEMPORARY, DELETED)):
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()


def fsync_directory(path: PathLike) -> None:
    """Make the names inside a directory durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def require_free_space(path: PathLike, needed: int, what: str) -> None:
    """Refuse to start (74) when the file system of `path` has less than `needed` bytes free."""
    folder = Path(path).absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise LmError(
            f"{folder}: the disk is too full for {what}: {format_bytes(needed)} needed, {format_bytes(free)} free.",
            hint="Free some space, or choose another directory.",
            code=Exit.IO,
        )


# ---------------------------------------------------------------------------------------- locking


@contextlib.contextmanager
def lock_directory(path: PathLike, what: str) -> Iterator[None]:
    """Hold the writer's lock of a directory (flock on `.lock`): it dies with the process. Readers do not take it.

    Raises LmError 75 when another process holds it; `what` names the activity, such as "lm tokenize".
    """
    directory = make_directory(path)
    try:
        descriptor = os.open(directory / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise from_os_error(error, directory, "write") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "another process"
            raise LmError(
                f"{directory}: in use by {holder}.",
                hint="Wait for it to end, or stop it, then run the same command again.",
                code=Exit.RETRY,
            ) from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{what} (process {os.getpid()} on {socket.gethostname()})".encode(), 0)
        yield
    finally:
        os.close(descriptor)


# ---------------------------------------------------------------------------------------- reading


def read_json(path: PathLike, *, limit: int = 64 << 20) -> Any:
    """Parse a JSON file of at most `limit` bytes; NaN, duplicate keys and other laxities of the parser are refused."""
    path = Path(path)
    try:
        with open(path, "rb") as file:
            raw = file.read(limit + 1)
    except OSError as error:
        raise from_os_error(error, path, "read") from error
    if len(raw) > limit:
        raise LmError(f"{path}: larger than {format_bytes(limit)}; this is not a file of ours.", code=Exit.DATA)
    try:
        return json.loads(raw, parse_constant=_refuse_constant, object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise LmError(f"{path}: not valid JSON ({error}).", code=Exit.DATA) from error


def sha256_file(path: PathLike, progress: Callable[[int], None] | None = None) -> str:
    """sha256 of a file's content, following links. `progress` receives the number of bytes of each chunk."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        buffer = bytearray(_READ_BYTES)
        view = memoryview(buffer)
        while count := file.readinto(buffer):
            digest.update(view[:count])
            if progress is not None:
                progress(count)
    return digest.hexdigest()


def canonical_json(value: Any) -> bytes:
    """The bytes over which identities are hashed: sorted keys, no spaces, ASCII."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def format_bytes(count: float) -> str:
    """1536 -> '1.5 KiB'."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if abs(count) < 1024 or unit == "GiB":
            return f"{count:,.0f} bytes" if unit == "bytes" else f"{count:,.1f} {unit}"
        count /= 1024
    raise AssertionError("unreachable")


# ---------------------------------------------------------------------------------------- private


def _create(path: Path, chunks: Buffer | Iterable[Buffer], size: int | None) -> FileDigest:
    if isinstance(chunks, bytes | bytearray | memoryview):
        size = memoryview(chunks).nbytes
        chunks = [chunks]
    digest = hashlib.sha256()
    written = 0
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        if size:
            _reserve(descriptor, size)
        for chunk in chunks:
            view = memoryview(chunk).cast("B")
            digest.update(view)
            _write_all(descriptor, view)
            written += len(view)
        if size is not None and written != size:
            raise ValueError(f"{path}: {written} bytes written, {size} announced")
        os.fsync(descriptor)
    finally:
        os.close(descriptor)  # close can report an error too (network file systems): it must not be swallowed
    return FileDigest(written, digest.hexdigest())


def _reserve(descriptor: int, size: int) -> None:
    if not hasattr(os, "posix_fallocate"):  # macOS
        return
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):  # file systems without reservation
            raise


def _write_all(descriptor: int, data: Buffer) -> None:
    view = memoryview(data).cast("B")
    while view:  # a write may be short
        count = os.write(descriptor, view)
        if count == 0:
            raise OSError(errno.EIO, "write returned 0")
        view = view[count:]


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a key appears twice")
    return value
