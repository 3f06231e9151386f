"""Settings of the optimizer: the section `optim` of a run.

Learning rates, decay and warm-up that are None are filled by `resolved`, with defaults that depend on the optimizer
and the length of the run; the resolved section is what a run saves. Everything here is constant over a run: what
changes from step to step is computed from these numbers and the step by `schedule.py`, never remembered.
"""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from lmcore.config import Config

REFERENCE_WIDTH = 768
"""Learning rates of embedding and head under Muon are given at this width and scale with its inverse square root."""


class OptimConfig(Config):
    """How the weights are updated."""

    optimizer: Literal["muon", "adamw", "adamw8bit"] = "muon"
    """muon: Muon for hidden matrices and experts, AdamW for the rest. adamw: AdamW for everything. adamw8bit: AdamW
    with 8-bit moments for large hidden matrices, 32-bit for the rest."""

    # ------------------------------------------------------------------------------ learning rates
    lr: float | None = Field(default=None, gt=0)
    """Peak learning rate of the hidden matrices. None: 0.02 for Muon with `scale: original`, 2e-3 for Muon with
    `match_rms_adamw`, 1e-3 for AdamW."""
    embedding_lr: float | None = Field(default=None, gt=0)
    """Peak learning rate of the embedding. Under Muon it is the value at width 768 and is multiplied by
    (d_model/768)^-0.5. None: 0.3 beside Muon, `lr` otherwise."""
    head_lr: float | None = Field(default=None, gt=0)
    """Peak learning rate of the output head, also of an embedding that is tied to it; scaled with the width like
    embedding_lr. None: 0.008 beside Muon, `lr` otherwise."""
    scalar_lr: float | None = Field(default=None, gt=0)
    """Peak learning rate of everything else: norms, biases, routers, convolutions, state-space and resonance
    parameters. None: 0.015 beside Muon, `lr` otherwise."""

    # ------------------------------------------------------------------------------ schedule
    schedule: Literal["wsd", "cosine", "linear", "constant"] = "wsd"
    """Shape of the learning rate after the warm-up. wsd: constant, then down over the last `cooldown_fraction`."""
    warmup_steps: int | None = Field(default=None, ge=0)
    """Steps of linear warm-up. None: 40 for Muon, 2,000 for AdamW, at most a twentieth of the run."""
    final_fraction: float = Field(default=0.05, ge=0, le=1)
    """The last learning rate as a fraction of the peak."""
    cooldown_fraction: float = Field(default=0.65, ge=0, le=1)
    """wsd: the share of the run in which the learning rate goes down."""
    cooldown_shape: Literal["linear", "1-sqrt"] = "linear"
    """wsd: the shape of the way down."""

    # ------------------------------------------------------------------------------ decay and clipping
    weight_decay: float | None = Field(default=None, ge=0)
    """Decoupled weight decay of the hidden matrices (the weight shrinks by lr * weight_decay per step). None: 0.1."""
    adam_weight_decay: float | None = Field(default=None, ge=0)
    """Decoupled weight decay of the other parameters that may decay. None: 0.001 beside Muon, `weight_decay`
    otherwise. Norms, biases, state-space and resonance scalars never decay."""
    weight_decay_schedule: Literal["constant", "cosine"] = "constant"
    """cosine: the decay of the Muon group falls to zero over the run."""
    clip: float | None = Field(default=None, ge=0)
    """Largest global gradient norm; larger gradients are scaled down. 0: off. None: off with Muon (which is blind to
    the scale of a gradient), 1.0 for AdamW."""

    # ------------------------------------------------------------------------------ AdamW
    betas: tuple[float, float] | None = None
    """AdamW's averaging constants. None: (0.8, 0.95) beside Muon, (0.9, 0.95) otherwise."""
    eps: float | None = Field(default=None, gt=0)
    """AdamW's epsilon, added outside the root. None: 1e-10 beside Muon, 1e-8 otherwise."""

    # ------------------------------------------------------------------------------ Muon
    momentum: float = Field(default=0.95, ge=0, lt=1)
    """Muon's momentum."""
    momentum_start: float = Field(default=0.85, ge=0, lt=1)
    """Muon's momentum at step 0; rises linearly to `momentum`."""
    momentum_warmup_steps: int | None = Field(default=None, ge=0)
    """Steps of that rise. None: 300, at most a fifth of the run."""
    nesterov: bool = True
    """Orthogonalise the momentum of the next step (Nesterov) instead of the current one."""
    method: Literal["polar-express", "newton-schulz"] = "polar-express"
    """Iteration that orthogonalises: Polar Express (arXiv:2505.16932) or the first Muon's quintic Newton-Schulz."""
    scale: Literal["original", "match_rms_adamw"] = "original"
    """Factor of a Muon update. original: sqrt(max(1, out/in)), lr carries over width. match_rms_adamw:
    0.2 sqrt(max(out, in)), the update has the RMS of AdamW's, so one lr serves both (arXiv:2502.16982)."""
    normuon: bool = False
    """Even out the size of Muon's update per neuron by a second moment (NorMuon, arXiv:2510.05491)."""
    normuon_beta2: float = Field(default=0.95, gt=0, lt=1)
    """Averaging constant of that second moment."""
    cautious: bool = True
    """Muon: decay only where the decay and the update agree in sign (the update would shrink the weight too)."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.betas is not None and not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas: both must lie in [0, 1), not {self.betas}")
        return self

    def resolved(self, total_steps: int) -> OptimConfig:
        """The same settings with every None filled in, for a run of `total_steps`."""
        muon = self.optimizer == "muon"
        lr = self.lr or ((0.02 if self.scale == "original" else 2e-3) if muon else 1e-3)
        decay = 0.1 if self.weight_decay is None else self.weight_decay
        filled: dict[str, object] = {
            "lr": lr,
            "embedding_lr": 0.3 if muon else lr,
            "head_lr": 0.008 if muon else lr,
            "scalar_lr": 0.015 if muon else lr,
            "warmup_steps": min(40 if muon else 2000, total_steps // 20),
            "weight_decay": decay,
            "adam_weight_decay": 0.001 if muon else decay,
            "clip": 0.0 if muon else 1.0,
            "betas": (0.8, 0.95) if muon else (0.9, 0.95),
            "eps": 1e-10 if muon else 1e-8,
            "momentum_warmup_steps": min(300, total_steps // 5),
        }
        return self.model_copy(update={name: value for name, value in filled.items() if getattr(self, name) is None})
