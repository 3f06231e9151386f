"""Machines without a shared disk: ranks that would not train the same run are refused before anything is written."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small_runs import ROOT, Crash, Lab, Watch, crash, hashes

from lmcore.data.split import split_set

WITHIN_S = 30  # ten seconds on a machine that does nothing else, start of the processes included


@pytest.fixture
def machines(lab: Lab, tmp_path: Path, make_set):
    """Two machines, each with a disk of its own that holds the data and a run with checkpoints of steps 4 and 8."""
    with pytest.raises(Crash):
        lab.run("broken", watch=Watch({9: crash}))
    for name in ("a", "b"):
        home = tmp_path / name
        shutil.copytree(lab.root / "broken", home / "run")
        shutil.copytree(lab.data, home / "data", symlinks=True)
    return tmp_path / "a", tmp_path / "b"


def train(lab: Lab, machines, *settings: str, source: tuple[str, str] = ("--data", "data"), more: tuple[str, ...] = ()):
    """`lm train` on both; (exit codes, words) of the ranks and the seconds that it took.
    `source` lies on each machine's own disk; `more` is typed on the second one only."""
    option, name = source
    places = [
        {"home": home, "arguments": (str(home / "run"), option, str(home / name), *(more if rank else ()))}
        for rank, home in enumerate(machines)
    ]
    began = time.monotonic()
    ranks = lab.start_machines(places, *settings)
    try:
        said = [rank.communicate(timeout=100)[1] for rank in ranks]
    except subprocess.TimeoutExpired:
        raise AssertionError("the ranks wait for each other") from None
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()
    return [rank.returncode for rank in ranks], said, time.monotonic() - began


def everything(home: Path) -> dict[str, bytes]:
    return {str(p.relative_to(home)): p.read_bytes() for p in sorted(home.rglob("*")) if p.is_file()}


def an_older_checkpoint(home: Path) -> None:
    shutil.rmtree(home / "run" / "checkpoints" / "step-00000008")


def no_checkpoint(home: Path) -> None:
    shutil.rmtree(home / "run" / "checkpoints")


def no_run(home: Path) -> None:
    shutil.rmtree(home / "run")


def a_checkpoint_with_other_weights(home: Path) -> None:
    Lab(home / "other", home / "data").run("run", "train.steps=8", "train.seed=5")
    step = "checkpoints/step-00000008"
    shutil.rmtree(home / "run" / step)
    shutil.copytree(home / "other" / "run" / step, home / "run" / step)
    shutil.rmtree(home / "other")


def a_damaged_checkpoint(home: Path) -> None:
    weights = home / "run" / "checkpoints" / "step-00000008" / "model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-5] ^= 1
    weights.write_bytes(raw)


def other_data(home: Path) -> None:
    shutil.rmtree(home / "data" / "train")
    shutil.rmtree(home / "data" / "val")
    split_set(home / "data", fractions={"val": 0.3})


def other_validation_data(home: Path) -> None:
    shutil.rmtree(home / "data" / "val")
    shutil.copytree(home / "data" / "train", home / "data" / "val", symlinks=True)


def no_data(home: Path) -> None:
    shutil.rmtree(home / "data")


def other_code(home: Path) -> None:
    ignored = shutil.ignore_patterns("__pycache__", "*.pyc")
    for package in ("lmcore", "tools"):
        shutil.copytree(ROOT / package, home / "code" / package, ignore=ignored)
    with open(home / "code" / "lmcore" / "model" / "layers.py", "a") as file:
        file.write("# another version\n")


CASES = {
    an_older_checkpoint: "rank 1 of 2 would begin at step 4 (COMMIT",
    no_checkpoint: "rank 1 of 2 would begin at the first step",
    no_run: "rank 1 of 2 would begin at the first step",
    a_checkpoint_with_other_weights: "rank 1 of 2 would begin at step 8 (COMMIT",
    a_damaged_checkpoint: "rank 1 of 2 would begin at step 4 (COMMIT",
    other_data: "rank 1 of 2 has the training data ",
    other_validation_data: "rank 1 of 2 has the validation data ",
    no_data: "rank 1 of 2: ",
    other_code: "rank 1 of 2 runs lmshards 0.1.0 with the sources ",
}


@pytest.mark.slow
@pytest.mark.parametrize("change", CASES, ids=lambda change: change.__name__)
def test_a_rank_that_would_train_something_else_is_named_and_nothing_is_written(lab, machines, change):
    change(machines[1])
    before = [everything(home) for home in machines]
    codes, said, took = train(lab, machines)
    assert codes == [2, 2], said
    assert CASES[change] in said[0]
    assert said[0].count("error:") == 1
    assert "Traceback" not in said[0]
    assert said[1] == ""  # said once
    assert took < WITHIN_S
    assert [everything(home) for home in machines] == before


@pytest.mark.slow
@pytest.mark.parametrize("first", [True, False], ids=["a new run", "a resumed one"])
def test_another_setting_on_one_rank_is_named(lab, machines, first):
    if first:
        for home in machines:
            no_run(home)
    codes, said, took = train(lab, machines, more=("--set", "optim.lr=0.007"))
    assert codes == [2, 2]
    assert "rank 1 of 2" in said[0]
    assert "optim.lr" in said[0]
    assert said[1] == ""
    assert took < WITHIN_S
    if first:
        assert not any((home / "run").exists() for home in machines)


@pytest.mark.slow
def test_ranks_that_agree_train_one_model_from_two_disks(lab, machines):
    lab.run("whole")
    codes, said, _ = train(lab, machines)
    assert codes == [0, 0], said
    assert hashes(machines[0] / "run") == hashes(lab.root / "whole")
    for home in machines:
        no_run(home)
    codes, said, _ = train(lab, machines)
    assert codes == [0, 0], said
    assert hashes(machines[0] / "run") == hashes(lab.root / "whole")
    assert not (machines[1] / "run" / "config.yaml").exists()  # the main rank writes


@pytest.mark.slow
def test_text_that_differs_is_refused_before_the_first_step(lab, machines):
    for home, text in zip(machines, ("one", "other"), strict=True):
        no_run(home)
        (home / "text.jsonl").write_text(f'{{"text": "{text} words to train on"}}\n' * 2000)
    codes, said, took = train(lab, machines, "data.tokenizer=byte", "data.val=[]", source=("--stream", "text.jsonl"))
    assert codes == [2, 2]
    assert "rank 1 of 2 has the training data" in said[0]
    assert said[1] == ""
    assert took < WITHIN_S
    assert not any((home / "run" / "source").exists() for home in machines)


@pytest.mark.slow
def test_a_refusal_that_concerns_all_ranks_is_said_once(lab):
    """Under torchrun, whose own traceback cannot be kept from following."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=3", "--master-port=0", "--standalone"),
            *("-m", "lmcore", "train", str(lab.root / "three"), "--preset", str(lab.preset())),
        ],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode != 0
    assert done.stderr.count("error:") == 1
    assert "cannot be divided" in done.stderr
    assert not (lab.root / "three").exists()
