"""`lm split`: train and validation views of a shard set, without copying tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from . import ui

_WHAT = "What is held out"
_HOW = "How views are made"


def command(
    path: Annotated[Path, typer.Argument(help="The shard set.", show_default=False)],
    val_fraction: Annotated[
        float | None,
        typer.Option(
            help="Share of the documents that val holds; 0.01 when nothing is said.",
            rich_help_panel=_WHAT,
            show_default=False,
        ),
    ] = None,
    val_docs: Annotated[
        int | None,
        typer.Option(help="Number of distinct documents that val holds.", rich_help_panel=_WHAT, show_default=False),
    ] = None,
    view: Annotated[
        list[str] | None,
        typer.Option(
            "--view", help="NAME=FRACTION, several times: --view val=0.01 --view test=0.01.", rich_help_panel=_WHAT
        ),
    ] = None,
    by: Annotated[
        str,
        typer.Option(help="document, shard or rows; auto takes the first that the set allows.", rich_help_panel=_WHAT),
    ] = "auto",
    salt: Annotated[
        int, typer.Option(min=0, help="Another number holds out other documents.", rich_help_panel=_WHAT)
    ] = 0,
    link: Annotated[
        str,
        typer.Option(help="Shards of a view: symlink, hardlink, copy, or none (manifest only).", rich_help_panel=_HOW),
    ] = "symlink",
    materialize: Annotated[
        bool,
        typer.Option(
            "--materialize",
            help="Write the view's tokens into shards of its own, for readers that know no manifest.",
            rich_help_panel=_HOW,
        ),
    ] = False,
    replace: Annotated[
        bool,
        typer.Option(
            "--replace",
            help="Replace the views of an earlier split; runs that were trained on them cannot be continued then.",
            rich_help_panel=_HOW,
        ),
    ] = False,
    min_tokens: Annotated[int, typer.Option(min=1, help="Refuse views with fewer tokens.", rich_help_panel=_HOW)] = 257,
    json: ui.Json = False,
    quiet: ui.Quiet = False,
) -> None:
    """Make train and validation views of a shard set.

    Documents are held out by the hash of their content: the choice is stable when data is added, duplicates stay on
    one side, and no token is copied. Running it again changes nothing; with other options it is refused (exit 73).

    Examples:

        lm split shards/stdlib

        lm split shards/web --view val=0.005 --view test=0.005

        lm split shards/foreign --by shard --val-fraction 0.1
    """
    from lmcore.data.split import split_set
    from lmcore.errors import LmError

    fractions = _fractions(view or [])
    if val_fraction is not None:
        fractions["val"] = val_fraction
    if by not in ("auto", "document", "shard", "rows"):
        raise LmError(f"--by {by}: choose auto, document, shard or rows.")
    if link not in ("symlink", "hardlink", "copy", "none"):
        raise LmError(f"--link {link}: choose symlink, hardlink, copy or none.")
    with ui.progress(quiet or json) as progress:
        report = split_set(
            path,
            fractions,
            by=by,  # type: ignore[arg-type]
            documents={"val": val_docs} if val_docs is not None else None,
            salt=salt,
            link=link,  # type: ignore[arg-type]
            materialize=materialize,
            replace=replace,
            min_tokens=min_tokens,
            progress=progress,
        )
    if json:
        ui.emit_json(_document(report))
        return
    ui.table(
        ["view", "tokens", "share", "documents", "dataset_id", ""],
        [
            (
                str(v.path),
                f"{v.n_tokens:,}",
                f"{100 * v.share:.2f} %",
                f"{v.n_docs:,}",
                v.dataset_id[:16],
                "written" if v.changed else "unchanged",
            )
            for v in report.views
        ],
        title=f"{path} split by {report.by}",
        right=["tokens", "share", "documents"],
    )
    ui.emit(_LEAKAGE[report.leakage].format(n=report.common_documents))
    for name in report.removed:
        ui.say(f"removed the view {name} of an earlier split")
    for warning in report.warnings:
        ui.say(f"note: {warning}")


_LEAKAGE = {
    "none": "No document lies in two views (proven by content hashes).",
    "documents": "{n:,} documents lie in more than one view (the same text in several shards).",
    "unverifiable": "There is no document index, so it cannot be known whether a document lies in two views.",
}


def _fractions(views: list[str]) -> dict[str, float]:
    from lmcore.errors import LmError

    result: dict[str, float] = {}
    for text in views:
        name, equals, value = text.partition("=")
        try:
            result[name] = float(value)
        except ValueError:
            equals = ""
        if not equals:
            raise LmError(f"--view {text}: expected NAME=FRACTION, such as --view val=0.01.")
    return result


def _document(report: Any) -> dict[str, Any]:
    from dataclasses import asdict

    return asdict(report)
