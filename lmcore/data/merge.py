"""Join the parts of one plan into one set, by manifest: no token is copied.

`lm tokenize --part i/n` gives every part its own directory, on any machine, in any order. Their streams one after the
other are the stream of the whole plan, whatever n is; the merged set names their shards through relative links:

    corpus/part-001-shard-00000.npy -> ../corpus-part-001-of-008/shard-00000.npy

The merged set's identity depends on n (its shards do), but not on which machine made which part.
"""

from __future__ import annotations

import collections
import os
from collections.abc import Sequence
from pathlib import Path

from lmcore import storage
from lmcore.data.manifest import MANIFEST, PLAN, TOKENIZER, Manifest, ShardEntry, make_manifest, read_manifest
from lmcore.data.plan import Plan, different, read_plan
from lmcore.data.readers import Place
from lmcore.data.sources import total_size
from lmcore.data.tokenization import created_by
from lmcore.errors import Exit, LmError


def merge(parts: Sequence[str | Path], out: str | Path) -> Manifest:
    """Make the set `out` from finished parts, given in any order; all parts of one plan must be there.

    Raises LmError: 2 when they do not belong together, 65 when one is not finished, 73 when `out` is not empty.
    """
    out = Path(out)
    plans = {Path(part): read_plan(part) for part in parts}
    ordered = _in_order(plans)
    manifests = [read_manifest(part) for part in ordered]
    _refuse_different(ordered, [plans[part] for part in ordered], manifests)
    merged = _manifest(plans[ordered[0]], manifests)
    if (out / MANIFEST).is_file() and read_manifest(out).dataset_id == merged.dataset_id:
        storage.fsync_directory(out.parent)  # whoever merged it may have died before its name was durable
        return read_manifest(out)
    first = plans[ordered[0]]
    whole = Plan(
        request=first.request.model_copy(update={"part": None, "parts": None}),
        source=first.source,
        units=first.units,
        tokenizer_name=first.tokenizer_name,
        tokenizer_sha256=first.tokenizer_sha256,
        start=Place(0),
        stop=Place(len(first.units)),
    )
    with storage.commit_directory(out) as directory:
        for number, (part, manifest) in enumerate(zip(ordered, manifests, strict=True), 1):
            where = os.path.relpath(part.resolve(), out.resolve())
            for shard in manifest.shards:
                for ending in (".npy", ".docs.npy"):
                    os.symlink(f"{where}/{shard.name}{ending}", directory / f"{_name(number, shard)}{ending}")
        storage.create_file(directory / TOKENIZER, (ordered[0] / TOKENIZER).read_bytes())
        storage.create_file(directory / PLAN, storage.canonical_json(whole.to_json()) + b"\n")
        text = merged.model_dump_json(indent=1) + "\n"
        storage.create_file(directory / MANIFEST, text.encode())
    return merged


def _in_order(plans: dict[Path, Plan]) -> list[Path]:
    if not plans:
        raise LmError("Name the parts to merge: lm merge shards/NAME-part-*")
    by_number: dict[int, Path] = {}
    total = 0
    for path, plan in plans.items():
        if plan.request.part is None or plan.request.parts is None:
            raise LmError(f"{path}: not a part of a plan; parts are made by lm tokenize --part I/N.")
        total = total or plan.request.parts
        if plan.request.parts != total:
            raise LmError(f"{path}: part {plan.request.part} of {plan.request.parts}, but others are parts of {total}.")
        if plan.request.part in by_number:
            raise LmError(
                f"{path}: part {plan.request.part}/{total} is there twice, also in {by_number[plan.request.part]}."
            )
        by_number[plan.request.part] = path
    missing = [number for number in range(1, total + 1) if number not in by_number]
    if missing:
        shown = ", ".join(f"{number}/{total}" for number in missing[:5])
        raise LmError(
            f"{len(missing)} of {total} parts are missing ({shown}).",
            hint=f"Make them with the options of the others: lm tokenize PATH --part {missing[0]}/{total}",
        )
    return [by_number[number] for number in range(1, total + 1)]


def _refuse_different(paths: Sequence[Path], plans: Sequence[Plan], manifests: Sequence[Manifest]) -> None:
    first = plans[0]
    for path, plan, manifest in zip(paths, plans, manifests, strict=True):
        changed = sorted({*different(first.request, plan.request)} - {"part"})
        if changed:
            raise LmError(f"{path}: made with other options than {paths[0]} ({', '.join(changed)}).")
        if plan.units != first.units:
            raise LmError(f"{path}: its plan names other files than that of {paths[0]}.", code=Exit.DATA)
        if manifest.tokenizer != manifests[0].tokenizer:
            raise LmError(f"{path}: made with another tokenizer than {paths[0]}.", code=Exit.DATA)


def _name(part: int, shard: ShardEntry) -> str:
    return f"part-{part:03d}-{shard.name}"


def _manifest(plan: Plan, manifests: Sequence[Manifest]) -> Manifest:
    shards = tuple(
        shard.model_copy(update={"name": _name(number, shard)})
        for number, manifest in enumerate(manifests, 1)
        for shard in manifest.shards
    )
    dropped: collections.Counter[str] = collections.Counter()
    for manifest in manifests:
        dropped.update(manifest.filters.get("dropped", {}))
    first = manifests[0]
    source = {key: value for key, value in first.source.items() if key != "part"}
    source |= {"files": len(plan.units), "stored_bytes": total_size(plan.units)}
    return make_manifest(
        tokenizer=first.tokenizer,
        dtype=first.dtype,
        seq_len=first.seq_len,
        shards=shards,
        segments=tuple((index, 0, shard.n_tokens) for index, shard in enumerate(shards)),
        n_tokens=sum(shard.n_tokens for shard in shards),
        n_docs=sum(shard.n_docs for shard in shards),
        n_bytes=sum(manifest.n_bytes for manifest in manifests),
        source=source,
        filters={**first.filters, "dropped": dict(sorted(dropped.items()))},
        backend=first.backend,
        created_by=created_by() | {"merged": [manifest.dataset_id for manifest in manifests]},
    )
