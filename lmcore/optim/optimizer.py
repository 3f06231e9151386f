"""The optimizer of a model: Muon for its hidden matrices, AdamW for the rest, one object, one step.

    optimizer = build_optimizer(model.parameter_table(), config, total_steps=1000)
    loss.backward()
    optimizer.step(step)          # step 0, 1, 2, ...
    optimizer.zero_grad()

Every hyper-parameter is a function of (config, step, total_steps), also Adam's bias correction, so the state is
tensors and nothing else: `state_tensors` gives them under `<parameter name>.<state name>`, in the parameter's shape,
ready for a safetensors file that a run with another number of ranks can read.

    momentum                 Muon; second_moment with NorMuon
    exp_avg, exp_avg_sq      AdamW; with 8 bits they are codes, and exp_avg_scale, exp_avg_sq_scale belong to them

With several ranks (torch.distributed) the state and the update are divided between them: see sharding.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.adamw import adamw

from lmcore.errors import Exit, LmError
from lmcore.optim import eightbit, muon
from lmcore.optim.clip import gradient_norm
from lmcore.optim.config import OptimConfig
from lmcore.optim.groups import Group, ParameterRow, group_fingerprint, group_table, parameter_groups
from lmcore.optim.schedule import momentum_at, multiplier, weight_decay_at
from lmcore.optim.sharding import Piece, Ranks, collect, divide, gather, local, scatter, send_pieces, travels


def build_optimizer(
    table: Iterable[ParameterRow], config: OptimConfig, *, total_steps: int, ranks: Ranks | None = None
) -> Optimizer:
    """The optimizer of the parameters in `table` for a run of `total_steps` (lmcore.model: `parameter_table()`).

    ranks: divide update and state between the ranks of the default process group; all of them must then call `step` and
    `state_tensors` together, with the same gradients.
    """
    config = config.resolved(total_steps)
    groups = parameter_groups(table, config, total_steps=total_steps)
    return Optimizer(groups, config, total_steps, ranks or Ranks())


class Optimizer:
    """See the module docstring. Parameters without a gradient are left alone, state included."""

    def __init__(self, groups: Sequence[Group], config: OptimConfig, total_steps: int, ranks: Ranks) -> None:
        self.groups = tuple(groups)
        self.config = config
        self.total_steps = total_steps
        self.ranks = ranks
        if ranks.sharded and any(group.kind == "adamw8bit" for group in groups):
            raise LmError(
                "optim.optimizer = adamw8bit cannot be used with train.shard = full: its blocks cross the ranks' rows.",
                hint="Use adamw or muon.",
            )
        self._pieces = divide(groups, ranks.size, sharded=ranks.sharded)
        self._states: dict[str, list[dict[str, Tensor] | None]] = {
            row.name: [
                _new_state(group, row, config, self._like(piece)) if self._mine(piece) else None
                for piece in self._pieces[row.name]
            ]
            for group in groups
            for row in group.rows
        }

    def _like(self, piece: Piece) -> Tensor:
        """A tensor of the shape and type of a piece of this rank, whose values mean nothing."""
        parameter = piece.row.parameter.detach()
        if not self.ranks.sharded:
            return piece.of(parameter)
        if not piece.whole:
            return local(parameter)
        return torch.empty(parameter.shape, dtype=parameter.dtype, device=parameter.device)

    def _mine(self, piece: Piece) -> bool:
        return piece.owner is None or piece.owner == self.ranks.rank

    # ------------------------------------------------------------------------------ the step

    @torch.no_grad()
    def step(self, step: int) -> None:
        """Update all parameters from their gradients; `step` counts from 0."""
        works: list[dist.Work] = []
        for group, values in zip(self.groups, self.hyperparameters(step).values(), strict=True):
            pieces: list[Piece] = []
            states: list[dict[str, Tensor]] = []
            for row in group.rows:
                for piece, state in zip(self._pieces[row.name], self._states[row.name], strict=True):
                    if state is not None and row.parameter.grad is not None:
                        pieces.append(piece)
                        states.append(state)
            if self.ranks.sharded:
                self._update_sharded(group, values, step)
                continue
            if pieces:
                parameters = [piece.of(piece.row.parameter.detach()) for piece in pieces]
                gradients = [piece.of(g.detach()) for piece in pieces if (g := piece.row.parameter.grad) is not None]
                _update(group, pieces, parameters, gradients, states, values, self.config, step)
            if self.ranks.size > 1:  # on its way while the next group is updated
                works += send_pieces([piece for row in group.rows for piece in self._pieces[row.name]])
        for work in works:
            work.wait()

    def _update_sharded(self, group: Group, values: Mapping[str, float], step: int) -> None:
        """The update of sharded parameters: each rank its rows, a Muon matrix at its owner."""
        travelling: list[Piece] = []
        work: list[tuple[Piece, dict[str, Tensor], Tensor, Tensor]] = []
        for row in group.rows:
            if row.parameter.grad is None:
                continue
            if travels(group, row):
                travelling += self._pieces[row.name]
                continue
            for piece, state in zip(self._pieces[row.name], self._states[row.name], strict=True):
                if state is not None:
                    work.append((piece, state, local(row.parameter.detach()), local(_gradient(row))))
        gradients = gather(travelling, [_gradient(piece.row) for piece in travelling], self.ranks)
        wholes = gather(travelling, [piece.row.parameter for piece in travelling], self.ranks)
        for piece, whole, gradient in zip(travelling, wholes, gradients, strict=True):
            state = self._states[piece.row.name][0]
            if state is not None and whole is not None and gradient is not None:
                work.append((piece, state, whole, gradient))
        if work:
            pieces, states, parameters, owned = (list(items) for items in zip(*work, strict=True))
            _update(group, pieces, parameters, owned, states, values, self.config, step)
        scatter(travelling, wholes, self.ranks)

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
        if not self.ranks.sharded:
            return {group.name: gradient_norm(group.parameters) for group in self.groups}
        norms = {}
        for group in self.groups:  # what every rank keeps whole counts once
            counted = [p for p in group.parameters if local(p) is not p or self.ranks.rank == 0]
            norms[group.name] = gradient_norm(counted).to(group.parameters[0].device, torch.float64)
        squares = torch.stack(list(norms.values())).square()
        dist.all_reduce(squares)
        return dict(zip(norms, squares.sqrt().unbind(), strict=True))

    # ------------------------------------------------------------------------------ identity and state

    def table(self) -> list[dict[str, object]]:
        """Rows for people: group, optimizer, tensors, parameters, lr, weight_decay."""
        return group_table(self.groups)

    def fingerprint(self) -> str:
        """sha256 of the group table, part of a run's identity."""
        return group_fingerprint(self.groups)

    def state_tensors(self) -> dict[str, Tensor]:
        """The whole state by `<parameter name>.<state name>`.

        With one rank these are the live tensors, not copies. With several it is a collective call: rank 0 gets the
        complete state in main memory, the others an empty dict.
        """
        result: dict[str, Tensor] = {}
        for name, key, template in self._templates():
            states = [None if state is None else state[key] for state in self._states[name]]
            if self.ranks.size == 1:
                assert states[0] is not None
                result[f"{name}.{key}"] = states[0]
            elif (tensor := collect(self._pieces[name], states, template, self.ranks)) is not None:
                result[f"{name}.{key}"] = tensor
        return result

    def state_bytes(self) -> int:
        """Size of the whole state (over all ranks)."""
        return sum(template.numel() * template.element_size() for _, _, template in self._templates())

    def _templates(self) -> list[tuple[str, str, Tensor]]:
        """(parameter name, state name, tensor without data of the complete shape) in a fixed order."""
        found = []
        for group in self.groups:
            for row in group.rows:
                empty = torch.empty(row.parameter.shape, dtype=row.parameter.dtype, device="meta")
                found += [(row.name, k, t) for k, t in _new_state(group, row, self.config, empty).items()]
        return found

    @torch.no_grad()
    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy a complete saved state in (every rank takes its pieces).

        Names, shapes and types must be exactly those of `state_tensors`, else LmError (65) and nothing is changed.
        """
        templates = self._templates()
        own = {f"{name}.{key}" for name, key, _ in templates}
        missing, extra = sorted(own - tensors.keys()), sorted(tensors.keys() - own)
        if missing or extra:
            told = f"lacks {_some(missing)}" if missing else f"has {_some(extra)}, which this optimizer does not know"
            raise LmError(
                f"The saved optimizer state {told}.",
                hint="It was written with other settings of the optimizer or the model; resume with the same ones.",
                code=Exit.DATA,
            )
        for name, key, template in templates:
            saved = tensors[f"{name}.{key}"]
            if saved.shape != template.shape or saved.dtype != template.dtype:
                raise LmError(
                    f"The saved optimizer state {name}.{key} is {saved.dtype} {tuple(saved.shape)}, expected "
                    f"{template.dtype} {tuple(template.shape)}.",
                    code=Exit.DATA,
                )
        for name, key, _ in templates:
            for piece, state in zip(self._pieces[name], self._states[name], strict=True):
                if state is not None:
                    state[key].copy_(piece.of(tensors[f"{name}.{key}"]))


def _some(names: list[str]) -> str:
    return f"{', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"


def _gradient(row: ParameterRow) -> Tensor:
    gradient = row.parameter.grad
    assert gradient is not None
    return gradient.detach()


def _new_state(group: Group, row: ParameterRow, config: OptimConfig, piece: Tensor) -> dict[str, Tensor]:
    if group.kind == "muon":
        return muon.new_state(piece, group.layout(row), normuon=config.normuon)
    if group.kind == "adamw8bit":
        return eightbit.new_state(piece)
    dtype = torch.promote_types(piece.dtype, torch.float32)
    return {key: piece.new_zeros(piece.shape, dtype=dtype) for key in ("exp_avg", "exp_avg_sq")}


def _update(
    group: Group,
    pieces: Sequence[Piece],
    parameters: list[Tensor],
    gradients: list[Tensor],
    states: Sequence[dict[str, Tensor]],
    values: Mapping[str, float],
    config: OptimConfig,
    step: int,
) -> None:
    if group.kind == "muon":
        muon.muon_update(
            parameters,
            gradients,
            [state["momentum"] for state in states],
            [group.layout(piece.row) for piece in pieces],
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

    def rule(
        parameters: list[Tensor], gradients: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor]
    ) -> None:
        assert config.betas is not None, "the settings are not resolved"
        assert config.eps is not None
        device = parameters[0].device
        # PyTorch adds one before it uses them: the bias correction follows from the step, not from a saved counter.
        steps = torch.full((len(parameters),), float(step), device=device)
        adamw(
            parameters,
            gradients,
            exp_avgs,
            exp_avg_sqs,
            [],
            list(steps.unbind()),
            fused=device.type in ("cpu", "cuda", "mps"),
            amsgrad=False,
            beta1=config.betas[0],
            beta2=config.betas[1],
            lr=values["lr"],
            weight_decay=values["weight_decay"],
            eps=config.eps,
            maximize=False,
        )

    if group.kind == "adamw8bit":
        for parameter, gradient, state in zip(parameters, gradients, states, strict=True):
            eightbit.update(parameter, gradient, state, lambda p, g, m, v: rule([p], [g], [m], [v]))
    else:
        rule(
            parameters,
            gradients,
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
        )
