"""From what a user typed to the configuration that runs: new runs, repeated commands, resumed runs, overrides.

    a new directory                        preset < --set < flags, completed with what the data say
    an existing run, the same command      must equal the run's config.yaml in identity and schedule; then it continues
    an existing run, --resume              its own configuration; what is typed beside it must be free, or an --override

A length in hours becomes a number of tokens once, when the run is new; run.jsonl remembers it, so that the same command
means the same run although a measured peak is never twice the same. The weights that a run begins with (`init_from`)
are remembered there by their hash, which matters until the run has a checkpoint of its own.

`config.yaml` of a run stays as it was at the beginning. Overrides live on in the configuration of the checkpoints that
are written after them, and in run.jsonl.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lmcore
from lmcore.config import build, merge, require_sections
from lmcore.data.manifest import created_by
from lmcore.errors import Exit, LmError
from lmcore.storage import sha256_file
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
from lmcore.training.rundir import CONFIG, EVENTS, read_start
from lmcore.training.state import RunState, read_state


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
    origin: Mapping[str, Any] = field(default_factory=dict)
    """What the start event of a new run records besides: where its length and its first weights come from."""
    weights: Path | None = None
    """The verified checkpoint whose weights to begin with; None when they are drawn, or when `checkpoint` has them."""
    notes: tuple[str, ...] = field(default=())


def prepare(
    run_dir: str | Path,
    *,
    preset: Mapping[str, Any] | None = None,
    typed: Mapping[str, Any] | None = None,
    overrides: Mapping[str, Any] | None = None,
    resume: bool = False,
    look: bool = False,
    hours: float | None = None,
) -> Launch:
    """Decide what runs in `run_dir`. Writes nothing.

    preset: the raw preset or file; typed: `--set` and flags, merged; overrides: `--override`. look: only looking, as if
    the directory were new. hours: the length of a new run, in place of steps or tokens. Raises LmError when the
    directory holds another run, or when a resumed run would change what it must not.
    """
    run_dir = Path(run_dir)
    typed, overrides = typed or {}, overrides or {}
    notes: list[str] = []
    exists = (run_dir / CONFIG).is_file() and (resume or not look)
    if hours is not None:
        _refuse_two_lengths(hours, typed, overrides, resume)
    if not exists:
        if resume:
            raise LmError(f"{run_dir}: no run to resume here.", hint="Start one with: lm train")
        if run_dir.exists() and not run_dir.is_dir():
            raise LmError(f"{run_dir}: a file of this name is in the way.", hint="Choose another directory with --out.")
        origin: dict[str, Any] = {}
        raw = _preset_for(preset or {}, merge(typed, overrides))
        first = _first_weights(raw)
        if first is not None:
            origin["weights"] = first.record()
            raw = merge({"model": first.config.model.model_dump(mode="json")}, raw)
            first.require_tokenizer(_inspected(raw))
        if hours is not None:
            origin["length"], note = _in_tokens(hours, raw)
            raw = _with_tokens(raw, origin["length"]["tokens"])
            notes.append(note)
        config, sets = _complete(raw)
        weights = first.checkpoint if first is not None else None
        if first is not None:
            notes.append(f"the weights come from {first.checkpoint} (sha256 {first.sha256[:12]})")
        return Launch(run_dir, config, config, sets, None, False, (), origin, weights, (*notes, *sets.notes))

    original = read_run_config(run_dir / CONFIG)
    found = checkpoint.newest(run_dir, skipped=notes.append)
    current = read_run_config(found / checkpoint.CONFIG) if found is not None else original
    if resume:
        wanted = dict(typed)
    else:
        raw = _preset_for(preset or {}, typed)
        began_with = (raw.get("train") or {}).get("init_from")
        if began_with != original.train.init_from:
            raise _other_settings(run_dir, [("train.init_from", original.train.init_from, began_with, "identity")])
        if began_with is not None:
            raw = merge({"model": original.model.model_dump(mode="json")}, raw)
        if hours is not None:
            raw = _with_tokens(raw, _recorded_tokens(run_dir, hours))
        try:
            repeated, _ = _complete(raw)
        except LmError as error:
            raise LmError(
                f"{run_dir} holds a run, and this command describes another one: {error.message}",
                hint=f"Continue it as it is with: lm train --resume {run_dir}",
                code=error.code,
            ) from error
        changed = [d for d in differences(original, repeated) if d[2] != "auto" and not _same_data(d)]
        refused = [d for d in changed if d[3] != "free"]
        if refused:
            raise _other_settings(run_dir, refused, typed=_leaves(typed))
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
    weights = _weights_of_the_beginning(run_dir) if found is None and after.train.init_from is not None else None
    return Launch(run_dir, after, original, sets, found, True, changes, {}, weights, (*notes, *sets.notes))


# ---------------------------------------------------------------------------------------- what all ranks share


def run_facts(launch: Launch) -> dict[str, str]:
    """What makes two processes train the same run, as phrases to be compared: the program, where it begins, the data
    and every setting but paths, which may differ from machine to machine."""
    sets = launch.sets.manifests
    train = [f"{sets[source.path].dataset_id[:12]} x {source.weight:g}" for source in launch.sets.train]
    val = [sets[path].dataset_id[:12] for path in launch.sets.val]
    place = {"train.device", "train.init_from", "data.train", "data.val", "data.stream", "data.tokenizer"}
    settings = {key: value for key, value in flatten(launch.config).items() if key not in place}
    return {
        "code": f"runs lmshards {created_by('lm train')['version']} with the sources {_sources_hash()[:12]}",
        "start": f"would begin at {_beginning(launch)}",
        "train": f"has the training data {', '.join(train) or 'of a text'}",
        "val": f"has the validation data {', '.join(val) or 'none'}",
        "tokenizer": f"has {_short(launch.sets.tokenizer_sha256)}",
        **{key: f"has {key} = {value}" for key, value in settings.items()},
    }


def _beginning(launch: Launch) -> str:
    path = launch.checkpoint or launch.weights
    if path is None:
        return "the first step"
    commit = sha256_file(path / checkpoint.COMMIT)[:12]
    if launch.checkpoint is None:
        return f"the first step with the weights of another run (COMMIT {commit})"
    return f"step {checkpoint.step_of(path)} (COMMIT {commit})"


def _sources_hash() -> str:
    """sha256 over the modules of the library; the commands lie elsewhere in a source checkout."""
    root = Path(lmcore.__file__).parent
    digest = hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        name = file.relative_to(root)
        if name.parts[0] != "tools":
            digest.update(name.as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------- a length in hours


def _refuse_two_lengths(hours: float, typed: Mapping[str, Any], overrides: Mapping[str, Any], resume: bool) -> None:
    if not hours > 0 or not math.isfinite(hours):
        raise LmError(f"--hours {hours:g}: the length of a run is more than nothing.")
    if resume:
        raise LmError(
            "--hours gives the length of a new run; a run that is resumed has one.",
            hint="Change it with --override train.steps=N, or leave earlier with --max-minutes.",
        )
    train = merge(typed, overrides).get("train") or {}
    other = next((key for key in ("steps", "tokens") if train.get(key) is not None), None)
    if other is not None:
        raise LmError(f"--hours and train.{other} both give the length of the run; give one of them.")


def _in_tokens(hours: float, raw: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """How many tokens `hours` are on this machine: (what run.jsonl records of it, a sentence)."""
    from lmcore.training.parallel import world_size
    from lmcore.training.plan import DEFAULT_MFU, Draft, find_target, tokens_in

    config, _ = _complete(_with_tokens(raw, None))
    target, devices = find_target(config.train.device, config.train.dtype), world_size()
    if devices > 1 and target.device_type == "cpu":
        raise LmError(
            "with several processes on CPUs, each would measure another peak and so another length for --hours.",
            hint=f"Let lm plan --hours {hours:g} --devices {devices} say how many tokens it is, and give --tokens.",
        )
    tokens = tokens_in(hours, Draft(config, None, ()), target, devices=devices)
    for _ in range(8):  # whole steps, so that this number alone leads to the same batch and steps again
        config, _ = _complete(_with_tokens(raw, tokens))
        whole = config.total_steps * config.batch_tokens
        if whole == tokens:
            break
        tokens = whole
    mfu = DEFAULT_MFU.get(target.device_type, 0.3)
    note = (
        f"{hours:g} hours at {mfu:.0%} of the peak of {target.name} ({(target.peak_flops or 0) / 1e12:.3g} TFLOP/s, "
        f"{target.source}) are {tokens:,} tokens: {config.total_steps:,} steps"
    )
    record = {"hours": hours, "tokens": tokens, "mfu": mfu, "peak_flops": target.peak_flops, "device": target.name}
    return record, note


def _with_tokens(raw: Mapping[str, Any], tokens: int | None) -> dict[str, Any]:
    return merge(raw, {"train": {"steps": None, "tokens": tokens}})


def _recorded_tokens(run_dir: Path, hours: float) -> int:
    """What `hours` meant when the run began."""
    length = read_start(run_dir).length
    if length is None or length.hours != hours:
        began = f"for {length.hours:g} hours" if length is not None else "with another length"
        raise LmError(
            f"{run_dir} holds a run that was started {began}, not for {hours:g} hours.",
            hint="Continue that run with --resume, or train this one elsewhere with --out.",
        )
    return length.tokens


# ---------------------------------------------------------------------------------------- weights to begin with


@dataclass(frozen=True)
class _FirstWeights:
    """What `init_from` means now."""

    given: str
    checkpoint: Path
    sha256: str
    config: RunConfig
    state: RunState

    def record(self) -> dict[str, Any]:
        """What run.jsonl keeps."""
        return {
            "init_from": self.given,
            "checkpoint": str(self.checkpoint),
            "step": self.state.step,
            "model_sha256": self.sha256,
        }

    def require_tokenizer(self, sets: DataSets) -> None:
        """LmError (65) when ids of the data mean other text than the model learned."""
        theirs = self.state.tokenizer_sha256
        if theirs != sets.tokenizer_sha256:
            raise LmError(
                f"{self.given} was trained with {_short(theirs)}, the data were made with "
                f"{_short(sets.tokenizer_sha256)}: the same ids would mean other text.",
                hint=f"Use its tokenizer: lm tokenize PATH --tokenizer {self.checkpoint / checkpoint.TOKENIZER}"
                if theirs is not None
                else "Choose a model that has a tokenizer, or data without one.",
                code=Exit.DATA,
            )


def _preset_for(preset: Mapping[str, Any], typed: Mapping[str, Any]) -> dict[str, Any]:
    """Both merged. When weights to begin with are typed, the architecture of the preset is not meant."""
    for layer in (preset, typed):
        require_sections(RunConfig, layer)
    if (typed.get("train") or {}).get("init_from") is not None:
        preset = {key: value for key, value in preset.items() if key != "model"}
    return merge(preset, typed)


def _first_weights(raw: Mapping[str, Any]) -> _FirstWeights | None:
    given = (raw.get("train") or {}).get("init_from")
    if given is None:
        return None
    path = checkpoint.resolve(str(given))
    commit = checkpoint.verify(path)
    state = read_state(path)
    config = read_run_config(path / checkpoint.CONFIG)
    return _FirstWeights(str(given), path, commit["files"][checkpoint.MODEL]["sha256"], config, state)


def _weights_of_the_beginning(run_dir: Path) -> Path:
    """The checkpoint that a run began with, for one that was ended before it had one of its own."""
    record = read_start(run_dir).weights
    if record is None:
        raise LmError(
            f"{run_dir} has no checkpoint yet, and {EVENTS} does not say which weights it begins with.",
            hint="Start a new run with --out.",
            code=Exit.DATA,
        )
    path = Path(record.checkpoint)
    try:
        found = checkpoint.verify(path)["files"][checkpoint.MODEL]["sha256"]
    except LmError as error:
        raise LmError(
            f"{run_dir} has no checkpoint yet, and the weights that it begins with cannot be read: {error.message}",
            hint="Start a new run with --out.",
            code=Exit.DATA,
        ) from error
    if found != record.model_sha256:
        raise LmError(
            f"{run_dir} has no checkpoint yet, and {path} does not hold the weights that it began with any more.",
            hint="Start a new run with --out.",
            code=Exit.DATA,
        )
    return path


def _short(identity: object) -> str:
    return f"the tokenizer {str(identity)[:12]}" if identity else "no tokenizer"


# ---------------------------------------------------------------------------------------- settings


def _complete(raw: Mapping[str, Any]) -> tuple[RunConfig, DataSets]:
    unknown = {key: value for key, value in raw.items() if key not in RunConfig.model_fields}
    if unknown:
        build(RunConfig, {"model": {}, **unknown})  # raises, and names the nearest setting
    sets = _inspected(raw)
    return complete(raw, vocab_size=sets.vocab_size, train=sets.train, val=sets.val), sets


def _inspected(raw: Mapping[str, Any]) -> DataSets:
    return inspect(build(_DataOnly, {"data": raw.get("data") or {}}).data)


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


def _other_settings(run_dir: Path, rows: list[tuple[str, Any, Any, Any]], typed: Collection[str] = ()) -> LmError:
    hint = "Continue that run with --resume, or train this one elsewhere with --out."
    if all(kind == "schedule" for *_, kind in rows):
        # What was typed, without what follows from it.
        asked = [row for row in rows if row[0] in typed] or rows
        wanted = " ".join(f"--override {key}={after}" for key, _, after, _ in asked)
        hint = f"Change that run with: lm train --resume {run_dir} {wanted}; or train this one elsewhere with --out."
    return LmError(f"{run_dir} holds a run with other settings:\n{_table(rows)}", hint=hint)


def _table(rows: list[tuple[str, Any, Any, Any]]) -> str:
    width = max(len(key) for key, *_ in rows)
    return "\n".join(f"  {key:{width}}  there: {before}   here: {after}" for key, before, after, _ in rows)


__all__ = ["Launch", "flatten", "key_class", "prepare"]
