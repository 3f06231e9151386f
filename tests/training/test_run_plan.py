"""The plan of a run: measured memory, impossible claims, lengths, and where its numbers come from."""

import sys

import pytest
import torch
from small_runs import TINY

from lmcore.config import merge
from lmcore.errors import LmError
from lmcore.model.memory import trace_pass
from lmcore.training.config import read_preset
from lmcore.training.plan import (
    Target,
    _most_rows,
    draft,
    find_target,
    list_parameters,
    meta_optimizer,
    plan_memory,
    plan_run,
    tokens_in,
)
from lmcore.training.rundir import read_metrics

MODEL = {"vocab_size": 1000, "d_model": 128, "num_layers": 4, "num_heads": 4, "context_length": 256}
TRAIN = {"steps": 100, "batch_tokens": 4096}
GPU = Target("H100", "cuda", "bf16", 989e12, 80 * 10**9, "data sheet")

MAMBA = {
    "model": {
        "vocab_size": 8192,
        "d_model": 512,
        "num_layers": 12,
        "num_heads": 8,
        "context_length": 1024,
        "pattern": "M",
        "d_ff": 0,
    },
    "train": {"batch_tokens": 32 * 1024},
}

LARGE = {"vocab_size": 8192, "d_model": 512, "num_layers": 6, "num_heads": 8, "context_length": 512, "d_ff": 0}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="a peak of memory is counted otherwise")
@pytest.mark.parametrize(
    ("changes", "train", "optimizer"),
    [
        ({}, {"micro_batch": 2, "dtype": "fp32"}, "muon"),
        ({}, {"batch_tokens": 4096, "micro_batch": 1, "lanes": 4, "dtype": "fp32"}, "muon"),
        ({"num_kv_heads": 2, "gate": "elementwise"}, {"micro_batch": 4, "dtype": "bf16"}, "adamw"),
        ({"vocab_size": 50304}, {"micro_batch": 1, "dtype": "bf16"}, "muon"),
        ({"pattern": "AF"}, {"micro_batch": 2, "dtype": "fp32"}, "adamw"),
        ({"d_model": 768, "num_heads": 12}, {"micro_batch": 2, "dtype": "fp32"}, "adamw8bit"),
        ({}, {"micro_batch": 4, "dtype": "bf16", "compile": True}, "muon"),
        ({"d_model": 256, "num_layers": 12}, {"micro_batch": 4, "dtype": "fp32", "compile": True}, "muon"),
    ],
    ids=str,
)
def test_peak_memory_is_within_ten_percent_of_that_of_a_run(lab, changes, train, optimizer):
    model = LARGE | changes
    settings = {"batch_tokens": train["micro_batch"] * model["context_length"], "lanes": 1} | train | {"steps": 3}
    settings |= {"eval": {"every_steps": 0}}
    raw = {"model": model, "optim": {"optimizer": optimizer}, "train": settings}
    config = draft(merge(TINY, raw)).config
    planned = plan_memory(config, Target("cpu", "cpu", train["dtype"], None, None, ""), meta_optimizer(config)[0])
    lab.run_ranks(1, "run", *_settings(raw))
    measured = max(line["time"]["peak_bytes"] for line in read_metrics(lab.root / "run") if line["kind"] == "train")
    assert planned.total == pytest.approx(measured, rel=0.1), (planned.total / measured, planned.parts)


def _settings(raw, prefix=""):
    """A nested configuration as the KEY=VALUE of --set."""
    for key, value in raw.items():
        if isinstance(value, dict):
            yield from _settings(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}={value}"


def test_the_parts_of_the_memory_are_the_known_sizes():
    drafted = draft({"model": MODEL, "train": TRAIN | {"micro_batch": 2}})
    plan = plan_run(drafted, GPU)
    parts = plan.memory.parts
    assert parts["weights"] == 4 * plan.model.parameters
    assert parts["gradients"] == 4 * plan.model.parameters
    matrices = next(g["parameters"] for g in plan.groups if g["optimizer"] == "muon")
    assert parts["optimizer"] == 8 * plan.model.parameters - 4 * matrices
    assert plan.memory.micro_batch == 2
    assert plan.checkpoint_bytes == parts["weights"] + parts["optimizer"]
    divided = plan_run(drafted, GPU, devices=4).memory.parts
    assert divided["gradients"] == 4 * plan.model.parameters  # they are exchanged where they are
    assert divided["optimizer"] == parts["optimizer"] // 4


@pytest.mark.parametrize("width", [256, 1024])
def test_no_part_of_the_memory_is_less_than_nothing(width):
    """Few tokens in a wide model: at the peak gradients have taken the place of activations."""
    raw = {
        "model": LARGE | {"d_model": width},
        "train": {"steps": 3, "batch_tokens": 512, "micro_batch": 1, "lanes": 1},
    }
    drafted = draft(raw)
    memory = plan_memory(
        drafted.config, Target("cpu", "cpu", "fp32", None, None, ""), meta_optimizer(drafted.config)[0]
    )
    assert min(memory.parts.values()) >= 0
    assert memory.parts["activations"] > 0


def test_sharded_weights_are_planned_as_a_share_and_the_layers_that_are_whole():
    drafted = draft({"model": MODEL, "train": TRAIN | {"micro_batch": 2, "shard": "full"}})
    plan = plan_run(drafted, GPU, devices=4)
    parts, total = plan.memory.parts, plan.model.parameters
    assert parts["weights"] == parts["gradients"] == total
    table = meta_optimizer(drafted.config)[1]
    block = sum(row.parameter.numel() for row in table if row.name.startswith("blocks.0."))
    outside = total - MODEL["num_layers"] * block
    assert parts["gathered layers"] == 4 * (outside + 2 * block)
    assert "gathered layers" not in plan_run(drafted, GPU).memory.parts


def test_the_largest_micro_batch_fits_and_one_more_does_not():
    drafted = draft({"model": MODEL, "train": {"steps": 10, "batch_tokens": 256 * 512}})
    tight = Target("card", "cuda", "bf16", 1e12, 2 << 30, "")
    largest = plan_run(drafted, tight).memory.largest_micro_batch
    assert largest is not None
    assert largest > 1

    def total(rows):
        raw = {"model": MODEL, "train": {"steps": 10, "batch_tokens": 256 * rows, "micro_batch": rows}}
        return plan_run(draft(raw), tight).memory.total

    assert total(largest) <= 2 << 30 < total(largest * 2)


def test_rows_chosen_by_themselves_fit_and_divide_the_step():
    raw = {"model": MODEL, "train": {"steps": 10, "batch_tokens": 256 * 96}}
    sizes = []
    for memory in (900 << 20, 1000 << 20, 8 << 30):
        plan = plan_run(draft(raw), Target("card", "cuda", "bf16", 1e12, memory, "")).memory
        assert plan.total <= memory
        assert 96 % plan.micro_batch == 0
        sizes.append(plan.micro_batch)
    assert sizes[0] < sizes[1] < sizes[2] == 96


@pytest.mark.parametrize(
    ("preset", "changes", "rows", "measured", "close"),
    [
        ("gpt2-124m", {}, 64, 25.2e9, 0.02),
        ("xl", {}, 16, 70.9e9, 0.06),
        pytest.param("gpt2-124m", MAMBA, 16, 13_621_922_816, 0.07, marks=pytest.mark.slow),
    ],
    ids=["124M", "1B", "Mamba"],
)
def test_the_plan_for_a_gpu_is_what_was_measured_on_one(preset, changes, rows, measured, close):
    """Measured by benchmarks/gpu.py and tests/training/test_cuda.py on an H200 with torch 2.11: bytes of all tensors at
    the peak of a compiled step. The product of the gate was kept for the backward pass then; it is taken off."""
    train = {"steps": 10, "tokens": None, "micro_batch": rows, "compile": True, "activation_checkpointing": "none"}
    config = draft(merge(read_preset(preset)[1], {"model": {"vocab_size": 50_257}}, changes, {"train": train})).config
    parts = plan_memory(config, GPU, meta_optimizer(config)[0]).parts
    planned = sum(size for part, size in parts.items() if part not in ("program", "allocator"))
    model = config.model
    product = model.num_layers * rows * model.context_length * model.d_ff * 2
    assert planned == pytest.approx(measured - product, rel=close)


@pytest.mark.parametrize(
    "changes", [{"ffn": "e", "moe": {"num_experts": 4}}, {"dropout": 0.1}, {"depth": "m"}], ids=str
)
def test_blocks_that_are_not_compiled_need_what_they_need_without_a_compiler(changes):
    config = draft({"model": MODEL | changes, "train": TRAIN}).config.model
    eager, compiled = (trace_pass(config, rows=4, device_type="cuda", compiled=c) for c in (False, True))
    assert compiled.kept <= 1.02 * eager.kept


def test_a_run_that_does_not_fit_is_told_what_to_do():
    large = MODEL | {"d_model": 2048, "num_heads": 16, "num_layers": 24}
    plan = plan_run(draft({"model": large, "train": TRAIN}), Target("small", "cuda", "bf16", 1e12, 4 << 30, ""))
    assert plan.memory.largest_micro_batch == 0
    assert any("not even one row fits" in note and "adamw8bit" in note for note in plan.notes)


def test_the_plan_is_that_of_its_rows_on_both_sides_of_the_switch_of_the_loss_to_chunks():
    """On a GPU 5 rows of 2,048 tokens and 50,304 ids hold all logits at once, 6 rows work in chunks and need less."""
    model = MODEL | {"vocab_size": 50_257, "context_length": 2048, "num_layers": 2}
    peaks = {}
    for rows in (5, 6, 16):
        config = draft({"model": model, "train": {"steps": 1, "batch_tokens": rows * 2048, "micro_batch": rows}}).config
        parts = plan_memory(config, GPU, meta_optimizer(config)[0]).parts
        true = trace_pass(config.model, rows=rows, dtype=torch.bfloat16, device_type="cuda", compiled=True)
        assert parts["activations"] == true.kept
        assert parts["activations"] + parts["temporary"] == true.peak
        peaks[rows] = true.peak
    assert peaks[6] < peaks[5]


def test_the_most_rows_are_found_on_either_side_of_the_switch():
    last = 4

    def peak(rows):
        return 10 + 20 * rows if rows <= last else 40 + 5 * rows

    for room in (0, 29, 30, 50, 64, 65, 69, 71, 90, 91, 200, 1000):
        fits = [rows for rows in range(1, 200) if peak(rows) <= room]
        assert _most_rows(peak, 32, last, room) == max(fits, default=0)
        # From few rows the other side is asked only when all of this side fits: what it finds fits, too.
        few = _most_rows(peak, 2, last, room)
        assert few == 0 if not fits else few in fits
    assert _most_rows(peak, 2, last, 1000) == 192
    assert _most_rows(lambda rows: 10 * rows, 1, 0, 55) == 5
    # A few rows are lost in a part that does not depend on them.
    assert _most_rows(lambda rows: max(1000, 20 * rows), 1, 0, 10_000) == 500


def test_a_long_scan_is_planned_with_the_loss_of_its_own_length():
    """Two short passes stand for it: 2,048 and 4,096 tokens hold all logits at once, 20,480 do not."""
    model = MODEL | {"vocab_size": 50_257, "context_length": 20_480, "num_layers": 1, "pattern": "M", "ffn": "-"}
    model |= {"d_model": 64, "mamba": {"chunk_size": 512}}
    config = draft({"model": model, "train": {"steps": 1, "batch_tokens": 20_480}}).config
    parts = plan_memory(config, GPU, meta_optimizer(config)[0]).parts
    true = trace_pass(config.model, rows=1, dtype=torch.bfloat16, device_type="cuda", compiled=True)
    assert parts["activations"] + parts["temporary"] == pytest.approx(true.peak, rel=0.02)


def test_what_is_set_already_is_not_advised():
    def notes(memory, optimizer="muon", recompute="full", micro_batch=16, **model):
        train = TRAIN | {"activation_checkpointing": recompute, "micro_batch": micro_batch}
        raw = {"model": MODEL | model, "train": train, "optim": {"optimizer": optimizer}}
        return " ".join(plan_run(draft(raw), Target("card", "cuda", "bf16", 1e12, memory, "")).notes)

    some = notes(660 << 20)
    assert "use --set train.micro_batch=" in some
    assert 16 % int(some.split("train.micro_batch=")[1].split()[0]) == 0
    assert "activation_checkpointing" not in some
    assert "activation_checkpointing=full" in notes(660 << 20, recompute="none")
    none = notes(500 << 20)
    assert "what does not depend on the rows takes" in none
    assert "adamw8bit" in none
    assert "activation_checkpointing" not in none
    assert "adamw8bit" not in notes(500 << 20, optimizer="adamw8bit")


def test_time_follows_from_the_utilisation():
    drafted = draft({"model": MODEL, "train": TRAIN})
    half, quarter = (plan_run(drafted, GPU, mfu=mfu) for mfu in (0.5, 0.25))
    assert half.seconds is not None
    assert quarter.seconds == pytest.approx(2 * half.seconds)
    assert half.tokens == 100 * 4096
    model_seconds = half.tokens * half.model.train_flops / (0.5 * 989e12)
    assert half.seconds == pytest.approx(model_seconds * (1 + half.optimizer_share))
    assert plan_run(drafted, GPU, mfu=0.5, devices=2).seconds == pytest.approx(half.seconds / 2)


def test_impossible_claims_are_refused_with_the_arithmetic():
    drafted = draft({"model": MODEL, "train": TRAIN})
    limit = 989e12 / plan_run(drafted, GPU).model.train_flops
    fine = plan_run(drafted, GPU, tokens_per_s=0.5 * limit)
    assert fine.mfu == pytest.approx(0.5)
    with pytest.raises(LmError, match=r"are impossible.*130 % of the peak of 1 x H100"):
        plan_run(drafted, GPU, tokens_per_s=1.3 * limit)
    assert plan_run(drafted, GPU, tokens_per_s=1.3 * limit, devices=2).mfu == pytest.approx(0.65)
    for mfu in (1.01, 0.0, -1.0):
        with pytest.raises(LmError, match="is impossible"):
            plan_run(drafted, GPU, mfu=mfu)


def test_an_unknown_peak_gives_no_time_rather_than_a_guess():
    unknown = Target("New GPU", "cuda", "bf16", None, None, "unknown")
    drafted = draft({"model": MODEL, "train": TRAIN})
    plan = plan_run(drafted, unknown)
    assert plan.seconds is None
    assert plan.tokens_per_s is None
    assert plan.memory.largest_micro_batch is None
    with pytest.raises(LmError, match="cannot be judged"):
        plan_run(drafted, unknown, tokens_per_s=1.0)
    with pytest.raises(LmError, match="hours cannot be turned"):
        tokens_in(1.0, drafted, unknown)


def test_lengths_in_tokens_hours_and_by_size():
    assert draft({"model": MODEL, "train": TRAIN}, tokens=409_600_000).config.total_steps == 100_000
    drafted = draft({"model": MODEL, "train": TRAIN})
    tokens = tokens_in(2.0, drafted, GPU, mfu=0.5)
    plan = plan_run(draft({"model": MODEL, "train": TRAIN}, tokens=tokens), GPU, mfu=0.5)
    assert plan.seconds == pytest.approx(7200 * (1 + plan.optimizer_share), rel=0.01)
    free = draft({"model": MODEL})
    assert any("12 tokens per parameter" in note for note in free.notes)
    assert plan_run(free, GPU).tokens_per_parameter == pytest.approx(12, rel=0.1)


def test_vocabulary_is_given_or_assumed_and_said(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where no data lie
    without = draft({"model": {k: v for k, v in MODEL.items() if k != "vocab_size"}, "train": TRAIN})
    assert without.config.model.vocab_size == 50_257
    assert any("the vocabulary is assumed" in note for note in without.notes)
    assert draft({"model": MODEL, "train": TRAIN}).config.model.vocab_size == 1000


def test_targets_by_name():
    target = find_target("h100")
    assert (target.device_type, target.dtype, target.peak_flops) == ("cuda", "bf16", 989e12)
    assert find_target("a100", "fp32").peak_flops == 156e12
    here = find_target("cpu")
    assert here.peak_flops is not None
    assert here.memory is not None
    with pytest.raises(LmError, match="not a device") as caught:
        find_target("h1000")
    assert "H100" in caught.value.hint


def test_every_parameter_is_listed_with_its_true_beginning():
    drafted = draft(
        {"model": MODEL | {"pattern": "AMRF", "ffn": "de", "depth": "-m", "mtp": {"depths": 1}}, "train": TRAIN}
    )
    rows = {row["parameter"]: row for row in list_parameters(drafted.config)}
    from lmcore.model.model import LanguageModel

    model = LanguageModel(drafted.config.model)
    assert set(rows) == {name for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        initial = rows[name]["initial"]
        assert rows[name]["shape"] == list(parameter.shape)
        if initial.startswith("normal"):
            drawn = float(parameter.detach()[: MODEL["vocab_size"]].std())
            assert float(initial.split()[-1]) == pytest.approx(drawn, rel=0.15)
        elif ".." not in initial:
            torch.testing.assert_close(
                parameter.detach(), torch.full_like(parameter, float(initial)), rtol=1e-3, atol=0
            )
        assert rows[name]["group"]
