"""`lm validate`: is this data what it says it is, and what is it good for?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import ui

if TYPE_CHECKING:
    from lmcore.data.validate import Report

_DEPTH = "How much is checked"
_WHAT = "What happens then"


def command(
    path: Annotated[
        Path | None,
        typer.Argument(help="A shard set, a view, a folder of sets, or foreign token data.", show_default=False),
    ] = None,
    quick: Annotated[
        bool,
        typer.Option("--quick", help="Sizes, headers, indexes and views; no token is read.", rich_help_panel=_DEPTH),
    ] = False,
    deep: Annotated[
        bool,
        typer.Option("--deep", help="Also decode every document, and n-grams of views.", rich_help_panel=_DEPTH),
    ] = False,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Threads; all cores by default.", rich_help_panel=_DEPTH)
    ] = None,
    repair: Annotated[
        bool,
        typer.Option("--repair", help="Make damaged shards again from the plan, then check.", rich_help_panel=_WHAT),
    ] = False,
    explain: Annotated[
        str | None, typer.Option(metavar="CODE", help="Say what a finding means and leave.", rich_help_panel=_WHAT)
    ] = None,
    json: ui.Json = False,
    quiet: ui.Quiet = False,
) -> None:
    """Check token data: every fault is listed with a stable code, and the exit code is 65 when there is one.

    Without faults it shows what the data is: totals, lengths, the most frequent ids, decoded samples, and what it is
    enough for.

    Examples:

        lm validate shards/stdlib

        lm validate --quick shards

        lm validate --explain V060
    """
    from lmcore.errors import Exit, LmError

    if explain is not None:
        from lmcore.data.findings import explain as explanation

        ui.emit(explanation(explain))
        return
    if path is None:
        raise LmError("name a shard set to check.", hint="For example: lm validate shards/stdlib")
    if quick and deep:
        raise LmError("--quick and --deep exclude each other.")
    from lmcore.data.validate import validate

    level: Any = "quick" if quick else "deep" if deep else "default"
    with ui.progress(quiet or json) as progress:
        report = validate(path, level, workers=workers, progress=progress)
        if repair and not report.ok:
            from lmcore.data.validate import repair as mend

            for done in mend(report, progress=progress):
                ui.say(f"repaired {done}")
            report = validate(path, level, workers=workers, progress=progress)
    if json:
        ui.emit_json(_document(report))
    else:
        _show(report)
    if not report.ok:
        raise typer.Exit(int(Exit.DATA))


def _document(report: Report) -> dict[str, Any]:
    from dataclasses import asdict

    document = asdict(report) | {"ok": report.ok, "errors": report.errors}
    for entry, finding in zip(document["findings"], report.findings, strict=True):
        entry["severity"] = finding.severity
    return document


def _show(report: Report) -> None:
    for finding in report.findings:
        repair = f"lm validate {report.path} --repair" if finding.repair.startswith("--repair") else finding.repair
        mend = f" Try: {repair}" if repair else ""
        ui.emit(f"{finding.severity} {finding.code} {finding.where}: {finding.message.rstrip(chr(46))}.{mend}")
    for code, count in report.more.items():
        ui.emit(f"... and {count:,} more {code}")
    ui.table(
        ["set", "kind", "tokens", "documents", "shards", "tokenizer", "dataset_id"],
        [
            (s.path, s.kind, f"{s.n_tokens:,}", f"{s.n_docs:,}", s.n_shards, s.tokenizer or "-", s.dataset_id[:16])
            for s in report.sets
        ],
        right=["tokens", "documents", "shards"],
    )
    for entry in report.sets:
        if entry.statistics is not None:
            _show_statistics(entry)
    warnings = len(report.findings) - report.errors
    if report.ok:
        tokens = sum(s.n_tokens for s in report.sets)
        ui.emit(f"OK {sum(s.n_shards for s in report.sets):,} shards {tokens:,} tokens, {warnings} warnings")
    else:
        ui.emit(f"{report.errors} errors, {warnings} warnings. What a code means: lm validate --explain CODE")


def _show_statistics(entry: Any) -> None:
    s = entry.statistics
    rows: list[tuple[str, str]] = []
    if s.length_quantiles:
        rows.append(("tokens per document", ", ".join(f"{k} {v:,}" for k, v in s.length_quantiles.items())))
    if s.bytes_per_token is not None:
        rows.append(("bytes per token", f"{s.bytes_per_token:.3f}"))
    if s.eos_share is not None:
        rows.append(("EOS share", f"{100 * s.eos_share:.3f} %"))
    rows.append(("unigram entropy", f"{s.entropy_bits:.2f} bits over {s.distinct_ids:,} ids"))
    rows.append(("top ids", "  ".join(f"{text or number!r} {100 * share:.1f}%" for number, share, text in s.top_ids)))
    if s.duplicate_documents is not None:
        rows.append(("repeated documents", f"{s.duplicate_documents:,}"))
    if s.decoded_documents:
        rows.append(("decoded and proven", f"{s.decoded_documents:,} documents hash to their source text"))
    for name, share in s.seen_ngrams.items():
        rows.append((f"n-grams of {name}", f"{100 * share:.2f} % occur in train"))
    rows += [(f"at token {position:,}", repr(text)) for position, text in s.windows]
    rows += [("good for", line) for line in s.advice]
    ui.table(["", str(entry.path)], rows)
