"""Whether documents that a model is evaluated on were among those that it was trained on.

Documents are compared by the content hash that the index of a shard set keeps for each of them. Views made by
`lm split` are disjoint by construction; other data may repeat what the run has seen, and a loss on seen documents says
nothing about unseen ones. Only whole documents with the same text are found, not similar ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lmcore.data.manifest import MANIFEST, Manifest, read_manifest
from lmcore.data.shard import DOCUMENT
from lmcore.errors import Exit, LmError, from_os_error

Hashes = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class Overlap:
    """Documents of one evaluation set that also are in one training set."""

    training_set: str
    shared: int
    documents: int
    """Different documents of the evaluation set."""


def document_hashes(directory: str | Path, manifest: Manifest | None = None) -> Hashes | None:
    """Sorted, different content hashes of the documents behind a set or view; None when it has no document index."""
    directory = Path(directory)
    manifest = manifest or read_manifest(directory)
    found: list[Hashes] = []
    for index, shard in enumerate(manifest.shards):
        segments = np.array([(start, stop) for s, start, stop in manifest.segments if s == index], dtype=np.int64)
        if not len(segments):
            continue
        if shard.docs_sha256 is None:
            return None
        path = directory / f"{shard.name}.docs.npy"
        try:
            records = np.load(path, allow_pickle=False)
        except OSError as error:
            raise from_os_error(error, path, "read") from error
        except ValueError as error:
            raise LmError(f"{path}: not a document index ({error}).", code=Exit.DATA) from error
        if records.dtype != DOCUMENT or records.ndim != 1:
            raise LmError(f"{path}: not a document index.", code=Exit.DATA)
        # The segment that could hold each record is the last one that begins at or before it.
        order = segments[segments[:, 0].argsort()]
        starts = records["start"].astype(np.int64)
        place = np.searchsorted(order[:, 0], starts, side="right") - 1
        inside = (place >= 0) & (starts < order[np.maximum(place, 0), 1])
        found.append(records["hash"][inside])
    return np.unique(np.concatenate(found)) if found else np.empty(0, np.uint64)


def find_overlaps(state: Mapping[str, Any], directory: str | Path) -> tuple[list[Overlap], list[str]]:
    """Compare an evaluation set with the training sets that a checkpoint's state.json names.

    Returns the overlaps and, one sentence each, why a training set could not be compared.
    """
    manifest = read_manifest(directory)
    hashes: Hashes | None = None
    overlaps: list[Overlap] = []
    unknown: list[str] = []
    for source in state.get("sources") or []:
        path, dataset_id = str(source.get("path")), source.get("dataset_id")
        if dataset_id == manifest.dataset_id:
            overlaps.append(Overlap(path, max(manifest.n_docs, 1), max(manifest.n_docs, 1)))
            continue
        if not (Path(path) / MANIFEST).is_file():
            unknown.append(f"{path}: the training data are not here")
            continue
        training = read_manifest(path)
        if training.dataset_id != dataset_id:
            unknown.append(f"{path}: the training data have changed since")
            continue
        theirs = document_hashes(path, training)
        if hashes is None:
            hashes = document_hashes(directory, manifest)
        if theirs is None or hashes is None:
            unknown.append(f"{path if theirs is None else directory}: no document index")
            continue
        shared = len(np.intersect1d(hashes, theirs, assume_unique=True))
        if shared:
            overlaps.append(Overlap(path, shared, len(hashes)))
    return overlaps, unknown


def refuse_overlap(state: Mapping[str, Any], directory: str | Path) -> list[str]:
    """LmError 65 when an evaluation set shares documents with the training sets; else why some were not compared."""
    overlaps, unknown = find_overlaps(state, directory)
    if overlaps:
        worst = max(overlaps, key=lambda overlap: overlap.shared)
        raise LmError(
            f"{directory}: {worst.shared:,} of its {worst.documents:,} documents are in the training data "
            f"({worst.training_set}), so the result would not tell how the model does on new text.",
            hint="Evaluate on a held-out view (lm split makes one), or insist with: --allow-overlap",
            code=Exit.DATA,
        )
    return unknown
