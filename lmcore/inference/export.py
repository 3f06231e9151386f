"""A trained model for other programs: a Hugging Face directory, or one safetensors file.

    OUT/config.json, generation_config.json     architecture (families/) and how it is sampled from
    OUT/model.safetensors                       weights under the family's names
    OUT/tokenizer.json, tokenizer_config.json   the tokenizer, unchanged
    OUT/README.md                               model card: what it is, what it was trained on, how it did
    OUT/lmshards.json                           provenance for programs: `lm info OUT` verifies it up to the sources

The directory appears as a whole or not at all. `--format safetensors` writes one file with our own tensor names
instead, its configuration and provenance in the metadata, for every model that no family of transformers can carry.

Weights can be the mean of the last checkpoints of a run (`average="last:5"`), which often evaluates better than the
last one alone (arXiv:1803.05407).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from lmcore import storage
from lmcore.data.manifest import MANIFEST, read_manifest
from lmcore.errors import Exit, LmError
from lmcore.inference import families
from lmcore.inference.model_card import model_card
from lmcore.inference.provenance import FORMAT, PROVENANCE
from lmcore.model.model import LanguageModel
from lmcore.progress import SILENT, Progress
from lmcore.training import checkpoint as checkpoints
from lmcore.training import tensors as files
from lmcore.training.checkpoint import LoadedModel, model_tensors
from lmcore.training.rundir import read_metrics

if TYPE_CHECKING:
    from lmcore.data.tokenizer import Tokenizer

CHECK_TOLERANCE = 1e-4  # largest logit difference, relative to the largest logit

Kind = Literal["hf", "safetensors"]

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_AVERAGE = re.compile(r"last:([1-9][0-9]*)")


@dataclass(frozen=True)
class ExportReport:
    """What `export_model` wrote."""

    out: Path
    family: str | None
    """None for a single file."""
    bytes: int
    parameters: int
    steps: tuple[int, ...]
    """Steps of the checkpoints behind the weights."""
    logit_difference: float | None
    """Largest difference to transformers' logits, relative to the largest logit; None when not checked."""
    unchanged: bool = False
    """Whether the same call had made it before."""


def export_model(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    kind: Kind = "hf",
    family: str = "auto",
    dtype: str = "fp32",
    average: str | None = None,
    drop_mtp: bool = False,
    check: bool = False,
    replace: bool = False,
    progress: Progress = SILENT,
) -> ExportReport:
    """Export a run or a checkpoint.

    family: "auto" or one of families.FAMILIES. average: "last:N" checkpoints of the run. drop_mtp: leave multi-token
    heads out. check: load the result with transformers and compare logits (needs the extra `hf`). replace: an earlier
    export at `out` may be replaced. Raises LmError: 2 when the family cannot carry the model, 73 when `out` is taken.
    """
    out = Path(out)
    loaded, sources = load_averaged(path, average, progress)
    config = loaded.model.config
    weights = {name: _cast(tensor, dtype) for name, tensor in model_tensors(loaded.model).items()}
    record = provenance(loaded, sources, dtype) | {"drop_mtp": drop_mtp}
    if kind == "safetensors":
        return _export_file(out, loaded, weights, record, replace=replace)
    biased = any(bool(t.any()) for name, t in weights.items() if name.endswith("router.bias"))
    item_size = _DTYPES[dtype].itemsize
    if family == "auto":
        family = families.choose(config, biased=biased, drop_mtp=drop_mtp, item_size=item_size)
    else:
        families.require(config, family, biased=biased, drop_mtp=drop_mtp, item_size=item_size)
    theirs = families.to_hf_tensors(weights, config, family)
    record |= {"kind": "hf", "family": family}
    steps = tuple(source["step"] for source in sources)
    if out.exists():
        if not (out / PROVENANCE).is_file():
            raise LmError(f"{out}: already exists.", hint="Choose another name.", code=Exit.CANNOT_CREATE)
        made = storage.read_json(out / PROVENANCE)
        if not replace and _exported_before(out, made, record):
            difference = check_export(out, loaded, dtype) if check else None
            size = sum((out / name).stat().st_size for name in made["files"])
            return ExportReport(out, family, size, _count(theirs), steps, difference, unchanged=True)
    documents = _hf_documents(loaded, family, dtype)
    progress.start("write", None, "bytes")
    with storage.commit_directory(out, replace=replace) as folder:
        chunks, size = files.tensor_chunks(theirs, {"format": "pt"})
        digests = {"model.safetensors": storage.create_file(folder / "model.safetensors", chunks, size=size)}
        for name, document in documents.items():
            digests[name] = storage.create_file(folder / name, document)
        card = model_card(loaded, record, _run_metrics(loaded.path), parameters=_count(theirs))
        digests["README.md"] = storage.create_file(folder / "README.md", card.encode())
        record["files"] = {name: {"bytes": d.bytes, "sha256": d.sha256} for name, d in sorted(digests.items())}
        storage.create_file(folder / PROVENANCE, _json(record))
        difference = check_export(folder, loaded, dtype) if check else None
    progress.finish()
    return ExportReport(out, family, sum(d.bytes for d in digests.values()), _count(theirs), steps, difference)


def _export_file(
    out: Path, loaded: LoadedModel, weights: Mapping[str, Tensor], record: dict[str, Any], *, replace: bool
) -> ExportReport:
    if out.is_dir():
        raise LmError(f"{out}: a directory; --format safetensors writes one file.", code=Exit.CANNOT_CREATE)
    record |= {"kind": "safetensors", "family": None}
    steps = tuple(source["step"] for source in record["checkpoints"])
    if out.exists():
        made = _record_of_file(out)
        if made is None:
            raise LmError(f"{out}: already exists.", hint="Choose another name.", code=Exit.CANNOT_CREATE)
        if not replace and _exported_before(out, made, record):
            return ExportReport(out, None, out.stat().st_size, _count(weights), steps, None, unchanged=True)
    storage.make_directory(out.parent)
    chunks, size = files.tensor_chunks(
        weights,
        {
            "format": "pt",
            "lmshards": json.dumps(record, sort_keys=True),
            "model_config": json.dumps(loaded.model.config.model_dump(mode="json"), sort_keys=True),
        },
    )
    digest = storage.write_file(out, chunks, size=size)
    return ExportReport(out, None, digest.bytes, _count(weights), steps, None)


_ORIGIN = ("format", "dtype", "step", "tokens", "tokenizer_sha256", "config", "drop_mtp", "kind", "family")
"""What an export is made of, besides its checkpoints."""


def _exported_before(out: Path, made: Any, asked: Mapping[str, Any]) -> bool:
    """Whether an export is the very one that is asked for, whole. LmError (73) when it is another one."""
    if not isinstance(made, dict):
        made = {}
    try:
        before, now = (
            {key: record.get(key) for key in _ORIGIN} | {"checkpoints": [c["id"] for c in record["checkpoints"]]}
            for record in (made, asked)
        )
        storage.require_same(out, before, now)
        for name, entry in (made.get("files") or {}).items():
            if storage.sha256_file(out / name) != entry["sha256"]:
                raise LmError(f"{out / name}: this export was changed since.", code=Exit.CANNOT_CREATE)
    except (KeyError, TypeError):
        raise LmError(f"{out}: already exists.", hint="Replace it with: --force", code=Exit.CANNOT_CREATE) from None
    except LmError as error:
        raise LmError(error.message, hint="Replace it with: --force", code=Exit.CANNOT_CREATE) from error
    return True


def _record_of_file(path: Path) -> Any:
    """The record inside of a single-file export; None for any other file."""
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > 64 << 20:
                return None
            return json.loads(json.loads(file.read(length))["__metadata__"]["lmshards"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


# ---------------------------------------------------------------------------------------- weights


def load_averaged(
    path: str | os.PathLike[str], average: str | None = None, progress: Progress = SILENT
) -> tuple[LoadedModel, list[dict[str, Any]]]:
    """(model with fp32 weights on the CPU, identities of the checkpoints that they come from).

    average: None, or "last:N" for the mean over the N newest checkpoints of the run, up to the given one.
    """
    loaded = checkpoints.load_model(path, device="cpu", dtype=torch.float32, skipped=progress.warn)
    if average is None:
        return loaded, [checkpoint_identity(loaded.path)]
    match = _AVERAGE.fullmatch(average)
    if match is None:
        raise LmError(f"--average {average}: expected last:N, such as last:5.")
    wanted = int(match[1])
    last = checkpoints.step_of(loaded.path)
    found = [p for p in checkpoints.steps_on_disk(loaded.path.parent) if (checkpoints.step_of(p) or 0) <= (last or 0)]
    if len(found) < wanted:
        raise LmError(
            f"{loaded.path.parent}: {len(found)} checkpoints here, last:{wanted} asks for {wanted}.",
            hint="Keep more of them while training: --set train.checkpoint.keep=5",
        )
    chosen = found[:wanted]
    mean: dict[str, Tensor] = {}
    progress.start("average", float(wanted), "checkpoints")
    for checkpoint in chosen:
        checkpoints.verify(checkpoint)
        part = files.read_tensors(checkpoint / checkpoints.MODEL)
        if mean and {n: t.shape for n, t in part.items()} != {n: t.shape for n, t in mean.items()}:
            raise LmError(f"{checkpoint}: its tensors differ from those of {chosen[0]}.", code=Exit.DATA)
        for name, tensor in part.items():
            term = tensor.double() / wanted
            mean[name] = mean[name] + term if name in mean else term
        progress.advance(1)
    progress.finish()
    own = model_tensors(loaded.model)
    with torch.no_grad():
        for name, tensor in mean.items():
            own[name].copy_(tensor)
    return loaded, [checkpoint_identity(checkpoint) for checkpoint in chosen]


def checkpoint_identity(path: Path) -> dict[str, Any]:
    """Where a checkpoint lies and what it is: the hash of COMMIT.json covers every file of it."""
    return {
        "path": os.fspath(path),
        "step": checkpoints.step_of(path),
        "id": storage.sha256_file(path / checkpoints.COMMIT),
    }


def _cast(tensor: Tensor, dtype: str) -> Tensor:
    if dtype not in _DTYPES:
        raise LmError(f"{dtype}: not a number format.", hint=f"Choose one of: {', '.join(_DTYPES)}.")
    return tensor.to(_DTYPES[dtype]) if tensor.is_floating_point() else tensor


def _count(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors.values())


# ---------------------------------------------------------------------------------------- documents


def provenance(loaded: LoadedModel, sources: Sequence[Mapping[str, Any]], dtype: str) -> dict[str, Any]:
    """Where a model comes from: checkpoints, training data, tokenizer, configuration."""
    state = loaded.state
    return {
        "format": FORMAT,
        "dtype": dtype,
        "checkpoints": [dict(source) for source in sources],
        "step": state.get("step"),
        "tokens": state.get("tokens"),
        "dataset_id": state.get("dataset_id"),
        "data": [_data_source(source) for source in state.get("sources") or []],
        "tokenizer_sha256": loaded.tokenizer.sha256 if loaded.tokenizer is not None else None,
        "config": loaded.config.model_dump(mode="json"),
        "imported_from": state.get("imported_from"),
    }


def _data_source(source: Mapping[str, Any]) -> dict[str, Any]:
    """What a training set is, from its manifest when it is still here and unchanged."""
    found = {key: source.get(key) for key in ("path", "weight", "dataset_id")}
    path = Path(str(source.get("path")))
    if (path / MANIFEST).is_file():
        manifest = read_manifest(path)
        if manifest.dataset_id == source.get("dataset_id"):
            found |= {
                "tokens": manifest.n_tokens,
                "documents": manifest.n_docs,
                "bytes": manifest.n_bytes,
                "source": manifest.source,
                "filters": manifest.filters,
            }
    return found


def _hf_documents(loaded: LoadedModel, family: str, dtype: str) -> dict[str, bytes]:
    """The small files of a Hugging Face directory by name."""
    tokenizer = loaded.tokenizer
    config = families.to_hf_config(loaded.model.config, family)
    names = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
    config |= {"dtype": names[_DTYPES[dtype]], "torch_dtype": names[_DTYPES[dtype]]}
    generation: dict[str, Any] = {"do_sample": True, "temperature": 0.8}
    result: dict[str, bytes] = {}
    if tokenizer is not None:
        ids = {"eos_token_id": tokenizer.eos_id, "bos_token_id": _first(tokenizer)}
        ids["pad_token_id"] = tokenizer.pad_id if tokenizer.pad_id is not None else tokenizer.eos_id
        config |= ids
        generation |= ids
        result["tokenizer.json"] = _with_opening(tokenizer)
        result["tokenizer_config.json"] = _json(_tokenizer_config(tokenizer, loaded.model.config.context_length))
    else:
        config |= {"eos_token_id": None, "bos_token_id": None, "pad_token_id": None}
    return result | {"config.json": _json(config), "generation_config.json": _json(generation)}


def _tokenizer_config(tokenizer: Tokenizer, context_length: int) -> dict[str, Any]:
    def text(token: int | None) -> str | None:
        return None if token is None else str(tokenizer.reference.id_to_token(token))

    pad = text(tokenizer.pad_id if tokenizer.pad_id is not None else tokenizer.eos_id)
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context_length,
        "clean_up_tokenization_spaces": False,
        "eos_token": text(tokenizer.eos_id),
        "bos_token": text(_first(tokenizer)),
        "pad_token": pad,
    }


def _first(tokenizer: Tokenizer) -> int:
    """What a text begins with for the model: its BOS, or the end of the document before it."""
    return tokenizer.opening[0] if tokenizer.opening else tokenizer.eos_id


def _with_opening(tokenizer: Tokenizer) -> bytes:
    """The tokenizer.json whose post-processor puts around a text what stood around documents in training.

    An exact copy where it does so already, so that the identity stays."""
    probe = "a"
    if list(tokenizer.reference.encode(probe).ids) == [*tokenizer.opening, *tokenizer.encode(probe)]:
        return tokenizer.to_json()
    marks = [str(tokenizer.reference.id_to_token(number)) for number in tokenizer.opening]
    template = [{"SpecialToken": {"id": mark, "type_id": 0}} for mark in marks]
    processor = {
        "type": "TemplateProcessing",
        "single": [*template, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [*template, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {
            mark: {"id": mark, "ids": [number], "tokens": [mark]}
            for mark, number in zip(marks, tokenizer.opening, strict=True)
        },
    }
    return storage.canonical_json(tokenizer.definition | {"post_processor": processor if marks else None})


def _run_metrics(checkpoint: Path) -> list[dict[str, Any]]:
    """metrics.jsonl of the run that a checkpoint belongs to, up to its step; empty when it stands alone."""
    run = checkpoint.parent.parent
    step = checkpoints.step_of(checkpoint)
    records = read_metrics(run) if checkpoint.parent.name == checkpoints.CHECKPOINTS else []
    return [r for r in records if step is None or r["step"] <= step]


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()


# ---------------------------------------------------------------------------------------- check


def check_export(folder: Path, loaded: LoadedModel, dtype: str) -> float:
    """Load an export with transformers and compare: logits, greedy text, and the tokenizer on a sample.

    Returns the largest logit difference relative to the largest logit. Both compute in fp32 with the weights as
    they were rounded to `dtype`. Raises LmError (1: it would be a bug of ours) when they differ.
    """
    try:
        import transformers
    except ImportError as error:
        raise LmError("--check needs transformers.", hint="Install it with: pip install 'lmshards[hf]'") from error
    transformers.utils.logging.disable_progress_bar()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, trust_remote_code=False
    ).eval()
    ours = LanguageModel(loaded.model.config)
    own = model_tensors(ours)
    for name, tensor in model_tensors(loaded.model).items():
        own[name].data.copy_(_cast(tensor, dtype))
    ours.eval()
    config = ours.config
    length = min(64, config.context_length)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, config.vocab_size, (2, length), generator=generator)
    with torch.inference_mode():
        a, b = ours(tokens), theirs(input_ids=tokens).logits
        difference = float((a - b).abs().max() / a.abs().max().clamp(min=1e-9))
    if not difference <= CHECK_TOLERANCE:
        raise LmError(
            f"{folder}: transformers computes other logits (relative difference {difference:.1e}).", code=Exit.BUG
        )
    if loaded.tokenizer is not None:
        sample = "def f(x):\n    return 'caf\u00e9 \U0001f600'  # two  spaces\n"
        other = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        found = other.backend_tokenizer.encode(sample, add_special_tokens=False).ids
        if list(found) != loaded.tokenizer.encode(sample):
            raise LmError(f"{folder}: transformers encodes text to other tokens.", code=Exit.BUG)
    return difference
