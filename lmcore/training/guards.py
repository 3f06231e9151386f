"""Guards: what a step's numbers say about the health of the run.

    non-finite   a NaN or infinity in the loss or in the gradients: the update is not run (never multiplied by zero: 0
    * NaN is
                 NaN). Too many of them and the run gives up.
    spike        the loss of a step is far above the last finite ones: robust z = (loss - median) / (1.4826 MAD) >
    threshold.

The guard remembers the losses of the last steps; they are saved with the run, so that a continued run judges alike.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from typing import Literal

from pydantic import Field

from lmcore.records import Count, Recorded
from lmcore.training.config import GuardConfig

Verdict = Literal["ok", "bad", "diverged", "spike"]

_MIN_HISTORY = 16
_RECENT_STEPS = 1000


class GuardState(Recorded):
    """What the guard of a run remembers."""

    losses: list[float] = Field(default_factory=list)
    bad_steps: list[Count] = Field(default_factory=list)
    in_a_row: Count = 0


class Guard:
    """Judges every step. `state` / `load` carry it over a restart."""

    def __init__(self, config: GuardConfig) -> None:
        self.config = config
        self.losses: deque[float] = deque(maxlen=config.spike_window)
        self.bad_steps: list[int] = []
        self.in_a_row = 0

    def judge(self, step: int, loss: float, grad_norm: float) -> Verdict:
        """The verdict on a step, before its update."""
        wrong = self.looks_wrong(loss, grad_norm)
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            self.in_a_row += 1
            self.bad_steps = [s for s in self.bad_steps if s > step - _RECENT_STEPS] + [step]
            over = self.in_a_row >= self.config.bad_in_a_row or len(self.bad_steps) >= self.config.bad_in_1000
            return "diverged" if over else "bad"
        self.in_a_row = 0
        if wrong:
            if self.config.on_spike == "warn":
                self.losses.append(loss)
            return "spike"
        self.losses.append(loss)
        return "ok"

    def looks_wrong(self, loss: float, grad_norm: float) -> bool:
        """Whether `judge` would object to a step; remembers nothing."""
        finite = math.isfinite(loss) and math.isfinite(grad_norm)
        return not finite or (self.config.on_spike != "off" and self.score(loss) > self.config.spike_score)

    def score(self, loss: float) -> float:
        """Robust z of a loss against the last finite ones; 0 while there are too few."""
        if len(self.losses) < min(_MIN_HISTORY, self.config.spike_window):
            return 0.0
        median = statistics.median(self.losses)
        deviation = statistics.median(abs(x - median) for x in self.losses)
        # A loss that barely moves must not make every ripple a spike: 0.5 % of the loss is the least deviation.
        return (loss - median) / max(1.4826 * deviation, 0.005 * abs(median), 1e-12)

    def state(self) -> GuardState:
        """What `load` needs."""
        return GuardState(losses=list(self.losses), bad_steps=self.bad_steps, in_a_row=self.in_a_row)

    def load(self, state: GuardState) -> None:
        """Continue from a saved state."""
        self.losses.clear()
        self.losses.extend(state.losses)
        self.bad_steps, self.in_a_row = list(state.bad_steps), state.in_a_row


class ScaleState(Recorded):
    """Where a loss scale stands."""

    scale: float = Field(ge=1.0, le=2.0**24)
    calm: Count = 0


class LossScale:
    """Dynamic loss scaling for fp16: a power of two, halved by a non-finite gradient, doubled after a calm while.

    Scaling by powers of two is exact, so it changes what underflows and nothing else.
    """

    START = 65536.0
    GROWTH_STEPS = 2000

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled
        self.scale = self.START if enabled else 1.0
        self.calm = 0

    def update(self, finite: bool) -> bool:
        """Adapt to a step; True when a non-finite gradient is explained by a scale that was too large."""
        if not self.enabled:
            return False
        if finite:
            self.calm += 1
            if self.calm >= self.GROWTH_STEPS and self.scale < 2.0**24:
                self.scale, self.calm = self.scale * 2, 0
            return False
        explained = self.scale > 1.0
        self.scale, self.calm = max(1.0, self.scale / 2), 0
        return explained

    def state(self) -> ScaleState:
        """What `load` needs."""
        return ScaleState(scale=self.scale, calm=self.calm)

    def load(self, state: ScaleState | None) -> None:
        """Continue from a saved state; None: as in the beginning."""
        if self.enabled and state is not None:
            self.scale, self.calm = state.scale, state.calm
