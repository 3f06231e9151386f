"""The storage primitives survive every fault, and every planted bug is seen by the harness that is there to see it."""

from __future__ import annotations

from pathlib import Path

import crash_enum
import crash_power
import crash_targets
import pytest
from crash_trace import Target, acknowledge, in_child, require_strace, scratch

from lmcore import storage

TARGETS = [crash_targets.Shards(), crash_targets.Checkpoints(), crash_targets.View()]
MUTANTS = list(crash_targets.mutants())


@pytest.fixture(autouse=True)
def _strace() -> None:
    require_strace()


def name_of(target: object) -> str:
    return getattr(target, "name", type(target).__name__)


# A sample of the calls with each action, the same in each run; the slow test tries all.
@pytest.mark.parametrize("target", TARGETS, ids=name_of)
def test_a_kill_or_an_error_at_any_call_keeps_the_promise(target: Target) -> None:
    result = crash_enum.enumerate_crashes(target, ("KILL", "ENOSPC"), stride=7)
    assert result.injections >= 15
    assert not result.violations, str(result.violations)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS, ids=name_of)
def test_a_kill_or_any_error_at_every_call_keeps_the_promise(target: Target) -> None:
    traced = f"{crash_enum.WRITING},{crash_enum.READING}"
    result = crash_enum.enumerate_crashes(target, ("KILL", "ENOSPC", "EIO"), traced=traced)
    assert not result.violations, str(result.violations)


@pytest.mark.parametrize("target", TARGETS, ids=name_of)
def test_a_power_cut_after_any_call_keeps_the_promise(target: Target) -> None:
    result = crash_power.cut_power(target, samples=3, stride=2)
    assert result.images >= 25
    assert not result.violations, str(result.violations)


@pytest.mark.parametrize("target", TARGETS, ids=name_of)
def test_a_kill_followed_by_a_power_cut_keeps_the_promise(target: Target) -> None:
    result = crash_power.kill_then_cut_power(target, stride=31)
    assert result.images >= 10
    assert not result.violations, str(result.violations)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS, ids=name_of)
def test_power_cuts_in_full(target: Target) -> None:
    for result in (
        crash_power.cut_power(target, samples=100, seed=1),
        crash_power.kill_then_cut_power(target, samples=5),
    ):
        assert not result.violations, str(result.violations)


@pytest.mark.parametrize("target", TARGETS, ids=name_of)
def test_short_writes_change_nothing(target: Target) -> None:
    violations = crash_enum.short_write_run(target)
    assert not violations, str(violations)


# ---------------------------------------------------------------------------------------- the harness itself


def _marks(mutant: crash_targets.Mutant, harness: str) -> list[pytest.MarkDecorator]:
    """Enumerating the largest target takes long; its bugs are caught by the power cuts of the fast run, too."""
    large = isinstance(mutant.target, crash_targets.Checkpoints) and harness in ("enum", "double")
    return [pytest.mark.slow] if large else []


HARNESSES = {
    "enum": lambda mutant: crash_enum.enumerate_crashes(mutant, ("KILL", "EIO"), first_only=True).violations,
    "short": crash_enum.short_write_run,
    "power": lambda mutant: crash_power.cut_power(mutant, first_only=True).violations,
    "double": lambda mutant: crash_power.kill_then_cut_power(mutant, stride=3, first_only=True).violations,
}


@pytest.mark.parametrize(
    ("mutant", "harness"),
    [pytest.param(m, h, id=f"{m.name} - {h}", marks=_marks(m, h)) for m in MUTANTS for h in m.caught_by],
)
def test_a_planted_bug_is_caught(mutant: crash_targets.Mutant, harness: str) -> None:
    assert HARNESSES[harness](mutant), f"{harness} does not see: {mutant.name}"


@pytest.mark.parametrize("name", ["file data never synced", "torn journal line kept", "short writes ignored"])
def test_what_only_one_harness_can_see(name: str) -> None:
    """Why there are several: enumeration is blind to missing syncs, power cuts to ignored counts."""
    mutant = next(m for m in MUTANTS if m.name == name)
    blind = "power" if mutant.caught_by == ("short",) else "enum"
    if blind == "enum":
        assert not crash_enum.enumerate_crashes(mutant, ("KILL", "EIO"), stride=13).violations
    else:
        assert not crash_power.cut_power(mutant).violations


class _Odd:
    """A target made of one function, to try what the explorer refuses."""

    units = 1

    def __init__(self, work: object) -> None:
        self._work = work

    def prepare(self, out: Path) -> None:
        out.mkdir()

    def run(self, out: Path) -> None:
        self._work(out)  # type: ignore[operator]
        acknowledge(1)

    def check(self, out: Path, acknowledged: int) -> None: ...


def _mapped(out: Path) -> None:
    import mmap

    with open(out / "a", "w+b") as file:
        file.write(b"x" * 4096)
        file.flush()
        mmap.mmap(file.fileno(), 4096)[:1] = b"y"


def _copied(out: Path) -> None:
    import shutil

    storage.write_file(out / "a", b"x")
    shutil.copyfile(out / "a", out / "b")


@pytest.mark.parametrize("work", [_mapped, _copied])
def test_writes_that_cannot_be_reasoned_about_are_refused(work: object) -> None:
    with pytest.raises(crash_power.NotModelled):
        crash_power.cut_power(_Odd(work))


def test_the_model_shows_what_the_kernel_shows() -> None:
    """Replaying a trace must give the tree that really stands there at the end: else the images mean nothing."""
    for target in TARGETS:
        with scratch() as base:
            from crash_trace import fresh, tree_hash

            top, log = base / "d", base / "log"
            out = fresh(target, top)
            disk = crash_power.Disk(top)
            in_child(lambda target=target, out=out: target.run(out), strace=crash_power._STRACE, log=log)
            for operation in crash_power.parse_trace(log, top):
                if operation[0] != "say":
                    disk.apply(operation)
            crash_power.materialise(disk.shown(), base / "model", str(top))
            assert tree_hash(base / "model") == tree_hash(top)
