"""Run code in a forked child, traced by strace if wanted: the ground on which the crash harnesses stand.

The test process imports what is dear (torch) once. `in_child` forks; the child waits on a pipe until strace has
attached to it, then does its work and leaves with an exit code as a command would: LmError -> its code, anything else
-> 1 with the traceback. So an injection costs some twenty milliseconds, not the start of an interpreter.

strace counts `when=N` per system call and thread, so writers under test do their input and output in one thread.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import random
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import pytest

from lmcore.errors import LmError, from_os_error

_CHILD_SECONDS = 60
_PR_SET_PTRACER, _ANY = 0x59616D61, ctypes.c_ulong(-1)


class Target(Protocol):
    """A piece of work that can be interrupted anywhere and done again."""

    units: int
    """How many units of work a complete run makes durable."""

    def prepare(self, out: Path) -> None:
        """What stands there before the run, durably."""

    def run(self, out: Path) -> None:
        """Do or continue the work; `acknowledge` what is durable so far. Leaving normally acknowledges all units."""

    def check(self, out: Path, acknowledged: int) -> None:
        """Raise when what lies under `out` breaks a promise, given that so many units were acknowledged."""


def acknowledge(units: int) -> None:
    """Say to the outside world that so many units of the work are durable now."""
    os.write(1, b"ACK %d\n" % units)


def acknowledged_in(said: bytes) -> int:
    """The highest number that was acknowledged."""
    return max((int(number) for number in re.findall(rb"^ACK (\d+)$", said, re.MULTILINE)), default=0)


def warn(text: str) -> None:
    """An error that is survived is said aloud; the harnesses insist on it."""
    os.write(2, f"warning: {text}\n".encode(errors="backslashreplace"))


# ---------------------------------------------------------------------------------------- availability


def cannot_trace() -> str:
    """Empty when strace can attach and inject here, else the reason."""
    if sys.platform != "linux" or not shutil.which("strace"):
        return "strace is not installed"
    try:
        outcome = in_child(lambda: os.close(os.open("/", os.O_RDONLY)), strace=["-e", "inject=openat:error=EIO:when=1"])
    except RuntimeError as error:
        return str(error)
    return "" if outcome.code == 74 and b"Input/output error" in outcome.said else "strace cannot inject errors here"


def require_strace() -> None:
    """Skip aloud where processes cannot be traced; LMSHARDS_REQUIRE_STRACE=1 makes that a failure (for CI)."""
    if reason := cannot_trace():
        text = f"THE CRASH TESTS DID NOT RUN: {reason}"
        if os.environ.get("LMSHARDS_REQUIRE_STRACE") == "1":
            pytest.fail(text)
        pytest.skip(text)


@contextmanager
def scratch() -> Iterator[Path]:
    """A fresh directory, in memory where the system has /dev/shm."""
    base = Path(tempfile.mkdtemp(prefix="crash-", dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None))
    try:
        yield base
    finally:
        shutil.rmtree(base, ignore_errors=True)


# ---------------------------------------------------------------------------------------- running


@dataclass(frozen=True)
class Outcome:
    """How a child ended and what it said on stdout and stderr."""

    status: int
    said: bytes

    @property
    def code(self) -> int:
        """The exit code, or minus the number of the signal that ended it."""
        return os.waitstatus_to_exitcode(self.status)

    @property
    def acknowledged(self) -> int:
        return acknowledged_in(self.said)

    @property
    def announced(self) -> bool:
        return b"warning:" in self.said


def in_child(work: Callable[[], None], *, strace: list[str] | None = None, log: Path | None = None) -> Outcome:
    """Run `work` in a forked child, under strace with these options if given; the trace goes to `log`."""
    said_r, said_w = os.pipe()
    go_r, go_w = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 dislikes any fork beside threads
        pid = os.fork()
    if pid == 0:
        code = 1
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(_CHILD_SECONDS)
            for descriptor in (1, 2):
                os.dup2(said_w, descriptor)
            for descriptor in (said_r, said_w, go_w):
                os.close(descriptor)
            ctypes.CDLL(None).prctl(_PR_SET_PTRACER, _ANY, 0, 0, 0)  # Yama: a sibling may attach
            os.write(2, b"ready\n")
            select.select([go_r], [], [])  # no read: strace would count it, or not, as the attaching falls
            work()
            code = 0
        except LmError as error:
            os.write(2, f"error: {error}\n".encode(errors="backslashreplace"))
            code = int(error.code)
        except OSError as error:  # as the boundary of the commands does
            os.write(2, f"error: {error}\n".encode(errors="backslashreplace"))
            code = int(from_os_error(error, error.filename or "", "read or write").code)
        except BaseException:
            os.write(2, traceback.format_exc().encode(errors="backslashreplace"))
        finally:
            os._exit(code)
    os.close(said_w)
    os.close(go_r)
    tracer: subprocess.Popen[bytes] | None = None
    try:
        os.read(said_r, 6)  # from here on the child makes no call but those of the work
        if strace is not None:
            command = ["strace", "-f", "-o", str(log or os.devnull), *strace, "-p", str(pid)]
            tracer = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
            assert tracer.stderr is not None
            line = tracer.stderr.readline()
            if b"attached" not in line:
                os.kill(pid, signal.SIGKILL)
                raise RuntimeError(f"strace cannot attach: {line.decode(errors='replace').strip()}")
        os.write(go_w, b"g")
        said = b""
        while part := os.read(said_r, 1 << 16):
            said += part
    finally:
        os.close(go_w)
        os.close(said_r)
        _, status = os.waitpid(pid, 0)
        if tracer is not None:
            tracer.communicate()
    return Outcome(status, said)


@contextmanager
def short_writes(seed: int = 3) -> Iterator[None]:
    """os.write and os.pwrite write a random part of what they are given, as a system may at any time."""
    rng = random.Random(seed)
    write, pwrite = os.write, os.pwrite

    def part(data: bytes) -> memoryview:
        view = memoryview(data).cast("B")
        return view[: rng.randrange(1, len(view) + 1)] if len(view) else view

    os.write = lambda fd, data: write(fd, part(data) if fd > 2 else data)  # type: ignore[assignment]
    os.pwrite = lambda fd, data, at: pwrite(fd, part(data), at)  # type: ignore[assignment]
    try:
        yield
    finally:
        os.write, os.pwrite = write, pwrite  # type: ignore[assignment]


# ---------------------------------------------------------------------------------------- judging


def tree_hash(top: Path) -> str:
    """Names, links and contents under `top`; lock files hold a process number and are left out."""
    digest = hashlib.sha256()
    for folder, folders, files in os.walk(top):
        folders.sort()
        for name in sorted([*folders, *files]):
            path = os.path.join(folder, name)
            if name == ".lock":
                continue
            digest.update(os.path.relpath(path, top).encode() + b"\0")
            if os.path.islink(path):
                digest.update(b"l" + os.readlink(path).encode())
            elif os.path.isfile(path):
                with open(path, "rb") as file:
                    digest.update(b"f" + hashlib.sha256(file.read()).digest())
            else:
                digest.update(b"d")
    return digest.hexdigest()


def fresh(target: Target, top: Path) -> Path:
    """`top` empty but for what the target wants to find; returns the output path inside it."""
    shutil.rmtree(top, ignore_errors=True)
    top.mkdir(parents=True)
    out = top / "out"
    target.prepare(out)
    return out


def fingerprint(target: Target, out: Path) -> str:
    """What must be equal in an interrupted and an undisturbed run: the tree, or what the target says."""
    own = getattr(target, "fingerprint", tree_hash)
    return str(own(out))


class Violations:
    """What broke, grouped by kind, with the place where each kind was seen first."""

    def __init__(self, top: Path) -> None:
        self._top = str(top)
        self.found: dict[str, list[str]] = {}

    def add(self, error: BaseException | str, where: str) -> None:
        text = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
        kind = re.sub(r"\d+", "#", text.replace(self._top, ""))[:160]
        self.found.setdefault(kind, []).append(f"{where}: {text[-1500:]}")

    def __bool__(self) -> bool:
        return bool(self.found)

    def __str__(self) -> str:
        lines = [f"{len(v)} x {kind}\n    first at {v[0]}" for kind, v in self.found.items()]
        return "\n".join(lines) or "no violations"
