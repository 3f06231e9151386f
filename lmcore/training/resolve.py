"""Every "auto" of a configuration, decided for this machine and this number of ranks.

The answers are functions of the configuration, the device and the ranks, never of a measurement: a run that is
continued must decide alike.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from lmcore.errors import LmError
from lmcore.model.plan import plan_model
from lmcore.training import device as machine
from lmcore.training.compilation import wants_compile
from lmcore.training.config import RunConfig
from lmcore.training.lanes import choose_lanes
from lmcore.training.plan import find_target, meta_optimizer, plan_memory, usual_rows


def resolve(
    config: RunConfig, device: torch.device, world_size: int = 1, *, recorded: frozenset[str] = frozenset()
) -> RunConfig:
    """The configuration with every "auto" decided for this machine.

    recorded: settings that nobody asked for now, decided earlier for what may have been another number of ranks; they
    give way where they do not fit.
    """
    train = config.train
    dtype, _ = machine.resolve_dtype(train.dtype, device)
    rows = config.rows
    reduce = train.reduce if train.reduce != "auto" else ("exact" if device.type == "cpu" else "fast")
    compiled = wants_compile(config, device)
    if train.shard == "full" and world_size > 1:
        for key, value, unfit in (
            ("reduce", "exact", train.reduce == "exact"),
            ("compile", "true", train.compile is True),
        ):
            if unfit and f"train.{key}" not in recorded:
                raise LmError(
                    f"train.{key} = {value} is not possible with train.shard = full.", hint="Leave it at auto."
                )
        reduce, compiled = "fast", False
    if reduce == "exact":
        lanes = choose_lanes(rows, world_size) if train.lanes == "auto" else train.lanes
    else:
        lanes = world_size
    if rows % lanes or lanes % world_size:
        raise LmError(
            f"{rows} rows per step cannot be divided into {lanes} lanes for {world_size} ranks.",
            hint=f"Choose train.batch_tokens as a multiple of {world_size * config.model.context_length:,}, and a "
            "number of ranks that is a power of two.",
        )
    per_lane = rows // lanes
    micro = train.micro_batch
    if micro == "auto":
        settled = {"lanes": lanes, "reduce": reduce, "compile": compiled}
        micro = _rows_of_a_pass(config, device, per_lane, world_size, settled)
    elif "train.micro_batch" in recorded:
        micro = math.gcd(micro, per_lane)
    elif per_lane % micro:
        fits = [n for n in range(1, per_lane + 1) if per_lane % n == 0]
        raise LmError(
            f"train.micro_batch = {micro} does not divide the {per_lane} rows of a lane ({rows} rows per step, {lanes} "
            f"lanes).",
            hint=f"Possible: {', '.join(map(str, fits))}.",
        )
    names = {value: name for name, value in machine.DTYPES.items()}
    return config.model_copy(
        update={
            "train": train.model_copy(
                update={
                    "dtype": names[dtype],
                    "reduce": reduce,
                    "lanes": lanes,
                    "micro_batch": micro,
                    "compile": compiled,
                }
            )
        }
    )


def _rows_of_a_pass(
    config: RunConfig, device: torch.device, per_lane: int, world_size: int, settled: dict[str, Any]
) -> int:
    """The usual rows, on a GPU fewer where the planner says that they do not fit.

    settled: the settings of `train` that are decided already.
    """
    model = config.model
    micro = usual_rows(per_lane, model.context_length, device.type)
    if device.type != "cuda" or micro == 1:
        return micro
    activations = 100 * micro * model.context_length * model.d_model * model.num_layers  # three times the usual
    if 16 * plan_model(model).parameters + activations < 0.5 * torch.cuda.get_device_properties(device).total_memory:
        return micro
    config = config.model_copy(update={"train": config.train.model_copy(update=settled)})
    target = find_target(str(device), config.train.dtype)
    return plan_memory(config, target, meta_optimizer(config)[0], devices=world_size).micro_batch
