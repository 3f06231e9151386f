"""Crash enumeration: kill or fail the program at every file-system call that touches its output, one run per call.

A dry run under strace lists the calls. Then for each of them, in a run of its own: SIGKILL just before the call, or
ENOSPC, or EIO from it. After each:
    1. the target's promise holds for what is left (`check`);
    2. an injected error ended in one of our errors, or was survived and announced; never a traceback, never silence;
    3. a writer whose write failed left no temporary behind;
    4. the same work, run again, finishes, and the tree is byte for byte the tree of an undisturbed run.
`short_write_run` adds one run in which every write is short.

What this cannot see is a missing fsync: a killed process loses nothing that the kernel already has. crash_power.py can.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from crash_trace import Target, Violations, fingerprint, fresh, in_child, scratch, short_writes

WRITING = (
    "openat,write,pwrite64,fallocate,fsync,fdatasync,ftruncate,close,rename,renameat,renameat2,mkdir,mkdirat,"
    "unlink,unlinkat,rmdir,symlink,symlinkat,link,linkat,chmod,fchmod"
)
READING = "read,pread64,getdents64"
_CLEANING = {"unlink", "unlinkat", "rmdir"}
_DATA = {"write", "pwrite64", "fallocate"}


@dataclass(frozen=True)
class Call:
    """The n-th call of this name in its thread, and the line of the trace that shows it."""

    name: str
    nth: int
    line: str

    @property
    def quiet(self) -> bool:
        """Calls whose error means nothing: the close of what was only read, or of a lock."""
        return self.name == "close" and ("[read]" in self.line or ".lock>" in self.line)


@dataclass
class Result:
    calls: int
    injections: int
    violations: Violations


def enumerate_crashes(
    target: Target,
    actions: Iterable[str] = ("KILL", "ENOSPC", "EIO"),
    *,
    stride: int = 1,
    phase: int = 0,
    tolerated: Callable[[Call, str], bool] = lambda call, action: False,
    traced: str = WRITING,
    first_only: bool = False,
) -> Result:
    """Inject at every call, or at each `stride`-th from `phase` on.

    tolerated: errors that the target may survive in silence, because they change nothing (say why at the call).
    """
    with scratch() as base:
        top, log = base / "d", base / "log"
        out = fresh(target, top)
        undisturbed = in_child(lambda: target.run(out))
        if undisturbed.code:
            raise AssertionError(f"the undisturbed run fails:\n{undisturbed.said.decode(errors='replace')}")
        gold = fingerprint(target, out)
        fresh(target, top)
        in_child(lambda: target.run(out), strace=["-y", "-e", f"trace={traced}"], log=log)
        calls = list_calls(log, top)
        violations, injections = Violations(top), 0
        for number, call in enumerate(calls):
            if first_only and violations:
                break
            for shift, action in enumerate(actions):
                if (number + shift) % stride != phase:
                    continue
                fresh(target, top)
                what = "signal=KILL" if action == "KILL" else f"error={action}"
                inject = ["-e", f"trace={traced}", "-e", f"inject={call.name}:{what}:when={call.nth}"]
                outcome = in_child(lambda: target.run(out), strace=inject)
                injections += 1
                where = f"{action} at {call.name} #{call.nth}: {call.line.replace(str(top), '')[:160]}"
                try:
                    if action == "KILL":
                        assert outcome.code == -9, f"not killed but {outcome.code}: {outcome.said.decode()}"
                    else:
                        said = outcome.said.decode(errors="replace")
                        assert outcome.code not in (1, -14), f"not an error of ours: {said}"
                        quiet = call.quiet or tolerated(call, action)
                        assert outcome.code or outcome.announced or quiet, "error swallowed in silence"
                        if outcome.code and call.name in _DATA:
                            assert not list(top.rglob(".tmp-*")), "temporary left behind"
                    target.check(out, outcome.acknowledged if outcome.code else target.units)
                    again = in_child(lambda: target.run(out))
                    assert not again.code, f"the rerun fails: {again.said.decode(errors='replace')}"
                    assert fingerprint(target, out) == gold, "the tree after the rerun differs"
                except Exception as error:
                    violations.add(error, where)
        return Result(len(calls), injections, violations)


def short_write_run(target: Target) -> Violations:
    """Every write is short: the tree must come out equal."""
    with scratch() as base:
        top = base / "d"
        violations = Violations(top)
        out = fresh(target, top)
        in_child(lambda: target.run(out))
        gold = fingerprint(target, out)
        for seed in range(3):
            out = fresh(target, top)

            def run(seed: int = seed, out: Path = out) -> None:
                with short_writes(seed):
                    target.run(out)

            outcome = in_child(run)
            try:
                assert not outcome.code, outcome.said.decode(errors="replace")
                target.check(out, target.units)
                assert fingerprint(target, out) == gold, "the tree differs"
            except Exception as error:
                violations.add(error, f"short writes, seed {seed}")
        return violations


def list_calls(log: Path, root: Path) -> list[Call]:
    """The calls of a trace that name something under `root`, in order."""
    counts: dict[tuple[str, str], int] = {}
    seen: set[tuple[str, int]] = set()
    written: set[str] = set()
    calls: list[Call] = []
    for line in log.read_text(errors="replace").splitlines():
        match = re.match(r"(\d+) +(\w+)\((.*)", line)
        if not match:
            continue  # the second half of an interrupted line, a signal, an exit
        thread, name, rest = match.groups()
        nth = counts[thread, name] = counts.get((thread, name), 0) + 1
        if str(root) not in rest:
            continue
        if name == "openat" and re.search("O_WRONLY|O_RDWR", rest) and (opened := re.search(r"= \d+<([^>]*)>", rest)):
            written.add(opened[1])
        if name == "close" and (closed := re.match(r"\d+<([^>]*)>", rest)) and closed[1] not in written:
            rest += " [read]"
        if (name, nth) not in seen:  # with several threads the n-th call of each is one injection point
            seen.add((name, nth))
            calls.append(Call(name, nth, rest))
    return calls
