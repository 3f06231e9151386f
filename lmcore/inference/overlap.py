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

from lmcore.data.manifest import MANIFEST, read_manifest
from lmcore.data.split import document_hashes
from lmcore.errors import Exit, LmError


@dataclass(frozen=True)
class Overlap:
    """Documents of one evaluation set that also are, or may be, in one training set."""

    training_set: str
    shared: int
    """0 when there is no document index to count by."""
    documents: int
    """Different documents of the evaluation set."""
    of: str = ""
    """The set whose views were made anew since the training, so that nobody knows which documents were trained on;
    empty when it is certain."""


def find_overlaps(state: Mapping[str, Any], directory: str | Path) -> tuple[list[Overlap], list[str]]:
    """Compare an evaluation set with the training sets that a checkpoint's state.json names.

    Returns the overlaps and, one sentence each, why a training set could not be compared.
    """
    manifest = read_manifest(directory)
    held_out = {entry.get("dataset_id") for entry in state.get("val") or []}
    overlaps: list[Overlap] = []
    unknown: list[str] = []
    for source in state.get("sources") or []:
        path, dataset_id = str(source.get("path")), source.get("dataset_id")
        if dataset_id == manifest.dataset_id:
            overlaps.append(Overlap(path, max(manifest.n_docs, 1), max(manifest.n_docs, 1)))
            continue
        present = (Path(path) / MANIFEST).is_file()
        if present and read_manifest(path).dataset_id == dataset_id:
            place, certain = Path(path), True
        else:
            set_ = _set_around(path)
            why = "the training data have changed since" if present else "the training data are not here"
            if set_ is None or manifest.dataset_id in held_out:
                unknown.append(f"{path}: {why}")
                continue
            place, certain = set_, False
        ours = document_hashes(directory, manifest)
        theirs = document_hashes(place, read_manifest(place))
        of = "" if certain else str(place)
        if ours is None or theirs is None:
            if not certain and place.resolve() in (Path(directory).resolve(), *Path(directory).resolve().parents):
                overlaps.append(Overlap(path, 0, 0, of))
            else:
                unknown.append(f"{place if theirs is None else directory}: no document index")
        elif shared := len(np.intersect1d(ours, theirs, assume_unique=True)):
            overlaps.append(Overlap(path, shared, len(ours), of))
    return overlaps, unknown


def _set_around(path: str) -> Path | None:
    """The set of which a view that is no longer there, or is another one now, was made."""
    for folder in (Path(path), Path(path).parent):
        if (folder / MANIFEST).is_file() and read_manifest(folder).split is None:
            return folder
    return None


def refuse_overlap(state: Mapping[str, Any], directory: str | Path) -> list[str]:
    """LmError 65 when an evaluation set shares documents with the training sets, or may do so because their views were
    made anew; else why some were not compared."""
    overlaps, unknown = find_overlaps(state, directory)
    if overlaps:
        worst = max(overlaps, key=lambda overlap: (not overlap.of, overlap.shared))
        if not worst.of:
            what = (
                f"{worst.shared:,} of its {worst.documents:,} documents are in the training data "
                f"({worst.training_set}), so the result would not tell how the model does on new text."
            )
        else:
            count = f"{worst.shared:,} of its {worst.documents:,} documents" if worst.documents else "its tokens"
            what = (
                f"{count} are in {worst.of}, whose views are other ones now than in the training, so nobody knows "
                "which of them the model has seen."
            )
        raise LmError(
            f"{directory}: {what}",
            hint="Evaluate on a held-out view (lm split makes one), or insist with: --allow-overlap",
            code=Exit.DATA,
        )
    return unknown
