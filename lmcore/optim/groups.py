"""Which parameter is updated how: groups by the role of a parameter, never by its name.

With `optimizer: muon` the hidden matrices and experts go to Muon and the rest to AdamW; with `adamw` all go to AdamW.
A group shares one set of hyper-parameters. Every parameter is in exactly one group; the table of groups is what
`lm train` prints and what a run is identified by.

The optimizer knows nothing of models: it reads the table that a model makes of its parameters (`ParameterRow`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from torch import Tensor

from lmcore.optim.config import REFERENCE_WIDTH, OptimConfig
from lmcore.optim.muon import Layout

Kind = Literal["muon", "adamw", "adamw8bit"]

SMALLEST_8BIT = 4096
"""Tensors with fewer elements keep 32-bit moments: nothing to gain, and their blocks would be coarse."""


REST = frozenset({"router", "conv", "norm", "scalar"})
"""Roles of the group "scalars". A role that is not known here is a mistake, not a scalar."""


class ParameterRow(Protocol):
    """What the optimizer must know of a parameter (lmcore.model.parameters.ParameterInfo is one)."""

    @property
    def name(self) -> str: ...

    @property
    def parameter(self) -> Tensor: ...

    @property
    def role(self) -> str:
        """matrix and expert are hidden maps, (..., out, in); embedding, head, tied; the roles of REST are the rest."""

    @property
    def splits(self) -> tuple[int, ...]:
        """Output rows of each of the projections fused into one weight; () for a single one."""

    @property
    def decay(self) -> bool:
        """May weight decay touch it?"""


@dataclass(frozen=True)
class Group:
    """Parameters that share an update rule. lr and weight_decay are peaks; the schedule multiplies them."""

    name: str
    kind: Kind
    rows: tuple[ParameterRow, ...]
    lr: float
    weight_decay: float

    @property
    def parameters(self) -> list[Tensor]:
        return [row.parameter for row in self.rows]

    def layout(self, row: ParameterRow) -> Layout:
        return Layout(tuple(row.splits))


def parameter_groups(table: Iterable[ParameterRow], config: OptimConfig, *, total_steps: int = 1000) -> list[Group]:
    """Every parameter of the table in exactly one group, in the order matrices, embedding, head, scalars."""
    config = config.resolved(total_steps)
    members: dict[tuple[str, Kind, float, float], list[ParameterRow]] = {}
    seen: dict[int, str] = {}
    for row in table:
        assert id(row.parameter) not in seen, f"{row.name} and {seen[id(row.parameter)]} are the same parameter"
        seen[id(row.parameter)] = row.name
        if not row.parameter.requires_grad:
            continue
        members.setdefault(_key(row, config), []).append(row)
    order = ["matrices", "embedding", "head", "scalars"]
    keys = sorted(members, key=lambda key: (order.index(key[0]), key[1] != "muon", -key[3]))
    names = [key[0] for key in keys]
    groups = []
    for key in keys:
        name, kind, lr, decay = key
        if names.count(name) > 1:  # tell apart what the name alone does not
            name += "" if kind == keys[names.index(name)][1] and decay else " (32-bit)" if decay else " (no decay)"
        rows = tuple(members[key])
        if kind == "muon":
            for row in rows:
                Layout(tuple(row.splits)).check(row.parameter.shape, row.name)
        groups.append(Group(name, kind, rows, lr, decay))
    assert len({group.name for group in groups}) == len(groups), [group.name for group in groups]
    return groups


def _key(row: ParameterRow, config: OptimConfig) -> tuple[str, Kind, float, float]:
    """(group, update rule, lr, weight decay) of a parameter. `config` is resolved."""
    lr, embedding_lr, head_lr, scalar_lr = config.lr, config.embedding_lr, config.head_lr, config.scalar_lr
    decay, adam_decay = config.weight_decay, config.adam_weight_decay
    assert lr is not None, "the settings are not resolved"
    assert embedding_lr is not None
    assert head_lr is not None
    assert scalar_lr is not None
    assert decay is not None
    assert adam_decay is not None
    role = str(row.role)
    kind: Kind
    if role in ("matrix", "expert"):
        kind = config.optimizer
        if kind == "adamw8bit" and row.parameter.numel() < SMALLEST_8BIT:
            kind = "adamw"
        return ("matrices", kind, lr, decay if row.decay else 0.0)
    adam_decay = adam_decay if row.decay else 0.0
    if role in ("embedding", "head", "tied"):
        width = (row.parameter.shape[-1] / REFERENCE_WIDTH) ** -0.5 if config.optimizer == "muon" else 1.0
        if role == "embedding":
            return ("embedding", "adamw", embedding_lr * width, adam_decay)
        return ("head", "adamw", head_lr * width, adam_decay)
    assert role in REST, f"{row.name}: no rule for parameters of the role '{role}'"
    return ("scalars", "adamw", scalar_lr, adam_decay)


def group_table(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """The table that people see: group, optimizer, tensors, parameters, lr, weight_decay."""
    return [
        {
            "group": group.name,
            "optimizer": group.kind,
            "tensors": len(group.rows),
            "parameters": sum(p.numel() for p in group.parameters),
            "lr": group.lr,
            "weight_decay": group.weight_decay,
        }
        for group in groups
    ]


def group_fingerprint(groups: Sequence[Group]) -> str:
    """sha256 over names, shapes, divisions and update rules: a resume with another table is another run.

    Learning rates and decay are left out: they belong to the schedule.
    """
    rows = [
        [row.name, list(row.parameter.shape), list(row.splits), group.kind, group.name]
        for group in groups
        for row in group.rows
    ]
    return hashlib.sha256(json.dumps(rows, separators=(",", ":")).encode()).hexdigest()
