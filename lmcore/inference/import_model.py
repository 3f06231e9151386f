"""A model of Hugging Face transformers, read to be evaluated, sampled from and trained further.

    import_model("models/some-llama", "runs/some-llama")      a run directory with one checkpoint of step 0
    open_model("models/some-llama")                           the same model in memory, nothing is written

Both read config.json, the safetensors weights (one file, or shards with an index) and tokenizer.json of a directory.
What the architecture has and our models do not is refused by name (families/). Only safetensors are read: a pickle
could run code. The headers of the weights are compared with config.json before memory is taken for either.

Experts are trained further with the balance loss that the configuration names (router_aux_loss_coef), without z-loss.

A name that is no directory is looked up on the Hugging Face Hub (HF_ENDPOINT and HF_HUB_OFFLINE are honoured).
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lmcore import storage
from lmcore.data.surroundings import opening_of_tokenizer
from lmcore.data.tokenizer import Tokenizer
from lmcore.errors import Exit, LmError, from_os_error
from lmcore.inference import families
from lmcore.inference.families.keys import shown
from lmcore.inference.provenance import PROVENANCE, read_provenance
from lmcore.model.config import ModelConfig
from lmcore.model.model import LanguageModel
from lmcore.progress import SILENT, Progress
from lmcore.training import checkpoint as checkpoints
from lmcore.training import rundir
from lmcore.training import tensors as files
from lmcore.training.checkpoint import LoadedModel
from lmcore.training.config import RunConfig, TrainConfig
from lmcore.training.device import resolve_device
from lmcore.training.state import ImportedFrom, RunState

BATCH_TOKENS = 32_768  # what the run would train with unless told otherwise
CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_CONFIG_BYTES, _INDEX_BYTES = 4 << 20, 16 << 20


@dataclass(frozen=True)
class ImportReport:
    """What `import_model` made."""

    run: Path
    family: str
    parameters: int
    config: ModelConfig
    tokenizer: str | None
    """Name of the tokenizer, None when there was none to read."""
    unchanged: bool = False
    """Whether the same call had made it before."""


@dataclass(frozen=True)
class ForeignModel:
    """A directory of transformers, read and converted; fp32 on the CPU."""

    folder: Path
    family: str
    model: LanguageModel
    tokenizer: Tokenizer | None
    config: RunConfig


def import_model(
    source: str | os.PathLike[str], out: str | os.PathLike[str], *, progress: Progress = SILENT
) -> ImportReport:
    """Make the run directory `out` of a Hugging Face model. Raises LmError: 2 when our models cannot be this one,
    65 for broken files, 73 when `out` exists."""
    folder = _find(source, progress)
    out = Path(out)
    found = read_model(folder, progress)
    moe = found.model.config.moe
    if any(layer.ffn == "e" for layer in found.model.config.layers):
        progress.note(
            f"trained on, its experts are balanced with model.moe.balance_weight {moe.balance_weight:g} and "
            f"model.moe.bias_rate {moe.bias_rate:g}, without a z-loss"
        )
    run, tokenizer = found.config, found.tokenizer
    state = RunState(
        step=0,
        tokens=0,
        samples=0,
        sources=[],
        tokenizer_sha256=tokenizer.sha256 if tokenizer is not None else None,
        opening=list(opening_of_tokenizer(tokenizer)) if tokenizer is not None else [],
        imported_from=ImportedFrom(
            path=os.fspath(source),
            family=found.family,
            config_sha256=storage.sha256_file(folder / CONFIG),
            weights={path.name: storage.sha256_file(path.resolve()) for path in _weight_files(folder)},
        ),
    )
    definition = tokenizer.to_json() if tokenizer is not None else None
    weights = checkpoints.model_tensors(found.model)
    parameters = sum(parameter.numel() for parameter in found.model.parameters())
    report = ImportReport(out, found.family, parameters, run.model, tokenizer.name if tokenizer is not None else None)
    if out.exists():
        storage.require_same(out, _origin(_state_of(out)), _origin(state.to_json()))
        return dataclasses.replace(report, unchanged=True)
    snapshot = checkpoints.Snapshot(0, weights, {}, state.to_json(), run.to_yaml().encode(), definition)
    with storage.commit_directory(out) as place:
        checkpoints.save(place / checkpoints.CHECKPOINTS, snapshot)
        if definition is not None:
            storage.create_file(place / rundir.TOKENIZER, definition)
        storage.create_file(place / rundir.CONFIG, run.to_yaml().encode())
    return report


def open_model(
    path: str | os.PathLike[str],
    *,
    device: str | torch.device = "auto",
    dtype: torch.dtype | None = None,
    skipped: Callable[[str], None] | None = None,
    progress: Progress = SILENT,
) -> LoadedModel:
    """A model ready to be evaluated or sampled from: of a run, of a checkpoint, or of a directory of transformers that
    `lm export` or another program wrote, which is read as `import_model` reads it. Arguments and errors are those of
    training.checkpoint.load_model.

    The state of an export knows step and training data of the model, as far as its lmshards.json tells.
    """
    path = Path(path)
    if path.is_file():
        raise LmError(
            f"{path}: a file, and a model to use is a run, a checkpoint or a directory of transformers.",
            hint="A directory is made from a run with: lm export RUN --out DIR",
        )
    if not (path / CONFIG).is_file() or checkpoints.is_run(path):
        return checkpoints.load_model(path, device=device, dtype=dtype, skipped=skipped)
    found = read_model(path, progress)
    found.model.to(device=resolve_device(device), dtype=dtype)
    found.model.eval()
    if found.tokenizer is not None:
        found.tokenizer.opening = opening_of_tokenizer(found.tokenizer)
    state: dict[str, Any] = {"step": 0, "tokens": 0, "samples": 0, "sources": []}
    if (path / PROVENANCE).is_file():
        record = read_provenance(path / PROVENANCE)
        state |= {"step": record.step or 0, "tokens": record.tokens or 0, "sources": [vars(s) for s in record.data]}
    return LoadedModel(found.model, found.tokenizer, found.config, state, path)


def _state_of(out: Path) -> dict[str, Any]:
    """The state of an imported model that was not trained on; empty for anything else."""
    path = out / checkpoints.CHECKPOINTS / checkpoints.step_name(0)
    try:
        checkpoints.verify(path)
        state = storage.read_json(path / checkpoints.STATE)
    except LmError:
        return {}
    return state if isinstance(state, dict) else {}


def _origin(state: Mapping[str, Any]) -> dict[str, Any]:
    imported = state.get("imported_from") or {}
    return {
        "family": imported.get("family"),
        "config.json": imported.get("config_sha256"),
        "weights": imported.get("weights"),
        "tokenizer": state.get("tokenizer_sha256"),
    }


# ---------------------------------------------------------------------------------------- reading


def read_model(folder: Path, progress: Progress = SILENT) -> ForeignModel:
    """The model of a directory of transformers. LmError: 2 when our models cannot be this one, 65 for broken files."""
    hf = storage.read_json(folder / CONFIG, limit=_CONFIG_BYTES, infinity=True)
    if not isinstance(hf, dict):
        raise LmError(f"{folder / CONFIG}: an object is expected.", code=Exit.DATA)
    family, config = families.from_hf_config(hf, str(folder / CONFIG))
    progress.note(f"{family}, {config.num_layers} layers, width {config.d_model}")
    tokenizer = _read_tokenizer(folder, config, progress)
    model = _build(config, _read_weights(folder, config, family))
    rows = max(1, BATCH_TOKENS // config.context_length)
    run = RunConfig(model=config, train=TrainConfig(batch_tokens=rows * config.context_length))
    return ForeignModel(folder, family, model, tokenizer, run)


def _find(source: str | os.PathLike[str], progress: Progress) -> Path:
    """The directory that `source` means."""
    path = Path(source)
    if path.is_dir():
        if not (path / CONFIG).is_file():
            raise LmError(f"{path}: no config.json here, so this is not a model of transformers.")
        return path
    name = os.fspath(source)
    if path.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise LmError(f"{name}: not a directory with a model.", hint="Give a directory, or the name of a Hub model.")
    from huggingface_hub import snapshot_download

    progress.note(f"{name}: from the Hugging Face Hub")
    try:
        return Path(snapshot_download(name, allow_patterns=["*.safetensors", "*.json"], ignore_patterns=["original/*"]))
    except Exception as error:  # the client raises a dozen unrelated classes
        raise LmError(
            f"{name}: neither a directory nor a model that the Hub gives ({type(error).__name__}).",
            hint="Check the name, the network and HF_TOKEN, or download the model and give its directory.",
            code=Exit.IO,
        ) from error


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model; only plain names beside the index are accepted."""
    single, index = folder / WEIGHTS, folder / INDEX
    if single.is_file():  # which transformers prefers, too
        return [single]
    if not index.is_file():
        pickled = next((p.name for p in sorted(folder.glob("*.bin"))), None)
        raise LmError(
            f"{folder}: no {WEIGHTS} here" + (f"; {pickled} is a pickle, which is never opened." if pickled else "."),
            hint="Convert it with transformers: model.save_pretrained(DIR).",
            code=Exit.DATA,
        )
    names = sorted(set(_read_index(index).values()))
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise LmError(f"{index}: {shown(name)} is not a file beside it.", code=Exit.DATA)
        if not os.path.isfile(folder / name):
            raise LmError(f"{folder / shown(name)}: listed in {INDEX} but not here.", code=Exit.DATA)
    return [folder / name for name in names]


def _read_index(index: Path) -> dict[str, str]:
    """File by tensor."""
    listing = storage.read_json(index, limit=_INDEX_BYTES)
    names = listing.get("weight_map") if isinstance(listing, dict) else None
    if not isinstance(names, dict) or not names or not all(type(name) is str for name in names.values()):
        raise LmError(f"{index}: no weight_map in it.", code=Exit.DATA)
    return names


def _read_weights(folder: Path, config: ModelConfig, family: str) -> dict[str, Tensor]:
    """Our tensors; the headers of all files are checked before a tensor is read."""
    where: dict[str, tuple[Path, files.TensorEntry]] = {}
    for path in _weight_files(folder):
        for name, entry in _read_entries(path).items():
            if name in where:
                raise LmError(f"{path}: the tensor {shown(name)} is in {where[name][0].name}, too.", code=Exit.DATA)
            where[name] = (path, entry)
    if not (folder / WEIGHTS).is_file():
        listed = _read_index(folder / INDEX)
        for name in sorted(listed.keys() | where.keys()):
            if name not in where or listed.get(name) != where[name][0].name:
                raise LmError(f"{folder / INDEX}: the tensor {shown(name)} is not where it says.", code=Exit.DATA)
    families.check_tensors({name: entry for name, (_, entry) in where.items()}, config, family, str(folder))
    theirs: dict[str, Tensor] = {}
    for path in _weight_files(folder):
        theirs |= files.read_tensors(path.resolve())  # the Hub's cache is made of links
    return families.from_hf_tensors(theirs, config, family, str(folder))


def _read_entries(path: Path) -> dict[str, files.TensorEntry]:
    try:
        with files.open_plain(path.resolve()) as file:
            return files.read_header(file, os.fstat(file.fileno()).st_size, os.fspath(path))[0]
    except OSError as error:
        raise from_os_error(error, path, "read") from error


def _read_tokenizer(folder: Path, config: ModelConfig, progress: Progress) -> Tokenizer | None:
    if not (folder / "tokenizer.json").is_file():
        progress.warn(f"{folder}: no tokenizer.json, so the run can neither read nor write text.")
        return None
    tokenizer = Tokenizer.from_file(folder, name=folder.name)
    if tokenizer.max_id >= config.vocab_size:
        raise LmError(
            f"{folder}: the tokenizer has ids up to {tokenizer.max_id:,}, the model {config.vocab_size:,} of them.",
            code=Exit.DATA,
        )
    return tokenizer


def _build(config: ModelConfig, weights: Mapping[str, Tensor]) -> LanguageModel:
    """A model with these weights; what the family does not store (selection biases) starts at zero."""
    model = LanguageModel(config)
    with torch.no_grad():
        for name, tensor in checkpoints.model_tensors(model).items():
            if name in weights:
                tensor.copy_(weights[name])
            else:
                assert name.endswith("router.bias")
                tensor.zero_()
    return model
