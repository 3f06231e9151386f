"""Muon: momentum, orthogonalised, for the matrices inside a network (https://kellerjordan.github.io/posts/muon).

`reference.py` says in a few lines what one step does to one matrix. Here the same is done for all matrices of a model:
those of one shape, the experts of a stack and the projections inside a fused weight are gathered into batches and
orthogonalised together. Batched or alone, a matrix gets the same bits, so it does not matter how the work is divided
between batches or ranks.

    optimizer = Muon(hidden_matrices, lr=0.02)

Embeddings, output heads, norms, biases and scalars do not belong here: use AdamW for them (`optimizer.py` combines the
two for a model). State: one momentum per parameter, in the parameter's shape, at least fp32; with NorMuon also one
number per index of each matrix's longer side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lmcore.errors import LmError
from lmcore.optim.orthogonalize import coefficients, frobenius_norm, iteration_dtype, orthogonalize

BATCH_ELEMENTS = {"cpu": 1 << 21, "cuda": 1 << 27}
"""Elements orthogonalised in one call: bounds the temporaries (about four times as many numbers). Changes no bit. On a
CPU as many as its cache holds."""


@dataclass(frozen=True)
class Layout:
    """How a parameter is divided into the matrices that are orthogonalised one by one.

    splits: sizes of the projections fused along the output side; () for one. input_first: the last two dimensions are
    (in, out) instead of (out, in), as stacks of experts are often stored.
    """

    splits: tuple[int, ...] = ()
    input_first: bool = False

    def matrices(self, tensor: Tensor) -> list[Tensor]:
        """Views of shape (K, out, in): one per fused projection, K = number of experts or 1."""
        stack = tensor.unsqueeze(0) if tensor.ndim == 2 else tensor
        stack = stack.mT if self.input_first else stack
        return list(stack.split(self.splits, dim=1)) if self.splits else [stack]

    def second_moments(self, tensor: Tensor, moment: Tensor) -> list[Tensor]:
        """Views (K, max(out, in)) of NorMuon's state (K, sum of them), one per matrix of `matrices`."""
        sizes = [max(matrix.shape[1:]) for matrix in self.matrices(tensor)]
        return list(moment.view(-1, sum(sizes)).split(sizes, dim=1))

    def check(self, shape: Sequence[int], name: str) -> None:
        """Raise LmError unless a parameter of this shape can be divided like this."""
        if len(shape) not in (2, 3) or 0 in shape:
            raise LmError(
                f"{name} has shape {tuple(shape)}; Muon updates matrices (2-D) and stacks of them (3-D).",
                hint="Give embeddings, norms, biases and scalars to AdamW.",
            )
        out = shape[-1] if self.input_first else shape[-2]
        if self.splits and sum(self.splits) != out:
            raise LmError(f"{name}: the splits {self.splits} add up to {sum(self.splits)}, its output side has {out}.")


@torch.no_grad()
def muon_update(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    momenta: Sequence[Tensor],
    layouts: Sequence[Layout],
    second_moments: Sequence[Tensor] | None = None,
    *,
    lr: float,
    weight_decay: float = 0.0,
    momentum: float = 0.95,
    nesterov: bool = True,
    method: str = "polar-express",
    scale: str = "original",
    cautious: bool = False,
    beta2: float = 0.95,
    dtype: torch.dtype | None = None,
) -> None:
    """One step in place on parameters and state. All tensors on one device.

    Parameters (out, in) or (E, out, in), divided by `layouts`; gradients and momenta in the same shape; second_moments,
    when given (NorMuon), flat. scale: "original" (sqrt(max(1, out/in))) or "match_rms_adamw" (0.2 sqrt(max(out, in))).
    dtype: precision of the orthogonalisation, None = bfloat16 where the device has it.
    """
    factor = shape_factor(scale)
    if not parameters:
        return
    # One call for all: on a GPU a step of a small model is bound by the number of launches.
    torch._foreach_lerp_(list(momenta), [g.to(m.dtype) for g, m in zip(gradients, momenta, strict=True)], 1 - momentum)
    blocks: dict[tuple[int, int], list[_Block]] = {}
    for index, (parameter, gradient, buffer, layout) in enumerate(
        zip(parameters, gradients, momenta, layouts, strict=True)
    ):
        views = [layout.matrices(tensor) for tensor in (parameter, gradient, buffer)]
        moments = layout.second_moments(parameter, second_moments[index]) if second_moments is not None else None
        for number, (p, g, m) in enumerate(zip(*views, strict=True)):
            block = _Block(p, g, m, moments[number] if moments is not None else None)
            blocks.setdefault(block.wide_shape, []).append(block)
    for (short, long), same in blocks.items():
        for batch in _batches(same, BATCH_ELEMENTS.get(same[0].parameter.device.type, 1 << 21) // (short * long)):
            _update_batch(
                batch,
                lr=lr,
                weight_decay=weight_decay,
                momentum=momentum if nesterov else 1.0,
                method=method,
                factor=factor,
                cautious=cautious,
                beta2=beta2,
                dtype=dtype,
            )


def shape_factor(scale: str) -> Callable[[int, int], float]:
    """(out, in) -> factor on an orthogonal update.

    original: the update maps inputs of unit RMS to outputs of unit RMS whatever the width, so a learning rate carries
    over. match_rms_adamw: the update has the RMS of AdamW's (0.2), so one learning rate serves both (arXiv:2502.16982).
    """
    if scale == "original":
        return lambda out, into: max(1.0, out / into) ** 0.5
    if scale == "match_rms_adamw":
        return lambda out, into: 0.2 * max(out, into) ** 0.5
    raise LmError(f"'{scale}' is no scale of Muon; there are original and match_rms_adamw.")


@dataclass(frozen=True)
class _Block:
    """Views of K matrices of one shape (K, out, in) and of their state; second_moment (K, max(out, in)) or None."""

    parameter: Tensor
    gradient: Tensor
    momentum: Tensor
    second_moment: Tensor | None

    @property
    def tall(self) -> bool:
        """Square counts as tall: NorMuon's second moment is then one per output."""
        return self.parameter.shape[1] >= self.parameter.shape[2]

    @property
    def wide_shape(self) -> tuple[int, int]:
        """(short, long): tall matrices are orthogonalised as their transpose, together with the wide ones."""
        _, rows, cols = self.parameter.shape
        return (min(rows, cols), max(rows, cols))

    def part(self, start: int, stop: int) -> _Block:
        moment = None if self.second_moment is None else self.second_moment[start:stop]
        return _Block(self.parameter[start:stop], self.gradient[start:stop], self.momentum[start:stop], moment)


def _batches(blocks: list[_Block], limit: int) -> Iterable[list[_Block]]:
    """Lists of blocks with at most `limit` matrices (at least one) together; a large stack is cut."""
    limit = max(1, limit)
    batch: list[_Block] = []
    room = limit
    for block in blocks:
        start, count = 0, len(block.parameter)
        while start < count:
            take = min(room, count - start)
            batch.append(block.part(start, start + take))
            start, room = start + take, room - take
            if room == 0:
                yield batch
                batch, room = [], limit
    if batch:
        yield batch


def _update_batch(
    batch: list[_Block],
    *,
    lr: float,
    weight_decay: float,
    momentum: float,
    method: str,
    factor: Callable[[int, int], float],
    cautious: bool,
    beta2: float,
    dtype: torch.dtype | None,
) -> None:
    first = batch[0].momentum
    short, long = batch[0].wide_shape
    counts = [len(block.parameter) for block in batch]
    u = torch.empty(sum(counts), short, long, dtype=first.dtype, device=first.device)
    ahead = torch._foreach_lerp(  # Nesterov
        [block.gradient.to(first.dtype) for block in batch], [block.momentum for block in batch], momentum
    )
    places = u.split(counts)
    torch._foreach_copy_(list(places), [a.mT if block.tall else a for a, block in zip(ahead, batch, strict=True)])
    del ahead
    x = orthogonalize(u, method=method, dtype=dtype or iteration_dtype(first.device, first.dtype))
    del u
    if batch[0].second_moment is not None:
        x = _even_out(x, [block.second_moment for block in batch if block.second_moment is not None], beta2)
    updates = [update.mT if block.tall else update for update, block in zip(x.split(counts), batch, strict=True)]
    _apply([b.parameter for b in batch], updates, lr=lr, weight_decay=weight_decay, cautious=cautious, factor=factor)


def _even_out(x: Tensor, moments: list[Tensor], beta2: float) -> Tensor:
    """NorMuon: divide by the root of a second moment per index of the long side; keep every matrix's norm.

    x (K, short, long) -> the same shape in fp32 or better; moments (k_i, long) are updated in place.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    mean_square = x.square().mean(1)  # (K, long)
    for moment, new in zip(moments, mean_square.split([len(m) for m in moments]), strict=True):
        moment.lerp_(new.to(moment.dtype), 1 - beta2)
    y = x * torch.cat(moments).to(x.dtype).clamp(min=1e-10).rsqrt().unsqueeze(1)
    return y * (frobenius_norm(x) / frobenius_norm(y).clamp(min=1e-10))


def _apply(
    parameters: list[Tensor],
    updates: list[Tensor],
    *,
    lr: float,
    weight_decay: float,
    cautious: bool,
    factor: Callable[[int, int], float],
) -> None:
    """p <- p - lr wd p - lr s X; cautious: the decay only where it has the sign of the update."""
    updates = [update.to(parameter.dtype) for update, parameter in zip(updates, parameters, strict=True)]
    if weight_decay and cautious:
        for parameter, update in zip(parameters, updates, strict=True):
            agree = (update * parameter >= 0).to(parameter.dtype)
            parameter.mul_(agree.mul_(-lr * weight_decay).add_(1))
    elif weight_decay:
        for parameter in parameters:  # not foreach, which rounds the factor to bf16 when the parameters are
            parameter.mul_(1 - lr * weight_decay)
    by_size: dict[float, tuple[list[Tensor], list[Tensor]]] = {}
    for parameter, update in zip(parameters, updates, strict=True):
        ours, theirs = by_size.setdefault(factor(parameter.shape[1], parameter.shape[2]), ([], []))
        ours.append(parameter)
        theirs.append(update)
    for size, (same, changes) in by_size.items():
        torch._foreach_add_(same, changes, alpha=-lr * size)


class Muon(torch.optim.Optimizer):
    """Muon as an ordinary PyTorch optimizer, for parameters of two or three dimensions.

    A 3-D parameter is a stack of matrices, each orthogonalised by itself. Two options of a parameter group divide its
    parameters further: `splits`, the sizes of projections fused along the output side, and `input_first`, for matrices
    stored (in, out). Every option may differ between groups.

    lr: with scale "original" the spectral norm of an update (for square matrices); 0.02 is a good start. With
    "match_rms_adamw" use a learning rate of AdamW. weight_decay is decoupled; cautious restricts it to the entries that
    the update shrinks too. normuon turns on NorMuon's second moment with averaging constant beta2.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 0.02,
        *,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        nesterov: bool = True,
        method: str = "polar-express",
        scale: str = "original",
        cautious: bool = False,
        normuon: bool = False,
        beta2: float = 0.95,
        splits: tuple[int, ...] = (),
        input_first: bool = False,
        dtype: torch.dtype | None = None,
    ) -> None:
        if not lr >= 0 or not weight_decay >= 0 or not 0 <= momentum < 1 or not 0 < beta2 < 1:
            raise LmError(
                f"Muon needs lr >= 0, weight_decay >= 0, 0 <= momentum < 1 and 0 < beta2 < 1; got lr {lr}, "
                f"weight_decay {weight_decay}, momentum {momentum}, beta2 {beta2}."
            )
        coefficients(method)
        shape_factor(scale)
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "method": method,
            "scale": scale,
            "cautious": cautious,
            "normuon": normuon,
            "beta2": beta2,
            "splits": splits,
            "input_first": input_first,
            "dtype": dtype,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        layout = Layout(tuple(group["splits"]), group["input_first"])
        for number, parameter in enumerate(group["params"]):
            layout.check(parameter.shape, f"parameter {number} of group {len(self.param_groups) - 1}")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As every optimizer's, but the state keeps the dtype of `new_state` whatever that of its parameter.

        Raises LmError when a tensor does not have the shape of its parameter's state; nothing is changed then.
        """
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        layouts = [
            (Layout(tuple(group["splits"]), group["input_first"]), bool(group["normuon"]))
            for group in self.param_groups
            for _ in group["params"]
        ]
        loaded: list[tuple[Tensor, dict[str, Tensor]]] = []
        for parameter, number, (layout, normuon) in zip(parameters, numbers, layouts, strict=False):
            saved = state_dict["state"].get(number)
            if not saved:
                continue
            fresh = new_state(parameter, layout, normuon=normuon)
            for key, template in fresh.items():
                if not isinstance(saved.get(key), Tensor) or saved[key].shape != template.shape:
                    raise LmError(f"The saved {key} of parameter {number} is not one of shape {tuple(template.shape)}.")
                template.copy_(saved[key])
            loaded.append((parameter, fresh))
        super().load_state_dict(state_dict)
        for parameter, fresh in loaded:
            self.state[parameter] = fresh

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            layout = Layout(tuple(group["splits"]), group["input_first"])
            parameters = [p for p in group["params"] if p.grad is not None]
            for parameter in parameters:
                if not self.state[parameter]:
                    self.state[parameter].update(new_state(parameter, layout, normuon=group["normuon"]))
            states = [self.state[p] for p in parameters]
            muon_update(
                parameters,
                [p.grad for p in parameters if p.grad is not None],
                [state["momentum"] for state in states],
                [layout] * len(parameters),
                [state["second_moment"] for state in states] if group["normuon"] else None,
                lr=float(group["lr"]),
                weight_decay=float(group["weight_decay"]),
                momentum=float(group["momentum"]),
                nesterov=group["nesterov"],
                method=group["method"],
                scale=group["scale"],
                cautious=group["cautious"],
                beta2=group["beta2"],
                dtype=group["dtype"],
            )
        return loss


def new_state(parameter: Tensor, layout: Layout, *, normuon: bool) -> dict[str, Tensor]:
    """Muon's state of a parameter before its first step: `momentum`, and with NorMuon `second_moment`."""
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    state = {"momentum": parameter.new_zeros(parameter.shape, dtype=dtype)}
    if normuon:
        length = sum(max(matrix.shape[1:]) for matrix in layout.matrices(parameter))
        shape = (parameter.shape[0], length) if parameter.ndim == 3 else (length,)
        state["second_moment"] = torch.zeros(shape, dtype=dtype, device=parameter.device)
    return state
