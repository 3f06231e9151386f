"""What random damage (tests/fuzz/) reaches seldom: manifests wrong by a hair, every bit, hostile YAML."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcore.config import dump_yaml, parse_yaml
from lmcore.data import validate
from lmcore.data.manifest import read_manifest
from lmcore.data.stream import TokenStream
from lmcore.data.tokenization import TokenizeConfig, tokenize
from lmcore.errors import LmError
from lmcore.training import checkpoint
from lmcore.training.config import read_run_config


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A shard set, a checkpoint and a run's files."""
    base = tmp_path_factory.mktemp("fuzz")
    memory = Path("/dev/shm")
    place = memory / f"fuzz-{os.getpid()}-{base.name}" if os.access(memory, os.W_OK) else base / "m"
    place.mkdir()
    texts = [{"text": f"document {i} " * 40} for i in range(30)]
    (place / "a.jsonl").write_text("".join(json.dumps(t) + "\n" for t in texts))
    config = TokenizeConfig(paths=(str(place / "a.jsonl"),), tokenizer="byte", seq_len=2048, shard_tokens=4096)
    tokenize(config, place / "set", workers=1, backend="tokenizers")
    state = {"step": 3, "tokens": 300}
    snapshot = checkpoint.Snapshot(3, {"w": torch.ones(40)}, {"w.m": torch.ones(40)}, state, b"model: {}\n", b"{}")
    checkpoint.save(place / "checkpoints", snapshot)
    from lmcore.presets import __file__ as presets

    preset = sorted(Path(presets).parent.glob("*.yaml"))
    (place / "config.yaml").write_bytes(preset[0].read_bytes() if preset else b"model:\n  d_model: 64\n")
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


# ---------------------------------------------------------------------------------------- what is accepted by a hair

NASTY: dict[str, Callable[[dict[str, Any]], Any]] = {
    "deep source": lambda m: m | {"source": json.loads('{"a":' * 300 + "1" + "}" * 300)},
    "deep list": lambda m: m | {"filters": {"a": json.loads("[" * 900 + "]" * 900)}},
    "list": lambda m: [m],
    "text": lambda m: "manifest",
    "null": lambda m: None,
    "unknown key": lambda m: m | {"surplus": 1},
    "newer format": lambda m: m | {"format": "lmshards/2"},
    "long format": lambda m: m | {"format": "x" * 1_000_000},
    "nested format": lambda m: m | {"format": [[["x"]]]},
    "no shards": lambda m: m | {"shards": []},
    "negative rows": lambda m: m | {"shards": [m["shards"][0] | {"rows": -1}]},
    "boolean rows": lambda m: m | {"shards": [m["shards"][0] | {"rows": True}]},
    "huge seq_len": lambda m: m | {"seq_len": 1 << 60},
    "path": lambda m: m | {"shards": [m["shards"][0] | {"name": "../../etc/passwd"}]},
    "absolute": lambda m: m | {"shards": [m["shards"][0] | {"name": "/etc/passwd"}]},
    "hidden": lambda m: m | {"shards": [m["shards"][0] | {"name": ".hidden"}]},
    "newline": lambda m: m | {"shards": [m["shards"][0] | {"name": "shard-00000\n"}]},
    "wide digits": lambda m: m | {"shards": [m["shards"][0] | {"name": "shard-\uff10\uff10000"}]},
    "NUL": lambda m: m | {"shards": [m["shards"][0] | {"name": "shard\0"}]},
    "twice": lambda m: m | {"shards": [m["shards"][0], m["shards"][0]]},
    "foreign hash": lambda m: m | {"dataset_id": "0" * 64},
    "segment outside": lambda m: m | {"segments": [[0, 0, 1 << 40]]},
    "segment of three texts": lambda m: m | {"segments": [["0", "0", "5"]]},
    "no segments": lambda m: m | {"segments": []},
    "upper-case hash": lambda m: m | {"shards": [m["shards"][0] | {"sha256": m["shards"][0]["sha256"].upper()}]},
}


@pytest.mark.parametrize("name", NASTY)
def test_nasty_manifests_are_refused_in_a_sentence(material: Path, tmp_path: Path, name: str) -> None:
    sound = json.loads((material / "set" / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps(NASTY[name](sound)))
    with pytest.raises(LmError) as raised:
        read_manifest(tmp_path)
    assert raised.value.code == 65
    assert len(raised.value.message) < 2000


# ---------------------------------------------------------------------------------------- bit flips


@pytest.fixture
def copy_of_set(material: Path, tmp_path: Path) -> Path:
    shutil.copytree(material / "set", tmp_path / "set")
    return tmp_path / "set"


def test_every_flipped_bit_of_a_shard_is_found(copy_of_set: Path) -> None:
    """All 32,768 bits of the first 4 KiB, and the first and last bit of every further 64 bytes."""
    from lmcore.data.shard import ShardFile, npy_header, open_directory

    manifest = read_manifest(copy_of_set)
    entry = manifest.shards[-1]
    path = copy_of_set / f"{entry.name}.npy"
    sound = bytearray(path.read_bytes())
    header = npy_header(np.dtype("<u2"), (entry.rows, manifest.seq_len))
    bits = [*range(min(len(sound), 4096) * 8), *range(4096 * 8, len(sound) * 8, 512)]
    directory = open_directory(copy_of_set)
    missed = []
    try:
        with open(path, "r+b", buffering=0) as file:
            for bit in bits:
                byte = bit // 8
                os.pwrite(file.fileno(), bytes([sound[byte] ^ 1 << bit % 8]), byte)
                try:
                    opened = ShardFile(directory, path.name, entry.bytes)
                    opened.require_header(header)
                    if opened.sha256() == entry.sha256:
                        missed.append(bit)
                except LmError:
                    pass
                os.pwrite(file.fileno(), bytes([sound[byte]]), byte)
    finally:
        os.close(directory)
    assert len(bits) >= 32_768
    assert not missed


@pytest.mark.parametrize("suffix", [".npy", ".docs.npy"])
def test_validate_and_training_find_flipped_bits(copy_of_set: Path, suffix: str) -> None:
    entry = read_manifest(copy_of_set).shards[0]
    path = copy_of_set / f"{entry.name}{suffix}"
    sound = path.read_bytes()
    for byte in [0, 9, 60, 127, 128, 129, len(sound) // 2, len(sound) - 1]:
        broken = bytearray(sound)
        broken[byte] ^= 1 << byte % 8
        path.write_bytes(broken)
        assert not validate.validate(copy_of_set).ok, byte
        if suffix == ".npy":
            with pytest.raises(LmError):
                TokenStream.open(copy_of_set, verify="full").read(0, 10)
    path.write_bytes(sound)
    assert validate.validate(copy_of_set).ok


def test_every_length_of_a_shard_but_its_own_is_refused(copy_of_set: Path) -> None:
    entry = read_manifest(copy_of_set).shards[-1]
    path = copy_of_set / f"{entry.name}.npy"
    sound = path.read_bytes()
    with open(path, "r+b", buffering=0) as file:
        for length in [*range(0, 300), *range(300, len(sound), 97), len(sound) - 1, len(sound) + 1, len(sound) * 2]:
            os.ftruncate(file.fileno(), length)
            with pytest.raises(LmError, match="the manifest says"):
                TokenStream.open(copy_of_set, verify="size")


def test_every_flipped_bit_of_a_checkpoint_is_found(material: Path, tmp_path: Path) -> None:
    folder = tmp_path / "step-00000003"
    shutil.copytree(material / "checkpoints" / "step-00000003", folder)
    missed = []
    for path in sorted(folder.iterdir()):
        sound = path.read_bytes()
        value = json.loads(sound) if path.suffix == ".json" else None
        with open(path, "r+b", buffering=0) as file:
            for bit in range(len(sound) * 8):
                byte = bit // 8
                flipped = bytes([sound[byte] ^ 1 << bit % 8])
                os.pwrite(file.fileno(), flipped, byte)
                try:
                    if checkpoint.verify(folder) and not (path.name == "COMMIT.json" and _same(path, value)):
                        missed.append((path.name, bit))
                except LmError:
                    pass
                os.pwrite(file.fileno(), sound[byte : byte + 1], byte)
    assert not missed


def _same(path: Path, value: Any) -> bool:
    """White space that became other white space changes nothing."""
    return bool(json.loads(path.read_bytes()) == value)


# ---------------------------------------------------------------------------------------- YAML

SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3), max_leaves=8
)


@settings(derandomize=True, max_examples=150, deadline=None)
@given(value=st.dictionaries(st.text(), VALUES, max_size=4))
def test_yaml_comes_back_as_it_was(value: dict[str, Any]) -> None:
    try:
        text = dump_yaml(value)
        text.encode()
    except (UnicodeEncodeError, ValueError):
        return
    assert parse_yaml(text, "test") == value


@settings(derandomize=True, max_examples=300, deadline=None)
@given(text=st.text() | st.binary().map(lambda raw: raw.decode("utf-8", "replace")))
def test_any_text_is_yaml_or_an_error_of_ours(text: str) -> None:
    with contextlib.suppress(LmError):
        parse_yaml(text, "test")


@pytest.mark.parametrize(
    "text",
    [
        "a: !!python/object/apply:os.system ['true']",
        "a: !!python/name:os.system",
        "a: !!binary aGVsbG8=\nb: !!set {x}",
        "a: &a [*a]",
        "a: &a {b: *a}",
        "[" * 5000,
        "a: " * 3000,
        "x: &x [1]\n"
        + "".join(
            f"y{i}: &y{i} [*{'x' if not i else f'y{i - 1}'}, *{'x' if not i else f'y{i - 1}'}]\n" for i in range(40)
        ),
        "a: " + "9" * 5000,
        "? [a, b]\n: c",
        "a: 2020-01-01",
        "a: 0o17\nb: 0x1F\nc: 1:30",
        "\0",
        "a: \x07",
        "%YAML 9.9\n---\na: 1",
        "--- 1\n--- 2",
        "a: 1e999",
    ],
)
def test_nasty_yaml_builds_no_object_and_never_hangs(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(LmError) as raised:
        read_run_config(path)
    assert len(raised.value.message) < 6000
