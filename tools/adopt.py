"""`lm import`: token data of other programs becomes a shard set."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import ui

_WHAT = "What the data is"
_HOW = "How it is adopted"


def command(
    path: Annotated[Path, typer.Argument(help="A file or folder of token data.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Directory of the new shard set.", show_default=False)],
    tokenizer: Annotated[
        str | None,
        typer.Option(
            help="The tokenizer that made the ids: byte, a tokenizer.json, or a Hub name.",
            rich_help_panel=_WHAT,
            show_default=False,
        ),
    ] = None,
    width: Annotated[
        int | None,
        typer.Option(
            help="Bytes per id (1, 2, 4 or 8) of headerless files; looked up, or asked for, when not given.",
            rich_help_panel=_WHAT,
            show_default=False,
        ),
    ] = None,
    column: Annotated[
        str | None,
        typer.Option(
            help="Column of parquet and Arrow files with lists of ids; input_ids, or the only one.",
            rich_help_panel=_WHAT,
            show_default=False,
        ),
    ] = None,
    seq_len: Annotated[
        int | None,
        typer.Option(
            min=16,
            max=32768,
            help="Row length of converted shards; the data's own.",
            rich_help_panel=_HOW,
            show_default=False,
        ),
    ] = None,
    copy: Annotated[
        bool, typer.Option("--copy", help="Copy the tokens even where links would do.", rich_help_panel=_HOW)
    ] = False,
    json: ui.Json = False,
    quiet: ui.Quiet = False,
) -> None:
    """Adopt token data: .npy or .pt arrays, nanoGPT and llm.c .bin, Megatron .bin/.idx, datatrove .ds, columns of ids.

    Files that already are what a shard looks like are linked; others are converted once. With --tokenizer the documents
    are found by EOS, so that the set can be split by document. Files named train and val become two sets.

    Examples:

        lm import nanoGPT/data/openwebtext --out shards/owt --tokenizer gpt2

        lm import /data/arrays --out shards/arrays
    """
    from dataclasses import asdict

    from lmcore.data.adopt import adopt
    from lmcore.data.tokenizer import Tokenizer
    from lmcore.errors import quoted

    with ui.progress(quiet or json) as progress:
        reports = adopt(
            path,
            out,
            tokenizer=Tokenizer.load(tokenizer) if tokenizer else None,
            width=width,
            column=column,
            seq_len=seq_len,
            copy=copy,
            progress=progress,
        )
    if json:
        ui.emit_json([asdict(report) for report in reports])
        return
    ui.table(
        ["set", "from", "tokens", "documents", "linked", "converted", "dataset_id"],
        [
            (r.path, r.kinds, f"{r.n_tokens:,}", f"{r.n_docs:,}", r.linked, r.converted, r.dataset_id[:16])
            for r in reports
        ],
        right=["tokens", "documents", "linked", "converted"],
    )
    for report in reports:
        for warning in report.warnings:
            ui.say(f"note: {report.path}: {warning}")
    ui.emit(f"Next: lm validate {quoted(reports[0].path)}")
