"""A model of Hugging Face transformers as a run of ours, ready to be evaluated, sampled from and trained further.

    import_model("models/some-llama", "runs/some-llama")

reads config.json, the safetensors weights (one file, or shards with an index) and tokenizer.json of a directory, and
writes a run directory with one checkpoint of step 0. What the architecture has and our models do not is refused by name
(families.py). Only safetensors are read: a pickle could run code.

A name that is no directory is looked up on the Hugging Face Hub (HF_ENDPOINT and HF_HUB_OFFLINE are honoured).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lmcore import storage
from lmcore.data.surroundings import opening_of_tokenizer
from lmcore.data.tokenizer import Tokenizer
from lmcore.errors import Exit, LmError
from lmcore.inference import families
from lmcore.model.config import ModelConfig
from lmcore.model.model import LanguageModel
from lmcore.progress import SILENT, Progress
from lmcore.training import checkpoint as checkpoints
from lmcore.training import rundir
from lmcore.training import tensors as files
from lmcore.training.config import RunConfig, TrainConfig

BATCH_TOKENS = 32_768  # what the run would train with unless told otherwise
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class ImportReport:
    """What `import_model` made."""

    run: Path
    family: str
    parameters: int
    config: ModelConfig
    tokenizer: str | None
    """Name of the tokenizer, None when there was none to read."""


def import_model(
    source: str | os.PathLike[str], out: str | os.PathLike[str], *, progress: Progress = SILENT
) -> ImportReport:
    """Make the run directory `out` of a Hugging Face model. Raises LmError: 2 when our models cannot be this one,
    65 for broken files, 73 when `out` exists."""
    folder = _find(source, progress)
    out = Path(out)
    if out.exists():
        raise LmError(f"{out}: already exists.", hint="Choose another name.", code=Exit.CANNOT_CREATE)
    hf = storage.read_json(folder / "config.json")
    if not isinstance(hf, dict):
        raise LmError(f"{folder / 'config.json'}: an object is expected.", code=Exit.DATA)
    family, config = families.from_hf_config(hf, str(folder / "config.json"))
    progress.note(f"{family}, {config.num_layers} layers, width {config.d_model}")
    theirs = _read_weights(folder)
    tokenizer = _read_tokenizer(folder, config, progress)
    weights = families.from_hf_tensors(theirs, config, family, str(folder))
    model = _build(config, weights, str(folder))
    rows = max(1, BATCH_TOKENS // config.context_length)
    run = RunConfig(model=config, train=TrainConfig(batch_tokens=rows * config.context_length))
    state: dict[str, Any] = {
        "step": 0,
        "tokens": 0,
        "samples": 0,
        "sources": [],
        "tokenizer_sha256": tokenizer.sha256 if tokenizer is not None else None,
        "opening": list(opening_of_tokenizer(tokenizer)) if tokenizer is not None else [],
        "imported_from": {
            "path": os.fspath(source),
            "family": family,
            "config_sha256": storage.sha256_file(folder / "config.json"),
            "weights": {path.name: storage.sha256_file(path.resolve()) for path in _weight_files(folder)},
        },
    }
    definition = tokenizer.to_json() if tokenizer is not None else None
    snapshot = checkpoints.Snapshot(0, checkpoints.model_tensors(model), {}, state, run.to_yaml().encode(), definition)
    with storage.commit_directory(out) as place:
        checkpoints.save(place / checkpoints.CHECKPOINTS, snapshot)
        if definition is not None:
            storage.create_file(place / rundir.TOKENIZER, definition)
        storage.create_file(place / rundir.CONFIG, run.to_yaml().encode())
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return ImportReport(out, family, parameters, config, tokenizer.name if tokenizer is not None else None)


# ---------------------------------------------------------------------------------------- reading


def _find(source: str | os.PathLike[str], progress: Progress) -> Path:
    """The directory that `source` means."""
    path = Path(source)
    if path.is_dir():
        if not (path / "config.json").is_file():
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
    index = folder / INDEX
    if not index.is_file():
        single = folder / WEIGHTS
        if not single.is_file():
            pickled = next((p.name for p in sorted(folder.glob("*.bin"))), None)
            raise LmError(
                f"{folder}: no {WEIGHTS} here"
                + (f"; {pickled} is a pickle, which is never opened." if pickled else "."),
                hint="Convert it with transformers: model.save_pretrained(DIR).",
                code=Exit.DATA,
            )
        return [single]
    listing = storage.read_json(index)
    names = listing.get("weight_map") if isinstance(listing, dict) else None
    if not isinstance(names, Mapping) or not all(isinstance(name, str) for name in names.values()):
        raise LmError(f"{index}: no weight_map in it.", code=Exit.DATA)
    plain = sorted(set(names.values()))
    for name in plain:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise LmError(f"{index}: {name!r} is not a file beside it.", code=Exit.DATA)
        if not (folder / name).is_file():
            raise LmError(f"{folder / name}: listed in {INDEX} but not here.", code=Exit.DATA)
    return [folder / name for name in plain]


def _read_weights(folder: Path) -> dict[str, Tensor]:
    result: dict[str, Tensor] = {}
    for path in _weight_files(folder):
        result |= files.read_tensors(path.resolve())  # the Hub's cache is made of links
    return result


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


def _build(config: ModelConfig, weights: Mapping[str, Tensor], where: str) -> LanguageModel:
    """A model with these weights; what the family does not store (selection biases) starts at zero."""
    model = LanguageModel(config)
    own = checkpoints.model_tensors(model)
    with torch.no_grad():
        for name, tensor in own.items():
            if name in weights:
                if tensor.shape != weights[name].shape:
                    raise LmError(
                        f"{where}: {name} has the shape {tuple(weights[name].shape)}, config.json implies "
                        f"{tuple(tensor.shape)}.",
                        code=Exit.DATA,
                    )
                tensor.copy_(weights[name])
            else:
                assert name.endswith("router.bias")
                tensor.zero_()
    return model
