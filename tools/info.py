"""`lm info`: what an artefact is and where it comes from. The work is in lmcore/inference/info.py."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from . import ui


def command(
    path: Annotated[Path, typer.Argument(help="Export, run, checkpoint, shard set, view, or a directory with a plan.")],
    quick: Annotated[
        bool,
        typer.Option("--quick", help="Check shards and source files by size only.", rich_help_panel="Verification"),
    ] = False,
    json: ui.Json = False,
    quiet: ui.Quiet = False,
) -> None:
    """Tell what something is, where it comes from, and verify the chain up to the source files.

    Exit 65 when a link is broken: a parent, or a file of the artefact itself, is no longer what it was. A parent that
    is not here is said to be away, and is no error.

    Examples:

        lm info models/nano

        lm info runs/nano --quick

        lm info shards/stdlib/train --json
    """
    from lmcore.errors import Exit
    from lmcore.inference.info import describe

    with ui.progress(quiet) as progress:
        found = describe(path, quick=quick, progress=progress)
    if json:
        ui.emit_json(found.to_json() | {"sound": found.sound})
    else:
        signs = {"holds": "ok", "broken": "BROKEN", "away": "away"}
        for depth, artefact in found.walk():
            identity = f"  {artefact.identity[:16]}" if artefact.identity else ""
            indent = "    " * depth
            ui.emit(f"{indent}{artefact.kind}  {artefact.path}{identity}  [{signs[artefact.state]}]")
            if artefact.problem:
                ui.emit(f"{indent}    {artefact.problem}")
            for name, value in artefact.facts.items():
                ui.emit(f"{indent}    {name.replace('_', ' ')}: {_shown(value)}")
    if not found.sound:
        raise typer.Exit(int(Exit.DATA))


def _shown(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4f}"
    if isinstance(value, list):
        return ", ".join(str(item) for item in value) or "none"
    return str(value)
