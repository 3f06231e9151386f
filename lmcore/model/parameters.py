"""What each parameter is for, declared by the module that owns it.

An optimizer must know that a stack of experts is many matrices, that a fused projection is several, and that an
embedding is none. Names are a poor witness of that; the owner knows. Every module with parameters of its own
implements `own_parameters`, and `parameter_table` collects and checks them: each parameter of a model appears exactly
once.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from lmcore.errors import LmError


class Role(enum.StrEnum):
    """The part that a parameter plays."""

    MATRIX = "matrix"  # (out, in): a hidden linear map
    EXPERT = "expert"  # (experts, out, in): a stack of hidden linear maps
    EMBEDDING = "embedding"  # (padded vocabulary, width), input only
    HEAD = "head"  # (padded vocabulary, width), output only
    TIED = "tied"  # (padded vocabulary, width), input and output
    ROUTER = "router"  # (choices, width)
    CONV = "conv"  # (channels, taps): depthwise
    NORM = "norm"  # gains of a normalisation
    SCALAR = "scalar"  # biases, decays, poles and other per-channel numbers


@dataclass(frozen=True)
class ParameterInfo:
    """One row of the parameter table.

    name: the full name, as in the state dict.
    splits: row counts of the matrices fused into one (along the second to last dimension); () = a single one.
    decay: whether weight decay makes sense for it.
    """

    name: str
    parameter: nn.Parameter
    role: Role
    splits: tuple[int, ...] = ()
    decay: bool = True


class Owner(nn.Module):
    """A module that declares the parameters it holds itself (not those of its children) and how they begin."""

    def own_parameters(self) -> Iterator[tuple[str, Role, tuple[int, ...], bool]]:
        """(local name, role, splits, decay) of each own parameter."""
        raise NotImplementedError

    def reset(self, generator: torch.Generator, std: float) -> None:
        """Set the own parameters to their initial values. `std`: for matrices; the owner scales it where it must."""
        raise NotImplementedError


def parameter_table(model: nn.Module) -> list[ParameterInfo]:
    """Every parameter of `model` once, in the order of its modules."""
    table: list[ParameterInfo] = []
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        if isinstance(module, Owner):
            for local, role, splits, decay in module.own_parameters():
                parameter = module.get_parameter(local)
                assert id(parameter) not in seen, f"{prefix}.{local} is declared twice"
                seen.add(id(parameter))
                name = f"{prefix}.{local}" if prefix else local
                table.append(ParameterInfo(name, parameter, role, splits, decay))
    missing = [name for name, parameter in model.named_parameters() if id(parameter) not in seen]
    assert not missing, f"no module declares the role of {missing}"
    return table


def fill_normal(parameter: torch.Tensor, std: float, generator: torch.Generator) -> None:
    """Normal values drawn on the CPU, so that a seed gives the same model on every device."""
    with torch.no_grad():
        parameter.copy_(torch.empty(parameter.shape, dtype=torch.float32).normal_(0.0, std, generator=generator))


def fill_uniform(parameter: torch.Tensor, low: float, high: float, generator: torch.Generator) -> None:
    """Uniform values in [low, high), drawn on the CPU."""
    with torch.no_grad():
        parameter.copy_(torch.empty(parameter.shape, dtype=torch.float32).uniform_(low, high, generator=generator))


def refuse_meta(model: nn.Module) -> None:
    """Weights cannot be drawn on the meta device."""
    if any(p.is_meta for p in model.parameters()):
        raise LmError("The model lies on the meta device: move it with to_empty(device=...) before init_weights().")
