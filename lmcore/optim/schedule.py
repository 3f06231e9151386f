"""Hyper-parameters as pure functions of the step.

Nothing here remembers anything: the value at step s of a run of n steps is a function of (settings, s, n), so a run
that is killed and continued, or continued with another number of ranks, sees the same numbers. Steps count from 0 and
`total_steps` is the number of steps; the last one is total_steps - 1.

`cosine_with_warmup` is the classical schedule that people learn with: 0 at step 0, the peak at `warmup_steps`, the
minimum from `total_steps` on. In a run the warm-up is (step + 1) / warmup_steps instead, so that no step is spent with
a learning rate of zero.
"""

from __future__ import annotations

import math
from typing import Literal

from lmcore.errors import LmError
from lmcore.optim.config import OptimConfig


def cosine_with_warmup(step: int, *, max_lr: float, min_lr: float, warmup_steps: int, total_steps: int) -> float:
    """Learning rate at `step`: linear from 0 to max_lr, then half a cosine down to min_lr, then min_lr.

    step < warmup_steps: max_lr * step / warmup_steps. Up to total_steps: min_lr + (max_lr - min_lr) (1 + cos(pi x)) / 2
    with x the share of the way from warmup_steps to total_steps. After: min_lr.
    """
    _check(step, warmup_steps, total_steps)
    if step < warmup_steps:
        return max_lr * step / warmup_steps
    return min_lr + (max_lr - min_lr) * _half_cosine(_share(step, warmup_steps, total_steps))


def wsd(
    step: int,
    *,
    total_steps: int,
    warmup_steps: int,
    cooldown_fraction: float = 0.65,
    final_fraction: float = 0.05,
    shape: Literal["linear", "1-sqrt"] = "linear",
) -> float:
    """Multiplier at `step`: warm-up, stable at 1, then down to `final_fraction` at `total_steps`.

    The way down takes the last `cooldown_fraction` of the run but never starts inside the warm-up. `1-sqrt` falls
    as 1 - sqrt(x) (arXiv:2405.18392), `linear` as 1 - x, x the share of the cooldown that is over.
    """
    _check(step, warmup_steps, total_steps)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    start = max(warmup_steps, total_steps - round(cooldown_fraction * total_steps))
    x = _share(step, start, total_steps) if step >= start else 0.0
    down = 1 - math.sqrt(x) if shape == "1-sqrt" else 1 - x
    return final_fraction + (1 - final_fraction) * down


def multiplier(step: int, config: OptimConfig, total_steps: int) -> float:
    """Factor on every group's peak learning rate at `step` of a run of `total_steps`, in [0, 1]."""
    config = config.resolved(total_steps)
    warmup_steps = min(config.warmup_steps or 0, total_steps)
    _check(step, warmup_steps, total_steps)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if config.schedule == "constant":
        return 1.0
    if config.schedule == "wsd":
        return wsd(
            step,
            total_steps=total_steps,
            warmup_steps=warmup_steps,
            cooldown_fraction=config.cooldown_fraction,
            final_fraction=config.final_fraction,
            shape=config.cooldown_shape,
        )
    share = _share(step, warmup_steps, total_steps)
    down = _half_cosine(share) if config.schedule == "cosine" else 1 - share
    return config.final_fraction + (1 - config.final_fraction) * down


def momentum_at(step: int, config: OptimConfig, total_steps: int) -> float:
    """Muon's momentum at `step`: rises linearly from momentum_start to momentum."""
    rise = config.resolved(total_steps).momentum_warmup_steps or 0
    share = min(1.0, step / rise) if rise else 1.0
    return config.momentum_start + (config.momentum - config.momentum_start) * share


def weight_decay_at(step: int, config: OptimConfig, total_steps: int) -> float:
    """Weight decay of the Muon group at `step`."""
    base = config.resolved(total_steps).weight_decay or 0.0
    return base * _half_cosine(min(1.0, step / total_steps)) if config.weight_decay_schedule == "cosine" else base


def _share(step: int, start: int, end: int) -> float:
    return 1.0 if step >= end else (step - start) / (end - start)


def _half_cosine(share: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * share))


def _check(step: int, warmup_steps: int, total_steps: int) -> None:
    if step < 0 or warmup_steps < 0 or total_steps < warmup_steps:
        raise LmError(
            f"a schedule needs 0 <= step and 0 <= warmup_steps <= total_steps; got step {step}, warmup_steps "
            f"{warmup_steps}, total_steps {total_steps}."
        )
