"""`lm train` as a user meets it: options, documents, refusals, words."""

import json
import os
import re

import pytest
import yaml

OPTIONS = {
    "--preset", "--config", "--out", "--resume", "--set", "--override", "--data", "--val", "--stream", "--tokenizer",
    "--steps", "--tokens", "--batch-tokens", "--lr", "--seed", "--device", "--dtype", "--compile", "--no-compile",
    "--max-minutes", "--tensorboard", "--wandb", "--list-presets", "--print-config", "--dry-run", "--verify-resume",
    "--hours", "--init-from", "--json", "--quiet", "--help",
}  # fmt: skip

TINY = """
model: {d_model: 32, num_layers: 1, num_heads: 2, d_ff: 64, context_length: 32}
train:
  steps: 4
  batch_tokens: 128
  dtype: fp32
  compile: false
  threads: 1
  eval: {tokens: 256}
"""


@pytest.fixture
def tiny(tmp_path, make_set, monkeypatch):
    from lmcore.data.split import split_set

    monkeypatch.chdir(tmp_path)
    made = make_set("data")
    split_set(made.path, fractions={"val": 0.2})
    (tmp_path / "tiny.yaml").write_text(TINY)
    return tmp_path


def test_the_options_are_those_that_were_decided(lm):
    text = lm("train", "--help").out
    assert set(re.findall(r"--[a-z][a-z-]+", text)) >= OPTIONS - {"--help"}
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)) - OPTIONS <= {"--nproc-per-node"}


def test_a_length_in_hours_is_measured_once_and_the_same_command_continues(lm, tiny):
    from lmcore.training.rundir import RunDirectory

    command = ("train", "--preset", "tiny.yaml", "--data", "data", "--set", "train.batch_tokens=128")
    first = lm(*command, "--hours", "1e-8")
    assert first.code == 0, first.err
    assert "1e-08 hours at 30% of the peak of" in first.err
    run = RunDirectory(tiny / "runs" / "tiny")
    length = run.events()[0]["length"]
    assert length["tokens"] == run.config().train.steps * 128
    assert length["hours"] == 1e-8
    peak, share = length["peak_flops"], length["mfu"]
    from lmcore.model.plan import plan_model

    exact = share * peak * 1e-8 * 3600 / plan_model(run.config().model).train_flops
    assert 0 <= length["tokens"] - exact <= 128  # whole steps
    again = lm(*command, "--hours", "1e-8")
    assert again.code == 0, again.err
    assert "nothing to do" in again.out
    other = lm(*command, "--hours", "2e-8")
    assert other.code == 2
    assert "started for 1e-08 hours" in other.err


@pytest.mark.parametrize("more", [("--steps", "3"), ("--tokens", "1k"), ("--set", "train.steps=3")])
def test_hours_and_another_length_are_refused(lm, tiny, more):
    done = lm("train", "--preset", "tiny.yaml", "--data", "data", "--hours", "1", *more)
    assert done.code == 2
    assert "give one of them" in done.err


def test_hours_on_a_device_without_a_known_peak_and_on_many_cpus(tiny, monkeypatch):
    from lmcore.errors import LmError
    from lmcore.training import plan
    from lmcore.training.config import read_preset
    from lmcore.training.launch import prepare

    raw = read_preset("tiny.yaml")[1] | {"data": {"train": "data"}}
    unknown = plan.Target("some GPU", "cuda", "bf16", None, None, "unknown")
    with monkeypatch.context() as patch:
        patch.setattr(plan, "find_target", lambda *_: unknown)
        with pytest.raises(LmError, match="peak of some GPU is not known") as caught:
            prepare("runs/x", preset=raw, hours=1.0)
        assert "--tokens" in caught.value.hint
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(LmError, match="each would measure"):
        prepare("runs/x", preset=raw, hours=1.0)


def test_a_run_and_the_same_command_again(lm, tiny):
    first = lm("train", "--preset", "tiny.yaml", "--data", "data")
    assert first.code == 0, first.err
    assert "trained 4 steps" in first.out
    assert "bits per byte" in first.out
    assert "lm eval runs/tiny" in first.out
    assert "lm generate --checkpoint runs/tiny" in first.out
    assert "step 1/4  loss" in first.err
    again = lm("train", "--preset", "tiny.yaml", "--data", "data")
    assert again.code == 0
    assert "nothing to do" in again.out
    other = lm("train", "--preset", "tiny.yaml", "--data", "data", "--seed", "4")
    assert other.code == 2
    assert "train.seed" in other.err
    assert "--resume" in other.err


def test_json_is_one_document(lm, tiny):
    done = lm("train", "runs/x", "-p", "tiny.yaml", "-d", "data", "--json", "--quiet")
    assert done.err == ""
    document = json.loads(done.out)
    assert document["run"] == "runs/x"
    assert document["reason"] == "finished"
    assert document["step"] == document["total_steps"] == 4
    assert document["validation"]["bits_per_byte"] > 0


def test_resume_finds_the_last_run_and_takes_a_checkpoint(lm, tiny):
    lm("train", "runs/x", "-p", "tiny.yaml", "-d", "data")
    more = lm("train", "--resume", "--override", "train.steps=6")
    assert more.code == 0, more.err
    assert "resuming runs/x" in more.err
    assert "trained 6 steps" in more.out
    assert lm("train", "--resume", "runs/x/checkpoints/step-00000006").code == 0
    old = lm("train", "--resume", "runs/x/checkpoints/step-00000004")
    assert old.code == 2
    assert "not the newest" in old.err


def test_print_config_is_the_resolved_configuration_and_writes_nothing(lm, tiny):
    done = lm("train", "-p", "tiny.yaml", "-d", "data", "--print-config", "--tokens", "1024", "--lr", "1e-3")
    config = yaml.safe_load(done.out)
    assert config["train"]["steps"] == 8
    assert config["optim"]["lr"] == 1e-3
    assert config["model"]["vocab_size"] == 257
    assert not (tiny / "runs").exists()


def test_flags_win_over_set_and_set_over_the_preset(lm, tiny):
    done = lm(
        "train", "-p", "tiny.yaml", "-d", "data", "--print-config", "--json",
        "--set", "train.steps=7", "--set", "optim.lr=0.5", "--lr", "0.25",
    )  # fmt: skip
    config = json.loads(done.out)
    assert config["train"]["steps"] == 7
    assert config["optim"]["lr"] == 0.25


def test_presets_are_listed(lm):
    names = [p["name"] for p in json.loads(lm("train", "--list-presets", "--json").out)]
    assert {"nano", "gpt2-124m", "small", "medium", "large", "xl"} <= set(names)
    assert "nano" in lm("train", "--list-presets").out


def test_dry_run_prints_the_plan_and_writes_nothing(lm, tiny):
    document = json.loads(lm("train", "-p", "tiny.yaml", "-d", "data", "--dry-run", "--json").out)
    assert document
    assert not (tiny / "runs").exists()


def test_a_mixture_on_the_command_line(lm, tiny, make_set):
    make_set("b=c")  # a path may hold an equals sign
    done = lm("train", "-p", "tiny.yaml", "-d", "data=0.75", "-d", "b=c", "--val", "none", "--print-config", "--json")
    sources = json.loads(done.out)["data"]["train"]
    assert [(s["path"], s["weight"]) for s in sources] == [("data/train", 0.75), ("b=c", 1.0)]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("-p", "nanoo"), 2, "did you mean nano"),
        (("-p", "tiny.yaml", "-d", "nowhere"), 2, "no such shard set"),
        (("-p", "tiny.yaml", "-d", "data", "--set", "optim.learning_rate=1"), 2, "Did you mean optim.lr"),
        (("-p", "tiny.yaml", "-d", "data", "--set", "modle.d_model=1"), 2, "is not a setting"),
        (("-p", "tiny.yaml", "-d", "data", "--steps", "5", "--tokens", "5k"), 2, "give one of them"),
        (("-p", "tiny.yaml", "-d", "data", "--device", "tpu"), 2, "not a device"),
        (
            ("-p", "tiny.yaml", "-d", "data", "--set", "model.context_length=65536", "--batch-tokens", "65536"),
            65,
            "too few",
        ),
        (("--resume",), 2, "no trained model"),
        (("--resume", "runs/none"), 2, "no run to resume"),
        (("runs/a", "--out", "runs/b"), 2, "given twice"),
    ],
)
def test_what_a_user_gets_wrong_is_a_sentence(lm, tiny, arguments, code, words):
    done = lm("train", *arguments)
    assert done.code == code, done.err
    assert words in done.err
    assert "Traceback" not in done.err


@pytest.mark.slow
def test_verify_resume_proves_it(lm, tiny):
    done = lm("train", "-p", "tiny.yaml", "-d", "data", "--verify-resume", "--json")
    document = json.loads(done.out)
    assert document["same"]
    assert document["undisturbed"] == document["killed"]
    assert not (tiny / "runs").exists()


def test_the_live_view_draws(tmp_path):
    from rich.console import Console

    from lmcore.tools.live import View, sparkline
    from lmcore.training.observe import RunInfo

    info = RunInfo(
        run_dir=tmp_path / "run",
        total_steps=100,
        first_step=0,
        batch_tokens=8192,
        context_length=256,
        device="cpu",
        dtype="bf16",
        dtype_reason="",
        compiled=False,
        world_size=1,
        parameters=3_000_000,
        active_parameters=3_000_000,
        peak_flops=1e11,
        peak_source="measured",
        train_flops=2e7,
        train_tokens=10**6,
        groups=[],
    )
    view = View()
    view._info = info
    view._pace.start(info)
    for step in range(1, 41):
        view.step(
            {
                "step": step, "loss": 9.0 - step / 10, "grad_norm": 1.0, "lr": 1e-2, "epoch": 0.1, "tokens": step,
                "grad_norms": {"matrices": 0.5},
                "time": {"step_s": 0.5, "tokens_per_s": 1, "data_wait_s": 0.0, "peak_bytes": 2**30, "mfu": 0.4},
                "metrics": {"router/dead": [0.0, 0.25], "router/entropy": [0.9, 0.7]},
            }
        )  # fmt: skip
    for width in (80, 120):
        with open(os.devnull, "w") as nowhere:
            console = Console(width=width, record=True, file=nowhere)
            console.print(view.render())
        text = console.export_text()
        assert all(len(line) <= width for line in text.splitlines())
        assert len(text.splitlines()) < 20  # of the 24 lines of a small terminal
        for words in ("40 / 100", "loss", "MFU 40 %", "of 0.1 TFLOP/s", "left 30s", "memory 1.00 GiB", "dead 25 %"):
            assert words in text
    assert sparkline([3.0, 2.0, 1.0])[0] > sparkline([3.0, 2.0, 1.0])[-1]


def test_the_curve_of_a_long_run_stays_small():
    """A million steps: the cost of drawing does not grow with them, and the curve keeps its shape."""
    from lmcore.tools.live import Pace

    pace = Pace()
    for step in range(5000):
        pace.step({"step": step, "loss": float(step), "time": {"step_s": 1.0}})
    assert len(pace.losses) < Pace.MOST
    assert pace.losses == sorted(pace.losses)
    assert pace.losses[0] < 10
    assert pace.losses[-1] > 4900


def test_only_what_can_work_is_advised_after_a_run(lm, tmp_path, monkeypatch):
    """Ids without a tokenizer give no text, and a run without validation data is evaluated on data that are named."""
    import numpy as np

    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(TINY)
    np.save(tmp_path / "ids.npy", (np.arange(6000) % 97).astype(np.uint16))
    assert lm("import", "ids.npy", "--out", "data").code == 0
    done = lm("train", "my run", "--preset", "tiny.yaml", "--data", "data", "--set", "train.steps=1", "--val", "none")
    assert done.code == 0, done.err
    assert "lm generate" not in done.out
    assert "lm eval 'my run' --data PATH" in done.out
    assert lm("eval", "my run", "--data", "data", "--allow-overlap").code == 0
