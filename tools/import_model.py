"""`lm import-model`: a model of transformers as a run of ours. The work is in lmcore/inference/import_model.py."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import ui


def command(
    source: Annotated[
        str, typer.Argument(metavar="MODEL", help="Directory of a transformers model, or its name on the Hub.")
    ],
    out: Annotated[
        Path,
        typer.Option("--out", "-o", help="The run directory to make.", rich_help_panel="Output", show_default=False),
    ],
    json: ui.Json = False,
    quiet: ui.Quiet = False,
) -> None:
    """Make a run of an existing model: evaluate it, sample from it, train it further.

    Reads llama, mistral, qwen3, qwen3_moe, dots1, qwen3_next, granitemoehybrid and mamba2 from safetensors. The model
    computes what transformers computes: what ours do not have (biases, scaled rotary angles, ...), and every key of
    config.json that is not known, is refused by name. lm generate and lm eval read such a directory without this
    command.

    Examples:

        lm import-model models/some-llama --out runs/some-llama

        lm import-model Qwen/Qwen3-0.6B --out runs/qwen
    """
    from lmcore.inference.import_model import import_model

    with ui.progress(quiet) as progress:
        report = import_model(source, out, progress=progress)
    if json:
        ui.emit_json(vars(report) | {"config": report.config.model_dump(mode="json")})
        return
    if report.unchanged:
        ui.say(f"{report.run}: this very import was done before; nothing was changed")
    ui.emit(f"{report.run}: {report.parameters:,} parameters, {report.family}")
    ui.emit(f"Try it with: lm generate --checkpoint {report.run}" if report.tokenizer else "It has no tokenizer.")
