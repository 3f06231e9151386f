"""Training on a CUDA device: the same bits after a crash, every arithmetic, the plan against the measured memory."""

import json
import math
import subprocess
import sys

import pytest
import torch
from small_runs import Crash, Watch, crash, curve, hashes
from test_resume import start, wait_for_step

from lmcore.errors import LmError
from lmcore.optim.orthogonalize import orthogonalize
from lmcore.optim.reference import polar_factor
from lmcore.training.plan import draft, find_target, meta_optimizer, plan_memory

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore"),  # what the compiler warns of inside torch would end it
]
CUDA = ("train.device=cuda",)
CASES = {
    "muon": (),
    "adamw": ("optim.optimizer=adamw",),
    "8-bit adamw": ("optim.optimizer=adamw8bit", "model.d_model=64", "model.d_ff=128"),
    "bf16, accumulation, dropout": ("train.dtype=bf16", "train.micro_batch=1", "model.dropout=0.1"),
    "bf16, compiled": ("train.dtype=bf16", "train.compile=true"),
    "bf16, compiled block by block": ("train.dtype=bf16", "train.compile=true", "model.num_layers=10"),
    "recomputed": ("train.activation_checkpointing=full", "model.dropout=0.1"),
    "experts": ("model.ffn=e", "model.moe.num_experts=4", "train.dtype=bf16"),
    "Mamba, windows, resonance": ("model.pattern=MWF", "model.num_layers=3", "model.window=8", "train.dtype=bf16"),
    "FlashAttention-4, compiled": (
        "train.flash_attention=fa4",
        "train.dtype=bf16",
        "train.compile=true",
        "model.d_model=128",
        "model.context_length=512",
        "train.batch_tokens=4096",
    ),
    "background": ("train.checkpoint.background=true",),
    # Large enough for the fused kernels of attention, whose fastest backward pass sums in an order of its own.
    "heads of 64": ("train.dtype=bf16", "model.d_model=128", "model.context_length=512", "train.batch_tokens=4096"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_crash_changes_no_bit(lab, case):
    if "FlashAttention-4" in case:
        pytest.importorskip("flash_attn.cute")
    settings = ("train.steps=7", "train.checkpoint.every_steps=2", "train.eval.every_steps=3", *CUDA, *CASES[case])
    watch = Watch()
    lab.run("whole", *settings, watch=watch)
    assert any("compiled in" in said for said in watch.said) == ("compiled" in case)
    with pytest.raises(Crash):
        lab.run("broken", *settings, watch=Watch({5: crash}))
    lab.run("broken", *settings)
    assert hashes(lab.root / "broken") == hashes(lab.root / "whole")
    assert curve(lab.root / "broken") == curve(lab.root / "whole")


def test_sigkill_and_the_same_command_again(lab):
    options = ("--device", "cuda", "--set", "train.dtype=bf16")
    whole, broken = start(lab, "whole", *options), start(lab, "broken", *options)
    wait_for_step(lab, "broken", 60, broken)
    broken.kill()
    broken.communicate()
    again = start(lab, "broken", *options)
    assert again.communicate(timeout=120)[0].startswith("trained 150 steps")
    assert whole.communicate(timeout=120)[0].startswith("trained 150 steps")
    assert hashes(lab.root / "broken") == hashes(lab.root / "whole")


def test_the_losses_are_those_of_the_cpu(lab):
    lab.run("cpu")
    lab.run("gpu", *CUDA, "train.reduce=exact")
    for one, other in zip(curve(lab.root / "cpu"), curve(lab.root / "gpu"), strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=2e-4)


@pytest.mark.parametrize("settings", [("train.dtype=bf16",), ("train.dtype=fp16",), ("train.tf32=true",)], ids=str)
def test_every_arithmetic_learns_alike(lab, settings):
    lab.run("fp32", *CUDA, "train.steps=30")
    result = lab.run("other", *CUDA, "train.steps=30", *settings)
    exact = [line["loss"] for line in curve(lab.root / "fp32") if line["kind"] == "train"]
    assert result.loss is not None
    assert exact[0] - exact[-1] > 0.5
    assert result.loss == pytest.approx(sum(exact[-20:]) / 20, abs=0.1)


def test_compiled_and_eager_agree(lab):
    """Bits differ, losses hardly."""
    lab.run("eager", *CUDA)
    lab.run("compiled", *CUDA, "train.compile=true")
    for one, other in zip(curve(lab.root / "eager"), curve(lab.root / "compiled"), strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-3)


@pytest.mark.parametrize("shape", [(96, 384), (384, 96), (256, 256)])
def test_muons_update_is_close_to_the_polar_factor(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = orthogonalize(matrix.float().cuda())
    assert x.dtype == torch.bfloat16
    truth = polar_factor(matrix)
    found = x.double().cpu()
    assert (found * truth).sum() / (found.norm() * truth.norm()) > 0.98


def test_too_large_a_micro_batch_is_answered_with_what_fits(lab):
    memory = torch.cuda.get_device_properties(0).total_memory
    rows = 1 << math.ceil(math.log2(memory / (32 * 64 * 4 * 5)))
    with pytest.raises(LmError, match="out of memory at a micro-batch") as caught:
        lab.run("big", *CUDA, f"train.batch_tokens={rows * 32}", f"train.micro_batch={rows}", "train.prefetch=1")
    assert "largest micro-batch that fits" in caught.value.message
    torch.cuda.empty_cache()


MEASURE = """
import json, sys
import torch
from lmcore.model.model import LanguageModel
from lmcore.optim.optimizer import build_optimizer
from lmcore.training.batches import MicroBatch, Shape, StepBatch
from lmcore.training.compilation import compile_step
from lmcore.training.device import DTYPES
from lmcore.training.guards import LossScale
from lmcore.training.parallel import World
from lmcore.training.plan import draft
from lmcore.training.step import Stepper

config = draft(json.loads(sys.argv[1])).config
world = World(device=torch.device("cuda", 0))
model = LanguageModel(config.model).cuda().train()
model.compute_dtype = DTYPES["bf16"]
optimizer = build_optimizer(model.parameter_table(), config.optim, total_steps=10)
rows, micro = config.rows, config.train.micro_batch
stepper = Stepper(model, optimizer, world, Shape(rows, 1, micro), seed=1, exact=False, scale=LossScale(False))
x = torch.randint(0, config.model.vocab_size, (rows, config.model.context_length))
parts = list(zip(x.split(micro), x.split(micro)))
batch = StepBatch(0, 0, tuple(MicroBatch(0, i == len(parts) - 1, 0, a, b) for i, (a, b) in enumerate(parts)), 0.0)
if config.train.compile is True:
    seconds, problem = compile_step(stepper, batch)
    assert not problem, problem
torch.cuda.reset_peak_memory_stats()
for step in range(2):
    stepper.gradients(batch)
    stepper.update(step, 1.0)
print(torch.cuda.max_memory_allocated())
"""


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("kind", ["dense", "wide vocabulary", "Mamba"])
def test_peak_memory_is_within_five_percent_of_the_plan(kind, compiled):
    """What the tensors take, without the context and without what the allocator keeps in reserve."""
    fields = {"vocab_size": 8192, "d_model": 512, "num_layers": 12, "num_heads": 8, "context_length": 1024}
    fields |= {"wide vocabulary": {"vocab_size": 50_257}, "Mamba": {"pattern": "M"}}.get(kind, {})
    raw = {
        "model": fields,
        "train": {"steps": 10, "batch_tokens": 32 * 1024, "micro_batch": 16, "compile": compiled, "dtype": "bf16"},
    }
    config = draft(raw).config
    plan = plan_memory(config, find_target("cuda", "bf16"), meta_optimizer(config)[0]).parts
    planned = sum(size for part, size in plan.items() if part not in ("program", "allocator"))
    process = subprocess.run([sys.executable, "-c", MEASURE, json.dumps(raw)], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    measured = int(process.stdout.split()[-1])
    print(f"{kind}, {'compiled' if compiled else 'eager'}: planned {planned:,}, measured {measured:,}, {plan}")
    assert planned == pytest.approx(measured, rel=0.05)
