"""Damaged files are fed to what reads them: each gives a result or one LmError, in little time and memory.

A `Target` is a file that is sound, how it is damaged, and its readers: library functions and commands, one for each
seed in turn. `seal` makes the hashes over a file fit again, as whoever rewrites one can do, so that what lies behind a
hash is reached too. LMSHARDS_FUZZ_SEEDS is the number of seeds for each kind (300; the slow tests take ten times as
many, fewer where a reader takes long).
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmcore.errors import Exit, LmError
from tests.fuzz.limits import OutOfTime, limited
from tests.fuzz.mutators import damaged_bytes, damaged_json, json_text

SEEDS = int(os.environ.get("LMSHARDS_FUZZ_SEEDS", "300"))
LONGEST_MESSAGE = 3_000

Damage = Callable[[bytes, random.Random], bytes]


@dataclass(frozen=True)
class Target:
    """One kind of file."""

    file: Path
    damage: Damage
    readers: tuple[Callable[[], Any], ...]
    seal: Callable[[], None] = lambda: None
    sealed: tuple[Path, ...] = ()
    """Files that `seal` rewrites."""
    least: float = 0.1
    """Share of the damaged files that is refused at least."""


def document(raw: bytes, rng: random.Random) -> bytes:
    """A JSON file: its values, or its bytes."""
    if rng.random() < 0.25:
        return damaged_bytes(raw, rng)
    return json_text(damaged_json(json.loads(raw), rng), rng)


def lines(raw: bytes, rng: random.Random) -> bytes:
    """A file of JSON lines: the values of one, their order and number, or bytes."""
    if rng.random() < 0.25:
        return damaged_bytes(raw, rng)
    found = raw.splitlines()
    at, luck = rng.randrange(len(found)), rng.random()
    if luck < 0.1:
        found.insert(rng.randrange(len(found)), found[at])
    elif luck < 0.2:
        del found[at]
    else:
        found[at] = json_text(damaged_json(json.loads(found[at]), rng), rng)
    return b"\n".join(found) + b"\n"


def survey(name: str, target: Target, seeds: range) -> tuple[list[str], int]:
    """What went wrong, and how many damaged files were refused or found broken."""
    sound = {path: path.read_bytes() for path in (target.file, *target.sealed)}
    faults, refused = [], 0
    try:
        for seed in seeds:
            target.file.write_bytes(target.damage(sound[target.file], random.Random(f"{name} {seed}")))
            reader = target.readers[seed % len(target.readers)]
            try:
                target.seal()
                with limited():
                    result = reader()
                refused += getattr(result, "state", "holds") == "broken" or getattr(result, "ok", True) is False
            except LmError as error:
                refused += 1
                if len(error.message) > LONGEST_MESSAGE or error.code == Exit.BUG:
                    faults.append(f"{seed}: {len(error.message)} characters, exit {error.code}: {error.message[:300]}")
            except (Exception, OutOfTime) as error:
                faults.append(f"{seed}: {type(error).__name__}: {str(error)[:300]}")
    finally:
        for path, raw in sound.items():
            path.write_bytes(raw)
    return faults, refused


def check(name: str, target: Target, seeds: range) -> None:
    """Fails with all faults; and when nearly nothing was refused, for then nothing was read."""
    for reader in target.readers:
        reader()  # the sound file
    faults, refused = survey(name, target, seeds)
    assert not faults, f"{len(faults)} of {len(seeds)}:\n" + "\n".join(faults[:20])
    assert refused >= target.least * len(seeds), f"{refused} of {len(seeds)} refused"


def command(*arguments: object) -> Callable[[], Any]:
    """A reader that runs `lm` in this process. Raises LmError for any exit code but 0 and 1; 1 is a fault."""

    def run() -> None:
        from lmcore.tools.cli import main

        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                main([str(argument) for argument in arguments])
                code: object = 0
            except SystemExit as leaving:
                code = leaving.code
        assert code != int(Exit.BUG), err.getvalue()[-300:]
        if code:
            raise LmError(err.getvalue()[:LONGEST_MESSAGE] or out.getvalue()[:LONGEST_MESSAGE])

    return run


def temporary_root(fallback: Path, name: str) -> Path:
    """A place in memory where the system has one: the tests write each file anew for each seed."""
    memory = Path("/dev/shm")
    root = memory / f"{name}-{os.getpid()}" if os.access(memory, os.W_OK) else fallback / name
    root.mkdir(parents=True)
    return root


__all__ = ["SEEDS", "Target", "check", "command", "document", "lines", "survey", "temporary_root"]
