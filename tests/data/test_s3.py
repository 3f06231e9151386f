"""s3:// through the real client against a loopback stand-in: the same bytes as from files, faults, and errors."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import corpora
import pytest
from s3_standin import S3StandIn
from standin import ROOT, run_lm

from lmcore.data.manifest import read_manifest
from lmcore.errors import Exit

TEXTS = corpora.texts(200)
Lm = Callable[..., subprocess.CompletedProcess[str]]

needs_s3fs = pytest.mark.skipif(
    importlib.util.find_spec("s3fs") is None, reason="the extra `s3` is not installed: s3:// paths are NOT tested"
)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("s3")
    corpora.write_jsonl(root / "bucket/corpus/a.jsonl", TEXTS[:80])
    corpora.write_parquet(root / "bucket/corpus/b.parquet", TEXTS[80:], group=30)
    (root / "bucket/corpus/notes.html").write_text("not text")
    corpora.tokenizer(root)
    return root


@pytest.fixture
def s3(root: Path) -> Iterator[S3StandIn]:
    with S3StandIn(root) as s3:
        yield s3


@pytest.fixture
def lm(tmp_path: Path) -> Lm:
    def run(endpoint: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
        own = {
            "AWS_ENDPOINT_URL": endpoint,
            "AWS_ACCESS_KEY_ID": "x",
            "AWS_SECRET_ACCESS_KEY": "y",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "HOME": str(tmp_path),
        }
        return run_lm(tmp_path, arguments, own | environment, without="AWS_")

    return run


@needs_s3fs
def test_a_folder_of_a_bucket_gives_the_bytes_of_the_same_files(
    root: Path, s3: S3StandIn, lm: Lm, tmp_path: Path
) -> None:
    tokenizer = root / "small/tokenizer.json"
    done = lm(s3.endpoint, "tokenize", "s3://bucket/corpus", "--tokenizer", tokenizer, "--out", "far", "--json")
    assert done.returncode == 0, done.stderr
    near = lm(s3.endpoint, "tokenize", root / "bucket/corpus", "--tokenizer", tokenizer, "--out", "near")
    assert near.returncode == 0, near.stderr
    far, local = read_manifest(tmp_path / "far"), read_manifest(tmp_path / "near")
    assert far.dataset_id == local.dataset_id
    units = json.loads((tmp_path / "far/plan.json").read_text())["units"]
    assert [(unit["path"], unit["size"] > 0) for unit in units] == [
        ("s3://bucket/corpus/a.jsonl", True),
        ("s3://bucket/corpus/b.parquet", True),
    ]


@needs_s3fs
def test_a_glob_and_cut_connections(root: Path, lm: Lm, tmp_path: Path) -> None:
    tokenizer = root / "small/tokenizer.json"
    with S3StandIn(root, cut_after=3_000, max_faults=4) as s3:
        done = lm(s3.endpoint, "tokenize", "s3://bucket/corpus/*.parquet", "--tokenizer", tokenizer, "--out", "far")
        assert done.returncode == 0, done.stderr
        assert s3.faults == 4
    lm(s3.endpoint, "tokenize", root / "bucket/corpus/b.parquet", "--tokenizer", tokenizer, "--out", "near")
    assert read_manifest(tmp_path / "far").dataset_id == read_manifest(tmp_path / "near").dataset_id


@needs_s3fs
@pytest.mark.parametrize(
    ("url", "code", "message"),
    [
        ("s3://bucket/corpus/none.jsonl", Exit.USAGE, "no such file or folder"),
        ("s3://nowhere/a.jsonl", Exit.USAGE, "no such file or folder"),
        ("s3://bucket/corpus/*.txt", Exit.USAGE, "nothing to tokenize here"),
        ("s3://bucket/corpus/notes.html", Exit.USAGE, "notes.html: this is a .html file, which is not read here"),
    ],
)
def test_what_is_not_there(s3: S3StandIn, lm: Lm, url: str, code: int, message: str) -> None:
    done = lm(s3.endpoint, "tokenize", url, "--tokenizer", "byte", "--out", "set")
    assert (done.returncode, "Traceback" in done.stderr) == (code, False), done.stderr
    assert message in done.stderr


@needs_s3fs
@pytest.mark.parametrize("silent", [False, True], ids=["refused", "silent"])
def test_an_unreachable_endpoint_fails_in_seconds_with_what_to_do(lm: Lm, silent: bool) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
        waiting = []
        if silent:  # a full backlog: the kernel lets further connections wait
            server.listen(0)
            for _ in range(2):
                client = socket.socket()
                client.setblocking(False)
                client.connect_ex(("127.0.0.1", port))
                waiting.append(client)
        began = time.monotonic()
        done = lm(f"http://127.0.0.1:{port}", "tokenize", "s3://bucket/a.jsonl", "--tokenizer", "byte", "--out", "set")
        taken = time.monotonic() - began
        for client in waiting:
            client.close()
    assert (done.returncode, "Traceback" in done.stderr) == (Exit.IO, False), done.stderr
    assert "AWS_ENDPOINT_URL" in done.stderr
    assert taken < 60


def test_without_the_extra_it_is_named(lm: Lm, tmp_path: Path) -> None:
    (tmp_path / "s3fs.py").write_text("raise ImportError('no s3fs')")  # stands before the real one
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = lm("http://127.0.0.1:9", "tokenize", "s3://bucket/a.jsonl", "--out", "set", PYTHONPATH=path)
    assert done.returncode == Exit.USAGE
    assert "lmshards[s3]" in done.stderr
