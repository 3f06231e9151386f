"""What an artefact is, where it comes from, and whether the chain up to the source files still holds.

    export -> checkpoint -> view -> set -> plan -> source files
                     (or -> imported model)

Each link is recorded by content: an export names the hash of the checkpoint's COMMIT.json, a checkpoint the dataset_id
of its training data, a view the dataset_id of its set, a set its shards' hashes and the fingerprints of its source
files. `describe` follows the links from any artefact upwards. A link is

    holds      the parent is here and is what the child says
    broken     the parent (or a file of the artefact itself) is here and is something else
    away       the parent is not here, so nothing can be said about it

Contents are hashed; with `quick` shards are checked by size and header and source files by size only.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lmcore import storage
from lmcore.data.manifest import MANIFEST, PLAN, Manifest, read_manifest
from lmcore.errors import Exit, LmError, from_os_error
from lmcore.inference.provenance import PROVENANCE, Provenance, read_provenance
from lmcore.progress import SILENT, Progress
from lmcore.records import as_record

if TYPE_CHECKING:
    from lmcore.training.state import ImportedFrom

State = Literal["holds", "broken", "away"]
_SHOWN_SOURCES = 5


@dataclass
class Artefact:
    """One artefact of the chain."""

    kind: str
    """export, run, checkpoint, view, set, plan, model file, imported model, source files."""
    path: str
    identity: str | None
    """Content hash that others refer to it by."""
    facts: dict[str, Any] = field(default_factory=dict)
    state: State = "holds"
    problem: str = ""
    """Why the state is not `holds`."""
    parents: list[Artefact] = field(default_factory=list)

    def walk(self, depth: int = 0) -> Iterator[tuple[int, Artefact]]:
        """This artefact and its ancestors with their depth, depth first."""
        yield depth, self
        for parent in self.parents:
            yield from parent.walk(depth + 1)

    @property
    def sound(self) -> bool:
        """Nothing in the chain is broken (parts of it may be away)."""
        return all(artefact.state != "broken" for _, artefact in self.walk())

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return vars(self) | {"parents": [parent.to_json() for parent in self.parents]}


def describe(path: str | os.PathLike[str], *, quick: bool = False, progress: Progress = SILENT) -> Artefact:
    """What `path` is, with its ancestors, all verified. Raises LmError (2) when it is nothing of ours."""
    path = Path(path)
    if not path.exists():
        raise LmError(f"{path}: no such file or directory.")
    if path.is_file():
        if path.suffix == ".safetensors":
            return _model_file(path, quick, progress)
        if path.name in (MANIFEST, PLAN, PROVENANCE, "COMMIT.json", "config.yaml"):
            return describe(path.parent, quick=quick, progress=progress)
    elif (path / PROVENANCE).is_file():
        return _export(path, quick, progress)
    elif (path / "COMMIT.json").is_file():
        return _checkpoint(path, quick, progress)
    elif (path / "checkpoints").is_dir():
        return _run(path, quick, progress)
    elif (path / MANIFEST).is_file():
        return _data(path, quick, progress)
    elif (path / PLAN).is_file():
        return _plan(path, quick)
    raise LmError(
        f"{path}: nothing that this program makes.",
        hint="It knows exports, runs, checkpoints, shard sets, views and plans.",
    )


def _expected(found: Artefact, wanted: Any, child: str) -> Artefact:
    """A parent that must have a certain identity."""
    if found.identity != wanted:
        found.state = "broken"
        found.problem = f"{child} was made from {_short(wanted)}, this is {_short(found.identity)}"
    return found


def _guarded(kind: str, path: Path, make: Any) -> Artefact:
    """An artefact, or a broken one that tells why it cannot be read."""
    try:
        return make()  # type: ignore[no-any-return]
    except LmError as error:
        return Artefact(kind, os.fspath(path), None, state="broken", problem=error.message)


# ---------------------------------------------------------------------------------------- exports


def _export(path: Path, quick: bool, progress: Progress) -> Artefact:
    record = read_provenance(path / PROVENANCE)
    identity = storage.sha256_file(path / PROVENANCE)
    found = Artefact("export", os.fspath(path), identity, _export_facts(record))
    for name, entry in record.files.items():
        file = path / name
        if Path(name).name != name or not os.path.isfile(file):
            found.state, found.problem = "broken", f"{name} is missing"
        elif os.path.getsize(file) != entry.bytes or storage.sha256_file(file) != entry.sha256:
            found.state, found.problem = "broken", f"{name} has changed since it was exported"
    found.parents = _export_parents(record, quick, progress)
    return found


def _model_file(path: Path, quick: bool, progress: Progress) -> Artefact:
    """A single safetensors file, ours or another's. LmError (2) for any other file of that name."""
    from lmcore.training import tensors

    try:
        with tensors.open_plain(path.resolve()) as file:
            entries, metadata = tensors.read_header(file, os.fstat(file.fileno()).st_size, os.fspath(path))
    except LmError as error:
        raise LmError(error.message) from error
    except OSError as error:
        raise from_os_error(error, path, "read") from error
    try:
        record = as_record(Provenance, json.loads(metadata.get("lmshards", "{}")), f"{path}: its metadata")
    except (ValueError, RecursionError) as error:
        raise LmError(f"{path}: its metadata is not JSON.", code=Exit.DATA) from error
    found = Artefact("model file", os.fspath(path), storage.sha256_file(path), _export_facts(record))
    found.facts["tensors"] = len(entries)
    found.parents = _export_parents(record, quick, progress)
    return found


def _export_facts(record: Provenance) -> dict[str, Any]:
    facts = {name: getattr(record, name) for name in ("family", "dtype", "step", "tokens")}
    return {name: value for name, value in facts.items() if value is not None}


def _export_parents(record: Provenance, quick: bool, progress: Progress) -> list[Artefact]:
    parents = []
    for source in record.checkpoints:
        path = Path(source.path)
        if os.path.isfile(path / "COMMIT.json"):
            parent = _guarded("checkpoint", path, lambda path=path: _checkpoint(path, quick, progress))
            parents.append(_expected(parent, source.id, "the export"))
        else:
            parents.append(Artefact("checkpoint", str(path), source.id, state="away", problem="not here"))
    return parents


# ---------------------------------------------------------------------------------------- runs and checkpoints


def _run(path: Path, quick: bool, progress: Progress) -> Artefact:
    from lmcore.training import checkpoint as checkpoints

    steps = [checkpoints.step_of(p) for p in checkpoints.steps_on_disk(path / checkpoints.CHECKPOINTS)]
    found = Artefact("run", os.fspath(path), None, {"checkpoints": steps})
    skipped: list[str] = []
    newest = checkpoints.newest(path, skipped=skipped.append)
    if skipped:
        found.state, found.problem = "broken", skipped[0]
    if newest is None:
        found.facts["newest"] = None
        return found
    parent = _checkpoint(newest, quick, progress)
    found.facts |= {"newest": parent.facts.get("step")}
    found.identity = parent.identity
    found.parents = [parent]
    return found


def _checkpoint(path: Path, quick: bool, progress: Progress) -> Artefact:
    from lmcore.training import checkpoint as checkpoints
    from lmcore.training.state import read_state

    identity = storage.sha256_file(path / checkpoints.COMMIT)
    found = Artefact("checkpoint", os.fspath(path), identity)
    try:
        checkpoints.verify(path)
    except LmError as error:
        found.state, found.problem = "broken", error.message
        return found
    state = read_state(path)
    facts = {name: getattr(state, name) for name in ("step", "tokens", "samples")}
    found.facts = {name: value for name, value in facts.items() if value is not None}
    if state.validation is not None and state.validation.loss is not None:
        found.facts["validation_loss"] = state.validation.loss
    for source in state.sources:
        place = Path(source.path)
        if os.path.isfile(place / MANIFEST):
            parent = _guarded("view", place, lambda place=place: _data(place, quick, progress))
            found.parents.append(_expected(parent, source.dataset_id, "the checkpoint"))
        else:
            found.parents.append(Artefact("view", str(place), source.dataset_id, state="away", problem="not here"))
    if state.imported_from is not None:
        found.parents.append(_imported(state.imported_from))
    return found


def _imported(record: ImportedFrom) -> Artefact:
    path = Path(record.path)
    found = Artefact("imported model", str(path), record.config_sha256, {"family": record.family})
    if not os.path.isfile(path / "config.json"):
        found.state, found.problem = "away", "not here"
        return found
    wanted = {"config.json": record.config_sha256} | dict(record.weights)
    for name, sha256 in wanted.items():
        if not os.path.isfile(path / name) or storage.sha256_file(path / name) != sha256:
            found.state, found.problem = "broken", f"{name} has changed since it was imported"
    return found


# ---------------------------------------------------------------------------------------- data


def _data(path: Path, quick: bool, progress: Progress) -> Artefact:
    from lmcore.data.stream import TokenStream

    manifest = read_manifest(path)
    found = Artefact(manifest.kind, os.fspath(path), manifest.dataset_id, _data_facts(manifest))
    try:
        progress.start(f"verify {path}", None, "shards")
        TokenStream.open(path, verify="size" if quick else "full")
    except LmError as error:
        found.state, found.problem = "broken", error.message
    finally:
        progress.finish()
    if manifest.kind == "set":
        if (path / PLAN).is_file():
            found.parents = [_guarded("source files", path / PLAN, lambda: _sources(path, quick))]
        return found
    wanted = (manifest.split or {}).get("parent")
    parent = _parent_of(path, manifest)
    if parent is None:
        found.parents = [Artefact("set", "the set that was split", wanted, state="away", problem="not here")]
    else:
        above = _guarded("set", parent, lambda: _data(parent, quick, progress))
        found.parents = [above if wanted is None else _expected(above, wanted, "the view")]
    return found


def _data_facts(manifest: Manifest) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "tokens": manifest.n_tokens,
        "documents": manifest.n_docs,
        "shards": len(manifest.shards),
    }
    if manifest.tokenizer is not None:
        facts["tokenizer"] = f"{manifest.tokenizer.name} ({manifest.tokenizer.sha256[:12]})"
    if manifest.kind == "set" and manifest.source:
        facts["source"] = manifest.source.get("kind", "unknown")
    return facts


def _parent_of(path: Path, manifest: Manifest) -> Path | None:
    """The set whose shards a view links to."""
    target = (path / f"{manifest.shards[0].name}.npy").resolve().parent
    candidates = [target, path.resolve().parent]
    return next((p for p in candidates if p != path.resolve() and (p / MANIFEST).is_file()), None)


def _plan(path: Path, quick: bool) -> Artefact:
    """A set that is not finished."""
    from lmcore.data.writer import read_journal

    found = Artefact("plan", os.fspath(path), storage.sha256_file(path / PLAN), {"finished": False})
    found.facts["committed_shards"] = len(read_journal(path))
    found.parents = [_guarded("source files", path / PLAN, lambda: _sources(path, quick))]
    return found


def _sources(path: Path, quick: bool) -> Artefact:
    """The files that the text of a set came from, compared with what the plan says of them."""
    from lmcore.data.plan import read_plan
    from lmcore.data.sources import fingerprint

    plan = read_plan(path)
    found = Artefact("source files", os.fspath(path / PLAN), storage.sha256_file(path / PLAN))
    units = plan.units
    found.facts = {"files": len(units), "first": [unit.path for unit in units[:_SHOWN_SOURCES]]}
    changed, gone, remote = [], [], 0
    for unit in units:
        local = Path(unit.path)
        if unit.is_remote or unit.path == "-":
            remote += 1
        elif not os.path.isfile(local):
            gone.append(unit.path)
        else:
            size = local.stat().st_size
            if size != unit.size or (not quick and unit.fingerprint and fingerprint(local, size) != unit.fingerprint):
                changed.append(unit.path)
    if remote:
        found.facts["remote"] = remote
    if changed:
        found.state = "broken"
        found.problem = f"{len(changed)} of {len(units)} files have changed since, such as {changed[0]}"
    elif gone:
        found.state = "away"
        found.problem = f"{len(gone)} of {len(units)} files are not here, such as {gone[0]}"
    return found


def _short(identity: Any) -> str:
    return str(identity)[:12] if identity else "nothing known"
