"""Corpora with a name: where they are on the Hub, which configurations people ask for, which column holds the text.

    lm tokenize --dataset fineweb-edu                 the default configuration
    lm tokenize --dataset fineweb-edu:sample-100BT    another one; 100BT is short for sample-100BT
    lm tokenize --dataset org/name:config@revision    anything else on the Hub

A dataset that is not listed needs no entry: its own card says which files belong to which configuration.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from lmcore.config import did_you_mean, same_name
from lmcore.errors import LmError


@dataclass(frozen=True)
class Corpus:
    """A named corpus."""

    repository: str
    default: str | None
    """Configuration when none is named; None leaves it to the dataset's card."""
    configs: dict[str, str | None] = field(default_factory=dict)
    """What a user may type -> configuration on the Hub."""
    text_column: str = "text"
    url_lists: str | None = None
    """For corpora that are lists of URLs: path of the list inside the repository, {config} filled in."""
    about: str = ""


REGISTRY: dict[str, Corpus] = {
    "fineweb-edu": Corpus(
        "HuggingFaceFW/fineweb-edu",
        "sample-10BT",
        {
            "10BT": "sample-10BT",
            "100BT": "sample-100BT",
            "350BT": "sample-350BT",
            "full": "default",
        },
        about="educational web pages, 1.3T tokens; samples of 10B, 100B and 350B",
    ),
    "fineweb": Corpus(
        "HuggingFaceFW/fineweb",
        "sample-10BT",
        {
            "10BT": "sample-10BT",
            "100BT": "sample-100BT",
            "350BT": "sample-350BT",
            "full": "default",
        },
        about="web pages, 15T tokens; samples of 10B, 100B and 350B",
    ),
    "openwebtext": Corpus(
        "Skylion007/openwebtext",
        None,
        {"full": None},
        about="pages linked from Reddit, 9B tokens (GPT-2's kind of data)",
    ),
    "dolma": Corpus(
        "allenai/dolma",
        "v1_6-sample",
        {"full": "v1_7", "sample": "v1_6-sample"},
        url_lists="urls/{config}.txt",
        about="web, code, papers, books, 3T tokens; v1_6-sample has 10B",
    ),
}


@dataclass(frozen=True)
class DatasetName:
    """What `--dataset` names, resolved against the registry."""

    repository: str
    config: str | None
    revision: str | None
    corpus: Corpus | None


def parse_dataset(spec: str) -> DatasetName:
    """'fineweb-edu:100BT' or 'org/name[:config][@revision]' -> repository, configuration, revision."""
    rest, _, revision = spec.partition("@")
    name, _, config = rest.partition(":")
    corpus = REGISTRY.get(same_name(name, REGISTRY) or "")
    if corpus is not None:
        wanted = corpus.configs.get(same_name(config, corpus.configs) or "", config) if config else corpus.default
        return DatasetName(corpus.repository, wanted, revision or None, corpus)
    parts = name.split("/")
    if len(parts) != 2 or not all(parts):
        known = ", ".join(["stdlib", *REGISTRY])
        raise LmError(
            f"--dataset {spec}: not a known dataset; known are {known}, or org/name[:config][@revision] on the Hub"
            f"{did_you_mean(name, ['stdlib', *REGISTRY])}",
            hint="For files of your own: lm tokenize PATH",
        )
    return DatasetName(name, config or None, revision or None, None)
