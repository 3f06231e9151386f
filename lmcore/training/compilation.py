"""torch.compile for a step: when it pays, a warm-up that is timed apart, and a fallback that is said.

The decision is a function of the configuration and the device, never of a measurement, because compiled and eager
arithmetic differ in their last bits and a continued run must decide alike. On a CPU models of up to eight layers are
compiled as one graph. Deeper ones are compiled block by block, which compiles one block instead of all, and so is
everything on a GPU: there the gradient of a compiled embedding is summed by atomic additions, whose order changes from
run to run. Except in a deep model on a CPU the loss is compiled, too (`LanguageModel.fused_head`).
"""

from __future__ import annotations

import time

import torch

from lmcore.errors import LmError
from lmcore.model.config import ModelConfig
from lmcore.model.model import LanguageModel
from lmcore.training.batches import StepBatch
from lmcore.training.config import RunConfig
from lmcore.training.parallel import World
from lmcore.training.step import Stepper

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


def compile_step(stepper: Stepper, model: LanguageModel, batch: StepBatch, world: World) -> tuple[float, str]:
    """Compile and warm up on a real batch without changing any state; (seconds, "" or why it failed).

    After a failure the stepper runs eagerly. All ranks fall back together.
    """
    began = time.monotonic()
    eager = stepper.forward
    problem = ""
    whole = model.config.num_layers <= WHOLE_GRAPH_LAYERS and world.device.type != "cuda"
    model.fused_head = fuses_head(model.config, world.device.type)
    _tell_compiler()
    try:
        if whole:
            stepper.forward = torch.compile(eager, dynamic=False)
        else:
            for block in model.blocks:
                block.compile(dynamic=False)
        stepper.warm_up(batch)
    except (LmError, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # whatever the compiler or a missing C++ toolchain throws
        problem = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
    if world.maximum(int(bool(problem))):
        problem = problem or "another rank could not compile"
        stepper.forward = eager
        model.fused_head = False
        for block in model.blocks:
            block._compiled_call_impl = None
        torch.compiler.reset()
    return time.monotonic() - began, problem


def _tell_compiler() -> None:
    """What torch.use_deterministic_algorithms tells the compiler, too: choose no kernel by a measurement."""
    import torch._inductor.config

    torch._inductor.config.deterministic = torch.are_deterministic_algorithms_enabled()
