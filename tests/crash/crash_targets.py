"""Work on the storage primitives alone, as the real writers use them, and the bugs that are planted into them.

A mutant replaces a part of lmcore.storage inside the forked child. Each names the harnesses that must catch it, so
that the mutants test the harnesses: an injector that never fires or an explorer that forgets a case fails here.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from crash_trace import acknowledge, warn

from lmcore import storage
from lmcore.errors import LmError, from_os_error


def _blob(seed: str, size: int) -> bytes:
    return (hashlib.sha256(seed.encode()).digest() * (size // 32 + 1))[:size]


class Shards:
    """Shards, then a journal line for each, then the manifest: the shape of `lm tokenize`."""

    def __init__(self, units: int = 3, size: int = 2600, *, journal_first: bool = False) -> None:
        self.units = units + 1
        self._count, self._size, self._journal_first = units, size, journal_first

    def prepare(self, out: Path) -> None: ...

    def run(self, out: Path) -> None:
        deep = out / "corpus" / "set"
        with storage.lock_directory(deep, "the crash test"):
            storage.sweep(deep)
            if (deep / "manifest.json").exists():
                storage.fsync_directory(deep)
                return
            done = len(storage.read_json_lines(deep / "journal.jsonl"))
            if done:
                storage.fsync_file(deep / "journal.jsonl")
                storage.fsync_directory(deep)
            for index in range(done, self._count):
                data = _blob(f"shard {index}", self._size)
                # The padding makes a line span sectors, so that it can be torn.
                entry = {"name": f"shard-{index}", "sha256": hashlib.sha256(data).hexdigest(), "pad": "x" * 700}
                if self._journal_first:
                    storage.append_json_line(deep / "journal.jsonl", entry)
                storage.write_file(deep / f"shard-{index}", [data[:1000], data[1000:]], size=len(data))
                if not self._journal_first:
                    storage.append_json_line(deep / "journal.jsonl", entry)
                acknowledge(index + 1)
            storage.write_json(deep / "manifest.json", storage.read_json_lines(deep / "journal.jsonl"))
            acknowledge(self.units)

    def check(self, out: Path, acknowledged: int) -> None:
        deep = out / "corpus" / "set"
        entries = storage.read_json_lines(deep / "journal.jsonl")
        if (deep / "manifest.json").exists():
            entries = storage.read_json(deep / "manifest.json")
            assert len(entries) == self._count, "the manifest is not complete"
        else:
            assert acknowledged <= self._count, "the acknowledged manifest is lost"
        for entry in entries:
            assert storage.sha256_file(deep / entry["name"]) == entry["sha256"], "a listed shard is damaged"
        assert len(entries) >= min(acknowledged, self._count), "an acknowledged shard is lost"


class Checkpoints:
    """Directories committed as a whole, a damaged one replaced, old ones deleted: the shape of a training run."""

    def __init__(self, units: int = 3, *, delete_first: bool = False) -> None:
        self.units, self._delete_first = units, delete_first

    def prepare(self, out: Path) -> None:
        (out / "step-2").mkdir(parents=True)
        (out / "step-2" / "model").write_bytes(b"damaged")

    def run(self, out: Path) -> None:
        with storage.lock_directory(out, "the crash test"):
            storage.sweep(out)
            for step in range(max(1, *self._sound(out)), self.units + 1):
                if self._delete_first:
                    self._prune(out, step)
                if step not in self._sound(out):
                    with storage.commit_directory(out / f"step-{step}", replace=True) as folder:
                        storage.create_file(folder / "model", _blob(f"model {step}", 3000))
                        (folder / "more").mkdir()
                        storage.create_file(folder / "more" / "state", b"%d" % step)
                        storage.create_file(folder / "COMMIT", b"%d" % step)
                storage.fsync_directory(out)
                acknowledge(step)
                self._prune(out, step)

    def check(self, out: Path, acknowledged: int) -> None:
        sound = self._sound(out)
        assert max(sound) >= acknowledged, "an acknowledged checkpoint is lost"
        for path in _steps(out):
            assert path.name == "step-2" or int(path.name[5:]) in sound, "half a checkpoint"

    def _prune(self, out: Path, step: int) -> None:
        for old in _steps(out):
            if int(old.name[5:]) < step:
                try:
                    storage.delete_directory(old)
                except LmError as error:
                    warn(f"kept: {error}")

    def _sound(self, out: Path) -> list[int]:
        sound = [0]
        for path in _steps(out):
            step = int(path.name[5:])
            wanted = {"model": _blob(f"model {step}", 3000), "more/state": b"%d" % step, "COMMIT": b"%d" % step}
            try:
                if all((path / name).read_bytes() == data for name, data in wanted.items()):
                    sound.append(step)
            except (FileNotFoundError, NotADirectoryError):
                pass
            except OSError as error:
                raise from_os_error(error, path, "read") from error
        return sound


def _steps(out: Path) -> list[Path]:
    try:
        return [out / name for name in sorted(os.listdir(out)) if name.startswith("step-")]
    except OSError as error:
        raise from_os_error(error, out, "read") from error


class View:
    """A directory of links beside its data, exchanged for a new version: readers find the old or the new, always."""

    units = 2

    def prepare(self, out: Path) -> None:
        out.mkdir()
        for index in range(3):
            (out / f"shard-{index}").write_bytes(_blob(f"shard {index}", 100))
        (out / "val").mkdir()
        (out / "val" / "manifest.json").write_text("[]")

    def run(self, out: Path) -> None:
        with storage.lock_directory(out, "the crash test"):
            storage.sweep(out)
            for version in range(len(storage.read_json(out / "val" / "manifest.json")) + 1, self.units + 1):
                with storage.commit_directory(out / "val", replace=True) as folder:
                    for index in range(version):
                        os.symlink(f"../shard-{index}", folder / f"shard-{index}")
                    storage.create_file(folder / "manifest.json", json.dumps(list(range(version))).encode())
                acknowledge(version)
            storage.fsync_directory(out)

    def check(self, out: Path, acknowledged: int) -> None:
        listed = storage.read_json(out / "val" / "manifest.json")
        assert len(listed) >= acknowledged, "an acknowledged view is lost"
        for index in listed:
            assert (out / "val" / f"shard-{index}").read_bytes() == _blob(f"shard {index}", 100), "a link is broken"


# ---------------------------------------------------------------------------------------- planted bugs


@dataclass(frozen=True)
class Mutant:
    """A target with a bug. `caught_by`: enum, short, power, double (kill, then power cut)."""

    name: str
    target: Any
    patches: dict[str, Callable[..., Any]]
    caught_by: tuple[str, ...]

    @property
    def units(self) -> int:
        return int(self.target.units)

    def prepare(self, out: Path) -> None:
        self.target.prepare(out)

    def run(self, out: Path) -> None:
        with contextlib.ExitStack() as stack:
            for name, replacement in self.patches.items():
                module: Any = os if name.startswith("os.") else storage
                stack.enter_context(mock.patch.object(module, name.removeprefix("os."), replacement))
            self.target.run(out)

    def check(self, out: Path, acknowledged: int) -> None:
        self.target.check(out, acknowledged)


_real_fsync, _real_fsync_directory, _real_create = storage._fsync, storage._fsync_directory, storage._create


def _nothing(*_: Any) -> None: ...


def _fsync_directories_only(descriptor: int) -> None:
    if os.path.isdir(f"/proc/self/fd/{descriptor}"):
        _real_fsync(descriptor)


def _fsync_but_temporaries(path: Any) -> None:
    if ".tmp-" not in str(path):
        _real_fsync_directory(path)


def _fsync_temporaries(path: Any) -> None:
    if ".tmp-" in str(path):
        _real_fsync_directory(path)


def _in_place(path: Any, chunks: Any, *, size: int | None = None) -> Any:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    for chunk in [chunks] if isinstance(chunks, bytes) else chunks:
        storage._write_all(descriptor, chunk)
    os.fsync(descriptor)
    os.close(descriptor)
    _real_fsync_directory(Path(path).parent)


def _write_once(descriptor: int, data: Any) -> None:
    os.write(descriptor, data)


def _swallow(*arguments: Any, **named: Any) -> Any:
    with contextlib.suppress(OSError):
        return _real_create(*arguments, **named)
    return storage.FileDigest(0, "")


def _keep_temporary(path: Any, *_: Any, **__: Any) -> None:
    raise PermissionError(1, f"not removed: {path}")


def _make_missing_only(path: Any) -> Path:
    path = Path(path)
    for folder in reversed([p for p in (path, *path.parents) if not p.exists()]):
        os.mkdir(folder)
        _real_fsync_directory(folder.parent)
    return path


def _sweep_unsynced(directory: Any) -> None:
    for path in Path(directory).iterdir():
        if storage._OURS.fullmatch(path.name):
            storage._remove(path)


def _delete_unsynced(path: Any) -> None:
    doomed = storage._beside(Path(path), storage.DELETED)
    os.rename(path, doomed)
    storage._remove(doomed)


@contextlib.contextmanager
def _straight_in(final: Any, *, replace: bool = False) -> Iterator[Path]:
    """No temporary: files go into the final directory one by one."""
    if os.path.lexists(final):
        storage._remove(Path(final))
    os.mkdir(final)
    yield Path(final)
    for folder, _, _ in os.walk(final):
        _real_fsync_directory(folder)
    _real_fsync_directory(Path(final).parent)


def mutants() -> Iterable[Mutant]:
    """Every planted bug."""
    yield Mutant("file data never synced", Shards(), {"_fsync": _fsync_directories_only}, ("power",))
    yield Mutant("directories never synced", Shards(), {"_fsync_directory": _nothing}, ("power",))
    yield Mutant("files written in place", Shards(), {"write_file": _in_place}, ("enum", "power"))
    yield Mutant("journal before shard", Shards(journal_first=True), {}, ("enum", "power"))
    yield Mutant("torn journal line kept", Shards(), {"_sound_length": lambda fd, size: size}, ("power",))
    yield Mutant("short writes ignored", Shards(), {"_write_all": _write_once}, ("short",))
    yield Mutant("write errors swallowed", Shards(), {"_create": _swallow}, ("enum",))
    yield Mutant("temporary kept on error", Shards(), {"os.unlink": _keep_temporary}, ("enum",))
    yield Mutant("only missing directories synced", Shards(1), {"make_directory": _make_missing_only}, ("double",))
    yield Mutant(
        "names inside a new directory not synced",
        Checkpoints(),
        {"_fsync_directory": _fsync_but_temporaries},
        ("power",),
    )
    yield Mutant(
        "rename of a directory not synced",
        Checkpoints(),
        {"_fsync_directory": _fsync_temporaries, "fsync_directory": _nothing},
        ("power",),
    )
    yield Mutant("old checkpoint deleted first", Checkpoints(delete_first=True), {}, ("enum", "power"))
    yield Mutant("no temporary directory", Checkpoints(), {"commit_directory": _straight_in}, ("enum", "power"))
    yield Mutant(
        "deleted before the new name is durable", Checkpoints(), {"delete_directory": _delete_unsynced}, ("power",)
    )
    yield Mutant("swept before the new name is durable", Checkpoints(2), {"sweep": _sweep_unsynced}, ("double",))
    yield Mutant("replaced in two steps", View(), {"_exchange": lambda a, b: False}, ("enum", "power"))
    yield Mutant("replaced in place", View(), {"commit_directory": _straight_in}, ("enum", "power"))
