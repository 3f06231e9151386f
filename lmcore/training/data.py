"""The data of a run: training streams with their sampler, validation streams, and the identity that binds a run to
them.

A set that was split is named by its own directory: its train/ view is trained on and its val/ view validated on. All
sets of a run must have been made by one tokenizer. What a run remembers are dataset ids (lmcore/data/manifest.py), so
the same tokens may come through another path, view or copy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmcore import storage
from lmcore.data.manifest import MANIFEST, Manifest, read_manifest
from lmcore.data.plan import TokenizeConfig
from lmcore.data.sampler import Mixture, Sampler
from lmcore.data.stream import TokenStream
from lmcore.data.streaming import TextStream
from lmcore.data.surroundings import opening_of_data
from lmcore.data.text_bytes import TextBytes, text_bytes
from lmcore.data.tokenizer import Tokenizer
from lmcore.errors import Exit, LmError, quoted
from lmcore.progress import Notes
from lmcore.training.config import DataConfig, RunConfig, Source

if TYPE_CHECKING:
    from lmcore.training.state import RunState

TRAIN_VIEW, VAL_VIEW = "train", "val"
SOURCE = "source"
"""Folder of a run that keeps the frozen plan of a text source."""


@dataclass(frozen=True)
class DataSets:
    """What `inspect` found: directories of sets or views, and their tokenizer."""

    train: tuple[Source, ...]
    val: tuple[str, ...]
    manifests: dict[str, Manifest]
    tokenizer: bytes | None
    """Exact content of tokenizer.json, None when the data have none."""
    tokenizer_sha256: str | None
    vocab_size: int
    notes: tuple[str, ...] = ()


def inspect(config: DataConfig) -> DataSets:
    """Find the views and the tokenizer without reading tokens. LmError when a set is missing or the tokenizers
    differ."""
    train, val, notes = [], [], []
    if config.stream is not None:
        return _inspect_stream(config)
    for source in config.train:
        root = Path(source.path)
        split = (root / TRAIN_VIEW / MANIFEST).is_file()
        train.append(source.model_copy(update={"path": str(root / TRAIN_VIEW)}) if split else source)
        if config.val is None:
            beside = (root if split else root.parent) / VAL_VIEW
            if (split or root.name == TRAIN_VIEW) and (beside / MANIFEST).is_file():
                val.append(str(beside))
            else:
                notes.append(
                    f"{root} has no validation view: this run is not validated (make one with: lm split {quoted(root)})"
                )
    if config.val is not None:
        val = [str(Path(p) / VAL_VIEW) if (Path(p) / VAL_VIEW / MANIFEST).is_file() else p for p in config.val]
    manifests = {path: read_manifest(path) for path in [*(s.path for s in train), *val]}
    first = next(iter(manifests))
    identities = {path: m.tokenizer.sha256 if m.tokenizer else None for path, m in manifests.items()}
    for path, identity in identities.items():
        if identity != identities[first]:
            raise LmError(
                f"{path} and {first} were made by different tokenizers ({_short(identity)} and "
                f"{_short(identities[first])}).",
                hint="Tokenize both with the same --tokenizer.",
                code=Exit.DATA,
            )
    raw: bytes | None = None
    entry = manifests[first].tokenizer
    if entry is not None:
        raw = _tokenizer_file(Path(first)).read_bytes()
    largest = max(shard.max_id for manifest in manifests.values() for shard in manifest.shards)
    vocab_size = max(entry.vocab_size if entry is not None else 0, largest + 1)
    return DataSets(tuple(train), tuple(val), manifests, raw, identities[first], vocab_size, tuple(notes))


def _inspect_stream(config: DataConfig) -> DataSets:
    """The data of a run that reads text: its tokenizer must exist already, and validation sets must be named."""
    spec = config.tokenizer
    if spec is None or spec.startswith("train:"):
        raise LmError(
            "training from text needs a tokenizer that exists already.",
            hint="Give --tokenizer byte, a tokenizer.json or a Hub name such as gpt2. To train one, make shards: lm "
            "tokenize --tokenizer train:8192",
        )
    tokenizer = Tokenizer.load(spec)
    val = tuple(str(Path(p) / VAL_VIEW) if (Path(p) / VAL_VIEW / MANIFEST).is_file() else p for p in config.val or ())
    manifests = {path: read_manifest(path) for path in val}
    for path, manifest in manifests.items():
        if manifest.tokenizer is None or manifest.tokenizer.sha256 != tokenizer.sha256:
            raise LmError(
                f"{path} was not made by the tokenizer {spec}.", hint="Choose another --val set.", code=Exit.DATA
            )
    notes = () if val else ("this run is not validated: name a validation set with --val",)
    return DataSets((), val, manifests, tokenizer.to_json(), tokenizer.sha256, tokenizer.vocab_size, notes)


@dataclass(frozen=True)
class RunData:
    """The opened data of a run."""

    samples: Sampler | Mixture | TextStream
    val: dict[str, TokenStream]
    """Validation streams by a short name."""
    text_bytes: dict[str, TextBytes | None]
    """Of each validation stream: the bytes of text behind its tokens; None where they are unknown."""
    opening: tuple[int, ...]
    """Ids in front of every document of the training data."""
    n_tokens: int
    """Training tokens of all sources; 0 when they are not counted (text)."""
    identity: dict[str, Any]
    notes: tuple[str, ...] = ()
    """What is to be said of a text source: how it is read, what is left out."""


def open_data(config: RunConfig, sets: DataSets, run_dir: Path) -> RunData:
    """Open the streams of a run. LmError when the context is longer than the data or a shard is not what it should
    be."""
    data, model, train = config.data, config.model, config.train
    val = {_name(path): TokenStream.open(path, verify=data.verify) for path in data.val or ()}
    tokenizer = None
    if sets.tokenizer is not None:
        place = _tokenizer_file(Path(data.train[0].path)) if data.stream is None else None
        tokenizer = Tokenizer.from_file(place) if place is not None else Tokenizer.load(str(data.tokenizer))
    counters = {name: text_bytes(stream, tokenizer) for name, stream in val.items()}
    if data.stream is not None:
        notes = Notes()
        where = run_dir / SOURCE
        text = TextStream.open(
            _text_config(data), where, context_length=model.context_length, seed=train.seed, progress=notes
        )
        return RunData(text, val, counters, (), 0, data_identity(config, sets, text.dataset_id), tuple(notes.said))
    streams = [(TokenStream.open(source.path, verify=data.verify), source) for source in data.train]
    for stream, _ in streams:
        stream.require_vocabulary(model.vocab_size)
    samples: Sampler | Mixture
    if len(streams) == 1:
        samples = Sampler(streams[0][0], context_length=model.context_length, seed=train.seed, order=data.order)
    else:
        samples = Mixture(
            [(stream, source.weight) for stream, source in streams],
            context_length=model.context_length,
            seed=train.seed,
            order=data.order,
            names=[source.path for _, source in streams],
        )
    heaviest = max(streams, key=lambda pair: pair[1].weight)[0]
    opening = opening_of_data(heaviest, tokenizer) if tokenizer is not None else ()
    n_tokens = sum(len(stream) for stream, _ in streams)
    return RunData(samples, val, counters, opening, n_tokens, data_identity(config, sets))


def _text_config(data: DataConfig) -> TokenizeConfig:
    """A source as `lm tokenize` takes it: what exists or looks like files is read, everything else is a dataset."""
    source = str(data.stream)
    files = source == "-" or "://" in source or any(c in source for c in "*?[") or Path(source).exists()
    where: dict[str, Any] = {"paths": (source,)} if files else {"dataset": source}
    return TokenizeConfig(
        **where,
        tokenizer=str(data.tokenizer),
        text_column=data.text_column,
        format=data.format,
        separator=data.separator,
    )


def data_identity(config: RunConfig, sets: DataSets, text_id: str = "") -> dict[str, Any]:
    """What a checkpoint remembers of the data: hashes and weights, and the paths for people."""
    if config.data.stream is not None:
        return {
            "dataset_id": text_id,
            "sources": [{"path": config.data.stream, "weight": 1.0, "dataset_id": text_id}],
            "val": [{"path": p, "dataset_id": sets.manifests[p].dataset_id} for p in config.data.val or ()],
            "tokenizer_sha256": sets.tokenizer_sha256,
        }
    sources = [
        {"path": s.path, "weight": s.weight, "dataset_id": sets.manifests[s.path].dataset_id} for s in config.data.train
    ]
    return {
        "dataset_id": sources[0]["dataset_id"] if len(sources) == 1 else _combined(sources),
        "sources": sources,
        "val": [{"path": p, "dataset_id": sets.manifests[p].dataset_id} for p in config.data.val or ()],
        "tokenizer_sha256": sets.tokenizer_sha256,
    }


def refuse_changed_data(saved: RunState, now: Mapping[str, Any], where: str) -> None:
    """LmError (65) when a run would continue on other tokens or with another tokenizer than it began with."""
    if saved.tokenizer_sha256 != now["tokenizer_sha256"]:
        raise LmError(
            f"{where}: trained with the tokenizer {_short(saved.tokenizer_sha256)}, the data now have "
            f"{_short(now['tokenizer_sha256'])}.",
            hint="Continue with the data of the beginning, or start a new run with --out.",
            code=Exit.DATA,
        )
    began_with = [vars(source) for source in saved.sources]
    before, after = _weights(began_with), _weights(now["sources"])
    if before != after:
        gone, new = sorted(set(before) - set(after), key=str), sorted(set(after) - set(before))
        paths = {s["dataset_id"]: s["path"] for s in (*began_with, *now["sources"])}
        what = "; ".join(
            [f"{paths[i]} ({str(i)[:12]}) is no longer there" for i in gone]
            + [f"{paths[i]} ({i[:12]}) is new" for i in new]
            + [
                f"the weight of {paths[i]} was {before[i]:g}, is {after[i]:g}"
                for i in before
                if i in after and before[i] != after[i]
            ]
        )
        raise LmError(
            f"{where}: the training data are not those that the run began with: {what}.",
            hint="Continue with the data of the beginning, or start a new run with --out.",
            code=Exit.DATA,
        )


def _weights(sources: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    total = sum(s["weight"] for s in sources)
    return {s["dataset_id"]: s["weight"] / total for s in sources}


def _combined(sources: Sequence[Mapping[str, Any]]) -> str:
    import hashlib

    parts = [[s["dataset_id"], s["weight"]] for s in sources]
    return hashlib.sha256(storage.canonical_json(parts)).hexdigest()


def _tokenizer_file(directory: Path) -> Path:
    """tokenizer.json of a set or view (a view may leave it to the set beside which it lies)."""
    for folder in (directory, directory.parent):
        if (folder / "tokenizer.json").is_file():
            return folder / "tokenizer.json"
    raise LmError(f"{directory}: tokenizer.json is missing.", code=Exit.DATA)


def _name(path: str) -> str:
    """shards/web/val -> 'web'."""
    folder = Path(path)
    return folder.parent.name if folder.name == VAL_VIEW and folder.parent.name else folder.name


def _short(identity: object) -> str:
    return str(identity)[:12] if identity else "no tokenizer"
