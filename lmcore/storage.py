"""Durable files: the only code of the project that writes what must survive a crash, a kill or a power cut.

Protocol for a file:       temporary in the same directory -> write all -> fsync -> rename -> fsync(directory).
Protocol for a directory:  every file durable inside `.tmp-*` -> fsync(it) -> rename -> fsync(parent).
Protocol for a journal:    drop a torn last line -> append one JSON line -> fsync.

After any crash a path therefore holds the old content, the new content, or nothing; never a mixture. Temporaries are
called `.tmp-PID-TOKEN-NAME`, directories on their way out `.del-PID-TOKEN-NAME`; whoever holds the directory's lock may
sweep both. A failed fsync is never retried on the same file: the kernel may have dropped the pages, so the caller
writes anew. What a killed process left is visible but perhaps not durable; so whoever builds on it makes it durable
first (`make_directory`, `append_json_line` and `sweep` do).

tests/crash proves all of this: a kill, ENOSPC and EIO at every call, and every disk image that a power cut may leave.

Left out on purpose: what is inside the files (data/shard.py, training/checkpoint.py).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import json
import math
import mmap
import os
import re
import secrets
import shutil
import socket
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmcore.errors import Exit, LmError, from_os_error

Buffer = bytes | bytearray | memoryview
PathLike = str | os.PathLike[str]

TEMPORARY = ".tmp-"
DELETED = ".del-"
LOCK = ".lock"
_OURS = re.compile(r"\.(?:tmp|del)-[0-9]+-[0-9a-f]{8}-.*", re.DOTALL)
_READ_BYTES = 1 << 20
_UNCACHED_BYTES = 16 << 20  # smaller files are written through the page cache in any case
_BLOCK_BYTES = 4 << 20  # of one write past it


@dataclass(frozen=True)
class FileDigest:
    """Size and content hash of a durable file."""

    bytes: int
    sha256: str


# ---------------------------------------------------------------------------------------- writing


def write_file(
    path: PathLike, chunks: Buffer | Iterable[Buffer], *, size: int | None = None, cached: bool = True
) -> FileDigest:
    """Replace `path` atomically and durably; return size and sha256 of what was written.

    size: the total number of bytes when known; reserves the space first, so that a full disk shows before any byte
    is written. cached: False sends a large file of known size past the page cache where the system can do that, which
    saves the kernel a copy into fresh memory. A link of this name is replaced, never written through. Raises LmError
    (73 or 74) and leaves no temporary behind.
    """
    path = _named(path)
    temporary = _beside(path, TEMPORARY)
    try:
        _unfinished.add(temporary)
        try:
            digest = _create(temporary, chunks, size, cached)
            os.replace(temporary, path)
            _fsync_directory(path.parent)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
        finally:
            _unfinished.discard(temporary)
    except OSError as error:
        raise _write_failed(error, path, size) from error
    return digest


def create_file(path: PathLike, chunks: Buffer | Iterable[Buffer], *, size: int | None = None) -> FileDigest:
    """Write and fsync a new file in place: for files inside a `.tmp-*` directory that is committed as a whole."""
    try:
        return _create(Path(path), chunks, size, cached=True)
    except OSError as error:
        raise _write_failed(error, Path(path), size) from error


def write_json(path: PathLike, value: Any) -> FileDigest:
    """Write `value` as readable JSON, atomically and durably."""
    return write_file(path, (json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n").encode())


def append_json_line(path: PathLike, value: Any) -> None:
    """Append one JSON line and make it durable before returning. One writer at a time: hold the directory's lock.

    At most the last line of a journal can be torn, because each one is durable before the next begins. It is cut off
    here, as `read_json_lines` ignores it; otherwise the new line would stand behind it and be ignored too.
    """
    line = canonical_json(value) + b"\n"
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            size = os.fstat(descriptor).st_size
            sound = _sound_length(descriptor, size)
            if sound < size:
                os.ftruncate(descriptor, sound)
                _fsync(descriptor)  # apart: a cut and an append that reach the disk in parts could make a chimera
            try:
                _write_all(descriptor, line)
                _fsync(descriptor)
            except OSError:
                with contextlib.suppress(OSError):  # a line that is not durable must not be read as if it were
                    os.ftruncate(descriptor, sound)
                raise
        finally:
            os.close(descriptor)
        # Always: a journal that a killed process has just created may still lack a durable name.
        _fsync_directory(Path(path).parent)
    except OSError as error:
        raise _write_failed(error, Path(path), len(line)) from error


def read_json_lines(path: PathLike) -> list[dict[str, Any]]:
    """The complete lines of a journal; a torn or unreadable tail is dropped. A missing file is an empty journal."""
    try:
        with open(path, "rb") as file:
            raw = file.read()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise from_os_error(error, path, "read") from error
    records: list[dict[str, Any]] = []
    for line in raw.split(b"\n")[:-1]:  # what follows the last newline was never completed
        record = json_line(line)
        if record is None:
            break
        records.append(record)
    return records


@contextlib.contextmanager
def commit_directory(final: PathLike, *, replace: bool = False) -> Iterator[Path]:
    """Build a directory as a whole: yields `.tmp-*`, which becomes `final` when the body succeeds.

    Write the files inside with `create_file`. replace: what stands at `final` (something of ours!) is exchanged for the
    new directory in one step where the system can do that (Linux), and then removed; otherwise it is moved aside
    first. Without `replace` only an empty directory may stand there. On failure the temporary is removed and `final` is
    as it was.
    """
    final = _named(final)
    temporary = _beside(final, TEMPORARY)
    try:
        make_directory(final.parent)
        if not replace and os.path.lexists(final) and not _is_empty_directory(final):
            raise LmError(
                f"{final}: already exists.", hint="Choose another name, or move it away.", code=Exit.CANNOT_CREATE
            )
        _sweep_dead(final)
        os.mkdir(temporary)
        _unfinished.add(temporary)
        alive = None
        try:
            alive = _hold(temporary)
            yield temporary
            for folder, _, _ in os.walk(temporary, onerror=_raise):
                _fsync_directory(folder)
            replaced = _put_in_place(temporary, final) if replace and os.path.lexists(final) else None
            if replaced is None:
                os.rename(temporary, final)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        finally:
            _unfinished.discard(temporary)
            _let_go(alive)
        _fsync_directory(final.parent)
    except OSError as error:
        raise _write_failed(error, final, None) from error
    if replaced is not None:
        try:
            _remove(replaced)
        except OSError as error:
            raise from_os_error(error, replaced, "remove what was replaced") from error


def delete_directory(path: PathLike) -> None:
    """Remove a directory so that a crash leaves it whole or marked as deleted, never half there under its name.

    A link of this name is removed, never what it points to.
    """
    path = _named(path)
    doomed = _beside(path, DELETED)
    try:
        os.rename(path, doomed)
        _fsync_directory(path.parent)
        _remove(doomed)
    except OSError as error:
        raise from_os_error(error, path, "delete") from error


def make_directory(path: PathLike) -> Path:
    """Create a directory and its parents durably; existing ones are fine."""
    path = Path(path)
    try:
        missing = [p for p in (path, *path.parents) if not p.exists()]
        deepest = missing[-1].parent if missing else path
        if not deepest.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, f"{deepest} is not a directory")
        # The name of the deepest existing one may not be durable yet, when a killed process has just made it. Each of
        # ours is durable before the next one is made, so the ones above it are safe. No permission: not made by us.
        with contextlib.suppress(PermissionError):
            _fsync_directory(deepest.absolute().parent)
        for folder in reversed(missing):
            with contextlib.suppress(FileExistsError):  # another process was faster; a file in the way shows below
                os.mkdir(folder)
            _fsync_directory(folder.parent)
        if not path.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "a file of this name is in the way")
    except OSError as error:
        raise from_os_error(error, path, "create the directory") from error
    return path


def sweep(directory: PathLike) -> None:
    """Remove what crashed writers left behind. Call only while holding the directory's lock.

    Only names that this module makes are touched. Links are removed, not followed.
    """
    directory = Path(directory)
    try:
        doomed = [directory / name for name in sorted(os.listdir(directory)) if _OURS.fullmatch(name)]
        if doomed:
            # First make durable that they bear these names: a rename to `.del-*` that a power cut takes back would
            # otherwise bring an emptied directory back under its old name.
            _fsync_directory(directory)
        for path in doomed:
            _remove(path)
    except OSError as error:
        raise from_os_error(error, directory, "remove left-over temporaries") from error


def require_same(path: PathLike, made: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """LmError (73) that names what differs between how `path` was made and how it is asked for now."""
    differing = [key for key in {**made, **asked} if made.get(key) != asked.get(key)]
    if differing:
        shown = "; ".join(f"{key} was {_brief(made.get(key))}, is {_brief(asked.get(key))}" for key in differing[:3])
        raise LmError(
            f"{path}: already exists, and was made with other inputs: {shown}.",
            hint="Choose another name, or move it away.",
            code=Exit.CANNOT_CREATE,
        )


def _brief(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:60]}..."


_unfinished: set[Path] = set()
"""Temporaries that this process is writing."""


def remove_unfinished() -> None:
    """Take away what this process is still writing: it ends now."""
    for path in list(_unfinished):
        with contextlib.suppress(OSError):
            _remove(path)


def fsync_directory(path: PathLike) -> None:
    """Make the names inside a directory durable."""
    try:
        _fsync_directory(path)
    except OSError as error:
        raise from_os_error(error, path, "write") from error


def fsync_file(path: PathLike) -> None:
    """Make the content of a file durable that may be visible only: whoever wrote it may have died before its sync."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            _fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise from_os_error(error, path, "write") from error


def require_free_space(path: PathLike, needed: int, what: str) -> None:
    """Refuse to start (74) when the file system of `path` has less than `needed` bytes free."""
    folder = Path(path).absolute()
    try:
        while not folder.exists():
            folder = folder.parent
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise from_os_error(error, path, "write") from error
    if free < needed:
        raise LmError(
            f"{folder}: the disk is too full for {what}: {format_bytes(needed)} needed, {format_bytes(free)} free.",
            hint="Free some space, or choose another directory.",
            code=Exit.IO,
        )


# ---------------------------------------------------------------------------------------- locking

_held: set[int] = set()
"""Descriptors of the locks of this process; a forked child closes them, so that an orphan cannot keep a lock."""


@contextlib.contextmanager
def lock_directory(path: PathLike, what: str) -> Iterator[None]:
    """Hold the writer's lock of a directory (flock on `.lock`): it dies with the process. Readers do not take it.

    Raises LmError 75 when another process holds it; `what` names the activity, such as "lm tokenize".
    """
    directory = make_directory(path)
    owner = os.getpid()
    try:
        descriptor = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise from_os_error(error, directory / LOCK, "open the lock") from error
    _close_in_children(descriptor)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{what} (process {owner} on {socket.gethostname()})".encode(), 0)
        except BlockingIOError:
            holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "another process"
            raise LmError(
                f"{directory}: in use by {holder}.",
                hint="Wait for it to end, or stop it, then run the same command again.",
                code=Exit.RETRY,
            ) from None
        except OSError as error:
            if error.errno in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
                raise LmError(
                    f"{directory}: this file system has no locks ({error.strerror}) to keep two runs apart.",
                    hint="Choose a directory on another file system, or mount this one with locks (Lustre: -o flock).",
                    code=Exit.CANNOT_CREATE,
                ) from error
            raise _write_failed(error, directory / LOCK, None) from error
        yield
    finally:
        if os.getpid() == owner:
            _held.discard(descriptor)
            with contextlib.suppress(OSError):  # nothing of value was written, and the lock is gone in any case
                os.close(descriptor)


def _close_in_children(descriptor: int) -> None:
    if not _fork_hook:
        os.register_at_fork(after_in_child=_drop_locks)
        _fork_hook.append(True)
    _held.add(descriptor)


def _drop_locks() -> None:
    for descriptor in _held:
        with contextlib.suppress(OSError):
            os.close(descriptor)  # the parent's lock stays: it goes with the last descriptor of the open file
    _held.clear()


_fork_hook: list[bool] = []


# ---------------------------------------------------------------------------------------- reading


def read_json(path: PathLike, *, limit: int = 64 << 20, follow_links: bool = True, infinity: bool = False) -> Any:
    """Parse a JSON file of at most `limit` bytes.

    The laxities of the usual parser are refused: NaN, numbers beyond the range of a float, duplicate keys, lone
    surrogates, anything but UTF-8. Pass follow_links=False for files that we made ourselves. infinity: the word
    `Infinity` is a number, as Python programs write it.
    """
    path = Path(path)
    try:
        descriptor = _open_regular(path, follow_links)
        with open(descriptor, "rb") as file:
            raw = file.read(limit + 1)
    except OSError as error:
        raise from_os_error(error, path, "read") from error
    if len(raw) > limit:
        raise LmError(f"{path}: larger than {format_bytes(limit)}; this is not a file of ours.", code=Exit.DATA)
    try:
        return _parse_json(raw, _infinity if infinity else None)
    except (ValueError, RecursionError) as error:
        raise LmError(f"{path}: not valid JSON ({error}).", code=Exit.DATA) from error


def sha256_file(path: PathLike, progress: Callable[[int], None] | None = None) -> str:
    """sha256 of a regular file's content, following links. `progress` receives the number of bytes of each chunk."""
    digest = hashlib.sha256()
    try:
        with open(_open_regular(path, follow_links=True), "rb", buffering=0) as file:
            buffer = bytearray(_READ_BYTES)
            view = memoryview(buffer)
            while count := file.readinto(buffer):
                digest.update(view[:count])
                if progress is not None:
                    progress(count)
    except OSError as error:
        raise from_os_error(error, path, "read") from error
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


def _named(path: PathLike) -> Path:
    """The path with a last part that can be renamed: '.' and 'a/..' have none."""
    path = Path(path)
    return Path(os.path.abspath(path)) if path.name in ("", "..") else path


def _beside(path: Path, prefix: str) -> Path:
    """A name of ours in the same directory. The token keeps processes of equal number on two hosts apart."""
    name = path.name.encode(errors="surrogateescape")[:200].decode(errors="ignore")  # names end at 255 bytes
    return path.with_name(f"{prefix}{os.getpid()}-{secrets.token_hex(4)}-{name}")


_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EBADF)
"""How file systems say that a directory cannot be locked."""


def _hold(temporary: Path) -> int:
    """Lock a directory that is being written, so that others can see that its writer lives."""
    descriptor = os.open(temporary, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    _close_in_children(descriptor)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            _let_go(descriptor)
            raise
    return descriptor


def _let_go(descriptor: int | None) -> None:
    if descriptor is not None and descriptor in _held:
        _held.discard(descriptor)
        os.close(descriptor)


def _sweep_dead(final: Path) -> None:
    """Remove what killed writers of the same directory left beside it."""
    ending = _beside(final, "").name.split("-", 2)[2]
    for name in os.listdir(final.parent):
        if _OURS.fullmatch(name) and name.split("-", 3)[3] == ending:
            try:
                descriptor = os.open(final.parent / name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            except (FileNotFoundError, NotADirectoryError):  # finished meanwhile, or a file
                continue
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove(final.parent / name)
            except OSError as error:
                if not isinstance(error, BlockingIOError | FileNotFoundError) and error.errno not in _NO_LOCKS:
                    raise
            finally:
                os.close(descriptor)


def _is_empty_directory(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink() and not os.listdir(path)


def _put_in_place(temporary: Path, final: Path) -> Path:
    """Make `temporary` the new `final`; return where the old one went. `final` is missing at no time on Linux."""
    if _exchange(temporary, final):
        return temporary
    aside = _beside(final, DELETED)
    os.rename(final, aside)
    try:
        os.rename(temporary, final)
    except BaseException:
        os.rename(aside, final)
        raise
    return aside


def _exchange(a: Path, b: Path) -> bool:
    """Swap two names in one step; False where the system or the file system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):  # not Linux
        return False
    at_cwd, exchange = -100, 2
    if renameat2(at_cwd, os.fsencode(a), at_cwd, os.fsencode(b), exchange) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
        return False
    raise OSError(code, os.strerror(code), str(b))


def _raise(error: OSError) -> None:
    raise error


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _create(path: Path, chunks: Buffer | Iterable[Buffer], size: int | None, cached: bool) -> FileDigest:
    if isinstance(chunks, bytes | bytearray | memoryview):
        size = memoryview(chunks).nbytes
        chunks = [chunks]
    digest = hashlib.sha256()
    written = 0
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        if size:
            _reserve(descriptor, size)
        direct = not cached and size is not None and size >= _UNCACHED_BYTES and _set_direct(descriptor, True)
        for view in _blocks(chunks) if direct else map(_as_bytes, chunks):
            digest.update(view)
            if direct and len(view) % mmap.PAGESIZE:
                _set_direct(descriptor, False)  # the end of the file
            _write_all(descriptor, view)
            written += len(view)
        if size is not None and written != size:
            raise ValueError(f"{path}: {written} bytes written, {size} announced")
        _fsync(descriptor)
    finally:
        os.close(descriptor)  # close can report an error too (network file systems): it must not be swallowed
    return FileDigest(written, digest.hexdigest())


def _as_bytes(chunk: Buffer) -> memoryview:
    view = memoryview(chunk)
    return view.cast("B") if view.nbytes else memoryview(b"")  # an empty array cannot be cast


def _blocks(chunks: Iterable[Buffer]) -> Iterator[memoryview]:
    """The same bytes in blocks that begin on a page of memory and of the file, as direct writes must; only the last one
    may end elsewhere. Each block lies where the one before it lay."""
    block = memoryview(mmap.mmap(-1, _BLOCK_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
    filled = 0
    for chunk in chunks:
        view = _as_bytes(chunk)
        while view:
            count = min(len(block) - filled, len(view))
            block[filled : filled + count] = view[:count]
            view, filled = view[count:], filled + count
            if filled == len(block):
                yield block
                filled = 0
    if filled:
        yield block[:filled]


def _set_direct(descriptor: int, wanted: bool) -> bool:
    """Switch writing past the page cache on or off; whether that changed anything (a file system may not have it)."""
    flag = getattr(os, "O_DIRECT", 0)  # absent on macOS
    before = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    after = before | flag if wanted else before & ~flag
    if after == before:
        return False
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, after)
    except OSError:
        if wanted:
            return False
        raise
    return True


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
        try:
            count = os.write(descriptor, view)
        except OSError as error:
            # Direct writes have rules of their own: the rest after a short one is not whole pages, say.
            if error.errno == errno.EINVAL and _set_direct(descriptor, False):
                continue
            raise
        if count == 0:
            raise OSError(errno.EIO, "write returned 0")
        view = view[count:]


def _fsync(descriptor: int) -> None:
    full = getattr(fcntl, "F_FULLFSYNC", None)
    if full is not None:  # on macOS fsync alone stops at the drive's cache
        with contextlib.suppress(OSError):
            fcntl.fcntl(descriptor, full)
            return
    os.fsync(descriptor)


def _fsync_directory(path: PathLike) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network and FUSE file systems have no such call: names are their affair
            raise
    finally:
        os.close(descriptor)


def _write_failed(error: OSError, path: Path, size: int | None) -> LmError:
    detail = ""
    with contextlib.suppress(OSError):
        free = format_bytes(shutil.disk_usage(path.absolute().parent).free)
        detail = f"{format_bytes(size)} needed, {free} free" if size else f"{free} free"
    return from_os_error(error, path, "write", detail=detail)


def _open_regular(path: PathLike, follow_links: bool) -> int:
    """A descriptor of a regular file; a pipe or a device is refused instead of hanging."""
    links = 0 if follow_links else os.O_NOFOLLOW
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | links)
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        raise OSError(errno.EINVAL, "not a regular file")
    return descriptor


def _sound_length(descriptor: int, size: int) -> int:
    """Where the sound lines of a journal end: behind its last newline, and before a last line that is not a record."""
    tail = b""
    at = size
    while at > 0 and tail.count(b"\n") < 2:  # back to the newline before the last complete line
        step = min(at, 1 << 12)
        at -= step
        block = os.pread(descriptor, step, at)
        if len(block) != step:
            raise OSError(errno.EIO, "short read")
        tail = block + tail
    end = tail.rfind(b"\n") + 1
    if end == 0:
        return at  # nothing but a torn first line: at is 0
    start = tail.rfind(b"\n", 0, end - 1) + 1
    return at + (end if json_line(tail[start:end]) is not None else start)


def json_line(line: bytes) -> dict[str, Any] | None:
    """The object in a line of a journal; None for what is torn."""
    try:
        value = _parse_json(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _parse_json(raw: bytes, constant: Callable[[str], Any] | None = None) -> Any:
    """Strict JSON; raises ValueError or RecursionError."""
    value = json.loads(
        raw.decode("utf-8"),
        parse_constant=constant or _refuse_constant,
        parse_float=_finite,
        object_pairs_hook=_unique_keys,
    )
    if b"\\ud" in raw.lower():  # perhaps half of a surrogate pair: only names of files that are no UTF-8 hold them
        try:
            json.dumps(value, ensure_ascii=False).encode(errors="surrogateescape")
        except UnicodeEncodeError:
            raise ValueError("a text holds half of a surrogate pair") from None
    return value


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _infinity(name: str) -> Any:
    return math.inf if name == "Infinity" else _refuse_constant(name)


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:40]} is beyond the range of a number")
    return number


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice[:80]!a} appears twice")
    return value
