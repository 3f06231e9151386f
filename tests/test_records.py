"""Records that are well formed and wrong: what random damage seldom makes, and nobody would notice."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lmcore.config import parse_overrides
from lmcore.data.plan import TokenizeConfig
from lmcore.data.tokenization import tokenize
from lmcore.data.tokenizer import Tokenizer
from lmcore.errors import Exit, LmError
from lmcore.training.checkpoint import load_model, resolve
from lmcore.training.config import read_preset
from lmcore.training.launch import prepare
from lmcore.training.plan import draft
from tests.fuzz.limits import limited
from tests.inference.tiny import documents, make_run, make_set

Change = Callable[[list[dict[str, Any]]], object]
JOURNALS: dict[str, Change] = {
    "a line twice": lambda lines: lines.insert(1, lines[0]),
    "a line gone": lambda lines: lines.pop(0),
    "another document": lambda lines: lines[-1]["cursor"].update(row=lines[-1]["cursor"]["row"] + 1),
    "another file": lambda lines: lines[-1]["cursor"].update(unit=1 - lines[-1]["cursor"]["unit"]),
    "another token": lambda lines: lines[-1]["cursor"].update(token=lines[-1]["cursor"]["token"] + 5),
    "the end": lambda lines: lines[-1]["cursor"].update(row=-1),
}


@pytest.mark.parametrize("name", JOURNALS)
def test_a_journal_that_leads_elsewhere_is_not_continued(tmp_path: Path, name: str) -> None:
    """Documents would be left out, or be there twice, in a set that looks whole."""
    for number in (1, 2):
        lines = (json.dumps({"text": f"text {number} of {k} " * 40}) + "\n" for k in range(20))
        (tmp_path / f"{number}.jsonl").write_text("".join(lines))
    paths = (str(tmp_path / "1.jsonl"), str(tmp_path / "2.jsonl"))
    config = TokenizeConfig(paths=paths, tokenizer="byte", seq_len=2048, shard_tokens=4096)
    out = tmp_path / "set"
    whole = tokenize(config, out, workers=1, backend="tokenizers").dataset_id
    (out / "manifest.json").unlink()
    journal = out / "journal.jsonl"
    sound = [json.loads(line) for line in journal.read_text().splitlines()][:3]
    journal.write_text("".join(json.dumps(line) + "\n" for line in sound))
    changed = json.loads(json.dumps(sound))
    JOURNALS[name](changed)
    journal.write_text("".join(json.dumps(line) + "\n" for line in changed))
    with pytest.raises(LmError) as refused:
        tokenize(config, out, workers=1, backend="tokenizers")
    assert refused.value.code == Exit.DATA
    assert "journal.jsonl" in refused.value.message or "is missing" in refused.value.message
    if name not in ("a line twice", "a line gone"):  # the shards are still there
        journal.write_text("".join(json.dumps(line) + "\n" for line in sound))
        assert tokenize(config, out, workers=1, backend="tokenizers").dataset_id == whole


@pytest.fixture
def step(tmp_path: Path) -> Path:
    return resolve(make_run(tmp_path / "run", make_set(tmp_path / "set", documents(6), held_out=2)))


def rewrite(step: Path, name: str, change: Callable[[str], str]) -> None:
    """A file of a checkpoint, with a hash that fits."""
    raw = change((step / name).read_text()).encode()
    (step / name).write_bytes(raw)
    commit = json.loads((step / "COMMIT.json").read_text())
    commit["files"][name] = {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    (step / "COMMIT.json").write_text(json.dumps(commit))


def test_the_state_of_another_step_is_refused(step: Path) -> None:
    rewrite(step, "state.json", lambda text: json.dumps(json.loads(text) | {"step": 2}))
    with pytest.raises(LmError, match="the state of step 2 in a checkpoint of another one"):
        load_model(step, device="cpu")


def test_an_opening_beyond_the_vocabulary_is_refused(step: Path) -> None:
    rewrite(step, "state.json", lambda text: json.dumps(json.loads(text) | {"opening": [100_000]}))
    with pytest.raises(LmError, match="beyond the vocabulary"):
        load_model(step, device="cpu")


def test_unknown_keys_of_a_state_are_kept(step: Path) -> None:
    rewrite(step, "state.json", lambda text: json.dumps(json.loads(text) | {"later": {"a": [1]}}))
    assert load_model(step, device="cpu").state["later"] == {"a": [1]}


def test_a_configuration_larger_than_the_weights_takes_no_memory(step: Path) -> None:
    rewrite(step, "config.yaml", lambda text: text.replace("d_ff: 128", "d_ff: 100000000"))
    assert "100000000" in (step / "config.yaml").read_text()
    with limited(), pytest.raises(LmError, match="describes a model of"):
        load_model(step, device="cpu")


@pytest.mark.parametrize("text", ["model=[1]", "train=1", "data=x", "optim=[]", "train={eval: 3}"])
def test_something_else_than_a_section_is_refused_and_not_left_out(tmp_path: Path, text: str) -> None:
    _, raw = read_preset("nano")
    typed = parse_overrides([text])
    key = "train.eval" if "eval" in text else text.partition("=")[0]
    for start in (lambda: draft(raw | typed), lambda: prepare(tmp_path / "run", preset=raw, typed=typed)):
        with pytest.raises(LmError, match=f"{key}: a section with settings is expected"):
            start()


@pytest.mark.parametrize("place", ["vocabulary", "added token"])
def test_an_id_far_beyond_the_vocabulary_takes_no_memory(place: str) -> None:
    definition = json.loads(Tokenizer.byte().to_json())
    if place == "vocabulary":
        definition["model"]["vocab"]["far"] = (1 << 24) - 1
    else:
        definition["added_tokens"][0]["id"] = (1 << 24) - 1
    with limited(), pytest.raises(LmError, match="an id of 16,777,215 among"):
        Tokenizer(definition, name="far")
