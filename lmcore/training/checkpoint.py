"""Checkpoints: one directory per step, complete or absent, verified before it is trusted. No pickle is written or read.

    RUN/checkpoints/step-00001000/
      model.safetensors        weights by parameter name (fp32 masters)
      optimizer.safetensors    `<parameter name>.<state>`, never sharded: any number of ranks can load it
      state.json               step, tokens seen, dataset and tokenizer identity, environment
      config.yaml              the resolved run configuration
      tokenizer.json           exact copy, so that a checkpoint can be moved alone
      COMMIT.json              format, step, and size + sha256 of every other file; written last

The directory is built as `.tmp-*`, made durable and renamed (lmcore/storage.py). There is no `latest` link: the newest
checkpoint is the one with the highest step that verifies. Old ones go only when enough newer ones are verified.

Also here, because people learn with them: the classical `save_checkpoint(model, optimizer, iteration, out)` and
`load_checkpoint(src, model, optimizer) -> iteration`, for a path or a file object.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lmcore import storage
from lmcore.errors import Exit, LmError, from_os_error
from lmcore.optim.sharding import local, rows_of
from lmcore.training import tensors

if TYPE_CHECKING:
    from lmcore.data.tokenizer import Tokenizer
    from lmcore.model.config import ModelConfig
    from lmcore.model.model import LanguageModel
    from lmcore.training.config import RunConfig
    from lmcore.training.state import RunState

FORMAT = "lmshards-checkpoint/1"
COMMIT = "COMMIT.json"
MODEL = "model.safetensors"
OPTIMIZER = "optimizer.safetensors"
STATE = "state.json"
CONFIG = "config.yaml"
TOKENIZER = "tokenizer.json"
CHECKPOINTS = "checkpoints"

_STEP_NAME = re.compile(r"step-([0-9]{8,})")


@dataclass(frozen=True)
class Snapshot:
    """Everything that a checkpoint holds, detached from the running model."""

    step: int
    model: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    state: Mapping[str, Any]
    config: bytes
    tokenizer: bytes | None

    def bytes(self) -> int:
        """Size of the tensors on disk."""
        return sum(t.numel() * t.element_size() for part in (self.model, self.optimizer) for t in part.values())


@dataclass(frozen=True)
class LoadedModel:
    """A trained model ready to be evaluated or sampled from."""

    model: LanguageModel
    tokenizer: Tokenizer | None
    config: RunConfig
    state: dict[str, Any]
    """The content of state.json, checked (state.py)."""
    path: Path
    """The checkpoint directory that was loaded."""


# ---------------------------------------------------------------------------------------- saving


def step_name(step: int) -> str:
    """1000 -> 'step-00001000'."""
    return f"step-{step:08d}"


def step_of(path: str | os.PathLike[str]) -> int | None:
    """The step that a directory name stands for, None for other names."""
    match = _STEP_NAME.fullmatch(Path(path).name)
    return int(match[1]) if match else None


def save(checkpoints: str | os.PathLike[str], snapshot: Snapshot, *, replace: bool = False) -> Path:
    """Write a checkpoint atomically and durably; return its directory.

    A verified checkpoint of the same step is kept as it is: training is a function of the step, so it has the same
    content; a damaged one is replaced. replace: take the place of a sound one too (atomic). Raises LmError (73, 74) and
    leaves nothing behind when the disk refuses.
    """
    final = Path(checkpoints) / step_name(snapshot.step)
    if final.is_dir() and not replace:
        try:
            verify(final)
            return final
        except LmError:
            pass
    with storage.commit_directory(final, replace=True) as folder:
        files: dict[str, storage.FileDigest] = {}
        for name, part in ((MODEL, snapshot.model), (OPTIMIZER, snapshot.optimizer)):
            chunks, size = tensors.tensor_chunks(part)
            files[name] = storage.create_file(folder / name, chunks, size=size)
        files[STATE] = storage.create_file(folder / STATE, _json(snapshot.state))
        files[CONFIG] = storage.create_file(folder / CONFIG, snapshot.config)
        if snapshot.tokenizer is not None:
            files[TOKENIZER] = storage.create_file(folder / TOKENIZER, snapshot.tokenizer)
        listing = {name: {"bytes": d.bytes, "sha256": d.sha256} for name, d in sorted(files.items())}
        commit = {"format": FORMAT, "step": snapshot.step, "files": listing}
        storage.create_file(folder / COMMIT, _json(commit))
    return final


def prune(
    checkpoints: str | os.PathLike[str], *, keep: int, keep_every: int | None = None, known: Collection[int] = ()
) -> list[int]:
    """Delete old checkpoints; return the steps that are gone.

    The newest `keep` that verify stay, and every one whose step is a multiple of `keep_every`. A checkpoint that does
    not verify never counts. `known` are steps that this process has verified already, so that they are not read again.
    """
    good: list[Path] = []
    redundant: list[Path] = []
    for path in steps_on_disk(checkpoints):
        step = step_of(path)
        assert step is not None
        if len(good) >= keep:
            if not (keep_every and step % keep_every == 0):
                redundant.append(path)
        elif step in known or is_sound(path):
            good.append(path)
    for path in reversed(redundant):  # the oldest first: a crash in between leaves a contiguous tail
        storage.delete_directory(path)
    return sorted(step for step in map(step_of, redundant) if step is not None)


# ---------------------------------------------------------------------------------------- finding and verifying


def steps_on_disk(checkpoints: str | os.PathLike[str]) -> list[Path]:
    """The directories named step-N, newest first, verified or not."""
    folder = Path(checkpoints)
    if not folder.is_dir():
        return []
    found = [(step, entry) for entry in folder.iterdir() if (step := step_of(entry)) is not None]
    return [entry for _, entry in sorted(found, reverse=True)]


def verify(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The commit record of a checkpoint whose files are exactly those listed, with their sizes and hashes.

    Raises LmError (65) that names the first file at fault. Links are not followed.
    """
    path = Path(path)
    try:
        folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise from_os_error(error, path, "read") from error
    try:
        commit = _read_commit(path, folder)
        present = set(os.listdir(folder)) - {COMMIT}
        listed = set(commit["files"])
        if present != listed:
            missing, extra = sorted(listed - present), sorted(present - listed)
            what = f"{missing[0]} is missing" if missing else f"{extra[0]} does not belong here"
            raise LmError(f"{path}: not a complete checkpoint: {what}.", code=Exit.DATA)
        for name, entry in commit["files"].items():
            with tensors.open_plain(name, directory=folder) as file:
                size = os.fstat(file.fileno()).st_size
                if size != entry["bytes"]:
                    raise LmError(f"{path / name}: {size:,} bytes, {COMMIT} says {entry['bytes']:,}.", code=Exit.DATA)
                if hashlib.file_digest(file, "sha256").hexdigest() != entry["sha256"]:  # type: ignore[arg-type]
                    raise LmError(f"{path / name}: the content does not match {COMMIT}.", code=Exit.DATA)
        return commit
    except OSError as error:
        raise from_os_error(error, path, "read") from error
    finally:
        os.close(folder)


def is_sound(path: str | os.PathLike[str]) -> bool:
    """Whether a checkpoint verifies."""
    try:
        verify(path)
    except LmError:
        return False
    return True


def newest(run: str | os.PathLike[str], *, skipped: Callable[[str], None] | None = None) -> Path | None:
    """The newest checkpoint of a run that verifies, None when there is none.

    skipped: receives one sentence for every newer checkpoint that was passed over.
    """
    for path in steps_on_disk(Path(run) / CHECKPOINTS):
        try:
            verify(path)
        except LmError as error:
            if skipped is not None:
                skipped(f"{error.message} It is passed over.")
            continue
        return path
    return None


def is_run(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a run directory or a checkpoint, sound or not."""
    path = Path(path)
    return (path / COMMIT).is_file() or step_of(path) is not None or (path / CHECKPOINTS).is_dir()


def find_run(runs: str | os.PathLike[str] = "runs") -> Path:
    """The run that was trained last under a directory of runs (by its newest checkpoint's time of writing)."""
    runs = Path(runs)
    best: tuple[float, Path] | None = None
    for run in sorted(runs.iterdir()) if runs.is_dir() else []:
        steps = steps_on_disk(run / CHECKPOINTS)
        commit = steps[0] / COMMIT if steps else None
        if commit is not None and commit.is_file():
            written = commit.stat().st_mtime
            if best is None or written > best[0]:
                best = (written, run)
    if best is None:
        raise LmError(f"{runs}: no trained model here.", hint="Train one with: lm train")
    return best[1]


def resolve(path: str | os.PathLike[str], *, skipped: Callable[[str], None] | None = None) -> Path:
    """The verified checkpoint that `path` means: itself, or the newest one of a run."""
    path = Path(path)
    if (path / COMMIT).is_file() or step_of(path) is not None:
        verify(path)
        return path
    if (path / CHECKPOINTS).is_dir():
        found = newest(path, skipped=skipped)
        if found is None:
            raise LmError(
                f"{path}: no checkpoint of this run is complete.",
                hint="Run 'lm train' again to make one.",
                code=Exit.DATA,
            )
        return found
    if not path.exists():
        raise LmError(f"{path}: no such run or checkpoint.", hint="Train a model with: lm train")
    foreign = next((e.name for e in path.iterdir() if e.name == ".metadata" or e.suffix == ".distcp"), None)
    if path.is_dir() and foreign is not None:
        raise LmError(f"{path}: {foreign} is a pickle-based checkpoint, which is never opened.", code=Exit.DATA)
    raise LmError(f"{path}: neither a run directory nor a checkpoint.", hint="A run has a folder 'checkpoints/'.")


# ---------------------------------------------------------------------------------------- loading


def load_model(
    path: str | os.PathLike[str],
    *,
    device: str | torch.device = "auto",
    dtype: torch.dtype | None = None,
    skipped: Callable[[str], None] | None = None,
) -> LoadedModel:
    """Load a trained model from a run directory (its newest good checkpoint) or from one checkpoint.

    device: "auto" takes cuda, mps or cpu. dtype: cast the weights; None keeps the fp32 masters. The model comes back in
    evaluation mode. Raises LmError when nothing loadable is there, or when names or shapes do not fit the config.
    """
    from lmcore.data.tokenizer import Tokenizer
    from lmcore.model.model import LanguageModel
    from lmcore.training.config import read_run_config
    from lmcore.training.device import resolve_device
    from lmcore.training.state import read_state

    checkpoint = resolve(path, skipped=skipped)
    config = read_run_config(checkpoint / CONFIG)
    state = read_state(checkpoint)
    require_size(config.model, checkpoint)
    model = LanguageModel(config.model)
    load_weights(model, checkpoint / MODEL)
    tokenizer_path = checkpoint / TOKENIZER
    tokenizer = Tokenizer.from_file(tokenizer_path) if tokenizer_path.is_file() else None
    recorded = state.tokenizer_sha256
    if tokenizer is not None and recorded not in (None, tokenizer.sha256):
        raise LmError(
            f"{tokenizer_path}: this tokenizer ({tokenizer.sha256[:12]}) is not the one of the training "
            f"({recorded[:12]}).",
            code=Exit.DATA,
        )
    if max(state.opening or (), default=0) >= config.model.vocab_size:
        raise LmError(f"{checkpoint / STATE}: opening holds an id beyond the vocabulary.", code=Exit.DATA)
    if tokenizer is not None:
        tokenizer.opening = _opening(state, tokenizer)
    model.to(device=resolve_device(device), dtype=dtype)
    model.eval()
    return LoadedModel(model, tokenizer, config, state.to_json(), checkpoint)


def require_size(config: ModelConfig, checkpoint: Path) -> None:
    """LmError (65) when the weights of a checkpoint are fewer than its configuration needs, before memory is taken for
    a model."""
    from lmcore.model.plan import plan_model

    path = checkpoint / MODEL
    try:
        with tensors.open_plain(path) as file:
            entries, _ = tensors.read_header(file, os.fstat(file.fileno()).st_size, os.fspath(path))
    except OSError as error:
        raise from_os_error(error, path, "read") from error
    held, needed = sum(math.prod(entry.shape) for entry in entries.values()), plan_model(config).parameters
    if held < needed:
        raise LmError(
            f"{path}: {held:,} weights, and {CONFIG} beside it describes a model of {needed:,}.",
            hint="The checkpoint belongs to another architecture.",
            code=Exit.DATA,
        )


def _opening(state: RunState, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Ids in front of every document in training. Runs that do not record them read documents without a BOS, imported
    models what their tokenizer puts in front."""
    from lmcore.data.surroundings import opening_of_tokenizer

    if state.opening is not None:
        return tuple(state.opening)
    return opening_of_tokenizer(tokenizer) if state.imported_from is not None else ()


def model_tensors(model: torch.nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name; a tensor shared under two names appears once, under the first."""
    result: dict[str, Tensor] = {}
    seen: set[tuple[int, tuple[int, ...]]] = set()
    for name, tensor in _unwrapped(model).state_dict().items():
        key = (local(tensor).data_ptr(), tuple(tensor.shape))
        if local(tensor).numel() and key in seen:
            continue
        seen.add(key)
        result[name.replace("_orig_mod.", "")] = tensor
    return result


def load_weights(model: torch.nn.Module, path: str | os.PathLike[str]) -> None:
    """Fill a model from a safetensors file. Names, shapes and types are compared before anything is read."""
    wanted = model_tensors(model)
    try:
        with tensors.open_plain(path) as file:
            entries, _ = tensors.read_header(file, os.fstat(file.fileno()).st_size, os.fspath(path))
            _compare(wanted, {name: entry.shape for name, entry in entries.items()}, os.fspath(path), "model")
            with torch.no_grad():
                for name, tensor in wanted.items():
                    whole = tensors.read_tensor(file, entries[name], os.fspath(path))
                    mesh = getattr(tensor, "device_mesh", None)
                    if mesh is not None:  # sharded: this rank's rows
                        start, stop = rows_of(len(whole), mesh.get_local_rank(), mesh.size())
                        whole = whole[start:stop]
                    local(tensor).copy_(whole)
    except OSError as error:
        raise from_os_error(error, path, "read") from error


# ---------------------------------------------------------------------------------------- the classical pair


def save_checkpoint(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    iteration: int,
    out: str | os.PathLike[str] | IO[bytes],
) -> None:
    """Save model, optimizer and iteration into one file (a path, written atomically, or an open binary file).

    The file is safetensors: tensors by name, everything else as JSON in its metadata. Raises LmError for what neither
    can hold, which it names, before anything is written.
    """
    if isinstance(out, io.TextIOBase):
        raise LmError("save_checkpoint: the file was opened for text.", hint="Open it with mode 'wb'.")
    found, structure = _pack(optimizer.state_dict())
    contents = {f"model.{name}": tensor for name, tensor in model_tensors(model).items()}
    contents |= {f"optimizer.{name}": tensor for name, tensor in found.items()}
    metadata = {"format": FORMAT, "iteration": str(int(iteration)), "optimizer": json.dumps(structure)}
    chunks, size = tensors.tensor_chunks(contents, metadata)
    if isinstance(out, str | os.PathLike):
        storage.write_file(out, chunks, size=size)
    else:
        for chunk in chunks:
            out.write(chunk)


def load_checkpoint(
    src: str | os.PathLike[str] | IO[bytes], model: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> int:
    """Restore what `save_checkpoint` saved; return the iteration. Works on whatever device the model is on.

    Every tensor of the optimizer comes back with the dtype that it was saved with. Raises LmError when the file is
    damaged or belongs to another model or optimizer; both are then as they were.
    """
    name, file = _opened(src)
    with file:
        iteration, state, weights = _read_file(file, name)
    wanted = model_tensors(model)
    _compare(wanted, {key: tuple(tensor.shape) for key, tensor in weights.items()}, name, "model")
    before = optimizer.state_dict()
    before = before | {"state": {key: dict(value) for key, value in before["state"].items()}}
    try:
        optimizer.load_state_dict(state)
    except LmError:
        optimizer.load_state_dict(before)
        raise
    except Exception as error:  # an optimizer is anybody's code
        optimizer.load_state_dict(before)
        raise LmError(f"{name}: the optimizer state does not fit this optimizer ({error}).", code=Exit.DATA) from error
    _restore_dtypes(optimizer, state)
    with torch.no_grad():
        for key, tensor in wanted.items():
            tensor.copy_(weights[key])
    return iteration


def _restore_dtypes(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> None:
    """PyTorch casts state to the dtype of its parameter: what an optimizer keeps in fp32 beside bf16 would be lost."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    for parameter, number in zip(parameters, numbers, strict=True):
        for key, value in saved["state"].get(number, {}).items():
            now = optimizer.state[parameter].get(key)
            if isinstance(value, Tensor) and isinstance(now, Tensor) and now.dtype != value.dtype:
                optimizer.state[parameter][key] = value.to(now.device, copy=True)


# ------------------------------------------------------------------------------ one file


def _opened(src: str | os.PathLike[str] | IO[bytes]) -> tuple[str, IO[bytes]]:
    """(a name for messages, the file)."""
    if isinstance(src, str | os.PathLike):
        try:
            return os.fspath(src), tensors.open_plain(src)
        except OSError as error:
            raise from_os_error(error, src, "read") from error
    name = str(getattr(src, "name", "the checkpoint"))
    try:
        raw = src.read()
    except (OSError, ValueError) as error:
        raise LmError(f"{name}: cannot read ({error}).", code=Exit.IO) from error
    if not isinstance(raw, bytes):
        raise LmError(f"{name}: the file was opened for text.", hint="Open it with mode 'rb'.")
    return name, io.BytesIO(raw)


def _read_file(file: IO[bytes], name: str) -> tuple[int, dict[str, Any], dict[str, Tensor]]:
    """(iteration, state of the optimizer, weights) of a file that save_checkpoint wrote, checked whole."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    entries, metadata = tensors.read_header(file, size, name)
    if metadata.get("format") != FORMAT or not {"iteration", "optimizer"} <= metadata.keys():
        raise LmError(f"{name}: not a checkpoint made by save_checkpoint.", code=Exit.DATA)
    if not re.fullmatch(r"-?[0-9]{1,18}", metadata["iteration"]):
        raise LmError(f"{name}: its iteration {metadata['iteration'][:40]!r} is not a number.", code=Exit.DATA)
    read = {key: tensors.read_tensor(file, entry, name) for key, entry in entries.items()}
    found = {key.removeprefix("optimizer."): t for key, t in read.items() if key.startswith("optimizer.")}
    weights = {key.removeprefix("model."): t for key, t in read.items() if key.startswith("model.")}
    damaged = LmError(f"{name}: the state of the optimizer in it is damaged.", code=Exit.DATA)
    try:
        state = _unpack(json.loads(metadata["optimizer"]), found)
        if found:
            raise ValueError("tensors that belong to nothing")
    except (ValueError, RecursionError) as error:
        raise damaged from error
    if not isinstance(state, dict) or not isinstance(state.get("state"), dict):
        raise damaged
    groups = state.get("param_groups")
    if not isinstance(groups, list) or not all(
        isinstance(group, dict) and isinstance(group.get("params"), list) for group in groups
    ):
        raise damaged
    if not all(isinstance(value, dict) for value in state["state"].values()):
        raise damaged
    return int(metadata["iteration"]), state, weights


def _pack(value: Any, prefix: str = "") -> tuple[dict[str, Tensor], Any]:
    """Separate a nested state dict into tensors by path and a JSON-able structure with references to them."""
    if isinstance(value, Tensor):
        return {prefix: value}, {"tensor": prefix}
    if isinstance(value, Mapping):
        found: dict[str, Tensor] = {}
        items: list[list[Any]] = []
        for key, item in value.items():
            inner, structure = _pack(item, f"{prefix}.{key}" if prefix else str(key))
            found |= inner
            items.append([key, structure])
        return found, {"mapping": items}
    if isinstance(value, list | tuple):
        found = {}
        parts: list[Any] = []
        for index, item in enumerate(value):
            inner, structure = _pack(item, f"{prefix}.{index}" if prefix else str(index))
            found |= inner
            parts.append(structure)
        return found, {"tuple" if isinstance(value, tuple) else "list": parts}
    if isinstance(value, np.generic):  # a learning rate that NumPy computed
        value = value.item()
    if not isinstance(value, str | int | float | bool | None):
        raise LmError(
            f"the optimizer's {prefix} is a {type(value).__name__}, which a checkpoint cannot hold.",
            hint="Checkpoints hold tensors, numbers, texts, lists and dicts.",
        )
    return {}, {"value": value}


def _unpack(structure: Any, found: dict[str, Tensor], prefix: str = "") -> Any:
    """What `_pack` took apart, its tensors taken out of `found`; ValueError for anything else."""
    if not isinstance(structure, dict) or len(structure) != 1:
        raise ValueError("not one kind of value")
    kind, content = next(iter(structure.items()))
    if kind == "tensor" and content == prefix and prefix in found:
        return found.pop(prefix)
    if kind == "value" and isinstance(content, str | int | float | bool | None):
        return content
    if kind in ("list", "tuple") and isinstance(content, list):
        before = f"{prefix}." if prefix else ""
        parts = [_unpack(item, found, f"{before}{index}") for index, item in enumerate(content)]
        return tuple(parts) if kind == "tuple" else parts
    if kind == "mapping" and isinstance(content, list):
        if not all(isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str | int) for pair in content):
            raise ValueError("not pairs of key and value")
        before = f"{prefix}." if prefix else ""
        return {key: _unpack(item, found, f"{before}{key}") for key, item in content}
    raise ValueError(f"an unknown kind of value: {kind!r}")


# ---------------------------------------------------------------------------------------- private


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()


def _read_commit(path: Path, folder: int) -> dict[str, Any]:
    try:
        with tensors.open_plain(COMMIT, directory=folder) as file:
            raw = file.read(1 << 20)
    except FileNotFoundError:
        raise LmError(f"{path}: no {COMMIT}, so this checkpoint was not completed.", code=Exit.DATA) from None
    try:
        commit = json.loads(raw)
        files = commit["files"]
        sound = commit["format"] == FORMAT and type(commit["step"]) is int and MODEL in files
        for name, entry in files.items():
            sound &= os.sep not in name and name not in (".", "..", COMMIT)
            sound &= type(entry["bytes"]) is int and re.fullmatch("[0-9a-f]{64}", entry["sha256"]) is not None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        sound = False
    if not sound:
        raise LmError(f"{path / COMMIT}: not a commit record of format {FORMAT}.", code=Exit.DATA)
    if step_of(path) not in (None, commit["step"]):
        raise LmError(f"{path / COMMIT}: this is step {commit['step']} under another name.", code=Exit.DATA)
    return dict(commit)


def _compare(wanted: Mapping[str, Tensor], found: Mapping[str, tuple[int, ...]], path: str, what: str) -> None:
    missing, extra = sorted(set(wanted) - set(found)), sorted(set(found) - set(wanted))
    if missing or extra:
        name = (missing or extra)[0]
        raise LmError(
            f"{path}: {name} is {'missing' if missing else 'unknown to this ' + what} "
            f"({len(missing)} missing, {len(extra)} unknown of {len(wanted)}).",
            hint="The checkpoint belongs to another architecture.",
            code=Exit.DATA,
        )
    for name, tensor in wanted.items():
        if tuple(tensor.shape) != tuple(found[name]):
            raise LmError(
                f"{path}: {name} has shape {list(found[name])}, this {what} has {list(tensor.shape)}.", code=Exit.DATA
            )


def _unwrapped(model: torch.nn.Module) -> torch.nn.Module:
    """The module under torch.compile's wrapper."""
    inner = getattr(model, "_orig_mod", model)
    assert isinstance(inner, torch.nn.Module)
    return inner
