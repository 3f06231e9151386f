"""The real writers as targets of the crash harnesses: tokenize, split, checkpoints, the log of a run.

Each runs its library function as the command does. Two things are arranged for the tracer: shards are committed on the
thread that fills them (strace counts calls per thread), and an acknowledgement follows each durable unit.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from crash_trace import acknowledge, tree_hash, warn

from lmcore import storage
from lmcore.data import adopt, merge, split, tokenization, validate, writer
from lmcore.data import manifest as manifests
from lmcore.data.shard import npy_chunks
from lmcore.errors import LmError
from lmcore.training import checkpoint
from lmcore.training.rundir import opened


class _Inline:
    """A ThreadPoolExecutor without a thread."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def submit(self, work: Callable[..., Any], *arguments: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(work(*arguments))
        except BaseException as error:
            future.set_exception(error)
        return future

    def shutdown(self, wait: bool = True) -> None: ...


class _Telling:
    """A Progress whose warnings reach the harness."""

    def start(self, task: str, total: float | None, unit: str) -> None: ...

    def advance(self, amount: float) -> None: ...

    def finish(self) -> None: ...

    def note(self, message: str) -> None: ...

    def warn(self, message: str) -> None:
        warn(message)


def _sets_without_dates(out: Path) -> str:
    """The tree, but of each manifest only what is not about when, where and by which encoder it was made."""
    digest = hashlib.sha256()
    for path in sorted(out.rglob("*")):
        name = str(path.relative_to(out))
        if path.name == ".lock":
            continue
        digest.update(name.encode() + b"\0")
        if path.is_symlink():
            digest.update(os.readlink(path).encode())
        elif path.name == "manifest.json":
            raw = json.loads(path.read_bytes())
            digest.update(storage.canonical_json({k: v for k, v in raw.items() if k not in ("created_by", "backend")}))
        elif path.is_file():
            digest.update(path.read_bytes())
    return digest.hexdigest()


def make_corpus(folder: Path) -> Path:
    """Three files, some 14,000 bytes: three shards of two rows and a bit."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(3):
        texts = [f"document {number}/{row}: " + hashlib.sha256(b"%d" % row).hexdigest() * 4 for row in range(17)]
        (folder / f"part-{number}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return folder


class Tokenize:
    """`lm tokenize` of local files into four shards."""

    shards = 4
    units = shards + 1

    def __init__(self, source: Path) -> None:
        self.source = source

    def prepare(self, out: Path) -> None: ...

    def run(self, out: Path) -> None:
        append, write_manifest = storage.append_json_line, tokenization.write_manifest

        def told(path: Any, value: Any) -> None:
            append(path, value)
            acknowledge(len(storage.read_json_lines(path)))

        def all_told(directory: Any, manifest: Any) -> None:
            write_manifest(directory, manifest)
            acknowledge(self.units)

        config = tokenization.TokenizeConfig(
            paths=(str(self.source),), tokenizer="byte", seq_len=2048, shard_tokens=4096, dedup=True
        )
        with contextlib.ExitStack() as stack:
            stack.enter_context(mock.patch.object(writer, "ThreadPoolExecutor", _Inline))
            stack.enter_context(mock.patch.object(storage, "append_json_line", told))
            stack.enter_context(mock.patch.object(tokenization, "write_manifest", all_told))
            # Shards past the page cache, as large ones are: two blocks, and an end that is no whole page.
            stack.enter_context(mock.patch.multiple(storage, _UNCACHED_BYTES=1, _BLOCK_BYTES=4096))
            tokenization.tokenize(config, out, workers=1, backend="tokenizers", progress=_Telling())

    def check(self, out: Path, acknowledged: int) -> None:
        if (out / "manifest.json").exists():
            report = validate.validate(out)
            assert report.ok, [finding.code for finding in report.findings]
            return
        assert acknowledged <= self.shards, "the acknowledged manifest is lost"
        lines = storage.read_json_lines(out / "journal.jsonl")
        assert len(lines) >= acknowledged, "an acknowledged shard is lost"
        for line in lines:
            entry = line["shard"]
            assert storage.sha256_file(out / f"{entry['name']}.npy") == entry["sha256"], "a shard is damaged"
            assert storage.sha256_file(out / f"{entry['name']}.docs.npy") == entry["docs_sha256"], "an index is damaged"

    def fingerprint(self, out: Path) -> str:
        return _sets_without_dates(out)


class Split:
    """`lm split --replace` with another fraction than last time: the old views are replaced."""

    units = 1

    def __init__(self, finished_set: Path, link: split.Link = "symlink", *, materialize: bool = False) -> None:
        self.source, self.link, self.materialize = finished_set, link, materialize

    def prepare(self, out: Path) -> None:
        shutil.copytree(self.source, out)
        split.split_set(out, {"val": 0.1, "test": 0.1})

    def run(self, out: Path) -> None:
        with mock.patch.object(split, "created_by", return_value={}):
            split.split_set(
                out,
                {"val": 0.2},
                link=self.link,
                materialize=self.materialize,
                replace=True,
                min_tokens=1,
                progress=_Telling(),
            )
        acknowledge(1)

    def check(self, out: Path, acknowledged: int) -> None:
        sides: dict[str, float] = {}
        for view in ("train", "val", "test"):
            if (out / view / "manifest.json").exists():
                found = manifests.read_manifest(out / view)
                assert found.split is not None
                sides[view] = found.split["fractions"]["val"]
            else:
                assert not (out / view).exists(), f"half a view: {view}"
        report = validate.validate(out)
        assert report.ok, [finding.code for finding in report.findings if finding.severity == "error"]
        assert len(set(sides.values())) <= 1, f"views of two splits side by side: {sides}"
        if acknowledged:
            assert sides == {"train": 0.2, "val": 0.2}, "an acknowledged view is lost"

    def fingerprint(self, out: Path) -> str:
        return _sets_without_dates(out)


class Merge:
    """`lm merge` of two parts."""

    units = 1

    def __init__(self, source: Path, parts: Path) -> None:
        self.parts = []
        for number in (1, 2):
            config = tokenization.TokenizeConfig(
                paths=(str(source),), tokenizer="byte", seq_len=2048, shard_tokens=4096, part=number, parts=2
            )
            self.parts.append(parts / f"part-{number}")
            tokenization.tokenize(config, self.parts[-1], workers=1, backend="tokenizers")

    def prepare(self, out: Path) -> None: ...

    def run(self, out: Path) -> None:
        storage.make_directory(out)
        storage.sweep(out)
        merge.merge(self.parts, out / "merged")
        acknowledge(1)

    def check(self, out: Path, acknowledged: int) -> None:
        merged = out / "merged"
        if acknowledged:
            assert merged.exists(), "the acknowledged set is lost"
        if merged.exists():
            report = validate.validate(merged)
            assert report.ok, [finding.code for finding in report.findings]

    def fingerprint(self, out: Path) -> str:
        return _links_by_target(out)


class Adopt:
    """`lm import` of two arrays: linked as they are, or converted."""

    units = 1

    def __init__(self, arrays: Path, *, copy: bool) -> None:
        self.arrays, self.copy = arrays, copy
        arrays.mkdir(exist_ok=True)
        for number in range(2):
            tokens = (np.arange(3 * 2048, dtype="<u2") * 7 + number) % 500
            chunks, _ = npy_chunks(tokens.reshape(3, 2048))
            (arrays / f"{number}.npy").write_bytes(b"".join(chunks))

    def prepare(self, out: Path) -> None: ...

    def run(self, out: Path) -> None:
        storage.make_directory(out)
        storage.sweep(out)
        if not (out / "set").exists():
            adopt.adopt(self.arrays, out / "set", copy=self.copy)
        storage.fsync_directory(out)
        acknowledge(1)

    def check(self, out: Path, acknowledged: int) -> None:
        adopted = out / "set"
        if acknowledged:
            assert adopted.exists(), "the acknowledged set is lost"
        if adopted.exists():
            report = validate.validate(adopted)
            assert report.ok, [finding.code for finding in report.findings]

    def fingerprint(self, out: Path) -> str:
        return _links_by_target(out)


def _links_by_target(out: Path) -> str:
    """Relative links out of the tree differ with the place of the tree: compare where they lead."""
    digest = hashlib.sha256()
    for path in sorted(out.rglob("*")):
        if path.name == "manifest.json":
            raw = json.loads(path.read_bytes())
            digest.update(storage.canonical_json({k: v for k, v in raw.items() if k not in ("created_by", "backend")}))
        elif path.is_file():
            digest.update(path.name.encode() + path.read_bytes())
        else:
            digest.update(path.name.encode() + b"/")
    return digest.hexdigest()


def snapshot(step: int) -> checkpoint.Snapshot:
    """A small checkpoint whose content is a function of the step."""
    return checkpoint.Snapshot(
        step=step,
        model={"w": torch.full((600,), float(step)), "b": torch.tensor(step)},
        optimizer={"w.exp_avg": torch.full((600,), step / 2)},
        state={"step": step, "tokens": 100 * step},
        config=b"model: {}\n",
        tokenizer=b'{"step":%d}' % step,
    )


class Checkpoints:
    """Save, prune, find the newest, with a damaged step in the way of the first save."""

    units = 4
    keep = 2

    def prepare(self, out: Path) -> None:
        damaged = checkpoint.save(out / "checkpoints", snapshot(1))
        (damaged / "model.safetensors").write_bytes(b"damaged")

    def run(self, out: Path) -> None:
        with opened(out) as run:
            newest = checkpoint.newest(out, skipped=lambda said: warn(said))
            done = (checkpoint.step_of(newest) or 0) if newest else 0
            for step in range(max(done, 1), self.units + 1):  # the step of an interrupted save is saved again
                checkpoint.save(run.checkpoints, snapshot(step))
                acknowledge(step)
                try:
                    checkpoint.prune(run.checkpoints, keep=self.keep)
                except LmError as error:
                    warn(f"old checkpoints are kept: {error}")

    def check(self, out: Path, acknowledged: int) -> None:
        newest = checkpoint.newest(out)
        step = (checkpoint.step_of(newest) or 0) if newest else 0
        assert step >= acknowledged, "the newest sound checkpoint is older than the acknowledged one"
        for path in checkpoint.steps_on_disk(out / "checkpoints"):
            if path.name != "step-00000001":
                assert checkpoint.is_sound(path), f"half a checkpoint: {path.name}"
        if newest:
            tensors = checkpoint.tensors.read_tensors(newest / checkpoint.MODEL)
            assert torch.equal(tensors["w"], torch.full((600,), float(step))), "wrong tensors"
            assert storage.read_json(newest / checkpoint.STATE)["step"] == step, "wrong state"


class RunLog:
    """What a run writes beside its checkpoints: configuration, events, metrics up to each checkpoint."""

    units = 3

    def prepare(self, out: Path) -> None: ...

    def run(self, out: Path) -> None:
        from lmcore.training.config import RunConfig

        with opened(out) as run:
            if run.config() is None:
                run.create(mock.Mock(spec=RunConfig, to_yaml=lambda: "model: {}\n"), b"{}")
            done = len(run.events())
            run.cut_metrics(done)
            for step in range(done + 1, self.units + 1):
                run.log({"step": step, "loss": 1.0, "pad": "x" * 700})
                run.flush()
                with mock.patch("time.strftime", return_value="then"):
                    run.event("saved", step=step)
                acknowledge(step)

    def check(self, out: Path, acknowledged: int) -> None:
        events = storage.read_json_lines(out / "run.jsonl")
        assert [event["step"] for event in events] == list(range(1, len(events) + 1))
        assert len(events) >= acknowledged, "an acknowledged event is lost"
        metrics = storage.read_json_lines(out / "metrics.jsonl")
        assert len(metrics) >= len(events), "metrics that a checkpoint stands for are lost"

    def fingerprint(self, out: Path) -> str:
        return tree_hash(out)


def real_writers(base: Path) -> Iterator[Any]:
    """Every writer, with its sources under `base`."""
    corpus = make_corpus(base / "corpus")
    yield Tokenize(corpus)
    finished = base / "finished"
    Tokenize(corpus).run(finished)
    yield Split(finished)
    yield Split(finished, "hardlink")
    yield Split(finished, "copy")
    yield Split(finished, materialize=True)
    yield Merge(corpus, base / "parts")
    yield Adopt(base / "arrays", copy=False)
    yield Adopt(base / "arrays", copy=True)
    yield Checkpoints()
    yield RunLog()
