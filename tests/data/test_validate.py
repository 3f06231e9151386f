"""Every kind of damage is found and called by its name; sound data passes, and its figures are right."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_sets import TinySet, npy_bytes, random_documents, write_manifest

from lmcore.data import shard as shards
from lmcore.data.findings import CODES, explain
from lmcore.data.manifest import read_manifest
from lmcore.data.split import split_set
from lmcore.data.validate import Report, scan_shard, validate
from lmcore.errors import LmError


def codes(report: Report) -> set[str]:
    return {finding.code for finding in report.findings}


def english(seed: int, count: int = 60, longest: int = 120) -> list[bytes]:
    """Documents of made-up words, so that statistics look like text."""
    generator = np.random.default_rng(seed)
    vocabulary = [bytes(generator.integers(97, 123, n).astype(np.uint8)) for n in generator.integers(2, 9, 300)]
    weights = 1 / np.arange(1, 301)
    weights /= weights.sum()
    return [
        b" ".join(vocabulary[k] for k in generator.choice(300, generator.integers(5, longest), p=weights))
        for _ in range(count)
    ]


@pytest.fixture
def sound(make_set: Callable[..., TinySet]) -> TinySet:
    """A set with views and a document that runs over three shards."""
    texts = english(1, 120)
    texts[40] = b" ".join(english(2, 30))
    tiny = make_set(documents=texts, rows=1)
    split_set(tiny.path, {"val": 0.2})
    return tiny


@pytest.mark.parametrize("level", ["quick", "default", "deep"])
def test_sound_data_passes(sound: TinySet, level: str) -> None:
    report = validate(sound.path, level)  # type: ignore[arg-type]
    assert report.findings == []
    assert report.ok
    assert report.sets[0].n_tokens == len(sound.stream)
    for view in ("train", "val"):
        assert validate(sound.path / view, level).ok  # type: ignore[arg-type]


def test_statistics_are_those_of_the_documents(sound: TinySet) -> None:
    found = validate(sound.path, "deep").sets[0].statistics
    assert found is not None
    lengths = sorted(map(len, sound.ids))
    assert found.length_quantiles["min"] == lengths[0]
    assert found.length_quantiles["max"] == lengths[-1]
    assert abs(found.length_quantiles["median"] - np.median(lengths)) <= 10
    assert found.decoded_documents == len(sound.documents)
    assert found.bytes_per_token == 1.0
    assert found.duplicate_documents == 0
    share = np.bincount(sound.stream) / len(sound.stream)
    entropy = -(share[share > 0] * np.log2(share[share > 0])).sum()
    assert found.entropy_bits == pytest.approx(entropy, abs=1e-2)
    assert found.top_ids[0][0] == int(np.argmax(share))
    assert found.top_ids[0][2] == chr(int(np.argmax(share)))
    position, text = found.windows[1]
    assert text == bytes(t for t in sound.stream[position : position + 48] if t < 256).decode()
    assert set(found.seen_ngrams) == {"val"}


def test_a_view_has_the_statistics_of_its_documents(sound: TinySet) -> None:
    report = validate(sound.path / "val", "deep")
    found, manifest = report.sets[0].statistics, read_manifest(sound.path / "val")
    assert found is not None
    assert found.decoded_documents == manifest.n_docs


def test_a_folder_of_sets(make_set: Callable[..., TinySet], tmp_path: Path) -> None:
    make_set("all/a", documents=english(1)), make_set("all/b", documents=english(2))
    (tmp_path / "all" / "c").mkdir()
    (tmp_path / "all" / "c" / "plan.json").write_text("{}")
    report = validate(tmp_path / "all")
    assert [s.path.name for s in report.sets] == ["a", "b", "c"]
    assert codes(report) == {"V003"}


# ---------------------------------------------------------------------------------------- corruptions


def edit(path: Path, **fields: Any) -> None:
    """Change the manifest and sign it again, as someone with a motive would."""
    write_manifest(path, json.loads((path / "manifest.json").read_text()) | fields)


def edit_shard(path: Path, number: int, **fields: Any) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["shards"][number].update(fields)
    write_manifest(path, manifest)


def flip(file: Path, byte: int, bit: int = 0) -> None:
    raw = bytearray(file.read_bytes())
    raw[byte] ^= 1 << bit
    file.write_bytes(raw)


def rewrite_tokens(path: Path, number: int, change: Callable[[np.ndarray], None], **fields: Any) -> None:
    """Change tokens and make every hash fit: only the meaning is wrong then."""
    file = path / f"shard-{number:05d}.npy"
    tokens = np.load(file)
    change(tokens.reshape(-1))
    raw = npy_bytes(tokens)
    file.write_bytes(raw)
    edit_shard(path, number, sha256=hashlib.sha256(raw).hexdigest(), bytes=len(raw), **fields)


def rewrite_index(path: Path, number: int, change: Callable[[np.ndarray], Any], **fields: Any) -> None:
    file = path / f"shard-{number:05d}.docs.npy"
    index = np.load(file)
    changed = change(index)
    index = index if changed is None else changed
    raw = npy_bytes(index)
    file.write_bytes(raw)
    edit_shard(path, number, docs_sha256=hashlib.sha256(raw).hexdigest(), docs_records=len(index), **fields)


def set_item(array: np.ndarray, index: Any, value: Any) -> None:
    array[index] = value


def swap(p: Path) -> None:
    a, b = p / "shard-00000.npy", p / "shard-00001.npy"
    raw = a.read_bytes()
    a.write_bytes(b.read_bytes())
    b.write_bytes(raw)


def other_tokenizer(p: Path) -> None:
    definition = json.loads((p / "tokenizer.json").read_text())
    definition["model"]["vocab"]["\u0120\u0120"] = 257
    (p / "tokenizer.json").write_text(json.dumps(definition))


def replaced(p: Path, name: str, make: Callable[[Path], object]) -> None:
    (p / name).unlink()
    make(p / name)


def overlap(p: Path) -> None:
    """val takes a piece of train, signed."""
    train = json.loads((p / "train" / "manifest.json").read_text())
    val = json.loads((p / "val" / "manifest.json").read_text())
    shard, start, stop = train["segments"][0]
    name = train["shards"][shard]["name"]
    number = next((k for k, s in enumerate(val["shards"]) if s["name"] == name), len(val["shards"]))
    if number == len(val["shards"]):
        val["shards"].append(train["shards"][shard])
    val["segments"].append([number, start, stop])
    val["n_tokens"] += stop - start
    write_manifest(p / "val", val)


def drop_from_train(p: Path) -> None:
    train = json.loads((p / "train" / "manifest.json").read_text())
    _, start, stop = train["segments"].pop()
    write_manifest(p / "train", train | {"n_tokens": train["n_tokens"] - (stop - start)})


def pad_of(p: Path) -> int:
    return int(json.loads((p / "manifest.json").read_text())["shards"][-1]["n_tokens"])


def last_shard(p: Path) -> int:
    return len(json.loads((p / "manifest.json").read_text())["shards"]) - 1


CORRUPTIONS: dict[str, tuple[Callable[[Path], object], set[str]]] = {
    "manifest is no JSON": (lambda p: (p / "manifest.json").write_text("{"), {"V001"}),
    "manifest misses a field": (lambda p: edit(p, dtype=None), {"V001"}),
    "manifest of the future": (lambda p: edit(p, format="lmshards/2"), {"V002"}),
    "unfinished": (lambda p: ((p / "plan.json").write_text("{}"), (p / "manifest.json").unlink()), {"V003"}),
    "manifest edited": (
        lambda p: (p / "manifest.json").write_text(
            (p / "manifest.json").read_text().replace('"eos_id": 256', '"eos_id": 255')
        ),
        {"V004"},
    ),
    "shard missing": (lambda p: (p / "shard-00001.npy").unlink(), {"V010"}),
    "extra file": (lambda p: (p / "shard-00099.npy").write_bytes(b""), {"V011"}),
    "cut by one byte": (lambda p: os.truncate(p / "shard-00001.npy", 4096 + 127), {"V012"}),
    "one byte too many": (
        lambda p: (p / "shard-00001.npy").write_bytes((p / "shard-00001.npy").read_bytes() + b"x"),
        {"V012"},
    ),
    "empty shard": (lambda p: os.truncate(p / "shard-00001.npy", 0), {"V012"}),
    "rows do not fit the size": (lambda p: edit_shard(p, 0, rows=2), {"V012"}),
    "foreign header": (lambda p: flip(p / "shard-00001.npy", 30), {"V013"}),
    "flipped token": (lambda p: flip(p / "shard-00001.npy", 1000), {"V014"}),
    "swapped shards": (swap, {"V015"}),
    "a directory for a shard": (lambda p: replaced(p, "shard-00001.npy", Path.mkdir), {"V016"}),
    "a pipe for a shard": (lambda p: replaced(p, "shard-00001.npy", os.mkfifo), {"V016"}),
    "a link loop": (lambda p: replaced(p, "shard-00001.npy", lambda f: f.symlink_to(f.name)), {"V016"}),
    "left-overs": (lambda p: (p / ".tmp-1-x.npy").write_bytes(b"x"), {"V017"}),
    "id outside the vocabulary": (
        lambda p: rewrite_tokens(p, 1, lambda t: set_item(t, 700, 999), max_id=999),
        {"V020"},
    ),
    "id outside, max_id lies": (lambda p: rewrite_tokens(p, 1, lambda t: set_item(t, 700, 999)), {"V020", "V021"}),
    "max_id lies": (lambda p: edit_shard(p, 1, max_id=200), {"V021"}),
    "pad is not EOS": (
        lambda p: rewrite_tokens(p, last_shard(p), lambda t: set_item(t, pad_of(p) + 3, 65)),
        {"V022"},
    ),
    "forged document end": (lambda p: rewrite_tokens(p, 1, lambda t: set_item(t, t != 256, 256)), {"V023"}),
    "document end removed": (
        lambda p: rewrite_tokens(p, 0, lambda t: set_item(t, np.flatnonzero(t == 256)[0], 65)),
        {"V023"},
    ),
    "tokens of another text": (lambda p: rewrite_tokens(p, 0, lambda t: set_item(t, t == 97, 98)), {"V024"}),
    "index missing": (lambda p: (p / "shard-00001.docs.npy").unlink(), {"V030"}),
    "index damaged": (lambda p: flip(p / "shard-00001.docs.npy", -1), {"V031"}),
    "index cut": (lambda p: os.truncate(p / "shard-00001.docs.npy", 100), {"V031"}),
    "index not ascending": (lambda p: rewrite_index(p, 0, lambda d: d[::-1].copy()), {"V033"}),
    "index starts late": (lambda p: rewrite_index(p, 0, lambda d: set_item(d["start"], 0, 1)), {"V033"}),
    "index behind the end": (lambda p: rewrite_index(p, 0, lambda d: set_item(d["start"], -1, 5000)), {"V033"}),
    "index with a record less": (lambda p: rewrite_index(p, 0, lambda d: d[:-1].copy()), {"V023", "V033", "V051"}),
    "wrong number of documents": (lambda p: edit_shard(p, 0, n_docs=1), {"V033"}),
    "tokenizer missing": (lambda p: (p / "tokenizer.json").unlink(), {"V040"}),
    "another tokenizer": (other_tokenizer, {"V041"}),
    "vocabulary size lies": (
        lambda p: edit(p, tokenizer=json.loads((p / "manifest.json").read_text())["tokenizer"] | {"vocab_size": 300}),
        {"V042"},
    ),
    "segments out of order": (
        lambda p: edit(p, segments=json.loads((p / "manifest.json").read_text())["segments"][::-1]),
        {"V050"},
    ),
    "total of bytes lies": (lambda p: edit(p, n_bytes=1), {"V051"}),
    "views overlap": (overlap, {"V060", "V062", "V052"}),
    "tokens in no view": (drop_from_train, {"V061"}),
    "view of other data": (
        lambda p: edit(
            p / "val", split=json.loads((p / "val" / "manifest.json").read_text())["split"] | {"parent": "0" * 64}
        ),
        {"V063"},
    ),
    "view leads elsewhere": (
        lambda p: (
            replaced(p, "val/shard-00000.npy", lambda f: f.write_bytes((p / "shard-00001.npy").read_bytes()))
            if (p / "val" / "shard-00000.npy").exists()
            else pytest.skip("val does not use it")
        ),
        {"V014"},
    ),
    "journal disagrees": (
        lambda p: (p / "journal.jsonl").write_text('{"shard": {"name": "shard-00000", "sha256": "00"}}\n'),
        {"V070"},
    ),
}


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_every_corruption_is_called_by_its_name(sound: TinySet, name: str) -> None:
    damage, expected = CORRUPTIONS[name]
    damage(sound.path)
    shards._VERIFIED.clear()
    report = validate(sound.path)
    found = codes(report)
    assert found & expected, f"{name}: {sorted(found)}"
    if CODES[sorted(expected)[0]].severity == "error":
        assert not report.ok
    # Nothing else is made up: views repeat what is wrong with the set, no more.
    allowed = (
        expected | {"V063", "V060", "V061", "V024", "V014"} | ({"V022", "V023"} if name == "manifest edited" else set())
    )
    assert found <= allowed, f"{name}: {report.findings}"


def test_all_findings_are_listed_at_once(sound: TinySet) -> None:
    flip(sound.path / "shard-00000.npy", 1000)
    os.truncate(sound.path / "shard-00001.npy", 4000)
    flip(sound.path / "shard-00002.docs.npy", -1)
    (sound.path / "shard-00003.npy").unlink()
    report = validate(sound.path)
    assert {"V014", "V012", "V031", "V010"} <= codes(report)
    named = {Path(f.where).name for f in report.findings}
    assert {"shard-00000.npy", "shard-00001.npy", "shard-00002.docs.npy", "shard-00003.npy"} <= named


def test_quick_sees_sizes_and_headers_but_reads_no_token(sound: TinySet) -> None:
    flip(sound.path / "shard-00000.npy", 1000)
    assert validate(sound.path, "quick").ok
    os.truncate(sound.path / "shard-00001.npy", 4000)
    report = validate(sound.path, "quick")
    assert codes(report) == {"V012"}
    assert report.scanned_bytes == 0


def test_every_bit_of_a_shard_counts(make_set: Callable[..., TinySet]) -> None:
    """A sample of all bits of header, index and tokens; the slow test flips each of them."""
    tiny = make_set(documents=english(3, 12, 40), rows=1)
    for file, bits in (("shard-00000.docs.npy", 8), ("shard-00000.npy", 1)):
        raw = (tiny.path / file).read_bytes()
        places = [(byte, bit) for byte in range(len(raw)) for bit in range(8 if byte < 128 else bits)]
        step = max(1, len(places) // 120)
        for byte, bit in places[::step]:
            flip(tiny.path / file, byte, bit)
            report = validate(tiny.path, workers=1)
            assert not report.ok, f"{file}: byte {byte} bit {bit}"
            (tiny.path / file).write_bytes(raw)


@pytest.mark.slow
def test_all_32768_bits_of_a_shard(make_set: Callable[..., TinySet]) -> None:
    """Through the parts that validate is made of: the header is refused, or the pass over the bytes sees it."""
    tiny = make_set(documents=english(3, 12, 40), rows=1)
    entry = read_manifest(tiny.path).shards[0]
    file = tiny.path / "shard-00000.npy"
    raw = file.read_bytes()
    header = shards.npy_header(np.dtype("<u2"), (entry.rows, 2048))
    directory, target = shards.open_directory(tiny.path), os.open(file, os.O_RDWR)
    try:
        opened = shards.ShardFile(directory, file.name, len(raw))
        for byte in range(len(raw)):
            for bit in range(8):
                os.pwrite(target, bytes([raw[byte] ^ (1 << bit)]), byte)
                if byte < len(header):
                    with pytest.raises(LmError, match="header"):
                        opened.require_header(header)
                else:
                    scan = scan_shard(opened, np.dtype("<u2"), entry.n_tokens, 256, None, False, False)
                    assert scan.sha256 != entry.sha256, f"byte {byte} bit {bit}"
            os.pwrite(target, raw[byte : byte + 1], byte)
        assert file.read_bytes() == raw
    finally:
        os.close(directory)
        os.close(target)


@pytest.mark.parametrize("a", range(4))
@pytest.mark.parametrize("b", range(4))
def test_all_pairs_of_swapped_shards_are_named(make_set: Callable[..., TinySet], a: int, b: int) -> None:
    if a >= b:
        return
    tiny = make_set(documents=english(5, 80), rows=1)
    names = [tiny.path / f"shard-{k:05d}.npy" for k in (a, b)]
    x, y = (n.read_bytes() for n in names)
    if len(x) != len(y):
        pytest.skip("the last shard is shorter")
    names[0].write_bytes(y), names[1].write_bytes(x)
    found = {(Path(f.where).name, f.message) for f in validate(tiny.path).findings if f.code == "V015"}
    assert found == {
        (f"shard-{a:05d}.npy", f"has the content of shard-{b:05d}"),
        (f"shard-{b:05d}.npy", f"has the content of shard-{a:05d}"),
    }


# ---------------------------------------------------------------------------------------- smells


def noise(count: int, vocab: int = 256) -> list[bytes]:
    return [bytes(np.random.default_rng(k).integers(0, vocab, 900).astype(np.uint8)) for k in range(count)]


SMELLS: dict[str, tuple[Callable[[], list[bytes]], str]] = {
    "noise": (lambda: noise(40), "V104"),
    "one id": (lambda: [b"a" * 900 for _ in range(40)], "V105"),
    "stretches of one id": (lambda: [b"a" * 1500 + t for t in english(1, 60, 400)], "V103"),
    "a pattern": (lambda: [b"abcdefg" * 200 + t for t in english(1, 60)], "V107"),
    "repeated documents": (lambda: english(1, 30) * 3, "V109"),
    "repeated rows": (lambda: [(b" ".join(english(9, 4, 200)) + b"x" * 600)[:511]] * 60 + english(2), "V102"),
    "many ends": (lambda: [b"ab"] * 3000, "V108"),
}


@pytest.mark.parametrize("name", SMELLS)
def test_smells_are_warnings(make_set: Callable[..., TinySet], name: str) -> None:
    make, code = SMELLS[name]
    report = validate(make_set(documents=make()).path)
    assert code in codes(report)
    assert report.ok


def test_equal_shards_are_a_warning(make_set: Callable[..., TinySet]) -> None:
    text = (b" ".join(english(9, 4, 400)) + b"x" * 2048)[:2047]
    assert "V101" in codes(validate(make_set(documents=[text] * 4, rows=1).path))


def test_near_duplicates_between_views_are_seen_deep(make_set: Callable[..., TinySet]) -> None:
    texts = english(4, 60, 200)
    tiny = make_set(documents=texts + [t + b"." for t in texts])
    split_set(tiny.path, {"val": 0.3})
    assert "V110" not in codes(validate(tiny.path))
    report = validate(tiny.path, "deep")
    assert "V110" in codes(report)
    statistics = report.sets[0].statistics
    assert statistics is not None
    assert statistics.seen_ngrams["val"] > 0.3


# ---------------------------------------------------------------------------------------- fuzz


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@settings(derandomize=True, max_examples=150, deadline=None)
@given(data=st.data())
def test_fuzzed_manifests_never_break_the_reader(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Any value at any place: the manifest is refused in a sentence, or it reads and validates without a crash."""
    global _BASE
    if _BASE is None:
        from tiny_sets import write_set

        _BASE = write_set(tmp_path_factory.mktemp("base") / "set", english(1, 20), rows=1).path
    path = tmp_path_factory.mktemp("fuzz") / "set"
    shutil.copytree(_BASE, path)
    manifest = json.loads((path / "manifest.json").read_text())
    place: Any = manifest
    while True:
        key = data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
        if not isinstance(place[key], dict | list) or not place[key] or data.draw(st.integers(0, 3)) == 0:
            break
        place = place[key]
    place[key] = data.draw(JSON)
    try:
        write_manifest(path, manifest)
    except (KeyError, TypeError, ValueError, AttributeError):
        (path / "manifest.json").write_text(json.dumps(manifest))
    report = validate(path, workers=1)
    try:
        read_manifest(path)
    except LmError:
        assert not report.ok
    shutil.rmtree(path)


_BASE: Path | None = None


@settings(derandomize=True, max_examples=100, deadline=None)
@given(raw=st.binary(max_size=300))
def test_any_bytes_for_a_manifest(tmp_path_factory: pytest.TempPathFactory, raw: bytes) -> None:
    path = tmp_path_factory.mktemp("raw")
    (path / "manifest.json").write_bytes(raw)
    assert not validate(path).ok


# ---------------------------------------------------------------------------------------- codes


def test_codes_are_explained() -> None:
    for code, entry in CODES.items():
        assert entry.severity in ("error", "warning")
        assert explain(code.lower()).startswith(f"{code} ({entry.severity}): {entry.title}")
        assert len(entry.explanation) > 40
    with pytest.raises(LmError, match="not a finding"):
        explain("V999")


def test_codes_are_stable() -> None:
    """Scripts branch on them: a code may be added, never removed or given another meaning."""
    assert set(CODES) >= {f"V{n:03d}" for n in (1, 2, 3, 4, 10, 11, 12, 13, 14, 15, 16, 17, 20, 21, 22, 23, 24, 30, 31)}


def test_a_missing_path_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(LmError, match="no such file"):
        validate(tmp_path / "nothing")


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts descriptors in /proc")
def test_many_shards_need_few_descriptors(make_set: Callable[..., TinySet]) -> None:
    import resource

    tiny = make_set(documents=random_documents(1, 400, 900), rows=1)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 25, before[1]))
    try:
        assert len(tiny.manifest["shards"]) > 60
        assert validate(tiny.path, "quick").ok
        assert validate(tiny.path).ok
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_a_set_of_linked_parts(make_set: Callable[..., TinySet]) -> None:
    """Shards of two sets as links in a third, each part with a pad of its own in the middle of the stream."""
    from lmcore.data.provenance import Locator
    from lmcore.data.stream import TokenStream

    parts = [make_set("a", documents=english(1, 50), rows=1), make_set("b", documents=english(2, 50), rows=1)]
    whole = parts[0].path.parent / "whole"
    whole.mkdir()
    shutil.copy(parts[0].path / "tokenizer.json", whole)
    manifests = [part.manifest for part in parts]
    merged = []
    for number, part in enumerate(parts):
        for shard in manifests[number]["shards"]:
            name = f"p{number:03d}-{shard['name']}"
            for end in (".npy", ".docs.npy"):
                (whole / f"{name}{end}").symlink_to(f"../{part.path.name}/{shard['name']}{end}")
            merged.append(shard | {"name": name})
    totals = {key: sum(m[key] for m in manifests) for key in ("n_tokens", "n_docs", "n_bytes")}
    segments = [[k, 0, shard["n_tokens"]] for k, shard in enumerate(merged)]
    write_manifest(whole, manifests[0] | totals | {"shards": merged, "segments": segments})
    report = validate(whole, "deep")
    assert report.ok, report.findings
    stream = TokenStream.open(whole)
    tokens = np.concatenate([part.stream for part in parts])
    np.testing.assert_array_equal(stream.read(0, len(stream)), tokens)
    assert Locator(stream).by_text(parts[1].documents[7])[0].start == len(parts[0].stream) + sum(
        map(len, parts[1].ids[:7])
    )
    split_set(whole, {"val": 0.3})
    assert validate(whole).ok
    flip(parts[1].path / "shard-00000.npy", 500)
    assert "V014" in codes(validate(whole))
