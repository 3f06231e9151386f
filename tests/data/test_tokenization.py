"""Laws of the shard set: its stream is the plain encoding of every document, and only the plan decides its bytes."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import corpora
import numpy as np
import pytest
import tokenizer_zoo as zoo
from tiny_sets import npy_bytes, write_manifest

from lmcore import storage
from lmcore.data import readers, tokenization
from lmcore.data.manifest import JOURNAL, MANIFEST, read_manifest
from lmcore.data.merge import merge
from lmcore.data.plan import TokenizeConfig, order_units, part_range, read_plan
from lmcore.data.readers import Place
from lmcore.data.repair import retokenize
from lmcore.data.sources import Unit
from lmcore.data.tokenization import HashSet, tokenize
from lmcore.data.tokenizer import Tokenizer
from lmcore.data.validate import validate
from lmcore.errors import Exit, LmError

TEXTS = corpora.texts(400)
SEQ_LEN, SHARD_TOKENS = 2048, 4 * 2048


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """400 documents in two parquet files and one JSONL file, about 15 small shards."""
    root = tmp_path_factory.mktemp("corpus")
    corpora.write_parquet(root / "a.parquet", TEXTS[:150])
    corpora.write_parquet(root / "b.parquet", TEXTS[150:250])
    corpora.write_jsonl(root / "c.jsonl", TEXTS[250:])
    return root


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return corpora.tokenizer(tmp_path_factory.mktemp("tokenizer"))


def config(corpus: Path, small: Path, **changes: Any) -> TokenizeConfig:
    options = {"paths": (str(corpus),), "tokenizer": str(small), "seq_len": SEQ_LEN, "shard_tokens": SHARD_TOKENS}
    return TokenizeConfig(**{**options, **changes})


def test_stream_is_the_plain_encoding_of_every_document(corpus: Path, small: Path, tmp_path: Path) -> None:
    report = tokenize(config(corpus, small), tmp_path / "set")
    manifest = read_manifest(tmp_path / "set")
    expected = corpora.reference_ids(TEXTS, Tokenizer.from_file(small))
    assert corpora.stream_of(tmp_path / "set").tolist() == expected
    assert manifest.n_tokens == report.n_tokens == len(expected)
    assert manifest.n_docs == len(TEXTS)
    assert manifest.n_bytes == sum(len(text.encode()) for text in TEXTS)
    assert len(manifest.shards) > 10
    assert report.backend == "gigatoken"


def test_index_names_every_document_once_with_its_origin(corpus: Path, small: Path, tmp_path: Path) -> None:
    tokenize(config(corpus, small), tmp_path / "set")
    places = [(0, k) for k in range(150)] + [(1, k) for k in range(100)] + [(2, k) for k in range(150)]
    found = corpora.documents_of(tmp_path / "set")
    assert [(unit, row) for unit, row, _, _ in found] == places
    assert [digest for _, _, digest, _ in found] == [corpora.reference_hash(text) for text in TEXTS]
    assert [size for *_, size in found] == [len(text.encode()) for text in TEXTS]
    plan = read_plan(tmp_path / "set")
    unit, row, *_ = found[222]
    assert readers.read_document(plan.units, "text", unit, row) == TEXTS[222].encode()


def test_index_starts_match_the_tokens(corpus: Path, small: Path, tmp_path: Path) -> None:
    tokenize(config(corpus, small), tmp_path / "set")
    manifest = read_manifest(tmp_path / "set")
    assert manifest.tokenizer is not None
    continued = 0
    for shard in manifest.shards:
        tokens = np.load(tmp_path / "set" / f"{shard.name}.npy").reshape(-1)
        index = np.load(tmp_path / "set" / f"{shard.name}.docs.npy")
        ends = np.flatnonzero(tokens[: shard.n_tokens] == manifest.tokenizer.eos_id) + 1
        begins = [0, *ends.tolist()]
        assert index["start"].tolist() == [b for b in begins if b < shard.n_tokens]
        assert (tokens[shard.n_tokens :] == manifest.tokenizer.eos_id).all()
        assert shard.max_id == tokens.max()
        assert shard.docs_records == len(index)
        assert shard.n_docs == len(index) - bool(shard.first_doc_offset)
        if shard.first_doc_offset:
            assert (index["start"][0], index["bytes"][0]) == (0, 0)
            continued += 1
    assert continued > 3


@pytest.mark.parametrize("workers", [2, 5])
def test_bytes_do_not_depend_on_workers_blocks_or_encoder(
    corpus: Path, small: Path, tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenize(config(corpus, small), tmp_path / "one", workers=1)
    monkeypatch.setattr(readers, "BATCH_BYTES", 3_000)
    backend: Any = "tokenizers" if workers == 5 else "gigatoken"
    tokenize(config(corpus, small), tmp_path / "many", workers=workers, backend=backend)
    assert corpora.tree(tmp_path / "one") == corpora.tree(tmp_path / "many")


def test_trained_tokenizer_is_made_once_and_kept(corpus: Path, tmp_path: Path) -> None:
    first = tokenize(config(corpus, Path("unused"), tokenizer="train:300"), tmp_path / "one")
    again = tokenize(config(corpus, Path("unused"), tokenizer="train:300"), tmp_path / "two", workers=3)
    assert first.vocab_size == 300
    assert corpora.tree(tmp_path / "one") == corpora.tree(tmp_path / "two")
    assert Tokenizer.from_file(tmp_path / "one").sha256 == read_plan(tmp_path / "one").tokenizer_sha256
    assert again.dataset_id == first.dataset_id


@pytest.mark.parametrize("filters", [{}, {"dedup": True, "min_chars": 12, "max_chars": 5000}], ids=["all", "filtered"])
def test_any_interruption_ends_with_the_same_bytes(
    corpus: Path, small: Path, tmp_path: Path, filters: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Die at every durable write in turn, continue, and compare with the undisturbed set."""
    doubled = tmp_path / "doubled.jsonl"
    corpora.write_jsonl(doubled, [*TEXTS[:60], "", "x", *TEXTS[20:120], TEXTS[3]])
    wanted = config(doubled, small, **filters)
    monkeypatch.setattr(readers, "BLOCK_BYTES", 20_000)
    tokenize(wanted, tmp_path / "whole")
    expected = corpora.tree(tmp_path / "whole")

    class Death(BaseException):
        pass

    writes = 0
    while True:
        out = tmp_path / f"killed-{writes}"
        left = [writes]
        with monkeypatch.context() as patch:
            for name in ("write_file", "append_json_line"):
                patch.setattr(storage, name, _dying(getattr(storage, name), left, Death))
            try:
                tokenize(wanted, out)
                break
            except Death:
                pass
        assert not (out / MANIFEST).exists()
        tokenize(wanted, out, workers=1 + writes % 3)
        assert corpora.tree(out) == expected, f"died at write {writes}"
        writes += 1
    assert writes >= 10


def _dying(write: Callable[..., Any], left: list[int], death: type[BaseException]) -> Callable[..., Any]:
    def call(*arguments: Any, **keywords: Any) -> Any:
        left[0] -= 1
        if left[0] == -1:
            raise death
        result = write(*arguments, **keywords)
        return result

    return call


def test_torn_journal_and_orphans_are_swept(corpus: Path, small: Path, tmp_path: Path) -> None:
    out = tmp_path / "set"
    tokenize(config(corpus, small), out)
    expected = corpora.tree(out)
    (out / MANIFEST).unlink()
    journal = (out / "journal.jsonl").read_bytes().splitlines(keepends=True)
    (out / "journal.jsonl").write_bytes(b"".join(journal[:4]) + journal[4][:50])
    (out / "shard-00099.npy").write_bytes(b"orphan")
    report = tokenize(config(corpus, small), out)
    assert report.resumed_shards == 4
    assert corpora.tree(out) == expected


def test_a_continued_run_makes_the_journal_durable_before_the_manifest(
    corpus: Path, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between the last journal line and its sync, a run leaves a journal that is only visible, in a directory
    whose entries are only visible: the run that continues has nothing to append, and must sync both all the same."""
    out = tmp_path / "set"
    tokenize(config(corpus, small), out)
    expected = corpora.tree(out)
    (out / MANIFEST).unlink()
    journal, folder = (out / JOURNAL).stat().st_ino, out.stat().st_ino
    synced: list[int] = []
    sync = storage._fsync

    def record(descriptor: int) -> None:
        if not (out / MANIFEST).exists():
            synced.append(os.fstat(descriptor).st_ino)
        sync(descriptor)

    monkeypatch.setattr(storage, "_fsync", record)
    tokenize(config(corpus, small), out)
    assert corpora.tree(out) == expected
    assert journal in synced
    assert folder in synced[synced.index(journal) :]


def test_committed_shard_that_vanished_is_said(corpus: Path, small: Path, tmp_path: Path) -> None:
    out = tmp_path / "set"
    tokenize(config(corpus, small), out)
    (out / MANIFEST).unlink()
    raw = (out / "shard-00002.npy").read_bytes()
    (out / "shard-00002.npy").write_bytes(raw[:-1])
    with pytest.raises(LmError, match=r"shard-00002\.npy: this committed shard has"):
        tokenize(config(corpus, small), out)
    (out / "shard-00002.npy").unlink()
    with pytest.raises(LmError, match="is missing"):
        tokenize(config(corpus, small), out)


def test_finished_set_is_not_touched(corpus: Path, small: Path, tmp_path: Path) -> None:
    out = tmp_path / "set"
    tokenize(config(corpus, small), out)
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    report = tokenize(config(corpus, small), out)
    assert report.already_finished
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before


def test_other_options_are_refused_with_the_difference(corpus: Path, small: Path, tmp_path: Path) -> None:
    out = tmp_path / "set"
    tokenize(config(corpus, small), out)
    for unfinished in (False, True):
        if unfinished:
            (out / MANIFEST).unlink()
        with pytest.raises(LmError, match=r"--seq-len: 2048 in the set, 4096 now") as caught:
            tokenize(config(corpus, small, seq_len=4096), out)
        assert caught.value.code == Exit.USAGE
        with pytest.raises(LmError, match=r"--dedup: False in the set, True now"):
            tokenize(config(corpus, small, dedup=True), out)


def test_changed_files_are_refused_with_the_difference(small: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "texts", tmp_path / "set"
    source.mkdir()
    (source / "a.txt").write_text("one")
    (source / "b.txt").write_text("two")
    tokenize(config(source, small), out)
    (source / "c.txt").write_text("three")
    (source / "b.txt").write_text("TWO")
    with pytest.raises(LmError, match=r"\+.*c\.txt, ~.*b\.txt") as caught:
        tokenize(config(source, small), out)
    assert caught.value.code == Exit.DATA


def test_foreign_directory_is_left_alone(corpus: Path, small: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(LmError, match="not empty") as caught:
        tokenize(config(corpus, small), tmp_path)
    assert caught.value.code == Exit.CANNOT_CREATE
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_nothing_to_tokenize_is_an_error_and_leaves_no_plan(small: Path, tmp_path: Path) -> None:
    source = tmp_path / "a.jsonl"
    source.write_text('{"text": ""}\n\n')
    for _ in range(2):
        with pytest.raises(LmError, match="1 empty") as caught:
            tokenize(config(source, small), tmp_path / "set")
        assert caught.value.code == Exit.DATA
    source.write_text('{"text": "now there is"}\n')
    assert tokenize(config(source, small), tmp_path / "set").n_docs == 1


def test_a_set_that_ends_exactly_with_a_shard(small: Path, tmp_path: Path) -> None:
    source = tmp_path / "a.txt"
    source.write_bytes(b"x" * (2 * SEQ_LEN - 1))
    report = tokenize(config(source, small, tokenizer="byte", shard_tokens=SEQ_LEN), tmp_path / "set")
    assert (report.n_tokens, report.n_shards) == (2 * SEQ_LEN, 2)
    assert corpora.stream_of(tmp_path / "set").tolist() == [120] * (2 * SEQ_LEN - 1) + [256]


def test_one_document_over_many_shards(small: Path, tmp_path: Path) -> None:
    source = tmp_path / "a.txt"
    source.write_bytes(b"abc" * 5000)
    tokenize(config(source, small, tokenizer="byte", shard_tokens=SEQ_LEN), tmp_path / "set")
    manifest = read_manifest(tmp_path / "set")
    assert [shard.first_doc_offset for shard in manifest.shards] == [k * SEQ_LEN for k in range(len(manifest.shards))]
    assert [shard.n_docs for shard in manifest.shards] == [1] + [0] * (len(manifest.shards) - 1)
    assert len(corpora.documents_of(tmp_path / "set")) == 1
    assert bytes(corpora.stream_of(tmp_path / "set")[:-1].tolist()) == b"abc" * 5000


def test_large_vocabularies_take_four_bytes(tmp_path: Path) -> None:
    definition = json.loads(json.dumps(Tokenizer.byte().definition))
    vocabulary = definition["model"]["vocab"]
    eos = next(iter(definition["added_tokens"]))
    vocabulary.pop(eos["content"])
    vocabulary.update({f"x{number}": number for number in range(256, 70_000)})  # never merged, so never used
    vocabulary[eos["content"]] = eos["id"] = 70_000
    wide = tmp_path / "wide" / "tokenizer.json"
    wide.parent.mkdir()
    wide.write_text(json.dumps(definition))
    (tmp_path / "a.txt").write_text("hello")
    tokenize(config(tmp_path / "a.txt", wide), tmp_path / "set")
    assert read_manifest(tmp_path / "set").dtype == "uint32"
    assert np.load(tmp_path / "set" / "shard-00000.npy").dtype == np.dtype("<u4")
    assert corpora.stream_of(tmp_path / "set").tolist() == [*b"hello", 70_000]


# ---------------------------------------------------------------------------------------- selection


def test_duplicates_and_lengths_are_dropped_and_counted(small: Path, tmp_path: Path) -> None:
    values = ["aaaa", "bbbb", "aaaa", "", "cc", "b" * 50, "bbbb", "dddd", "aaaa"]
    source = corpora.write_jsonl(tmp_path / "a.jsonl", values)
    report = tokenize(config(source, small, dedup=True, min_chars=3, max_chars=20), tmp_path / "set")
    assert report.dropped == {"duplicate": 3, "empty": 1, "long": 1, "short": 1}
    assert [row for _, row, _, _ in corpora.documents_of(tmp_path / "set")] == [0, 1, 7]
    assert read_manifest(tmp_path / "set").filters["dropped"] == report.dropped


@pytest.mark.parametrize("limit", [1, 7, 173, 10_000])
def test_max_documents(corpus: Path, small: Path, tmp_path: Path, limit: int) -> None:
    report = tokenize(config(corpus, small, max_documents=limit), tmp_path / "set")
    assert report.n_docs == min(limit, len(TEXTS))
    expected = corpora.reference_ids(TEXTS[:limit], Tokenizer.from_file(small))
    assert corpora.stream_of(tmp_path / "set").tolist() == expected


@pytest.mark.parametrize("limit", [1, 20_000, 20_001, 10**9])
def test_max_tokens_keeps_the_document_that_reaches_it(corpus: Path, small: Path, tmp_path: Path, limit: int) -> None:
    tokenize(config(corpus, small, max_tokens=limit), tmp_path / "set")
    tokenizer = Tokenizer.from_file(small)
    kept: list[str] = []
    total = 0
    for text in TEXTS:
        if total >= limit:
            break
        kept.append(text)
        total += len(corpora.reference_ids([text], tokenizer))
    assert corpora.stream_of(tmp_path / "set").tolist() == corpora.reference_ids(kept, tokenizer)


@pytest.mark.parametrize("changes", [{"max_documents": 173}, {"max_tokens": 30_000, "dedup": True}], ids=str)
def test_limits_hold_through_interruptions(corpus: Path, small: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    wanted = config(corpus, small, **changes)
    tokenize(wanted, tmp_path / "whole")
    out = tmp_path / "cut"
    tokenize(wanted, out)
    journal = (out / "journal.jsonl").read_bytes().splitlines(keepends=True)
    for keep in range(len(journal)):
        (out / MANIFEST).unlink()
        (out / "journal.jsonl").write_bytes(b"".join(journal[:keep]))
        tokenize(wanted, out)
        assert corpora.tree(out) == corpora.tree(tmp_path / "whole"), keep


def test_shuffled_units_are_a_permutation_by_seed() -> None:
    units = [Unit(f"/{k}", "text", 1) for k in range(100)]
    assert order_units(units, None) == tuple(units)
    one, two = order_units(units, 1), order_units(units, 2)
    assert one == order_units(units, 1)
    assert one != two
    assert sorted(one, key=lambda unit: unit.path) == sorted(units, key=lambda unit: unit.path)


def test_shuffled_set_has_the_same_documents(corpus: Path, small: Path, tmp_path: Path) -> None:
    tokenize(config(corpus, small), tmp_path / "plain")
    tokenize(config(corpus, small, shuffle_units=3), tmp_path / "shuffled")
    hashes = [[record[2] for record in corpora.documents_of(tmp_path / name)] for name in ("plain", "shuffled")]
    assert hashes[0] != hashes[1]
    assert sorted(hashes[0]) == sorted(hashes[1])


@pytest.mark.parametrize("parts", [1, 2, 3, 7, 20])
def test_parts_cover_the_plan_in_order(parts: int) -> None:
    chooser = random.Random(parts)
    units = [Unit(f"/{k}", "text", chooser.choice([0, 1, 10, 1000, -1])) for k in range(20)]
    ranges = [part_range(units, part, parts) for part in range(1, parts + 1)]
    assert ranges[0][0] == Place(0)
    assert ranges[-1][1] == Place(20)
    assert all(a[1] == b[0] for a, b in itertools.pairwise(ranges))
    assert all(start.unit < stop.unit for start, stop in ranges)
    with pytest.raises(LmError, match="at most 20 parts"):
        part_range(units, 1, 21)


def test_parts_one_after_the_other_are_the_whole_stream(corpus: Path, small: Path, tmp_path: Path) -> None:
    tokenize(config(corpus, small), tmp_path / "whole")
    streams = []
    for part in (1, 2, 3):
        tokenize(config(corpus, small, part=part, parts=3), tmp_path / f"part-{part}")
        streams.append(corpora.stream_of(tmp_path / f"part-{part}"))
    assert np.array_equal(np.concatenate(streams), corpora.stream_of(tmp_path / "whole"))


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "both"])
@pytest.mark.parametrize("parts", [2, 5])
def test_large_files_are_cut_into_parts(
    kind: str, parts: int, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More parts than files: the documents and their rows are those of the whole, through an interruption, too."""
    monkeypatch.setattr(readers, "BLOCK_BYTES", 20_000)
    if kind != "jsonl":
        corpora.write_parquet(tmp_path / "in" / "a.parquet", TEXTS[:130], group=23)
    if kind != "parquet":
        lines = [json.dumps({"text": text}) for text in TEXTS]
        lines[5], lines[40], lines[41] = lines[5] + "\r", "", "  "  # blank lines count as rows
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / "b.jsonl").write_bytes("\n".join(lines).encode())
    wanted = config(tmp_path / "in", small)
    tokenize(wanted, tmp_path / "whole")
    for part in range(1, parts + 1):
        tokenize(config(tmp_path / "in", small, part=part, parts=parts), tmp_path / f"part-{part}")
    merged = merge([tmp_path / f"part-{part}" for part in range(1, parts + 1)], tmp_path / "merged")
    assert np.array_equal(corpora.stream_of(tmp_path / "merged"), corpora.stream_of(tmp_path / "whole"))
    assert corpora.documents_of(tmp_path / "merged") == corpora.documents_of(tmp_path / "whole")
    assert merged.source == read_manifest(tmp_path / "whole").source | {"parts": parts}
    assert validate(tmp_path / "merged").ok

    again = tmp_path / "again"
    with monkeypatch.context() as patch:
        patch.setattr(storage, "append_json_line", _dying(storage.append_json_line, [1], KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            tokenize(config(tmp_path / "in", small, part=2, parts=parts, shard_tokens=2048), again)
    tokenize(config(tmp_path / "in", small, part=2, parts=parts, shard_tokens=2048), again)
    assert np.array_equal(corpora.stream_of(again), corpora.stream_of(tmp_path / "part-2"))
    assert corpora.documents_of(again) == corpora.documents_of(tmp_path / "part-2")
    retokenize(again, [0, len(read_manifest(again).shards) - 1])


def test_what_cannot_be_cut_is_said(small: Path, tmp_path: Path) -> None:
    corpora.write_jsonl(tmp_path / "a.jsonl", TEXTS[:10])
    with pytest.raises(LmError, match=r"at most 1 parts: at files, at row groups of parquet, and every 8 MiB of JSONL"):
        tokenize(config(tmp_path / "a.jsonl", small, part=1, parts=2), tmp_path / "x")
    assert not (tmp_path / "x" / "plan.json").exists()
    with pytest.raises(LmError, match="a part knows nothing of the documents of the others"):
        config(tmp_path / "a.jsonl", small, part=1, parts=2, dedup=True)


def test_hash_set_equals_a_python_set() -> None:
    chooser = np.random.default_rng(0)
    ours, theirs = HashSet(), set()
    for _ in range(50):
        batch = chooser.integers(0, 3000, chooser.integers(0, 200)).astype(np.uint64)
        new = ours.add(batch)
        for value, said in zip(batch.tolist(), new.tolist(), strict=True):
            assert said == (value not in theirs)
            theirs.add(value)


# ---------------------------------------------------------------------------------------- standard input


@pytest.mark.parametrize("kind", ["jsonl", "text"])
def test_standard_input_is_copied_and_continued(small: Path, tmp_path: Path, kind: str) -> None:
    import io

    values = TEXTS[:50]
    raw = "".join(json.dumps({"text": v}) + "\n" for v in values) if kind == "jsonl" else "\n".join(values)
    wanted = config(Path("-"), small, paths=("-",))
    out = tmp_path / "set"
    tokenize(wanted, out, stdin=io.BytesIO(raw.encode()).read)
    expected = corpora.reference_ids(values if kind == "jsonl" else [raw], Tokenizer.from_file(small))
    assert corpora.stream_of(out).tolist() == expected
    before = corpora.tree(out)
    (out / MANIFEST).unlink()
    journal = (out / "journal.jsonl").read_bytes().splitlines(keepends=True)
    (out / "journal.jsonl").write_bytes(journal[0])
    tokenize(wanted, out, stdin=io.BytesIO(b"not read any more").read)
    assert corpora.tree(out) == before


# ---------------------------------------------------------------------------------------- real kills and full disks


SLOW_RUN = """
import sys, time
sys.path.insert(0, {root!r})
from lmcore.data import readers, tokenization
from lmcore.data.tokenization import tokenize
from lmcore.data.plan import TokenizeConfig
add = tokenization.SetWriter.add
def slow(*a, **k):
    time.sleep(0.012)
    return add(*a, **k)
tokenization.SetWriter.add = slow
readers.BATCH_BYTES = 2000
tokenize(TokenizeConfig.model_validate_json(sys.argv[1]), sys.argv[2], workers=int(sys.argv[3]))
"""
ROOT = str(Path(__file__).parents[2])


def start(wanted: TokenizeConfig, out: Path, workers: int = 2, **options: Any) -> subprocess.Popen[bytes]:
    code = SLOW_RUN.format(root=ROOT)
    return subprocess.Popen(
        [sys.executable, "-c", code, wanted.model_dump_json(), str(out), str(workers)],
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": ROOT},
        **options,
    )


@pytest.mark.slow
def test_sigkill_of_the_process_group_at_random_moments(corpus: Path, small: Path, tmp_path: Path) -> None:
    chooser = random.Random(5)
    wanted = config(corpus, small, dedup=True)
    tokenize(wanted, tmp_path / "whole")
    expected = corpora.tree(tmp_path / "whole")
    kills = 0
    for round_ in range(2):
        out = tmp_path / f"killed-{round_}"
        for attempt in range(8):
            process = start(wanted, out, workers=1 + attempt % 3)
            try:
                process.wait(0.5 + 1.5 * chooser.random())
                break
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                kills += 1
        tokenize(wanted, out)
        assert corpora.tree(out) == expected
    assert kills >= 3


def test_one_sigkill_and_a_second_writer(corpus: Path, small: Path, tmp_path: Path) -> None:
    wanted, out = config(corpus, small), tmp_path / "set"
    process = start(wanted, out)
    deadline = time.monotonic() + 60
    while not (out / "journal.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    with pytest.raises(LmError, match="in use by lm tokenize") as caught:
        tokenize(wanted, out)
    assert caught.value.code == Exit.RETRY
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (out / MANIFEST).exists()
    report = tokenize(wanted, out)
    assert report.resumed_shards >= 1
    tokenize(wanted, tmp_path / "whole")
    assert corpora.tree(out) == corpora.tree(tmp_path / "whole")


def test_full_disk_keeps_what_is_committed(corpus: Path, small: Path, tmp_path: Path) -> None:
    import resource

    wanted, out = config(corpus, small), tmp_path / "set"
    limit = SHARD_TOKENS * 2 - 1000  # bytes of a file: the plan fits, a shard does not

    def full() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    code = (
        "import sys; from lmcore.data.tokenization import tokenize; from lmcore.data.plan import TokenizeConfig\n"
        "from lmcore.errors import LmError\n"
        "try: tokenize(TokenizeConfig.model_validate_json(sys.argv[1]), sys.argv[2])\n"
        "except LmError as error: print(error.message); sys.exit(int(error.code))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, wanted.model_dump_json(), str(out)],
        preexec_fn=full,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": ROOT},
        check=False,
    )
    assert done.returncode == Exit.IO, done.stderr
    assert "allowed file size" in done.stdout
    assert not [path for path in out.iterdir() if path.name.startswith(".tmp-")]
    tokenize(wanted, out)
    tokenize(wanted, tmp_path / "whole")
    assert corpora.tree(out) == corpora.tree(tmp_path / "whole")


def test_failed_commit_ends_the_run(corpus: Path, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = storage.write_file

    def fails(path: Any, *arguments: Any, **keywords: Any) -> Any:
        if Path(path).name == "shard-00003.npy":
            raise LmError("disk full", code=Exit.IO)
        return real(path, *arguments, **keywords)

    monkeypatch.setattr(storage, "write_file", fails)
    with pytest.raises(LmError, match="disk full"):
        tokenize(config(corpus, small), tmp_path / "set")
    monkeypatch.setattr(storage, "write_file", real)
    assert tokenize(config(corpus, small), tmp_path / "set").resumed_shards == 3


def test_interrupt_finishes_the_shard_under_way(
    corpus: Path, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = tokenization.SetWriter.add
    calls = []

    def add(*arguments: Any, **keywords: Any) -> None:
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        real(*arguments, **keywords)

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(tokenization.SetWriter, "add", add)
    monkeypatch.setattr(readers, "BATCH_BYTES", 2_000)
    with pytest.raises(tokenization.Interrupted) as caught:
        tokenize(config(corpus, small), tmp_path / "set")
    assert caught.value.number == signal.SIGINT
    assert caught.value.shards >= 1
    assert signal.getsignal(signal.SIGINT) is before
    monkeypatch.undo()
    assert tokenize(config(corpus, small), tmp_path / "set").resumed_shards == caught.value.shards


PEAK = """
import sys
from lmcore.heap import keep_freed_memory, peak_resident_bytes
keep_freed_memory()
from lmcore.data.tokenization import TokenizeConfig, tokenize
report = tokenize(TokenizeConfig(paths=(sys.argv[1],), tokenizer=sys.argv[2]), sys.argv[3])
print(report.n_docs, report.n_bytes, peak_resident_bytes() >> 20)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_a_document_of_200_megabytes_fits_into_two_gibibytes(tmp_path: Path, small: Path, suffix: str) -> None:
    words = [word for text in TEXTS for word in text.split()]
    random.Random(0).shuffle(words)
    page = " ".join(words)
    huge = page * (200_000_000 // len(page.encode()) + 1)
    write = corpora.write_parquet if suffix == "parquet" else corpora.write_jsonl
    write(tmp_path / f"a.{suffix}", ["before", huge, "after"])
    command = [sys.executable, "-c", PEAK, str(tmp_path / f"a.{suffix}"), str(small), str(tmp_path / "set")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    documents, size, peak_mib = map(int, done.stdout.split())
    assert documents == 3
    assert size == len(huge.encode()) + len("before" + "after")
    assert peak_mib < 2048


@pytest.mark.parametrize("name", zoo.ALL)
def test_a_set_of_any_tokenizer_holds_one_eos_per_document_and_validates(name: str, tmp_path: Path) -> None:
    """Documents full of the texts of control tokens, of every class of tokenizer: the ids are the library's without
    control tokens, and nothing is called a fault that is none."""
    tokenizer = zoo.tokenizer(name)
    (tmp_path / "tokenizer").mkdir()
    tokenizer.save(tmp_path / "tokenizer" / "tokenizer.json")
    texts = [text for text in zoo.HARD if text] * 2 + TEXTS[:30]
    corpora.write_jsonl(tmp_path / "texts.jsonl", texts)
    report = tokenize(config(tmp_path / "texts.jsonl", tmp_path / "tokenizer"), tmp_path / "set")
    stream = corpora.stream_of(tmp_path / "set").tolist()
    assert stream.count(tokenizer.eos_id) == report.n_docs == len(texts)
    assert stream == [number for text in texts for number in [*tokenizer.encode(text), tokenizer.eos_id]]
    assert report.n_bytes == sum(len(text.encode()) for text in texts)
    found = validate(tmp_path / "set", level="deep")
    assert found.ok, [str(finding) for finding in found.findings]
    assert found.sets[0].statistics is not None
    proven = found.sets[0].statistics.decoded_documents
    assert proven == len(texts) or not tokenizer.lossless

    # The same set with tokens in another order within each document, and every hash made to fit: no text decodes to it.
    file = tmp_path / "set" / "shard-00000.npy"
    tokens = np.load(file)
    words = np.flatnonzero(tokens.reshape(-1) != tokenizer.eos_id)
    tokens.reshape(-1)[words] = tokens.reshape(-1)[words[::-1]]
    file.write_bytes(npy_bytes(tokens))
    changed = json.loads((tmp_path / "set" / MANIFEST).read_text())
    changed["shards"][0]["sha256"] = hashlib.sha256(npy_bytes(tokens)).hexdigest()
    write_manifest(tmp_path / "set", changed)
    found = validate(tmp_path / "set", level="deep")
    errors = {finding.code for finding in found.findings if finding.severity == "error"}
    assert errors == ({"V024"} if tokenizer.lossless else set())  # a text that comes back changed proves nothing
    assert found.sets[0].statistics is not None
    assert found.sets[0].statistics.decoded_documents < proven or not proven
