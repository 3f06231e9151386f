"""What a run will cost: memory by part, the largest micro-batch, time at a stated utilisation, disk, epochs.

Counts (parameters, operations) are exact (lmcore/model/plan.py) and the memory of a pass is found by running the model
without data (lmcore/model/memory.py). Three things are not known before a run and are therefore stated, not hidden: the
utilisation, the allocator's overhead, and that nothing else uses the machine. A throughput that would need more than
the device's peak is refused.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from lmcore.config import build, did_you_mean, merge, require_sections
from lmcore.data.manifest import MANIFEST
from lmcore.errors import LmError
from lmcore.model.config import ModelConfig
from lmcore.model.loss import chunk_for
from lmcore.model.memory import HEAP_BLOCK, PassMemory, trace_pass
from lmcore.model.model import LanguageModel
from lmcore.model.parameters import ParameterInfo
from lmcore.model.plan import ModelPlan, known_device, known_device_names, measure_peak, plan_model
from lmcore.optim.muon import BATCH_ELEMENTS
from lmcore.optim.optimizer import Optimizer, build_optimizer
from lmcore.optim.scale import Scaling, scale
from lmcore.storage import format_bytes
from lmcore.training import device as machine
from lmcore.training.compilation import fuses_head, wants_compile
from lmcore.training.config import DataConfig, RunConfig, settled
from lmcore.training.data import inspect
from lmcore.training.lanes import BUCKET_BYTES, choose_lanes

PROGRAM_BYTES = {"cpu": 350 << 20, "cuda": 600 << 20}
"""The process itself: torch and its libraries on a CPU (measured), a CUDA context on a GPU."""
COMPILER_BYTES = 120 << 20
"""What torch.compile leaves in a process on a CPU (measured 60 to 150 MiB)."""
ALLOCATOR = {"cpu": 1.3, "cuda": 1.04}
"""Memory that the allocator holds per byte of gradients and temporary tensors. CPU: glibc's, which keeps blocks below
32 MiB in a heap; measured 1.2 to 1.35 where the sizes of blocks repeat, as they do in dense layers."""
MIXED_BLOCKS = 1.55
"""The same on a CPU where they do not: scans, FFTs, experts, depth routing and recomputed layers, beside the gradients
of other lanes (measured 1.35 to 1.75)."""
DEFAULT_MFU = {"cpu": 0.3, "cuda": 0.4}
"""Utilisation assumed when none is given."""
ASSUMED_VOCABULARY = 50_257
FIXED = ("program", "weights", "gathered layers", "gradients", "optimizer", "checkpoint copy")
"""Parts of the memory that do not depend on the rows of a pass."""
_LONG = 8192
"""Longer sequences through a scan are examined at two shorter lengths: their memory is linear in the length."""


@dataclass(frozen=True)
class Target:
    """The machine to plan for."""

    name: str
    device_type: str
    dtype: str
    peak_flops: float | None
    """Per device, dense, in `dtype`; None when unknown."""
    memory: int | None
    """Bytes that a run may use, per device."""
    source: str
    """Where the peak comes from."""


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes per device."""

    parts: dict[str, int]
    micro_batch: int
    """Rows per forward pass that `parts` are for."""
    largest_micro_batch: int | None
    """Most rows that fit; 0 when not even one does, None when the memory of the device is unknown."""

    @property
    def total(self) -> int:
        return sum(self.parts.values())


@dataclass(frozen=True)
class RunPlan:
    """What `plan_run` found."""

    config: RunConfig
    model: ModelPlan
    target: Target
    devices: int
    memory: MemoryPlan
    groups: list[dict[str, Any]]
    tokens: int
    steps: int
    checkpoint_bytes: int
    disk_bytes: int
    optimizer_share: float
    """Operations of the optimizer as a share of those of the model."""
    mfu: float
    tokens_per_s: float | None
    claimed_tokens_per_s: float | None
    dataset_tokens: int | None
    suggestion: Scaling
    notes: tuple[str, ...] = field(default=())

    @property
    def seconds(self) -> float | None:
        return None if self.tokens_per_s is None else self.tokens / self.tokens_per_s

    @property
    def tokens_per_parameter(self) -> float:
        """Training tokens per active parameter; compute-optimal training takes about 20."""
        return self.tokens / self.model.active

    @property
    def epochs(self) -> float | None:
        return None if self.dataset_tokens is None else self.tokens / self.dataset_tokens

    @property
    def suggested(self) -> dict[str, float | int]:
        """Settings that the size rules give for a run of this length."""
        optim = self.suggestion.optim(self.config.optim.model_copy(update=dict.fromkeys(("lr", "weight_decay"))))
        assert optim.lr is not None
        assert optim.weight_decay is not None
        return {
            "train.batch_tokens": self.suggestion.batch_tokens,
            "optim.lr": float(f"{optim.lr:.3g}"),
            "optim.weight_decay": float(f"{optim.weight_decay:.3g}"),
        }

    def document(self) -> dict[str, Any]:
        """Everything, for --json."""
        m = self.model
        return {
            "parameters": {
                "total": m.parameters,
                "active": m.active,
                "embedding": m.embedding,
                "parts": [asdict(part) for part in m.parts],
            },
            "flops_per_token": {"train": m.train_flops, "forward": m.forward_flops, "palm_style": m.palm_flops},
            "cache_bytes_per_sequence": m.cache_bytes,
            "target": asdict(self.target) | {"devices": self.devices},
            "memory": {
                "parts": self.memory.parts,
                "total": self.memory.total,
                "micro_batch": self.memory.micro_batch,
                "largest_micro_batch": self.memory.largest_micro_batch,
            },
            "optimizer": {"groups": self.groups, "operations_share": self.optimizer_share},
            "run": {
                "tokens": self.tokens,
                "steps": self.steps,
                "batch_tokens": self.config.batch_tokens,
                "context_length": self.config.model.context_length,
                "mfu": self.mfu,
                "tokens_per_s": self.tokens_per_s,
                "seconds": self.seconds,
                "flops": self.tokens * m.train_flops,
                "tokens_per_parameter": self.tokens_per_parameter,
                "epochs": self.epochs,
                "dataset_tokens": self.dataset_tokens,
            },
            "disk": {"checkpoint_bytes": self.checkpoint_bytes, "total_bytes": self.disk_bytes},
            "suggested": self.suggested,
            "notes": list(self.notes),
        }


# ---------------------------------------------------------------------------------------- the configuration


@dataclass(frozen=True)
class Draft:
    """A configuration to plan for, which need not have its data yet."""

    config: RunConfig
    dataset_tokens: int | None
    notes: tuple[str, ...]


def draft(raw: Mapping[str, Any], *, tokens: int | None = None) -> Draft:
    """A raw configuration (preset, overrides, flags merged) -> a frozen one.

    The vocabulary comes from `model.vocab_size`, else from the data, else it is assumed. The length comes from
    `tokens`, else from the configuration, else it is 12 tokens per parameter.
    """
    require_sections(RunConfig, raw)
    notes: list[str] = []
    model = raw.get("model")
    given = model.get("vocab_size") if isinstance(model, Mapping) else None
    data = build(DataConfig, raw.get("data") or {})
    dataset_tokens = None
    vocab_size = given or ASSUMED_VOCABULARY
    if all(_exists(source.path) for source in data.train):
        sets = inspect(data)
        vocab_size = given or sets.vocab_size
        dataset_tokens = sum(sets.manifests[source.path].n_tokens for source in sets.train)
    else:
        missing = next(source.path for source in data.train if not _exists(source.path))
        notes.append(f"{missing} is not there: epochs are unknown" + ("" if given else ", the vocabulary is assumed"))
    length = {"train": {"tokens": tokens, "steps": None}} if tokens is not None else {}
    config = build(RunConfig, merge(raw, {"model": {"vocab_size": vocab_size}}, length))
    if config.train.steps is None and config.train.tokens is None:
        notes.append("no length is given: 12 tokens per parameter are assumed")
    return Draft(settled(config), dataset_tokens, tuple(notes))


def _exists(path: str) -> bool:
    return any((Path(path) / name / MANIFEST).is_file() for name in (".", "train"))


# ---------------------------------------------------------------------------------------- the machine


def find_target(name: str = "auto", dtype: str = "auto") -> Target:
    """This machine ("auto", "cpu", "cuda", "mps") or a GPU of the table ("h100"). LmError for an unknown name.

    On this machine's CPU the peak is measured (0.3 s).
    """
    listed = known_device(name)
    if listed is not None:
        kind = "bf16" if dtype == "auto" else dtype
        # fp32 products run in TF32, at half the rate of bf16.
        peak = listed.peak_flops * (0.5 if kind == "fp32" else 1.0)
        return Target(listed.name, "cuda", kind, peak, listed.memory, listed.source)
    try:
        device = machine.resolve_device(name)
    except LmError as error:
        near = did_you_mean(name, known_device_names())
        raise LmError(
            error.message.rstrip(".") + near,
            hint=f"Use cpu, cuda, mps or auto, or one of: {', '.join(known_device_names())}.",
        ) from None
    compute, _ = machine.resolve_dtype(dtype, device)
    kind = {value: key for key, value in machine.DTYPES.items()}[compute]
    label = machine.device_name(device)
    if device.type == "cuda":
        sheet = known_device(label)
        peak_flops = None if sheet is None else sheet.peak_flops * (0.5 if kind == "fp32" else 1.0)
        memory = torch.cuda.get_device_properties(device).total_memory
        return Target(label, "cuda", kind, peak_flops, memory, "data sheet" if sheet else "unknown")
    measured = measure_peak(device, compute)
    return Target(label, device.type, kind, measured, _main_memory(), "measured product of 1024 x 1024 matrices")


def _main_memory() -> int | None:
    """Bytes of main memory that this process may use: the machine's or its control group's."""
    sizes: list[int] = []
    for path, key in (
        ("/proc/meminfo", "MemTotal:"),
        ("/sys/fs/cgroup/memory.max", ""),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", ""),
    ):
        try:
            text = Path(path).read_text()
        except OSError:
            continue
        words = text.split()
        if key and key in words:
            sizes.append(int(words[words.index(key) + 1]) * 1024)
        elif words and words[0].isdigit():
            sizes.append(int(words[0]))
    return min(sizes, default=None)


# ---------------------------------------------------------------------------------------- the plan


def plan_run(
    drafted: Draft,
    target: Target,
    *,
    devices: int = 1,
    mfu: float | None = None,
    tokens_per_s: float | None = None,
) -> RunPlan:
    """Put everything together.

    mfu: utilisation of the peak by exact operations (default: what is usual). tokens_per_s: a throughput that somebody
    claims, over all devices; refused when it would need more than the peak.
    """
    config, notes = drafted.config, list(drafted.notes)
    model = plan_model(config.model)
    optimizer, _ = meta_optimizer(config)
    work = sum(_orthogonalisation(group.rows) for group in optimizer.groups if group.kind == "muon")
    share = work / (model.train_flops * config.batch_tokens)
    peak = None if target.peak_flops is None else target.peak_flops * devices
    wanted = DEFAULT_MFU.get(target.device_type, 0.3) if mfu is None else mfu
    if not 0 < wanted <= 1:
        raise LmError(
            f"an MFU of {wanted:g} is impossible: it is a share of the device's peak, between 0 and 1.",
            hint="Good training code reaches 0.3 to 0.6 on a GPU.",
        )
    if tokens_per_s is not None:
        if peak is None:
            raise LmError(
                f"the peak of {target.name} is not known, so {tokens_per_s:,.0f} tokens per second cannot be judged."
            )
        wanted = tokens_per_s * model.train_flops / peak
        if wanted > 1:
            raise LmError(
                f"{tokens_per_s:,.0f} tokens per second are impossible: at {model.train_flops:.3g} operations per "
                f"token they need {100 * wanted:.0f} % of the peak of {devices} x {target.name} "
                f"({peak / 1e12:,.4g} TFLOP/s).",
                hint=f"The peak itself gives {peak / model.train_flops:,.0f} tokens per second, good code about half.",
            )
    speed = None if peak is None else wanted * peak / model.train_flops / (1 + share)
    if peak is None:
        notes.append(f"the peak of {target.name} is not known: no time is given rather than a guess")
    memory = plan_memory(config, target, optimizer, devices=devices)
    if memory.largest_micro_batch is not None and memory.largest_micro_batch < memory.micro_batch:
        notes.append(_advice(config, memory, target))
    if target.device_type == "cpu" and config.train.shard == "full" and devices > 1:
        notes.append(
            "train.shard=full on a CPU is for trying out: layers that come and go leave gaps in the heap, a rank may "
            "need more than planned and more than with train.shard=none"
        )
    keep = config.train.checkpoint
    size = 4 * model.parameters + optimizer.state_bytes()
    kept = keep.keep + 1 + (config.total_steps // keep.keep_every if keep.keep_every else 0)
    tokens = config.total_steps * config.batch_tokens
    return RunPlan(
        config=config,
        model=model,
        target=target,
        devices=devices,
        memory=memory,
        groups=[dict(row) for row in optimizer.table()],
        tokens=tokens,
        steps=config.total_steps,
        checkpoint_bytes=size,
        disk_bytes=kept * size,
        optimizer_share=share,
        mfu=wanted,
        tokens_per_s=tokens_per_s if tokens_per_s is not None else speed,
        claimed_tokens_per_s=tokens_per_s,
        dataset_tokens=drafted.dataset_tokens,
        suggestion=scale(
            parameters=model.scaling_parameters, context_length=config.model.context_length, tokens=tokens
        ),
        notes=tuple(notes),
    )


def tokens_in(hours: float, drafted: Draft, target: Target, *, devices: int = 1, mfu: float | None = None) -> int:
    """Tokens that `hours` of training give at the stated (or usual) utilisation."""
    if target.peak_flops is None:
        raise LmError(f"the peak of {target.name} is not known, so hours cannot be turned into tokens.",
                      hint="Give --tokens instead.")  # fmt: skip
    utilisation = DEFAULT_MFU.get(target.device_type, 0.3) if mfu is None else mfu
    per_second = utilisation * target.peak_flops * devices / plan_model(drafted.config.model).train_flops
    return max(1, int(hours * 3600 * per_second))


def meta_optimizer(config: RunConfig) -> tuple[Optimizer, list[ParameterInfo]]:
    """The optimizer and the parameter table of a configuration, without any memory for numbers."""
    with torch.device("meta"):
        table = LanguageModel(config.model).parameter_table()
    return build_optimizer(table, config.optim, total_steps=config.total_steps), table


def plan_memory(config: RunConfig, target: Target, optimizer: Optimizer, *, devices: int = 1) -> MemoryPlan:
    """Memory of a training step on one device, and the largest micro-batch that fits."""
    train, kind = config.train, target.device_type
    parameters = sum(p.numel() for group in optimizer.groups for p in group.parameters)
    exact = train.reduce == "exact" or (train.reduce == "auto" and kind == "cpu")
    wanted = None if train.lanes == "auto" else train.lanes
    lanes = max(devices, choose_lanes(config.rows, devices, wanted)) if exact else devices
    per_lane = max(1, config.rows // lanes)
    micro = train.micro_batch
    if micro == "auto":
        micro = usual_rows(per_lane, config.model.context_length, kind)
    assert isinstance(micro, int)
    # A lane of one micro-batch makes its gradients while activations go; else they are there before.
    accumulate = kind != "cpu" or micro < per_lane
    sets = int(math.log2(max(1, lanes // devices))) + 1  # a sum per level of the tree of lanes
    sharded = train.shard == "full" and devices > 1
    compiled = not sharded and wants_compile(config, torch.device(kind))
    fixed = {
        "program": PROGRAM_BYTES.get(kind, PROGRAM_BYTES["cpu"]),
        "weights": 4 * parameters,
        "gradients": 4 * parameters * (sets if accumulate else sets - 1),
        "optimizer": optimizer.state_bytes() // devices,
    }
    if compiled and kind == "cpu":
        fixed["program"] += COMPILER_BYTES
    if sharded:
        accumulate, sets = True, 1
        fixed["weights"] = fixed["gradients"] = -(-4 * parameters // devices)
        fixed["gathered layers"] = _gathered(optimizer)
    if kind == "cpu" and train.checkpoint.background:
        fixed["checkpoint copy"] = 4 * parameters + optimizer.state_bytes()
    passes: dict[int, PassMemory] = {}

    def peak_of(rows: int) -> int:
        if rows not in passes:
            passes[rows] = _pass(config, target, rows, accumulate, compiled)
        return passes[rows].peak

    peak, found = peak_of(micro), passes[micro]
    slack = _slack(config, kind, sets)
    small = sum(4 * p.numel() for group in optimizer.groups for p in group.parameters if 4 * p.numel() < HEAP_BLOCK)
    small = fixed["gradients"] * small // (4 * parameters)

    def allocator_bytes(rows: int) -> int:
        """What the allocator takes beside the tensors of a pass and the gradients before it."""
        return round((slack - 1) * (passes[rows].small + small if kind == "cpu" else peak_of(rows)))

    largest: int | None = None
    if target.memory is not None:
        room = 0.95 * target.memory - sum(fixed.values())

        def needed(rows: int) -> int:
            # Fewer rows than a lane has are summed up, which takes a set of gradients more.
            more = 4 * parameters if not accumulate and rows < per_lane else 0
            return peak_of(rows) + allocator_bytes(rows) + more

        largest = _most_rows(needed, micro, _last_at_once(config, target), room)
        if train.micro_batch == "auto" and kind == "cuda" and largest < micro:
            micro = largest_divisor(per_lane, max(1, largest))
            peak, found = peak_of(micro), passes[micro]
    overhead = allocator_bytes(micro)
    activations = min(found.kept, peak - found.gradients)  # gradients have taken the place of others by then
    temporary = peak - found.gradients - activations
    moving = {"activations": activations, "temporary": temporary, "allocator": overhead}
    parts = fixed | moving
    parts["gradients"] += found.gradients
    # After the passes one set of gradients is left, beside what their exchange and the update take.
    left = fixed["gradients"] if sharded else 4 * parameters
    if sharded:
        after = 3 * left  # at their owners matrices and their gradients become whole
    else:
        # What is sent, and if the order is exact what is received, before it is added.
        after = left + (0 if devices == 1 else 2 * BUCKET_BYTES if exact else BUCKET_BYTES)
    after = max(after, left + 16 * min(BATCH_ELEMENTS.get(kind, 1 << 23), parameters))
    if after > fixed["gradients"] + peak + overhead:
        parts = fixed | {"gradients": left, "exchange and update": after - left}
    return MemoryPlan(parts, micro, largest)


def _gathered(optimizer: Optimizer) -> int:
    """Bytes of whole weights on a rank that holds a share of them: what lies outside of the layers during the whole
    pass, the layer that computes and the next one, which is on its way; not measured."""
    sizes: dict[str, int] = {}
    for group in optimizer.groups:
        for row in group.rows:
            place = row.name.split(".")
            layer = ".".join(place[:2]) if place[0] in ("blocks", "mtp") else ""
            sizes[layer] = sizes.get(layer, 0) + 4 * row.parameter.numel()
    outside = sizes.pop("", 0)
    return outside + sum(sorted(sizes.values())[-2:])


def _slack(config: RunConfig, kind: str, sets: int) -> float:
    model = config.model
    mixed = set(model.pattern) & set("MRF") or "e" in model.ffn or "m" in model.depth
    if kind == "cpu" and sets > 1 and (mixed or config.train.activation_checkpointing != "none"):
        return MIXED_BLOCKS
    return ALLOCATOR.get(kind, 1.1)


def largest_divisor(number: int, limit: int) -> int:
    """The largest divisor of `number` up to `limit`, at least 1."""
    return max(n for n in range(1, number + 1) if number % n == 0 and n <= max(1, limit))


def usual_rows(per_lane: int, context_length: int, device_type: str) -> int:
    """Rows of a forward pass when nobody asks for a number: a divisor of those of a lane, some thousand tokens."""
    return largest_divisor(per_lane, (8_192 if device_type == "cpu" else 65_536) // context_length)


def _last_at_once(config: RunConfig, target: Target) -> int:
    """Most rows of which the loss holds all logits at once; with one more it works in chunks."""
    length, ids = config.model.context_length, config.model.padded_vocab
    first = bisect_left(range(1 << 30), True, key=lambda rows: chunk_for(rows * length, ids, target.device_type) > 0)
    return max(0, first - 1)


def _most_rows(peak_of: Callable[[int], int], micro: int, last: int, room: float) -> int:
    """Most rows whose peak fits `room` bytes; `last`: of `_last_at_once`.

    On either side of `last` memory is linear in the rows, or bends upwards where another part becomes the peak. Across
    it, it is not: more rows may need less.
    """

    def line(a: int, b: int, most: int) -> int:
        end = b
        while peak_of(b) < 1.1 * peak_of(a) and 2 * b <= min(most, 64 * a):  # a part without rows is still the peak
            b *= 2
        if b > end and 2 * b <= most:
            a, b = b, 2 * b
        growth = max(1.0, (peak_of(b) - peak_of(a)) / (b - a))
        return max(0, math.floor(a + (room - peak_of(a)) / growth))

    def few() -> int:
        end = min(last, micro) if 1 < micro <= last else min(last, 2)
        if end < 2:
            return int(end == 1 and peak_of(1) <= room)
        return min(last, line(1, end, last))

    def many() -> int:
        first = last + 1
        found = line(first, micro if micro > first else 2 * first, 128 * first)
        return found if found >= first else 0

    if room <= 0:
        return 0
    if micro > last:
        return many() or few()
    found = few()
    return max(found, many()) if found == last else found


def _pass(config: RunConfig, target: Target, rows: int, accumulate: bool, compiled: bool) -> PassMemory:
    length, model = config.model.context_length, config.model
    chunk = chunk_for(rows * length, model.padded_vocab, target.device_type)

    def at(tokens: int) -> PassMemory:
        return trace_pass(
            model,
            rows=rows,
            length=tokens,
            dtype=machine.DTYPES[target.dtype],
            device_type=target.device_type,
            checkpoint_every=config.train.checkpoint_every,
            chunk=None if tokens == length else chunk,
            compiled=compiled,
            fused_head=fuses_head(model, target.device_type),
            accumulate=accumulate,
        )

    if length <= _LONG or not set(model.pattern) & set("MR"):
        return at(length)
    # With the loss of the true length; from two whole chunks on, more of them need no more.
    unit = _LONG // 4 * math.ceil(max(1, 2 * chunk) / rows / (_LONG // 4))
    if 2 * unit >= length:
        return at(length)
    short, long = at(unit), at(2 * unit)
    steps = (length - 2 * unit) / unit
    return PassMemory(
        round(long.kept + steps * (long.kept - short.kept)),
        round(long.peak + steps * (long.peak - short.peak)),
        long.gradients,
        round(long.small + steps * max(0, long.small - short.small)),
    )


def _advice(config: RunConfig, memory: MemoryPlan, target: Target) -> str:
    """What makes a run fit, the cheapest first: nothing that is set already, nothing that would not help."""
    assert target.memory is not None
    recompute = "--set train.activation_checkpointing=full"
    recomputes = config.train.activation_checkpointing == "full"
    if memory.largest_micro_batch:
        # A divisor of the rows asked for divides the rows of a lane, too.
        asked = memory.micro_batch
        rows = max(n for n in range(1, memory.largest_micro_batch + 1) if asked % n == 0)
        return (
            f"{asked} rows per forward pass do not fit {target.name}: use --set train.micro_batch={rows}"
            f"{'' if recomputes else ' or ' + recompute}"
        )
    fixed = sum(memory.parts.get(name, 0) for name in FIXED)
    fits = fixed < 0.95 * target.memory
    ways = [recompute] if fits and not recomputes else []
    ways += ["a shorter model.context_length"] if fits and config.model.context_length > 256 else []
    ways += ["--set train.checkpoint.background=false"] if memory.parts.get("checkpoint copy") else []
    ways += ["--set optim.optimizer=adamw8bit"] if config.optim.optimizer != "adamw8bit" else []
    ways += ["more devices (they share the optimizer's state)"] if target.device_type == "cuda" else []
    ways += ["a smaller model"]
    said = f"not even one row fits {target.name}"
    if not fits:
        share = format_bytes(fixed), format_bytes(target.memory)
        said += f", as what does not depend on the rows takes {share[0]} of {share[1]}"
    return f"{said}: try {', '.join(ways[:-1])}{' or ' if len(ways) > 1 else ''}{ways[-1]}"


def _orthogonalisation(rows: Any) -> float:
    """Operations of Muon's five iterations for the matrices of some parameters, once."""
    total = 0.0
    for row in rows:
        shape, copies = row.parameter.shape, 1
        if len(shape) == 3:
            copies, shape = shape[0], shape[1:]
        for out in row.splits or (shape[0],):
            short, long = min(out, shape[1]), max(out, shape[1])
            total += copies * (20.0 * short * short * long + 10.0 * short**3)
    return total


# ---------------------------------------------------------------------------------------- every parameter


def list_parameters(config: RunConfig) -> list[dict[str, Any]]:
    """Every parameter with its role, group, learning rate, decay and initial values."""
    optimizer, table = meta_optimizer(config)
    group_of = {row.name: group for group in optimizer.groups for row in group.rows}
    small = _small_twin(config.model)
    rows = []
    for info in table:
        group = group_of[info.name]
        rows.append(
            {
                "parameter": info.name,
                "shape": list(info.parameter.shape),
                "splits": list(info.splits),
                "role": str(info.role),
                "group": group.name,
                "optimizer": group.kind,
                "lr": group.lr,
                "weight_decay": group.weight_decay,
                "initial": _initial(small[info.name]),
            }
        )
    return rows


def _small_twin(config: ModelConfig) -> dict[str, torch.Tensor]:
    """Initial values by name, of a model with the same layers and a width that can be drawn at once.

    Initial values depend on the depth, the standard deviation and the context length, not on the width.
    """
    heads = min(config.num_heads, 2)
    width = 128
    fields = config.model_dump()
    fields |= {"vocab_size": 1024, "d_model": width, "num_heads": heads, "num_kv_heads": 0, "head_dim": 64, "d_ff": 256}
    fields["moe"] |= {"num_experts": 4, "top_k": min(2, config.moe.top_k), "d_expert": 64}
    fields["mamba"] |= {"d_state": 64, "head_dim": 16, "num_groups": 1, "num_experts": 4}
    fields["mamba"]["top_k"] = min(2, config.mamba.top_k)
    fields["resonance"] |= {"num_kernels": 4}
    twin = LanguageModel(build(ModelConfig, fields))
    return {name: parameter.detach() for name, parameter in twin.named_parameters()}


def _initial(values: torch.Tensor) -> str:
    """What was drawn, in words: read off the numbers themselves."""
    flat = values.flatten().double()
    if flat.numel() == 1 or flat.max() == flat.min():
        return f"{flat[0]:.4g}"
    mean, std = float(flat.mean()), float(flat.std())
    if values.ndim >= 2 and flat.numel() >= 4096 and abs(mean) < 0.1 * std:
        kurtosis = float((flat - mean).pow(4).mean()) / std**4
        if kurtosis > 2.5:
            return f"normal, std {std:.3g}"
    return f"{flat.min():.3g} .. {flat.max():.3g}"
