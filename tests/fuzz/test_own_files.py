"""Damaged files of our own, of every kind that a command reads, give a result or one LmError, at once.

Whatever lies behind a hash is tried twice: with the hash as it was, and (mostly) with a hash that fits.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tokenizer_zoo
import torch

from lmcore.config import dump_yaml, merge, parse_yaml
from lmcore.data.manifest import dataset_identity, read_manifest
from lmcore.data.merge import merge as merge_parts
from lmcore.data.plan import TokenizeConfig, read_plan
from lmcore.data.provenance import Locator
from lmcore.data.repair import retokenize
from lmcore.data.sampler import Sampler
from lmcore.data.split import split_set
from lmcore.data.stream import TokenStream
from lmcore.data.surroundings import opening_of_tokenizer
from lmcore.data.tokenization import tokenize
from lmcore.data.tokenizer import Tokenizer
from lmcore.data.validate import validate
from lmcore.data.writer import read_journal
from lmcore.inference.export import export_model
from lmcore.inference.info import describe
from lmcore.inference.overlap import find_overlaps
from lmcore.inference.tasks import read_task
from lmcore.model.plan import plan_model
from lmcore.training import checkpoint, rundir
from lmcore.training.config import read_preset, read_run_config
from lmcore.training.launch import prepare
from lmcore.training.loop import train
from lmcore.training.state import read_state
from lmcore.training.tensors import read_tensors
from tests.fuzz.harness import SEEDS, Target, check, command, document, lines, temporary_root
from tests.fuzz.mutators import damaged_bytes, damaged_json, damaged_safetensors

TINY: dict[str, Any] = {
    "model": {"d_model": 16, "num_layers": 1, "num_heads": 2, "d_ff": 32, "context_length": 16},
    "optim": {"optimizer": "adamw", "warmup_steps": 1},
    "train": {
        "steps": 4,
        "batch_tokens": 64,
        "dtype": "fp32",
        "compile": False,
        "device": "cpu",
        "eval": {"every_steps": 0, "tokens": 64},
        "checkpoint": {"every_steps": 2, "background": False, "space_check": False},
    },
}
TOKENIZERS = ("byte level, marks that are not special", "SentencePiece BPE", "Unigram with bytes", "WordPiece", "words")
REQUEST = {"doc_id": 0, "idx": 0, "label": 1, "request": {"context": "two and two are", "continuation": " four"}}


# ---------------------------------------------------------------------------------------- the sound files


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A set with views, an unfinished one, runs on shards and on text, tasks, checkpoints in one file."""
    torch.set_num_threads(1)
    root = temporary_root(tmp_path_factory.mktemp("fuzz"), "own-files")
    (root / "text.jsonl").write_text("".join(json.dumps({"text": f"document {i} " * 35}) + "\n" for i in range(30)))
    tokenize(set_request(root), root / "set", workers=1, backend="tokenizers")
    shutil.copytree(root / "set", root / "unfinished")
    shutil.copy(root / "text.jsonl", root / "more.jsonl")
    paths = (str(root / "text.jsonl"), str(root / "more.jsonl"))
    for part in (1, 2):
        request = set_request(root).model_copy(update={"paths": paths, "part": part, "parts": 2})
        tokenize(request, root / f"part-{part}", workers=1, backend="tokenizers")
    (root / "unfinished" / "manifest.json").unlink()
    journal = root / "unfinished" / "journal.jsonl"
    journal.write_bytes(b"".join(journal.read_bytes().splitlines(keepends=True)[:-1]))
    split_set(root / "set", {"val": 0.2})
    train_run(root / "run", {"data": {"train": str(root / "set")}})
    data = {"stream": str(root / "text.jsonl"), "tokenizer": "byte", "val": [str(root / "set" / "val")]}
    train_run(root / "stream", {"data": data})
    shutil.copytree(root / "run", root / "begun")
    shutil.rmtree(root / "begun" / "checkpoints")
    began = {"init_from": str(root / "run")}
    train_run(root / "begun-from", {"data": {"train": str(root / "set")}, "train": began})
    shutil.rmtree(root / "begun-from" / "checkpoints")
    (root / "preset.yaml").write_text(dump_yaml(merge(TINY, {"data": {"train": str(root / "set")}})))
    for name in TOKENIZERS:
        (root / name).mkdir()
        tokenizer_zoo.tokenizer(name).save(root / name / "tokenizer.json")
    (root / "words" / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "</s>"}, "x": [1]}))
    task = root / "tasks" / "sums" / "rc"
    task.mkdir(parents=True)
    task.joinpath("requests.jsonl").write_text(
        "".join(json.dumps(REQUEST | {"doc_id": i, "idx": k}) + "\n" for i in (0, 1, 1_000_000) for k in (0, 1))
    )
    task.joinpath("config.json").write_text(
        json.dumps({"a": {"primary_metric": "acc", "uncond_docid_offset": 1000000}})
    )
    model, optimizer = one_file_pair()
    checkpoint.save_checkpoint(model, optimizer, 3, root / "one.safetensors")
    try:
        yield root
    finally:
        shutil.rmtree(root, ignore_errors=True)


def set_request(root: Path) -> TokenizeConfig:
    return TokenizeConfig(paths=(str(root / "text.jsonl"),), tokenizer="byte", seq_len=2048, shard_tokens=4096)


def train_run(run: Path, settings: dict[str, Any]) -> None:
    train(prepare(run, preset=merge(TINY, settings)))


def one_file_pair() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    return model, optimizer


# ---------------------------------------------------------------------------------------- hashes that fit again


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def seal_manifest(folder: Path, **hashes: str) -> Callable[[], None]:
    """The identity of a manifest, after the hashes of files of its first shard."""
    path = folder / "manifest.json"

    def seal() -> None:
        try:
            value = json.loads(path.read_bytes())
            for key, ending in hashes.items():
                value["shards"][0][key] = sha256(folder / f"{value['shards'][0]['name']}{ending}")
            value["dataset_id"] = dataset_identity(value)
            path.write_text(json.dumps(value))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            pass  # damaged too much for that

    return seal


def seal_checkpoint(folder: Path) -> Callable[[], None]:
    def seal() -> None:
        path = folder / "COMMIT.json"
        commit = json.loads(path.read_bytes())
        for name in commit["files"]:
            commit["files"][name] = {"bytes": (folder / name).stat().st_size, "sha256": sha256(folder / name)}
        path.write_text(json.dumps(commit))

    return seal


# ---------------------------------------------------------------------------------------- other damages


def yaml(raw: bytes, rng: random.Random) -> bytes:
    """A YAML file: its values, or its bytes."""
    if rng.random() < 0.4:
        return damaged_bytes(raw, rng)
    try:
        return dump_yaml(damaged_json(parse_yaml(raw.decode(), "sound"), rng)).encode()
    except (UnicodeEncodeError, RecursionError, ValueError):
        return damaged_bytes(raw, rng)


def array(raw: bytes, rng: random.Random) -> bytes:
    """A .npy file: the header, some numbers in it, or some bytes behind it that keep its length."""
    begin = 10 + int.from_bytes(raw[8:10], "little")
    if rng.random() < 0.2:
        return damaged_bytes(raw[:begin], rng) + raw[begin:]
    data = bytearray(raw[begin:])
    for _ in range(rng.choice((1, 1, 2, 8))):
        at = rng.randrange(0, len(data), 4)
        number = rng.choice((0, 1, 255, 1 << 16, 1 << 31, (1 << 32) - 1, rng.randrange(1 << 32)))
        data[at : at + 4] = number.to_bytes(4, "little")[: len(data) - at]
    return raw[:begin] + bytes(data)


# ---------------------------------------------------------------------------------------- what reads them


def copied(folder: Path, read: Callable[[Path], Any]) -> Callable[[], Any]:
    """A reader that writes works on a copy, which lies beside the original."""

    def run() -> Any:
        copy = folder.with_name(f"{folder.name}-copy")
        try:
            shutil.copytree(folder, copy, symlinks=True)
            return read(copy)
        finally:
            shutil.rmtree(copy, ignore_errors=True)

    return run


def meant(folder: Path) -> None:
    """A manifest that is accepted means what its bytes say."""
    manifest, value = read_manifest(folder), json.loads((folder / "manifest.json").read_bytes())
    assert all(re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}", shard.name) for shard in manifest.shards)
    assert manifest.n_tokens == sum(stop - start for _, start, stop in manifest.segments)
    assert manifest.dataset_id == value["dataset_id"]
    read = json.loads(manifest.model_dump_json())["shards"]
    assert [entry | said for entry, said in zip(read, value["shards"], strict=True)] == read


def verified(step: Path) -> None:
    commit = checkpoint.verify(step)
    assert commit["step"] == checkpoint.step_of(step)
    assert commit["files"].keys() == {path.name for path in step.iterdir()} - {"COMMIT.json"}


def journal_of(folder: Path) -> None:
    assert len(read_journal(folder)) <= (folder / "journal.jsonl").read_bytes().count(b"\n")


def whole_stream(folder: Path) -> Any:
    stream = TokenStream.open(folder)
    assert len(stream.read(0, len(stream))) == len(stream)
    Sampler(stream, context_length=8, seed=1).batch(3, 5)


def traced(folder: Path) -> None:
    locator = Locator(TokenStream.open(folder))
    for position in (0, locator.stream.n_tokens // 2, locator.stream.n_tokens - 1):
        origin = locator.at(position)
        assert origin.start <= position < origin.stop
        locator.source_text(origin)
    locator.by_source("text.jsonl", 3)
    locator.in_window(locator.stream.n_tokens - 5, 10)


def merged(root: Path) -> None:
    try:
        merge_parts([root / "part-1", root / "part-2"], root / "merged")
    finally:
        shutil.rmtree(root / "merged", ignore_errors=True)


def resumed(run: Path) -> None:
    train(prepare(run, resume=True))


def used_tokenizer(file: Path) -> None:
    tokenizer = Tokenizer.from_file(file)
    ids = tokenizer.encode("the river, caf\u00e9 \U0001f600 <s></s>", control=True) + tokenizer.encode("<s> water")
    tokenizer.decode(ids, specials=True)
    assert len(tokenizer.token_bytes()) == tokenizer.vocab_size
    opening_of_tokenizer(tokenizer)
    spell = tokenizer.speller(ids[:2])
    b"".join(spell(number) for number in ids[2:])
    assert tokenizer.lossless in (True, False)
    tokenizer.entry()


def one_file(path: Path) -> None:
    model, optimizer = one_file_pair()
    checkpoint.load_checkpoint(path, model, optimizer)  # what an optimizer needs of its state, it alone knows


def planned(path: Path) -> None:
    _, raw = read_preset(str(path))
    plan_model(prepare(path.with_name("nowhere"), preset=raw, look=True).config.model)


def plotted(run: Path) -> None:
    from lmcore.tools import plot

    series = {str(run): plot.read(run)}
    plot.terminal(series, by="time", smooth=0.9, width=80)


def cut(run: Path) -> None:
    with rundir.opened(run) as directory:
        directory.cut_metrics(2)


# ---------------------------------------------------------------------------------------- the table


def targets(root: Path) -> dict[str, Target]:
    made, unfinished, run = root / "set", root / "unfinished", root / "run"
    step = run / "checkpoints" / "step-00000004"
    middle = run / "checkpoints" / "step-00000002"
    stream = root / "stream" / "checkpoints" / "step-00000002"
    shutil.rmtree(root / "stream" / "checkpoints" / "step-00000004", ignore_errors=True)
    commit = step / "COMMIT.json"
    seal = seal_checkpoint(step)
    task = root / "tasks" / "sums" / "rc"
    again = set_request(root)

    def continued(folder: Path) -> Any:
        return tokenize(again, folder, workers=1, backend="tokenizers")

    def from_middle(folder: Path) -> None:
        shutil.rmtree(folder / "checkpoints" / "step-00000004")
        resumed(folder)

    def sealed(name: str, damage: Any, *readers: Callable[[], Any], **settings: Any) -> Target:
        return Target(step / name, damage, readers, seal, (commit,), **settings)

    tokenizers = {
        f"tokenizer: {name}": Target(
            root / name / "tokenizer.json", document, (lambda name=name: used_tokenizer(root / name),)
        )
        for name in TOKENIZERS
    }
    return tokenizers | {
        "tokenizer_config.json": Target(
            root / "words" / "tokenizer_config.json", document, (lambda: used_tokenizer(root / "words"),)
        ),
        "manifest of a set": Target(
            made / "manifest.json",
            document,
            (
                lambda: whole_stream(made),
                lambda: validate(made),
                lambda: describe(made, quick=True),
                lambda: traced(made),
                lambda: meant(made),
                command("info", made),
            ),
            seal_manifest(made),
        ),
        "manifest, its hash left": Target(made / "manifest.json", document, (lambda: meant(made),)),
        "manifest of a view": Target(
            made / "val" / "manifest.json",
            document,
            (
                lambda: whole_stream(made / "val"),
                lambda: validate(made),
                lambda: traced(made / "val"),
                lambda: describe(made / "val", quick=True),
                lambda: find_overlaps({"sources": [{"path": str(made / "train"), "dataset_id": "x"}]}, made / "val"),
                copied(made, lambda copy: split_set(copy, {"val": 0.2})),
            ),
            seal_manifest(made / "val"),
        ),
        "journal": Target(
            made / "journal.jsonl",
            lines,
            (
                lambda: journal_of(made),
                lambda: validate(made, level="quick"),
                copied(made, lambda copy: retokenize(copy, [1], workers=1, backend="tokenizers")),
            ),
        ),
        "journal of an unfinished set": Target(
            unfinished / "journal.jsonl",
            lines,
            (copied(unfinished, continued), lambda: describe(unfinished, quick=True)),
        ),
        "plan": Target(
            made / "plan.json",
            document,
            (
                lambda: read_plan(made),
                lambda: describe(made, quick=True),
                lambda: traced(made),
                copied(made, continued),
                copied(made, lambda copy: retokenize(copy, [1], workers=1, backend="tokenizers")),
                command("inspect", made, "--token", "5000"),
                command("info", made),
                command("validate", made),
            ),
        ),
        "plan of an unfinished set": Target(
            unfinished / "plan.json",
            document,
            (copied(unfinished, continued), lambda: describe(unfinished, quick=True)),
        ),
        "plan of a part": Target(root / "part-2" / "plan.json", document, (lambda: merged(root),)),
        "document index": Target(
            made / "shard-00000.docs.npy",
            array,
            (
                lambda: traced(made),
                lambda: validate(made),
                lambda: traced(made / "val"),
                lambda: find_overlaps({"sources": [{"path": str(made / "train"), "dataset_id": None}]}, made / "val"),
                copied(made, lambda copy: split_set(copy, {"val": 0.3}, replace=True)),
                copied(made, lambda copy: split_set(copy, {"val": 0.3}, by="rows", materialize=True, replace=True)),
                copied(unfinished, continued),
                command("inspect", made, "--token", "100", "--length", "30"),
            ),
            seal_manifest(made, docs_sha256=".docs.npy"),
            (made / "manifest.json",),
        ),
        "shard": Target(
            made / "shard-00000.npy",
            array,
            (
                lambda: whole_stream(made),
                lambda: validate(made),
                command("inspect", made, "--token", "100", "--length", "30"),
            ),
            seal_manifest(made, sha256=".npy"),
            (made / "manifest.json",),
            least=0.05,
        ),
        "tokenizer of a set": Target(
            made / "tokenizer.json",
            document,
            (lambda: validate(made), lambda: used_tokenizer(made / "tokenizer.json"), copied(unfinished, continued)),
        ),
        "weights": sealed(
            "model.safetensors",
            damaged_safetensors,
            lambda: read_tensors(step / "model.safetensors"),
            lambda: checkpoint.load_model(step),
        ),
        "optimizer": Target(
            middle / "optimizer.safetensors",
            damaged_safetensors,
            (lambda: read_tensors(middle / "optimizer.safetensors"), copied(run, from_middle)),
            seal_checkpoint(middle),
            (middle / "COMMIT.json",),
        ),
        "state": sealed(
            "state.json",
            document,
            lambda: read_state(step),
            lambda: find_overlaps(checkpoint.load_model(step).state, made / "val"),
            lambda: describe(step, quick=True),
            copied(run, resumed),
            copied(run, lambda copy: export_model(copy, copy / "export")),
            command("eval", step, "--data", made / "val", "--max-tokens", "64"),
        ),
        "state in the middle of a run": Target(
            middle / "state.json",
            document,
            (copied(run, from_middle),),
            seal_checkpoint(middle),
            (middle / "COMMIT.json",),
        ),
        "state of a run on text": Target(
            stream / "state.json",
            document,
            (copied(root / "stream", resumed),),
            seal_checkpoint(stream),
            (stream / "COMMIT.json",),
        ),
        "commit": Target(
            commit,
            document,
            (lambda: verified(step), lambda: checkpoint.newest(run), lambda: describe(run, quick=True)),
        ),
        "configuration of a checkpoint": sealed(
            "config.yaml",
            yaml,
            lambda: read_run_config(step / "config.yaml"),
            lambda: checkpoint.load_model(step),
        ),
        "tokenizer of a checkpoint": sealed("tokenizer.json", document, lambda: checkpoint.load_model(step)),
        "configuration of a run": Target(
            run / "config.yaml", yaml, (lambda: prepare(run, resume=True), lambda: describe(run, quick=True))
        ),
        "preset": Target(
            root / "preset.yaml",
            yaml,
            (lambda: planned(root / "preset.yaml"),),
        ),
        "events": Target(
            root / "begun-from" / "run.jsonl",
            lines,
            (
                lambda: prepare(root / "begun-from", resume=True),
                lambda: rundir.read_start(root / "begun-from"),
            ),
        ),
        "metrics": Target(
            run / "metrics.jsonl",
            lines,
            (
                lambda: plotted(run),
                copied(run, cut),
                copied(run, lambda copy: export_model(copy, copy / "export")),
                command("plot", run),
                command("inspect", run, "--step", "3"),
            ),
        ),
        "task": Target(task / "requests.jsonl", lines, (lambda: read_task("sums/rc", task),)),
        "configuration of a task": Target(
            task / "config.json", document, (lambda: read_task("sums/rc", task),), least=0.0
        ),
        "checkpoint in one file": Target(
            root / "one.safetensors", damaged_safetensors, (lambda: one_file(root / "one.safetensors"),)
        ),
    }


KINDS = list(targets(Path("nowhere")))
SHARE = {
    "state of a run on text": 0.08,
    "state in the middle of a run": 0.08,
    "optimizer": 0.1,
    "shard": 0.15,
    "plan": 0.2,
    "plan of an unfinished set": 0.5,
    "weights": 0.5,
    "tokenizer of a set": 0.5,
    "tokenizer of a checkpoint": 0.5,
    "metrics": 0.2,
    "state": 0.25,
    "document index": 0.3,
    "manifest of a set": 0.4,
    "configuration of a checkpoint": 0.4,
    "configuration of a run": 0.4,
    "preset": 0.3,
    "events": 0.5,
}
"""Of the seeds, for readers that train, compute or check whole sets."""


@pytest.mark.parametrize("name", KINDS)
def test_damage_gives_a_result_or_a_sentence(name: str, place: Path) -> None:
    check(name, targets(place)[name], range(int(SEEDS * SHARE.get(name, 1))))


@pytest.mark.slow
@pytest.mark.timeout(0)
@pytest.mark.parametrize("name", KINDS)
def test_much_damage_gives_a_result_or_a_sentence(name: str, place: Path) -> None:
    check(name, targets(place)[name], range(SEEDS, SEEDS + int(10 * SEEDS * SHARE.get(name, 1))))
