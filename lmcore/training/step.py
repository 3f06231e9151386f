"""One step as a pure function: weights and optimizer state of step s + 1 from those of step s and the number s.

    loss of a step = sum over all valid targets of all micro-batches and ranks / their global count

Every micro-batch runs backward on its sum divided by the global counts, so reductions are sums and nothing is averaged
twice. Data, learning rate, decay, momentum and dropout are functions of (configuration, s); nothing else enters.
The numbers of a step are brought to the host once, before its update, so that a loss or gradient that is not finite
never reaches the weights.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lmcore.model.model import LanguageModel
from lmcore.optim.clip import clip_gradients
from lmcore.optim.optimizer import Optimizer
from lmcore.optim.sharding import local
from lmcore.training.batches import MicroBatch, Shape, StepBatch
from lmcore.training.guards import LossScale
from lmcore.training.lanes import LaneSum, ShardedSum
from lmcore.training.parallel import World

Forward = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, dict[str, Tensor]]]


@dataclass(frozen=True)
class StepNumbers:
    """What a step measured, before its update."""

    loss: float
    """Cross-entropy in nats per token over the whole step."""
    terms: dict[str, float]
    """Every further term of the objective, unweighted, per its own count."""
    grad_norm: float
    """Global norm of the gradients before clipping."""
    group_norms: dict[str, float]
    metrics: dict[str, float | list[float]]
    stop: bool
    """Whether some rank was told to stop."""
    sources: tuple[float, ...] = ()
    """Sum of the cross-entropy over the rows of each source of a mixture."""

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


@dataclass(frozen=True)
class Probe:
    """A step in numbers that two ways of computing it can be compared by."""

    loss: float
    gradients: dict[str, tuple[float, float]]
    """By parameter: the norm, and the sum with fixed random signs."""


@dataclass
class Times:
    """Seconds that the parts of the last step took (as the host saw it)."""

    gradients: float = 0.0
    optimizer: float = 0.0


class Stepper:
    """Runs steps on one rank. `gradients` measures and accumulates, `update` changes the weights."""

    def __init__(
        self,
        model: LanguageModel,
        optimizer: Optimizer,
        world: World,
        shape: Shape,
        *,
        seed: int,
        exact: bool,
        scale: LossScale,
        sources: int = 0,
        sharded: bool = False,
    ) -> None:
        """sources: how many sources the rows come from, when their losses are to be told apart; 0 for one. sharded:
        whether the weights are divided between the ranks (parallel.shard_model)."""
        self.model, self.optimizer, self.world, self.shape, self.scale = model, optimizer, world, shape, scale
        self._seed = seed
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._sharded = sharded
        self._lanes: LaneSum | ShardedSum = (
            ShardedSum(self._parameters, world) if sharded else LaneSum(self._parameters, world, exact=exact)
        )
        per_micro = model.term_counts(shape.micro, model.config.context_length)
        self._names = list(per_micro)
        self._sources = sources
        model.keep_row_losses = sources > 0
        self._counts = {name: count * shape.micro_batches for name, count in per_micro.items()}
        self.random = any(isinstance(m, nn.Dropout) and m.p > 0 for m in model.modules())
        self._wide = torch.float32 if world.device.type == "mps" else torch.float64
        self.eager_forward: Forward = self._forward
        self.forward: Forward = self.eager_forward
        self.times = Times()
        self.utilisation: dict[str, list[float]] = {}
        """What the routers to experts did at the last step, per layer."""

    @property
    def counts(self) -> dict[str, int]:
        """The global count of every term of the objective over a step."""
        return dict(self._counts)

    def _forward(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """(objective, sums of the terms and of the rows of a mixture, metrics) of a micro-batch; this gets compiled."""
        losses = self.model.loss(inputs, targets)
        sums = torch.stack([losses.terms[name].sum.detach().float() for name in self._names])
        if losses.rows is not None:
            sums = torch.cat([sums, losses.rows])
        return losses.objective(self._counts), sums, losses.metrics

    def probe(self, batch: StepBatch, *, by_rows: bool = False) -> Probe:
        """Loss and gradients of the first micro-batch in numbers that can be compared; nothing of the training changes,
        and no second set of gradients is held.

        by_rows: compute one row after the other, in a fraction of the memory, where rows do not meet (experts count
        the load of all).
        """
        self._lanes.begin()
        self.model.begin_accumulation()
        if self.random:
            torch.manual_seed(0)
        inputs, targets = _moved(batch.micro_batches[0], self.world.device)
        rows = 1 if by_rows and not self.model.routers and not self.model.keep_row_losses else len(inputs)
        loss = 0.0
        for part, wanted in zip(inputs.split(rows), targets.split(rows), strict=True):
            objective, sums, _ = self.forward(part, wanted)
            objective.backward()
            loss += float(sums[self._names.index("main")])
        named = {name: parameter.grad for name, parameter in self.model.named_parameters()}
        gradients = {name: _norm_and_projection(local(grad)) for name, grad in named.items() if grad is not None}
        self._lanes.begin()
        self.model.reset_load()
        return Probe(loss * self.shape.micro_batches / self._counts["main"], gradients)

    # ------------------------------------------------------------------------------------ the two halves of a step

    def gradients(self, batch: StepBatch, stop: bool = False) -> StepNumbers:
        """Forward, backward and reduction; `.grad` of every parameter holds the whole step's gradient afterwards.

        stop: whether this rank wants to leave after the step; the answer of all ranks comes back in the result.
        """
        began = time.perf_counter()
        self._lanes.begin()
        device = self.world.device
        terms = len(self._names)
        sums = torch.zeros(terms + self._sources + 1, dtype=self._wide, device=device)
        sums[-1] = float(stop)  # rides along with the first lane
        metrics: dict[str, Tensor] = {}
        fresh = True
        for micro in batch.micro_batches:
            if fresh:
                # The load of experts is counted per lane too, so that nothing depends on the number of ranks.
                self.model.begin_accumulation()
                if self.random:
                    torch.manual_seed(lane_seed(self._seed, batch.step, micro.lane))
            fresh = micro.last
            objective, measured, found = self.forward(*_moved(micro, device))
            (objective * self.scale.scale if self.scale.enabled else objective).backward()
            sums[:terms] += measured[:terms]
            if micro.membership is not None and self._sources:
                # A product with zeros and ones: its order of summation is fixed, unlike that of a scatter on a GPU.
                membership = micro.membership.to(device, non_blocking=True).to(self._wide)
                sums[terms:-1] += (membership * measured[terms:].to(self._wide)).sum(1)
            for name, value in found.items():
                metrics[name] = metrics[name] + value if name in metrics else value
            if micro.last:
                self._lanes.end_lane(sums)
                sums = torch.zeros_like(sums)
        total = self._lanes.finish()
        if self.scale.enabled:
            self._lanes.scale_(1.0 / self.scale.scale)
        numbers = self._measure(total, metrics)
        self.times.gradients = time.perf_counter() - began
        return numbers

    def held_gradients(self) -> list[Tensor | None]:
        """What `gradients` left in `.grad` on this rank, in the order of the parameters."""
        return [None if parameter.grad is None else local(parameter.grad) for parameter in self._parameters]

    def update(self, step: int, max_norm: float | None) -> None:
        """Clip and apply the gradients that `gradients` left behind."""
        began = time.perf_counter()
        if max_norm:
            norm = None
            if self._sharded:
                norm = torch.linalg.vector_norm(torch.stack(list(self.optimizer.gradient_norms().values())))
            clip_gradients(self._parameters, max_norm, norm=norm)
        self.optimizer.step(step)
        found = self.model.after_step(self._all_reduce if self.world.size > 1 else None)
        self.utilisation = {name: value.tolist() for name, value in found.items()}
        self.times.optimizer = time.perf_counter() - began

    def _all_reduce(self, tensor: Tensor) -> None:
        self.world.sum_(tensor)

    def _measure(self, total: Tensor, metrics: dict[str, Tensor]) -> StepNumbers:
        norms = self.optimizer.gradient_norms()
        stacked = torch.stack([norm.to(self._wide) for norm in norms.values()]).to(total.device)
        share = len(self._lane_range()) * self.shape.micro_per_lane
        names = list(metrics)
        flat = [(metrics[name].to(self._wide) / share).reshape(-1) for name in names]
        packed = torch.cat([total, stacked, *flat]).tolist()  # the one synchronisation of the step
        terms, told = len(self._names), len(self._names) + self._sources
        sums, sources, rest = packed[:terms], packed[terms:told], packed[told + 1 :]
        means = {name: value / self._counts[name] for name, value in zip(self._names, sums, strict=True)}
        group_norms = dict(zip(norms, rest, strict=False))
        rest = rest[len(norms) :]
        values: dict[str, float | list[float]] = {}
        for name in names:
            size = metrics[name].numel()
            values[name] = rest[0] if metrics[name].dim() == 0 else rest[:size]
            rest = rest[size:]
        return StepNumbers(
            loss=means.pop("main"),
            terms=means,
            grad_norm=math.sqrt(sum(norm * norm for norm in group_norms.values())),
            group_norms=group_norms,
            metrics=values,
            stop=packed[told] > 0,
            sources=tuple(sources),
        )

    def _lane_range(self) -> range:
        share = self.shape.lanes // self.world.size
        return range(self.world.rank * share, (self.world.rank + 1) * share)


def _norm_and_projection(gradient: Tensor) -> tuple[float, float]:
    """Norm, and the sum with fixed random signs, which two gradients share only when they are alike. In pieces."""
    generator = torch.Generator(gradient.device).manual_seed(0)
    squares = projection = 0.0
    for piece in gradient.flatten().split(1 << 22):
        signs = torch.randint(0, 2, piece.shape, generator=generator, device=piece.device, dtype=torch.int8)
        squares += float(piece.double().square().sum())
        projection += float(torch.where(signs.bool(), piece, -piece).double().sum())
    return math.sqrt(squares), projection


def lane_seed(seed: int, step: int, lane: int) -> int:
    """The seed of the dropout of one lane: a 64-bit mix (splitmix64) of the three numbers."""
    value = seed
    for part in (step, lane):
        value = (value + 0x9E3779B97F4A7C15 * (part + 1)) & (2**64 - 1)
        value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
        value ^= value >> 31
    return value >> 1


def _moved(micro: MicroBatch, device: torch.device) -> tuple[Tensor, Tensor]:
    return micro.inputs.to(device, non_blocking=True), micro.targets.to(device, non_blocking=True)
