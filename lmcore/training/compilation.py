"""torch.compile for a step: when it pays, whether it is right, and a fallback that is said.

The decision is a function of the configuration and the device, never of a measurement, because compiled and eager
arithmetic differ in their last bits and a continued run must decide alike. On a CPU models of up to eight layers are
compiled as one graph. Deeper ones are compiled block by block, which compiles one block instead of all, and so is
everything on a GPU: there the gradient of a compiled embedding is summed by atomic additions, whose order changes from
run to run. Except in a deep model on a CPU the loss is compiled, too (`LanguageModel.fused_head`).

A compiled step trains only after it was compared with the eager one on the first batch: the loss and the gradient of
every parameter, within what the rounding of the data type explains. A compiler that is wrong on one kind of processor
is found there, and nothing of what it computed reaches the weights.
"""

from __future__ import annotations

import math
import time

import torch

from lmcore.errors import LmError
from lmcore.model.config import ModelConfig
from lmcore.training.batches import StepBatch
from lmcore.training.config import RunConfig
from lmcore.training.step import Probe, Stepper

WHOLE_GRAPH_LAYERS = 8
CPU_MIN_FLOPS = 5e14
"""On a CPU compiling takes 15 to 60 s and then saves a tenth to a quarter of the time: a matter for runs of an hour."""


def wants_compile(config: RunConfig, device: torch.device) -> bool:
    """Whether a run is compiled. "auto" means yes on CUDA, and on a CPU when the run is long."""
    if config.train.compile != "auto":
        return config.train.compile
    if device.type == "cuda":
        return True
    if device.type != "cpu":
        return False
    model = config.model
    matrices = model.num_layers * (4 * model.d_model**2 + 3 * model.d_model * model.d_ff)
    matrices += model.vocab_size * model.d_model
    return 6.0 * matrices * config.total_steps * config.batch_tokens >= CPU_MIN_FLOPS


def fuses_head(config: ModelConfig, device_type: str) -> bool:
    """Whether the loss is compiled when the model is."""
    return device_type == "cuda" or config.num_layers <= WHOLE_GRAPH_LAYERS


def compile_step(stepper: Stepper, batch: StepBatch) -> tuple[float, str]:
    """Compile, and compare with the eager step on a real batch without changing any state; (seconds, "" or why the run
    goes on without it).

    After a failure the stepper runs eagerly. All ranks fall back together.
    """
    began = time.monotonic()
    model, world = stepper.model, stepper.world
    problem = ""
    eager = stepper.probe(batch, by_rows=True)
    _tell_compiler()
    try:
        _compile(stepper)
        problem = differences(eager, stepper.probe(batch), model.compute_dtype or torch.float32, random=stepper.random)
    except (LmError, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # whatever the compiler or a missing C++ toolchain throws
        what = str(error).strip().splitlines()[0] if str(error).strip() else ""
        problem = f"torch.compile failed ({type(error).__name__}: {what})"
    if world.maximum(int(bool(problem))):
        problem = problem or "another rank cannot compile"
        run_eagerly(stepper)
    return time.monotonic() - began, problem


def run_eagerly(stepper: Stepper) -> None:
    """Take back what `compile_step` did."""
    stepper.forward = stepper.eager_forward
    stepper.model.fused_head = False
    for block in stepper.model.blocks:
        block._compiled_call_impl = None
    torch.compiler.reset()


def differences(eager: Probe, compiled: Probe, dtype: torch.dtype, *, random: bool) -> str:
    """What a compiled step computes otherwise than the eager one beyond rounding, in words; "" when nothing.

    random: the two drew different dropout masks, so that only the order of magnitude can be compared.
    """
    loss, gradient = (0.3, 0.9) if random else _TOLERANCE.get(dtype, _TOLERANCE[torch.bfloat16])
    if not _near(compiled.loss, eager.loss, loss):
        return f"the compiled step gives the loss {compiled.loss:.4g}, the eager one {eager.loss:.4g}"
    scale = math.sqrt(sum(norm**2 for norm, _ in eager.gradients.values()) / max(1, len(eager.gradients)))
    for name, (norm, seen) in eager.gradients.items():
        other, seen_there = compiled.gradients[name]
        room = gradient * (norm + _SMALL * scale)
        # A projection on random signs is as large as the difference of the gradients, on the average.
        if random:
            same = math.isfinite(other) and abs(other - norm) <= room
        else:
            same = abs(other - norm) <= room and abs(seen_there - seen) <= _SIGMAS * room
        if not same and math.isfinite(norm):
            return f"the compiled step gives the gradient of {name} the norm {other:.4g}, the eager one {norm:.4g}"
    return ""


_TOLERANCE = {torch.float32: (1e-3, 0.02), torch.float64: (1e-6, 1e-4), torch.bfloat16: (0.02, 0.15)}
"""By dtype: relative difference of the loss, and of a parameter's gradient."""
_SMALL = 0.1
"""A gradient this much smaller than the usual one may be lost in the rounding of the others."""
_SIGMAS = 4.0


def _near(a: float, b: float, tolerance: float) -> bool:
    if not math.isfinite(b):
        return True  # the eager step has trouble of its own, which the guard judges
    return abs(a - b) <= tolerance * abs(b)


def _compile(stepper: Stepper) -> None:
    model = stepper.model
    model.fused_head = fuses_head(model.config, stepper.world.device.type)
    if model.config.num_layers <= WHOLE_GRAPH_LAYERS and stepper.world.device.type != "cuda":
        stepper.forward = torch.compile(stepper.eager_forward, dynamic=False)
        return
    for block in model.blocks:
        block.compile(dynamic=False)


def _tell_compiler() -> None:
    """What torch.use_deterministic_algorithms tells the compiler, too: choose no kernel by a measurement."""
    import torch._inductor.config

    torch._inductor.config.deterministic = torch.are_deterministic_algorithms_enabled()
