"""From what a user typed to the configuration that runs: new runs, repeated commands, resumed runs, overrides.

    a new directory                        preset < --set < flags, completed with what the data say
    an existing run, the same command      must equal the run's config.yaml in identity and schedule; then it continues
    an existing run, --resume              its own configuration; what is typed beside it must be free, or an --override

`config.yaml` of a run stays as it was at the beginning. Overrides live on in the configuration of the checkpoints that
are written after them, and in run.jsonl.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lmcore.config import build, merge
from lmcore.errors import LmError
from lmcore.training import checkpoint
from lmcore.training.config import (
    DataConfig,
    RunConfig,
    complete,
    differences,
    flatten,
    key_class,
    read_run_config,
    settled,
)
from lmcore.training.data import DataSets, inspect
from lmcore.training.rundir import CONFIG


@dataclass(frozen=True)
class Launch:
    """A run that is ready to be started or continued."""

    run_dir: Path
    config: RunConfig
    """What runs now."""
    original: RunConfig
    """What config.yaml says (equal to `config` for a new run)."""
    sets: DataSets
    checkpoint: Path | None
    """The verified checkpoint to continue from."""
    exists: bool
    changes: tuple[tuple[str, Any, Any], ...] = ()
    """(key, before, after) of every setting that differs from the last time."""
    notes: tuple[str, ...] = field(default=())


def prepare(
    run_dir: str | Path,
    *,
    preset: Mapping[str, Any] | None = None,
    typed: Mapping[str, Any] | None = None,
    overrides: Mapping[str, Any] | None = None,
    resume: bool = False,
    look: bool = False,
) -> Launch:
    """Decide what runs in `run_dir`. Writes nothing.

    preset: the raw preset or file; typed: `--set` and flags, merged; overrides: `--override`. look: only looking, as if
    the directory were new. Raises LmError when the
    directory holds another run, or when a resumed run would change what it must not.
    """
    run_dir = Path(run_dir)
    typed, overrides = typed or {}, overrides or {}
    notes: list[str] = []
    exists = (run_dir / CONFIG).is_file() and (resume or not look)
    if not exists:
        if resume:
            raise LmError(f"{run_dir}: no run to resume here.", hint="Start one with: lm train")
        if run_dir.exists() and not run_dir.is_dir():
            raise LmError(f"{run_dir}: a file of this name is in the way.", hint="Choose another directory with --out.")
        config, sets = _complete(merge(preset or {}, typed, overrides))
        return Launch(run_dir, config, config, sets, None, False, (), sets.notes)

    original = read_run_config(run_dir / CONFIG)
    found = checkpoint.newest(run_dir, skipped=notes.append)
    current = read_run_config(found / checkpoint.CONFIG) if found is not None else original
    if resume:
        wanted = dict(typed)
    else:
        repeated, _ = _complete(merge(preset or {}, typed))
        changed = [d for d in differences(original, repeated) if d[2] != "auto" and not _same_data(d)]
        refused = [d for d in changed if d[3] != "free"]
        if refused:
            raise LmError(
                f"{run_dir} holds a run with other settings:\n{_table(refused)}",
                hint="Continue that run with --resume, or train this one elsewhere with --out.",
            )
        wanted = _nested({key: after for key, _, after, _ in changed})
    after = _apply(current, merge(wanted, overrides))
    named = set(_leaves(overrides))
    for key, before, value, kind in differences(current, after):
        if kind == "identity":
            raise LmError(
                f"{key} was {before!r} in {run_dir}; a run cannot continue with {value!r}.",
                hint="Start a new run with --out.",
            )
        if kind == "schedule" and not any(key == name or key.startswith(name + ".") for name in named):
            raise LmError(
                f"{key} was {before!r} in {run_dir}; {value!r} would change the training.",
                hint=f"If that is what you want: lm train --resume {run_dir} --override {key}={value}",
            )
    sets = inspect(after.data)
    after = after.model_copy(
        update={"data": after.data.model_copy(update={"train": sets.train or after.data.train, "val": sets.val})}
    )
    changes = tuple((key, before, value) for key, before, value, _ in differences(current, after))
    return Launch(run_dir, after, original, sets, found, True, changes, (*notes, *sets.notes))


def _complete(raw: Mapping[str, Any]) -> tuple[RunConfig, DataSets]:
    unknown = {key: value for key, value in raw.items() if key not in RunConfig.model_fields}
    if unknown:
        build(RunConfig, {"model": {}, **unknown})  # raises, and names the nearest setting
    sets = inspect(build(_DataOnly, {"data": raw.get("data") or {}}).data)
    return complete(raw, vocab_size=sets.vocab_size, train=sets.train, val=sets.val), sets


class _DataOnly(RunConfig.__base__):  # type: ignore[name-defined,misc]
    """Only the section that says where the data are, so that errors name the key as the user wrote it."""

    data: DataConfig = DataConfig()


def _apply(current: RunConfig, changes: Mapping[str, Any]) -> RunConfig:
    if not changes:
        return current
    base = current.model_dump(mode="json")
    train = changes.get("train") or {}
    if isinstance(train, Mapping) and train.get("tokens") is not None and train.get("steps") is None:
        base["train"]["steps"] = None  # a length in tokens replaces the number of steps that was derived before
    return settled(build(RunConfig, merge(base, changes)))


def _same_data(difference: tuple[str, Any, Any, str]) -> bool:
    """Paths are compared by content later (data.refuse_changed_data)."""
    return difference[0] == "data.val" and difference[2] is None


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in flat.items():
        for part in reversed(key.split(".")):
            value = {part: value}
        result = merge(result, value)
    return result


def _leaves(nested: Mapping[str, Any], prefix: str = "") -> list[str]:
    names: list[str] = []
    for key, value in nested.items():
        names.extend(_leaves(value, f"{prefix}{key}.") if isinstance(value, Mapping) else [f"{prefix}{key}"])
    return names


def _table(rows: list[tuple[str, Any, Any, Any]]) -> str:
    width = max(len(key) for key, *_ in rows)
    return "\n".join(f"  {key:{width}}  there: {before}   here: {after}" for key, before, after, _ in rows)


__all__ = ["Launch", "flatten", "key_class", "prepare"]
