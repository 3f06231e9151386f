"""Does the machine compute what it should? A step is computed again from the same weights and rows, and the bits are
compared.

    the same bits            the machine is sound: what looks wrong about the step lies in the data or the model
    other bits               the machine miscalculated once (silent data corruption). A third computation decides: the
                             two that agree are right, and the step goes on with their gradients
    three different results  the machine cannot be trusted: nothing of the step is applied, and the run ends

Whatever is wrong in the weights themselves, or in the optimizer's own arithmetic, is beyond this. Bits are compared
where the algorithms are deterministic (train.deterministic); elsewhere only the loss and the norm of the gradients are,
coarsely, which still tells a NaN that comes again from one that does not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lmcore.training.batches import StepBatch
from lmcore.training.step import StepNumbers, Stepper

COARSE = 1e-2
"""Relative difference of loss and gradient norm that reordered sums cannot explain."""

_INTEGERS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}


@dataclass(frozen=True)
class Audit:
    """What a second look at a step found. The gradients that `numbers` measured are in `.grad`."""

    verdict: Literal["same", "transient", "unreliable"]
    numbers: StepNumbers
    differing: int = 0
    """Results of the first computation (tensors of gradients, the loss) that the second did not confirm."""


def audit(stepper: Stepper, batch: StepBatch, first: StepNumbers) -> Audit:
    """Compute a step again whose gradients were just computed. Costs its time once or twice more and memory for the
    gradients. Collective: every rank finds the same verdict."""
    exact = torch.are_deterministic_algorithms_enabled()
    results = [(first, stepper.held_gradients())]
    differing = 0
    for verdict in ("same", "transient"):
        stepper.model.reset_load()  # the experts' load counts once
        numbers = stepper.gradients(batch, stop=first.stop)
        gradients = stepper.held_gradients()
        for before, others in results:
            different = _differing(before, others, numbers, gradients, exact=exact)
            if not stepper.world.maximum(different):
                return Audit(verdict, numbers, differing)
            differing = differing or different
        results.append((numbers, gradients))
    return Audit("unreliable", first, differing)


def _differing(
    before: StepNumbers, others: list[Tensor | None], after: StepNumbers, gradients: list[Tensor | None], *, exact: bool
) -> int:
    """How many results of two computations differ: gradients, and the loss as one more."""
    if not exact:
        pairs = ((before.loss, after.loss), (before.grad_norm, after.grad_norm))
        return sum(not _close(a, b) for a, b in pairs)
    differing = sum(not _equal_bits(a, b) for a, b in zip(others, gradients, strict=True))
    return differing + int(repr(before.loss) != repr(after.loss))


def _close(a: float, b: float) -> bool:
    if not (math.isfinite(a) and math.isfinite(b)):
        return math.isfinite(a) == math.isfinite(b)
    return abs(a - b) <= COARSE * max(abs(a), abs(b))


def _equal_bits(a: Tensor | None, b: Tensor | None) -> bool:
    """Equal as bits: a NaN equals itself, and 0.0 is not -0.0."""
    if a is None or b is None:
        return a is b
    kind = _INTEGERS[a.element_size()]
    return torch.equal(a.view(kind), b.view(kind))
