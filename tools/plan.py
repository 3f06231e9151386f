"""`lm plan`: what a run will cost, before it is started. The work is in lmcore/training/plan.py."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from . import ui

if TYPE_CHECKING:
    from lmcore.training.plan import Draft, RunPlan

RUN, MACHINE, SHOW = "Run", "Machine", "What to show"


def command(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="[PRESET]",
            help="Name of a preset (lm train --list-presets), a YAML file or the config.yaml of a run; default: nano.",
            show_default=False,
        ),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            "--preset",
            "--config",
            "-p",
            help="The same, as `lm train` takes it.",
            rich_help_panel=RUN,
            show_default=False,
        ),
    ] = None,
    settings: ui.Settings = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            "-d",
            metavar="SET",
            help="Shard set, for its vocabulary and the number of epochs.",
            rich_help_panel=RUN,
            show_default=False,
        ),
    ] = None,
    tokens: Annotated[
        str | None,
        typer.Option(
            "--tokens", help="Length of the run, such as 500M or 10B.", rich_help_panel=RUN, show_default=False
        ),
    ] = None,
    hours: Annotated[
        float | None,
        typer.Option(
            "--hours", help="Length of the run in time: what fits into it.", rich_help_panel=RUN, show_default=False
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            "--device",
            help="This machine (auto, cpu, cuda, mps), or a GPU by name: h100; default: train.device.",
            rich_help_panel=MACHINE,
            show_default=False,
        ),
    ] = None,
    devices: Annotated[
        int, typer.Option("--devices", min=1, help="How many of them train together.", rich_help_panel=MACHINE)
    ] = 1,
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype",
            help="Arithmetic: auto, bf16, fp16, fp32; default: train.dtype.",
            rich_help_panel=MACHINE,
            show_default=False,
        ),
    ] = None,
    mfu: Annotated[
        float | None,
        typer.Option(
            "--mfu",
            help="Utilisation of the peak to reckon with; default: what is usual (0.4 on a GPU, 0.3 on a CPU).",
            rich_help_panel=MACHINE,
            show_default=False,
        ),
    ] = None,
    tokens_per_s: Annotated[
        float | None,
        typer.Option(
            "--tokens-per-s",
            help="Judge a claimed throughput: gives its MFU, or refuses it.",
            rich_help_panel=MACHINE,
            show_default=False,
        ),
    ] = None,
    parameters: Annotated[
        bool,
        typer.Option(
            "--parameters",
            help="List every parameter: shape, group, learning rate, decay, initial values.",
            rich_help_panel=SHOW,
        ),
    ] = False,
    json: ui.Json = False,
) -> None:
    """Plan a run: exact parameters and operations, memory by part, time, disk, epochs.

    Nothing is trained and nothing is written. Parameter counts and operations are exact; memory is found by running the
    model without data; time follows from the peak of the device and a stated utilisation (MFU).

    Examples:

        lm plan gpt2-124m

        lm plan small --tokens 10B --device h100 --devices 8

        lm plan small --hours 24 --device a100 --mfu 0.5

        lm plan medium --device a100 --tokens-per-s 30000     is that possible?

        lm plan nano --parameters
    """
    from lmcore.config import merge, parse_count, parse_overrides
    from lmcore.errors import LmError
    from lmcore.training.config import read_preset
    from lmcore.training.plan import draft, find_target, plan_run, tokens_in

    if dtype not in (None, "auto", "bf16", "fp16", "fp32"):
        raise LmError(f"--dtype {dtype}: choose auto, bf16, fp16 or fp32.")
    if name is not None and preset is not None:
        raise LmError(f"the preset is given twice: {name} and --preset {preset}.")
    if tokens is not None and hours is not None:
        raise LmError("--tokens and --hours both give the length of the run; give one of them.")
    if hours is not None and not hours > 0:
        raise LmError(f"--hours {hours:g}: the length of a run is more than nothing.")
    length: int | None = None
    if tokens is not None:
        try:
            parsed = parse_count(tokens)
        except ValueError as error:
            raise LmError(f"--tokens: {error}.") from None
        if not isinstance(parsed, int) or parsed < 1:
            raise LmError(f"--tokens {tokens}: a number such as 500M or 10B is expected.")
        length = parsed
    _, raw = read_preset(name or preset or "nano")
    raw = merge(raw, parse_overrides(settings or []), {"data": {"train": data, "val": []}} if data else {})
    drafted: Draft = draft(raw, tokens=length)
    if parameters:
        return _list_parameters(drafted, json)
    train = drafted.config.train
    target = find_target(device or train.device, dtype or train.dtype)
    if hours is not None:
        drafted = draft(raw, tokens=tokens_in(hours, drafted, target, devices=devices, mfu=mfu))
    plan = plan_run(drafted, target, devices=devices, mfu=mfu, tokens_per_s=tokens_per_s)
    if json:
        ui.emit_json(plan.document())
    else:
        show(plan)


# ---------------------------------------------------------------------------------------- the tables


def show(plan: RunPlan) -> None:
    """Print a plan for people; `lm train --dry-run` prints the same."""
    from lmcore.storage import format_bytes

    m, target = plan.model, plan.target
    where = f"{plan.devices} x {target.name}" if plan.devices > 1 else target.name
    ui.table(
        ["part", "parameters", "active per token", "operations per token"],
        [
            *(
                (
                    p.name + (" (training only)" if p.training_only else ""),
                    f"{p.parameters:,}",
                    f"{p.active:,}",
                    _ops(3 * p.flops),
                )
                for p in m.parts
            ),
            ("total", f"{m.parameters:,}", f"{m.active:,}", _ops(m.train_flops)),
        ],
        title="Model",
        right=["parameters", "active per token", "operations per token"],
    )
    ui.table(
        ["", ""],
        [
            ("operations per token, exact", f"{_ops(m.train_flops)} training, {_ops(m.forward_flops)} forward"),
            ("operations per token, PaLM-style", f"{_ops(m.palm_flops)} training (6 N + 12 L H K T, not causal)"),
            ("cache of one sequence", f"{format_bytes(m.cache_bytes)} for {m.length:,} tokens, in 16 bits"),
        ],
    )
    ui.table(
        ["group", "optimizer", "tensors", "parameters", "lr", "weight decay"],
        [
            (
                g["group"],
                g["optimizer"],
                g["tensors"],
                f"{g['parameters']:,}",
                f"{g['lr']:.3g}",
                f"{g['weight_decay']:.3g}",
            )
            for g in plan.groups
        ],
        title="Optimizer",
        right=["tensors", "parameters", "lr", "weight decay"],
    )
    memory = plan.memory
    rows = [(name, format_bytes(size)) for name, size in memory.parts.items()]
    rows.append((f"together, with {memory.micro_batch} rows per pass", format_bytes(memory.total)))
    if memory.largest_micro_batch is not None and target.memory is not None:
        rows.append((f"most rows per pass in {format_bytes(target.memory)}", f"{memory.largest_micro_batch:,}"))
    ui.table(["memory per device", ""], rows, title=f"{where}, {target.dtype}", right=[""])
    ui.table(["", ""], _run_rows(plan), title="Run")
    for note in plan.notes:
        ui.say(f"note: {note}.")
    ui.emit(
        "for a run of this length the size rules give: "
        + " ".join(f"--set {key}={value}" for key, value in plan.suggested.items())
    )


def _run_rows(plan: RunPlan) -> list[tuple[str, str]]:
    from lmcore.model.plan import CHINCHILLA
    from lmcore.storage import format_bytes

    config, target = plan.config, plan.target
    rows = [
        ("tokens", f"{plan.tokens:,} = {plan.steps:,} steps of {config.batch_tokens:,}"),
        (
            "tokens per active parameter",
            f"{plan.tokens_per_parameter:,.1f} ({CHINCHILLA:.0f} is compute-optimal)",
        ),
    ]
    if plan.epochs is not None:
        rows.append(("epochs", f"{plan.epochs:,.2f} of {plan.dataset_tokens:,} tokens"))
    rows.append(("operations", f"{plan.tokens * plan.model.train_flops:.3g}"))
    rows.append(("optimizer", f"{100 * plan.optimizer_share:.1f} % more operations (orthogonalisation)"))
    if target.peak_flops is not None and plan.tokens_per_s is not None and plan.seconds is not None:
        rows.append(("peak", f"{target.peak_flops / 1e12:,.4g} TFLOP/s per device ({target.source})"))
        word = "claimed" if plan.claimed_tokens_per_s is not None else "assumed"
        rows.append((f"throughput, MFU {plan.mfu:.2f} {word}", f"{plan.tokens_per_s:,.0f} tokens/s"))
        rows.append(("time", _duration(plan.seconds)))
    rows.append(
        ("disk", f"{format_bytes(plan.disk_bytes)} for checkpoints of {format_bytes(plan.checkpoint_bytes)} each")
    )
    return rows


def _ops(value: float) -> str:
    for limit, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:,.3g} {suffix}FLOP"
    return f"{value:,.0f} FLOP"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:,.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:,.0f} min"
    return f"{seconds / 3600:,.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:,.1f} days"


def _list_parameters(drafted: Draft, json: bool) -> None:
    from lmcore.training.plan import list_parameters

    rows = list_parameters(drafted.config)
    if json:
        ui.emit_json(rows)
        return
    columns = ["parameter", "shape", "role", "group", "optimizer", "lr", "weight_decay", "initial values"]
    ui.table(
        [column.replace("_", " ") for column in columns],
        [
            (
                row["parameter"],
                " x ".join(map(str, row["shape"]))
                + (f" ({'+'.join(map(str, row['splits']))})" if row["splits"] else ""),
                row["role"],
                row["group"],
                row["optimizer"],
                f"{row['lr']:.3g}",
                f"{row['weight_decay']:.3g}",
                row["initial"],
            )
            for row in rows
        ],
        right=["lr", "weight decay"],
    )
