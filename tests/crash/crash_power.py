"""Power-loss explorer: build the disk images that a power cut may leave, and load each one.

The work runs once under strace. Its calls are replayed on a model of the weakest disk that POSIX allows:
    - the data of a file are durable only by fsync of the file, the names in a directory only by fsync of the directory;
    - pending data may be lost, torn at 512 bytes, or present as zeros, each write for itself;
    - pending changes of one directory reach the disk in order, those of two directories in any order.
After every call `cut_power` builds: nothing pending arrived, all of it, and random mixtures. Each distinct image must
keep the target's promise, and the same work run on it must finish with the tree of an undisturbed run.

`kill_then_cut_power` is the double fault: a process is killed at a call, the same work is run again to its end on what
the kernel still shows, and then the power goes. It finds writers that build on something visible but not durable.

ext4 in its default mode forgives more. A call that the model does not know (a shared writable mapping, sendfile,
copy_file_range, ...) is an error: durable data must not be written that way.
"""

from __future__ import annotations

import copy
import os
import random
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from crash_trace import Target, Violations, acknowledged_in, fingerprint, fresh, in_child, scratch

_TRACE = (
    "openat,open,creat,write,pwrite64,writev,pwritev,pwritev2,fsync,fdatasync,rename,renameat,renameat2,unlink,unlinkat,"
    "rmdir,mkdir,mkdirat,ftruncate,truncate,lseek,fallocate,copy_file_range,sendfile,splice,link,linkat,symlink,"
    "symlinkat,mmap"
)
_STRACE = ["-y", "-xx", "-s", "100000000", "-e", f"trace={_TRACE}"]
_SECTOR = 512

Operation = tuple[Any, ...]


# ---------------------------------------------------------------------------------------- the trace


class NotModelled(AssertionError):
    """Durable data were touched in a way whose survival cannot be reasoned about here."""


def parse_trace(log: Path, root: Path) -> list[Operation]:
    """The calls that change something under `root`, in order, and what was said on stdout."""
    reader = _Reader(str(root))
    for line in log.read_text(errors="replace").splitlines():
        reader.line(line)
    return reader.operations


class _Reader:
    def __init__(self, root: str) -> None:
        self.root = root
        self.operations: list[Operation] = []
        self._unfinished: dict[str, str] = {}
        self._position: dict[str, int] = {}
        self._appending: set[str] = set()

    def inside(self, path: str | None) -> bool:
        return path is not None and (path == self.root or path.startswith(self.root + "/"))

    def line(self, line: str) -> None:
        thread, rest = line.split(maxsplit=1)
        if rest.endswith("<unfinished ...>"):
            self._unfinished[thread] = rest.removesuffix("<unfinished ...>").rstrip()
            return
        if match := re.match(r"<\.\.\. \w+ resumed>(.*)", rest):
            rest = self._unfinished.pop(thread, "") + match[1]
        match = re.match(r"(\w+)\((.*)\) += (-?\d+|0x[0-9a-f]+)", rest)
        if match and not match[3].startswith("-"):
            self._call(match[1], match[2], int(match[3], 0))

    def _call(self, call: str, arguments: str, result: int) -> None:
        if '"...' in arguments:
            raise AssertionError("strace cut a string")
        strings = [_unhex(text) for text in re.findall(r'"((?:\\x[0-9a-f]{2})*)"', arguments)]
        handles = [(n, _path(p)) for n, p in re.findall(r"(AT_FDCWD|\d+)<([^>]*)>", arguments)]
        descriptor, path = handles[0] if handles else ("", None)

        def name(k: int) -> str:
            """The k-th path of the call, below its directory descriptor if it has one."""
            folder = handles[min(k, len(handles) - 1)][1] if handles else ""
            return os.path.normpath(os.path.join(folder, os.fsdecode(strings[k])))

        emit = self.operations.append
        if call in ("openat", "open", "creat"):
            writable = call == "creat" or re.search("O_WRONLY|O_RDWR", arguments)
            if self.inside(name(0)) and writable:
                if "O_TMPFILE" in arguments:
                    raise NotModelled("O_TMPFILE")
                creates, cuts = (call == "creat" or flag in arguments for flag in ("O_CREAT", "O_TRUNC"))
                emit(("open", name(0), creates, cuts))
                self._position[str(result)] = 0
                (self._appending.add if "O_APPEND" in arguments else self._appending.discard)(str(result))
        elif call == "write" and descriptor == "1":
            emit(("say", strings[0]))
        elif call in ("write", "writev", "pwrite64", "pwritev", "pwritev2"):
            if self.inside(path):
                data = b"".join(strings)[:result]
                if call.startswith("p"):
                    emit(("write", path, int(arguments.split(",")[3].strip()), data))
                elif descriptor in self._appending:
                    emit(("write", path, None, data))
                else:
                    at = self._position.get(descriptor, 0)
                    emit(("write", path, at, data))
                    self._position[descriptor] = at + result
        elif call == "lseek":
            self._position[descriptor] = result
        elif call in ("fsync", "fdatasync"):
            if self.inside(path):
                emit(("fsync", path))
        elif call == "fallocate":
            if self.inside(path):
                mode, offset, length = (int(x, 0) for x in arguments.split(",")[-3:])
                if mode:
                    raise NotModelled(f"fallocate with mode {mode}")
                emit(("extend", path, offset + length))
        elif call in ("ftruncate", "truncate"):
            where = path if call == "ftruncate" else name(0)
            if self.inside(where):
                emit(("cut", where, int(arguments.rsplit(",", 1)[1])))
        elif call.startswith("rename"):
            if self.inside(name(0)) or self.inside(name(1)):
                emit(("exchange" if "RENAME_EXCHANGE" in arguments else "rename", name(0), name(1)))
        elif call.startswith("unlink") or call == "rmdir":
            if self.inside(name(0)):
                emit(("unlink", name(0)))
        elif call.startswith("mkdir"):
            if self.inside(name(0)):
                emit(("mkdir", name(0)))
        elif call.startswith("symlink"):
            where = os.path.normpath(os.path.join(path or "", os.fsdecode(strings[1])))
            if self.inside(where):
                emit(("symlink", where, os.fsdecode(strings[0])))
        elif call in ("link", "linkat"):
            if self.inside(name(1)):
                emit(("link", name(0), name(1)))
        elif any(self.inside(p) for _, p in handles):
            if call != "mmap" or ("MAP_SHARED" in arguments and "PROT_WRITE" in arguments):
                raise NotModelled(f"{call} on {path}")


def _unhex(text: str) -> bytes:
    return bytes.fromhex(text.replace("\\x", ""))


def _path(text: str) -> str:
    return os.fsdecode(_unhex(text)) if text.startswith("\\x") else text


# ---------------------------------------------------------------------------------------- the disk


@dataclass(eq=False)
class _Node:
    """An inode: kind f(ile), d(irectory) or l(ink), what is shown now, what is durable, and the steps between."""

    kind: str
    now: Any
    durable: Any
    pending: list[Operation] = field(default_factory=list)

    @classmethod
    def new(cls, kind: str, value: Any = None) -> _Node:
        return cls(kind, {}, {}) if kind == "d" else cls(kind, value, b"" if kind == "f" else value)

    def sync(self) -> None:
        self.durable = dict(self.now) if self.kind == "d" else self.now
        self.pending = []


def _put(data: bytes, offset: int, new: bytes) -> bytes:
    return data[:offset].ljust(offset, b"\0") + new + data[offset + len(new) :]


def _change(names: dict[str, _Node], step: Operation) -> None:
    what, a, b = step
    if what == "set":
        names[a] = b
    elif what == "del":
        names.pop(a, None)
    elif what == "swap":
        if a in names and b in names:
            names[a], names[b] = names[b], names[a]
    elif a in names:  # "move" inside one directory: one atomic change
        names[b] = names.pop(a)


Image = dict[str, tuple[str, Any]]
"""path below the top -> (kind, content or link target); parents come before children."""


class Disk:
    """The tree under `top` as the kernel shows it and as the disk may hold it."""

    def __init__(self, top: Path) -> None:
        self.top = str(top)
        self.root = _Node.new("d")
        for folder, folders, files in os.walk(top):  # what was there before is durable
            for name in [*folders, *files]:
                path = Path(folder) / name
                if path.is_symlink():
                    node = _Node.new("l", os.readlink(path))
                elif path.is_dir():
                    node = _Node.new("d")
                else:
                    node = _Node.new("f", path.read_bytes())
                    node.sync()
                parent = self._find(folder)
                assert parent is not None
                parent.now[name] = parent.durable[name] = node

    def apply(self, operation: Operation) -> None:
        what, path = operation[0], operation[1]
        folder, name = os.path.split(path)
        if what == "open":
            node = self._find(path)
            if node is None and operation[2]:
                self._edit(folder, ("set", name, _Node.new("f", b"")))
            elif node is not None and operation[3]:
                node.now = b""
                node.pending.append(("cut", 0))
        elif what == "write":
            node = self._file(path)
            offset = len(node.now) if operation[2] is None else operation[2]
            node.now = _put(node.now, offset, operation[3])
            node.pending.append(("write", offset, operation[3]))
        elif what == "extend":
            node = self._file(path)
            if operation[2] > len(node.now):
                node.now = node.now.ljust(operation[2], b"\0")
                node.pending.append(("extend", operation[2]))
        elif what == "cut":
            node = self._file(path)
            node.now = node.now[: operation[2]].ljust(operation[2], b"\0")
            node.pending.append(("cut", operation[2]))
        elif what == "fsync":
            self._file(path).sync()
        elif what == "unlink":
            self._edit(folder, ("del", name, None))
        elif what == "mkdir":
            self._edit(folder, ("set", name, _Node.new("d")))
        elif what == "symlink":
            self._edit(folder, ("set", name, _Node.new("l", operation[2])))
        elif what == "link":
            self._edit(os.path.dirname(operation[2]), ("set", os.path.basename(operation[2]), self._file(path)))
        elif what in ("rename", "exchange"):
            other_folder, other = os.path.split(operation[2])
            if folder == other_folder:
                self._edit(folder, ("swap" if what == "exchange" else "move", name, other))
            elif what == "exchange":
                raise NotModelled("an exchange across directories")
            else:  # two directories: the weakest reading is two separate changes
                self._edit(other_folder, ("set", other, self._file(path)))
                self._edit(folder, ("del", name, None))
        else:
            raise AssertionError(what)

    def image(self, rng: random.Random, mode: str) -> Image:
        """One legal state after the cut.

        mode: "none" or "all" of what is pending arrived; "deep": all of it below a random depth and nothing above, as
        when an emptied directory is still under its old name; "mix": anything that is legal.
        """
        result: Image = {}
        surface = rng.randrange(1, 4)

        def walk(node: _Node, path: str) -> None:
            names = dict(node.durable)
            arrived = rng.randrange(len(node.pending) + 1)
            if mode != "mix":
                arrives = mode == "all" or (mode == "deep" and path.count("/") >= surface)
                arrived = len(node.pending) if arrives else 0
            for step in node.pending[:arrived]:
                _change(names, step)
            for name, child in names.items():
                where = f"{path}/{name}"
                if child.kind == "d":
                    result[where] = ("d", None)
                    walk(child, where)
                else:
                    result[where] = (child.kind, _content(child, rng, mode) if child.kind == "f" else child.now)

        walk(self.root, "")
        return result

    def shown(self) -> Image:
        """What the kernel shows now: what a process started after a kill finds."""
        result: Image = {}

        def walk(node: _Node, path: str) -> None:
            for name, child in node.now.items():
                result[f"{path}/{name}"] = (child.kind, None if child.kind == "d" else child.now)
                if child.kind == "d":
                    walk(child, f"{path}/{name}")

        walk(self.root, "")
        return result

    def _find(self, path: str) -> _Node | None:
        node: _Node | None = self.root
        for part in os.path.relpath(path, self.top).split("/"):
            if part != "." and node is not None:
                node = node.now.get(part)
        return node

    def _file(self, path: str) -> _Node:
        node = self._find(path)
        assert node is not None, f"the model has lost {path}"
        return node

    def _edit(self, folder: str, step: Operation) -> None:
        node = self._file(folder)
        _change(node.now, step)
        node.pending.append(step)


def _content(node: _Node, rng: random.Random, mode: str) -> bytes:
    if mode in ("all", "deep"):
        return bytes(node.now)
    data: bytes = node.durable
    for step in node.pending if mode == "mix" else ():
        luck = rng.random()
        if luck < 0.4:
            continue  # lost
        if step[0] == "write":
            new = step[2]
            if luck < 0.6:
                new = new[: rng.randrange(len(new) + 1) // _SECTOR * _SECTOR]  # torn
            elif luck < 0.7:
                new = bytes(len(new))  # the size arrived, the data did not
            elif luck < 0.75:  # the later sectors arrived, the earlier ones did not
                new = bytes(len(new) // _SECTOR * _SECTOR) + new[len(new) // _SECTOR * _SECTOR :]
            data = _put(data, step[1], new)
        elif step[0] == "extend":
            data = data.ljust(step[1], b"\0")
        else:
            data = data[: step[1]].ljust(step[1], b"\0")
    return data


def materialise(state: Image, where: Path, moved_from: str) -> None:
    """Write an image into an empty directory; absolute links into the traced tree are moved with it."""
    shutil.rmtree(where, ignore_errors=True)
    where.mkdir(parents=True)
    for path, (kind, value) in state.items():
        place = f"{where}{path}"
        if kind == "d":
            os.mkdir(place)
        elif kind == "l":
            os.symlink(value.replace(moved_from, str(where)), place)
        else:
            Path(place).write_bytes(value)


# ---------------------------------------------------------------------------------------- exploring


@dataclass
class Result:
    calls: int
    images: int
    violations: Violations


class _Judge:
    """Checks each distinct image once: the promise holds, and the same work finishes with the golden tree."""

    def __init__(self, target: Target, base: Path, top: Path) -> None:
        self.target, self.top, self.place = target, top, base / "image"
        self.violations = Violations(self.place)
        self.gold = ""
        self._seen: set[tuple[int, int]] = set()

    @property
    def images(self) -> int:
        return len(self._seen)

    def image(self, state: Image, acknowledged: int, where: str) -> None:
        key = (acknowledged, hash(frozenset(state.items())))
        if key in self._seen:
            return
        self._seen.add(key)
        materialise(state, self.place, str(self.top))
        out = self.place / "out"
        try:
            self.target.check(out, acknowledged)
            again = in_child(lambda: self.target.run(out))
            assert not again.code, f"the rerun fails: {again.said.decode(errors='replace')}"
            assert fingerprint(self.target, out) == self.gold, "the tree after the rerun differs"
        except Exception as error:
            self.violations.add(error, where)


def _traced(target: Target, out: Path, log: Path, top: Path) -> list[Operation]:
    outcome = in_child(lambda: target.run(out), strace=_STRACE, log=log)
    if outcome.code:
        raise AssertionError(f"the traced run fails:\n{outcome.said.decode(errors='replace')}")
    return parse_trace(log, top)


def cut_power(target: Target, *, samples: int = 8, stride: int = 1, seed: int = 0, first_only: bool = False) -> Result:
    """Cut the power after every `stride`-th call and at the end; `samples` random mixtures at each.

    first_only: stop at the first violation.
    """
    with scratch() as base:
        top, log = base / "d", base / "log"
        judge = _Judge(target, base, top)
        rng = random.Random(seed)
        out = fresh(target, top)
        disk = Disk(top)
        operations = _traced(target, out, log, top)
        judge.gold = fingerprint(target, out)
        acknowledged = 0
        for number, operation in enumerate([("start",), *operations, ("end",)]):
            if operation[0] == "say":
                acknowledged = max(acknowledged, acknowledged_in(operation[1]))
            elif operation[0] == "end":
                acknowledged = target.units  # leaving normally acknowledges everything
            elif operation[0] != "start":
                disk.apply(operation)
            if number % stride and operation[0] not in ("end", "say"):
                continue
            for mode in ("none", "all", "deep", *["mix"] * samples):
                judge.image(disk.image(rng, mode), acknowledged, f"{mode} after call {number} {_short(operation)}")
            if first_only and judge.violations:
                break
        return Result(len(operations), judge.images, judge.violations)


def kill_then_cut_power(
    target: Target, *, samples: int = 1, stride: int = 1, phase: int = 0, seed: int = 0, first_only: bool = False
) -> Result:
    """Kill at every `stride`-th call, run the same work again, and cut the power during and after that second run."""
    with scratch() as base:
        top, log = base / "d", base / "log"
        judge = _Judge(target, base, top)
        rng = random.Random(seed)
        out = fresh(target, top)
        disk = Disk(top)
        operations = _traced(target, out, log, top)
        judge.gold = fingerprint(target, out)
        acknowledged = calls = 0
        for number, operation in enumerate(operations):
            if operation[0] == "say":
                acknowledged = max(acknowledged, acknowledged_in(operation[1]))
            else:
                disk.apply(operation)
            if number % stride != phase:
                continue
            second = copy.deepcopy(disk)
            materialise(second.shown(), top, str(top))
            calls += 1
            again = _traced(target, out, log, top)
            where = f"killed after call {number} {_short(operation)}; then"
            told = acknowledged
            for later, step in enumerate(again):
                if step[0] == "say":
                    told = max(told, acknowledged_in(step[1]))
                    continue
                second.apply(step)
                for mode in ("none", "deep", *["mix"] * samples):
                    judge.image(second.image(rng, mode), told, f"{where} {mode} after call {later}")
            for mode in ("none", "deep", *["mix"] * samples):
                judge.image(second.image(rng, mode), target.units, f"{where} {mode} at the end")
            if first_only and judge.violations:
                break
        return Result(calls, judge.images, judge.violations)


def _short(operation: Operation) -> str:
    return " ".join(str(part)[-60:] for part in operation[:3] if not isinstance(part, bytes))
