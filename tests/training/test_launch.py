"""New runs, repeated commands, resumed runs: what may change, what may not, and that a change is really applied."""

import json
import shutil

import pytest
import torch
from small_runs import TINY, Crash, Watch, crash, curve, hashes

from lmcore.errors import LmError
from lmcore.model.model import LanguageModel
from lmcore.training import rundir
from lmcore.training.checkpoint import load_model, newest


def stopped(lab, name, at=6, *settings):
    with pytest.raises(Crash):
        lab.run(name, *settings, watch=Watch({at: crash}))


def test_the_same_command_says_that_nothing_is_left(lab):
    assert lab.run("run").reason == "finished"
    before = hashes(lab.root / "run")
    again = lab.run("run")
    assert again.reason == "nothing to do"
    assert again.validation["bits_per_byte"] > 0
    assert hashes(lab.root / "run") == before


def test_another_command_in_the_same_directory_is_refused_with_a_table(lab):
    stopped(lab, "run")
    with pytest.raises(LmError) as caught:
        lab.run("run", "model.d_model=64", "train.seed=3")
    assert "model.d_model" in caught.value.message
    assert "there: 32" in caught.value.message
    assert "here: 64" in caught.value.message
    assert "train.seed" in caught.value.message
    assert caught.value.code == 2


def test_a_command_without_the_data_of_the_run_points_to_resume(lab):
    stopped(lab, "run")
    with pytest.raises(LmError, match=r"holds a run.*no such shard set") as caught:
        lab.run("run", "data.train=/nowhere/set")
    assert caught.value.hint == f"Continue it as it is with: lm train --resume {lab.root / 'run'}"


def test_the_same_command_with_another_schedule_is_shown_how_to_change_the_run(lab):
    stopped(lab, "run")
    with pytest.raises(LmError) as caught:
        lab.run("run", "train.steps=24")
    # The warm-up follows from the length and differs too; only what was typed is offered.
    assert "train.steps" in caught.value.message
    assert f"lm train --resume {lab.root / 'run'} --override train.steps=24;" in caught.value.hint


def test_free_settings_may_change(lab):
    lab.run("whole")
    stopped(lab, "run")
    watch = Watch()
    lab.run("run", "train.log.every_steps=3", "train.checkpoint.keep=5", watch=watch)
    assert "changed from here on: train.checkpoint.keep was 2, is 5" in watch.said
    assert hashes(lab.root / "run") == hashes(lab.root / "whole")
    events = rundir.RunDirectory(lab.root / "run").events()
    changed = {c["setting"] for c in events[1]["changes"]}
    assert changed == {"train.log.every_steps", "train.checkpoint.keep"}


@pytest.mark.parametrize("setting", ["optim.lr=0.5", "train.steps=20", "train.batch_tokens=512", "train.dtype=bf16"])
def test_the_schedule_changes_only_by_override(lab, setting):
    stopped(lab, "run")
    with pytest.raises(LmError, match="--override") as caught:
        lab.run("run", setting, resume=True)
    assert caught.value.code == 2


@pytest.mark.parametrize("setting", ["model.d_model=64", "train.seed=1", "optim.optimizer=adamw", "data.order=random"])
def test_the_identity_never_changes(lab, setting):
    stopped(lab, "run")
    with pytest.raises(LmError, match="Start a new run"):
        lab.run("run", override=(setting,), resume=True)


def test_an_override_is_applied_and_lives_on(lab):
    stopped(lab, "run")
    stopped_at = 4
    with pytest.raises(Crash):
        lab.run("run", override=("optim.lr=0.005", "train.steps=16"), resume=True, watch=Watch({10: crash}))
    lab.run("run", resume=True)  # without repeating it
    lines = {line["step"]: line["lr"] for line in curve(lab.root / "run") if line["kind"] == "train"}
    assert max(lines) == 16
    assert lines[stopped_at] == pytest.approx(0.02, rel=0.3)
    assert all(lines[n] <= 0.005 for n in range(stopped_at + 1, 17))
    assert lines[6] == pytest.approx(0.005, rel=0.3)
    assert load_model(lab.root / "run").config.optim.lr == 0.005
    assert rundir.RunDirectory(lab.root / "run").config().optim.lr == 0.02
    # the original command still means this run
    assert lab.run("run").reason == "nothing to do"


def test_longer_than_before(lab):
    lab.run("run")
    result = lab.run("run", override=("train.steps=15",), resume=True)
    assert (result.reason, result.step) == ("finished", 15)


def test_damaged_checkpoints_are_passed_over_and_named(lab):
    lab.run("whole")
    stopped(lab, "run", 10)
    damaged = newest(lab.root / "run") / "optimizer.safetensors"
    raw = bytearray(damaged.read_bytes())
    raw[len(raw) // 2] ^= 1
    damaged.write_bytes(raw)
    watch = Watch()
    lab.run("run", resume=True, watch=watch)
    assert any("step-00000008" in text and "passed over" in text for text in watch.said)
    assert hashes(lab.root / "run") == hashes(lab.root / "whole")


def test_changed_data_is_refused_and_the_same_data_elsewhere_is_not(lab, make_set):
    stopped(lab, "run")
    moved = lab.data.parent / "moved"
    shutil.copytree(lab.data, moved, symlinks=True)
    lab.run("whole")
    lab.run("run", f"data.train={moved}", resume=True)
    assert hashes(lab.root / "run") == hashes(lab.root / "whole")

    stopped(lab, "other")
    another = make_set("another", documents=[b"something else entirely " * 40] * 9)
    with pytest.raises(LmError) as caught:
        lab.run("other", f"data.train={another.path}", "data.val=[]", resume=True)
    assert caught.value.code == 65
    assert str(another.path) in caught.value.message
    assert "is new" in caught.value.message


def test_a_truncated_shard_stops_the_run_before_a_step(lab):
    shard = next(lab.data.glob("shard-*.npy"))
    with open(shard, "ab") as file:
        file.truncate(shard.stat().st_size - 1)
    with pytest.raises(LmError) as caught:
        lab.run("run")
    assert caught.value.code == 65
    assert not (lab.root / "run" / "checkpoints").exists()


def test_context_longer_than_the_data(lab):
    with pytest.raises(LmError) as caught:
        lab.run("run", "model.context_length=65536", "train.batch_tokens=65536")
    assert caught.value.code == 65
    assert "too few" in caught.value.message


def test_data_seen_more_than_four_times_are_warned_of(lab, make_set):
    small = make_set("small", documents=[b"a" * 200, b"b" * 200])
    sets = {f"[{small.path}]": 1, f"{{{lab.data}: 0.001, {small.path}: 0.999}}": 1, f"[{lab.data}]": 0}
    for number, (data, expected) in enumerate(sets.items()):
        watch = Watch()
        lab.run(f"run-{number}", f"data.train={data}", "data.val=[]", watch=watch)
        told = [message for message in watch.said if "times in this run" in message]
        assert len(told) == expected, watch.said
        assert all(message.startswith(f"warning: {small.path}: seen ") for message in told)


def test_a_mixture_logs_realised_shares_and_validates_each_source(lab, make_set):
    from lmcore.data.split import split_set

    other = make_set("other", documents=[bytes([65 + n % 26]) * 200 for n in range(40)])
    split_set(other.path, fractions={"val": 0.2})
    mixture = f"data.train={{{lab.data}: 0.75, {other.path}: 0.25}}"
    result = lab.run("run", mixture)
    lines = [line for line in curve(lab.root / "run") if line["kind"] == "train"]
    shares = list(lines[-1]["shares"].values())
    assert sum(shares) == pytest.approx(1)
    assert shares[0] == pytest.approx(0.75, abs=0.12)
    assert list(lines[-1]["epochs"].values()) == [source.epochs for source in result.sources]
    assert [source.realised for source in result.sources] == shares
    assert [source.weight for source in result.sources] == [0.75, 0.25]
    assert set(result.validation["sources"]) == {"data", "other"}
    state = json.loads((newest(lab.root / "run") / "state.json").read_text())
    assert [s["weight"] for s in state["sources"]] == [0.75, 0.25]


@pytest.mark.parametrize("settings", [(), ("train.micro_batch=1", "model.moe.num_experts=2", "model.ffn=e")])
def test_the_training_loss_of_each_source_is_that_of_its_rows(lab, make_set, settings):
    from lmcore.data.sampler import Mixture
    from lmcore.data.stream import TokenStream

    other = make_set("other", documents=[bytes([65 + n % 26]) * 200 for n in range(40)])
    mixture = f"data.train={{{lab.data}: 0.6, {other.path}: 0.4}}"
    more = ("data.val=[]", "train.steps=3", *settings)
    launch = lab.prepare("whole", mixture, *more)
    lab.run("whole", mixture, *more)
    line = curve(lab.root / "whole")[0]

    config = launch.config
    model = LanguageModel(config.model)
    model.init_weights(config.train.seed)
    streams = [(TokenStream.open(source.path), source.weight) for source in config.data.train]
    samples = Mixture(streams, context_length=32, seed=config.train.seed)
    tokens = torch.from_numpy(samples.batch(0, 8).astype("int64"))
    origin = samples.locate(0, 8)[0]
    with torch.no_grad():
        logits = model(tokens[:, :-1])
    losses = torch.nn.functional.cross_entropy(logits.mT, tokens[:, 1:], reduction="none").mean(1)
    assert set(origin) == {0, 1}
    for number, source in enumerate(config.data.train):
        rows = origin == number
        found = line["sources"][source.path]
        assert found["tokens"] == rows.sum() * 32
        assert found["loss"] == pytest.approx(losses[torch.from_numpy(rows)].mean().item(), rel=1e-5)
    together = sum(s["loss"] * s["tokens"] for s in line["sources"].values()) / (8 * 32)
    assert together == pytest.approx(line["loss"], rel=1e-6)
    # and a killed run logs the same numbers
    stopped(lab, "run", 2, mixture, *more, "train.checkpoint.every_steps=1")
    lab.run("run", mixture, *more, "train.checkpoint.every_steps=1")
    assert curve(lab.root / "run") == curve(lab.root / "whole")


def test_sets_of_different_tokenizers_are_refused(lab, make_set):
    from lmcore.data.tokenizer import Tokenizer
    from tests.tiny_sets import write_manifest

    other = make_set("other")
    manifest = other.manifest
    tokenizer = Tokenizer.train(["a few words to train on"] * 5, 300)
    tokenizer.save(other.path / "tokenizer.json")
    manifest["tokenizer"] = tokenizer.entry().model_dump(mode="json")
    write_manifest(other.path, manifest)
    with pytest.raises(LmError, match="different tokenizers") as caught:
        lab.run("run", f"data.train=[{lab.data}, {other.path}]")
    assert caught.value.code == 65


def test_validation_agrees_with_lm_eval(lab):
    from lmcore.data.stream import TokenStream
    from lmcore.inference.evaluate import evaluate

    result = lab.run("run", "train.eval.tokens=1M")
    found = evaluate(load_model(lab.root / "run", device="cpu"), TokenStream.open(lab.data / "val"))
    windows = (found.tokens - 1) // 32 * 32
    assert abs(windows - found.tokens) <= 64
    assert result.validation["bits_per_byte"] == pytest.approx(found.bits_per_byte, rel=5e-3)


@pytest.mark.parametrize("peak", [1e7, 3.3e7, 1.01e8, 7.7e9])
def test_the_tokens_of_an_hour_lead_to_the_same_dial_again(lab, monkeypatch, peak):
    from lmcore.training import plan
    from lmcore.training.launch import prepare

    target = plan.Target("a device", "cpu", "fp32", peak, None, "a test")
    monkeypatch.setattr(plan, "find_target", lambda *_: target)
    raw = {"model": TINY["model"] | {"context_length": 24}, "data": {"train": str(lab.data)}}
    first = prepare(lab.root / "run", preset=raw, hours=1.0)
    tokens = first.origin["length"]["tokens"]
    assert tokens == first.config.total_steps * first.config.batch_tokens
    again = prepare(lab.root / "run", preset=raw, typed={"train": {"tokens": tokens}})
    assert again.config == first.config


def weights(path):
    return load_model(path, device="cpu").model.state_dict()


def test_a_run_begins_with_the_weights_of_another(lab):
    lab.run("base")
    base = weights(lab.root / "base")
    # The learning rate of step 1 is so small that the weights are still those of the beginning.
    tiny_steps = ("train.steps=1", "optim.lr=1e-30", "optim.embedding_lr=1e-30", "optim.head_lr=1e-30",
                  "optim.scalar_lr=1e-30", "optim.weight_decay=0")  # fmt: skip
    source = lab.root / "base"
    lab.run("next", f"train.init_from={source}", *tiny_steps)
    after = weights(lab.root / "next")
    assert base.keys() == after.keys()
    assert all(torch.equal(base[name], after[name]) for name in base)
    lab.run("drawn", *tiny_steps)
    drawn = weights(lab.root / "drawn")
    assert not all(torch.equal(base[name], drawn[name]) for name in base)
    run = rundir.RunDirectory(lab.root / "next")
    newest_of_base = newest(source)
    commit = json.loads((newest_of_base / "COMMIT.json").read_text())
    assert run.config().train.init_from == str(source)
    assert run.events()[0]["weights"] == {
        "init_from": str(source),
        "checkpoint": str(newest_of_base),
        "step": 12,
        "model_sha256": commit["files"]["model.safetensors"]["sha256"],
    }
    # optimizer, data order and schedule begin anew
    assert curve(lab.root / "next")[0]["tokens"] == 256


def test_the_architecture_comes_with_the_weights_and_what_is_typed_is_added(lab):
    lab.run("base", "model.num_layers=1", "model.d_ff=48", "train.steps=1")
    source = lab.root / "base"
    config = lab.prepare("next", f"train.init_from={source}", "model.dropout=0.2").config.model
    assert (config.num_layers, config.d_ff, config.dropout) == (1, 48, 0.2)
    with pytest.raises(LmError, match="has shape") as caught:
        lab.run("wide", f"train.init_from={source}", "model.d_ff=64")
    assert caught.value.code == 65
    assert not (lab.root / "wide" / "config.yaml").exists()


def test_begun_with_weights_and_killed_at_any_time_gives_the_same_bits(lab):
    lab.run("base", "train.steps=3")
    begin = f"train.init_from={lab.root / 'base'}"
    lab.run("whole", begin)
    lab.run("base", override=("train.steps=4",), resume=True)  # the source goes on: its newest checkpoint is another
    stopped(lab, "run", 2, f"train.init_from={lab.root / 'base' / 'checkpoints' / 'step-00000003'}")
    stopped(lab, "run", 6, f"train.init_from={lab.root / 'base' / 'checkpoints' / 'step-00000003'}")
    lab.run("run", resume=True)
    assert hashes(lab.root / "run") == hashes(lab.root / "whole")
    with pytest.raises(LmError, match=r"train\.init_from"):
        lab.run("whole", f"train.init_from={lab.root / 'run'}")
    # the same command means the same run, although the source would now mean other weights
    assert lab.run("whole", begin).reason == "nothing to do"


def test_killed_before_its_first_checkpoint_it_needs_the_same_weights_again(lab):
    lab.run("base", "train.steps=3")
    source = lab.root / "base" / "checkpoints" / "step-00000003"
    stopped(lab, "run", 2, f"train.init_from={source}")
    shutil.rmtree(source)
    with pytest.raises(LmError, match="the weights that it begins with") as caught:
        lab.run("run", resume=True)
    assert caught.value.code == 65


def test_weights_of_another_tokenizer_are_refused(lab, make_set):
    from lmcore.data.tokenizer import Tokenizer
    from tests.tiny_sets import write_manifest

    lab.run("base", "train.steps=1")
    other = make_set("other")
    manifest = other.manifest
    tokenizer = Tokenizer.train(["a few words to train on"] * 5, 300)
    tokenizer.save(other.path / "tokenizer.json")
    manifest["tokenizer"] = tokenizer.entry().model_dump(mode="json")
    write_manifest(other.path, manifest)
    with pytest.raises(LmError, match="the same ids would mean other text") as caught:
        lab.run("next", f"train.init_from={lab.root / 'base'}", f"data.train={other.path}", "data.val=[]")
    assert caught.value.code == 65
    assert "tokenizer.json" in caught.value.hint
    assert not (lab.root / "next").exists()


def test_an_imported_model_can_be_trained_further(lab, tmp_path):
    from lmcore.inference.export import export_model
    from lmcore.inference.import_model import import_model

    lab.run("base", "train.steps=2")
    export_model(lab.root / "base", tmp_path / "exported")
    import_model(tmp_path / "exported", tmp_path / "imported")
    result = lab.run("next", f"train.init_from={tmp_path / 'imported'}", "train.steps=2")
    assert result.reason == "finished"
    lab.run("direct", f"train.init_from={lab.root / 'base'}", "train.steps=2")
    assert curve(lab.root / "next")[0]["loss"] == pytest.approx(curve(lab.root / "direct")[0]["loss"], rel=1e-6)


def test_validation_logs_how_much_attention_the_first_position_gets(lab):
    from lmcore.data.stream import TokenStream

    lab.run("run", "train.steps=2")
    line = curve(lab.root / "run")[-1]
    assert line["kind"] == "val"
    model = load_model(lab.root / "run", device="cpu").model
    stream = TokenStream.open(lab.data / "val")
    tokens = torch.from_numpy(stream.windows(torch.zeros(1).long().numpy(), 32).astype("int64"))
    expected = model.attention_sinks(tokens).tolist()
    assert len(expected) == 2
    assert line["metrics"]["attention/sink"] == pytest.approx(expected, rel=1e-5)
    lab.run("other", "train.steps=2", "train.eval.every_steps=1")  # looking changes nothing
    assert hashes(lab.root / "other") == hashes(lab.root / "run")


def test_validation_logs_both_losses_of_depth_routing(lab):
    from lmcore.data.stream import TokenStream

    lab.run("run", "train.steps=2", "model.depth=-m", "train.eval.tokens=33")
    line = curve(lab.root / "run")[-1]
    assert line["kind"] == "val"
    model = load_model(lab.root / "run", device="cpu").model.eval()
    tokens = torch.from_numpy(
        TokenStream.open(lab.data / "val").windows(torch.zeros(1).long().numpy(), 33).astype("int64")
    )
    found = {}
    for mode in ("causal", "topk"):
        model.set_depth_mode(mode)
        term = model.loss(tokens[:, :-1], tokens[:, 1:]).main
        found[mode] = (term.sum / term.count).item()
    assert line["loss"] == pytest.approx(found["causal"], rel=1e-5)
    assert line["topk_loss"] == pytest.approx(found["topk"], rel=1e-5)
    assert found["causal"] != found["topk"]
    lab.run("other", "train.steps=2", "train.eval.every_steps=1", "model.depth=-m")  # looking changes nothing
    assert hashes(lab.root / "other") == hashes(lab.root / "run")
