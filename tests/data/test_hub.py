"""The real client libraries against a loopback Hub: names, pinned commits, faults, and errors that say what to do."""

from __future__ import annotations

import gzip
import json
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import corpora
import pytest
from hub_standin import HubStandIn
from s3_standin import S3StandIn
from standin import run_lm

from lmcore.data.registry import REGISTRY, parse_dataset
from lmcore.data.tokenizer import Tokenizer
from lmcore.errors import Exit, LmError

TEXTS = corpora.texts(300)
CARD = """---
configs:
- config_name: default
  data_files: [{split: train, path: "data/*/*"}]
- config_name: sample-10BT
  data_files: [{split: train, path: "sample/10BT/*"}]
- config_name: sample-100BT
  data_files: [{split: train, path: "sample/100BT/*"}]
---
# Look-alike
"""

Lm = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """FineWeb-Edu's layout in small, a CSV dataset, a list of URLs, and a tokenizer."""
    root = tmp_path_factory.mktemp("hub")
    fineweb = root / "datasets/HuggingFaceFW/fineweb-edu"
    corpora.write_parquet(fineweb / "sample/10BT/000_00000.parquet", TEXTS[:120])
    corpora.write_parquet(fineweb / "sample/10BT/001_00000.parquet", TEXTS[120:300])
    corpora.write_parquet(fineweb / "sample/100BT/000_00000.parquet", ["other"])
    corpora.write_parquet(fineweb / "data/CC-MAIN/000.parquet", ["full"])
    (fineweb / "README.md").write_text(CARD)
    table = root / "datasets/some/table"
    table.mkdir(parents=True)
    (table / "train.csv").write_text("id,text\n" + "".join(f'{k},"row {k}, with comma"\n' for k in range(5000)))
    lines = root / "datasets/some/lines"
    corpora.write_jsonl(lines / "train-0.jsonl", TEXTS[:50])
    corpora.write_jsonl(lines / "train-1.jsonl", TEXTS[50:80])
    plain = root / "datasets/HuggingFaceFW/fineweb"
    corpora.write_parquet(plain / "sample/100BT/000_00000.parquet", TEXTS[5:25])
    corpora.write_parquet(plain / "data/CC-MAIN/000.parquet", ["full"])  # the first of the card is looked up always
    (plain / "README.md").write_text(CARD)
    script = root / "datasets/Skylion007/openwebtext"
    script.mkdir(parents=True)
    (script / "openwebtext.py").write_text("raise SystemExit('a loading script was run')")
    converted = root / "datasets/Skylion007/openwebtext@converted/plain_text/partial-train"
    corpora.write_parquet(converted / "0000.parquet", TEXTS[:30])
    corpora.write_parquet(converted / "0001.parquet", TEXTS[30:45])
    corpora.write_jsonl(root / "web/olmo/a.jsonl", TEXTS[100:130])
    (root / "web/olmo/a.json.gz").write_bytes(gzip.compress((root / "web/olmo/a.jsonl").read_bytes()))
    small = corpora.tokenizer(root / "made")
    model = root / "models/some/model"
    model.mkdir(parents=True)
    (model / "tokenizer.json").write_bytes(small.read_bytes())
    return root


@pytest.fixture
def hub(root: Path) -> Iterator[HubStandIn]:
    with HubStandIn(root) as hub:
        yield hub


@pytest.fixture
def lm(tmp_path: Path) -> Lm:
    def run(hub: HubStandIn | str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
        endpoint = hub if isinstance(hub, str) else hub.endpoint
        own = {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "home")}
        return run_lm(tmp_path, arguments, own | environment, without=("HF_", "HUGGING"))

    return run


def expected_stream(root: Path, values: list[str]) -> list[int]:
    return corpora.reference_ids(values, Tokenizer.from_file(root / "models/some/model"))


def manifest(path: Path) -> dict[str, Any]:
    return dict(json.loads((path / "manifest.json").read_text()))


def test_named_corpus_and_tokenizer_from_the_hub(root: Path, hub: HubStandIn, lm: Lm, tmp_path: Path) -> None:
    done = lm(hub, "tokenize", "--dataset", "fineweb-edu", "--tokenizer", "some/model", "--json")
    assert done.returncode == 0, done.stderr
    out = tmp_path / "shards/fineweb-edu"
    assert json.loads(done.stdout)["n_docs"] == 300
    assert corpora.stream_of(out).tolist() == expected_stream(root, TEXTS)
    source = manifest(out)["source"]
    assert source["repository"] == "HuggingFaceFW/fineweb-edu"
    assert source["config"] == "sample-10BT"
    assert len(source["revision"]) == 40
    units = json.loads((out / "plan.json").read_text())["units"]
    assert all(f"@{source['revision']}/" in unit["path"] and unit["size"] > 0 for unit in units)
    assert not any("100BT" in path for _, path, wanted in hub.requests if wanted)
    downloads = sum("parquet" in path and wanted is not None for _, path, wanted in hub.requests)
    again = lm("http://127.0.0.1:9", "tokenize", "--dataset", "fineweb-edu", "--tokenizer", "some/model", "--json")
    assert json.loads(again.stdout)["already_finished"], "a finished set needs no Hub"
    assert downloads < 40


@pytest.mark.slow
def test_refused_and_cut_downloads_are_repeated(root: Path, lm: Lm, tmp_path: Path) -> None:
    with HubStandIn(root, fail_every=4, cut_after=3000, max_faults=4) as hub:
        url = "hf://datasets/HuggingFaceFW/fineweb-edu/sample/10BT/*.parquet"
        done = lm(hub, "tokenize", url, "--tokenizer", "byte", "--out", "set")
        assert done.returncode == 0, done.stderr
        assert hub.faults >= 3
    bytes_of = [number for text in TEXTS for number in (*text.encode(), 256)]
    assert corpora.stream_of(tmp_path / "set").tolist() == bytes_of
    assert "@" in json.loads((tmp_path / "set/plan.json").read_text())["units"][0]["path"]


@pytest.mark.slow
def test_what_only_datasets_can_read(hub: HubStandIn, lm: Lm, tmp_path: Path) -> None:
    done = lm(
        hub, "tokenize", "--dataset", "some/table", "--tokenizer", "byte", "--shard-tokens", "8192", "--out", "set"
    )
    assert done.returncode == 0, done.stderr
    found = corpora.documents_of(tmp_path / "set")
    assert [row for _, row, _, _ in found] == list(range(5000))
    assert found[4999][2] == corpora.reference_hash("row 4999, with comma")
    before = corpora.tree(tmp_path / "set")
    (tmp_path / "set/manifest.json").unlink()
    journal = (tmp_path / "set/journal.jsonl").read_bytes().splitlines(keepends=True)
    assert json.loads(journal[-2])["cursor"]["piece"] == 1
    (tmp_path / "set/journal.jsonl").write_bytes(b"".join(journal[:-1]))
    done = lm(
        hub, "tokenize", "--dataset", "some/table", "--tokenizer", "byte", "--shard-tokens", "8192", "--out", "set"
    )
    assert done.returncode == 0, done.stderr
    assert corpora.tree(tmp_path / "set") == before


@pytest.mark.slow
def test_json_lines_on_the_hub(hub: HubStandIn, lm: Lm, tmp_path: Path) -> None:
    done = lm(hub, "tokenize", "--dataset", "some/lines", "--tokenizer", "byte", "--out", "set")
    assert done.returncode == 0, done.stderr
    assert corpora.stream_of(tmp_path / "set").tolist() == [n for t in TEXTS[:80] for n in (*t.encode(), 256)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--dataset", "no/such"], Exit.USAGE, "dataset no/such: not found"),
        (["--dataset", "fineweb-edu:sample-1T"], Exit.USAGE, "configurations are default, sample-10BT"),
        (["--dataset", "fineweb-edu@nope"], Exit.USAGE, "no such revision"),
        (["--dataset", "fineweb-edu", "--text-column", "body"], Exit.USAGE, "no column 'body'; it has text, id"),
        (["--dataset", "some/lines", "--tokenizer", "no/model"], Exit.USAGE, "tokenizer no/model: not found"),
    ],
)
def test_names_that_do_not_exist(hub: HubStandIn, lm: Lm, arguments: list[str], code: int, message: str) -> None:
    done = lm(hub, "tokenize", *arguments, "--out", "set")
    assert (done.returncode, "Traceback" in done.stderr) == (code, False), done.stderr
    assert message in done.stderr


@pytest.mark.parametrize(
    "arguments", [["--dataset", "fineweb"], ["x.txt", "--tokenizer", "gpt2"]], ids=["data", "tokenizer"]
)
def test_unreachable_hub_fails_in_seconds_with_what_to_do(lm: Lm, tmp_path: Path, arguments: list[str]) -> None:
    (tmp_path / "x.txt").write_text("hello")
    began = time.monotonic()
    done = lm("http://127.0.0.1:9", "tokenize", *arguments, "--out", "set")
    assert time.monotonic() - began < 10
    assert done.returncode == Exit.IO
    assert "cannot be reached" in done.stderr
    assert "HF_ENDPOINT" in done.stderr
    offline = lm("http://127.0.0.1:9", "tokenize", *arguments, "--out", "set", HF_HUB_OFFLINE="1")
    assert "switched off by HF_HUB_OFFLINE" in offline.stderr


def test_the_other_names_of_the_registry(root: Path, hub: HubStandIn, lm: Lm, tmp_path: Path) -> None:
    """A sample by its short name, and a loading script that is not run: its conversion is read."""
    for number, (name, expected) in enumerate(
        {
            "fineweb:100BT": TEXTS[5:25],
            "openwebtext": TEXTS[:45],
        }.items()
    ):
        out = tmp_path / str(number)
        done = lm(hub, "tokenize", "--dataset", name, "--tokenizer", root / "models/some/model", "--out", out)
        assert done.returncode == 0, done.stderr
        assert corpora.stream_of(out).tolist() == expected_stream(root, expected), name


def test_a_corpus_that_is_a_list_of_urls(root: Path, lm: Lm, tmp_path: Path) -> None:
    """dolma's list is on the Hub, its files are on the web: compressed lines over connections that break."""
    with S3StandIn(root, cut_after=1_000, max_faults=4) as web:
        urls = root / "datasets/allenai/dolma/urls"
        urls.mkdir(parents=True, exist_ok=True)
        (urls / "v1_6-sample.txt").write_text(f"{web.endpoint}/web/olmo/a.json.gz\n")
        with HubStandIn(root) as hub:
            done = lm(hub, "tokenize", "--dataset", "dolma", "--tokenizer", root / "models/some/model", "--out", "set")
        assert done.returncode == 0, done.stderr
        assert web.faults == 4
        assert corpora.stream_of(tmp_path / "set").tolist() == expected_stream(root, TEXTS[100:130])


def test_files_behind_urls(root: Path, hub: HubStandIn, lm: Lm, tmp_path: Path) -> None:
    """hf:// is pinned to the commit; http:// gives lines and parquet, and says what is not there."""
    model = root / "models/some/model"
    url = "hf://datasets/HuggingFaceFW/fineweb/sample/100BT/000_00000.parquet"
    done = lm(hub, "tokenize", url, "--tokenizer", model, "--out", "hf")
    assert done.returncode == 0, done.stderr
    (unit,) = json.loads((tmp_path / "hf/plan.json").read_text())["units"]
    commit = HubStandIn.repository(hub, "datasets", "HuggingFaceFW/fineweb").commit  # type: ignore[union-attr]
    assert f"fineweb@{commit}/sample" in unit["path"]
    assert corpora.stream_of(tmp_path / "hf").tolist() == expected_stream(root, TEXTS[5:25])
    parquet = "/datasets/HuggingFaceFW/fineweb-edu/sample/10BT/000_00000.parquet"
    with S3StandIn(root, cut_after=5_000, max_faults=3) as web:
        lines = f"{web.endpoint}/web/olmo/a.jsonl"
        done = lm(hub, "tokenize", lines, f"{web.endpoint}{parquet}", "--tokenizer", model, "--out", "web")
        assert done.returncode == 0, done.stderr
        assert web.faults == 3
        assert corpora.stream_of(tmp_path / "web").tolist() == expected_stream(root, [*TEXTS[100:130], *TEXTS[:120]])
        for url, message in {
            f"{web.endpoint}/web/none.jsonl": "no such file (404",
            f"{web.endpoint}/web/olmo": "no such file (404",
        }.items():
            done = lm(hub, "tokenize", url, "--out", "x")
            assert (done.returncode, message in done.stderr) == (Exit.USAGE, True), done.stderr
    began = time.monotonic()
    done = lm(hub, "tokenize", "http://127.0.0.1:9/a.jsonl", "--out", "x")
    assert (done.returncode, "cannot be reached" in done.stderr) == (Exit.IO, True), done.stderr
    assert time.monotonic() - began < 20


def test_dataset_names() -> None:
    name = parse_dataset("fineweb-edu:100BT@abc")
    assert (name.repository, name.config, name.revision) == ("HuggingFaceFW/fineweb-edu", "sample-100BT", "abc")
    assert parse_dataset("fineweb:full").config == "default"
    assert parse_dataset("dolma").config == "v1_6-sample"
    assert parse_dataset("org/name").config is None
    assert set(REGISTRY) == {"fineweb", "fineweb-edu", "openwebtext", "dolma"}
    with pytest.raises(LmError, match="stdlib, fineweb-edu"):
        parse_dataset("wikitext")
