"""What `lm validate` can find: a stable code for each, what it means and what to do.

Codes are an interface: scripts may branch on them, so a code is never reused. V0xx are faults of a set or view, V1xx
are warnings about its content, V2xx concern foreign data.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Literal

from lmcore.errors import LmError

Severity = Literal["error", "warning"]


@dataclass(frozen=True)
class Code:
    """severity, one line, and the explanation that `--explain` prints."""

    severity: Severity
    title: str
    explanation: str


@dataclass(frozen=True)
class Finding:
    """One thing found: `where` is a file or directory, `message` a sentence with the numbers."""

    code: str
    where: str
    message: str
    repair: str = ""
    """A command that mends it, when there is one."""

    @property
    def severity(self) -> Severity:
        return CODES[self.code].severity


def explain(code: str) -> str:
    """Title and explanation of a code; an LmError (2) with the nearest code for an unknown one."""
    entry = CODES.get(code.upper())
    if entry is None:
        near = difflib.get_close_matches(code.upper(), CODES, 1, 0.5)
        raise LmError(
            f"{code} is not a finding.", hint=f"Did you mean {near[0]}?" if near else "Codes are V001 to V299."
        )
    return f"{code.upper()} ({entry.severity}): {entry.title}\n{entry.explanation}"


_RETOKENIZE = "Run lm validate SET --repair, or the same lm tokenize command again in a new directory."
_REVIEW = "Run lm split on the set again: views are made anew, no token is copied."

CODES: dict[str, Code] = {
    "V001": Code(
        "error",
        "the manifest cannot be read",
        "manifest.json is missing, is not valid JSON, misses a field or contradicts itself. Nothing else can be "
        "trusted "
        "then. Restore it from a copy, or make the set again.",
    ),
    "V002": Code(
        "error",
        "the format is newer than this version",
        "The manifest names a format that this version does not know. Update lmshards.",
    ),
    "V003": Code(
        "error",
        "the set is not finished",
        "plan.json is there but manifest.json, which is written last, is not: lm tokenize was stopped. Run the same "
        "command again; it continues after the last complete shard.",
    ),
    "V004": Code(
        "error",
        "the manifest was edited",
        "dataset_id is the hash of what defines the token stream, and it does not match the rest of the manifest.",
    ),
    "V010": Code("error", "a shard is missing", f"A file that the manifest lists is not there. {_RETOKENIZE}"),
    "V011": Code(
        "warning",
        "a file is not listed",
        "An .npy file lies beside the shards but the manifest does not list it. It is never read. Readers that glob "
        "*.npy would read it; remove it if it is not wanted.",
    ),
    "V012": Code(
        "error",
        "a file has another size than listed",
        f"The file was cut, extended, or half copied. {_RETOKENIZE}",
    ),
    "V013": Code(
        "error",
        "the NPY header is not the one that the manifest implies",
        "The first 128 bytes are compared byte for byte with the header that follows from dtype, rows and seq_len, "
        "so that "
        f"a foreign header is never parsed. {_RETOKENIZE}",
    ),
    "V014": Code("error", "the content changed", f"The sha256 of the file is not the listed one. {_RETOKENIZE}"),
    "V015": Code(
        "error",
        "a shard holds the content of another",
        "Two files were swapped or one was copied over another. Rename them back.",
    ),
    "V016": Code(
        "error",
        "a listed name is not a readable regular file",
        "The name leads to a directory, a device, a pipe, a loop of links, or a file without permission.",
    ),
    "V017": Code(
        "warning",
        "left-overs of a killed run",
        "Names that start with .tmp- or .del- are temporaries of a run that was killed. They are never read; the next "
        "writing command removes them.",
    ),
    "V020": Code(
        "error",
        "an id lies outside the vocabulary",
        "A model that embeds this vocabulary would read out of bounds. The tokens were made with another tokenizer "
        "than "
        "the one that the manifest names.",
    ),
    "V021": Code("error", "max_id is not the largest id", "The manifest's max_id of a shard differs from its tokens."),
    "V022": Code(
        "error",
        "the pad is not EOS",
        "The last row of a set is padded with EOS behind the true tokens; something else stands there.",
    ),
    "V023": Code(
        "error",
        "EOS tokens and document ends disagree",
        "Every document of the index ends with EOS, and EOS stands nowhere else. A split by document would cut at the "
        "wrong places.",
    ),
    "V024": Code(
        "error",
        "the tokens are not the document",
        "The text decoded from a document's tokens does not hash to the content hash of the index: the shard was "
        "made with "
        "another tokenizer, or the index belongs to other data.",
    ),
    "V030": Code("error", "a document index is missing", f"A listed .docs.npy is not there. {_RETOKENIZE}"),
    "V031": Code(
        "error",
        "a document index is damaged",
        f"Size, header or sha256 of a .docs.npy are not as listed. {_RETOKENIZE}",
    ),
    "V033": Code(
        "error",
        "a document index is inconsistent",
        "Starts must rise strictly from 0 to the number of tokens, the listed counts must be right, and a document "
        "that "
        "runs on from the shard before must be the last one there.",
    ),
    "V040": Code(
        "error",
        "the tokenizer is missing",
        "The manifest names a tokenizer, but its copy tokenizer.json is not beside it. Copy it back; its sha256 is "
        "checked.",
    ),
    "V041": Code(
        "error",
        "the tokenizer is another one",
        "tokenizer.json is not the tokenizer that made the tokens (canonical sha256 differs).",
    ),
    "V042": Code(
        "error",
        "the tokenizer entry is wrong",
        "vocab_size or the special ids in the manifest are not those of tokenizer.json.",
    ),
    "V050": Code(
        "error",
        "the segments do not cover the set",
        "A set's stream must hold every true token of every shard exactly once, in order.",
    ),
    "V051": Code("error", "a total is wrong", "n_docs or n_bytes of the manifest is not the sum over the shards."),
    "V052": Code(
        "error",
        "segments overlap",
        "A token belongs to two segments of a view and would be trained twice.",
    ),
    "V060": Code(
        "error",
        "two views share tokens",
        f"The same tokens of a shard are in two views: validation would measure memory. {_REVIEW}",
    ),
    "V061": Code(
        "warning",
        "tokens are in no view",
        f"The views do not add up to the set, so some tokens are never used. {_REVIEW}",
    ),
    "V062": Code(
        "error",
        "two views share documents",
        "The same text, by content hash, is in two views. Split by document to prevent it (a split by shard cannot).",
    ),
    "V063": Code("error", "a view belongs to other data", f"The view was made from another set or state. {_REVIEW}"),
    "V070": Code(
        "warning",
        "the journal disagrees",
        "journal.jsonl records another hash for a shard than the manifest. The manifest counts; someone changed one.",
    ),
    "V101": Code(
        "warning", "shards are equal", "Two shards hold the same bytes: this data is trained twice per epoch."
    ),
    "V102": Code(
        "warning",
        "rows are equal",
        "Many rows of the shards are the same: duplicated or generated text. lm tokenize --dedup drops exact "
        "duplicates.",
    ),
    "V103": Code(
        "warning",
        "rows of one id",
        "Rows in which one id takes more than half of the places: padding, binary files, or long runs of one "
        "character.",
    ),
    "V104": Code(
        "warning",
        "the ids look like noise",
        "Ids are spread nearly evenly over the vocabulary; text never is. Wrong byte order, wrong dtype or "
        "compressed data?",
    ),
    "V105": Code(
        "warning",
        "one id dominates",
        "A single id takes more than a third of all tokens: padding inside the data, or a broken export.",
    ),
    "V106": Code(
        "warning",
        "odd number of bytes per token",
        "Text has about 1 to 8 bytes per token, and the decoded tokens must be as long as the text was. Often a wrong "
        "tokenizer.",
    ),
    "V107": Code(
        "warning",
        "periodic rows",
        "Rows that repeat a pattern of up to 13 ids for 32 times or more: they can make the loss jump.",
    ),
    "V108": Code(
        "warning", "odd rate of EOS", "No EOS at all, or an EOS every few tokens: boundaries are missing or forged."
    ),
    "V109": Code(
        "warning",
        "documents are repeated",
        "Several documents have the same content hash. lm tokenize --dedup keeps the first of them.",
    ),
    "V110": Code(
        "warning",
        "validation text seen in training",
        "A share of the n-grams (about 50 bytes of text) of a held-out view occurs in train although no whole "
        "document does: near-duplicates.",
    ),
    "V111": Code("warning", "little data", "The stream is shorter than the usual context lengths."),
    "V200": Code(
        "error",
        "not a shard set",
        "There is neither a manifest nor a form of data that is recognised. lm import lists the forms.",
    ),
    "V201": Code(
        "warning",
        "foreign data",
        "Token data without a manifest: it can be checked only in part. lm import adopts it (links where the bytes "
        "allow "
        "it, conversion where they do not), and then everything works with it.",
    ),
    "V202": Code(
        "warning",
        "raw memmap under an .npy name",
        "The file has no NPY header. It is read as plain little-endian ids; numpy.load cannot open it.",
    ),
    "V203": Code(
        "error",
        "files differ in form",
        "Files of one folder must have the same dtype and row length.",
    ),
    "V204": Code("error", "the ids are no token ids", "Negative numbers, floats, or another type that is no token id."),
    "V205": Code(
        "error",
        "the file is damaged",
        "Size and header disagree, the magic number is wrong, or an index points outside its data.",
    ),
    "V206": Code(
        "error",
        "a pickle",
        "The file can only be read by running code that is inside it; it is not opened. Save plain arrays or tensors.",
    ),
    "V207": Code(
        "error",
        "the width of the ids is not clear",
        "A headerless file does not say how many bytes an id has, and what it holds can be read in more than one way. "
        "Say it: lm import PATH --out DIR --width 2",
    ),
}
