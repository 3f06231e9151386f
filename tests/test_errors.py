"""One exception class for people, one table of exit codes for programs."""

from __future__ import annotations

import concurrent.futures
import errno
import multiprocessing
import os
import pickle

import pytest

from lmcore.errors import Exit, LmError, from_os_error


def test_exit_codes_are_an_interface() -> None:
    table = {code.name: int(code) for code in Exit}
    assert table == {
        "OK": 0,
        "BUG": 1,
        "USAGE": 2,
        "DATA": 65,
        "DIVERGED": 70,
        "CANNOT_CREATE": 73,
        "IO": 74,
        "RETRY": 75,
        "SIGINT": 130,
        "SIGTERM": 143,
    }


def test_an_error_is_a_sentence_and_a_next_step() -> None:
    error = LmError("shard-00003.npy: too short.", hint="Run the same command again.", code=Exit.DATA)
    assert str(error) == "shard-00003.npy: too short. Run the same command again."
    assert str(LmError("No.")) == "No."
    assert LmError("No.").code is Exit.USAGE


def _raise_in_worker() -> None:
    raise LmError("a broken line", hint="mend it", code=Exit.DATA)


def test_an_error_crosses_processes_whole() -> None:
    copy = pickle.loads(pickle.dumps(LmError("m", hint="h", code=Exit.RETRY)))
    assert (copy.message, copy.hint, copy.code) == ("m", "h", Exit.RETRY)
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as pool:
        with pytest.raises(LmError) as raised:
            pool.submit(_raise_in_worker).result()
    assert (raised.value.message, raised.value.hint, raised.value.code) == ("a broken line", "mend it", Exit.DATA)


@pytest.mark.parametrize(
    ("number", "doing", "code", "words"),
    [
        (errno.ENOSPC, "write", Exit.IO, "the disk is full"),
        (errno.EDQUOT, "write", Exit.IO, "quota"),
        (errno.EFBIG, "write", Exit.IO, "ulimit -f"),
        (errno.EIO, "write", Exit.IO, "cannot write (Input/output error)"),
        (errno.EROFS, "write", Exit.CANNOT_CREATE, "Read-only"),
        (errno.EACCES, "write", Exit.CANNOT_CREATE, "Permission denied"),
        (errno.ENOENT, "write", Exit.CANNOT_CREATE, "No such file"),
        (errno.ELOOP, "write", Exit.CANNOT_CREATE, "symbolic links"),
        (errno.ENOENT, "read", Exit.USAGE, "no such file or directory"),
        (errno.EACCES, "read", Exit.IO, "cannot read (Permission denied)"),
        (errno.EIO, "read", Exit.IO, "cannot read (Input/output error)"),
    ],
)
def test_system_errors_become_sentences(number: int, doing: str, code: Exit, words: str) -> None:
    error = from_os_error(OSError(number, os.strerror(number)), "some/file", doing)
    assert error.code is code
    assert error.message.startswith("some/file: ")
    assert words in error.message
    assert error.message.endswith(".")
    assert "\n" not in error.message


def test_an_error_without_a_number_keeps_its_text() -> None:
    """np.save on a full disk raises OSError with errno None."""
    assert "12 requested and 3 written" in from_os_error(OSError("12 requested and 3 written"), b"x", "write").message


def test_a_full_disk_says_how_full() -> None:
    error = from_os_error(OSError(errno.ENOSPC, ""), "x", "write", detail="3.1 GiB needed, 0.4 GiB free")
    assert error.message == "x: the disk is full (3.1 GiB needed, 0.4 GiB free)."
