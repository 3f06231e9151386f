"""`lm merge`: the parts of one plan become one set, without copying tokens."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from . import ui


def command(
    parts: Annotated[list[Path], typer.Argument(help="Directories of all parts of one plan, in any order.")],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Directory of the merged set.", show_default="the common name of the parts"),
    ] = None,
    json: ui.Json = False,
    quiet: ui.Quiet = False,
) -> None:
    """Join the parts that `lm tokenize --part I/N` made. The tokens stay where they are; the set holds links to them.

    Examples:

        for i in 1 2 3 4; do lm tokenize corpus/ --part $i/4; done

        lm merge shards/corpus-part-*
    """
    from lmcore.data.merge import merge
    from lmcore.errors import quoted

    target = out or parts[0].with_name(re.sub(r"-part-\d+-of-\d+$", "", parts[0].name) or "merged")
    if target.resolve() in {part.resolve() for part in parts}:
        target = target.with_name(target.name + "-merged")
    manifest = merge(parts, target)
    if json:
        ui.emit_json(
            {
                "path": str(target),
                "dataset_id": manifest.dataset_id,
                "n_shards": len(manifest.shards),
                "n_tokens": manifest.n_tokens,
                "n_docs": manifest.n_docs,
            }
        )
        return
    rows = [
        ("parts", f"{len(parts):,}"),
        ("shards", f"{len(manifest.shards):,}"),
        ("tokens", f"{manifest.n_tokens:,}"),
        ("documents", f"{manifest.n_docs:,}"),
        ("dataset_id", manifest.dataset_id),
    ]
    ui.table(("merged set", str(target)), rows)
    if not quiet:
        ui.say(f"Next: lm validate {quoted(target)}, then lm split {quoted(target)}")
