"""One dial: from the size of a model and the length of a run follow batch, steps, learning rates and weight decay.

Rules fitted at larger scale, around a reference point (a 12-layer model, D_ref tokens in batches of B_ref):

    D = 12 P                                  tokens, P = parameters of hidden matrices and head
    B = B_ref (D / D_ref)^0.383               tokens per step, rounded to a power of two (arXiv:2505.13738)
    lr = lr_ref sqrt(B / B_ref)               every group
    wd = wd_ref sqrt(B / B_ref) D_ref / D     Muon: B / (lr wd D) stays constant; the weights remember the same share
                                              of every run (arXiv:2405.13698)

Small runs lie outside of what was fitted, and three bounds of ours hold there. They get at least MIN_STEPS steps. Their
learning rates do not fall below the reference's: 120 steps of 1,024 tokens (0.8M parameters, source text) ended at 2.02
nats per byte with the reference's rates, 2.05 with half of them and 2.32 with an eighth. And Muon's decay stays at or
below MAX_DECAY (0.9 gave 1.99 there, 0.1 gave 2.02). AdamW keeps its usual decay.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from lmcore.errors import LmError
from lmcore.optim.config import OptimConfig

REFERENCE_BATCH = 1 << 19
REFERENCE_TOKENS = 1.3e9
TOKENS_PER_PARAMETER = 12.0
MIN_STEPS = 500
MAX_DECAY = 1.0
DECAY_PER_STEP = 0.28 * 0.02
"""lr * weight_decay of Muon at the reference point."""


@dataclass(frozen=True)
class Scaling:
    """What follows from the dial."""

    tokens: int
    """Length of the run: steps * batch_tokens."""
    batch_tokens: int
    steps: int
    lr_factor: float
    """Multiplier of every default learning rate: sqrt(B / B_ref), at least 1."""
    decay_per_step: float
    """lr * weight_decay of the Muon group by the rule (the decay is bounded by MAX_DECAY)."""

    def optim(self, config: OptimConfig) -> OptimConfig:
        """`config` with the scaled values in place of every None; what the user set stays."""
        full = config.resolved(self.steps)
        changes: dict[str, object] = {}
        for name in ("lr", "embedding_lr", "head_lr", "scalar_lr"):
            if getattr(config, name) is None and not (name != "lr" and config.optimizer != "muon" and config.lr):
                changes[name] = getattr(full, name) * self.lr_factor
        if config.weight_decay is None and config.optimizer == "muon":
            lr = changes.get("lr", full.lr)
            assert isinstance(lr, float)
            changes["weight_decay"] = min(MAX_DECAY, self.decay_per_step / lr)
        return full.model_copy(update=changes)


def scale(
    *, parameters: int, context_length: int, tokens: int | None = None, batch_tokens: int | None = None
) -> Scaling:
    """Batch, steps, learning-rate factor and decay for a model and a run.

    parameters: of hidden matrices and head (embedding not counted unless it is the head). tokens: length of the run,
    None = 12 per parameter. batch_tokens: keep this batch instead of the rule's. The batch is a whole number of rows of
    context_length tokens. Raises LmError when the run is shorter than one batch of one row.
    """
    wanted = round(TOKENS_PER_PARAMETER * parameters) if tokens is None else tokens
    if wanted < context_length:
        raise LmError(
            f"{wanted:,} tokens are less than one row of {context_length:,} tokens.",
            hint="Train on more tokens, or with a shorter context_length.",
        )
    if batch_tokens is None:
        ideal = REFERENCE_BATCH * (wanted / REFERENCE_TOKENS) ** 0.383
        power = min(round(math.log2(ideal)), math.floor(math.log2(max(1.0, wanted / MIN_STEPS))))
        batch_tokens = max(1, 2**power // context_length) * context_length
    steps = max(1, round(wanted / batch_tokens))
    share = batch_tokens / REFERENCE_BATCH
    return Scaling(
        tokens=steps * batch_tokens,
        batch_tokens=batch_tokens,
        steps=steps,
        lr_factor=max(1.0, math.sqrt(share)),
        decay_per_step=DECAY_PER_STEP * share * REFERENCE_TOKENS / (steps * batch_tokens),
    )
