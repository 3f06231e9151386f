"""The Hub and other places behind URLs: names become pinned files, files become readable streams.

A dataset is pinned to a commit when the plan is made, so a run that is continued next week reads the same bytes. The
files of a configuration are enumerated with `datasets` and then read by our own readers (row groups in parallel, read
ahead); what these cannot read (CSV, Arrow, images of pages in archives) is iterated through `datasets` itself. A
dataset that exists only as a loading script is taken from the Hub's own parquet conversion.

HF_ENDPOINT, HF_HOME and HF_TOKEN mean what they mean everywhere. `huggingface_hub` retries an unreachable server for
about 24 seconds before it gives up; a connection of three seconds at the start says it earlier.
"""

from __future__ import annotations

import functools
import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast
from urllib.parse import parse_qs, quote, urlsplit

from lmcore.data.content import HEAD_BYTES
from lmcore.data.http_file import http_size, open_http
from lmcore.data.registry import DatasetName, parse_dataset
from lmcore.data.sources import AUTO, Format, Reading, Source, Unit, format_of_name, remote_kind
from lmcore.errors import Exit, LmError

CONVERTED = "refs/convert/parquet"
PREFLIGHT_S = 3.0
_PATHS_AT_ONCE = 500


# ---------------------------------------------------------------------------------------- reaching it


def endpoint() -> str:
    """The Hub in use."""
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


def preflight() -> None:
    """Raise LmError (74) within seconds when the Hub cannot be reached."""
    hint = "Set HF_ENDPOINT to a mirror, or use local files or --dataset stdlib."
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
        raise LmError("The Hub is switched off by HF_HUB_OFFLINE.", hint=hint, code=Exit.IO)
    request = urllib.request.Request(endpoint() + "/api/models?limit=1", method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=PREFLIGHT_S):
            pass
    except urllib.error.HTTPError:
        pass  # it answers
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        raise LmError(f"{endpoint()}: the Hub cannot be reached ({reason}).", hint=hint, code=Exit.IO) from error


def _translate(error: Exception, what: str) -> LmError:
    """An error of the Hub libraries as one sentence."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return LmError(f"{what}: access must be granted first.", hint="Accept its terms on the Hub and set HF_TOKEN.")
    if isinstance(error, errors.RepositoryNotFoundError) or type(error).__name__ == "DatasetNotFoundError":
        return LmError(f"{what}: not found on {endpoint()}.", hint="A private repository needs HF_TOKEN.")
    if isinstance(error, errors.RevisionNotFoundError):
        return LmError(f"{what}: no such revision on {endpoint()}.")
    if isinstance(error, errors.EntryNotFoundError):
        return LmError(f"{what}: no such file on {endpoint()}.")
    text = " ".join(str(error).split())[:200]
    return LmError(f"{what}: the Hub did not deliver ({text}).", hint="Run the same command again.", code=Exit.IO)


# ---------------------------------------------------------------------------------------- tokenizers


def fetch_tokenizer(spec: str) -> Path:
    """Local path of the tokenizer.json of a model 'name[@revision]', from the cache when the Hub is unreachable. Its
    tokenizer_config.json, when there is one, lies beside it."""
    import huggingface_hub
    from huggingface_hub import errors

    name, _, revision = spec.partition("@")
    cached = huggingface_hub.try_to_load_from_cache(name, "tokenizer.json", revision=revision or None)
    try:
        preflight()
    except LmError:
        if isinstance(cached, str):
            return Path(cached)
        raise
    try:
        path = huggingface_hub.hf_hub_download(name, "tokenizer.json", revision=revision or None)
        try:
            huggingface_hub.hf_hub_download(name, "tokenizer_config.json", revision=revision or None)
        except errors.EntryNotFoundError:
            pass  # many models have none
        return Path(path)
    except errors.HFValidationError as error:
        raise LmError(f"{spec}: neither a file nor the name of a model on the Hub.") from error
    except Exception as error:  # many kinds, from several libraries
        raise _translate(error, f"tokenizer {spec}") from error


# ---------------------------------------------------------------------------------------- datasets


def resolve(spec: str) -> Source:
    """The files of a dataset's train split, pinned to a commit. Raises LmError: 2 for what does not exist, 74 when the
    Hub cannot be reached."""
    name = parse_dataset(spec)
    preflight()
    import huggingface_hub

    huggingface_hub.logging.set_verbosity_error()  # every retry would be a warning of its own
    try:
        commit = str(huggingface_hub.HfApi().dataset_info(name.repository, revision=name.revision).sha)
        if name.corpus is not None and name.corpus.url_lists is not None:
            units = _listed_urls(name, commit)
        else:
            units, commit = _train_files(name, commit)
    except LmError:
        raise
    except Exception as error:  # many kinds, from several libraries
        raise _translate(error, f"dataset {spec}") from error
    description = {"kind": "hub", "repository": name.repository, "config": name.config, "revision": commit}
    return Source(description, units)


def _train_files(name: DatasetName, commit: str) -> tuple[tuple[Unit, ...], str]:
    """(units, commit): the data files of the train split, or one unit that `datasets` iterates."""
    import datasets

    datasets.disable_progress_bars()
    try:
        builder = datasets.load_dataset_builder(name.repository, name.config, revision=commit)
    except ValueError as error:
        if "BuilderConfig" in str(error) or "Config name is missing" in str(error):
            known = datasets.get_dataset_config_names(name.repository, revision=commit)
            raise LmError(
                f"{name.repository}: configurations are {', '.join(known)}; asked for was {name.config or 'none'}.",
                hint=f"Use: --dataset {name.repository}:{known[0]}",
            ) from error
        raise
    except RuntimeError as error:
        if "script" not in str(error):
            raise
        return _converted_files(name)
    files = builder.config.data_files
    if not files:
        return (_rows_unit(name, commit, "train"),), commit
    split = "train" if "train" in files else next(iter(files))
    paths = [str(path) for path in files[split]]
    kinds = [format_of_name(path) for path in paths]
    if any(kind is None or kind[0] not in ("parquet", "jsonl") for kind in kinds):
        return (_rows_unit(name, commit, split),), commit
    sizes = _sizes(name.repository, commit, paths)
    units = (Unit(p, k[0], s, k[1]) for p, k, s in zip(paths, kinds, sizes, strict=True) if k is not None)
    return tuple(units), commit


def _converted_files(name: DatasetName) -> tuple[tuple[Unit, ...], str]:
    """The Hub's parquet conversion of a dataset that exists only as a loading script: CONFIG/SPLIT/*.parquet."""
    import huggingface_hub

    api = huggingface_hub.HfApi()
    commit = str(api.dataset_info(name.repository, revision=CONVERTED).sha)
    found: dict[str, list[Any]] = {}
    for entry in api.list_repo_tree(name.repository, recursive=True, revision=commit, repo_type="dataset"):
        parts = entry.path.split("/")
        if len(parts) == 3 and entry.path.endswith(".parquet") and parts[1].removeprefix("partial-") == "train":
            found.setdefault(parts[0], []).append(entry)
    config = name.config or ("default" if "default" in found else next(iter(found), ""))
    if config not in found:
        raise LmError(
            f"{name.repository}: configurations are {', '.join(found) or 'none'}; asked for was {config or 'none'}."
        )
    units = tuple(
        Unit(f"hf://datasets/{name.repository}@{commit}/{entry.path}", "parquet", int(entry.size))
        for entry in sorted(found[config], key=lambda entry: str(entry.path))
    )
    return units, commit


def _listed_urls(name: DatasetName, commit: str) -> tuple[Unit, ...]:
    """A corpus that is a list of URLs of compressed JSON lines."""
    import huggingface_hub

    assert name.corpus is not None
    assert name.corpus.url_lists is not None
    path = name.corpus.url_lists.format(config=name.config)
    local = huggingface_hub.hf_hub_download(name.repository, path, revision=commit, repo_type="dataset")
    urls = [line.strip() for line in Path(local).read_text(encoding="utf-8").splitlines() if line.strip()]
    if not urls:
        raise LmError(f"{name.repository}: {path} lists no files.", code=Exit.DATA)
    compressions = {".gz": "gzip", ".zst": "zstd"}
    return tuple(Unit(url, "jsonl", -1, compressions.get(os.path.splitext(url)[1], "")) for url in urls)


def _sizes(repository: str, commit: str, paths: list[str]) -> list[int]:
    import huggingface_hub

    prefix = f"hf://datasets/{repository}@{commit}/"
    inside = [path.removeprefix(prefix) for path in paths]
    api = huggingface_hub.HfApi()
    sizes: dict[str, int] = {}
    for at in range(0, len(inside), _PATHS_AT_ONCE):
        entries = api.get_paths_info(repository, inside[at : at + _PATHS_AT_ONCE], revision=commit, repo_type="dataset")
        sizes.update({entry.path: int(entry.size) for entry in entries if hasattr(entry, "size")})
    return [sizes.get(path, -1) for path in inside]


def _rows_unit(name: DatasetName, commit: str, split: str) -> Unit:
    query = f"config={quote(name.config)}&" if name.config else ""
    return Unit(f"datasets://{name.repository}?{query}split={quote(split)}&revision={commit}", "rows", -1)


def iterate_rows(url: str, column: str, *, skip: int = 0) -> Iterator[Any]:
    """The values of the text column of a `datasets://` unit, from row `skip` on."""
    import datasets

    parts = urlsplit(url)
    query = {key: values[0] for key, values in parse_qs(parts.query).items()}
    try:
        rows = datasets.load_dataset(
            f"{parts.netloc}{parts.path}",
            query.get("config"),
            split=query["split"],
            revision=query["revision"],
            streaming=True,
        )
        if rows.column_names is not None and column not in rows.column_names:
            raise LmError(
                f"{parts.netloc}{parts.path}: no column '{column}'; it has {', '.join(rows.column_names)}.",
                hint="Use: --text-column NAME",
            )
        for row in rows.skip(skip) if skip else rows:
            yield row.get(column)
    except (LmError, GeneratorExit):
        raise
    except Exception as error:  # many kinds, from several libraries
        raise _translate(error, f"dataset {parts.netloc}{parts.path}") from error


# ---------------------------------------------------------------------------------------- URLs


def list_url(url: str, notes: list[str], reading: Reading = AUTO) -> list[Unit]:
    """Units behind a URL: one file, and where the file system knows them (not on the web) a glob or a folder, of which
    `notes` gets what is left out. hf:// is pinned to a commit."""
    if url.startswith(_WEB):
        return [_web_unit(url, reading)]
    if url.startswith("hf://"):
        preflight()
        url = _pinned(url)
    try:
        import fsspec

        system, path = fsspec.core.url_to_fs(url, **_options(url.partition("://")[0]))
        if any(mark in path for mark in "*?["):
            found = system.glob(path)
        elif system.isdir(path):
            inside = system.find(path)
            found = [p for p in inside if format_of_name(p) is not None]
            if len(found) < len(inside):
                notes.append(f"{url}: {len(inside) - len(found)} files of other kinds are left out.")
        else:
            found = [path]
        units = [_remote_unit(system, str(p), reading) for p in sorted(found)]
    except ImportError as error:
        raise LmError(f"{url}: this kind of URL needs another package ({error}).", hint=_extra(url)) from error
    except LmError:
        raise
    except FileNotFoundError as error:
        raise LmError(f"{url}: no such file or folder.", hint=_hint(url)) from error
    except Exception as error:  # every file system has its own
        text = " ".join(str(error).split())[:200] or type(error).__name__
        raise LmError(f"{url}: cannot be listed ({text}).", hint=_hint(url), code=Exit.IO) from error
    if not units:
        raise LmError(f"{url}: nothing to tokenize here.", hint=_hint(url))
    return units


def _remote_unit(system: Any, path: str, reading: Reading) -> Unit:
    url = system.unstrip_protocol(path)
    form, compression = _remote_kind(url, reading)
    size = system.info(path).get("size")
    return Unit(url, form, -1 if size is None else int(size), compression)


def _web_unit(url: str, reading: Reading) -> Unit:
    try:
        form, compression = _remote_kind(url, reading)
        return Unit(url, form, http_size(url, PREFLIGHT_S), compression)
    except OSError as error:
        reason = getattr(error, "reason", None) or error
        raise LmError(f"{url}: cannot be reached ({reason}).", hint=_hint(url), code=Exit.IO) from error


def _remote_kind(url: str, reading: Reading) -> tuple[Format, str]:
    """(format, compression): by the name where it says both, else by the first bytes."""
    named = format_of_name(url)
    if named is not None and reading.format in ("auto", named[0]):
        return named
    with open_url(url) as file:
        return remote_kind(url, file.read(HEAD_BYTES), reading)


def _pinned(url: str) -> str:
    """hf://datasets/org/name/file -> hf://datasets/org/name@COMMIT/file."""
    import huggingface_hub

    try:
        resolved = huggingface_hub.HfFileSystem().resolve_path(url)
        api = huggingface_hub.HfApi()
        commit = api.repo_info(resolved.repo_id, repo_type=resolved.repo_type, revision=resolved.revision).sha
    except Exception as error:  # many kinds, from several libraries
        raise _translate(error, url) from error
    prefix = {"dataset": "datasets/", "space": "spaces/"}.get(resolved.repo_type, "")
    return f"hf://{prefix}{resolved.repo_id}@{commit}/{resolved.path_in_repo}"


def _extra(url: str) -> str:
    return "Install it with: pip install 'lmshards[s3]'" if url.startswith(_S3) else ""


def _hint(url: str) -> str:
    """What to look at when a place cannot be listed."""
    if not url.startswith(_S3):
        return "Check the URL and the network."
    where = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or "AWS itself"
    return (
        f"Asked was {where}; AWS_ENDPOINT_URL names another server, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or "
        "AWS_PROFILE) say who asks, FSSPEC_S3_ANON=true asks as nobody."
    )


_S3, _WEB = ("s3://", "s3a://"), ("http://", "https://")


def _options(protocol: str) -> dict[str, Any]:
    """Options of a file system. The client of S3 would wait a minute for a server that does not answer, many times;
    what breaks on the way is read again by the readers."""
    if f"{protocol}://" in _S3:
        return {"config_kwargs": {"connect_timeout": 3, "read_timeout": 60, "retries": {"max_attempts": 1}}}
    return {}


def open_url(url: str) -> BinaryIO:
    """Open the bytes behind a URL for reading and seeking; raises what the file system raises (readers retry)."""
    if url.startswith(_WEB):
        return open_http(url)
    system = _file_system(url.partition("://")[0])
    path = str(type(system)._strip_protocol(url))
    # Parquet is read by exact ranges; a read-ahead cache would fetch the columns nobody asked for.
    options = (
        {"cache_type": "none"} if path.endswith(".parquet") else {"cache_type": "readahead", "block_size": 8 << 20}
    )
    return cast("BinaryIO", system.open(path, "rb", **options))


@functools.cache
def _file_system(protocol: str) -> Any:
    import fsspec

    return fsspec.filesystem(protocol, **_options(protocol))
