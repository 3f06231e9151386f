"""`lm export`: a trained model for other programs. The work is in lmcore/inference/export.py."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated

import typer

from . import ui

WHAT, WEIGHTS = "What is written", "Weights"


class Format(enum.StrEnum):
    """Form of the export."""

    hf = "hf"
    safetensors = "safetensors"


class Family(enum.StrEnum):
    """Architectures of transformers that can carry our models."""

    auto = "auto"
    llama = "llama"
    mistral = "mistral"
    qwen3 = "qwen3"
    qwen3_moe = "qwen3_moe"
    dots1 = "dots1"
    qwen3_next = "qwen3_next"
    granitemoehybrid = "granitemoehybrid"
    mamba2 = "mamba2"


class Dtype(enum.StrEnum):
    """Number format of the exported weights."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


def command(
    model: Annotated[
        Path | None,
        typer.Argument(
            metavar="[RUN]", help="Run or checkpoint; default: the run that was trained last.", show_default=False
        ),
    ] = None,
    out: Annotated[
        Path,
        typer.Option("--out", "-o", help="New directory (or file, with --format safetensors).", rich_help_panel=WHAT),
    ] = Path("export"),
    format: Annotated[
        Format,
        typer.Option(help="hf: a Hugging Face directory. safetensors: one file, our names.", rich_help_panel=WHAT),
    ] = Format.hf,
    family: Annotated[
        Family,
        typer.Option(help="Architecture in transformers; auto takes the simplest that fits.", rich_help_panel=WHAT),
    ] = Family.auto,
    check: Annotated[
        bool,
        typer.Option(
            "--check", help="Load the result with transformers and compare logits and tokens.", rich_help_panel=WHAT
        ),
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Replace an earlier export of this name.", rich_help_panel=WHAT)
    ] = False,
    dtype: Annotated[Dtype, typer.Option(help="Number format of the weights.", rich_help_panel=WEIGHTS)] = Dtype.fp32,
    average: Annotated[
        str | None,
        typer.Option(
            metavar="last:N",
            help="Mean of the N newest checkpoints of the run.",
            rich_help_panel=WEIGHTS,
            show_default=False,
        ),
    ] = None,
    drop_mtp: Annotated[
        bool, typer.Option("--drop-mtp", help="Leave multi-token heads out.", rich_help_panel=WEIGHTS)
    ] = False,
    runs: Annotated[
        Path, typer.Option(envvar="LM_RUNS", help="Where runs are looked for.", rich_help_panel=WEIGHTS)
    ] = Path("runs"),
    json: ui.Json = False,
    quiet: ui.Quiet = False,
) -> None:
    """Write a trained model for transformers, vLLM and other programs.

    A directory with weights, tokenizer, generation settings and a model card with the origin of the data. What an
    architecture of transformers cannot carry is refused by name; --format safetensors carries every model.

    Examples:

        lm export runs/nano --out models/nano --check

        lm export runs/nano --out models/nano-bf16 --dtype bf16 --average last:5

        lm export runs/hybrid --out hybrid.safetensors --format safetensors
    """
    from lmcore.inference.export import export_model
    from lmcore.training import checkpoint as checkpoints

    with ui.progress(quiet) as progress:
        report = export_model(
            model or checkpoints.find_run(runs),
            out,
            kind=format.value,
            family=family.value,
            dtype=dtype.value,
            average=average,
            drop_mtp=drop_mtp,
            check=check,
            replace=force,
            progress=progress,
        )
    if json:
        ui.emit_json(vars(report))
        return
    from lmcore.storage import format_bytes

    architecture = f", {report.family}" if report.family else ""
    if report.unchanged:
        ui.say(f"{report.out}: this very export was done before; nothing was changed")
    ui.emit(f"{report.out}: {report.parameters:,} parameters{architecture}, {format_bytes(report.bytes)}")
    if report.logit_difference is not None:
        ui.emit(f"transformers computes the same logits (largest relative difference {report.logit_difference:.1e})")
