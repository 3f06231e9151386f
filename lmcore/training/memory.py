"""When memory runs out in the middle of a run: what the plan says of it, and what to change."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from lmcore.errors import LmError
from lmcore.storage import format_bytes
from lmcore.training.config import RunConfig
from lmcore.training.plan import find_target, meta_optimizer, plan_memory


@contextlib.contextmanager
def out_of_memory(config: RunConfig) -> Iterator[None]:
    """Answer an exhausted memory with what can be done about it."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        text = str(error)
        if isinstance(error, RuntimeError) and not isinstance(error, torch.OutOfMemoryError):
            if "out of memory" not in text and "can't allocate memory" not in text:
                raise
        micro, planned = _planned_memory(config)
        recomputes = config.train.activation_checkpointing == "full"
        raise LmError(
            f"out of memory at a micro-batch of {micro} x {config.model.context_length:,} tokens "
            f"({text.splitlines()[0] if text else type(error).__name__}).{planned}",
            hint="In this order: a smaller --set train.micro_batch=N (the result stays the same), "
            f"{'' if recomputes else '--set train.activation_checkpointing=full, '}"
            "a shorter model.context_length, a smaller model. "
            "See what fits with: lm train --dry-run",
        ) from error


def _planned_memory(config: RunConfig) -> tuple[int | str, str]:
    """The micro-batch and a sentence on what the planner makes of it; empty when it cannot tell."""
    try:
        target = find_target(config.train.device, config.train.dtype)
        memory = plan_memory(config, target, meta_optimizer(config)[0])
    except Exception:  # memory is exhausted: advice must not fail a second time
        return config.train.micro_batch, ""
    if target.memory is None or memory.largest_micro_batch is None:
        return memory.micro_batch, ""
    room = f"of the {format_bytes(target.memory)} of {target.name}"
    return memory.micro_batch, (
        f" The plan says {format_bytes(memory.total)} {room}; the largest micro-batch that fits an otherwise "
        f"idle machine is {memory.largest_micro_batch:,}."
    )
