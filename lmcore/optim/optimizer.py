"""The optimizer of a model: Muon for its hidden matrices, AdamW for the rest, one object, one step.

    optimizer = build_optimizer(model.parameter_table(), config, total_steps=1000)
    loss.backward()
    optimizer.step(step)          # step 0, 1, 2, ...
    optimizer.zero_grad()

Every hyper-parameter is a function of (config, step, total_steps), also Adam's bias correction, so the state is
tensors and nothing else: `state_tensors` gives them under `<parameter name>.<state name>`, in the parameter's shape,
ready for a safetensors file that a run with another number of ranks can read.

    momentum                 Muon; second_moment with NorMuon
    exp_avg, exp_avg_sq      AdamW
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from lmcore.errors import Exit, LmError
from lmcore.optim.clip import gradient_norm
from lmcore.optim.config import OptimConfig
from lmcore.optim.groups import Group, ParameterRow, group_fingerprint, group_table, parameter_groups
from lmcore.optim.muon import muon_update, new_state
from lmcore.optim.schedule import momentum_at, multiplier, weight_decay_at


def build_optimizer(table: Iterable[ParameterRow], config: OptimConfig, *, total_steps: int) -> Optimizer:
    """The optimizer of the parameters in `table` for a run of `total_steps` (lmcore.model: `parameter_table()`)."""
    config = config.resolved(total_steps)
    return Optimizer(parameter_groups(table, config, total_steps=total_steps), config, total_steps)


class Optimizer:
    """See the module docstring. Parameters without a gradient are left alone, state included."""

    def __init__(self, groups: list[Group], config: OptimConfig, total_steps: int) -> None:
        self.groups = tuple(groups)
        self.config = config
        self.total_steps = total_steps
        self.state: dict[str, dict[str, Tensor]] = {}
        for group in groups:
            for row in group.rows:
                self.state[row.name] = _new_state(group, row, config)

    # ------------------------------------------------------------------------------ the step

    @torch.no_grad()
    def step(self, step: int) -> None:
        """Update all parameters from their gradients; `step` counts from 0."""
        for group, values in zip(self.groups, self.hyperparameters(step).values(), strict=True):
            rows = [row for row in group.rows if row.parameter.grad is not None]
            if rows:
                _update(group, rows, [self.state[row.name] for row in rows], values, self.config, step)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients (or set them to zero)."""
        for group in self.groups:
            for parameter in group.parameters:
                if set_to_none:
                    parameter.grad = None
                elif parameter.grad is not None:
                    parameter.grad.zero_()

    def hyperparameters(self, step: int) -> dict[str, dict[str, float]]:
        """Group name -> lr, weight_decay (and momentum for Muon) that `step(step)` uses."""
        factor = multiplier(step, self.config, self.total_steps)
        result: dict[str, dict[str, float]] = {}
        for group in self.groups:
            values = {"lr": group.lr * factor, "weight_decay": group.weight_decay}
            if group.kind == "muon":
                if group.weight_decay:
                    values["weight_decay"] = weight_decay_at(step, self.config, self.total_steps)
                values["momentum"] = momentum_at(step, self.config, self.total_steps)
            result[group.name] = values
        return result

    def lr(self, step: int) -> float:
        """Learning rate of the first group (the hidden matrices, when there are any)."""
        return next(iter(self.hyperparameters(step).values()))["lr"]

    def gradient_norms(self) -> dict[str, Tensor]:
        """Group name -> L2 norm of its gradients (0-D tensor)."""
        return {group.name: gradient_norm(group.parameters) for group in self.groups}

    # ------------------------------------------------------------------------------ identity and state

    def table(self) -> list[dict[str, object]]:
        """Rows for people: group, optimizer, tensors, parameters, lr, weight_decay."""
        return group_table(self.groups)

    def fingerprint(self) -> str:
        """sha256 of the group table, part of a run's identity."""
        return group_fingerprint(self.groups)

    def state_tensors(self) -> dict[str, Tensor]:
        """The whole state by `<parameter name>.<state name>`: the live tensors, not copies."""
        return {f"{name}.{key}": tensor for name, state in self.state.items() for key, tensor in state.items()}

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy a saved state in. Names and shapes must be exactly those of `state_tensors`, else LmError (65)."""
        own = self.state_tensors()
        missing, extra = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
        if missing or extra:
            told = f"lacks {_some(missing)}" if missing else f"has {_some(extra)}, which this optimizer does not know"
            raise LmError(
                f"The saved optimizer state {told}.",
                hint="It was written with other settings of the optimizer or the model; resume with the same ones.",
                code=Exit.DATA,
            )
        for name, tensor in own.items():
            saved = tensors[name]
            if saved.shape != tensor.shape or saved.dtype != tensor.dtype:
                raise LmError(
                    f"The saved optimizer state {name} is {saved.dtype} {tuple(saved.shape)}, expected {tensor.dtype} "
                    f"{tuple(tensor.shape)}.",
                    code=Exit.DATA,
                )
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(tensors[name])


def _some(names: list[str]) -> str:
    return f"{', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"


def _new_state(group: Group, row: ParameterRow, config: OptimConfig) -> dict[str, Tensor]:
    parameter = row.parameter.detach()
    if group.kind == "muon":
        return new_state(parameter, group.layout(row), normuon=config.normuon)
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    return {key: torch.zeros_like(parameter, dtype=dtype) for key in ("exp_avg", "exp_avg_sq")}


def _update(
    group: Group,
    rows: list[ParameterRow],
    states: list[dict[str, Tensor]],
    values: dict[str, float],
    config: OptimConfig,
    step: int,
) -> None:
    parameters = [row.parameter.detach() for row in rows]
    gradients = [row.parameter.grad.detach() for row in rows if row.parameter.grad is not None]
    if group.kind == "muon":
        muon_update(
            parameters,
            gradients,
            [state["momentum"] for state in states],
            [group.layout(row) for row in rows],
            [state["second_moment"] for state in states] if config.normuon else None,
            lr=values["lr"],
            weight_decay=values["weight_decay"],
            momentum=values["momentum"],
            nesterov=config.nesterov,
            method=config.method,
            scale=config.scale,
            cautious=config.cautious,
            beta2=config.normuon_beta2,
        )
        return
    assert config.betas is not None, "the settings are not resolved"
    assert config.eps is not None
    device = parameters[0].device
    adamw(
        parameters,
        gradients,
        [state["exp_avg"] for state in states],
        [state["exp_avg_sq"] for state in states],
        [],
        # PyTorch adds one before it uses them: the bias correction follows from the step, not from a saved counter.
        list(torch.full((len(rows),), float(step), device=device).unbind()),
        fused=device.type in ("cpu", "cuda", "mps"),
        amsgrad=False,
        beta1=config.betas[0],
        beta2=config.betas[1],
        lr=values["lr"],
        weight_decay=values["weight_decay"],
        eps=config.eps,
        maximize=False,
    )
