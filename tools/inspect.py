"""`lm inspect`: from a token, or a row of a training step, to its document, and back."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import ui

if TYPE_CHECKING:
    from lmcore.data.provenance import Locator, Origin
    from lmcore.data.stream import TokenStream

_WHERE = "Which tokens (one of)"
_SHOW = "What is shown"


def command(
    path: Annotated[Path, typer.Argument(help="A shard set, a view, or a run (with --step).", show_default=False)],
    token: Annotated[
        int | None, typer.Option(min=0, help="Position in the token stream.", rich_help_panel=_WHERE)
    ] = None,
    step: Annotated[int | None, typer.Option(min=1, help="Training step of a run.", rich_help_panel=_WHERE)] = None,
    row: Annotated[
        int | None,
        typer.Option(min=0, help="Row of the step's batch; all rows when not given.", rich_help_panel=_WHERE),
    ] = None,
    document: Annotated[
        str | None, typer.Option("--hash", help="Content hash of a document (16 hex digits).", rich_help_panel=_WHERE)
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(help="The exact text of a document, or @FILE that holds it.", rich_help_panel=_WHERE),
    ] = None,
    source: Annotated[
        str | None,
        typer.Option(metavar="FILE[:ROW]", help="A record of a source file; row 0 by default.", rich_help_panel=_WHERE),
    ] = None,
    length: Annotated[
        int, typer.Option(min=1, max=1 << 20, help="Tokens that are decoded from there.", rich_help_panel=_SHOW)
    ] = 64,
    full_text: Annotated[
        bool, typer.Option("--full-text", help="Show the whole text of the documents.", rich_help_panel=_SHOW)
    ] = False,
    json: ui.Json = False,
    quiet: ui.Quiet = False,
) -> None:
    """Show where tokens come from: file, row, content hash and text; and where a document went.

    Without an option it shows what the set is and its first tokens. Rows of a step are those of lm train, whatever the
    number of ranks was.

    Examples:

        lm inspect shards/stdlib/train --token 1000000

        lm inspect runs/default --step 1200 --row 3

        lm inspect shards/web --text @suspect.txt
    """
    from lmcore.errors import LmError

    chosen = [name for name, v in _options(token, step, document, text, source).items() if v is not None]
    if len(chosen) > 1:
        raise LmError(f"choose one of {', '.join(chosen)}.")
    if row is not None and step is None:
        raise LmError("--row belongs to --step.")
    if step is not None:
        windows = _windows_of_step(path, step, row)
    else:
        from lmcore.data.stream import TokenStream

        windows = [("", TokenStream.open(path), start) for start in _starts(path, token, document, text, source)]
    found = [_describe(title, stream, start, length, full_text) for title, stream, start in windows]
    if json:
        ui.emit_json(found)
        return
    for entry in found:
        _show(entry)


def _options(*values: Any) -> dict[str, Any]:
    return dict(zip(("--token", "--step", "--hash", "--text", "--source"), values, strict=True))


def _starts(path: Path, token: int | None, document: str | None, text: str | None, source: str | None) -> list[int]:
    """Stream positions that the options mean."""
    from lmcore.data.provenance import Locator
    from lmcore.data.stream import TokenStream
    from lmcore.errors import Exit, LmError, from_os_error

    if document is None and text is None and source is None:
        return [token or 0]
    locator = Locator(TokenStream.open(path))
    if document is not None:
        places = locator.by_hash(document)
    elif text is not None:
        if text.startswith("@"):
            try:
                raw = Path(text[1:]).read_bytes()
            except OSError as error:
                raise from_os_error(error, text[1:], "read") from error
        else:
            raw = ui.typed_text(text).encode()
        places = locator.by_text(raw)
    else:
        name, _, number = (source or "").rpartition(":")
        name, number = (name, number) if name and number.isdigit() else (source or "", "0")
        places = locator.by_source(name, int(number))
    if not places:
        raise LmError(f"{path}: this document is not in the stream.", code=Exit.DATA)
    return [place.start for place in places]


def _windows_of_step(run: Path, step: int, row: int | None) -> list[tuple[str, TokenStream, int]]:
    """(title, stream, start) of the rows that a run trained on at a step."""
    from lmcore.data.sampler import Mixture, Sampler
    from lmcore.errors import LmError
    from lmcore.training.data import inspect, open_data
    from lmcore.training.rundir import RunDirectory, read_metrics

    config = RunDirectory(run).config()
    if config is None:
        raise LmError(f"{run}: no run of lm train (there is no config.yaml).")
    if config.data.stream is not None:
        raise LmError(f"{run}: trained on a stream of text without shards; its rows cannot be looked up.")
    record = next((r for r in reversed(read_metrics(run)) if r.get("step") == step and r.get("kind") == "train"), None)
    if record is None:
        raise LmError(f"{run}: step {step:,} is not in metrics.jsonl; the run has not come that far.")
    first = int(record["tokens"]) // config.model.context_length - config.rows
    if row is not None and row >= config.rows:
        raise LmError(f"row {row}: a step of this run has rows 0 to {config.rows - 1}.")
    samples = open_data(config, inspect(config.data), run).samples
    result = []
    for number in range(config.rows) if row is None else [row]:
        sample = first + number
        sampler: object = samples
        inner = sample
        if isinstance(samples, Mixture):
            which, within = samples.locate(sample, 1)
            sampler, inner = samples.samplers[int(which[0])], int(within[0])
        assert isinstance(sampler, Sampler)
        result.append(
            (f"step {step} row {number} (sample {sample:,})", sampler.stream, int(sampler.starts(inner, 1)[0]))
        )
    return result


def _describe(title: str, stream: TokenStream, start: int, length: int, full_text: bool) -> dict[str, Any]:
    import numpy as np

    from lmcore.errors import LmError

    if start >= stream.n_tokens:
        raise LmError(f"token {start:,}: the stream has tokens 0 to {stream.n_tokens - 1:,}.")
    length = min(length, stream.n_tokens)
    ids = stream.windows(np.array([start]), length, wrap=True)[0].tolist()
    tokenizer = _tokenizer(stream)
    shard, offset = stream.locate(start)
    assert stream.manifest is not None
    entry: dict[str, Any] = {
        "title": title,
        "path": str(stream.path),
        "start": start,
        "length": length,
        "shard": stream.manifest.shards[shard].name,
        "offset": offset,
        "ids": ids,
        "text": tokenizer.decode(ids, specials=True) if tokenizer is not None else None,
        "documents": [],
    }
    if all(e.docs_sha256 is not None for e in stream.manifest.shards):
        locator = _locator(stream)
        entry["documents"] = [
            _document(locator, origin, tokenizer, full_text) for origin in locator.in_window(start, length)
        ]
    return entry


def _document(locator: Locator, origin: Origin, tokenizer: Any, full_text: bool) -> dict[str, Any]:
    from dataclasses import asdict

    from lmcore.data.provenance import content_hash

    entry = asdict(origin)
    original = locator.source_text(origin)
    entry["source_found"] = original is not None
    entry["source_matches"] = f"{content_hash(original):016x}" == origin.hash if original is not None else None
    if full_text:
        ids = locator.stream.read(origin.start, origin.stop).tolist()
        entry["text"] = tokenizer.decode(ids) if tokenizer is not None else None
    return entry


def _locator(stream: TokenStream) -> Locator:
    """One per stream: building it reads all indexes."""
    from lmcore.data.provenance import Locator

    found: Locator | None = stream.__dict__.get("_locator")
    if found is None:
        found = stream.__dict__["_locator"] = Locator(stream)
    return found


def _tokenizer(stream: TokenStream) -> Any:
    from lmcore.data.tokenizer import Tokenizer

    if stream.tokenizer_path is None:
        return None
    found = stream.__dict__.get("_decoder")
    if found is None:
        found = stream.__dict__["_decoder"] = Tokenizer.from_file(stream.tokenizer_path)
    return found


def _show(entry: dict[str, Any]) -> None:
    title = entry["title"] + ": " if entry["title"] else ""
    ui.emit(
        f"{title}{entry['path']} token {entry['start']:,} = {entry['shard']}.npy offset {entry['offset']:,}, "
        f"{entry['length']:,} tokens"
    )
    ui.emit(repr(entry["text"]) if entry["text"] is not None else " ".join(map(str, entry["ids"])))
    if not entry["documents"]:
        ui.emit("There is no document index (adopted data), so the tokens cannot be traced further.")
        return
    ui.table(
        ["source", "row", "hash", "tokens", "from token", "source today"],
        [
            (
                d["source"] or f"unit {d['unit']}",
                d["row"],
                d["hash"],
                f"{d['start']:,} - {d['stop'] - 1:,}",
                f"{d['token_in_document']:,}",
                {True: "same text", False: "other text", None: "not at hand"}[d["source_matches"]],
            )
            for d in entry["documents"]
        ],
        right=["row", "from token"],
    )
    for d in entry["documents"]:
        if d.get("text") is not None:
            ui.emit(f"--- {d['source'] or d['hash']}")
            ui.emit(d["text"])
