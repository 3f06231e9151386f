"""Durable files as far as one process can see; tests/crash proves what a kill or a power cut leaves behind."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import resource
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcore import storage
from lmcore.errors import Exit, LmError

ROOT_USER = os.geteuid() == 0


def leftovers(directory: Path) -> list[str]:
    return [p.name for p in directory.rglob("*") if p.name.startswith((storage.TEMPORARY, storage.DELETED))]


# ---------------------------------------------------------------------------------------- write_file


@settings(derandomize=True, max_examples=60, deadline=None)
@given(parts=st.lists(st.binary(max_size=300), max_size=8), announced=st.booleans())
def test_a_file_holds_what_was_written(
    tmp_path_factory: pytest.TempPathFactory, parts: list[bytes], announced: bool
) -> None:
    folder = tmp_path_factory.mktemp("w")
    whole = b"".join(parts)
    digest = storage.write_file(folder / "a", iter(parts), size=len(whole) if announced else None)
    assert (folder / "a").read_bytes() == whole
    assert digest == storage.FileDigest(len(whole), hashlib.sha256(whole).hexdigest())
    assert os.listdir(folder) == ["a"]
    assert storage.sha256_file(folder / "a") == digest.sha256


def test_any_buffer_is_a_chunk(tmp_path: Path) -> None:
    array = np.arange(6, dtype="<u2")
    digest = storage.write_file(
        tmp_path / "a", [array.data, bytearray(b"x"), np.zeros(0).data, array.reshape(2, 3).data]
    )
    assert (tmp_path / "a").read_bytes() == array.tobytes() + b"x" + array.tobytes()
    assert digest.bytes == 25


@settings(derandomize=True, max_examples=25, deadline=None)
@given(data=st.binary(min_size=1, max_size=2000), seed=st.integers(0, 9))
def test_short_writes_are_continued(tmp_path_factory: pytest.TempPathFactory, data: bytes, seed: int) -> None:
    folder = tmp_path_factory.mktemp("s")
    rng = np.random.default_rng(seed)
    real = os.write

    def short(descriptor: int, buffer: Any) -> int:
        return real(descriptor, memoryview(buffer)[: rng.integers(1, len(buffer) + 1)])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "write", short)
        storage.write_file(folder / "a", [data, data])
        storage.append_json_line(folder / "j", {"k": data.hex()})
    assert (folder / "a").read_bytes() == data + data
    assert storage.read_json_lines(folder / "j") == [{"k": data.hex()}]


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Files of a few kilobytes past the page cache, too; tells for every write whether it was a direct one."""
    monkeypatch.setattr(storage, "_UNCACHED_BYTES", 1)
    monkeypatch.setattr(storage, "_BLOCK_BYTES", 8192)
    direct: list[bool] = []
    real = os.write

    def write(descriptor: int, data: Any) -> int:
        direct.append(bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & getattr(os, "O_DIRECT", 0)))
        return real(descriptor, data)

    monkeypatch.setattr(os, "write", write)
    return direct


@pytest.mark.parametrize("lengths", [(1,), (8192,), (100, 8092), (100, 8092, 1), (128, 20000, 0, 7, 5000), (3, 30000)])
def test_past_the_page_cache_the_file_is_the_same(
    tmp_path: Path, small_blocks: list[bool], lengths: tuple[int, ...]
) -> None:
    parts = [np.random.default_rng(n).integers(0, 256, n, np.uint8) for n in lengths]
    whole = b"".join(part.tobytes() for part in parts)
    digest = storage.write_file(tmp_path / "a", [part.data for part in parts], size=len(whole), cached=False)
    assert (tmp_path / "a").read_bytes() == whole
    assert digest == storage.FileDigest(len(whole), hashlib.sha256(whole).hexdigest())
    pages = [True] * (len(whole) // 8192) + [False] * (len(whole) % 8192 > 0)
    assert small_blocks in (pages, [False] * len(pages))  # the second: a file system that has no direct writes


def test_past_the_page_cache_short_and_refused_writes_are_continued(
    tmp_path: Path, small_blocks: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = np.random.default_rng(0).integers(0, 256, 50_000, np.uint8).tobytes()
    write, rng = os.write, np.random.default_rng(1)
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[: rng.integers(1, len(data) + 1)]))
    storage.write_file(tmp_path / "a", [data], size=len(data), cached=False)
    assert (tmp_path / "a").read_bytes() == data
    assert not small_blocks[-1]


def test_past_the_page_cache_an_error_is_one_sentence_too(
    tmp_path: Path, small_blocks: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int, data: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(LmError, match="the disk is full") as raised:
        storage.write_file(tmp_path / "a", [bytes(20_000)], size=20_000, cached=False)
    assert raised.value.code is Exit.IO
    assert os.listdir(tmp_path) == []


def test_a_write_that_writes_nothing_is_an_error_and_no_endless_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "write", lambda descriptor, data: 0)
    with pytest.raises(LmError) as raised:
        storage.write_file(tmp_path / "a", b"x")
    assert raised.value.code is Exit.IO
    assert os.listdir(tmp_path) == []


def test_an_interrupted_write_keeps_the_old_file_and_leaves_nothing(tmp_path: Path) -> None:
    storage.write_file(tmp_path / "a", b"old")

    def breaks() -> Iterator[bytes]:
        yield b"new"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        storage.write_file(tmp_path / "a", breaks())
    assert (tmp_path / "a").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]


def test_a_wrong_announcement_is_our_bug(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="2 bytes written, 3 announced"):
        storage.write_file(tmp_path / "a", [b"xy"], size=3)
    assert os.listdir(tmp_path) == []


def test_the_umask_is_respected(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        storage.write_file(tmp_path / "a", b"x")
        storage.append_json_line(tmp_path / "j", {})
    finally:
        os.umask(old)
    assert {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in "aj"} == {0o640}


def test_a_link_is_replaced_and_never_written_through(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    canary.write_text("untouched")
    link = tmp_path / "out"
    link.symlink_to(canary)
    storage.write_file(link, b"new")
    assert canary.read_text() == "untouched"
    assert not link.is_symlink()
    for write in (
        lambda path: storage.create_file(path, b"x"),
        lambda path: storage.append_json_line(path, {"a": 1}),
    ):
        link.unlink(missing_ok=True)
        link.symlink_to(canary)
        with pytest.raises(LmError) as raised:
            write(link)
        assert raised.value.code is Exit.CANNOT_CREATE
        assert canary.read_text() == "untouched"


def test_names_as_long_as_the_system_allows(tmp_path: Path) -> None:
    for name in ("n" * 255, "\u00e9" * 127, ".npy", "new\nline"):
        storage.write_file(tmp_path / name, b"x")
        assert (tmp_path / name).read_bytes() == b"x"
    with pytest.raises(LmError) as raised:
        storage.write_file(tmp_path / ("n" * 256), b"x")
    assert raised.value.code is Exit.CANNOT_CREATE


def test_two_threads_may_replace_one_file(tmp_path: Path) -> None:
    failures: list[BaseException] = []

    def write(text: bytes) -> None:
        try:
            for _ in range(20):
                storage.write_file(tmp_path / "a", text * 1000)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=write, args=(bytes([65 + i]),)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert len(set((tmp_path / "a").read_bytes())) == 1
    assert os.listdir(tmp_path) == ["a"]


# ---------------------------------------------------------------------------------------- refusing disks


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB; needs the right to mount."""
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(place)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a small disk: {mounted.stderr.decode().strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.parametrize("announced", [True, False])
def test_a_full_disk_is_one_sentence_and_costs_nothing(small_disk: Path, announced: bool) -> None:
    storage.write_file(small_disk / "a", b"old")
    written: list[int] = []

    def chunks() -> Iterator[bytes]:
        for index in range(400):
            written.append(index)
            yield bytes(1024)

    with pytest.raises(LmError) as raised:
        storage.write_file(small_disk / "a", chunks(), size=400 * 1024 if announced else None)
    assert raised.value.code is Exit.IO
    assert "the disk is full" in raised.value.message
    assert "free" in raised.value.message
    assert bool(written) is not announced, "a known size is reserved before the first byte is made"
    assert (small_disk / "a").read_bytes() == b"old"
    assert os.listdir(small_disk) == ["a"]


def test_a_journal_on_a_full_disk_keeps_its_lines_whole(small_disk: Path) -> None:
    journal = small_disk / "j"
    count = 0
    failure: LmError | None = None
    while failure is None:
        try:
            storage.append_json_line(journal, {"n": count, "pad": "x" * 3000})
            count += 1
        except LmError as error:
            failure = error
    assert failure.code is Exit.IO
    assert [line["n"] for line in storage.read_json_lines(journal)] == list(range(count))
    assert journal.read_bytes().endswith(b"\n"), "the torn line was taken back"


def test_a_directory_on_a_full_disk_is_not_there(small_disk: Path) -> None:
    with pytest.raises(LmError, match="the disk is full"), storage.commit_directory(small_disk / "d") as folder:
        [storage.create_file(folder / str(index), bytes(50_000)) for index in range(10)]
    assert os.listdir(small_disk) == []


def test_a_full_disk_is_seen_before_work_begins(small_disk: Path) -> None:
    storage.require_free_space(small_disk / "not" / "yet", 1000, "a checkpoint")
    with pytest.raises(LmError, match=r"too full for 3 checkpoints: 1\.0 MiB needed, 256\.0 KiB free") as raised:
        storage.require_free_space(small_disk / "not" / "yet", 1 << 20, "3 checkpoints")
    assert raised.value.code is Exit.IO


def test_a_file_size_limit_is_one_sentence(tmp_path: Path) -> None:
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, old[1]))
    try:
        with pytest.raises(LmError, match="ulimit -f") as raised:
            storage.write_file(tmp_path / "a", bytes(20_000))
        with pytest.raises(LmError, match="ulimit -f"):
            storage.write_file(tmp_path / "a", iter([bytes(20_000)]))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert raised.value.code is Exit.IO
    assert os.listdir(tmp_path) == []


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """A directory that cannot be written: a read-only mount for root, no permission for others."""
    place = tmp_path / "fixed"
    place.mkdir()
    (place / "old").write_text("{}")
    if ROOT_USER:
        steps = (["mount", "--bind", str(place), str(place)], ["mount", "-o", "remount,ro,bind", str(place)])
        if any(subprocess.run(step, capture_output=True).returncode for step in steps):
            pytest.skip("cannot mount read-only")
    else:
        place.chmod(0o555)
    try:
        yield place
    finally:
        if ROOT_USER:
            subprocess.run(["umount", "-l", str(place)], check=True)
        else:
            place.chmod(0o755)


def test_a_read_only_directory_is_refused_by_all(read_only: Path) -> None:
    def commit() -> None:
        with storage.commit_directory(read_only / "d"):
            pass

    def lock() -> None:
        with storage.lock_directory(read_only, "lm test"):
            pass

    for write in (
        lambda: storage.write_file(read_only / "a", b"x"),
        lambda: storage.create_file(read_only / "a", b"x"),
        lambda: storage.write_json(read_only / "a", {}),
        lambda: storage.append_json_line(read_only / "j", {}),
        lambda: storage.make_directory(read_only / "x" / "y"),
        lambda: storage.delete_directory(read_only / "old"),
        commit,
        lock,
    ):
        with pytest.raises(LmError) as raised:
            write()
        assert raised.value.code is Exit.CANNOT_CREATE
        assert str(read_only) in raised.value.message
    assert os.listdir(read_only) == ["old"]
    assert storage.read_json(read_only / "old") == {}


def test_a_failed_sync_is_an_error_and_the_line_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage.append_json_line(tmp_path / "j", {"n": 1})

    def fails(descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(LmError) as raised:
        storage.append_json_line(tmp_path / "j", {"n": 2})
    assert raised.value.code is Exit.IO
    assert storage.read_json_lines(tmp_path / "j") == [{"n": 1}]
    with pytest.raises(LmError):
        storage.write_file(tmp_path / "a", b"x")
    assert os.listdir(tmp_path) == ["j"]


# ---------------------------------------------------------------------------------------- journal

RECORDS = st.lists(st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=40), max_size=3), max_size=5)


@settings(derandomize=True, max_examples=80, deadline=None)
@given(records=RECORDS, torn=st.binary(max_size=40), cut=st.integers(0, 10_000), newline=st.booleans())
def test_a_journal_continues_behind_any_torn_line(
    tmp_path_factory: pytest.TempPathFactory, records: list[dict[str, Any]], torn: bytes, cut: int, newline: bool
) -> None:
    """Law: whatever an interrupted append left, all acknowledged lines are read, and a new one is read after them."""
    journal = tmp_path_factory.mktemp("j") / "journal.jsonl"
    for record in records:
        storage.append_json_line(journal, record)
    following = storage.canonical_json({"follows": 1})
    tail = (following[: cut % len(following)] + torn.replace(b"\n", b"")) + (b"\n" if newline else b"")
    with open(journal, "ab") as file:
        file.write(tail)
    kept = storage.read_json_lines(journal)
    assert kept[: len(records)] == records
    assert len(kept) <= len(records) + 1
    storage.append_json_line(journal, {"last": True})
    assert storage.read_json_lines(journal) == [*kept, {"last": True}]


@pytest.mark.parametrize(
    "torn", [b"\0" * 9000, b'{"a":"' + b"x" * 9000, b'{"a":"\0\0"}\n', b"[1]\n", b"\n", b'{"a":NaN}\n']
)
def test_a_torn_line_is_cut_off(tmp_path: Path, torn: bytes) -> None:
    journal = tmp_path / "j"
    storage.append_json_line(journal, {"n": 1, "pad": "x" * 5000})
    with open(journal, "ab") as file:
        file.write(torn)
    storage.append_json_line(journal, {"n": 2})
    assert [record["n"] for record in storage.read_json_lines(journal)] == [1, 2]
    assert journal.read_bytes().count(b"\n") == 2


def test_a_missing_journal_is_empty_and_a_directory_is_an_error(tmp_path: Path) -> None:
    assert storage.read_json_lines(tmp_path / "j") == []
    with pytest.raises(LmError):
        storage.read_json_lines(tmp_path)
    with pytest.raises(LmError):
        storage.append_json_line(tmp_path, {})


# ---------------------------------------------------------------------------------------- directories


def test_a_directory_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    final = tmp_path / "a" / "d"
    with storage.commit_directory(final) as folder:
        storage.create_file(folder / "x", b"1")
        (folder / "deep").mkdir()
        storage.create_file(folder / "deep" / "y", b"2")
        assert not final.exists()
    assert sorted(p.name for p in final.rglob("*")) == ["deep", "x", "y"]
    with pytest.raises(ZeroDivisionError), storage.commit_directory(tmp_path / "e") as folder:
        storage.create_file(folder / "x", b"%d" % (1 // 0))
    assert sorted(os.listdir(tmp_path)) == ["a"]
    assert not leftovers(tmp_path)


def test_what_is_there_is_not_replaced_unasked(tmp_path: Path) -> None:
    final = tmp_path / "d"
    final.mkdir()
    with storage.commit_directory(final) as folder:  # an empty one may be filled
        storage.create_file(folder / "x", b"1")
    for existing in (final, tmp_path / "file", tmp_path / "link"):
        if existing.name == "file":
            existing.write_text("mine")
        if existing.name == "link":
            existing.symlink_to("nowhere")
        with pytest.raises(LmError, match="already exists") as raised, storage.commit_directory(existing):
            pass
        assert raised.value.code is Exit.CANNOT_CREATE
    assert (final / "x").read_bytes() == b"1"
    assert not leftovers(tmp_path)


@pytest.mark.parametrize("in_one_step", [True, False])
def test_a_directory_is_exchanged_for_its_successor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_one_step: bool
) -> None:
    if not in_one_step:
        monkeypatch.setattr(storage, "_exchange", lambda a, b: False)
    final = tmp_path / "d"
    canary = tmp_path / "canary"
    canary.write_text("untouched")
    for version in range(3):
        with storage.commit_directory(final, replace=True) as folder:
            storage.create_file(folder / f"v{version}", b"x")
            (folder / "link").symlink_to(canary)
        assert sorted(os.listdir(final)) == ["link", f"v{version}"]
    assert canary.read_text() == "untouched"
    assert sorted(os.listdir(tmp_path)) == ["canary", "d"]


@pytest.mark.skipif(sys.platform != "linux", reason="renameat2")
def test_readers_never_miss_a_directory_that_is_replaced(tmp_path: Path) -> None:
    final = tmp_path / "d"
    with storage.commit_directory(final) as folder:
        storage.create_file(folder / "x", b"1")
    missed, stop = [], threading.Event()

    def look() -> None:
        while not stop.is_set():
            if not final.is_dir():
                missed.append(1)

    reader = threading.Thread(target=look)
    reader.start()
    for _ in range(50):
        with storage.commit_directory(final, replace=True) as folder:
            storage.create_file(folder / "x", b"1")
    stop.set()
    reader.join()
    assert not missed


def test_when_the_exchange_fails_the_old_one_is_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    final = tmp_path / "d"
    with storage.commit_directory(final) as folder:
        storage.create_file(folder / "x", b"old")
    monkeypatch.setattr(storage, "_exchange", lambda a, b: False)
    real = os.rename

    def fails_once(a: Any, b: Any) -> None:
        if storage.TEMPORARY in str(a):
            raise OSError(errno.EIO, "injected")
        real(a, b)

    monkeypatch.setattr(os, "rename", fails_once)
    with pytest.raises(LmError), storage.commit_directory(final, replace=True) as folder:
        storage.create_file(folder / "x", b"new")
    assert (final / "x").read_bytes() == b"old"
    assert not leftovers(tmp_path)


def test_the_current_directory_has_a_name_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with storage.commit_directory(".") as folder:
        storage.create_file(folder / "x", b"1")
    assert (tmp_path / "here" / "x").read_bytes() == b"1"


def test_deleting_a_directory_or_a_link_to_one(tmp_path: Path) -> None:
    folder = storage.make_directory(tmp_path / "d")
    (folder / "keep").write_text("x")
    (tmp_path / "link").symlink_to(folder)
    storage.delete_directory(tmp_path / "link")
    assert (folder / "keep").read_text() == "x"
    storage.delete_directory(folder)
    assert os.listdir(tmp_path) == []
    with pytest.raises(LmError):
        storage.delete_directory(folder)


def test_directories_are_made_with_their_parents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert storage.make_directory(tmp_path / "a" / "b" / "c").is_dir()
    assert storage.make_directory(tmp_path / "a" / "b" / "c").is_dir()
    monkeypatch.chdir(tmp_path)
    assert storage.make_directory("x/y").is_dir()
    assert storage.make_directory(".").is_dir()
    assert storage.make_directory("/").is_dir()
    (tmp_path / "file").write_text("")
    (tmp_path / "dangling").symlink_to("nowhere")
    for path in ("file", "file/below", "dangling", "dangling/below"):
        with pytest.raises(LmError) as raised:
            storage.make_directory(tmp_path / path)
        assert raised.value.code is Exit.CANNOT_CREATE


def test_sweep_takes_what_is_ours_and_nothing_else(tmp_path: Path) -> None:
    ours = storage._beside(tmp_path / "shard-00001.npy", storage.TEMPORARY)
    ours.write_text("x")
    gone = storage._beside(tmp_path / "step-1", storage.DELETED)
    (gone / "deep").mkdir(parents=True)
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "keep").write_text("x")
    storage._beside(tmp_path / "view", storage.TEMPORARY).symlink_to(outside)
    for name in (".tmp-notes", ".del-", ".tmp-1-2-x", "tmp-1", ".lock", "shard-00001.npy"):
        (tmp_path / name).write_text("mine")
    storage.sweep(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [
        ".del-",
        ".lock",
        ".tmp-1-2-x",
        ".tmp-notes",
        "outside",
        "shard-00001.npy",
        "tmp-1",
    ]
    assert (outside / "keep").exists()
    with pytest.raises(LmError):
        storage.sweep(tmp_path / "missing")


# ---------------------------------------------------------------------------------------- locks

_HOLD = """
import sys, time
from lmcore import storage
from lmcore.errors import LmError
try:
    with storage.lock_directory(sys.argv[1], "lm test"):
        print("held", flush=True)
        sys.stdin.read() if sys.argv[2] == "wait" else time.sleep(0.3)
except LmError as error:
    print(int(error.code), error.message, flush=True)
"""


def holder(directory: Path, how: str = "wait") -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(directory), how], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def test_a_second_writer_is_told_who_holds_the_lock_and_a_kill_frees_it(tmp_path: Path) -> None:
    with holder(tmp_path) as first:
        assert first.stdout is not None
        assert first.stdin is not None
        assert first.stdout.readline() == "held\n"
        with pytest.raises(LmError) as raised, storage.lock_directory(tmp_path, "lm other"):
            pass
        assert raised.value.code is Exit.RETRY
        assert f"in use by lm test (process {first.pid} on " in raised.value.message
        first.send_signal(signal.SIGKILL)
        first.wait()
    with storage.lock_directory(tmp_path, "lm other"):
        assert f"lm other (process {os.getpid()}" in (tmp_path / storage.LOCK).read_text()


def test_a_race_has_one_winner(tmp_path: Path) -> None:
    for race in range(3):
        runners = [holder(tmp_path / str(race), "short") for _ in range(4)]
        said = [runner.communicate()[0] for runner in runners]
        assert sum(text == "held\n" for text in said) == 1
        assert sum(text.startswith("75 ") for text in said) == 3


def test_the_lock_is_not_reentrant_and_is_free_afterwards(tmp_path: Path) -> None:
    for _ in range(2):
        with storage.lock_directory(tmp_path, "lm a"):
            with pytest.raises(LmError), storage.lock_directory(tmp_path, "lm b"):
                pass


def test_an_orphaned_child_does_not_keep_the_lock(tmp_path: Path) -> None:
    """Worker processes are forked while the lock is held; when the parent is killed they may live for a moment."""
    code = (
        "import os, sys, time\n"
        "from lmcore import storage\n"
        "with storage.lock_directory(sys.argv[1], 'lm test'):\n"
        "    if os.fork() == 0:\n"
        "        os.close(1)\n"
        "        time.sleep(20)\n"
        "        os._exit(0)\n"
        "    print('held', flush=True)\n"
        "    time.sleep(20)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "held\n"
        parent.kill()
        parent.wait()
        try:
            for patience in range(50, -1, -1):  # on a busy machine the child may not have run yet
                try:
                    with storage.lock_directory(tmp_path, "lm next"):
                        break
                except LmError:
                    if not patience:
                        raise
                    time.sleep(0.1)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(parent.pid, signal.SIGKILL)


def test_hostile_lock_files(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    canary.write_text("untouched")
    lock = tmp_path / "d" / storage.LOCK
    lock.parent.mkdir()
    lock.symlink_to(canary)
    with pytest.raises(LmError) as raised, storage.lock_directory(lock.parent, "lm test"):
        pass
    assert raised.value.code is Exit.CANNOT_CREATE
    assert canary.read_text() == "untouched"
    lock.unlink()
    lock.mkdir()
    with pytest.raises(LmError) as raised, storage.lock_directory(lock.parent, "lm test"):
        pass
    assert raised.value.code is Exit.CANNOT_CREATE


def test_a_file_system_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    def none(descriptor: int, how: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", none)
    with pytest.raises(LmError, match="has no locks") as raised, storage.lock_directory(tmp_path, "lm test"):
        pass
    assert raised.value.code is Exit.CANNOT_CREATE


# ---------------------------------------------------------------------------------------- reading

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=10,
)


@settings(derandomize=True, max_examples=80, deadline=None)
@given(value=JSON)
def test_json_comes_back_as_it_was(tmp_path_factory: pytest.TempPathFactory, value: Any) -> None:
    path = tmp_path_factory.mktemp("r") / "a.json"
    try:
        storage.write_json(path, value)
    except UnicodeEncodeError:
        return
    assert storage.read_json(path) == value
    assert json.loads(storage.canonical_json(value)) == value


LAX = {
    "NaN": b'{"a": NaN}',
    "infinity": b"[-Infinity]",
    "beyond a float": b'{"a": 1e400}',
    "duplicate key": b'{"a": 1, "a": 2}',
    "deep duplicate": b'[{"b": {"a": 1, "a": 1}}]',
    "half a surrogate pair": b'{"a": "\\ud800"}',
    "half a pair as key": b'{"\\uDC00x": 1}',
    "raw surrogate": b'"\xed\xa0\x80"',
    "utf-16": '{"a": 1}'.encode("utf-16"),
    "utf-32": '{"a": 1}'.encode("utf-32-le"),
    "byte order mark": b'\xef\xbb\xbf{"a": 1}',
    "latin-1": b'{"a": "\xe9"}',
    "control character": b'"a\0b"',
    "deep": b"[" * 200_000,
    "deep objects": b'{"a":' * 100_000,
    "5,000 digits": b"1" * 5000,
    "trailing": b"{} {}",
    "single quotes": b"{'a': 1}",
    "comma": b"[1,]",
    "empty": b"",
    "nothing": b"   ",
}


@pytest.mark.parametrize("name", LAX)
def test_lax_json_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(LAX[name])
    with pytest.raises(LmError, match=r"a\.json: not valid JSON") as raised:
        storage.read_json(path)
    assert raised.value.code is Exit.DATA
    raised.value.message.encode()  # can be printed


def test_a_whole_surrogate_pair_is_a_character(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b'"\\ud83d\\ude00"')
    assert storage.read_json(tmp_path / "a") == "\U0001f600"


def test_many_keys_with_one_duplicate_are_found_in_good_time(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("{" + ",".join(f'"k{i}":0' for i in range(300_000)) + ',"k7":0}')
    start = time.monotonic()
    with pytest.raises(LmError, match="the key 'k7' appears twice"):
        storage.read_json(tmp_path / "a")
    assert time.monotonic() - start < 5


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "real").write_text("{}")
    (tmp_path / "link").symlink_to("real")
    for path in (tmp_path / "fifo", tmp_path, Path("/dev/zero"), tmp_path / "loop", tmp_path / "missing"):
        for read in (storage.read_json, storage.sha256_file):
            with pytest.raises(LmError):
                read(path)
    assert storage.read_json(tmp_path / "link") == {}
    with pytest.raises(LmError):
        storage.read_json(tmp_path / "link", follow_links=False)


def test_a_file_beyond_the_limit_is_not_parsed(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b" " * 101)
    with pytest.raises(LmError, match="larger than 100 bytes"):
        storage.read_json(tmp_path / "a", limit=100)


def test_a_hash_reports_its_progress(tmp_path: Path) -> None:
    data = os.urandom(3_000_000)
    (tmp_path / "a").write_bytes(data)
    seen: list[int] = []
    assert storage.sha256_file(tmp_path / "a", seen.append) == hashlib.sha256(data).hexdigest()
    assert sum(seen) == len(data)


def test_identities_do_not_depend_on_the_order_of_keys() -> None:
    assert storage.canonical_json({"b": [1, 2.5], "a": "\u00e9"}) == b'{"a":"\\u00e9","b":[1,2.5]}'
    with pytest.raises(ValueError, match="not JSON compliant"):
        storage.canonical_json({"a": float("nan")})


def test_bytes_for_people() -> None:
    assert [storage.format_bytes(n) for n in (0, 1023, 1536, 1 << 20, 5.5 * (1 << 30), 1 << 50)] == [
        "0 bytes",
        "1,023 bytes",
        "1.5 KiB",
        "1.0 MiB",
        "5.5 GiB",
        "1,048,576.0 GiB",
    ]
