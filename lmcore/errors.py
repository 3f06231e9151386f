"""The one exception that people see, and the exit codes that programs see.

Whatever a user can cause (a missing file, a wrong option, a broken shard, a full disk) is raised as `LmError`: one
sentence that says what is wrong and where, a hint that says what to do next, and an exit code. Anything else that
reaches the top of the program is a bug of ours and exits with 1.
"""

from __future__ import annotations

import enum
import errno
import os
import shlex


class Exit(enum.IntEnum):
    """Exit codes of every command. They are an interface: scripts and schedulers branch on them."""

    OK = 0
    BUG = 1
    USAGE = 2  # wrong option, wrong config, refused plan
    DATA = 65  # bad input data; also the findings of `lm validate`
    DIVERGED = 70  # training met too many non-finite steps
    CANNOT_CREATE = 73  # output cannot be created (read-only, no permission)
    IO = 74  # I/O error or full disk
    RETRY = 75  # locked by another process, or preempted after saving: run the same command again
    SIGINT = 130
    SIGTERM = 143


class LmError(Exception):
    """An error that a user can cause and can mend. It survives pickling, so that worker processes can raise it.

    message: one sentence: what is wrong, where (path, line, key), the value and the limit.
    hint: what to do next, often a command to copy; empty when the message says it all.
    code: the exit code of the process when nothing catches the error.
    """

    def __init__(self, message: str, *, hint: str = "", code: Exit = Exit.USAGE) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.code = code

    def __str__(self) -> str:
        return f"{self.message} {self.hint}".strip()


def quoted(path: str | os.PathLike[str]) -> str:
    """A path as it can be pasted into a shell: for the commands that hints advise."""
    return shlex.quote(os.fspath(path))


_FULL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file would be larger than the allowed file size (see: ulimit -f)",
}
_CANNOT_CREATE = {
    errno.EACCES,
    errno.EEXIST,
    errno.EISDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.ENOTEMPTY,
    errno.EPERM,
    errno.EROFS,
}


def from_os_error(error: OSError, path: str | bytes | os.PathLike[str], doing: str, *, detail: str = "") -> LmError:
    """Turn an operating-system error into one sentence.

    doing: a verb phrase such as "write" or "read"; reading never gives exit code 73.
    detail: figures for the sentence about a full disk, such as "3.1 GiB needed, 0.4 GiB free".
    """
    name = os.fsdecode(path)
    if error.errno in _FULL:
        return LmError(
            f"{name}: {_FULL[error.errno]}{f' ({detail})' if detail else ''}.",
            hint="Make room and run the same command again; everything committed so far is kept.",
            code=Exit.IO,
        )
    if doing == "read" and error.errno == errno.ENOENT:
        return LmError(f"{name}: no such file or directory.", code=Exit.USAGE)
    code = Exit.CANNOT_CREATE if doing != "read" and error.errno in _CANNOT_CREATE else Exit.IO
    return LmError(f"{name}: cannot {doing} ({error.strerror or error}).", code=code)
