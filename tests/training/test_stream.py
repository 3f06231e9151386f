"""Training from text without shards: the same law of resume, and refusals in words."""

import json

import pytest
from small_runs import Crash, Watch, crash, curve, hashes

from lmcore.errors import LmError


@pytest.fixture
def text(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(40):
        (folder / f"{number:02}.txt").write_text(f"text number {number}: " + "the quick brown fox " * (number + 5))
    return folder


def test_text_is_trained_on_and_resumed_to_the_same_bits(lab, text):
    settings = (f"data.stream={text}", "data.tokenizer=byte", "data.val=[]")
    lab.run("whole", *settings)
    with pytest.raises(Crash):
        lab.run("broken", *settings, watch=Watch({6: crash}))
    lab.run("broken", *settings)
    assert hashes(lab.root / "broken") == hashes(lab.root / "whole")
    assert curve(lab.root / "broken") == curve(lab.root / "whole")
    assert (lab.root / "whole" / "source" / "plan.json").is_file()
    lines = [json.loads(line) for line in (lab.root / "whole" / "metrics.jsonl").read_text().splitlines()]
    told = [line["time"]["text"] for line in lines if line["kind"] == "train"]
    assert told
    assert not any("epoch" in line for line in lines)  # it is not known, and 0.0 would be a lie
    assert all(0 <= one["wait_s"] and 0 < one["text_mb_per_s"] < one["tokens_per_s"] for one in told)


def test_a_tokenizer_must_be_named(lab, text):
    with pytest.raises(LmError, match="needs a tokenizer"):
        lab.run("run", f"data.stream={text}", "data.val=[]")
