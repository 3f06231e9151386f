"""`lm eval` through its entry point."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lmcore.data.tokenizer import Tokenizer
from tests.inference.tiny import documents, make_run, make_set


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("evaluate")
    data = make_set(root / "set", documents())
    make_run(root / "runs" / "a", data)
    make_run(root / "runs" / "b", data, seed=1)
    make_set(root / "other", documents(10, seed=5))
    make_set(root / "foreign", documents(), Tokenizer.train(documents(), 300))
    return root


def test_a_table_for_people(lm: Callable[..., Any], root: Path) -> None:
    done = lm("eval", root / "runs" / "a", "--device", "cpu")
    assert done.code == 0
    assert "a/step-00000003" in done.out
    assert "bits/byte" in done.out
    assert "Standard errors over 8 documents" in done.out


def test_json_and_determinism(lm: Callable[..., Any], root: Path) -> None:
    one = lm("eval", root / "runs" / "a", "--json", "-q", "--device", "cpu")
    two = lm("eval", root / "runs" / "a", "--json", "-q", "--device", "cpu")
    assert one.out == two.out
    assert one.err == ""
    (evaluation,) = json.loads(one.out)["evaluations"]
    assert evaluation["step"] == 3
    assert evaluation["data"] == str(root / "set" / "val")
    assert evaluation["tokens"] == json.loads((root / "set" / "val" / "manifest.json").read_text())["n_tokens"] - 1
    assert evaluation["loss_stderr"] > 0


def test_several_models_and_sets(lm: Callable[..., Any], root: Path) -> None:
    runs = root / "runs"
    sets = ["--data", root / "set" / "val", "--data", root / "other"]
    done = lm("eval", runs / "a", runs / "b", *sets, "--json", "-q")
    document = json.loads(done.out)
    assert len(document["evaluations"]) == 4
    losses = {(Path(e["checkpoint"]).parts[-3], e["data"]): e["loss"] for e in document["evaluations"]}
    assert len(document["differences"]) == 2
    for entry in document["differences"]:
        expected = losses["b", entry["data"]] - losses["a", entry["data"]]
        assert entry["loss"] == pytest.approx(expected, abs=1e-9)
        assert entry["loss_stderr"] > 0
    shown = lm("eval", runs / "a", runs / "b", "-q", "--by-position")
    assert "b/step-00000003 - a/step-00000003" in shown.out
    assert "tokens before" in shown.out


def test_windows(lm: Callable[..., Any], root: Path) -> None:
    def loss(*options: object) -> dict[str, Any]:
        done = lm("eval", root / "runs" / "a", "--json", "-q", *options)
        return dict(json.loads(done.out)["evaluations"][0])

    assert loss("--stride", 8)["tokens"] == loss()["tokens"]
    assert loss("--stride", 8)["loss"] != loss()["loss"]
    assert loss("--max-tokens", 64)["tokens"] <= 64
    longer = lm("eval", root / "runs" / "a", "--context", 64)
    assert "64 is more than it has seen" in longer.err


def test_the_newest_run_is_the_default(lm: Callable[..., Any], root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)
    assert json.loads(lm("eval", "--json", "-q").out)["evaluations"][0]["checkpoint"].startswith("runs/b/")


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--data", "foreign"], 65, "was trained with the tokenizer"),
        (["--data", "set/train"], 65, "are in the training data"),
        (["--data", "set"], 65, "16 of its 24 documents are in the training data"),
        (["--data", "nowhere"], 2, "no such shard set"),
        (["--stride", "0"], 2, "stride"),
    ],
)
def test_errors_are_sentences(
    lm: Callable[..., Any],
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    code: int,
    message: str,
) -> None:
    monkeypatch.chdir(root)
    done = lm("eval", "runs/a", "-q", *options)
    assert done.code == code
    assert done.out == ""
    assert message in " ".join(done.err.split())


def test_overlap_can_be_allowed(lm: Callable[..., Any], root: Path) -> None:
    done = lm("eval", root / "runs" / "a", "--data", root / "set" / "train", "--allow-overlap", "--json", "-q")
    assert done.code == 0


def test_mmlu(lm: Callable[..., Any], root: Path) -> None:
    import pyarrow as pa

    for subject, count in {"anatomy": 3, "virology": 5}.items():
        place = root / "arrow" / "mmlu_no_train" / subject / "test"
        place.mkdir(parents=True)
        rows = [{"question": f"{subject} {n}?", "choices": list("wxyz"), "answer": n % 4} for n in range(count)]
        table = pa.Table.from_pylist(rows)
        with pa.OSFile(str(place / "data.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table)
    options = ("eval", root / "runs" / "a", "--task-files", root / "arrow", "-q", "--tasks")
    document = json.loads(lm(*options, "mmlu/mc_0shot", "--json").out)
    by_subject = {entry["task"]: entry for entry in document["tasks"]}
    assert set(by_subject) == {"mmlu_anatomy/mc_0shot", "mmlu_virology/mc_0shot"}
    (overall,) = document["overall"]
    assert (overall["task"], overall["documents"]) == ("mmlu/mc_0shot", 8)
    right = sum(entry["scores"]["acc"]["value"] * entry["documents"] for entry in by_subject.values())
    assert overall["scores"]["acc"]["value"] == pytest.approx(right / 8)
    shown = lm(*options, "mmlu/mc_0shot").out
    assert "mmlu_virology/mc_0shot" in shown
    assert "mmlu/mc_0shot" in shown
    missing = lm(*options, "mmlu")
    assert missing.code == 65
    assert "5 examples are needed, 0 are there" in " ".join(missing.err.split())


def test_tasks(lm: Callable[..., Any], root: Path) -> None:
    place = root / "tasks" / "quiz" / "rc_0shot"
    place.mkdir(parents=True)
    lines = [
        {
            "doc_id": d,
            "idx": i,
            "label": d % 2,
            "request": {"context": f"Q{d}:", "continuation": (" yes", " no")[i]},
        }
        for d in range(6)
        for i in range(2)
    ]
    (place / "requests.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = ("eval", root / "runs" / "a", "--task-files", root / "tasks", "-q")
    document = json.loads(lm(*options, "--tasks", "quiz", "--limit", 4, "--json").out)
    (result,) = document["tasks"]
    assert (result["task"], result["documents"], result["chance"]) == ("quiz/rc_0shot", 4, 0.5)
    assert 0 <= result["scores"]["acc"]["value"] <= 1
    assert "quiz/rc_0shot" in lm(*options, "--tasks", "quiz").out
    assert json.loads(lm(*options, "--tasks", "list", "--json").out) == {"quiz": ["rc_0shot"]}
    wrong = lm(*options, "--tasks", "quizz")
    assert (wrong.code, "There are: quiz" in wrong.err) == (2, True)


def test_help_has_examples(lm: Callable[..., Any]) -> None:
    done = lm("eval", "--help")
    for word in ("Data", "Model and speed", "lm eval runs/a runs/b"):
        assert word in done.out
